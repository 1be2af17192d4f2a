"""The edges of every backend: nothing to do, memory round the arrays, what must not be written, extreme numbers."""

import dataclasses

import numpy as np
import pytest

from fastrnn import backend as backends
from fastrnn.testing import assert_close, problem, run

CELLS = ["rnn_tanh", "rnn_relu", "rnn_sigmoid", "lstm", "lstm_projected", "gru", "gru_reset_before"]
SATURATING = [cell for cell in CELLS if cell != "rnn_relu"]
each_backend = pytest.mark.parametrize("backend", ["reference", "cpu"])
each_cell = pytest.mark.parametrize("cell", CELLS)
each_dtype = pytest.mark.parametrize("dtype", ["float32", "float64"])
each_direction = pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
each_ragged = pytest.mark.parametrize("ragged", [False, True], ids=["", "lengths-reset"])

T, B, I, H = 6, 5, 7, 9


def task(cell, *size, **options):
    size = size or (T, B, I, H)
    if cell == "lstm_projected":
        cell, options["P"] = "lstm", (size[3] + 1) // 2
    return problem(cell, *size, **options)


def arguments(one, **more):
    """What forward is called with."""
    names = ("cell", "x", "params", "state", "lengths", "reset", "reverse")
    return {name: getattr(one, name) for name in names} | {"training": True} | more


def named(forward_results, backward_results):
    (output, state, _), (dx, dparams, dstate) = forward_results, backward_results
    gradients = {"dx": dx, **{f"d{name}": array for name, array in dparams.items()}}
    return (
        {"output": output, **dict(zip("hc", state, strict=False))}
        | gradients
        | dict(zip(("dh", "dc"), dstate, strict=False))
    )


def assert_same_bits(actual, expected):
    assert actual.keys() == expected.keys()
    for name, array in expected.items():
        assert actual[name].dtype == array.dtype
        assert actual[name].shape == array.shape
        assert actual[name].tobytes() == array.tobytes(), name


# ---- nothing there


@each_backend
@each_cell
@each_dtype
@each_direction
@pytest.mark.parametrize("lengths", [False, True], ids=["", "lengths"])
@pytest.mark.parametrize("size", [(0, 3, 2, 4), (3, 0, 2, 4), (0, 0, 2, 4)], ids=["T0", "B0", "T0-B0"])
def test_no_steps_or_rows(backend, cell, dtype, reverse, lengths, size):
    one = task(cell, *size, dtype=dtype, reverse=reverse, lengths=lengths, reset=True)
    results = run(backend, one)
    shapes = {name: array.shape for name, array in results.items()}
    W = one.params["weight_hh"].shape[1]
    assert shapes["output"] == (size[0], size[1], W)
    assert shapes["dx"] == (size[0], size[1], 2)
    for i, name in enumerate(("h", "c")[: len(one.state)]):
        assert results[name].tobytes() == one.state[i].tobytes()
        assert results[f"d{name}"].tobytes() == one.d_state[i].tobytes()
        assert not np.shares_memory(results[name], one.state[i])
        assert not np.shares_memory(results[f"d{name}"], one.d_state[i])
    for name, array in one.params.items():
        assert shapes[f"d{name}"] == array.shape
        assert not results[f"d{name}"].any()
    assert {array.dtype for array in results.values()} == {np.dtype(dtype)}


@each_backend
@each_cell
@each_direction
def test_a_row_without_steps_passes_its_state_and_gradient(backend, cell, reverse):
    one = task(cell, lengths=[0, 6, 0, 2, 3], reset=True, reverse=reverse)
    one.reset[:, 2] = True
    results = run(backend, one)
    for rows in (0, 2):
        for name, state, d_state in zip("hc", one.state, one.d_state, strict=False):
            np.testing.assert_array_equal(results[name][rows], state[rows])
            np.testing.assert_array_equal(results[f"d{name}"][rows], d_state[rows])


@each_backend
@each_cell
@each_direction
def test_padding_is_zero(backend, cell, reverse):
    one = task(cell, lengths=[1, 6, 0, 2, 3], reverse=reverse)
    results = run(backend, one)
    padding = np.arange(T)[:, None] >= one.lengths
    for name in ("output", "dx"):
        assert not results[name][padding].any()
        assert results[name][~padding].any(axis=1).mean() > 0.8  # all units of a relu may be 0


# ---- memory


@each_backend
@each_cell
@each_dtype
@each_ragged
@each_direction
def test_only_the_columns_of_a_given_output_are_written(backend, cell, dtype, ragged, reverse):
    one = task(cell, dtype=dtype, lengths=ragged, reset=ragged, reverse=reverse)
    module = backends.load(backend)
    expected = run(backend, one)
    W = expected["output"].shape[2]
    for column, width in [(0, W), (0, W + 1), (1, W + 1), (3, W + 20), (W, 2 * W)]:
        buffer = np.full((T, B, width), np.nan, dtype)
        forward_results = module.forward(**arguments(one, output=buffer, column=column))
        assert forward_results[0] is buffer
        assert np.isnan(np.delete(buffer, np.s_[column : column + W], axis=2)).all()
        results = named(forward_results, module.backward(forward_results[2], one.d_output, one.d_state))
        results["output"] = results["output"][:, :, column : column + W]
        assert_same_bits(results, expected)


@each_backend
@each_cell
@each_ragged
def test_both_directions_share_an_output(backend, cell, ragged):
    one = task(cell, lengths=ragged, reset=ragged)
    pair = [one, dataclasses.replace(one, reverse=True)]
    expected = [run(backend, part) for part in pair]
    W = expected[0]["output"].shape[2]
    module = backends.load(backend)
    buffer = np.full((T, B, 2 * W), np.nan, np.float32)
    made = [module.forward(**arguments(part, output=buffer, column=d * W)) for d, part in enumerate(pair)]
    for d in range(2):
        results = named(made[d], module.backward(made[d][2], one.d_output, one.d_state))
        results["output"] = results["output"][:, :, d * W : (d + 1) * W]
        assert_same_bits(results, expected[d])


@each_backend
@each_cell
@each_ragged
def test_inputs_are_not_written(backend, cell, ragged):
    one = task(cell, lengths=ragged, reset=ragged)
    before = one.astype(np.float32)
    module = backends.load(backend)
    output, _, tape = module.forward(**arguments(one))
    kept = output.copy()
    module.backward(tape, one.d_output, one.d_state)
    np.testing.assert_array_equal(output, kept)
    for field in dataclasses.fields(one):
        np.testing.assert_equal(getattr(one, field.name), getattr(before, field.name), err_msg=field.name)


@each_backend
@each_cell
def test_results_are_arrays_of_their_own(backend, cell):
    one = task(cell)
    module = backends.load(backend)
    output, state, tape = module.forward(**arguments(one))
    expected = named((output, state, tape), module.backward(tape, one.d_output, one.d_state))
    arrays = list(expected.values())
    given = [one.x, one.d_output, *one.state, *one.d_state, *one.params.values()]
    for i, array in enumerate(arrays):
        assert array.flags.writeable
        assert array.flags.c_contiguous
        for other in given + arrays[:i]:
            assert not np.shares_memory(array, other)
    # a caller may go on computing in what it was given, but for the output, which the tape needs
    expected = {name: array.copy() for name, array in expected.items()}
    for array in arrays[1:]:
        array[...] = np.nan
    again = named((output, state, tape), module.backward(tape, one.d_output, one.d_state))
    for name in ("h", "c"):
        again.pop(name, None)
        expected.pop(name, None)
    assert_same_bits(again, expected)


@each_backend
@each_cell
@each_dtype
@each_ragged
def test_tape_is_used_again(backend, cell, dtype, ragged):
    one = task(cell, 30, 17, 20, 33, dtype=dtype, lengths=ragged, reset=ragged)
    module = backends.load(backend)
    made = module.forward(**arguments(one))
    first = named(made, module.backward(made[2], one.d_output, one.d_state))
    module.backward(made[2], None, one.d_state)
    module.backward(made[2], -one.d_output, None)
    assert_same_bits(named(made, module.backward(made[2], one.d_output, one.d_state)), first)


GUARD = 64  # elements before and behind every array, NaN where they are numbers


class Guarded:
    """Arrays in the middle of guard zones, and NumPy's ways to make them."""

    def __init__(self):
        self.zones = []

    def full(self, shape, dtype, value):
        size = int(np.prod(shape, dtype=np.int64))
        block = self.empty(size + 2 * GUARD, dtype)
        block[...] = self.poison(block.dtype)
        middle = block[GUARD : GUARD + size]
        self.zones += [block[:GUARD], block[GUARD + size :]]
        middle = middle.reshape(shape)
        middle[...] = value
        return middle

    @staticmethod
    def poison(dtype):
        return np.nan if dtype.kind == "f" else True if dtype.kind == "b" else -(2**20)

    def copy(self, array):
        return self.full(array.shape, array.dtype, array)

    def patch(self, monkeypatch):
        """Let numpy.empty give arrays that hold NaN, and the others guarded ones, too."""
        self.empty = np.empty
        whole = {"empty": None, "zeros": 0, "ones": 1}

        def maker(value):
            def make(shape, dtype=float, *args, **kwargs):
                dtype = np.dtype(dtype)
                inside = self.poison(dtype) if value is None and dtype.kind == "f" else value or 0
                return self.full(shape, dtype, inside)

            return make

        def like(make):
            return lambda array, dtype=None, *args, **kwargs: make(array.shape, dtype or array.dtype)

        for name, value in whole.items():
            make = maker(value)
            monkeypatch.setattr(np, name, make)
            monkeypatch.setattr(np, f"{name}_like", like(make))

    def assert_intact(self):
        assert self.zones
        for zone in self.zones:
            if zone.dtype.names:  # a record of integers
                zone = zone.view(np.int64)
            if zone.dtype.kind == "f":
                assert np.isnan(zone).all()
            else:
                assert (zone == self.poison(zone.dtype)).all()


@each_backend
@each_cell
@each_dtype
@each_direction
@each_ragged
def test_memory_round_arrays_is_neither_read_nor_written(backend, cell, dtype, reverse, ragged, monkeypatch):
    """NaN in uninitialised memory and round all arrays changes no bit, and stays what it is."""
    for size in [(1, 1, 1, 1), (3, 2, 3, 5), (2, 5, 17, 16), (5, 9, 33, 20), (2, 50, 4, 35)]:
        one = task(cell, *size, dtype=dtype, reverse=reverse, lengths=ragged, reset=ragged)
        expected = run(backend, one)
        with monkeypatch.context() as patch:
            guarded = Guarded()
            guarded.patch(patch)
            inside = dataclasses.replace(
                one,
                x=guarded.copy(one.x),
                params={name: guarded.copy(array) for name, array in one.params.items()},
                state=tuple(map(guarded.copy, one.state)),
                d_output=guarded.copy(one.d_output),
                d_state=tuple(map(guarded.copy, one.d_state)),
                lengths=guarded.copy(one.lengths) if ragged else None,
                reset=guarded.copy(one.reset) if ragged else None,
            )
            results = run(backend, inside)
        guarded.assert_intact()
        assert_same_bits(results, expected)


# ---- NaN


@each_backend
@each_cell
@each_direction
@each_ragged
@pytest.mark.parametrize("place", ["x", "h", "d_output"])
def test_nan_stays_in_its_row(backend, cell, reverse, ragged, place):
    one = task(cell, 6, 9, 5, 17, reverse=reverse, lengths=[6, 3, 6, 0, 2, 6, 6, 1, 5] if ragged else None)
    clean = run(backend, one)
    {"x": one.x[3], "h": one.state[0], "d_output": one.d_output[3]}[place][2] = np.nan
    results = run(backend, one)
    others = np.arange(9) != 2
    for name in set(clean) & {"output", "dx", "h", "c", "dh", "dc"}:
        rows = (slice(None), others) if name in ("output", "dx") else others
        np.testing.assert_array_equal(results[name][rows], clean[name][rows], err_msg=name)
    if place != "d_output":
        assert np.isnan(results["output"][3, 2]).all()
    elif cell != "rnn_relu":  # whose gradient is 0 where the unit is
        assert np.isnan(results["dx"][3, 2]).all()


@each_backend
@each_cell
@each_dtype
@each_direction
@pytest.mark.parametrize("junk", [np.nan, np.inf, -np.inf, 3e38], ids=str)
def test_nothing_comes_out_of_padding(backend, cell, dtype, reverse, junk):
    one = task(cell, dtype=dtype, lengths=[1, 6, 0, 5, 3], reset=True, reverse=reverse)
    padding = np.arange(T)[:, None] >= one.lengths
    one.x[padding] = one.d_output[padding] = 0
    one.reset[padding] = False
    expected = run(backend, one)
    one.x[padding] = one.d_output[padding] = junk
    one.reset[padding] = True
    results = run(backend, one)
    assert_same_bits(results, expected)


@each_backend
@each_cell
@each_direction
def test_reset_cuts_nan(backend, cell, reverse):
    one = task(cell, reverse=reverse, reset=np.arange(T)[:, None] == np.full(B, 3))
    clean = run(backend, one)
    before, after = (slice(4, T), slice(0, 4)) if reverse else (slice(0, 3), slice(3, T))
    results = run(backend, dataclasses.replace(one, state=tuple(np.full_like(s, np.nan) for s in one.state)))
    assert np.isnan(results["output"][before]).all()
    for name in ("h", "c"):
        assert name not in clean or results[name].tobytes() == clean[name].tobytes()
    assert results["output"][after].tobytes() == clean["output"][after].tobytes()
    d_state = tuple(np.full_like(d, np.nan) for d in one.d_state)
    results = run(backend, dataclasses.replace(one, d_state=d_state))
    assert results["dx"][before].tobytes() == clean["dx"][before].tobytes()
    assert results["dh"].tobytes() == clean["dh"].tobytes()


# ---- numbers at their limits


@each_backend
@pytest.mark.parametrize("cell", SATURATING)
@each_dtype
def test_huge_input_saturates(backend, cell, dtype):
    one = task(cell, dtype=dtype)
    one.x[...] *= 1e30
    expected = run("reference", one.astype(np.float64))
    results = run(backend, one)
    for name, array in expected.items():
        assert np.isfinite(results[name]).all(), name
        scale = max(1.0, float(np.abs(array).max()))
        assert_close(results[name], array, name, scale=scale)


@each_backend
@pytest.mark.parametrize("cell", SATURATING)
@each_dtype
def test_infinite_input_saturates(backend, cell, dtype):
    one = task(cell, dtype=dtype)
    one.x[2, :, 3], one.x[4, :, 1] = np.inf, -np.inf
    expected = run("reference", one.astype(np.float64))
    results = run(backend, one)
    for name in ("output", "h", "c"):
        if name in expected:
            assert np.isfinite(expected[name]).all()
            assert_close(results[name], expected[name], name, scale=1)


@each_cell
@each_dtype
@each_direction
@each_ragged
def test_infinite_gradients_are_the_references(cell, dtype, reverse, ragged):
    """NaN only where the textbook's formula gives it: infinities meet no other one on the way that is ours alone.

    Infinities that come in, and not sums that overflow: there the order of the terms decides.
    """
    for seed in range(5):
        one = task(cell, 4, 4, 5, 11, dtype=dtype, reverse=reverse, lengths=ragged, reset=ragged, seed=seed)
        random = np.random.default_rng(seed)
        for array in (one.d_output, *one.d_state):
            array[random.random(array.shape) < 0.02] = random.choice([-np.inf, np.inf])
        results, expected = run("cpu", one), run("reference", one)
        for name, array in expected.items():
            special = np.where(np.isfinite(array), 0, array)
            np.testing.assert_array_equal(np.where(np.isfinite(results[name]), 0, results[name]), special, name)


@each_backend
@each_dtype
def test_relu_overflows_to_infinity(backend, dtype):
    one = task("rnn_relu", 1, 2, 1, 3, dtype=dtype, bias=False)
    largest = np.finfo(dtype).max
    one.params["weight_ih"][:] = [[4], [0], [-4]]
    one.params["weight_hh"][:] = 0
    one.x[:] = largest
    output = run(backend, one)["output"]
    np.testing.assert_array_equal(output, np.broadcast_to(np.array([np.inf, 0, 0], dtype), (1, 2, 3)))


@each_backend
@each_dtype
def test_subnormal_numbers_are_kept(backend, dtype):
    """A relu's unit that multiplies by powers of two: every result is exact, none is flushed to zero."""
    tiny = np.finfo(dtype).smallest_subnormal
    one = task("rnn_relu", 4, 3, 2, 5, dtype=dtype, bias=False)
    one.params["weight_ih"][:] = np.eye(5, 2)
    one.params["weight_hh"][:] = 2 * np.eye(5)
    one.x[:], one.d_output[:] = 3 * tiny, 0
    one.state[0][:], one.d_state[0][:] = 5 * tiny, tiny
    results = run(backend, one)
    h = 5
    for t in range(4):
        h = 2 * h + 3
        np.testing.assert_array_equal(results["output"][t, :, 0], np.full(3, h * tiny))
        np.testing.assert_array_equal(results["dx"][t, :, 0], np.full(3, 2 ** (3 - t) * tiny))
    np.testing.assert_array_equal(results["dh"][:, 4], np.full(3, 16 * tiny))
