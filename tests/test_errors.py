"""Bad input: an exception of the fitting type that names the argument, what came and what was expected, before any
compute and with nothing changed. One line here for every message.
"""  # fmt: skip

import os
import re
import sys

import numpy as np
import pytest

import fastrnn
from fastrnn import GRU, LSTM, RNN, backend, functional, weights
from fastrnn.layers import Tape

f32, f64 = np.float32, np.float64
T, B, I, H = 5, 3, 4, 6


def zeros(*shape, dtype=f32):
    return np.zeros(shape, dtype)


def check(error, message, call, *arguments, **options):
    with pytest.raises(error, match=re.escape(message)) as caught:
        call(*arguments, **options)
    assert type(caught.value) is error  # not a subclass that happens to fit, as UnicodeError would ValueError


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, "input_size is '4', expected an integer of 1 or more", {"input_size": "4"}),
        (TypeError, "input_size is 4.0, expected an integer of 1 or more", {"input_size": 4.0}),
        (TypeError, "input_size is True, expected an integer of 1 or more", {"input_size": True}),
        (ValueError, "input_size is 0, expected an integer of 1 or more", {"input_size": 0}),
        (TypeError, "hidden_size is None, expected an integer of 1 or more", {"hidden_size": None}),
        (TypeError, "hidden_size is a list, expected an integer of 1 or more", {"hidden_size": [4]}),
        (ValueError, "hidden_size is -6, expected an integer of 1 or more", {"hidden_size": -6}),
        (TypeError, "num_layers is 1.5, expected an integer of 1 or more", {"num_layers": 1.5}),
        (ValueError, "num_layers is 0, expected an integer of 1 or more", {"num_layers": 0}),
        (TypeError, "bias is 'yes', expected True or False", {"bias": "yes"}),
        (TypeError, "bias is 1, expected True or False", {"bias": 1}),
        (TypeError, "batch_first is None, expected True or False", {"batch_first": None}),
        (TypeError, "bidirectional is 2, expected True or False", {"bidirectional": 2}),
        (TypeError, "dropout is a str, expected a number", {"dropout": "0.5"}),
        (TypeError, "dropout is a bool, expected a number", {"dropout": True}),
        (ValueError, "dropout is -0.1, expected a probability of at least 0 and less than 1", {"dropout": -0.1}),
        (ValueError, "dropout is 1.0, expected a probability of at least 0 and less than 1", {"dropout": 1}),
        (ValueError, "dropout is nan, expected a finite number", {"dropout": float("nan")}),
        (TypeError, "dtype is <class 'numpy.float16'>, expected float32 or float64", {"dtype": np.float16}),
        (TypeError, "dtype is 'integer', expected float32 or float64", {"dtype": "integer"}),
        (TypeError, "dtype is None, expected float32 or float64", {"dtype": None}),
        (TypeError, "seed is 'a', expected an integer of 0 or more", {"seed": "a"}),
        (ValueError, "seed is -1, expected an integer of 0 or more", {"seed": -1}),
        (ValueError, "backend is 'gpu', expected one of 'cpu', 'reference', 'cuda'", {"backend": "gpu"}),
        (TypeError, "backend is a int, expected one of 'cpu', 'reference', 'cuda'", {"backend": 3}),
        (ValueError, "backend is 'cuda-fast', expected 'cuda', and behind it at most a mode", {"backend": "cuda-fast"}),
        (ValueError, "recurrent_init is 'xavier', expected 'uniform' or 'orthogonal'", {"recurrent_init": "xavier"}),
    ],
)
@pytest.mark.parametrize("layer", [RNN, LSTM, GRU])
def test_layer_arguments(layer, error, message, arguments):
    check(error, message, layer, **{"input_size": I, "hidden_size": H, **arguments})


@pytest.mark.parametrize(
    ("error", "message", "layer", "arguments"),
    [
        (ValueError, "nonlinearity is 'elu', expected 'tanh', 'relu' or 'sigmoid'", RNN, {"nonlinearity": "elu"}),
        (ValueError, "nonlinearity is None, expected 'tanh', 'relu' or 'sigmoid'", RNN, {"nonlinearity": None}),
        (TypeError, "reset_after is 'no', expected True or False", GRU, {"reset_after": "no"}),
        (TypeError, "proj_size is 2.0, expected an integer of 0 or more", LSTM, {"proj_size": 2.0}),
        (ValueError, "proj_size is -1, expected an integer of 0 or more", LSTM, {"proj_size": -1}),
        (
            ValueError,
            "proj_size is 6, expected less than hidden_size = 6, or 0 for no projection",
            LSTM,
            {"proj_size": 6},
        ),
        (TypeError, "forget_bias is a str, expected a number", LSTM, {"forget_bias": "1"}),
        (ValueError, "forget_bias is inf, expected a finite number", LSTM, {"forget_bias": np.inf}),
        (ValueError, "forget_bias is 1.0 with bias=False, expected None", LSTM, {"forget_bias": 1, "bias": False}),
    ],
)
def test_arguments_of_one_layer(layer, error, message, arguments):
    check(error, message, layer, I, H, **arguments)


def test_dropout_without_a_layer_after_it_warns():
    with pytest.warns(UserWarning, match=re.escape("dropout is 0.5, which does nothing with num_layers=1")) as caught:
        LSTM(I, H, dropout=0.5)
    assert caught[0].filename == __file__


BAD_X = [
    (TypeError, "x is None, expected a NumPy array of float32 and shape (T, B, input_size)", None),
    (TypeError, "x is a list, expected a NumPy array of float32 and shape (T, B, input_size)", [[[0.0] * I]]),
    (TypeError, "x is 'text', expected a NumPy array of float32", "text"),
    (TypeError, "x has dtype float64, expected float32: cast it, x.astype(np.float32)", zeros(T, B, I, dtype=f64)),
    (TypeError, "x has dtype float16, expected float32: cast it", zeros(T, B, I, dtype=np.float16)),
    (TypeError, "x has dtype int64, expected float32: cast it", zeros(T, B, I, dtype=np.int64)),
    (TypeError, "x has dtype bool, expected float32: cast it", zeros(T, B, I, dtype=bool)),
    (
        TypeError,
        "x has dtype complex64, expected float32: complex numbers are not supported",
        zeros(T, B, I, dtype=np.complex64),
    ),
    (TypeError, "x has dtype object, expected float32", zeros(T, B, I, dtype=object)),
    (TypeError, "x has dtype <U4, expected float32", np.array("text")),
    (TypeError, "x is a masked array, expected one without a mask", np.ma.zeros((T, B, I), f32)),
    (ValueError, "x has shape (), expected (T, B, input_size) = (any, any, 4)", zeros()),
    (ValueError, "x has shape (4,), expected (T, B, input_size) = (any, any, 4)", zeros(I)),
    (ValueError, "x has shape (5, 3), expected (T, input_size) = (any, 4)", zeros(T, 3)),
    (ValueError, "x has shape (5, 3, 5), expected (T, B, input_size) = (any, any, 4)", zeros(T, B, I + 1)),
    (ValueError, "x has shape (1, 5, 3, 4), expected (T, B, input_size) = (any, any, 4)", zeros(1, T, B, I)),
]


@pytest.mark.parametrize(("error", "message", "x"), BAD_X)
@pytest.mark.parametrize("method", ["__call__", "forward"])
def test_x_of_a_layer(method, error, message, x):
    check(error, message, getattr(GRU(I, H), method), x)


def test_bfloat16_is_named_and_to_be_cast():
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed")
    x = np.zeros((T, B, I), ml_dtypes.bfloat16)
    check(TypeError, "x has dtype bfloat16, expected float32: cast it, x.astype(np.float32)", GRU(I, H), x)


def test_x_with_batch_first():
    layer = GRU(I, H, batch_first=True)
    check(ValueError, "x has shape (3, 5, 2), expected (B, T, input_size) = (any, any, 4)", layer, zeros(B, T, 2))


BAD_H = [
    (TypeError, "state is a tuple, expected a NumPy array of float32", (zeros(1, B, H),)),
    (TypeError, "state is a list, expected a NumPy array of float32", [zeros(1, B, H)]),
    (TypeError, "state is 0.0, expected a NumPy array of float32", 0.0),
    (TypeError, "state has dtype float64, expected float32: cast it", zeros(1, B, H, dtype=f64)),
    (
        ValueError,
        "state has shape (3, 6), expected (num_layers * directions, B, size) = (1, 3, 6)",
        zeros(B, H),
    ),
    (ValueError, "state has shape (2, 3, 6), expected (num_layers * directions, B, size)", zeros(2, B, H)),
    (ValueError, "state has shape (1, 1, 6), expected (num_layers * directions, B, size)", zeros(1, 1, H)),
]
BAD_HC = [
    (TypeError, "state is an ndarray, expected a tuple (h, c)", zeros(2, B, H)),
    (TypeError, "state is a dict, expected a tuple (h, c)", {"h": 0, "c": 0}),
    (ValueError, "state has 1 entries, expected a tuple (h, c)", (zeros(1, B, H),)),
    (ValueError, "state has 3 entries, expected a tuple (h, c)", (zeros(1, B, H),) * 3),
    (TypeError, "state[1] is None, expected a NumPy array of float32", (zeros(1, B, H), None)),
    (TypeError, "state[0] has dtype int32", (zeros(1, B, H, dtype=np.int32), zeros(1, B, H))),
    (
        ValueError,
        "state[1] has shape (1, 3, 5), expected (num_layers * directions, B, size) = (1, 3, 6)",
        (zeros(1, B, H), zeros(1, B, 5)),
    ),
]


@pytest.mark.parametrize(
    ("layer", "error", "message", "state"), [(RNN, *row) for row in BAD_H] + [(LSTM, *row) for row in BAD_HC]
)
@pytest.mark.parametrize("method", ["__call__", "forward", "step"])
def test_state(method, layer, error, message, state):
    x = zeros(B, I) if method == "step" else zeros(T, B, I)
    check(error, message, getattr(layer(I, H), method), x, state)


def test_state_of_one_sequence():
    message = "state has shape (1, 1, 6), expected (num_layers * directions, size) = (1, 6)"
    check(ValueError, message, GRU(I, H), zeros(T, I), zeros(1, 1, H))
    check(ValueError, message, GRU(I, H).step, zeros(I), zeros(1, 1, H))


def test_state_of_a_projected_layer():
    layer = LSTM(I, H, proj_size=2)
    message = "state[0] has shape (1, 3, 6), expected (num_layers * directions, B, size) = (1, 3, 2)"
    check(ValueError, message, layer, zeros(T, B, I), (zeros(1, B, H), zeros(1, B, H)))


BAD_LENGTHS = [
    (TypeError, "lengths has dtype float64, expected B = 3 integers", [5.0, 4.0, 3.0]),
    (TypeError, "lengths has dtype bool, expected B = 3 integers", [True, True, True]),
    (TypeError, "lengths has dtype object, expected B = 3 integers", [5, None, 3]),
    (TypeError, "lengths has dtype <U1, expected B = 3 integers", "5"),
    (TypeError, "lengths has dtype float32, expected B = 3 integers", zeros(0)),
    (TypeError, "lengths cannot be read as an array, expected B = 3 integers", [[5], [4, 3]]),
    (ValueError, "lengths has shape (), expected (3,): B = 3 integers", 5),
    (ValueError, "lengths has shape (2,), expected (3,): B = 3 integers", [5, 4]),
    (ValueError, "lengths has shape (1, 3), expected (3,): B = 3 integers", [[5, 4, 3]]),
    (ValueError, "lengths has shape (0,), expected (3,): B = 3 integers", []),
    (ValueError, "lengths[1] is -1, expected 0 to T = 5", [5, -1, -2]),
    (ValueError, "lengths[2] is 6, expected 0 to T = 5", [5, 5, 6]),
    (ValueError, f"lengths[0] is {2**64 - 1}, expected 0 to T = 5", np.array([2**64 - 1, 0, 0], np.uint64)),
]
BAD_RESET = [
    (TypeError, "reset has dtype int64, expected bool: see its method astype(bool)", zeros(T, B, dtype=np.int64)),
    (TypeError, "reset has dtype float32, expected bool", zeros(T, B)),
    (TypeError, "reset has dtype <U4, expected bool", "when"),
    (TypeError, "reset cannot be read as an array of booleans", [[True], [True, False]]),
    (ValueError, "reset has shape (), expected (T, B) = (5, 3)", True),
    (ValueError, "reset has shape (3, 5), expected (T, B) = (5, 3)", zeros(B, T, dtype=bool)),
    (ValueError, "reset has shape (5,), expected (T, B) = (5, 3)", zeros(T, dtype=bool)),
]


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [(e, m, {"lengths": v}) for e, m, v in BAD_LENGTHS] + [(e, m, {"reset": v}) for e, m, v in BAD_RESET],
)
def test_lengths_and_reset(error, message, options):
    check(error, message, GRU(I, H), zeros(T, B, I), **options)
    check(error, message, GRU(I, H).forward, zeros(T, B, I), **options)
    params = GRU(I, H)._parts[0]
    check(error, message, functional.forward, "gru", zeros(T, B, I), params, **options)


def test_lengths_and_reset_of_one_sequence():
    layer, x = GRU(I, H), zeros(T, I)
    check(ValueError, "lengths has shape (1,), expected (): an integer", layer, x, lengths=[3])
    check(ValueError, "lengths is 6, expected 0 to T = 5", layer, x, lengths=6)
    check(TypeError, "lengths has dtype float64, expected an integer", layer, x, lengths=3.0)
    check(ValueError, "reset has shape (5, 1), expected (T,) = (5,)", layer, x, reset=zeros(T, 1, dtype=bool))


def test_reset_with_batch_first():
    layer = GRU(I, H, batch_first=True)
    message = "reset has shape (5, 3), expected (B, T) = (3, 5)"
    check(ValueError, message, layer, zeros(B, T, I), reset=zeros(T, B, dtype=bool))


@pytest.mark.parametrize(
    ("error", "message", "x_t"),
    [
        (TypeError, "x_t is a list, expected a NumPy array of float32 and shape (B, input_size)", [[0.0] * I]),
        (TypeError, "x_t has dtype float64, expected float32: cast it, x_t.astype(np.float32)", zeros(I, dtype=f64)),
        (ValueError, "x_t has shape (3,), expected (input_size,) = (4,)", zeros(3)),
        (ValueError, "x_t has shape (3, 5), expected (B, input_size) = (any, 4)", zeros(B, 5)),
        (ValueError, "x_t has shape (5, 3, 4), expected (B, input_size) = (any, 4)", zeros(T, B, I)),
    ],
)
def test_x_of_a_step(error, message, x_t):
    check(error, message, GRU(I, H).step, x_t)


def test_step_of_a_bidirectional_layer():
    message = "step: the layer is bidirectional, expected one that needs no future input"
    check(ValueError, message, GRU(I, H, bidirectional=True).step, zeros(B, I))


@pytest.mark.parametrize(
    ("error", "message", "gradients"),
    [
        (ValueError, "d_output and d_state are both None, expected a gradient in at least one of them", {}),
        (ValueError, "d_output and d_state are both None", {"d_state": (None, None)}),
        (TypeError, "d_output is 1.0, expected a NumPy array of float32", {"d_output": 1.0}),
        (TypeError, "d_output has dtype float64, expected float32: cast it", {"d_output": zeros(T, B, H, dtype=f64)}),
        (
            ValueError,
            "d_output has shape (5, 3, 4), expected (T, B, size) = (5, 3, 6)",
            {"d_output": zeros(T, B, I)},
        ),
        (TypeError, "d_state is an ndarray, expected a tuple (h, c)", {"d_state": zeros(1, B, H)}),
        (ValueError, "d_state has 1 entries, expected a tuple (h, c)", {"d_state": (zeros(1, B, H),)}),
        (
            ValueError,
            "d_state[1] has shape (3, 6), expected (num_layers * directions, B, size) = (1, 3, 6)",
            {"d_state": (None, zeros(B, H))},
        ),
        (TypeError, "d_state[0] has dtype int64", {"d_state": (zeros(1, B, H, dtype=np.int64), None)}),
    ],
)
def test_gradients_of_a_layer(error, message, gradients):
    layer = LSTM(I, H)
    check(error, message, layer.backward, layer.forward(zeros(T, B, I))[2], **gradients)


def test_d_output_in_other_layouts():
    layer = GRU(I, H, batch_first=True)
    tape = layer.forward(zeros(B, T, I))[2]
    message = "d_output has shape (5, 3, 6), expected (B, T, size) = (3, 5, 6)"
    check(ValueError, message, layer.backward, tape, zeros(T, B, H))
    tape = layer.forward(zeros(T, I))[2]
    check(ValueError, "d_output has shape (5, 1, 6), expected (T, size) = (5, 6)", layer.backward, tape, zeros(T, 1, H))


def test_tape_of_another_layer():
    layer, same, other = GRU(I, H, seed=1), GRU(I, H, seed=1), LSTM(2, 3)
    d_output = zeros(T, B, H)
    tape = same.forward(zeros(T, B, I))[2]
    message = "tape is of another layer, GRU(4, 6), expected one of this GRU(4, 6)"
    check(ValueError, message, layer.backward, tape, d_output)
    message = "tape is of another layer, LSTM(2, 3), expected one of this GRU(4, 6)"
    check(ValueError, message, layer.backward, other.forward(zeros(T, B, 2))[2], d_output)
    check(TypeError, "tape is a NoneType, expected what this layer's forward returned", layer.backward, None, d_output)
    _, _, tape = functional.forward("gru", zeros(T, B, I), layer._parts[0], training=True)
    check(TypeError, "tape is a Tape, expected what this layer's forward returned", layer.backward, tape, d_output)


def test_huge_sizes_are_refused_in_words(monkeypatch):
    monkeypatch.setattr(functional, "_memory", lambda: 16 * 1024**3)
    have = "and this machine has 16 GiB"
    message = "RNN with input_size 4, hidden_size 1000000000 and num_layers 1 needs 3637978 TiB of memory, " + have
    check(MemoryError, message, RNN, I, 10**9, dtype=f32)
    check(
        MemoryError,
        "LSTM with input_size 4, hidden_size 6 and num_layers 1000000000000000000000 needs",
        LSTM,
        I,
        H,
        10**21,
    )
    x = np.broadcast_to(f32(0), (10**6, 10**6, I))
    message = "GRU with T = 1000000, B = 1000000, I = 4 and H = 6 needs"
    check(MemoryError, message, GRU(I, H), x)
    check(MemoryError, message, GRU(I, H).forward, x)
    check(MemoryError, "gru forward with T = 1000000, B = 1000000", functional.forward, "gru", x, GRU(I, H)._parts[0])
    monkeypatch.setattr(functional, "_memory", lambda: 100)
    check(MemoryError, "num_layers 1 needs 1072 bytes of memory, and this machine has 100 bytes", GRU, 1, 1)


def test_memory_of_this_machine_is_known_or_without_end(monkeypatch):
    assert functional._memory() > 2**28

    def unknown(name):
        raise ValueError(f"{name} is not known here")

    monkeypatch.setattr(os, "sysconf", unknown, raising=False)
    assert functional._memory.__wrapped__() == sys.maxsize


def gru_params(dtype=f32):
    return {name: zeros(*shape, dtype=dtype) for name, shape in weights.cell_shapes("gru", I, H).items()}


def lstm_params(P=0):
    return {name: zeros(*shape) for name, shape in weights.cell_shapes("lstm", I, H, P).items()}


def without(params, *names):
    return {name: array for name, array in params.items() if name not in names}


CELLS = "'rnn_tanh', 'rnn_relu', 'rnn_sigmoid', 'lstm', 'gru' or 'gru_reset_before'"


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, f"cell is None, expected one of {CELLS}", {"cell": None}),
        (ValueError, f"cell is 'GRU', expected one of {CELLS}", {"cell": "GRU"}),
        (ValueError, "backend is 'numpy', expected one of 'cpu', 'reference', 'cuda'", {"backend": "numpy"}),
        (TypeError, "backend is a list, expected one of 'cpu', 'reference', 'cuda'", {"backend": []}),
        (ValueError, "backend is 'cpu-tf32', expected one of 'cpu', 'reference', 'cuda'", {"backend": "cpu-tf32"}),
        (TypeError, "x is a list, expected a NumPy array of float32 or float64 and shape (T, B, I)", {"x": [0]}),
        (TypeError, "x has dtype int8, expected float32 or float64: cast it", {"x": zeros(T, B, I, dtype=np.int8)}),
        (ValueError, "x has shape (5, 4), expected (T, B, I) = (any, any, any)", {"x": zeros(T, I)}),
        (TypeError, "params is a list, expected a dict of names to arrays", {"params": [zeros(18, I)]}),
        (ValueError, "params has no 'weight_hh', which gru needs", {"params": without(gru_params(), "weight_hh")}),
        (
            ValueError,
            "params has no 'weight_ih', 'weight_hh' or 'bias_hh', which gru needs",
            {"params": {"bias_ih": 0}},
        ),
        (ValueError, "params has no 'bias_ih', which gru needs", {"params": without(gru_params(), "bias_ih")}),
        (
            ValueError,
            "params has 'weight_hr', which gru does not: expected 'weight_ih', 'weight_hh', 'bias_ih' or 'bias_hh'",
            {"params": gru_params() | {"weight_hr": zeros(2, H)}},
        ),
        (
            TypeError,
            "params['weight_hh'] is None, expected a NumPy array",
            {"params": gru_params() | {"weight_hh": None}},
        ),
        (TypeError, "params['weight_hh'] has dtype float64, expected float32", {"params": gru_params(f64)}),
        (
            ValueError,
            "params['weight_hh'] has shape (18,), expected (G * H, H) = (any, any)",
            {"params": gru_params() | {"weight_hh": zeros(18)}},
        ),
        (
            ValueError,
            "params['weight_hh'] has shape (17, 6), expected the shape for I = 4 and H = 6 = (18, 6)",
            {"params": gru_params() | {"weight_hh": zeros(17, H)}},
        ),
        (
            ValueError,
            "params['weight_ih'] has shape (18, 5), expected the shape for I = 4 and H = 6 = (18, 4)",
            {"params": gru_params() | {"weight_ih": zeros(18, 5)}},
        ),
        (
            ValueError,
            "params['bias_hh'] has shape (6,), expected the shape for I = 4 and H = 6 = (18,)",
            {"params": gru_params() | {"bias_hh": zeros(H)}},
        ),
        (
            ValueError,
            "params['weight_hh'] has shape (0, 0), expected sizes of 1 or more",
            {"params": gru_params() | {"weight_hh": zeros(0, 0)}},
        ),
        (
            ValueError,
            "params['weight_hr'] has shape (6,), expected (P, H) = (any, any)",
            {"cell": "lstm", "params": lstm_params() | {"weight_hr": zeros(6)}},
        ),
        (
            ValueError,
            "params['weight_hh'] has shape (24, 6), expected the shape for I = 4 and H = 6 = (24, 2)",
            {"cell": "lstm", "params": lstm_params() | {"weight_hr": zeros(2, H)}},
        ),
        (TypeError, "state is an ndarray, expected a tuple (h,)", {"state": zeros(B, H)}),
        (ValueError, "state has 2 entries, expected a tuple (h,)", {"state": (zeros(B, H),) * 2}),
        (
            ValueError,
            "state has 1 entries, expected a tuple (h, c)",
            {"cell": "lstm", "params": lstm_params(), "state": (zeros(B, H),)},
        ),
        (TypeError, "state[0] has dtype float64, expected float32", {"state": (zeros(B, H, dtype=f64),)}),
        (ValueError, "state[0] has shape (1, 3, 6), expected (B, size) = (3, 6)", {"state": (zeros(1, B, H),)}),
        (TypeError, "reverse is 1, expected True or False", {"reverse": 1}),
        (TypeError, "training is None, expected True or False", {"training": None}),
        (TypeError, "column is 0.0, expected an integer of 0 or more", {"column": 0.0}),
        (ValueError, "column is -1, expected an integer of 0 or more", {"column": -1}),
        (ValueError, "column is 3 without an output, expected 0", {"column": 3}),
        (TypeError, "output is a list, expected a NumPy array", {"output": []}),
        (TypeError, "output has dtype float64, expected float32", {"output": zeros(T, B, H, dtype=f64)}),
        (
            ValueError,
            "output has shape (3, 5, 6), expected (T, B, at least column + W) = (5, 3, any)",
            {"output": zeros(B, T, H)},
        ),
        (
            ValueError,
            "output has shape (5, 3, 12), expected at least column + W = 7 + 6 = 13 columns",
            {"output": zeros(T, B, 12), "column": 7},
        ),
        (ValueError, "output is strided, misaligned", {"output": zeros(T, B, 2 * H)[..., ::2]}),
        (ValueError, "output is strided, misaligned", {"output": np.broadcast_to(zeros(H), (T, B, H))}),
        (ValueError, "output is strided, misaligned", {"output": zeros(T, B, H, dtype=">f4")}),
    ],
)
def test_functional_forward(error, message, arguments):
    arguments = {"cell": "gru", "x": zeros(T, B, I), "params": gru_params(), **arguments}
    check(error, message, functional.forward, **arguments)


def test_output_that_shares_memory():
    params = {"weight_ih": zeros(H, H), "weight_hh": zeros(H, H)}
    x = zeros(T, B, H)
    h = zeros(T, B, H)[0]
    message = "output shares memory with {}, expected memory of its own"
    check(ValueError, message.format("x"), functional.forward, "rnn_tanh", x, params, output=x)
    call = functional.forward
    check(ValueError, message.format("state"), call, "rnn_tanh", x, params, (h,), output=h.base)
    block = zeros(T, B, H)
    params["weight_hh"] = block.reshape(-1, H)[:H]
    check(ValueError, message.format("weight_hh"), call, "rnn_tanh", x, params, output=block)


@pytest.mark.parametrize(
    ("error", "message", "gradients"),
    [
        (ValueError, "d_output and d_state are both None", {}),
        (ValueError, "d_output and d_state are both None", {"d_state": (None, None)}),
        (TypeError, "d_output is a list, expected a NumPy array", {"d_output": [1.0]}),
        (ValueError, "d_output has shape (5, 3, 4), expected (T, B, W) = (5, 3, 6)", {"d_output": zeros(T, B, I)}),
        (TypeError, "d_output has dtype float64", {"d_output": zeros(T, B, H, dtype=f64)}),
        (TypeError, "d_state is an ndarray, expected a tuple (h, c)", {"d_state": zeros(B, H)}),
        (ValueError, "d_state has 1 entries, expected a tuple (h, c)", {"d_state": (zeros(B, H),)}),
        (ValueError, "d_state[1] has shape (2, 6), expected (B, size) = (3, 6)", {"d_state": (None, zeros(2, H))}),
    ],
)
def test_functional_backward(error, message, gradients):
    _, _, tape = functional.forward("lstm", zeros(T, B, I), lstm_params(), training=True)
    check(error, message, functional.backward, tape, **gradients)


def test_functional_backward_without_a_tape():
    for tape in (None, object(), Tape):
        with pytest.raises(TypeError, match=r"tape is .*, expected what forward\(\.\.\., training=True\) returned"):
            functional.backward(tape, zeros(T, B, H))


def test_backend_names():
    check(ValueError, "backend is 'tpu', expected one of 'cpu', 'reference', 'cuda'", backend.load, "tpu")
    check(TypeError, "backend is a dict, expected one of 'cpu', 'reference', 'cuda'", backend.load, {})
    check(ValueError, "backend is 'cuda-tf32-float16', expected 'cuda', and behind", backend.load, "cuda-tf32-float16")
    check(ValueError, "backend is 'cuda-', expected 'cuda', and behind it at most a mode", backend.load, "cuda-")


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, "cells is 'lstm', expected a list of names", {"cells": "lstm"}),
        (TypeError, "cells is 3, expected a list of names", {"cells": 3}),
        (ValueError, f"cell is 'LSTM', expected one of {CELLS}", {"cells": ["LSTM"]}),
        (TypeError, "dtypes is 'float32', expected a list of names", {"dtypes": "float32"}),
        (TypeError, "dtype is 'float16', expected float32 or float64", {"dtypes": ["float16"]}),
        (TypeError, "training is 'no', expected True or False", {"training": "no"}),
        (TypeError, "begin is 3, expected a function or None", {"begin": 3}),
    ],
)
def test_warmup(error, message, arguments):
    check(error, message, fastrnn.warmup, **arguments)


def test_set_num_threads():
    check(TypeError, "number is 'two', expected an integer of 1 or more", fastrnn.set_num_threads, "two")
    check(TypeError, "number is True, expected an integer of 1 or more", fastrnn.set_num_threads, True)
    check(ValueError, "number is 0, expected an integer of 1 or more", fastrnn.set_num_threads, 0)


def test_sizes_of_a_layer_are_fixed():
    layer = LSTM(I, H)
    for name in (
        "input_size",
        "hidden_size",
        "num_layers",
        "bias",
        "bidirectional",
        "proj_size",
        "dtype",
        "parameters",
    ):
        with pytest.raises(AttributeError):
            setattr(layer, name, 1)


def test_parameters_can_be_assigned_but_not_added_or_removed():
    parameters = GRU(I, H).parameters
    check(KeyError, "there is no parameter 'weight', only 'weight_ih_l0'", parameters.__setitem__, "weight", 0)
    check(KeyError, "there is no parameter 'weight', only 'weight_ih_l0'", parameters.update, weight=0)
    message = "weight_ih_l0 has shape (3,), expected (18, 4)"
    check(ValueError, message, parameters.__setitem__, "weight_ih_l0", zeros(3))
    message = "bias_ih_l0 has dtype int64, expected a floating point array of shape (18,)"
    check(TypeError, message, parameters.__setitem__, "bias_ih_l0", np.arange(18))
    message = "bias_ih_l0 cannot be read as an array of floats"
    check(TypeError, message, parameters.__setitem__, "bias_ih_l0", [[1.0], [2.0, 3.0]])
    message = "a layer's parameters can be assigned, but none can be added or removed"
    for name in ("pop", "popitem", "clear", "setdefault", "__delitem__"):
        check(TypeError, message, getattr(parameters, name), *["bias_ih_l0"][: name not in ("popitem", "clear")])


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (ValueError, "state_dict does not fit the layer; missing: 'weight_ih_l0'", {"weight_ih_l0": None}),
        (ValueError, "state_dict does not fit the layer; unexpected: 'weight_hr_l0', 7", {"weight_hr_l0": 0, 7: 0}),
        (
            ValueError,
            "state_dict does not fit the layer; missing: 'bias_ih_l0', 'bias_hh_l0'; unexpected: 'bias'",
            {"bias_ih_l0": None, "bias_hh_l0": None, "bias": zeros(18)},
        ),
        (ValueError, "bias_hh_l0 has shape (19,), expected (18,)", {"bias_hh_l0": zeros(19)}),
        (ValueError, "weight_hh_l0 has shape (6, 18), expected (18, 6)", {"weight_hh_l0": zeros(H, 18)}),
        (TypeError, "bias_hh_l0 has dtype complex128", {"bias_hh_l0": zeros(18, dtype=complex)}),
        (TypeError, "bias_hh_l0 has dtype object", {"bias_hh_l0": zeros(18, dtype=object)}),
        (TypeError, "bias_hh_l0 has dtype <U4", {"bias_hh_l0": "text"}),
    ],
)
def test_load_state_dict(error, message, change):
    layer = GRU(I, H)
    before = layer.state_dict()
    state_dict = {name: zeros(*array.shape) for name, array in before.items()} | change
    state_dict = {name: value for name, value in state_dict.items() if value is not None}
    check(error, message, layer.load_state_dict, state_dict)
    assert all(np.array_equal(before[name], layer.parameters[name]) for name in before)


def test_load_state_dict_of_the_wrong_kind():
    check(TypeError, "state_dict is a list, expected a dict of names to arrays", GRU(I, H).load_state_dict, [])
    check(TypeError, "strict is 'no', expected True or False", GRU(I, H).load_state_dict, {}, "no")


def test_nothing_changes_when_a_call_is_refused():
    layer = LSTM(I, H, 2, dropout=0.5, seed=0)
    x, h, d_output = zeros(T, B, I) + 1, zeros(2, B, H) + 2, zeros(T, B, H) + 3
    _, _, tape = layer.forward(x)
    before, random = layer.state_dict(), layer._random.bit_generator.state
    for call in (
        lambda: layer(x, (h, h[0])),
        lambda: layer.forward(x, (h, h), lengths=[9, 9, 9]),
        lambda: layer.forward(x, (h, h), reset=x),
        lambda: layer.step(x[0], (h, None)),
        lambda: layer.backward(tape, d_output, (h, h[0])),
    ):
        with pytest.raises((TypeError, ValueError)):
            call()
    assert layer._random.bit_generator.state == random
    assert all(np.array_equal(before[name], layer.parameters[name]) for name in before)
    assert (x == 1).all()
    assert (h == 2).all()
    assert (d_output == 3).all()


class Anything:
    """Draws arguments that mostly do not fit, and calls with them, from a seed."""

    layers = (RNN(I, H), LSTM(I, H, 2, bidirectional=True), GRU(I, H), LSTM(I, H, proj_size=2))

    def __init__(self, seed):
        self.random = np.random.default_rng(seed)

    def pick(self, *values):
        return values[self.random.integers(len(values))]

    def array(self):
        shape = tuple(int(n) for n in self.random.choice([0, 1, 2, 3, 4, 6, 18], self.random.integers(5)))
        dtype = self.pick("f4", "f4", "f4", "f4", "f8", ">f4", "f2", "i8", "?", "c8", "O", "U3", "V4", "M8[s]")
        return self.pick(np.zeros(shape, dtype), np.zeros(shape, dtype).T, np.zeros(shape, "f4"))

    def value(self):
        strange = self.pick(None, 0, -1, 3, 1.5, float("nan"), "text", b"bytes", [], (), {}, object(), True, 10**30)
        return self.pick(strange, self.array(), self.array(), (self.array(), self.array()), [1, 2, 3])

    def call(self):
        layer, value = self.pick(*self.layers), self.value
        x = self.pick(zeros(T, B, I), zeros(T, B, I), value())
        _, _, tape = layer.forward(zeros(T, B, I))
        output = {"output": value(), "column": self.pick(0, value())}
        params = self.pick(gru_params(), {"weight_ih": value(), "weight_hh": value()})
        arguments = [value() for _ in range(self.random.integers(2, 8))]
        self.pick(
            lambda: layer(x, value(), lengths=value(), reset=value()),
            lambda: layer(x, lengths=value()),
            lambda: layer.forward(x, value()),
            lambda: layer.step(value(), value()),
            lambda: layer.backward(tape, value(), value()),
            lambda: functional.forward("gru", x, params, value()),
            lambda: functional.forward("gru", x, gru_params(), **output),
            lambda: layer.load_state_dict({**layer.state_dict(), "bias_ih_l0": value()}),
            lambda: self.pick(RNN, LSTM, GRU)(*arguments),
        )()


@pytest.mark.parametrize("seed", range(4))
def test_anything_at_all_gives_a_result_or_a_clear_exception(seed):
    anything = Anything(seed)
    refused = []
    for _ in range(250):
        try:
            anything.call()
        except (TypeError, ValueError, MemoryError) as error:
            refused.append(error)
    assert len(refused) > 150
    assert {type(error) for error in refused} <= {TypeError, ValueError, MemoryError}
    assert all(str(error) for error in refused)
