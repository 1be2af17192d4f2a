"""Gate orders: each system's formulas, written as its documentation has them, give our outputs with its weights."""

import re

import numpy as np
import pytest

from fastrnn import functional, weights
from fastrnn.weights import CELLS, cell_shapes, from_keras, from_onnx, reorder_gates, to_keras, to_onnx

T, B, I, H = 5, 3, 4, 6


def uniform(*shape, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, shape)


def params_of(cell, bias=True, seed=0):
    shapes = cell_shapes(cell, I, H, bias=bias)
    return {name: uniform(*shape, seed=seed + i) for i, (name, shape) in enumerate(shapes.items())}


def sigmoid(a):
    return 1 / (1 + np.exp(-a))


ACTIVATIONS = {"rnn_tanh": np.tanh, "rnn_relu": lambda a: np.maximum(a, 0), "rnn_sigmoid": sigmoid}


def keras_step(cell, x, state, kernel, recurrent_kernel, bias=None):
    """One step as keras.layers' SimpleRNNCell, LSTMCell and GRUCell compute it: keras/src/layers/rnn."""
    h = state[0]
    if cell == "lstm":
        z = x @ kernel + h @ recurrent_kernel + (0 if bias is None else bias)
        z0, z1, z2, z3 = np.split(z, 4, axis=1)
        i, f = sigmoid(z0), sigmoid(z1)
        c = f * state[1] + i * np.tanh(z2)
        return sigmoid(z3) * np.tanh(c), c
    if cell in ACTIVATIONS:
        return (ACTIVATIONS[cell](x @ kernel + (0 if bias is None else bias) + h @ recurrent_kernel),)
    reset_after = cell == "gru"
    input_bias, recurrent_bias = (0, 0) if bias is None else bias if reset_after else (bias, 0)
    x_z, x_r, x_h = np.split(x @ kernel + input_bias, 3, axis=1)
    if reset_after:
        inner = h @ recurrent_kernel + recurrent_bias
        recurrent_z, recurrent_r, recurrent_h = np.split(inner, 3, axis=1)
        z, r = sigmoid(x_z + recurrent_z), sigmoid(x_r + recurrent_r)
        hh = np.tanh(x_h + r * recurrent_h)
    else:
        units = h.shape[1]
        inner = h @ recurrent_kernel[:, : 2 * units]
        z, r = sigmoid(x_z + inner[:, :units]), sigmoid(x_r + inner[:, units:])
        hh = np.tanh(x_h + (r * h) @ recurrent_kernel[:, 2 * units :])
    return (z * h + (1 - z) * hh,)


def onnx_step(cell, x, state, W, R, B=None):
    """One step of one direction by the equations of ONNX' operators RNN, LSTM and GRU."""
    h, G = state[0], len(W) // H
    Wb, Rb = (np.zeros(len(W)),) * 2 if B is None else np.split(B, 2)
    if cell == "lstm":
        Wi, Wo, Wf, Wc = np.split(W, 4)
        Ri, Ro, Rf, Rc = np.split(R, 4)
        bi, bo, bf, bc = np.split(Wb + Rb, 4)
        it, ft = sigmoid(x @ Wi.T + h @ Ri.T + bi), sigmoid(x @ Wf.T + h @ Rf.T + bf)
        ct = np.tanh(x @ Wc.T + h @ Rc.T + bc)
        c = ft * state[1] + it * ct
        return sigmoid(x @ Wo.T + h @ Ro.T + bo) * np.tanh(c), c
    if G == 1:
        return (ACTIVATIONS[cell](x @ W.T + h @ R.T + Wb + Rb),)
    (Wz, Wr, Wh), (Rz, Rr, Rh) = np.split(W, 3), np.split(R, 3)
    (Wbz, Wbr, Wbh), (Rbz, Rbr, Rbh) = np.split(Wb, 3), np.split(Rb, 3)
    zt, rt = sigmoid(x @ Wz.T + h @ Rz.T + Wbz + Rbz), sigmoid(x @ Wr.T + h @ Rr.T + Wbr + Rbr)
    if cell == "gru":  # linear_before_reset != 0
        ht = np.tanh(x @ Wh.T + rt * (h @ Rh.T + Rbh) + Wbh)
    else:
        ht = np.tanh(x @ Wh.T + (rt * h) @ Rh.T + Rbh + Wbh)
    return ((1 - zt) * ht + zt * h,)


def walk(step, cell, x, state, *arrays):
    output = []
    for x_t in x:
        state = step(cell, x_t, state, *arrays)
        output.append(state[0])
    return np.stack(output)


def problem(cell):
    state = tuple(uniform(B, H, seed=20 + i) for i in range(2 if cell == "lstm" else 1))
    return uniform(T, B, I, seed=10), state


each_cell = pytest.mark.parametrize("cell", CELLS)
each_bias = pytest.mark.parametrize("bias", [True, False])


@each_cell
@each_bias
def test_keras_formulas(cell, bias):
    params, (x, state) = params_of(cell, bias), problem(cell)
    output, _, _ = functional.forward(cell, x, params, state)
    np.testing.assert_allclose(
        output, walk(keras_step, cell, x, state, *to_keras(cell, params)), rtol=1e-12, atol=1e-14
    )


@each_cell
@each_bias
def test_onnx_formulas(cell, bias):
    directions, (x, state) = [params_of(cell, bias), params_of(cell, bias, seed=40)], problem(cell)
    inputs = to_onnx(cell, directions)
    for d, params in enumerate(directions):
        output, _, _ = functional.forward(cell, x, params, state)
        own = [array[d] for array in inputs.values()]
        np.testing.assert_allclose(output, walk(onnx_step, cell, x, state, *own), rtol=1e-12, atol=1e-14)


@each_cell
@each_bias
def test_keras_there_and_back(cell, bias):
    two = (2,) if cell == "gru" else ()
    rows = weights.GATES[cell] * H
    arrays = [uniform(I, rows), uniform(H, rows, seed=1), uniform(*two, rows, seed=2)][: 2 + bias]
    params = from_keras(cell, arrays)
    assert {name: array.shape for name, array in params.items()} == cell_shapes(cell, I, H, bias=bias)
    for one, other in zip(to_keras(cell, params), arrays, strict=True):
        np.testing.assert_array_equal(one, other)
        assert one.flags.c_contiguous
    assert all(array.flags.c_contiguous for array in params.values())


@each_bias
def test_keras_back_and_there_is_exact_where_the_biases_stay_apart(bias):
    params = params_of("gru", bias)
    for name, array in from_keras("gru", to_keras("gru", params)).items():
        np.testing.assert_array_equal(array, params[name])


def test_single_bias_is_the_sum():
    params = params_of("lstm")
    back = from_keras("lstm", to_keras("lstm", params))
    np.testing.assert_array_equal(back["bias_ih"], params["bias_ih"] + params["bias_hh"])
    assert not back["bias_hh"].any()


@each_cell
@each_bias
@pytest.mark.parametrize("D", [1, 2])
def test_onnx_there_and_back(cell, bias, D):
    directions = [params_of(cell, bias, seed=d) for d in range(D)]
    inputs = to_onnx(cell, directions)
    rows = weights.GATES[cell] * H
    shapes = {"W": (D, rows, I), "R": (D, rows, H), "B": (D, 2 * rows)}
    assert {name: array.shape for name, array in inputs.items()} == dict(list(shapes.items())[: 2 + bias])
    for params, back in zip(directions, from_onnx(cell, **inputs), strict=True):
        assert list(params) == list(back)
        for name, array in params.items():
            np.testing.assert_array_equal(back[name], array)


def test_orders_are_the_published_ones():
    blocks = np.arange(4.0)  # i f g o
    np.testing.assert_array_equal(reorder_gates("lstm", blocks, "pytorch", "onnx"), [0, 3, 1, 2])
    np.testing.assert_array_equal(reorder_gates("lstm", blocks, "pytorch", "keras"), [0, 1, 2, 3])
    for system in ("flax", "equinox", "cudnn"):
        np.testing.assert_array_equal(reorder_gates("lstm", blocks, "onnx", system), [0, 2, 3, 1])
        np.testing.assert_array_equal(reorder_gates("gru", blocks[:3], "keras", system), [1, 0, 2])
    np.testing.assert_array_equal(reorder_gates("gru", blocks[:3], "pytorch", "onnx"), [1, 0, 2])
    np.testing.assert_array_equal(reorder_gates("gru", blocks[:3], "pytorch", "keras"), [1, 0, 2])
    np.testing.assert_array_equal(reorder_gates("rnn_tanh", blocks, "pytorch", "keras"), blocks)


@each_cell
def test_reordering_there_and_back(cell):
    array = uniform(weights.GATES[cell] * H, I)
    for system in weights.ORDERS.get(cell, ("pytorch", "keras", "onnx")):
        there = reorder_gates(cell, array, "pytorch", system)
        np.testing.assert_array_equal(reorder_gates(cell, there, system, "pytorch"), array)
        assert not np.shares_memory(there, array)


def test_conversions_keep_the_dtype():
    params = {name: array.astype(np.float32) for name, array in params_of("gru").items()}
    arrays = [*to_keras("gru", params), *to_onnx("gru", [params]).values()]
    arrays += [
        *from_keras("gru", to_keras("gru", params)).values(),
        *from_onnx("gru", **to_onnx("gru", [params]))[0].values(),
    ]
    assert {array.dtype for array in arrays} == {np.dtype(np.float32)}


PROJECTED = {name: np.zeros(shape) for name, shape in cell_shapes("lstm", I, H, 2).items()}
LSTM = params_of("lstm")
BIAS = LSTM["bias_ih"]
W, R = np.zeros((1, 24, 4)), np.zeros((1, 24, 6))


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("cell is 'LSTM', expected one of 'rnn_tanh'", lambda: reorder_gates("LSTM", np.zeros(4), "pytorch", "onnx")),
        (
            "source is 'torch', expected one of 'pytorch', 'keras', 'onnx', 'flax', 'equinox', 'cudnn'",
            lambda: reorder_gates("gru", BIAS, "torch", "onnx"),
        ),
        ("target is 'jax', expected one of 'pytorch', 'keras'", lambda: reorder_gates("gru", BIAS, "onnx", "jax")),
        (
            "array has shape (5,), expected (4 * H, ...): lstm has 4 gates",
            lambda: reorder_gates("lstm", np.zeros(5), "onnx", "keras"),
        ),
        (
            "cell is 'gru_reset_before', which Flax does not have: its GRU resets after the recurrent product",
            lambda: reorder_gates("gru_reset_before", np.zeros(3), "pytorch", "flax"),
        ),
        ("cell is 'rnn_tanh', which Equinox", lambda: reorder_gates("rnn_tanh", np.zeros(3), "equinox", "keras")),
        ("array has shape (), expected (4 * H, ...)", lambda: reorder_gates("lstm", np.zeros(()), "onnx", "keras")),
        ("a projected LSTM cannot be converted to Keras", lambda: to_keras("lstm", PROJECTED)),
        ("a projected LSTM cannot be converted to ONNX", lambda: to_onnx("lstm", [PROJECTED])),
        ("cell is 'LSTM', expected one of 'rnn_tanh'", lambda: to_keras("LSTM", LSTM)),
        ("params need a matrix weight_ih", lambda: to_keras("lstm", {})),
        ("params need a matrix weight_hh", lambda: to_keras("lstm", LSTM | {"weight_hh": np.zeros(3)})),
        ("params have the shapes {'weight_ih': (24, 4)", lambda: to_keras("gru", LSTM)),
        (
            "arrays holds 4 arrays, expected kernel, recurrent_kernel and perhaps bias",
            lambda: from_keras("lstm", [0] * 4),
        ),
        (
            "expected (2, 24) for gru: that is a GRU with reset_after=False, another function",
            lambda: from_keras("gru", to_keras("lstm", LSTM)),
        ),
        (
            "bias has shape (2, 18), expected (18,) for gru_reset_before: that is a GRU with reset_after=True",
            lambda: from_keras("gru_reset_before", to_keras("gru", params_of("gru"))),
        ),
        ("directions holds 3 entries, expected 1 or 2", lambda: to_onnx("lstm", [LSTM] * 3)),
        (
            "directions hold different parameters, expected the same names in all",
            lambda: to_onnx("lstm", [LSTM, params_of("lstm", bias=False)]),
        ),
        ("W has shape (24, 4), expected (D, G * H, I)", lambda: from_onnx("lstm", W[0], R)),
        ("R has shape (24, 6), expected (1, 24, H)", lambda: from_onnx("lstm", W, R[0])),
        (
            "B has shape (1, 24), expected (1, 48)",
            lambda: from_onnx("lstm", W, R, np.zeros((1, 24))),
        ),
        (
            "params have the shapes {'weight_ih': (24, 4), 'weight_hh': (24, 5)}",
            lambda: from_onnx("lstm", W, np.zeros((1, 24, 5))),
        ),
    ],
)
def test_errors(message, call):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
