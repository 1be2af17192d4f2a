"""Calls again and again: what is kept between them never shows."""

import concurrent.futures
import copy
import pickle

import numpy as np
import pytest

from fastrnn import GRU, LSTM, RNN, functional
from fastrnn.testing import problem

KINDS = [RNN, LSTM, GRU]
each_kind = pytest.mark.parametrize("kind", KINDS)
I, H = 13, 21


def uniform(*shape, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


def bits(value):
    if isinstance(value, np.ndarray):
        return value.tobytes()
    return [bits(item) for item in value]


def states(kind, *shape, seed=1):
    h = uniform(*shape, H, seed=seed)
    return (h, uniform(*shape, H, seed=seed + 1)) if kind is LSTM else h


CHANGES = {
    "one number": lambda p: p.reshape(-1).__setitem__(p.size // 2, 0.25),
    "the last bit of one": lambda p: np.nextafter(p.reshape(-1)[:1], np.float32(9), out=p.reshape(-1)[:1]),
    "all signs": lambda p: np.negative(p, out=p),
    "two signs": lambda p: np.negative(p.reshape(-1)[:2], out=p.reshape(-1)[:2]),
    "the sign of zero": lambda p: (p.fill(0), np.negative(p, out=p)),
    "order": lambda p: p.__setitem__(slice(None), p[::-1].copy()),
    "copyto": lambda p: np.copyto(p, 0.5),
    "a view's bytes": lambda p: memoryview(p).cast("B").__setitem__(3, 7),
}


@each_kind
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("name", ["weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"])
def test_a_change_in_place_is_noticed(kind, change, name):
    layer, x = kind(I, H, seed=0), uniform(3, 2, I)
    state, long = states(kind, 1, 2), uniform(40, 9, I)
    for _ in range(2):  # the second call finds what the first has kept
        before = layer(x, state), layer.step(x[0], state), layer(long), layer.forward(x, state)[:2]
    change(layer.parameters[name])
    after = layer(x, state), layer.step(x[0], state), layer(long), layer.forward(x, state)[:2]
    fresh = kind(I, H, seed=5)
    fresh.load_state_dict(layer.state_dict())
    expected = fresh(x, state), fresh.step(x[0], state), fresh(long), fresh.forward(x, state)[:2]
    assert bits(after) == bits(expected)
    if change not in (CHANGES["the sign of zero"], CHANGES["the last bit of one"]):  # which rounding may hide
        assert bits(before) != bits(after)


@each_kind
def test_backward_after_a_change(kind):
    layer, x = kind(I, H, seed=0), uniform(3, 2, I)
    for seed in range(3):
        layer.load_state_dict(kind(I, H, seed=seed).state_dict())
        output, _, tape = layer.forward(x)
        fresh = kind(I, H, seed=seed)
        gradients, expected = layer.backward(tape, output), fresh.backward(fresh.forward(x)[2], output)
        assert bits(gradients.x) == bits(expected.x)
        assert bits(gradients.params.values()) == bits(expected.params.values())


@each_kind
def test_a_call_again_gives_what_the_first_gave(kind):
    layer = kind(I, H, seed=0)
    for T, B in ((1, 1), (1, 1), (5, 3), (5, 3), (1, 3), (1, 3), (5, 3)):
        x, state = uniform(T, B, I, seed=T + B), states(kind, 1, B)
        expected = kind(I, H, seed=0)(x, state)
        first, again = layer(x, state), layer(x, state)
        assert bits(first) == bits(again) == bits(expected)
        assert bits(layer(x)) == bits(kind(I, H, seed=0)(x))
        step, step_again = layer.step(x[0], state), layer.step(x[0], state)
        assert bits(step) == bits(step_again) == bits([kind(I, H, seed=0)(x[:1], state)[0][0], step[1]])


@each_kind
def test_steps_without_a_batch(kind):
    layer, x = kind(I, H, seed=0), uniform(9, I)
    expected, expected_last = kind(I, H, seed=0)(x)
    state = None
    for t in range(9):
        y, state = layer.step(x[t], state)
        assert bits(y) == bits(expected[t])
    assert bits(state) == bits(expected_last)
    with pytest.raises(ValueError, match="state"):
        layer.step(x[0], tuple(s[:, None] for s in state) if kind is LSTM else state[:, None])
    with pytest.raises(ValueError, match="x_t"):
        layer.step(x[0, 1:], state)


@each_kind
def test_results_are_not_overwritten(kind):
    layer, state = kind(I, H, seed=0), states(kind, 1, 1)
    layer.step(uniform(1, I), state)
    result = layer.step(uniform(1, I), state)
    kept = copy.deepcopy(result)
    for seed in range(5):
        _, state = layer.step(uniform(1, I, seed=seed), result[1])
    assert bits(result) == bits(kept)
    assert all(a.flags.owndata and a.flags.writeable for a in ([result[0]]))


@each_kind
def test_bad_arguments_are_refused_after_good_ones(kind):
    layer, x, state = kind(I, H, seed=0), uniform(2, I), states(kind, 1, 2)
    arrays = state if kind is LSTM else (state,)

    def given(*arrays):
        return tuple(arrays) if kind is LSTM else arrays[0]

    for _ in range(2):
        layer.step(x, state)
    for bad, error in (
        (given(*[a.astype(np.float64) for a in arrays]), TypeError),
        (given(*[a.astype(np.int32) for a in arrays]), TypeError),
        (given(*[a[:, :1] for a in arrays]), ValueError),
        (given(*[a[:, :, 1:] for a in arrays]), ValueError),
        (given(*[a[0] for a in arrays]), ValueError),
        (given(*[np.concatenate([a, a]) for a in arrays]), ValueError),
        (given(*[a.tolist() for a in arrays]), TypeError),
        ((*arrays, arrays[0]), (TypeError, ValueError)),
        (arrays[0] if kind is LSTM else arrays, TypeError),
        ((), (TypeError, ValueError)),
        (given(*[np.ma.masked_array(a) for a in arrays]), TypeError),
    ):
        with pytest.raises(error):
            layer.step(x, bad)
        with pytest.raises(error):
            layer(x[None], bad)
    for bad, error in ((x.astype(np.float64), TypeError), (x[:, 1:], ValueError), (x.astype(np.int32), TypeError)):
        with pytest.raises(error):
            layer.step(bad, state)
    assert bits(layer.step(x, state)) == bits(kind(I, H, seed=0).step(x, state))


@each_kind
def test_arrays_in_any_order_after_plain_ones(kind):
    layer, x, state = kind(I, H, seed=0), uniform(2, I), states(kind, 1, 2)
    expected = [bits(layer.step(x, state)) for _ in range(2)][1]

    def changed(function):
        return tuple(map(function, state)) if kind is LSTM else function(state)

    def strided(a):
        wide = np.full((*a.shape[:-1], 2 * a.shape[-1]), np.nan, a.dtype)
        wide[..., ::2] = a
        return wide[..., ::2]

    def misaligned(a):
        memory = np.empty(a.nbytes + 1, np.uint8)[1:].view(a.dtype).reshape(a.shape)
        memory[...] = a
        return memory

    def locked(a):
        a = a.copy()
        a.flags.writeable = False
        return a

    for change in (strided, misaligned, locked, np.asfortranarray, lambda a: a.astype(a.dtype.newbyteorder())):
        assert bits(layer.step(change(x), changed(change))) == expected
    swapped = x[::-1].copy()[::-1]
    assert bits(layer.step(swapped, state)) == expected


@each_kind
def test_threads_that_step_at_once(kind):
    layer = kind(I, H, seed=0)
    inputs = [(uniform(1 + i % 2, I, seed=i), states(kind, 1, 1 + i % 2, seed=i)) for i in range(16)]
    expected = [bits(kind(I, H, seed=0).step(x, state)) for x, state in inputs]

    def work(i):
        return all(bits(layer.step(*inputs[i])) == expected[i] for _ in range(300))

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        assert all(pool.map(work, range(16)))


@each_kind
def test_copies_share_nothing(kind):
    layer, x, state = kind(I, H, seed=0), uniform(1, I), states(kind, 1, 1)
    expected = [bits(layer.step(x, state)) for _ in range(2)][1]
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert bits(other.step(x, state)) == expected
        other.parameters["weight_hh_l0"][...] = 0
        assert bits(other.step(x, state)) != expected
        assert bits(layer.step(x, state)) == expected


# ---- recompute


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("ragged", [False, True], ids=["", "ragged"])
@pytest.mark.parametrize("make", [
    lambda **k: RNN(I, H, seed=0, **k), lambda **k: GRU(I, H, 2, bidirectional=True, dropout=0.3, seed=0, **k),
    lambda **k: LSTM(I, H, bidirectional=True, seed=0, **k), lambda **k: LSTM(I, H, proj_size=5, seed=0, **k),
], ids=["rnn", "gru", "lstm", "lstm-projected"])  # fmt: skip
def test_recompute(make, ragged, backend, monkeypatch):
    """The same bits, also where a pass is cut into many chunks."""
    from fastrnn.kernels import cpu

    x = uniform(45, 6, I)
    options = {}
    if ragged:
        options = {"lengths": [45, 3, 0, 20, 44, 45], "reset": np.random.default_rng(0).random((45, 6)) < 0.1}
    for chunk in (None, 8):
        if chunk:
            monkeypatch.setattr(cpu, "CHUNK_BYTES", 1)
            monkeypatch.setattr(cpu, "OUTER_BLOCK", chunk)
        found = []
        for recompute in (False, True):
            layer = make(backend=backend)
            output, last, tape = layer.forward(x, recompute=recompute, **options)
            gradients = layer.backward(tape, output, last)
            found.append(bits([output, list(last), gradients.x, list(gradients.state), *gradients.params.values()]))
        assert found[0] == found[1]


def test_recompute_twice():
    layer, x = LSTM(I, H, seed=0), uniform(9, 2, I)
    output, _, tape = layer.forward(x, recompute=True)
    first, second = layer.backward(tape, output), layer.backward(tape, output)
    assert bits(first.params.values()) == bits(second.params.values())


def test_recompute_keeps_less():
    one = problem("lstm", 400, 4, 8, 64, dtype="float32")

    def kept(recompute):
        _, _, tape = functional.forward("lstm", one.x, one.params, training=True, recompute=recompute)
        return tape.tape.walk.tape.nbytes + sum(a.nbytes for states in tape.tape.states for a in states)

    assert kept(True) * 20 < kept(False) == 400 * 4 * 5 * 64 * 4 + 2 * 4 * 64 * 4


def test_recompute_is_for_training():
    one = problem("gru", 3, 2, 4, 5, dtype="float32")
    with pytest.raises(ValueError, match="recompute is True without training"):
        functional.forward("gru", one.x, one.params, recompute=True)
    with pytest.raises(TypeError, match="recompute is 1, expected True or False"):
        functional.forward("gru", one.x, one.params, training=True, recompute=1)


@each_kind
@pytest.mark.parametrize("shape", [(0, 2, I), (3, 0, I), (0, 0, I)], ids=str)
def test_recompute_of_nothing(kind, shape):
    layer = kind(I, H, seed=0)
    output, last, tape = layer.forward(uniform(*shape), recompute=True)
    gradients = layer.backward(tape, output, last)
    assert not any(gradient.any() for gradient in gradients.params.values())


def test_parameters_that_are_not_contiguous():
    """functional.forward copies them; a backend that is given them all the same keeps nothing of them."""
    from fastrnn.kernels import cpu

    one = problem("gru", 3, 2, 4, 5, dtype="float32")
    one.params["weight_hh"] = np.asfortranarray(one.params["weight_hh"])
    prepared = cpu.prepare("gru", one.params)
    for _ in range(2):
        output, _, _ = prepared.forward(one.x, one.state)
        expected, _, _ = functional.forward("gru", one.x, one.params, one.state)
        assert bits(output) == bits(expected)
        one.params["weight_hh"] *= -1
