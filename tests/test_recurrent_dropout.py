"""Masks of the recurrent product: every cell against the reference, the reference against the formulas written out."""

import dataclasses
import functools
import itertools
import math

import numpy as np
import pytest

from fastrnn import GRU, LSTM, functional, stack
from fastrnn import backend as backends
from fastrnn.kernels import cpu, threads
from fastrnn.testing import assert_close, gradcheck, problem, run
from fastrnn.weights import GATES

CELLS = ["rnn_tanh", "rnn_relu", "rnn_sigmoid", "lstm", "lstm_projected", "gru", "gru_reset_before"]
# Compiling takes most of the time: where cases are a sample, it is of the kernels that they call.
pytestmark = pytest.mark.masked(dtype="float32")
each_cell = pytest.mark.parametrize("cell", CELLS)
each_backend = pytest.mark.parametrize("backend", ["cpu", "reference"])
each_dtype = pytest.mark.parametrize("dtype", ["float32", "float64"])
each_count = pytest.mark.parametrize("each", [False, True], ids=["one-mask", "each-gate"])
each_direction = pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
each_ragged = pytest.mark.parametrize("ragged", [False, True], ids=["", "lengths-reset"])


def task(cell, *size, **options):
    if cell == "lstm_projected":
        cell, options["P"] = "lstm", (size[3] + 1) // 2
    return problem(cell, *size, **options)


def draw(one, each, seed=0):
    """Masks as dropout draws them, at a rate of 0.3, but for some numbers of any size and sign."""
    random = np.random.default_rng(seed + 77)
    shape = one.state[0].shape
    shape = (GATES[one.cell], *shape) if each else shape
    masks = (random.random(shape) < 0.7) / 0.7
    return np.where(random.random(shape) < 0.2, random.standard_normal(shape), masks).astype(one.x.dtype)


def masked(where, masks, **options):
    """A backend's forward with masks, and its backward."""
    module = backends.load(where) if isinstance(where, str) else where
    return functools.partial(module.forward, recurrent_masks=masks, **options), module.backward


def assert_same_bits(actual, expected):
    assert actual.keys() == expected.keys()
    for name, array in expected.items():
        assert (actual[name].shape, actual[name].dtype) == (array.shape, array.dtype), name
        assert actual[name].tobytes() == array.tobytes(), name


def check(one, masks):
    """Compare every result with the reference's in float64; see test_kernels.py for the tolerance."""
    expected = run(masked("reference", masks.astype(np.float64)), one.astype(np.float64))
    results = run(masked("cpu", masks), one)
    assert results.keys() == expected.keys()
    T, B, I = one.x.shape
    terms = (T + 1) * (B + I + len(one.params["weight_ih"]))
    for name, array in expected.items():
        assert results[name].dtype == one.x.dtype
        scale = max(1.0, math.sqrt(np.mean(array**2))) if array.size else 1.0
        assert_close(results[name], array, name, terms=terms, scale=scale)


# ---- the formulas


def sigmoid(a):
    return 1 / (1 + np.exp(-a))


def written_out(one, masks):
    """The output, step by step and gate by gate, as Keras' cells have it with ``implementation=1``."""
    G, params = GATES[one.cell], one.params
    masks = np.broadcast_to(masks, (G, *one.state[0].shape))
    W, U, b, b_h = ([*np.split(params[name], G)] for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
    h, c = (*one.state, None)[:2]
    outputs = []
    for x in one.x:
        from_x = [x @ W[g].T + b[g] for g in range(G)]
        dropped = [h * masks[g] for g in range(G)]
        if one.cell == "lstm":
            i, f, g, o = (from_x[g] + dropped[g] @ U[g].T + b_h[g] for g in range(G))
            c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
            h = sigmoid(o) * np.tanh(c)
            h = h @ params["weight_hr"].T if "weight_hr" in params else h
        elif G == 3:
            r, z = (sigmoid(from_x[g] + dropped[g] @ U[g].T + b_h[g]) for g in range(2))
            if one.cell == "gru":
                n = np.tanh(from_x[2] + r * (dropped[2] @ U[2].T + b_h[2]))
            else:
                n = np.tanh(from_x[2] + (r * dropped[2]) @ U[2].T + b_h[2])
            h = z * h + (1 - z) * n
        else:
            activation = {"rnn_tanh": np.tanh, "rnn_relu": lambda a: np.maximum(a, 0), "rnn_sigmoid": sigmoid}
            h = activation[one.cell](from_x[0] + dropped[0] @ U[0].T + b_h[0])
        outputs.append(h)
    return np.stack(outputs)


@pytest.mark.masked(dtype="float64")
@each_backend
@each_cell
@each_count
def test_formulas(backend, cell, each):
    one = task(cell, 6, 4, 5, 7, dtype="float64")
    masks = draw(one, each)
    output, _, _ = functional.forward(one.cell, one.x, one.params, one.state, backend=backend, recurrent_masks=masks)
    assert_close(output, written_out(one, masks), "output")


@pytest.mark.masked(dtype="float64")
@each_backend
@each_cell
@each_count
@each_ragged
def test_gradients_are_slopes(backend, cell, each, ragged):
    one = task(cell, 4, 3, 4, 6, dtype="float64", reverse=ragged, lengths=ragged, reset=ragged)
    gradcheck(masked(backend, draw(one, each)), one, entries=30)


# ---- the kernels against the reference

SIZES = [(1, 1, 1, 1), (5, 2, 3, 5), (3, 7, 17, 16), (9, 3, 5, 33), (4, 13, 33, 65), (33, 5, 8, 100), (3, 50, 2, 31)]


@each_cell
@each_dtype
@each_count
@pytest.mark.parametrize("size", SIZES, ids=lambda s: "T{}-B{}-I{}-H{}".format(*s))
def test_sizes(cell, dtype, each, size):
    one = task(cell, *size, dtype=dtype, bias=size[0] != 5)
    check(one, draw(one, each))


@each_cell
@each_dtype
@each_count
@each_direction
@pytest.mark.parametrize("lengths", [False, True, [0, 7, 3, 0, 5, 7], [0] * 6], ids=str)
@pytest.mark.parametrize("reset", [False, True], ids=["", "reset"])
def test_options(cell, dtype, each, reverse, lengths, reset):
    one = task(cell, 7, 6, 5, 40, dtype=dtype, lengths=lengths, reset=reset, reverse=reverse)
    check(one, draw(one, each))


@pytest.mark.sampled(4)
@each_cell
@each_count
def test_large(cell, each):
    """What is summed, and looks for an interrupt, in several pieces; and a row for long."""
    for size in [(150, 33, 9, 100), (300, 1, 17, 48), (20, 70, 40, 200)]:
        one = task(cell, *size, lengths=size[1] > 1, reverse=size[1] == 1)
        check(one, draw(one, each))


@pytest.mark.masked(cell="lstm_projected")
@each_dtype
@each_count
@pytest.mark.parametrize("P", [1, 3, 40, 99])
def test_projection_of_any_width(dtype, each, P):
    one = problem("lstm", 5, 3, 4, 100, P=P, dtype=dtype, lengths=True, reset=True)
    check(one, draw(one, each))


@pytest.mark.masked(dtype="float64")
@each_backend
@each_cell
def test_one_mask_is_that_of_every_gate(backend, cell):
    one = task(cell, 7, 6, 5, 20, dtype="float64", lengths=True)
    mask = draw(one, False)
    whole = np.broadcast_to(mask, (GATES[one.cell], *mask.shape))
    for masks in (whole, np.ascontiguousarray(whole)):
        results = run(masked(functional, masks, backend=backend), one)
        for name, array in run(masked(functional, mask, backend=backend), one).items():
            assert_close(results[name], array, name, scale=1)


@each_cell
@each_count
@each_ragged
def test_masks_of_ones(cell, each, ragged):
    """The same bits; but the gradient of h is one sum without masks, and with them one for each that is then added."""
    one = task(cell, 9, 6, 9, 20, lengths=ragged, reset=ragged)
    results, expected = run(masked("cpu", np.ones_like(draw(one, each))), one), run("cpu", one)
    for name in ("output", "h", "c"):
        assert name not in expected or results[name].tobytes() == expected[name].tobytes()
    for name, array in expected.items():
        assert_close(results[name], array, name, terms=1000, scale=max(1.0, math.sqrt(np.mean(array**2))))
    if not each and not one.cell.startswith("gru"):  # nothing else is added
        assert_same_bits(results, expected)


@each_cell
@each_count
def test_masks_of_zeros_cut_the_recurrence(cell, each):
    one = task(cell, 6, 4, 5, 9, bias=False)
    without = dataclasses.replace(one, params={**one.params, "weight_hh": np.zeros_like(one.params["weight_hh"])})
    results, expected = run(masked("cpu", np.zeros_like(draw(one, each))), one), run("cpu", without)
    assert not results.pop("dweight_hh").any()
    expected.pop("dweight_hh")
    for name, array in expected.items():
        assert_close(results[name], array, name, scale=1)


# ---- the promises


@each_cell
@each_count
@each_dtype
@each_direction
def test_a_row_has_the_same_bits_in_every_batch(cell, each, dtype, reverse):
    one = task(cell, 9, 20, 18, 33, dtype=dtype, reverse=reverse, lengths=True, reset=True)
    masks = draw(one, each)
    whole = run(masked("cpu", masks), one)
    random = np.random.default_rng(0)
    for rows in [[0], [7], *(random.permutation(20)[:n] for n in (2, 5, 13, 20))]:
        some = dataclasses.replace(
            one,
            x=one.x[:, rows].copy(),
            d_output=one.d_output[:, rows].copy(),
            reset=one.reset[:, rows].copy(),
            lengths=one.lengths[rows],
            state=tuple(s[rows] for s in one.state),
            d_state=tuple(s[rows] for s in one.d_state),
        )
        results = run(masked("cpu", masks[..., rows, :].copy()), some)
        for name in {"output", "dx", "h", "c", "dh", "dc"} & whole.keys():
            expected = whole[name][:, rows] if name in ("output", "dx") else whole[name][rows]
            assert results[name].tobytes() == expected.tobytes(), name


@each_cell
@each_count
@each_direction
def test_chunks_in_time_give_the_bits_of_the_whole(cell, each, reverse):
    one = task(cell, 23, 5, 16, 33, reverse=reverse)
    masks = draw(one, each)
    whole = run(masked("cpu", masks), one)
    chunks = list(itertools.pairwise([0, 1, 3, 11, 23]))
    walked = chunks[::-1] if reverse else chunks
    forward, backward = masked("cpu", masks, reverse=reverse, training=True)
    state, outputs, tapes, dx = one.state, {}, {}, {}
    for start, stop in walked:
        outputs[start], state, tapes[start] = forward(one.cell, one.x[start:stop], one.params, state)
    d_state = one.d_state
    for start, stop in walked[::-1]:
        dx[start], _, d_state = backward(tapes[start], one.d_output[start:stop], d_state)
    joined = {"output": np.concatenate([outputs[start] for start, _ in chunks]), **dict(zip("hc", state, strict=False))}
    joined |= {"dx": np.concatenate([dx[start] for start, _ in chunks])}
    joined |= dict(zip(("dh", "dc"), d_state, strict=False))
    assert_same_bits(joined, {name: whole[name] for name in joined})


@pytest.fixture
def number_of_threads():
    before = threads.get_num_threads()
    yield threads.set_num_threads
    threads.set_num_threads(before)


@each_cell
@each_count
@each_ragged
@pytest.mark.parametrize("size", [(40, 29, 66, 100), (40, 1, 20, 200), (30, 3, 20, 140)], ids=str)
def test_threads_change_no_bit(cell, each, ragged, size, number_of_threads, monkeypatch):
    """Also where threads share the units of a walk."""
    monkeypatch.setattr(cpu, "THREAD_FLOPS", 1)
    monkeypatch.setattr(threads, "cores", lambda: 4)
    one = task(cell, *size, lengths=ragged, reset=ragged and size[1] > 3, reverse=ragged)
    masks, results = draw(one, each), {}
    for number in (1, 2, 3):
        number_of_threads(number)
        results[number] = run(masked("cpu", masks), one)
        assert_same_bits(results[number], results[1])


@each_backend
@each_cell
@each_count
@each_ragged
def test_recompute(backend, cell, each, ragged, monkeypatch):
    monkeypatch.setattr(cpu, "CHUNK_BYTES", 1)
    monkeypatch.setattr(cpu, "OUTER_BLOCK", 8)
    one = task(cell, 25, 5, 7, 20, lengths=ragged, reset=ragged)
    masks = draw(one, each)
    found = []
    for recompute in (False, True):
        forward, backward = masked(backend, masks, lengths=one.lengths, reset=one.reset)
        output, state, tape = forward(one.cell, one.x, one.params, one.state, training=True, recompute=recompute)
        dx, dparams, dstate = backward(tape, one.d_output, one.d_state)
        inference, *_ = forward(one.cell, one.x, one.params, one.state)
        found.append([a.tobytes() for a in (output, *state, dx, *dparams.values(), *dstate, inference)])
    assert found[0] == found[1]
    assert found[0][0] == found[0][-1]


@each_cell
@each_count
def test_nan_in_unused_memory_is_not_read(cell, each, monkeypatch):
    """What the kernels work in is NaN to begin with; results are those of memory that happens to be 0."""
    empty = np.empty

    def filled(value):
        def make(shape, dtype=float, *args, **kwargs):
            array = empty(shape, dtype, *args, **kwargs)
            array.fill(value if array.dtype.kind == "f" else 0)
            return array

        return make

    for size in [(1, 1, 1, 1), (5, 9, 33, 20), (2, 50, 4, 35)]:
        one = task(cell, *size, lengths=True, reset=True)
        found = []
        for value in (np.nan, 0):
            with monkeypatch.context() as patch:
                patch.setattr(np, "empty", filled(value))
                found.append(run(masked("cpu", draw(one, each)), one))
        assert_same_bits(*found)
        assert not any(np.isnan(array).any() for array in found[0].values())


@each_backend
@each_cell
@each_count
def test_masks_of_any_memory_are_only_read(backend, cell, each):
    one = task(cell, 5, 4, 6, 11, lengths=True)
    masks = draw(one, each)
    expected = run(masked(functional, masks, backend=backend), one)
    locked = masks.copy()
    locked.flags.writeable = False
    misaligned = np.empty(masks.nbytes + 1, np.uint8)[1:].view(masks.dtype).reshape(masks.shape)
    misaligned[...] = masks
    for given in (locked, misaligned, np.asfortranarray(masks), masks.astype(masks.dtype.newbyteorder())):
        before = given.copy()
        assert_same_bits(run(masked(functional, given, backend=backend), one), expected)
        np.testing.assert_array_equal(given, before)


@each_cell
@each_count
def test_nan_in_a_mask_stays_in_its_row(cell, each):
    one = task(cell, 6, 9, 5, 17)
    masks = draw(one, each)
    clean = run(masked("cpu", masks), one)
    masks[..., 2, 3] = np.nan
    results = run(masked("cpu", masks), one)
    others = np.arange(9) != 2
    for name in {"output", "dx", "h", "c", "dh", "dc"} & clean.keys():
        rows = (slice(None), others) if name in ("output", "dx") else others
        np.testing.assert_array_equal(results[name][rows], clean[name][rows], err_msg=name)
    assert np.isnan(results["output"][-1, 2]).any()


@each_backend
@each_cell
@each_count
@pytest.mark.parametrize("size", [(0, 3, 2, 4), (3, 0, 2, 4), (0, 0, 2, 4)], ids=["T0", "B0", "T0-B0"])
def test_no_steps_or_rows(backend, cell, each, size):
    one = task(cell, *size)
    results, expected = run(masked(functional, draw(one, each), backend=backend), one), run(backend, one)
    assert_same_bits(results, expected)


@pytest.mark.parametrize("kind", [LSTM, GRU])
def test_what_is_kept_between_calls_has_no_masks(kind):
    """A layer's calls with masks, with others and without, in any order, also by the short way of `again`."""
    one = task("lstm" if kind is LSTM else "gru", 4, 3, 5, 20)
    prepared = cpu.prepare(one.cell, one.params)
    x = one.x.reshape(-1, 5)

    def result(masks, prepared=prepared):
        output, _, tape = prepared.forward(one.x, one.state, recurrent_masks=masks, training=True)
        dx, dparams, _ = cpu.backward(tape, one.d_output, one.d_state)
        return [array.tobytes() for array in (output, dx, *dparams.values())]

    choices = [None, draw(one, False), draw(one, True), draw(one, True, seed=1)]
    expected = [result(masks, cpu.prepare(one.cell, one.params)) for masks in choices]
    random = np.random.default_rng(0)
    for i in random.integers(0, 4, 30):
        assert result(choices[i]) == expected[i]
        again = prepared.again(x, 4, tuple(s[None] for s in one.state))
        assert again is None or i == 0
        assert again is None or again[0].tobytes() == expected[0][0]


# ---- a stack of layers


@pytest.mark.parametrize("each", [False, True], ids=["one-mask", "each-gate"])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_stack(cell, each):
    """Masks for some of the directions of two layers: as one call after the other."""
    T, B, I, H = 6, 3, 5, 7
    sizes = [I, I, 2 * H, 2 * H]
    parts = [task(cell, T, B, size, H, seed=k, reverse=k % 2 == 1) for k, size in enumerate(sizes)]
    spec, prepared = stack.Spec(cell, 4, 2), [cpu.prepare(cell, part.params) for part in parts]
    factors = [None, *(draw(part, each, seed=k) for k, part in enumerate(parts[1:]))]
    states = tuple(np.stack(same) for same in zip(*(part.state for part in parts), strict=True))
    x, d_output = parts[0].x, np.concatenate([parts[2].d_output, parts[3].d_output], axis=2)
    rows = (np.array([6, 2, 4]), None)
    output, last, kept = stack.forward(spec, prepared, x, states, [], rows, True, factors)
    dx, d_states, d_params = stack.backward(
        spec, prepared, x, states, [], (output, kept), rows, d_output, [None] * len(states), factors
    )
    below, tapes = x, []
    for layer in range(2):
        made = []
        for k in (2 * layer, 2 * layer + 1):
            one, options = parts[k], {"lengths": rows[0], "reverse": k % 2 == 1, "training": True}
            made.append(cpu.forward(cell, below, one.params, one.state, **options, recurrent_masks=factors[k]))
            assert [s[k].tobytes() for s in last] == [s.tobytes() for s in made[-1][1]]
        below = np.concatenate([output for output, _, _ in made], axis=2)
        tapes += [tape for _, _, tape in made]
    assert output.tobytes() == below.tobytes()
    gradient, expected = d_output, {}
    for layer in (1, 0):
        halves = [np.ascontiguousarray(half) for half in np.split(gradient, 2, axis=2)]
        back = [cpu.backward(tapes[2 * layer + d], halves[d], None) for d in range(2)]
        gradient = back[0][0] + back[1][0]
        expected |= {2 * layer + d: back[d] for d in range(2)}
    assert dx.tobytes() == gradient.tobytes()
    for k in range(4):
        assert [d[k].tobytes() for d in d_states] == [d.tobytes() for d in expected[k][2]]
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        for name, array in zip(names, d_params[4 * k : 4 * k + 4], strict=True):
            assert array.tobytes() == expected[k][1][name].tobytes()


# ---- errors


def test_errors():
    one = task("lstm_projected", 4, 3, 5, 7)

    def call(masks, cell="lstm", **options):
        functional.forward(cell, one.x, one.params, recurrent_masks=masks, **options)

    mask = np.ones((3, 4), np.float32)
    call(mask)
    for masks, error, message in (
        ([[1.0] * 4] * 3, TypeError, r"is a list, expected a NumPy array of float32 and shape \(G, B, W\)"),
        (1.0, TypeError, "recurrent_masks is 1.0, expected a NumPy array"),
        (mask.astype(np.float64), TypeError, "recurrent_masks has dtype float64, expected float32: cast it"),
        (mask > 0, TypeError, "recurrent_masks has dtype bool, expected float32: cast it"),
        (np.ma.masked_array(mask), TypeError, "recurrent_masks is a masked array, expected one without a mask"),
        (np.ones(4, np.float32), ValueError, r"has shape \(4,\), expected \(G, B, W\) or \(B, W\) = \(3, 4\)"),
        (np.ones((3, 7), np.float32), ValueError, r"has shape \(3, 7\), expected \(G, B, W\) or \(B, W\) = \(3, 4\)"),
        (np.ones((4, 3), np.float32), ValueError, r"has shape \(4, 3\), expected \(G, B, W\) or \(B, W\) = \(3, 4\)"),
        (np.ones((3, 3, 4), np.float32), ValueError, r"\(3, 3, 4\), expected \(B, W\) or \(G, B, W\) = \(4, 3, 4\)"),
        (np.ones((1, 4, 3, 4), np.float32), ValueError, r"shape \(1, 4, 3, 4\), expected \(G, B, W\) or \(B, W\)"),
    ):
        with pytest.raises(error, match=message):
            call(masks)
    with pytest.raises(NotImplementedError, match="given with the backend 'cuda-tf32', expected None, or NumPy arrays"):
        call(mask, backend="cuda-tf32")
    buffer = np.zeros((4, 3, 4), np.float32)
    with pytest.raises(ValueError, match="output shares memory with recurrent_masks, expected memory of its own"):
        call(buffer[0], output=buffer)
