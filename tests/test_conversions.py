"""Weights of other frameworks give their outputs here, and ours there: the frameworks themselves are the oracles."""

import functools
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import conversion_checks
import numpy as np
import pytest

from fastrnn import functional, weights
from fastrnn.weights import Architecture, from_cudnn, from_equinox, from_flax, to_cudnn, to_equinox, to_flax

T, B, I, H = 5, 3, 4, 6
NAMES = [(framework, name) for framework, checks in conversion_checks.CHECKS.items() for name in checks]


@functools.cache
def outcomes(framework):
    program = Path(conversion_checks.__file__)
    done = subprocess.run([sys.executable, program, framework], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(("framework", "name"), NAMES, ids=lambda value: value.replace(" ", "_"))
def test_the_framework_agrees_both_ways(framework, name):
    if importlib.util.find_spec(framework) is None:
        pytest.skip(f"{framework} is not installed")
    error = outcomes(framework)[name]
    assert error is None, error


def params_of(cell, bias=True, P=0, input_size=I, seed=0):
    random = np.random.default_rng(seed)
    shapes = weights.cell_shapes(cell, input_size, H, P, bias=bias)
    return {name: random.uniform(-1, 1, shape) for name, shape in shapes.items()}


@pytest.mark.parametrize("cell", ["rnn_tanh", "rnn_relu", "lstm", "gru"])
@pytest.mark.parametrize("bias", [True, False])
def test_pytorch_takes_them_as_they_are(cell, bias):
    torch = pytest.importorskip("torch")
    kind, options = (torch.nn.RNN, {"nonlinearity": cell[4:]}) if cell.startswith("rnn") else (torch.nn.GRU, {})
    kind = torch.nn.LSTM if cell == "lstm" else kind
    layer, params = kind(I, H, bias=bias, dtype=torch.float64, **options), params_of(cell, bias)
    layer.load_state_dict({f"{name}_l0": torch.from_numpy(array) for name, array in params.items()})
    x = np.random.default_rng(1).uniform(-1, 1, (T, B, I))
    output, _, _ = functional.forward(cell, x, params)
    # float64 on both sides: only the order of sums differs
    np.testing.assert_allclose(output, layer(torch.from_numpy(x))[0].detach().numpy(), rtol=1e-12, atol=1e-13)
    # As the one layer of a stack, and in its own order, it is what cuDNN's order is, too
    back = from_cudnn(cell, to_cudnn(cell, [params]), I, H, bias=bias)
    assert list(back[0]) == list(params)
    assert all(np.array_equal(back[0][name], params[name]) for name in params)


@pytest.mark.parametrize("cell", ["rnn_tanh", "rnn_relu", "lstm", "gru"])
@pytest.mark.parametrize("bias", [True, False])
def test_cudnn_there_and_back(cell, bias):
    spec = Architecture(cell, I, H, 3, bias, True)
    space = np.arange(spec.num_parameters, dtype=np.float32)
    parts = from_cudnn(cell, space, I, H, 3, bias=bias, bidirectional=True)
    assert [{name: array.shape for name, array in part.items()} for part in parts] == [
        {name: array.shape for name, array in params_of(cell, bias, input_size=I if k < 2 else 2 * H).items()}
        for k in range(6)
    ]
    np.testing.assert_array_equal(to_cudnn(cell, parts), space)
    assert parts[0]["weight_ih"].dtype == np.float32
    assert not np.shares_memory(parts[0]["weight_ih"], space)
    if bias:  # behind all weights
        assert parts[0]["bias_ih"][0] == sum(part["weight_ih"].size + part["weight_hh"].size for part in parts)


@pytest.mark.parametrize("form", ["nnx", "linen"])
@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm", "gru"])
def test_flax_back_and_there_keeps_the_numbers(cell, form):
    params = params_of(cell)
    if form == "nnx" and cell == "gru":
        params["bias_hh"][2 * H :] = 0
    tree = to_flax(cell, params, form)
    back = from_flax(cell, tree)
    assert list(back) == list(params)
    for name in ("weight_ih", "weight_hh"):
        np.testing.assert_array_equal(back[name], params[name])
    bias = params["bias_ih"] + params["bias_hh"]
    if cell == "gru":
        bias[2 * H :] = params["bias_ih"][2 * H :]
        np.testing.assert_array_equal(back["bias_hh"][2 * H :], params["bias_hh"][2 * H :])
        back["bias_hh"][2 * H :] = 0
    np.testing.assert_array_equal(back["bias_ih"] + back["bias_hh"], bias)


def test_nothing_given_is_written_or_shared():
    params = params_of("gru")
    kept = {name: array.copy() for name, array in params.items()}
    made = [*to_equinox("gru", params).values(), to_cudnn("gru", [params])]
    made += [array for part in to_flax("gru", params, "linen").values() for array in part.values()]
    made += from_equinox("gru", {"weight_ih": params["weight_ih"], "weight_hh": params["weight_hh"]}).values()
    for array in made:
        array[...] = 9
    assert all(np.array_equal(kept[name], params[name]) for name in params)


LSTM, GRU, RNN = params_of("lstm"), params_of("gru"), params_of("rnn_tanh")
PROJECTED, BEFORE = params_of("lstm", P=2), params_of("gru_reset_before")
AFTER = "its GRU resets after the recurrent product, another function, which these weights do not fit"


def without(mapping, name):
    return {key: value for key, value in mapping.items() if key != name}


@pytest.mark.parametrize(
    ("message", "call"),
    [
        (f"cell is 'gru_reset_before', which Flax does not have: {AFTER}", lambda: to_flax("gru_reset_before", BEFORE)),
        (f"'gru_reset_before', which Flax does not have: {AFTER}", lambda: from_flax("gru_reset_before", {})),
        (f"which Equinox does not have: {AFTER}", lambda: to_equinox("gru_reset_before", BEFORE)),
        (f"which Equinox does not have: {AFTER}", lambda: from_equinox("gru_reset_before", {})),
        (f"which cuDNN does not have: {AFTER}", lambda: to_cudnn("gru_reset_before", [BEFORE])),
        (f"which cuDNN does not have: {AFTER}", lambda: from_cudnn("gru_reset_before", np.zeros(9), I, H)),
        ("does not have: its RNN has tanh and relu only", lambda: to_cudnn("rnn_sigmoid", [RNN])),
        ("does not have: it has LSTMCell and GRUCell and no simple cell", lambda: to_equinox("rnn_tanh", RNN)),
        ("does not have: it has LSTMCell and GRUCell and no simple cell", lambda: from_equinox("rnn_relu", RNN)),
        ("is not zero, and nnx.GRUCell has no place for it: flax.linen's GRUCell has", lambda: to_flax("gru", GRU)),
        ("a projected LSTM cannot be converted to Flax", lambda: to_flax("lstm", PROJECTED)),
        ("a projected LSTM cannot be converted to Equinox", lambda: to_equinox("lstm", PROJECTED)),
        ("a projected LSTM cannot be converted to cuDNN", lambda: to_cudnn("lstm", [PROJECTED])),
        ("form is 'haiku', expected 'nnx', 'nnx_gates' or 'linen'", lambda: to_flax("lstm", LSTM, "haiku")),
        ("form is 'nnx_gates' and cell is 'gru': only nnx.LSTMCell", lambda: to_flax("gru", GRU, "nnx_gates")),
        ("cell is 'LSTM', expected one of 'rnn_tanh'", lambda: to_flax("LSTM", LSTM)),
        ("cell is 'LSTM', expected one of 'rnn_tanh'", lambda: from_flax("LSTM", {})),
        ("cell is 'LSTM', expected one of 'rnn_tanh'", lambda: from_equinox("LSTM", {})),
        ("cell is 'LSTM', expected one of 'rnn_tanh'", lambda: from_cudnn("LSTM", np.zeros(3), I, H)),
        ("params have the shapes {'weight_ih': (24, 4)", lambda: to_flax("gru", LSTM)),
        (
            "tree has the names 'dense_i', expected 'dense_i', 'dense_h', or 'ir', 'iz', 'in', 'hr', 'hz', 'hn'",
            lambda: from_flax("gru", {"dense_i": {"kernel": np.zeros((4, 18))}}),
        ),
        (
            "tree['dense_h'] needs a matrix 'kernel'",
            lambda: from_flax("gru", {**to_flax("gru", params_of("gru", bias=False)), "dense_h": {}}),
        ),
        ("params have the shapes {'weight_ih': (24, 4)", lambda: from_flax("gru", to_flax("lstm", LSTM))),
        (
            "arrays has 'weight_ih', 'bias', expected 'weight_ih'",
            lambda: from_equinox("lstm", {"weight_ih": 0, "bias": 0}),
        ),
        (
            "expected 'weight_ih', 'weight_hh', 'bias', 'bias_n', or the first two",
            lambda: from_equinox("gru", without(to_equinox("gru", GRU), "bias_n")),
        ),
        (
            "bias_n has shape (7,), expected (6,)",
            lambda: from_equinox("gru", {**to_equinox("gru", GRU), "bias_n": np.zeros(7)}),
        ),
        ("parts is empty, expected the parameters of at least one layer", lambda: to_cudnn("lstm", [])),
        (
            "parts hold different parameters, expected the same names in all",
            lambda: to_cudnn("lstm", [LSTM, params_of("lstm", bias=False)]),
        ),
        ("array has shape (9,), expected (288,) for Architecture(", lambda: from_cudnn("lstm", np.zeros(9), I, H)),
    ],
)
def test_what_cannot_be_converted_raises(message, call):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
