"""Random valid calls of all kinds in one process, each against the float64 reference, and random invalid ones.

FASTRNN_FUZZ_SEED chooses other calls, FASTRNN_FUZZ_SECONDS how long the two go on.
"""

import os
import time

import numpy as np
import pytest

import fastrnn
from fastrnn import functional
from fastrnn.testing import assert_close

SEED = int(os.environ.get("FASTRNN_FUZZ_SEED", time.time_ns() % 10**6))
SECONDS = float(os.environ.get("FASTRNN_FUZZ_SECONDS", 6))
ZONE, CANARY = 64, -1.2345e30  # numbers round an array, and what they are


class Arrays:
    """Arrays in the middle of canaries."""

    def __init__(self):
        self.blocks = []

    def normal(self, random, shape, dtype, scale=1.0):
        count = int(np.prod(shape))
        block = np.full(count + 2 * ZONE, CANARY, dtype)
        self.blocks.append(block)
        inside = block[ZONE : ZONE + count].reshape(shape)
        inside[...] = scale * random.standard_normal(shape)
        return inside

    def assert_intact(self):
        for block in self.blocks:
            canary = block.dtype.type(CANARY)
            assert (block[:ZONE] == canary).all(), "memory before an array was written"
            assert (block[-ZONE:] == canary).all(), "memory behind an array was written"


class Fuzzed:
    """A layer, and one with the same parameters in float64 whose numbers are the reference's."""

    def __init__(self, random):
        kind = random.choice(["rnn", "lstm", "lstm", "gru", "gru"])
        self.dtype = np.dtype(random.choice(["float32", "float32", "float32", "float64"]))
        I, H = int(random.integers(1, 50)), int(random.choice([1, 2, 7, 16, 31, 70, 150]))
        options = {
            "num_layers": int(random.integers(1, 4)),
            "bidirectional": bool(random.random() < 0.4),
            "bias": bool(random.random() < 0.8),
            "seed": int(random.integers(1 << 30)),
        }
        if kind == "rnn":
            make, options["nonlinearity"] = fastrnn.RNN, str(random.choice(["tanh", "relu", "sigmoid"]))
        elif kind == "lstm":
            make = fastrnn.LSTM
            if H > 2 and random.random() < 0.3:
                options["proj_size"] = int(random.integers(1, H))
        else:
            make, options["reset_after"] = fastrnn.GRU, bool(random.random() < 0.6)
        self.layer = make(I, H, **options, dtype=self.dtype)
        self.exact = make(I, H, **options, dtype="float64", backend="reference")
        self.T, self.B = int(random.choice([0, 1, 1, 2, 5, 33])), int(random.choice([0, 1, 1, 2, 3, 9, 40]))
        self.relu = options.get("nonlinearity") == "relu"

    def change_parameters(self, random):
        for array in self.layer.parameters.values():
            if random.random() < 0.5:
                array *= array.dtype.type(random.uniform(0.9, 1.1))
        self.copy_parameters()

    def copy_parameters(self):
        for name, array in self.layer.parameters.items():
            self.exact.parameters[name] = array.astype(np.float64)

    def state(self, random, arrays):
        if random.random() < 0.4:
            return None
        sizes = self.layer._spec.state_sizes
        shape = (self.layer._spec.num_layers * self.layer._spec.directions, self.B)
        parts = tuple(arrays.normal(random, (*shape, size), self.dtype) for size in sizes)
        return parts if len(parts) > 1 else parts[0]

    def options(self, random):
        given = {}
        if random.random() < 0.4:
            given["lengths"] = random.integers(0, self.T + 1, self.B)
        if random.random() < 0.3:
            given["reset"] = random.random((self.T, self.B)) < 0.3
        return given


def exactly(state):
    return tuple(map(exactly, state)) if isinstance(state, tuple) else None if state is None else state.astype(float)


def parts(state):
    return state if isinstance(state, tuple) else (state,)


def compare(one, name, actual, expected, terms):
    # Rounding errors are passed on from step to step and layer to layer, and a relu's grow with its values.
    scale = float(np.abs(expected).max(initial=1.0))
    assert_close(actual, expected, name, terms=64 * terms * (50 if one.relu else 1), scale=scale)


def infer(one, random, arrays):
    x, state, options = arrays.normal(random, (one.T, one.B, one.layer.input_size), one.dtype), None, {}
    state, options = one.state(random, arrays), one.options(random)
    output, last = one.layer(x, state, **options)
    expected, expected_last = one.exact(exactly(x), exactly(state), **options)
    compare(one, "output", output, expected, 1 + one.T)
    for a, b in zip(parts(last), parts(expected_last), strict=True):
        compare(one, "state", a, b, 1 + one.T)


def step(one, random, arrays):
    if one.layer.bidirectional:
        return
    state = one.state(random, arrays)
    exact = exactly(state)
    for _ in range(int(random.integers(1, 4))):
        x = arrays.normal(random, (one.B, one.layer.input_size), one.dtype)
        y, state = one.layer.step(x, state)
        expected, exact = one.exact.step(exactly(x), exact)
        compare(one, "y", y, expected, 4)


def train(one, random, arrays):
    x, state = arrays.normal(random, (one.T, one.B, one.layer.input_size), one.dtype), one.state(random, arrays)
    options = one.options(random)
    output, last, tape = one.layer.forward(x, state, **options, recompute=bool(random.random() < 0.4))
    expected, _, exact_tape = one.exact.forward(exactly(x), exactly(state), **options)
    compare(one, "output", output, expected, 1 + one.T)
    for _ in range(int(random.integers(1, 3))):
        asked = random.integers(1, 4)
        d_output = arrays.normal(random, output.shape, one.dtype) if asked & 1 else None
        d_state = None
        if asked & 2:
            made = tuple(arrays.normal(random, part.shape, one.dtype) for part in parts(last))
            if len(made) > 1 and random.random() < 0.5:
                made = (made[0], None) if random.random() < 0.5 else (None, made[1])
            d_state = made if isinstance(last, tuple) else made[0]
        gradients = one.layer.backward(tape, d_output, d_state)
        exact = one.exact.backward(exact_tape, exactly(d_output), exactly(d_state))
        if one.relu:  # a unit within rounding of its kink has another gradient: the output alone is compared
            continue
        steps = (1 + one.T) * (1 + one.B)
        compare(one, "dx", gradients.x, exact.x, steps)
        for name, array in gradients.params.items():
            compare(one, f"d{name}", array, exact.params[name], steps)
        for a, b in zip(parts(gradients.state), parts(exact.state), strict=True):
            compare(one, "dstate", a, b, steps)


def change(one, random, arrays):
    one.change_parameters(random)
    one.T, one.B = (
        (one.T, one.B) if random.random() < 0.7 else (int(random.integers(0, 20)), int(random.integers(0, 8)))
    )


def threads(one, random, arrays):
    fastrnn.set_num_threads(int(random.integers(1, 4)))


def test_any_mixture_of_calls():
    """Several layers in turn, so that what one keeps is there while others run; the seed is in the message."""
    print("seed", SEED)
    random, before, end = np.random.default_rng(SEED), fastrnn.get_num_threads(), time.monotonic() + SECONDS
    calls = 0
    try:
        while time.monotonic() < end:
            layers = [Fuzzed(random) for _ in range(3)]
            for one in layers:
                one.copy_parameters()
            for _ in range(25):
                arrays, one = Arrays(), layers[random.integers(len(layers))]
                act = random.choice([infer, infer, step, train, train, change, threads])
                try:
                    act(one, random, arrays)
                    arrays.assert_intact()
                except BaseException as error:
                    error.args = (f"seed {SEED}, call {calls}, {act.__name__} of {one.layer}: {error}",)
                    raise
                calls += 1
    finally:
        fastrnn.set_num_threads(before)
    assert calls > 25


# ---- what is not valid

JUNK = [
    None, True, -1, 0, 3, 2**40, 2.5, "x", b"x", (), [], {}, object(), np.nan, np.float32(1), slice(None),
    np.zeros(3), np.zeros((2, 2, 2)), np.zeros((0, 0, 0), np.float32), np.zeros((3, 2, 5), np.float16),
    np.ones((3, 2), bool), np.zeros((3, 2, 5), np.complex64), np.zeros((3, 2, 5), object),
    np.zeros((3, 2, 4), np.float32), np.full((3, 2), 2**40), np.array(["a"]), [[1, 2], [3]],
    (np.zeros((1, 2, 7), np.float32),) * 3,
]  # fmt: skip


def invalid_call(random):
    """One call with one or two arguments replaced by something else."""
    x, h = np.zeros((3, 2, 5), np.float32), np.zeros((1, 2, 7), np.float32)
    layer = fastrnn.GRU(5, 7, seed=0)
    params = {name.removesuffix("_l0"): array for name, array in layer.parameters.items()}
    output, _, tape = layer.forward(x)
    _, _, low = functional.forward("gru", x, params, (h[0],), training=True)
    calls = [
        (layer, {"x": x, "state": h, "lengths": [3, 1], "reset": np.zeros((3, 2), bool)}),
        (layer.forward, {"x": x, "state": h, "lengths": [3, 1], "reset": np.zeros((3, 2), bool), "recompute": True}),
        (layer.step, {"x_t": x[0], "state": h}),
        (layer.backward, {"tape": tape, "d_output": output, "d_state": h}),
        (
            functional.forward,
            {
                "cell": "gru", "x": x, "params": params, "state": (h[0],), "lengths": [3, 1], "reverse": True,
                "reset": np.zeros((3, 2), bool), "training": True, "output": np.zeros((3, 2, 9), np.float32),
                "column": 2, "recurrent_masks": h[0],
            },
        ),
        (functional.backward, {"tape": low, "d_output": output, "d_state": (h[0],)}),
        (fastrnn.LSTM, {"input_size": 3, "hidden_size": 4, "num_layers": 2, "bias": True, "dropout": 0.5}),
        (layer.load_state_dict, {"state_dict": layer.state_dict(), "strict": True}),
    ]  # fmt: skip
    function, arguments = calls[random.integers(len(calls))]
    for name in random.choice(list(arguments), size=random.integers(1, 3)):
        arguments[name] = JUNK[random.integers(len(JUNK))]
    return function, arguments


def test_any_invalid_call_is_an_error_that_names_an_argument():
    """TypeError or ValueError with the name of an argument in it, or a result where it was valid all the same."""
    print("seed", SEED)
    random, end, errors = np.random.default_rng(SEED), time.monotonic() + SECONDS / 3, 0
    while time.monotonic() < end or errors < 50:
        function, arguments = invalid_call(random)
        try:
            function(**arguments)
        except (TypeError, ValueError, MemoryError) as error:
            errors += 1
            name = getattr(function, "__name__", "layer")
            names = {*arguments, "h", "c", "params", "weight", "input", "output", "bias", "without"}
            if not any(word in str(error) for word in names):
                pytest.fail(f"seed {SEED}: {name}({arguments}) raises {error!r}, which names no argument")
        except Exception as error:
            pytest.fail(f"seed {SEED}: {function}({arguments}) raises {error!r}")
