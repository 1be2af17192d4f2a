"""One layer in one direction: buffers that are shared, optional arguments, and a tape that knows its backend."""

import inspect

import numpy as np
import pytest

from fastrnn import backend, functional
from fastrnn.weights import CELLS, cell_shapes

T, B, I, H, P = 7, 3, 4, 6, 2

each_cell = pytest.mark.parametrize("cell", [*CELLS, "lstm-projected"])
each_backend = pytest.mark.parametrize("name", ["cpu", "reference"])


def uniform(*shape, seed=0, dtype=np.float64):
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(dtype)


def problem(cell, dtype=np.float64):
    """The cell's name, x, params, state, and the size of the output."""
    cell, _, projected = cell.partition("-")
    shapes = cell_shapes(cell, I, H, P if projected else 0)
    params = {name: uniform(*shape, seed=i, dtype=dtype) for i, (name, shape) in enumerate(shapes.items())}
    W = P if projected else H
    state = (uniform(B, W, seed=8, dtype=dtype), uniform(B, H, seed=9, dtype=dtype))[: 2 if cell == "lstm" else 1]
    return cell, uniform(T, B, I, seed=7, dtype=dtype), params, state, W


def assert_equal(actual, expected):
    for one, other in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(one, other)


@each_cell
@each_backend
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("column", [0, 3])
def test_output_is_written_where_it_is_wanted(cell, name, reverse, column):
    cell, x, params, state, W = problem(cell)
    options = {"lengths": [7, 0, 4], "reverse": reverse, "training": True, "backend": name}
    expected, expected_last, expected_tape = functional.forward(cell, x, params, state, **options)
    buffer = np.full((T, B, W + 5), 123.0)
    output, last, tape = functional.forward(cell, x, params, state, output=buffer, column=column, **options)
    assert output is buffer
    np.testing.assert_array_equal(buffer[..., column : column + W], expected)
    assert_equal(last, expected_last)
    assert (np.delete(buffer, np.s_[column : column + W], axis=2) == 123).all()
    d_output = uniform(T, B, W, seed=3)
    gradients, others = (functional.backward(one, d_output, state) for one in (tape, expected_tape))
    np.testing.assert_array_equal(gradients[0], others[0])
    assert_equal(gradients[1].values(), others[1].values())
    assert_equal(gradients[2], others[2])
    assert (np.delete(buffer, np.s_[column : column + W], axis=2) == 123).all()


@each_cell
@each_backend
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_types_and_shapes(cell, name, dtype):
    cell, x, params, state, W = problem(cell, dtype)
    output, last, tape = functional.forward(cell, x, params, state, backend=name)
    assert tape is None
    output, last, tape = functional.forward(cell, x, params, training=True, backend=name)
    assert output.shape == (T, B, W)
    assert [array.shape for array in last] == [array.shape for array in state]
    dx, dparams, dstate = functional.backward(tape, output)
    assert dx.shape == x.shape
    assert {n: a.shape for n, a in dparams.items()} == {n: a.shape for n, a in params.items()}
    assert [array.shape for array in dstate] == [array.shape for array in state]
    assert isinstance(last, tuple)
    assert isinstance(dstate, tuple)
    assert {array.dtype for array in (output, *last, dx, *dparams.values(), *dstate)} == {np.dtype(dtype)}


@each_cell
@each_backend
def test_results_are_new_arrays(cell, name):
    """Whatever a caller does with them, nothing else changes; also where there is no step to take."""
    cell, x, params, state, _ = problem(cell)
    for lengths in (None, [0, 0, 0]):
        output, last, tape = functional.forward(cell, x, params, state, lengths=lengths, training=True, backend=name)
        dx, dparams, dstate = functional.backward(tape, output, last)
        given = [x, *params.values(), *state]
        results = [*last, dx, *dparams.values(), *dstate]
        for i, one in enumerate(results):
            assert not any(np.shares_memory(one, other) for other in [*given, output, *results[:i]])
        before = [array.copy() for array in given]
        for array in (output, *results):
            array[...] = 99
        assert_equal(given, before)


@each_cell
def test_state_without_gradient(cell):
    cell, x, params, state, W = problem(cell)
    _, _, tape = functional.forward(cell, x, params, state, training=True)
    d_output = uniform(T, B, W, seed=3)
    zeros = tuple(np.zeros_like(array) for array in state)
    for d_state in (zeros, [None] * len(state)):
        assert_equal(functional.backward(tape, d_output)[2], functional.backward(tape, d_output, d_state)[2])
    assert_equal(
        functional.backward(tape, None, state)[1].values(),
        functional.backward(tape, np.zeros_like(d_output), state)[1].values(),
    )


def test_backends_have_the_same_two_functions():
    one, other = (backend.load(name) for name in ("cpu", "reference"))
    for function in ("forward", "backward"):
        parameters = [list(inspect.signature(getattr(module, function)).parameters) for module in (one, other)]
        assert parameters[0] == parameters[1]
    for method in ("forward", "again"):
        parameters = [list(inspect.signature(getattr(module.prepare, method)).parameters) for module in (one, other)]
        assert parameters[0] == parameters[1]


def test_default_backend_is_the_cpu():
    assert backend.load() is backend.load(None) is backend.load("cpu")
    assert backend.load().__name__ == "fastrnn.kernels.cpu"


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_input_without_a_size(backend):
    params = {name: np.ones(shape) for name, shape in cell_shapes("gru", 0, 4).items()}
    with pytest.raises(ValueError, match=r"x has shape \(3, 2, 0\), expected \(T, B, I\) with I of 1 or more"):
        functional.forward("gru", np.ones((3, 2, 0)), params, backend=backend)
