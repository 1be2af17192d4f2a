"""The compiled kernels against the NumPy reference in float64: every cell, at every size and with every option."""

import dataclasses
import itertools
import math

import numpy as np
import pytest

from fastrnn.testing import assert_close, problem, run

BACKENDS = ["cpu"]
CELLS = ["rnn_tanh", "rnn_relu", "rnn_sigmoid", "lstm", "lstm_projected", "gru", "gru_reset_before"]
each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_cell = pytest.mark.parametrize("cell", CELLS)
each_dtype = pytest.mark.parametrize("dtype", ["float32", "float64"])

# Around the lengths of vectors, panels and tiles.
SIZES = [1, 2, 3, 5, 7, 8, 15, 16, 17, 31, 33, 64, 65, 100]
BATCHES = [1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 17, 33]
TIMES = [1, 2, 3, 5, 9, 33]


def task(cell, T, B, I, H, *, seed=0, **options):
    """A problem; a projected LSTM's projection is about half of its hidden size."""
    if cell == "lstm_projected":
        cell, options["P"] = "lstm", (H + 1) // 2
    one = problem(cell, T, B, I, H, seed=seed, **options)
    while on_the_kink(one):
        seed += 1000
        one = problem(cell, T, B, I, H, seed=seed, **options)
    return one


def on_the_kink(one):
    """Whether rounding may decide on which side of relu's kink a sum falls, and so whether a gradient passes."""
    if one.cell != "rnn_relu" or one.x.dtype == np.float64:
        return False
    one = one.astype(np.float64)
    sides = []
    for move in (-2e-6, 2e-6):
        moved = one.params.get("bias_ih", np.zeros(len(one.params["weight_ih"]))) + move
        params = {"bias_hh": np.zeros_like(moved), **one.params, "bias_ih": moved}
        sides.append(run("reference", dataclasses.replace(one, params=params))["output"] > 0)
    return (sides[0] != sides[1]).any()


def check(backend, one):
    """Compare every result with the reference's.

    All numbers are of the order of 1, and at least that is the scale of rounding errors; sums go over inputs and
    hidden units at each of T steps, and for weights over T * B rows.
    """
    expected = run("reference", one.astype(np.float64))
    results = run(backend, one)
    assert results.keys() == expected.keys()
    T, B, I = one.x.shape
    terms = (T + 1) * (B + I + len(one.params["weight_ih"]))
    for name, array in expected.items():
        assert results[name].dtype == one.x.dtype
        scale = max(1.0, math.sqrt(np.mean(array**2))) if array.size else 1.0
        assert_close(results[name], array, name, terms=terms, scale=scale)


def sizes(number):
    """(T, B, I, H) number `number` of those that go through all lists at different paces."""
    return (
        TIMES[number % 6],
        BATCHES[(7 * number + number // 12) % 12],
        SIZES[(5 * number + 3) % 14],
        SIZES[number % 14],
    )


def test_sizes_meet_every_number():
    for values, meant in zip(zip(*map(sizes, range(42)), strict=True), (TIMES, BATCHES, SIZES, SIZES), strict=True):
        assert sorted(set(values)) == meant


@pytest.mark.sampled(84)
@each_backend
@each_cell
@each_dtype
@pytest.mark.parametrize("number", range(42), ids=lambda n: "T{}-B{}-I{}-H{}".format(*sizes(n)))
def test_sizes(backend, cell, dtype, number):
    options = {"bias": number % 3 > 0, "reverse": number % 4 > 1, "lengths": number % 5 == 0}
    check(backend, task(cell, *sizes(number), dtype=dtype, seed=number, **options))


@each_backend
@each_cell
@each_dtype
@pytest.mark.parametrize("lengths", [False, True, [0, 7, 3, 0, 5, 7], [2, 1, 2, 1, 0, 2], [0] * 6], ids=str)
@pytest.mark.parametrize("reset", [False, True], ids=["", "reset"])
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
def test_options(backend, cell, dtype, lengths, reset, reverse, bias):
    check(backend, task(cell, 7, 6, 5, 9, dtype=dtype, lengths=lengths, reset=reset, reverse=reverse, bias=bias))


@each_backend
@each_cell
@each_dtype
def test_reset_of_every_row_and_of_the_first_step(backend, cell, dtype):
    for steps, reverse in itertools.product(([0], [6], [0, 3, 6], [2, 3, 4], range(7)), (False, True)):
        reset = np.zeros((7, 6), bool)
        reset[steps] = True
        check(backend, task(cell, 7, 6, 5, 9, dtype=dtype, reset=reset, reverse=reverse))


@each_backend
@each_cell
@each_dtype
@pytest.mark.parametrize("lengths", [False, True], ids=["", "lengths"])
def test_gradients_that_are_not_given(backend, cell, dtype, lengths):
    one = task(cell, 5, 4, 3, 6, dtype=dtype, lengths=lengths)
    d_states = [None, *itertools.product(*((d, None) for d in one.d_state))]
    for d_output, d_state in itertools.product((one.d_output, None), d_states):
        check(backend, dataclasses.replace(one, d_output=d_output, d_state=d_state))


@each_backend
@each_cell
@each_dtype
@pytest.mark.parametrize("H", [40, 65, 100, 130])
def test_options_over_several_panels(backend, cell, dtype, H):
    for reverse in (False, True):
        check(backend, task(cell, 5, 4, 9, H, dtype=dtype, lengths=True, reset=True, reverse=reverse))


@each_backend
@each_dtype
@pytest.mark.parametrize("P", [1, 3, 40, 99])
def test_projection_of_any_width(backend, dtype, P):
    for reverse in (False, True):
        one = problem("lstm", 5, 3, 4, 100, P=P, dtype=dtype, lengths=True, reset=True, reverse=reverse)
        check(backend, one)


# (T, B, I, H): batches beyond a block of rows, one row for long, and what is summed and interrupted in several pieces.
LARGE = [(3, 49, 5, 20), (2, 130, 33, 34), (300, 1, 17, 48), (150, 2, 3, 96), (200, 33, 100, 100)]


@pytest.mark.sampled(14)
@each_backend
@each_cell
@each_dtype
@pytest.mark.parametrize("size", LARGE, ids=lambda s: "T{}-B{}-I{}-H{}".format(*s))
def test_large(backend, cell, dtype, size):
    check(backend, task(cell, *size, dtype=dtype, lengths=True, reverse=size[1] % 2 == 0))


@pytest.mark.sampled(50)
@each_backend
@pytest.mark.parametrize("seed", range(150))
def test_anything(backend, seed):
    random = np.random.default_rng(seed)
    cell = CELLS[seed % len(CELLS)]
    size = random.integers(1, [12, 20, 40, 40])
    options = {name: bool(random.integers(2)) for name in ("bias", "lengths", "reset", "reverse")}
    one = task(cell, *size.tolist(), dtype=("float32", "float64")[random.integers(2)], seed=seed, **options)
    d_state = tuple(None if random.random() < 0.2 else d for d in one.d_state)
    check(backend, dataclasses.replace(one, d_state=d_state, d_output=None if random.random() < 0.2 else one.d_output))
