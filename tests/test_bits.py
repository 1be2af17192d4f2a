"""The same bits for any number of threads, any cutting in time and any batch that a row stands in."""

import dataclasses
import itertools

import numpy as np
import pytest

from fastrnn import backend as backends
from fastrnn.kernels import threads
from fastrnn.testing import problem, run

BACKENDS = ["cpu"]
CELLS = ["rnn_tanh", "rnn_relu", "rnn_sigmoid", "lstm", "lstm_projected", "gru", "gru_reset_before"]
each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_cell = pytest.mark.parametrize("cell", CELLS)
each_dtype = pytest.mark.parametrize("dtype", ["float32", "float64"])
each_direction = pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])


def task(cell, *size, **options):
    if cell == "lstm_projected":
        cell, options["P"] = "lstm", (size[3] + 1) // 2
    return problem(cell, *size, **options)


def assert_same_bits(actual, expected, names=None):
    for name in names or expected:
        one, other = actual[name], expected[name]
        assert (one.shape, one.dtype) == (other.shape, other.dtype), name
        if one.tobytes() != other.tobytes():
            different = one.view(f"u{one.itemsize}") != other.view(f"u{one.itemsize}")
            where = [int(i) for i in np.argwhere(different)[0]]
            raise AssertionError(
                f"{name} differs in {np.count_nonzero(different)} of {one.size} elements, first {where}"
            )


def steps_of(one, start, stop):
    """Some steps of a problem."""
    return dataclasses.replace(
        one,
        x=one.x[start:stop],
        d_output=one.d_output[start:stop],
        reset=None if one.reset is None else one.reset[start:stop],
        lengths=None if one.lengths is None else np.clip(one.lengths - start, 0, stop - start),
    )


def rows_of(one, rows):
    """Some rows of a problem, in any order."""
    return dataclasses.replace(
        one,
        x=one.x[:, rows].copy(),
        d_output=one.d_output[:, rows].copy(),
        reset=None if one.reset is None else one.reset[:, rows].copy(),
        lengths=None if one.lengths is None else one.lengths[rows],
        state=tuple(s[rows] for s in one.state),
        d_state=tuple(s[rows] for s in one.d_state),
    )


SHAPES = [(37, 1, 5, 33), (37, 3, 16, 20), (23, 21, 33, 17)]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "T{}-B{}-I{}-H{}".format(*s))
each_ragged = pytest.mark.parametrize("ragged", [False, True], ids=["", "lengths-reset"])


@each_backend
@each_cell
@each_dtype
@each_direction
@each_shape
@each_ragged
def test_chunks_in_time_give_the_bits_of_the_whole(backend, cell, dtype, reverse, shape, ragged):
    one = task(cell, *shape, dtype=dtype, reverse=reverse, lengths=ragged, reset=ragged)
    cuts = [0, 1, 2, 3, 10, 11, shape[0] - 5, shape[0]]
    chunks = list(itertools.pairwise(cuts))
    walked = chunks[::-1] if reverse else chunks
    module = backends.load(backend)
    state, outputs, tapes = one.state, {}, {}
    for start, stop in walked:
        part = steps_of(one, start, stop)
        outputs[start], state, tapes[start] = module.forward(
            one.cell, part.x, part.params, state, lengths=part.lengths, reset=part.reset, reverse=reverse, training=True
        )
    d_state, dx = one.d_state, {}
    for start, stop in reversed(walked):
        dx[start], _, d_state = module.backward(tapes[start], one.d_output[start:stop], d_state)
    joined = {"output": np.concatenate([outputs[start] for start, _ in chunks]), **dict(zip("hc", state, strict=False))}
    gradients = {"dx": np.concatenate([dx[start] for start, _ in chunks])}
    gradients |= dict(zip(("dh", "dc"), d_state, strict=False))
    whole = run(backend, one)
    assert_same_bits(joined, whole, joined)
    assert_same_bits(gradients, whole, gradients)


@each_backend
@each_cell
@each_dtype
@each_direction
@each_ragged
def test_a_row_has_the_same_bits_in_every_batch(backend, cell, dtype, reverse, ragged):
    B = 20
    one = task(cell, 9, B, 18, 33, dtype=dtype, reverse=reverse, lengths=ragged, reset=ragged)
    whole = run(backend, one)
    random = np.random.default_rng(0)
    batches = [[b] for b in range(0, B, 3)] + [random.permutation(B)[:n] for n in (2, 5, 13, B)]
    for rows in batches:
        expected = {name: whole[name][:, rows] for name in ("output", "dx")}
        expected |= {name: whole[name][rows] for name in ("h", "c", "dh", "dc") if name in whole}
        assert_same_bits(run(backend, rows_of(one, rows)), expected)


class Spy:
    """Counts the threads that passes are split over."""

    def __init__(self, monkeypatch):
        self.most, self.run = 0, threads.run
        monkeypatch.setattr(threads, "run", self)

    def __call__(self, part, parts):
        self.most = max(self.most, parts)
        return self.run(part, parts)


@pytest.fixture
def each_number_of_threads():
    before = threads.get_num_threads()
    yield each_number
    threads.set_num_threads(before)


def each_number():
    for number in (1, 2, 3, 4):
        threads.set_num_threads(number)
        yield number


@each_cell
@each_dtype
@each_direction
@each_ragged
def test_threads_change_no_bit(cell, dtype, reverse, ragged, each_number_of_threads, monkeypatch):
    one = task(cell, 40, 29, 66, 100, dtype=dtype, reverse=reverse, lengths=ragged, reset=ragged)
    results = {}
    for number in each_number_of_threads():
        spy = Spy(monkeypatch)
        results[number] = run("cpu", one)
        assert spy.most == number  # the problem is large enough to be split
        assert_same_bits(results[number], results[1])


@each_backend
@each_cell
def test_full_lengths_have_the_bits_of_no_lengths(backend, cell):
    one = task(cell, 7, 6, 9, 20, lengths=[7] * 6)
    assert_same_bits(run(backend, one), run(backend, dataclasses.replace(one, lengths=None)))


@each_backend
@each_cell
@each_ragged
def test_inference_has_the_bits_of_training(backend, cell, ragged):
    one = task(cell, 11, 6, 9, 20, lengths=ragged, reset=ragged)
    forward = backends.load(backend).forward
    arguments = (one.cell, one.x, one.params, one.state)
    results = []
    for training in (True, False):
        output, state, tape = forward(*arguments, lengths=one.lengths, reset=one.reset, training=training)
        assert (tape is not None) == training
        results.append({"output": output, **dict(zip("hc", state, strict=False))})
    assert_same_bits(*results)


@each_backend
@each_cell
def test_again_has_the_same_bits(backend, cell):
    one = task(cell, 33, 17, 31, 65, lengths=True, reset=True)
    assert_same_bits(run(backend, one), run(backend, one))
