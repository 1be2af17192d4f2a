"""The layers of fastrnn.keras against Keras's own, with the backend that KERAS_BACKEND names; test_keras.py runs it."""

import doctest
import warnings

import keras
import numpy as np
import pytest
from keras import ops

import fastrnn.keras as ours
from fastrnn import functional, weights
from fastrnn.keras import convert, restore

BACKEND = keras.backend.backend()
TRAINS = BACKEND != "numpy"
trains = pytest.mark.skipif(not TRAINS, reason="Keras's NumPy backend cannot train")
theirs = keras.layers
KINDS = ["SimpleRNN", "LSTM", "GRU"]
# What these two compile takes long: each kind in some of the checks.
COMPILES = BACKEND in ("jax", "tensorflow")
each_kind = pytest.mark.parametrize("kind", KINDS[1:2] if COMPILES else KINDS)
B, T, I, H = 5, 6, 3, 4

# Only with TensorFlow Keras computes in float64 where it is asked to: elsewhere its products are rounded to float32.
# Two ways to add the same numbers up differ by some roundings a step, times the sizes of the sums of a gradient.
DTYPE = "float64" if BACKEND == "tensorflow" else "float32"
CLOSE = {"rtol": 1e-9, "atol": 1e-11} if DTYPE == "float64" else {"rtol": 1e-4, "atol": 2e-5}
# Float32 over some steps of an optimizer, whose division by small numbers makes differences larger.
TRAINED = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(autouse=True)
def counted(monkeypatch):
    """Count what runs in the kernels."""
    calls = []
    run = ours._runner()
    monkeypatch.setattr(ours, "_runner", lambda: lambda *given: calls.append(given[0]) or run(*given))
    return calls


@pytest.fixture
def rng():
    return np.random.default_rng()


def numpy(tensors):
    return [ops.convert_to_numpy(tensor) for tensor in keras.tree.flatten(tensors)]


def assert_close(actual, expected, **tolerance):
    actual, expected = numpy(actual), numpy(expected)
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        np.testing.assert_allclose(one, other, **(tolerance or CLOSE))


def masks(rng):
    """Return masks by name."""
    lengths = rng.permutation([T, 1, 0, 3, T - 1])
    right = np.arange(T) < lengths[:, None]
    holes = rng.random((B, T)) < 0.6
    holes[0], holes[1], holes[2], holes[3] = False, [False, True] * 3, [True, False] * 3, [False] * 4 + [True] * 2
    return {"none": None, "right": right, "left": right[:, ::-1].copy(), "holes": holes}


def pair(kind, rng, shape=(B, T, I), dtype=DTYPE, **options):
    """Return Keras's layer and ours with the same random weights."""
    layers = []
    for module in (theirs, ours):
        keras.utils.set_random_seed(7)
        layers.append(getattr(module, kind)(H, dtype=dtype, **options))
        layers[-1].build(shape)
    weights = [rng.normal(size=w.shape) * 0.7 for w in layers[0].get_weights()]
    for layer in layers:
        layer.set_weights(weights)
    return layers


def states_of(kind, rng):
    return [rng.normal(size=(B, H)).astype(DTYPE) for _ in range(2 if kind == "LSTM" else 1)]


def results(layer, x, states=None, mask=None, training=False):
    """Return what a layer returns and, with random but equal weights on it, the gradients of all that it was given."""
    mask = None if mask is None else ops.convert_to_tensor(mask)
    variables = layer.trainable_variables

    def loss(outputs):
        draws = np.random.default_rng(3)
        flat = keras.tree.flatten(outputs)
        return sum(ops.sum(o * ops.convert_to_tensor(draws.normal(size=o.shape), o.dtype)) for o in flat)

    def call(x, states):
        options = {} if states is None else {"initial_state": states}
        return layer(x, mask=mask, training=training, **options)

    if BACKEND == "numpy":
        return call(x, states)
    if BACKEND == "torch":
        import torch

        given = [torch.tensor(a, requires_grad=True) for a in (x, *(states or ()))]
        outputs = call(given[0], given[1:] or None)
        return outputs, torch.autograd.grad(loss(outputs), [*given, *[v.value for v in variables]])
    if BACKEND == "tensorflow":
        import tensorflow as tf

        given = [tf.constant(a) for a in (x, *(states or ()))]
        with tf.GradientTape() as tape:
            tape.watch(given)
            outputs = call(given[0], given[1:] or None)
            total = loss(outputs)
        return outputs, [tf.convert_to_tensor(g) for g in tape.gradient(total, [*given, *[v.value for v in variables]])]
    import jax

    other = [v.value for v in layer.non_trainable_variables]

    def both(given, values):
        options = {"initial_state": given[1:]} if len(given) > 1 else {}
        outputs, _ = layer.stateless_call(values, other, given[0], mask=mask, training=training, **options)
        return loss(outputs), outputs

    given = [jax.numpy.asarray(a) for a in (x, *(states or ()))]
    values = [v.value for v in variables]
    gradients, outputs = jax.jit(jax.grad(both, argnums=(0, 1), has_aux=True))(given, values)
    return outputs, gradients


LAYERS = [
    {},
    {"return_sequences": True},
    {"return_sequences": True, "zero_output_for_mask": True},
    {"return_sequences": True, "return_state": True, "go_backwards": True},
    {"return_state": True, "zero_output_for_mask": True, "use_bias": False},
    {"return_state": True},
]
CELLS = [("SimpleRNN", {}), ("LSTM", {}), ("GRU", {}), ("GRU", {"reset_after": False})]
MASKS = ["none", "right", "left", "holes"]
CASES = [(*cell, mask, options) for cell in CELLS for options in LAYERS for mask in MASKS]
CASES = CASES[::9] if COMPILES else CASES


@pytest.mark.parametrize(("kind", "own", "mask", "options"), CASES, ids=str)
def test_a_layer_and_its_gradients(kind, own, mask, options, rng, counted):
    x = rng.normal(size=(B, T, I)).astype(DTYPE)
    keras_layer, layer = pair(kind, rng, **own, **options)
    states = states_of(kind, rng) if options.get("return_state") else None
    mask = masks(rng)[mask]
    expected = results(keras_layer, x, states, mask)
    assert not counted
    assert_close(results(layer, x, states, mask), expected)
    assert len(counted) == 1


@pytest.mark.parametrize("activation", ["relu", "sigmoid", keras.ops.tanh])
def test_activations_of_the_simple_layer(activation, rng, counted):
    keras_layer, layer = pair("SimpleRNN", rng, activation=activation, return_sequences=True)
    x = rng.normal(size=(B, T, I)).astype(DTYPE) * 0.5
    assert_close(results(layer, x), results(keras_layer, x))
    assert len(counted) == 1


FALLING_BACK = [
    ("SimpleRNN", {"activation": None}, "activation linear"),
    ("LSTM", {"activation": "relu"}, "activation relu with sigmoid"),
    ("GRU", {"recurrent_activation": "hard_sigmoid"}, "activation tanh with hard_sigmoid"),
]


@pytest.mark.parametrize(("kind", "options", "reason"), FALLING_BACK)
def test_what_the_kernels_lack_is_said_once_and_left_to_keras(kind, options, reason, rng, counted):
    keras_layer, layer = pair(kind, rng, **options)
    x = rng.normal(size=(B, T, I)).astype(DTYPE) * 0.3
    expected = keras_layer(x)
    with pytest.warns(UserWarning, match=rf"{layer.name} \({kind} of fastrnn.keras\) runs in Keras's own .*{reason}$"):
        assert_close(layer(x), expected)
    assert_close(layer(x), expected)  # and without a warning, which would be an error
    assert not counted
    assert layer.supports_jit is keras_layer.supports_jit


DROPPING = [
    ("LSTM", {"recurrent_dropout": 0.4, "return_sequences": True}),
    ("SimpleRNN", {"dropout": 0.4}),
    ("GRU", {"recurrent_dropout": 0.4, "dropout": 0.4, "reset_after": False}),
    ("GRU", {"dropout": 0.4, "reset_after": False}),
    ("SimpleRNN", {"recurrent_dropout": 0.4, "dropout": 0.4}),
    ("LSTM", {"dropout": 0.4}),
    ("GRU", {"recurrent_dropout": 0.4, "return_state": True, "go_backwards": True}),
    ("LSTM", {"dropout": 0.4, "implementation": 1, "use_cudnn": False}),
    ("GRU", {"dropout": 0.4, "implementation": 1, "use_cudnn": False}),
]


@pytest.mark.parametrize("masked", [True] if COMPILES else [False, True])
@pytest.mark.parametrize(("kind", "options"), DROPPING[::2] if COMPILES else DROPPING, ids=str)
def test_dropout_draws_the_numbers_that_keras_draws(kind, options, masked, rng, counted):
    keras_layer, layer = pair(kind, rng, **options, seed=11)
    x, mask = rng.normal(size=(B, T, I)).astype(DTYPE), masks(rng)["holes"] if masked else None
    plain, _ = [results(one, x, mask=mask) for one in (layer, keras_layer)]
    for _ in range(2):  # other numbers at each call
        expected = results(keras_layer, x, mask=mask, training=True)
        dropped = results(layer, x, mask=mask, training=True)
        assert_close(dropped, expected)
        assert not np.allclose(numpy(dropped)[0], numpy(plain)[0])
    assert len(counted) == 3


@each_kind
def test_states_go_from_batch_to_batch(kind, rng, counted):
    layers = pair(kind, rng, stateful=True, return_sequences=True)
    for _ in range(3):
        x = rng.normal(size=(B, T, I)).astype(DTYPE)
        expected = layers[0](x)
        # Through PyTorch's tape, too, which new states in the place of the old ones disturb, Keras's own.
        assert_close(results(layers[1], x)[0] if BACKEND == "torch" else layers[1](x), expected)
        assert_close(layers[1].states, layers[0].states)
    layers[1].reset_state()
    assert not any(state.any() for state in numpy([state.value for state in layers[1].states]))
    assert len(counted) == 3


@pytest.mark.parametrize("merge_mode", [None] if COMPILES else ["concat", "sum", None])
@each_kind
def test_bidirectional(kind, merge_mode, rng, counted):
    options = {"return_sequences": merge_mode != "sum", "return_state": merge_mode is None}
    wrapped = []
    for layer in pair(kind, rng, **options):
        keras.utils.set_random_seed(3)
        wrapped.append(theirs.Bidirectional(layer, merge_mode=merge_mode, dtype=DTYPE))
        wrapped[-1].build((B, T, I))
    assert type(wrapped[1].forward_layer) is type(wrapped[1].backward_layer) is getattr(ours, kind)
    weights = [rng.normal(size=w.shape) for w in wrapped[0].get_weights()]
    x, states = rng.normal(size=(B, T, I)).astype(DTYPE), [*states_of(kind, rng), *states_of(kind, rng)]
    for layer in wrapped:
        layer.set_weights(weights)
    for mask in (None, masks(rng)["right"], masks(rng)["holes"]):
        mask = None if mask is None else ops.convert_to_tensor(mask)
        one, other = [layer(x, initial_state=[*map(ops.convert_to_tensor, states)], mask=mask) for layer in wrapped]
        assert_close(other, one)
    assert len(counted) == 6


@pytest.mark.parametrize("steps", [3, None])
def test_time_distributed(steps, rng, counted):
    models = []
    if steps is None and BACKEND == "torch":
        pytest.skip("Keras maps over an unknown number of steps by torch.vmap")
    for module in (theirs, ours):
        keras.utils.set_random_seed(3)
        x = keras.Input((steps, T, I))
        models.append(keras.Model(x, theirs.TimeDistributed(module.GRU(H))(x)))
    x = rng.normal(size=(B, 3, T, I)).astype("float32")
    assert_close(models[1].predict(x, verbose=0), models[0].predict(x, verbose=0), **TRAINED)
    assert counted


@each_kind
def test_unrolled_is_the_same(kind, rng, counted):
    x, mask = rng.normal(size=(B, T, I)).astype(DTYPE), masks(rng)["holes"]
    for options in ({}, {"return_sequences": True, "zero_output_for_mask": True}):
        keras_layer, layer = pair(kind, rng, unroll=True, **options)
        states = states_of(kind, rng)
        for given in (None, mask):
            assert_close(results(layer, x, states, given), results(keras_layer, x, states, given))
    assert len(counted) == 4


# ---- models


def reader(module=theirs, kinds=("LSTM", "GRU"), **options):
    """Return a model with masks from an embedding, a wrapper, two layers, regularizers and constraints."""
    keras.utils.set_random_seed(5)
    own = {"kernel_regularizer": "l2", "recurrent_constraint": "unit_norm", "activity_regularizer": "l2", **options}
    x = keras.Input((None,), dtype="int32")
    y = theirs.Embedding(20, I, mask_zero=True)(x)
    y = theirs.Bidirectional(getattr(module, kinds[0])(H, return_sequences=True, **options))(y)
    y = getattr(module, kinds[1])(H, **own)(y)
    return keras.Model(x, theirs.Dense(2)(y))


def words(rng):
    x = rng.integers(1, 20, (8, 4)).astype("int32")
    x[:, 1:] *= rng.random((8, 3)) < 0.7
    return x, rng.normal(size=(8, 2)).astype("float32")


def fit(model, x, y, epochs=2):
    keras.utils.set_random_seed(9)
    return model.fit(x, y, epochs=epochs, batch_size=4, shuffle=False, verbose=0).history["loss"]


PAIRS = [("LSTM", "GRU"), ("SimpleRNN", "SimpleRNN"), ("GRU", "LSTM")]
WAYS = {
    "torch": [(kinds, {}) for kinds in PAIRS],
    "jax": [(PAIRS[0], {})],
    "tensorflow": [(PAIRS[0], {}), (PAIRS[1], {"run_eagerly": True})],
    "numpy": [],
}


@pytest.mark.parametrize(("kinds", "way"), WAYS[BACKEND], ids=str)
def test_training_gives_the_losses_and_weights_of_keras(kinds, way, rng, counted):
    (x, y), models = words(rng), [reader(module, kinds, dropout=0.3) for module in (theirs, ours)]
    models[1].set_weights(models[0].get_weights())
    losses = []
    for model in models:
        model.compile("adam", "mse", **way)
        losses.append(fit(model, x, y))
    assert counted
    np.testing.assert_allclose(losses[1], losses[0], **TRAINED)
    assert_close(models[1].get_weights(), models[0].get_weights(), **TRAINED)
    evaluated = [model.evaluate(x, y, verbose=0) for model in models]
    np.testing.assert_allclose(evaluated[1], evaluated[0], **TRAINED)
    assert_close(models[1].predict(x, verbose=0), models[0].predict(x, verbose=0), **TRAINED)


def test_saved_cloned_and_configured(rng, tmp_path, counted):
    x, _ = words(rng)
    model = reader(ours, dropout=0.1, seed=4)
    expected = model.predict(x, verbose=0)
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert type(again.layers[2].backward_layer) is ours.LSTM
    assert type(again.layers[3]) is ours.GRU
    assert_close(again.predict(x, verbose=0), expected)
    model.save_weights(tmp_path / "model.weights.h5")
    clone = keras.models.clone_model(model)
    assert type(clone.layers[3]) is ours.GRU
    clone.load_weights(tmp_path / "model.weights.h5")
    assert_close(clone.predict(x, verbose=0), expected)
    reader(theirs).load_weights(tmp_path / "model.weights.h5")  # and into Keras's own
    for kind in KINDS:
        config = getattr(ours, kind)(H, activation="relu", go_backwards=True, seed=1, name="it").get_config()
        assert config == getattr(theirs, kind)(H, activation="relu", go_backwards=True, seed=1, name="it").get_config()
        assert getattr(ours, kind).from_config(config).get_config() == config


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "float16", "mixed_float16", "bfloat16"][: 2 if COMPILES else 4])
@each_kind
def test_half_precision_is_computed_in_float32(kind, policy, rng, counted):
    half = "bfloat16" if "bfloat16" in policy else "float16"
    exact, _ = pair(kind, rng, dtype="float32")
    layer = getattr(ours, kind)(H, dtype=policy, return_state=True, recurrent_initializer="zeros")
    layer.build((B, T, I))
    weights = [ops.cast(ops.cast(w, half), "float32") for w in exact.get_weights()]
    for one in (exact, layer):
        one.set_weights(numpy(weights))
    x = ops.cast(rng.normal(size=(B, T, I)), half)
    output, state, *_ = layer(x)
    assert keras.backend.standardize_dtype(output.dtype) == keras.backend.standardize_dtype(state.dtype) == half
    expected = ops.cast(exact(ops.cast(x, "float32")), half)
    # One rounding, which may fall the other way.
    ulp = 2.0**-8 if half == "bfloat16" else 2.0**-11
    assert_close(ops.cast(output, "float32"), ops.cast(expected, "float32"), rtol=2 * ulp, atol=1e-6)
    assert len(counted) == 1


def test_float64(rng):
    if BACKEND == "jax":
        pytest.skip("JAX has no float64 unless it is told to")
    layer = ours.LSTM(H, dtype="float64", return_sequences=True)
    x = rng.normal(size=(B, T, I))
    output = numpy(layer(x))[0]
    assert output.dtype == np.float64
    params = weights.from_keras("lstm", [w.astype("float64") for w in layer.get_weights()])
    expected, _, _ = functional.forward("lstm", np.ascontiguousarray(x.transpose(1, 0, 2)), params)
    np.testing.assert_allclose(output.transpose(1, 0, 2), expected, rtol=1e-13, atol=1e-15)


# ---- a model that is there already


@trains
def test_a_model_is_converted_in_the_middle_of_its_training(rng, counted):
    (x, y), models = words(rng), []
    for _ in range(2):
        keras.utils.set_random_seed(5)
        models.append(keras.Sequential([theirs.Embedding(20, I, mask_zero=True), theirs.GRU(H), theirs.Dense(2)]))
        models[-1].compile("adam", "mse", metrics=["mae"])
    straight, turned = models
    expected = [fit(straight, x, y) for _ in range(3)]
    losses = [fit(turned, x, y)]
    layer, optimizer = turned.layers[1], turned.optimizer
    assert convert(turned) is turned
    assert turned.layers[1] is layer
    assert turned.optimizer is optimizer
    assert type(layer) is ours.GRU
    assert not counted
    losses.append(fit(turned, x, y))
    assert counted
    assert restore(turned) is turned
    assert type(layer) is theirs.GRU
    counted.clear()
    losses.append(fit(turned, x, y))
    assert not counted
    np.testing.assert_allclose(losses, expected, **TRAINED)
    assert_close(turned.get_weights(), straight.get_weights(), **TRAINED)


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.layer = theirs.LSTM(H, return_sequences=True)
        self.parts = [theirs.RNN(theirs.GRUCell(H), return_sequences=True), theirs.TimeDistributed(theirs.Dense(3))]
        self.inner = keras.Sequential([theirs.Bidirectional(theirs.SimpleRNN(H)), theirs.Dense(2)])

    def call(self, x):
        x = self.layer(x)
        for part in self.parts:
            x = part(x)
        return self.inner(x)


def test_subclassed_and_nested_models_are_converted(rng, counted):
    x, model = rng.normal(size=(B, T, I)).astype("float32"), Subclassed()
    expected, weights = numpy(model(x)), model.get_weights()
    convert(model)
    kinds = [type(model.layer), type(model.parts[0]), type(model.inner.layers[0].forward_layer)]
    assert kinds == [ours.LSTM, ours.GRU, ours.SimpleRNN]
    assert_close(model(x), expected, **TRAINED)
    assert len(counted) == 4
    assert_close(model.get_weights(), weights)
    convert(model)  # nothing more to do
    assert type(restore(model).parts[0]) is theirs.GRU
    assert_close(model(x), expected, **TRAINED)
    assert_close(model.predict(x, verbose=0), expected, **TRAINED)
    assert len(counted) == 4


def test_a_filter_leaves_layers_out():
    model = reader()
    convert(model, filter=lambda layer: "gru" in layer.name)
    assert [type(model.layers[2].forward_layer), type(model.layers[3])] == [theirs.LSTM, ours.GRU]


def test_what_cannot_be_converted_raises():
    class Own(theirs.LSTM):
        pass

    class OwnOfOurs(ours.GRU):
        pass

    model = keras.Sequential([theirs.GRU(H, return_sequences=True), Own(H, name="mine")])
    with pytest.raises(TypeError, match=r"mine cannot be replaced: it is of the subclass .*Own, which may compute"):
        convert(model)
    assert type(model.layers[0]) is theirs.GRU
    convert(model, filter=lambda layer: layer.name != "mine")
    assert type(model.layers[0]) is ours.GRU
    with pytest.raises(TypeError, match=r"stack cannot be replaced: it is an RNN of several cells"):
        convert(theirs.RNN([theirs.LSTMCell(H), theirs.LSTMCell(H)], name="stack"))
    with pytest.raises(TypeError, match=r"cannot be replaced: it is of the subclass .*OwnOfOurs, which Keras does not"):
        restore(OwnOfOurs(H))
    with pytest.raises(ValueError, match=r"model dense has no SimpleRNN, LSTM or GRU of Keras$"):
        convert(theirs.Dense(2, name="dense"))
    with pytest.raises(ValueError, match=r"has no SimpleRNN, LSTM or GRU of fastrnn.keras that filter lets through"):
        restore(ours.GRU(H), filter=lambda layer: False)
    with pytest.raises(TypeError, match=r"model is a str, expected a keras.Model or a layer"):
        convert("model")


@pytest.mark.skipif(BACKEND != "tensorflow", reason="about TensorFlow")
def test_second_derivatives_raise(rng):
    import tensorflow as tf

    layer, x = ours.GRU(H), rng.normal(size=(B, T, I)).astype("float32")
    layer.build(x.shape)
    x = tf.constant(x)
    with tf.GradientTape() as outer:
        outer.watch(x)
        with tf.GradientTape() as inner:
            inner.watch(x)
            total = tf.reduce_sum(layer(x))
        gradient = inner.gradient(total, x)
    with pytest.raises(NotImplementedError, match=r"fastrnn.keras have no second derivatives"):
        outer.gradient(gradient, x)


@pytest.mark.skipif(BACKEND != "torch", reason="about PyTorch")
def test_second_derivatives(rng):
    import torch

    values = []
    x = torch.tensor(rng.normal(size=(B, T, I)).astype("float32"), requires_grad=True)
    for layer in pair("LSTM", rng):
        (gradient,) = torch.autograd.grad(layer(x).sum(), x, create_graph=True)
        values.append(torch.autograd.grad(gradient.square().sum(), x))
    assert_close(values[1], values[0])


def test_the_options_that_mean_nothing_come_back(rng):
    layer = ours.LSTM(H, use_cudnn=True)
    assert layer.use_cudnn is False  # or a fused path of Keras would go past the kernels
    assert restore(layer).use_cudnn is True
    with pytest.raises(ValueError, match="use_cudnn"):
        ours.LSTM(H, use_cudnn="perhaps")


def test_a_tensorflow_model_is_not_compiled_by_xla(rng):
    model = reader(ours)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        model.compile("sgd", "mse", jit_compile=True)
    assert model.jit_compile is (BACKEND != "tensorflow")
    assert any("jit_compile" in str(one.message) for one in told) is (BACKEND == "tensorflow")


def test_examples():
    failed, tried = doctest.testmod(ours)
    assert tried
    assert not failed
