"""Weights there and back with the frameworks themselves, in a process of their own: JAX starts threads when imported.

``python conversion_checks.py FRAMEWORK`` runs each ``FRAMEWORK_...`` function below for every cell that it names and
prints, as JSON, what went wrong with each: null, or the text of the exception.
"""

import json
import os
import sys
import traceback

os.environ["KERAS_BACKEND"] = "numpy"  # the smallest of its backends

import numpy as np

from fastrnn import functional, weights
from fastrnn.weights import Architecture, cell_shapes

T, B, I, H = 6, 3, 5, 7
RNNS = ("rnn_tanh", "rnn_relu", "rnn_sigmoid")
random = np.random.default_rng(20261)


def uniform(*shape):
    return random.uniform(-1, 1, shape)


def params_of(cell, bias=True, **sizes):
    return {name: uniform(*shape) for name, shape in cell_shapes(cell, I, H, bias=bias, **sizes).items()}


def like(tree):
    """Return random numbers in the structure of a tree of arrays."""
    return {name: like(part) if isinstance(part, dict) else uniform(*part.shape) for name, part in tree.items()}


def run(cell, params, x, state):
    output, last, _ = functional.forward(cell, x, params, state)
    return [output, *last]


def agree(ours, theirs, tolerance=1e-11):
    for one, other in zip(ours, theirs, strict=True):
        # float64 on both sides, a few steps: only the order of sums and the last bits of exp differ
        np.testing.assert_allclose(one, np.asarray(other), rtol=tolerance, atol=tolerance)


def problem(cell):
    return uniform(T, B, I), tuple(uniform(B, H) for _ in range(2 if cell == "lstm" else 1))


# ---- Flax and Equinox


def activation(cell):
    import jax

    return {"rnn_tanh": jax.numpy.tanh, "rnn_relu": jax.nn.relu, "rnn_sigmoid": jax.nn.sigmoid}[cell]


def flax_walk(step, cell, x, state):
    """Run a Flax cell, whose carry is (c, h), and return what our layer does."""
    carry = state[::-1] if cell == "lstm" else state[0]
    outputs = []
    for x_t in x:
        carry, y = step(carry, x_t)
        outputs.append(y)
    last = carry[::-1] if cell == "lstm" else [carry]
    return [np.stack(outputs), *last]


def nnx_cell(name, cell):
    from flax import nnx

    own = {"activation_fn": activation(cell)} if cell in RNNS else {}
    return getattr(nnx, name)(I, H, dtype=np.float64, param_dtype=np.float64, rngs=nnx.Rngs(0), **own)


def flax_nnx(cell, name, form="nnx"):
    from flax import nnx

    module, (x, state) = nnx_cell(name, cell), problem(cell)
    # From Flax, with random biases where it has one
    tree = like(nnx.to_pure_dict(nnx.state(module, nnx.Param)))
    nnx.update(module, tree)
    agree(run(cell, weights.from_flax(cell, tree), x, state), flax_walk(module, cell, x, state))
    # To Flax
    params = params_of(cell)
    if cell == "gru":
        params["bias_hh"][2 * H :] = 0
    tree = weights.to_flax(cell, params, form)
    assert jax_structure(tree) == jax_structure(nnx.to_pure_dict(nnx.state(module, nnx.Param)))
    nnx.update(module, tree)
    agree(run(cell, params, x, state), flax_walk(module, cell, x, state))
    nnx.update(module, weights.to_flax(cell, params_of(cell, bias=False), form))  # its bias is there, and zero


def jax_structure(tree):
    return {name: {key: array.shape for key, array in sorted(part.items())} for name, part in sorted(tree.items())}


def flax_linen(cell, name):
    import jax
    from flax import linen

    own = {"activation_fn": activation(cell)} if cell in RNNS else {}
    module, (x, state) = getattr(linen, name)(H, param_dtype=np.float64, **own), problem(cell)
    carry = state[::-1] if cell == "lstm" else state[0]
    made = module.init(jax.random.key(0), carry, x[0])["params"]
    params = params_of(cell)
    for tree, ours in (
        (like(made), None),
        (weights.to_flax(cell, params, "linen"), params),
        (weights.to_flax(cell, params_of(cell, bias=False), "linen"), None),
    ):
        assert jax_structure(tree) == jax_structure(made)
        theirs = flax_walk(lambda carry, x_t, tree=tree: module.apply({"params": tree}, carry, x_t), cell, x, state)
        agree(run(cell, ours or weights.from_flax(cell, tree), x, state), theirs)


def equinox_cell(cell, bias=True):
    import equinox
    import jax

    kind = {"lstm": equinox.nn.LSTMCell, "gru": equinox.nn.GRUCell}[cell]
    module, (x, state) = kind(I, H, use_bias=bias, dtype=np.float64, key=jax.random.key(0)), problem(cell)
    names = [name for name in ("weight_ih", "weight_hh", "bias", "bias_n") if getattr(module, name, None) is not None]

    def walk(arrays):
        assert list(arrays) == names
        one = equinox.tree_at(lambda m: [getattr(m, name) for name in names], module, list(arrays.values()))
        step = jax.vmap(lambda x, h: one(x, h))
        carry, outputs = state if cell == "lstm" else state[0], []
        for x_t in x:
            carry = step(x_t, carry)
            outputs.append(carry[0] if cell == "lstm" else carry)
        return [np.stack(outputs), *(carry if cell == "lstm" else [carry])]

    arrays = {name: uniform(*getattr(module, name).shape) for name in names}
    agree(run(cell, weights.from_equinox(cell, arrays), x, state), walk(arrays))
    params = params_of(cell, bias)
    agree(run(cell, params, x, state), walk(weights.to_equinox(cell, params)))


def cudnn_space(bidirectional, num_layers):
    """JAX documents the order of cuDNN's weight space for the LSTM, and has a reference for the CPU."""
    from jax.experimental import rnn

    spec = Architecture("lstm", I, H, num_layers, True, bidirectional)
    K, sizes = num_layers * spec.directions, (I, H, num_layers)
    parameters = {name: uniform(*shape) for name, shape in spec.shapes().items()}
    space = weights.to_cudnn("lstm", spec.split(parameters))
    assert space.shape == (rnn.get_num_params_in_lstm(*sizes, bidirectional),)
    import fastrnn

    layer = fastrnn.LSTM(*sizes, bidirectional=bidirectional, dtype=np.float64)
    layer.load_state_dict(parameters)
    x, h, c = uniform(T, B, I), uniform(K, B, H), uniform(K, B, H)
    output, (h_n, c_n) = layer(x, (h, c))
    unpacked = rnn.unpack_lstm_weights(space, *sizes, bidirectional)
    lengths = np.full(B, T, np.int32)
    y, *theirs = rnn.lstm_ref(x.swapaxes(0, 1), h, c, *unpacked, lengths, *sizes, 0.0, bidirectional)
    agree([output.swapaxes(0, 1), h_n, c_n], [y, *theirs])


# ---- Keras

KERAS = 2e-5  # its NumPy backend computes in float32, and relu lets the states grow


def keras_layer(cell, bias):
    import keras

    options = {"return_sequences": True, "return_state": True, "use_bias": bias}
    if cell == "lstm":
        layer = keras.layers.LSTM(H, **options)
    elif cell in RNNS:
        layer = keras.layers.SimpleRNN(H, activation=cell.removeprefix("rnn_"), **options)
    else:
        layer = keras.layers.GRU(H, reset_after=cell == "gru", **options)
    x, state = problem(cell)
    batch_first = x.swapaxes(0, 1)
    layer(batch_first)

    def call():
        y, *last = layer(batch_first, initial_state=list(state))
        return [np.swapaxes(np.asarray(y), 0, 1), *last]

    arrays = [uniform(*array.shape) for array in layer.get_weights()]
    layer.set_weights(arrays)
    agree(run(cell, weights.from_keras(cell, arrays), x, state), call(), KERAS)
    params = params_of(cell, bias)
    layer.set_weights(weights.to_keras(cell, params))
    agree(run(cell, params, x, state), call(), KERAS)


CHECKS = {
    "flax": {
        "nnx.OptimizedLSTMCell": lambda: flax_nnx("lstm", "OptimizedLSTMCell"),
        "nnx.LSTMCell": lambda: flax_nnx("lstm", "LSTMCell", "nnx_gates"),
        "nnx.GRUCell": lambda: flax_nnx("gru", "GRUCell"),
        **{f"nnx.SimpleCell, {cell}": lambda cell=cell: flax_nnx(cell, "SimpleCell") for cell in RNNS},
        "linen.OptimizedLSTMCell": lambda: flax_linen("lstm", "OptimizedLSTMCell"),
        "linen.LSTMCell": lambda: flax_linen("lstm", "LSTMCell"),
        "linen.GRUCell": lambda: flax_linen("gru", "GRUCell"),
        **{f"linen.SimpleCell, {cell}": lambda cell=cell: flax_linen(cell, "SimpleCell") for cell in RNNS},
    },
    "equinox": {
        f"{cell}, bias {bias}": lambda cell=cell, bias=bias: equinox_cell(cell, bias)
        for cell in ("lstm", "gru")
        for bias in (True, False)
    },
    "jax": {
        f"{layers} layers, bidirectional {both}": lambda both=both, layers=layers: cudnn_space(both, layers)
        for both in (False, True)
        for layers in (1, 2)
    },
    "keras": {
        f"{cell}, bias {bias}": lambda cell=cell, bias=bias: keras_layer(cell, bias)
        for cell in weights.CELLS
        for bias in (True, False)
    },
}


def outcome(check):
    try:
        check()
    except Exception:
        return traceback.format_exc()
    return None


def main(framework):
    if framework != "keras":
        import jax

        jax.config.update("jax_enable_x64", True)
    print(json.dumps({name: outcome(check) for name, check in CHECKS[framework].items()}))


if __name__ == "__main__":
    main(sys.argv[1])
