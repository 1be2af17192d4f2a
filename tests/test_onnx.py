"""ONNX: nodes are read with their meaning, models are run and written. Oracles: ONNX Runtime and onnx' own tests."""

import itertools
import json
import os
import pickle
import re
import subprocess
import sys
import unittest
import warnings
from pathlib import Path

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="the package onnx is not installed")
from onnx import TensorProto, helper, numpy_helper, parser  # noqa: E402
from onnx.backend.test import BackendTest  # noqa: E402

import fastrnn  # noqa: E402
import fastrnn.onnx  # noqa: E402
from fastrnn import weights  # noqa: E402
from fastrnn.onnx import Backend, Operator, export, load  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
GATES = {"RNN": 1, "LSTM": 4, "GRU": 3}
CONSTANTS = ("W", "R", "B", "P")


@pytest.fixture(scope="module")
def ort():
    ort = pytest.importorskip("onnxruntime", reason="the package onnxruntime is not installed")
    if tuple(map(int, ort.__version__.split(".")[:2])) < (1, 31):
        pytest.skip(f"onnxruntime is {ort.__version__}: before 1.31 an RNN's rows of no steps have an undefined state")
    return ort


def run_ort(ort, model, feeds):
    """Return a model's outputs by ONNX Runtime on one thread; it starts none then, which a later fork could lose."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


def uniform(random, *shape, dtype=np.float32):
    return random.uniform(-1, 1, shape).astype(dtype)


def make_model(op_type, attributes, arrays, *, inputs=(), opset=14):
    """Return a model of one node; arrays whose names are not among `inputs` are initialisers."""
    formal = [name for name in fastrnn.onnx._INPUTS if op_type == "LSTM" or name not in ("initial_c", "P")]
    given = [name if name in arrays else "" for name in formal]
    while not given[-1]:
        given.pop()
    outputs = ["Y", "Y_h", "Y_c"][: 3 if op_type == "LSTM" else 2]
    own = {"hidden_size": arrays["R"].shape[2]} | attributes  # ONNX Runtime needs it, ONNX does not
    node = helper.make_node(op_type, given, outputs, name="node", **own)
    kinds = {name: helper.np_dtype_to_tensor_dtype(array.dtype) for name, array in arrays.items()}
    graph = helper.make_graph(
        [node],
        "graph",
        [helper.make_tensor_value_info(name, kinds[name], arrays[name].shape) for name in inputs],
        [helper.make_tensor_value_info(name, kinds["W"], [None] * (4 if name == "Y" else 3)) for name in outputs],
        [numpy_helper.from_array(array, name) for name, array in arrays.items() if name not in inputs],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


# ---- onnx' own tests of the three operators


NODE_TESTS = [
    *["lstm_defaults", "lstm_with_initial_bias", "lstm_with_peepholes", "lstm_batchwise", "lstm_reverse"],
    *["lstm_bidirectional", "gru_defaults", "gru_with_initial_bias", "gru_seq_length", "gru_batchwise", "gru_reverse"],
    *["gru_bidirectional", "simple_rnn_defaults", "simple_rnn_with_initial_bias", "rnn_seq_length"],
    *["simple_rnn_batchwise", "simple_rnn_reverse", "simple_rnn_bidirectional"],
]


@pytest.fixture(scope="module")
def node_tests():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what onnx computes to make the data of all its tests
        return BackendTest(Backend, __name__).test_cases["OnnxBackendNodeModelTest"]


def test_there_are_no_other_node_tests(node_tests):
    found = {name for name in dir(node_tests) if re.match(r"test_(lstm|gru|rnn|simple_rnn)_.*_cpu$", name)}
    assert found
    assert found <= {f"test_{name}_cpu" for name in NODE_TESTS}


@pytest.mark.parametrize("name", NODE_TESTS)
def test_onnx_node_test(node_tests, name):
    if not hasattr(node_tests, f"test_{name}_cpu"):
        pytest.skip(f"onnx {onnx.__version__} does not have this test")
    outcome = unittest.TestResult()
    node_tests(f"test_{name}_cpu").run(outcome)
    assert outcome.testsRun == 1
    assert not outcome.skipped
    assert outcome.wasSuccessful(), (outcome.errors + outcome.failures)[0][1]


# ---- against ONNX Runtime, over the attributes


ALPHA = {"Affine", "Elu", "HardSigmoid", "LeakyRelu", "ScaledTanh", "ThresholdedRelu"}
BETA = {"Affine", "HardSigmoid", "ScaledTanh"}
ACTIVATIONS = sorted(ALPHA | {"Relu", "Sigmoid", "Softplus", "Softsign", "Tanh"})
FORMS = {"RNN": 1, "LSTM": 3, "GRU": 2}  # activations of one direction


def random_activations(random, count):
    """Return attributes: sometimes without the numbers, where both sides have the same defaults."""
    names = [str(name) for name in random.choice(ACTIVATIONS, count)]
    while count < 3 and len({(name in ALPHA, name in BETA) for name in names}) > 1:
        # ONNX Runtime reads past the end of an RNN's numbers where one direction has none, and may abort.
        names = [str(name) for name in random.choice(ACTIVATIONS, count)]
    attributes = {"activations": names}
    if random.random() < 0.6 or {"Affine", "ScaledTanh", "ThresholdedRelu"} & set(names):
        for label, having in (("activation_alpha", ALPHA), ("activation_beta", BETA)):
            numbers = [float(number) for number in random.uniform(0.1, 1, sum(name in having for name in names))]
            attributes |= {label: numbers} if numbers else {}
    return attributes


def problem(seed):
    """Return a random operator: its type, its attributes and the arrays of its inputs."""
    random = np.random.default_rng(seed)
    op_type = str(random.choice(["RNN", "LSTM", "GRU"]))
    direction = str(random.choice(["forward", "reverse", "bidirectional"]))
    D, (T, B, I, H) = 1 + (direction == "bidirectional"), map(int, random.integers(1, 8, 4))
    G, maybe = GATES[op_type], lambda probability: random.random() < probability
    attributes = {"direction": direction}
    attributes |= {"clip": float(random.uniform(0.3, 2))} if maybe(0.4) else {}
    attributes |= {"input_forget": 1} if op_type == "LSTM" and maybe(0.3) else {}
    attributes |= {"linear_before_reset": 1} if op_type == "GRU" and maybe(0.5) else {}
    plain = maybe(0.4)
    if plain:
        attributes.pop("clip", None)
        attributes.pop("input_forget", None)
    else:
        attributes |= random_activations(random, FORMS[op_type] * D) if maybe(0.7) else {}
    shapes = {"X": (T, B, I), "W": (D, G * H, I), "R": (D, G * H, H)}
    shapes |= {"B": (D, 2 * G * H)} if maybe(0.7) else {}
    shapes |= {"initial_h": (D, B, H)} if maybe(0.6) else {}
    if op_type == "LSTM":
        shapes |= {"initial_c": (D, B, H)} if maybe(0.6) else {}
        shapes |= {"P": (D, 3 * H)} if not plain and maybe(0.4) else {}
    # Some activations have no bound: with larger numbers the states would grow beyond all comparison.
    scale = np.float32(0.4 if "activations" in attributes else 1)
    arrays = {name: uniform(random, *shape) * scale for name, shape in shapes.items()}
    arrays |= {"sequence_lens": random.integers(0, T + 1, B).astype(np.int32)} if maybe(0.5) else {}
    return op_type, attributes, arrays


def calls(arrays):
    """Return what a call of the operator gets of the arrays."""
    return {name: array for name, array in arrays.items() if name not in CONSTANTS}


def assert_alike(ours, theirs, tolerance=3e-6):
    """Compare by the largest number: float32 on both sides, sums in another order, and states are fed back."""
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert one.shape == other.shape
        assert one.dtype == other.dtype
        largest = np.max(np.abs(other), initial=0)
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * (1 + largest))


SEEDS = range(160)


@pytest.mark.parametrize("seed", SEEDS)
def test_onnx_runtime_agrees(ort, seed):
    op_type, attributes, arrays = problem(seed)
    own = calls(arrays)
    model = make_model(op_type, attributes, arrays, inputs=own)
    onnx.checker.check_model(model)
    (operator,) = load(model).values()
    assert_alike(operator(**own), run_ort(ort, model, own))


def test_problems_are_of_every_kind():
    seen = [(op_type, attributes, set(arrays)) for op_type, attributes, arrays in map(problem, SEEDS)]
    used = {name for _, attributes, _ in seen for name in attributes.get("activations", ())}
    assert used == set(ACTIVATIONS)
    fused = [not load(make_model(*problem(seed), inputs=calls(problem(seed)[2])))["node"]._beyond(0) for seed in SEEDS]
    assert 40 < sum(fused) < 120
    for op_type, direction in itertools.product(GATES, ("forward", "reverse", "bidirectional")):
        assert sum(one == op_type and attributes["direction"] == direction for one, attributes, _ in seen) > 5
    for name in ("P", "sequence_lens", "initial_h", "initial_c"):
        assert sum(name in names for _, _, names in seen) > 8


@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize("name", ["clip", "input_forget", "activations", "P"])
def test_each_option_by_itself(ort, name, direction):
    D = 1 + (direction == "bidirectional")
    value = {"clip": 0.3, "input_forget": 1, "activations": ["HardSigmoid", "Softsign", "Elu"] * D}.get(name)
    arrays = lstm_arrays(D=D) | ({"P": uniform(np.random.default_rng(1), D, 18)} if name == "P" else {})
    attributes = {"direction": direction} | ({} if name == "P" else {name: value})
    model = make_model("LSTM", attributes, arrays, inputs=calls(arrays))
    theirs = run_ort(ort, model, calls(arrays))
    assert_alike(load(model)["node"](**calls(arrays)), theirs)
    plain = Operator("LSTM", arrays["W"], arrays["R"], arrays["B"], direction=direction)
    assert np.abs(plain(**calls(arrays))[0] - theirs[0]).max() > 1e-3


def general(operator):
    """Return the same operator, with the general path for both directions."""
    other = pickle.loads(pickle.dumps(operator))
    other._walks = [fastrnn.onnx._General(other, d) for d in range(other.num_directions)]
    return other


@pytest.mark.sampled(10)
@pytest.mark.parametrize("seed", range(40))
def test_both_paths_are_one_function(seed):
    op_type, attributes, arrays = problem(1000 + seed)
    kept = ("direction", "linear_before_reset")
    attributes = {name: value for name, value in attributes.items() if name in kept}
    if op_type == "RNN":
        one = [["Tanh", "Relu"], ["Relu", "Sigmoid"], ["Sigmoid", "Tanh"]][seed % 3]
        attributes["activations"] = one[: 1 + (attributes["direction"] == "bidirectional")]
    arrays = {name: array.astype(np.float64) if array.dtype == np.float32 else array for name, array in arrays.items()}
    arrays.pop("P", None)
    operator = load(make_model(op_type, attributes, arrays, inputs=calls(arrays)))["node"]
    assert not operator._beyond(0)
    assert_alike(operator(**calls(arrays)), general(operator)(**calls(arrays)), 1e-13)


@pytest.mark.sampled(10)
@pytest.mark.parametrize("seed", range(30))
def test_layout_1_is_the_same_transposed(seed):
    op_type, attributes, arrays = problem(2000 + seed)
    operator = load(make_model(op_type, attributes, arrays, inputs=calls(arrays)))["node"]
    other = load(make_model(op_type, attributes | {"layout": 1}, arrays, inputs=calls(arrays)))["node"]
    own = calls(arrays)
    swapped = {name: array if array.ndim == 1 else array.swapaxes(0, 1) for name, array in own.items()}
    Y, *states = operator(**own)
    of_layout_1 = other(**swapped)
    assert all(array.flags.c_contiguous for array in of_layout_1)
    np.testing.assert_array_equal(of_layout_1[0], Y.transpose(2, 0, 1, 3))
    for one, state in zip(of_layout_1[1:], states, strict=True):
        np.testing.assert_array_equal(one, state.swapaxes(0, 1))


def lstm_arrays(T=5, B=4, I=3, H=6, D=1, seed=7, dtype=np.float32, op_type="LSTM"):
    random, G = np.random.default_rng(seed), GATES[op_type]
    shapes = {"X": (T, B, I), "W": (D, G * H, I), "R": (D, G * H, H), "B": (D, 2 * G * H), "initial_h": (D, B, H)}
    shapes |= {"initial_c": (D, B, H)} if op_type == "LSTM" else {}
    return {name: uniform(random, *shape, dtype=dtype) for name, shape in shapes.items()}


@pytest.mark.parametrize("op_type", GATES)
@pytest.mark.parametrize("clip", [{}, {"clip": 1.5}], ids=["fused", "general"])
def test_rows_of_no_steps_have_no_state(ort, op_type, clip):
    arrays = lstm_arrays(op_type=op_type) | {"sequence_lens": np.array([5, 0, 2, 0], np.int32)}
    model = make_model(op_type, clip, arrays, inputs=calls(arrays))
    theirs = run_ort(ort, model, calls(arrays))
    ours = load(model)["node"](**calls(arrays))
    assert not theirs[1][:, [1, 3]].any()
    assert not any(array[:, [1, 3]].any() for array in ours[1:])
    assert_alike(ours, theirs)
    arrays["X"][3:, 2] = np.nan  # padding
    arrays["X"][:, 1] = np.nan
    for one, other in zip(load(model)["node"](**calls(arrays)), ours, strict=True):
        np.testing.assert_array_equal(one, other)
    too_long = calls(arrays) | {"sequence_lens": np.array([5, 6, 2, 0], np.int32)}
    with pytest.raises(ort.capi.onnxruntime_pybind11_state.InvalidArgument):
        run_ort(ort, model, too_long)
    with pytest.raises(ValueError, match=r"sequence_lens\[1\] is 6, expected 0 to T = 5"):
        load(model)["node"](**too_long)


def test_nothing_given_is_written_and_results_are_new():
    for attributes in ({}, {"clip": 1.0}):
        arrays = lstm_arrays()
        operator = load(make_model("LSTM", attributes, arrays, inputs=calls(arrays)))["node"]
        for array in arrays.values():
            array.flags.writeable = False
        first = operator(**calls(arrays))
        strided = {name: np.repeat(array, 2, axis=-1)[..., ::2] for name, array in calls(arrays).items()}
        for one, other in zip(first, operator(**strided), strict=True):
            np.testing.assert_array_equal(one, other)
            assert not any(np.shares_memory(one, array) for array in arrays.values())
        again = pickle.loads(pickle.dumps(operator))
        np.testing.assert_array_equal(again(**calls(arrays))[0], first[0])


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize(("T", "B"), [(0, 2), (3, 0), (0, 0)])
def test_nothing_at_all_is_input_too(clip, T, B):
    operator = Operator("LSTM", W, R, clip=clip, direction="reverse")
    state = np.full((1, B, 2), 0.5, np.float32)
    Y, Y_h, Y_c = operator(np.zeros((T, B, 3), np.float32), None, state, state)
    assert Y.shape == (T, 1, B, 2)
    if T == 0:
        np.testing.assert_array_equal([Y_h, Y_c], [state, state])
    assert Y_h.shape == Y_c.shape == (1, B, 2)


# ---- as a layer


@pytest.mark.parametrize("layout", [0, 1])
@pytest.mark.parametrize("direction", ["forward", "bidirectional"])
@pytest.mark.parametrize(
    ("op_type", "attributes"),
    [
        ("LSTM", {}),
        ("GRU", {"linear_before_reset": 1}),
        ("GRU", {}),
        ("RNN", {}),
        ("RNN", {"activations": ["Relu"]}),
        ("RNN", {"activations": ["sigmoid"]}),
    ],
)
def test_as_a_layer(op_type, attributes, direction, layout):
    D = 1 + (direction == "bidirectional")
    attributes = {name: value * D if name == "activations" else value for name, value in attributes.items()}
    arrays = lstm_arrays(op_type=op_type, D=D)
    operator = Operator(
        op_type, *(arrays[name] for name in ("W", "R", "B")), direction=direction, layout=layout, **attributes
    )
    layer = operator.to_layer()
    x, states = arrays["X"], [arrays[name] for name in ("initial_h", "initial_c") if name in arrays]
    lengths = [5, 1, 3, 2]
    output, last = layer(
        x.swapaxes(0, 1) if layout else x, tuple(states) if len(states) == 2 else states[0], lengths=lengths
    )
    swap = [state.swapaxes(0, 1) if layout else state for state in states]
    Y, *theirs = operator(x.swapaxes(0, 1) if layout else x, lengths, *swap)
    rows = Y.reshape(*output.shape) if layout else Y.swapaxes(1, 2).reshape(output.shape)
    np.testing.assert_array_equal(output, rows)
    for one, other in zip(last if len(states) == 2 else [last], theirs, strict=True):
        np.testing.assert_array_equal(one, other.swapaxes(0, 1) if layout else other)


def test_a_stream_of_steps():
    arrays = lstm_arrays(op_type="GRU")
    operator = Operator("GRU", arrays["W"], arrays["R"], arrays["B"])
    layer, state = operator.to_layer(), arrays["initial_h"]
    Y, Y_h = operator(arrays["X"], initial_h=state)
    for x_t, y in zip(arrays["X"], Y, strict=True):
        output, state = layer.step(x_t, state)
        np.testing.assert_array_equal(output, y[0])
    np.testing.assert_array_equal(state, Y_h)


W, R = np.ones((1, 8, 3), np.float32), np.ones((1, 8, 2), np.float32)
W2, R2 = np.ones((2, 2, 3), np.float32), np.ones((2, 2, 2), np.float32)


@pytest.mark.parametrize(
    ("reason", "operator"),
    [
        ("clip=2.0", Operator("LSTM", W, R, clip=2.0)),
        ("input_forget=1", Operator("LSTM", W, R, input_forget=1)),
        ("peepholes P", Operator("LSTM", W, R, P=np.ones((1, 6), np.float32))),
        ("activations ['Relu', 'Tanh', 'Tanh']", Operator("LSTM", W, R, activations=["Relu", "Tanh", "Tanh"])),
        ("direction 'reverse'", Operator("LSTM", W, R, direction="reverse")),
        ("dtype float16", Operator("LSTM", W.astype(np.float16), R.astype(np.float16))),
        (
            "different activations in the two directions",
            Operator("RNN", W2, R2, direction="bidirectional", activations=["Tanh", "Relu"]),
        ),
    ],
)
def test_what_is_no_layer_raises(reason, operator):
    with pytest.raises(ValueError, match=re.escape(f"has what no layer of fastrnn has: {reason}; call the operator")):
        operator.to_layer()


# ---- types


@pytest.mark.parametrize("clip", [None, 3.0])
@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_small_floats_are_computed_in_float32(name, clip):
    dtype = np.dtype(getattr(np, name, None) or getattr(pytest.importorskip("ml_dtypes"), name))
    try:
        helper.np_dtype_to_tensor_dtype(dtype)
    except KeyError:
        pytest.skip(f"onnx {onnx.__version__} has no arrays of {name}")
    small = {name: array.astype(dtype) for name, array in lstm_arrays().items()}
    wide = {name: array.astype(np.float32) for name, array in small.items()}
    model = make_model("LSTM", {} if clip is None else {"clip": clip}, small, inputs=calls(small), opset=22)
    results = load(model)["node"](**calls(small))
    expected = Operator("LSTM", wide["W"], wide["R"], wide["B"], clip=clip)(**calls(wide))
    for one, other in zip(results, expected, strict=True):
        assert one.dtype == dtype
        np.testing.assert_array_equal(one, other.astype(dtype))


@pytest.mark.parametrize("clip", [None, 100.0])
def test_float64_is_computed_in_float64(clip):
    arrays = lstm_arrays(dtype=np.float64)
    operator = Operator("LSTM", arrays["W"], arrays["R"], arrays["B"], clip=clip)
    (params,) = weights.from_onnx("lstm", arrays["W"], arrays["R"], arrays["B"])
    state = arrays["initial_h"][0], arrays["initial_c"][0]
    output, last, _ = fastrnn.functional.forward("lstm", arrays["X"], params, state, backend="reference")
    ours = operator(**calls(arrays))
    assert_alike(ours, [output[:, None], *(array[None] for array in last)], 1e-14)


# ---- weights that are computed, and graphs in graphs


def text_model(text, **tensors):
    """Return the model of a text, with the initialisers added."""
    model = parser.parse_model(text)
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in tensors.items())
    onnx.checker.check_model(model)
    return model


HEAD = '<ir_version: 8, opset_import: ["" : 17]>'
SOURCE = np.random.default_rng(3).uniform(-1, 1, (3, 16)).astype(np.float32)  # W transposed, of H = 4
RECURRENT = np.random.default_rng(4).uniform(-1, 1, (16, 4)).astype(np.float32)
BRANCHES = f"""{HEAD} voice (float[T, B, 3] x, float[1, B, 4] h, float[1, B, 4] c, bool flag)
    => (float[T, 1, B, 4] y, float[1, B, 4] new_h)
{{
    w_rows = Transpose <perm = [1, 0]> (source)
    zero = Constant <value = int64[1] {{0}}> ()
    y, new_h = If (flag) <
        then_branch = then_graph () => (float[T, 1, B, 4] then_y, float[1, B, 4] then_h) {{
            k4 = Constant <value = int64[1] {{4}}> ()
            k8 = Constant <value = int64[1] {{8}}> ()
            k16 = Constant <value = int64[1] {{16}}> ()
            w_i = Slice (w_rows, zero, k4, zero)
            w_o = Slice (w_rows, k8, k16, zero)
            w_f = Slice (w_rows, k4, k8, zero)
            w_all = Concat <axis = 0> (w_i, w_o, w_f)
            w = Unsqueeze (w_all, zero)
            r = Unsqueeze (recurrent, zero)
            b_wide = ConstantOfShape <value = double[1] {{0.25}}> (b_shape)
            b = Cast <to = 1> (b_wide)
            then_y, then_h = LSTM <hidden_size = 4> (x, w, r, b, , h, c)
        }},
        else_branch = else_graph () => (float[T, 1, B, 4] else_y, float[1, B, 4] else_h) {{
            w_same = Identity (w_rows)
            w2 = Unsqueeze (w_same, zero)
            r2 = Unsqueeze (recurrent, zero)
            else_y, else_h = LSTM <hidden_size = 4, clip = 0.5> (x, w2, r2, , , h, c)
        }}
    >
}}"""


def branches():
    return text_model(BRANCHES, source=SOURCE, recurrent=RECURRENT, b_shape=np.array([1, 32]))


def test_nodes_in_branches_with_computed_weights(ort):
    operators = load(branches())
    assert list(operators) == ["then_y", "else_y"]
    first = operators["then_y"]
    rows = SOURCE.T
    np.testing.assert_array_equal(first.W[0], np.concatenate([rows[:4], rows[8:], rows[4:8]]))
    np.testing.assert_array_equal(first.B, np.full((1, 32), 0.25, np.float32))
    assert first.inputs == {"X": "x", "W": "w", "R": "r", "B": "b", "initial_h": "h", "initial_c": "c"}
    assert first.outputs == {"Y": "then_y", "Y_h": "then_h"}
    assert first.initial == {}
    random = np.random.default_rng(5)
    x, h, c = uniform(random, 6, 2, 3), uniform(random, 1, 2, 4), uniform(random, 1, 2, 4)
    for flag, name in ((True, "then_y"), (False, "else_y")):
        feeds = {"x": x, "h": h, "c": c, "flag": np.array(flag)}
        theirs = run_ort(ort, branches(), feeds)
        assert_alike(operators[name](x, initial_h=h, initial_c=c)[:2], theirs)
        assert_alike(Backend.prepare(branches()).run(feeds), theirs)  # the whole model
    assert list(load(branches(), names=["else_y"])) == ["else_y"]


def test_weights_out_of_a_branch():
    model = text_model(
        f"""{HEAD} g (float[2, B, 3] x) => (float[2, 1, B, 4] y)
        {{
            yes = Constant <value = bool {{1}}> ()
            axis = Constant <value = int64[1] {{0}}> ()
            w = If (yes) <
                then_branch = then_graph () => (float[1, 12, 3] one) {{
                    same = Identity (rows)
                    one = Unsqueeze (same, axis)
                }},
                else_branch = else_graph () => (float[1, 12, 3] none) {{ none = Unsqueeze (other, axis) }}
            >
            y = GRU <hidden_size = 4> (x, w, r)
        }}""",
        rows=SOURCE[:, :12].T.copy(),
        other=SOURCE[:, 4:].T.copy(),
        r=RECURRENT[None, :12],
    )
    (operator,) = load(model).values()
    np.testing.assert_array_equal(operator.W[0], SOURCE[:, :12].T)


def test_nodes_in_loops_and_functions(ort):
    text = """<ir_version: 9, opset_import: ["" : 17, "local" : 1]> g (float[2, B, 3] x, int64 n, bool go)
        => (float[1, B, 4] last, float[2, 1, B, 4] called)
    {
        axis = Constant <value = int64[1] {0}> ()
        w = Unsqueeze (rows, axis)
        zeros = ConstantOfShape <value = float[1] {0}> (shape)
        last = Loop (n, go, zeros) <body = body_graph (int64 i, bool cond, float[1, B, 4] h)
            => (bool cond_out, float[1, B, 4] h_out) {
            cond_out = Identity (cond)
            r = Unsqueeze (recurrent, axis)
            y_unused, h_out = GRU <hidden_size = 4, linear_before_reset = 1> (x, w, r, , , h)
        }>
        called = local.twice <size = 4> (x, recurrent, rows)
    }
    <domain: "local", opset_import: ["" : 17]> twice <size> (a, b, d) => (out)
    {
        axis = Constant <value = int64[1] {0}> ()
        d1 = Unsqueeze (d, axis)
        b1 = Unsqueeze (b, axis)
        out = GRU <hidden_size: int = @size> (a, d1, b1)
    }"""
    tensors = {"rows": SOURCE[:, :12].T.copy(), "recurrent": RECURRENT[:12], "shape": np.array([1, 2, 4])}
    model = text_model(text, **tensors)
    looped, called = load(model).values()
    assert (looped.linear_before_reset, called.linear_before_reset) == (1, 0)
    assert looped.outputs["Y_h"] == "h_out"
    np.testing.assert_array_equal(called.W[0], tensors["rows"])
    x = uniform(np.random.default_rng(6), 2, 2, 3)
    last, Y = run_ort(ort, model, {"x": x, "n": np.array(3), "go": np.array(True)})
    h = None
    for _ in range(3):
        _, h = looped(x, initial_h=h)
    assert_alike([h, called(x)[0]], [last, Y])
    assert_alike(Backend.prepare(model).run([x, np.array(3), np.array(True)]), [last, Y])


def test_constant_states_are_taken_unless_others_are_given(ort):
    arrays = lstm_arrays(B=2) | {"sequence_lens": np.array([2, 5], np.int32)}
    model = make_model("LSTM", {}, arrays, inputs=["X"])
    operator = load(model)["node"]
    assert set(operator.initial) == {"sequence_lens", "initial_h", "initial_c"}
    assert_alike(operator(arrays["X"]), run_ort(ort, model, {"X": arrays["X"]}))
    zeros = {name: np.zeros_like(array) for name, array in operator.initial.items()}
    zeros["sequence_lens"][:] = 5
    plain = Operator("LSTM", arrays["W"], arrays["R"], arrays["B"])
    assert_alike(operator(arrays["X"], **zeros), plain(arrays["X"]), 0)


def test_initialisers_that_are_inputs_too_have_their_value():
    arrays = lstm_arrays()
    model = make_model("LSTM", {}, arrays, inputs=calls(arrays))
    model.graph.input.append(helper.make_tensor_value_info("W", TensorProto.FLOAT, arrays["W"].shape))
    np.testing.assert_array_equal(load(model)["node"].W, arrays["W"])


def test_nodes_of_the_first_operator_set():
    arrays = {name: array for name, array in lstm_arrays(op_type="GRU").items() if name in ("X", "W", "R", "B")}
    model = make_model("GRU", {"output_sequence": 1, "hidden_size": 6}, arrays, inputs=["X"], opset=1)
    expected = Operator("GRU", arrays["W"], arrays["R"], arrays["B"])(arrays["X"])
    assert_alike(load(model)["node"](arrays["X"]), expected, 0)


@pytest.mark.filterwarnings("ignore")  # what PyTorch says of its older exporter, which needs no other package
@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
def test_models_that_pytorch_writes(tmp_path, kind):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    layer = getattr(torch.nn, kind)(3, 5, num_layers=2, bidirectional=True, batch_first=True)
    x = torch.from_numpy(uniform(np.random.default_rng(2), 2, 7, 3))
    torch.onnx.export(layer.eval(), (x,), tmp_path / "torch.onnx", dynamo=False)
    rows = x.numpy().swapaxes(0, 1)
    operators = load(tmp_path / "torch.onnx").values()
    assert len(operators) == 2
    for operator in operators:
        Y, *_ = operator(rows)
        rows = Y.swapaxes(1, 2).reshape(*rows.shape[:2], 10)
    assert_alike([rows.swapaxes(0, 1)], [layer(x)[0].detach().numpy()])


def test_weights_in_a_file_of_their_own(tmp_path):
    arrays = lstm_arrays()
    model = make_model("LSTM", {}, arrays, inputs=["X"])
    onnx.save(model, tmp_path / "a.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0)
    assert (tmp_path / "weights.bin").stat().st_size > arrays["W"].nbytes
    np.testing.assert_array_equal(load(tmp_path / "a.onnx")["node"].W, arrays["W"])


def test_nodes_of_one_name_or_none():
    arrays = lstm_arrays(op_type="RNN")
    model = make_model("RNN", {}, arrays, inputs=calls(arrays))
    for name, output in (("node", "second"), ("", "third")):
        node = helper.make_node("RNN", ["X", "W", "R"], [output], name=name)
        model.graph.node.append(node)
    assert list(load(model)) == ["node", "node#2", "third"]


def refused(model_text, **tensors):
    return lambda: load(text_model(HEAD + model_text, **tensors))


GRU = np.ones((1, 6, 3)), np.ones((1, 6, 2))
R4 = np.zeros((1, 4, 4), np.float32)
OPERATOR = {"W": np.zeros((1, 2, 3), np.float32), "R": np.zeros((1, 2, 2), np.float32)}
X = np.zeros((4, 2, 3), np.float32)


def node_of(op_type="RNN", **attributes):
    return lambda: load(make_model(op_type, attributes, OPERATOR | {"X": X}, inputs=["X"]))


@pytest.mark.parametrize(
    ("message", "call"),
    [
        (
            "RNN 'y' has an input W that depends on 'w', which is an input or has no dense value: only constants can",
            refused("g (float[2, 1, 3] x, float[1, 4, 3] w) => (float[2, 1, 1, 4] y) { y = RNN (x, w, r) }", r=R),
        ),
        (
            "an input R that depends on 'r', which is drawn by RandomNormal",
            refused(
                """g (float[2, 1, 3] x) => (float[2, 1, 1, 4] y)
                { r = RandomNormal <shape = [1, 4, 4]> () y = RNN (x, w, r) }""",
                w=np.zeros((1, 4, 3), np.float32),
            ),
        ),
        ("names has 'lstm', and the model's recurrent nodes are ['node']", lambda: load(node_model(), names=["lstm"])),
        ("cannot be read: hidden_size is 5 and R has shape (1, 2, 2), expected the same H", node_of(hidden_size=5)),
        ("RNN 'node' cannot be read: clip is -1.0, expected a positive number", node_of(clip=-1.0)),
        ("its attributes zoneout are unknown, expected some of activation_alpha", node_of(zoneout=1)),
        ("activations has 2 entries, expected 1 for RNN", node_of(activations=["Tanh", "Tanh"])),
        ("activations has 'Gelu', expected one of Affine, Elu", node_of(activations=["Gelu"])),
        ("activations has 'Affine', for which ONNX has no defaults", node_of(activations=["Affine"])),
        (
            "activation_alpha has 1 numbers more than activations that have one: ['Tanh']",
            node_of(activations=["Tanh"], activation_alpha=[0.5]),
        ),
        ("direction is 'sideways', expected 'forward', 'reverse' or 'bidirectional'", node_of(direction="sideways")),
        ("layout is 2, expected 0 or 1", node_of(layout=2)),
        ("input_forget is 1, and RNN does not have it: LSTM does", node_of(input_forget=1)),
        ("linear_before_reset is 1, and RNN does not have it: GRU does", node_of(linear_before_reset=1)),
        ("W has shape (1, 2, 3), expected (D, G * H, I) = (1, 4, any)", lambda: Operator("RNN", OPERATOR["W"], R4)),
        ("R has shape (1, 2, 2), expected (D, G * H, H) with G = 4", node_of("LSTM")),
        ("W has shape (1, 8, 0), expected (D, G * H, I) with I of 1", lambda: Operator("LSTM", W[..., :0], R)),
        ("op_type is 'MGU', expected 'RNN', 'LSTM' or 'GRU'", lambda: Operator("MGU", W, R)),
        ("P is given, and GRU has no peepholes", lambda: Operator("GRU", *GRU, P=np.ones((1, 6)))),
        ("initial_c is given, and RNN has no c, expected None", lambda: small()(X, initial_c=X)),
        ("X has shape (4, 2, 2), expected (T, B, input_size) = (any, any, 3)", lambda: small()(X[..., :2])),
        ("initial_h has shape (4, 2, 3), expected (D, B, H) = (1, 2, 2)", lambda: small()(X, initial_h=X)),
        ("sequence_lens has shape (3,), expected (2,): B = 2 integers", lambda: small()(X, [1, 2, 3])),
        ("is projected: ONNX' LSTM has no projection", lambda: export(fastrnn.LSTM(3, 4, proj_size=2), "a.onnx")),
        ("inputs holds 1 arrays, expected 2: x, flag", lambda: Backend.prepare(simple()).run([X])),
        ("device is 'CUDA', expected 'CPU'", lambda: Backend.prepare(simple(), "CUDA")),
    ],
)  # fmt: skip
def test_wrong_values_raise(message, call):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


def node_model():
    return make_model("RNN", {}, OPERATOR | {"X": X}, inputs=["X"])


def small():
    return Operator("RNN", **OPERATOR)


def simple():
    return text_model(HEAD + "g (float[4, 2, 3] x, bool flag) => (float[4, 2, 3] y) { y = Identity (x) }")


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("model is a int, expected a path or an onnx.ModelProto", lambda: load(3)),
        ("names is 'node', expected a list of names", lambda: load(node_model(), names="node")),
        ("X has dtype float64, expected float32", lambda: small()(X.astype(np.float64))),
        ("initial_h has dtype float64, expected float32", lambda: small()(X, initial_h=np.zeros((1, 2, 2)))),
        ("sequence_lens has dtype float64, expected B = 2 integers", lambda: small()(X, [1.0, 2.0])),
        ("W has dtype int64, expected float16, bfloat16, float32 or", lambda: Operator("RNN", W.astype(int), R)),
        ("R has dtype float64, expected float32", lambda: Operator("LSTM", W, R.astype(np.float64))),
        ("layer is a Operator, expected an RNN, LSTM or GRU of fastrnn", lambda: export(small(), "a.onnx")),
        ("path is a int, expected a str or a path", lambda: export(fastrnn.GRU(3, 4), 3)),
        ("state is 1, expected True or False", lambda: export(fastrnn.GRU(3, 4), "a.onnx", state=1)),
        ("run has 'verbose', expected the inputs and", lambda: Backend.prepare(simple()).run([X], verbose=1)),
        ("prepare has 'threads', expected a model and a device", lambda: Backend.prepare(simple(), threads=1)),
        ("model is a str, expected an onnx.ModelProto", lambda: Backend.prepare("a.onnx")),
    ],
)  # fmt: skip
def test_wrong_types_raise(message, call):
    with pytest.raises(TypeError, match=re.escape(message)):
        call()


def test_files_that_are_no_models(tmp_path):
    with pytest.raises(OSError, match=r"absent\.onnx"):
        load(tmp_path / "absent.onnx")
    (tmp_path / "wrong.onnx").write_bytes(b"\x00 no model")
    with pytest.raises(ValueError, match=r"wrong\.onnx cannot be read as an ONNX model"):
        load(tmp_path / "wrong.onnx")


def test_unknown_operators_raise():
    node = helper.make_node("Attention3", ["x"], ["y"], domain="com.example")
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in "xy"]
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.example", 1)]
    model = helper.make_model(helper.make_graph([node], "g", values[:1], values[1:]), opset_imports=opsets)
    with pytest.raises(NotImplementedError, match="Attention3"):
        Backend.prepare(model)


def test_a_node_by_itself():
    arrays = lstm_arrays(op_type="GRU")
    node = helper.make_node("GRU", ["X", "W", "R", "B"], ["Y", "Y_h"], linear_before_reset=1)
    inputs = [arrays[name] for name in node.input]
    expected = Operator("GRU", *inputs[1:], linear_before_reset=1)(arrays["X"])
    assert_alike(Backend.run_node(node, inputs), expected, 0)
    model = make_model("GRU", {"linear_before_reset": 1}, arrays, inputs=["X", "initial_h"])
    expected = Operator("GRU", *inputs[1:], linear_before_reset=1)(arrays["X"], initial_h=arrays["initial_h"])
    assert_alike(Backend.run_model(model, [arrays["X"], arrays["initial_h"]]), expected, 0)
    with pytest.raises(ValueError, match="device 'CUDA'"):
        Backend.run_node(node, inputs, "CUDA")


# ---- writing


LAYERS = [(fastrnn.RNN, {"nonlinearity": name}) for name in ("tanh", "relu", "sigmoid")]
LAYERS += [(fastrnn.LSTM, {}), (fastrnn.GRU, {}), (fastrnn.GRU, {"reset_after": False})]


def feeds_of(layer, T, B, state, lengths, random):
    """Return a model's inputs, and the layer's arguments."""
    x = uniform(random, *((B, T) if layer.batch_first else (T, B)), layer.input_size)
    K = layer.num_layers * (1 + layer.bidirectional)
    letters = ("h_0", "c_0") if layer.cell == "lstm" else ("h_0",)
    states = {name: uniform(random, K, B, layer.hidden_size) for name in letters} if state else {}
    rows = {"lengths": random.integers(0, T + 1, B).astype(np.int32)} if lengths else {}
    given = (tuple(states.values()) if len(letters) == 2 else states["h_0"]) if state else None
    return {"x": x} | states | rows, (x, given), rows


@pytest.mark.parametrize("several", [False, True], ids=["one", "stack"])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["forward", "both"])
@pytest.mark.parametrize(("kind", "options"), LAYERS, ids=lambda value: getattr(value, "__name__", str(value)))
def test_written_models_run_alike(ort, tmp_path, kind, options, several, bidirectional):
    random = np.random.default_rng(8)
    for batch_first, bias, state, lengths in itertools.product((False, True), repeat=4):
        layer = kind(
            3, 5, 1 + 2 * several, bidirectional=bidirectional, batch_first=batch_first, bias=bias, seed=9, **options
        )
        export(layer, tmp_path / "layer.onnx", state=state, lengths=lengths)
        model = onnx.load(tmp_path / "layer.onnx")
        for T, B in ((6, 4), (1, 1)):  # T and B are free
            feeds, arguments, rows = feeds_of(layer, T, B, state, lengths, random)
            output, last = layer(*arguments, **rows)
            assert_alike([output, *(last if isinstance(last, tuple) else [last])], run_ort(ort, model, feeds))
    assert os.listdir(tmp_path) == ["layer.onnx"]


def test_written_and_read_again(tmp_path):
    for kind, options in LAYERS:
        layer = kind(3, 5, 2, bidirectional=True, dtype=np.float64, seed=1, **options)
        export(layer, tmp_path / "layer.onnx")
        name = kind.__name__.lower()
        operators = load(tmp_path / "layer.onnx")
        assert list(operators) == [f"{name}_l0", f"{name}_l1"]
        for k, operator in enumerate(operators.values()):
            back = operator.to_layer()
            assert back.cell == layer.cell
            for own, array in back.parameters.items():
                np.testing.assert_array_equal(array, layer.parameters[own.replace("_l0", f"_l{k}")])


def test_the_signature_of_a_written_model(tmp_path):
    export(fastrnn.LSTM(3, 5, 2, batch_first=True), str(tmp_path / "a.onnx"), state=True, lengths=True)
    graph = onnx.load(tmp_path / "a.onnx").graph

    def shapes(values):
        return {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}

    states = [2, "B", 5]
    assert shapes(graph.input) == {"x": ["B", "T", 3], "h_0": states, "c_0": states, "lengths": ["B"]}
    assert shapes(graph.output) == {"output": ["B", "T", 5], "h_n": states, "c_n": states}


def test_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a.onnx"
    path.write_text("old")

    def fail(*arguments, **options):
        raise RuntimeError("no")

    with monkeypatch.context() as patch:
        patch.setattr(fastrnn.weights.os, "replace", fail)
        with pytest.raises(RuntimeError, match="no"):
            export(fastrnn.GRU(3, 4), path)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.onnx"]
    with pytest.raises(OSError, match="absent"):
        export(fastrnn.GRU(3, 4), tmp_path / "absent" / "a.onnx")
    monkeypatch.setattr(fastrnn.onnx, "_LARGEST", 100)
    with pytest.raises(ValueError, match="larger than the 2 GiB that an ONNX file can hold"):
        export(fastrnn.GRU(3, 4), path)


# ---- without onnx, and with a real model


def test_without_onnx_the_error_says_what_to_install():
    program = (
        "import sys; sys.modules['onnx'] = None\ntry:\n import fastrnn.onnx\nexcept ImportError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    expected = "fastrnn.onnx needs the package onnx, and it cannot be imported: pip install 'fastrnn[onnx]'\n"
    assert done.stdout == expected, done.stderr


def silero_folder():
    folder = Path(os.environ.get("FASTRNN_SILERO_VAD", ROOT.parent / "shared" / "data" / "silero-vad"))
    return folder if (folder / "silero_vad_16k_op15.onnx").exists() else None


def test_a_voice_activity_model_as_a_stream(ort):
    folder = silero_folder()
    if folder is None:
        pytest.skip("silero_vad_16k_op15.onnx and test.wav are not there: name their folder in FASTRNN_SILERO_VAD")
    program = ROOT / "examples" / "speech_activity.py"
    files = [folder / "silero_vad_16k_op15.onnx", folder / "test.wav"]
    done = subprocess.run([sys.executable, program, *files], capture_output=True, text=True, timeout=120)
    figures = {}
    for line in done.stdout.splitlines():
        if line.startswith("{"):
            figure = json.loads(line)
            figures[figure["measure"]] = figure["ours"]
    assert re.search(r"^\d+ of \d+ frames are speech; 0 differ from ONNX Runtime's$", done.stdout, re.M), done
    assert figures["largest difference of a hidden state"] < 1e-5
    if "microseconds" not in done.stderr:  # where the machine is not calm, the times may be any
        assert done.returncode == 0, done.stderr
