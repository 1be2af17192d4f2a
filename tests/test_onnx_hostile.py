"""ONNX models that are not what they should be: errors that name the node, soon, and without much memory."""

import re
import time
import tracemalloc

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="the package onnx is not installed")
from onnx import AttributeProto, TensorProto, helper, numpy_helper, parser  # noqa: E402

import fastrnn.onnx  # noqa: E402
from fastrnn.onnx import Backend, Operator, load  # noqa: E402

H = 4
W, R = np.ones((1, H, 3), np.float32), np.ones((1, H, H), np.float32)
FLOATS = np.ones(100, np.float32)
HEAD = '<ir_version: 8, opset_import: ["" : 17, "local" : 1]>'


def model_of(text, **tensors):
    model = parser.parse_model(f"{HEAD} g (float[2, B, 3] x) => (float[2, 1, B, 4] y) {{ {text} }}")
    tensors = {"w": W, "r": R, "axis": np.array([0]), "floats": FLOATS} | tensors
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(a), name) for name, a in tensors.items())
    return model


def refused(model, message, kind=ValueError):
    with pytest.raises(kind, match=message) as caught:
        load(model)
    assert type(caught.value) is kind


# ---- attributes and tensors of wrong types

KINDS = {
    "FLOAT": 1.0,
    "INT": 1,
    "STRING": "forward",
    "FLOATS": [1.0],
    "INTS": [1],
    "STRINGS": ["Tanh"],
    "TENSOR": numpy_helper.from_array(W),
    "GRAPH": helper.make_graph([], "g", [], []),
    "TYPE_PROTO": helper.make_tensor_type_proto(1, [2]),
    "UNDEFINED": None,
}


def attribute(name, kind):
    if kind == "UNDEFINED":
        return AttributeProto(name=name)
    return helper.make_attribute(name, KINDS[kind], attr_type=getattr(AttributeProto, kind))


@pytest.mark.parametrize("name", fastrnn.onnx._ATTRIBUTES)
def test_attributes_of_wrong_types(name):
    expected = fastrnn.onnx._ATTRIBUTES[name]
    for kind in KINDS:
        model = model_of("y = RNN (x, w, r)")
        model.graph.node[0].attribute.append(attribute(name, kind))
        if kind != expected:
            refused(model, f"RNN 'y' cannot be read: its attribute {name} is of type {kind}, expected {expected}")
    model = model_of("y = RNN (x, w, r)")
    model.graph.node[0].attribute.append(AttributeProto(name=name, type=expected, ref_attr_name="other"))
    refused(model, f"RNN 'y' cannot be read: its attribute {name} is of type {expected}, expected {expected}")


def test_names_that_are_no_text():
    for name, kind, value in (("direction", "STRING", b"\xff"), ("activations", "STRINGS", [b"\xff"])):
        model = model_of("y = RNN (x, w, r)")
        model.graph.node[0].attribute.append(helper.make_attribute(name, value))
        assert model.graph.node[0].attribute[0].type == getattr(AttributeProto, kind)
        refused(model, f"RNN 'y' cannot be read: {name} ")


@pytest.mark.parametrize("value", [True, 1.0, np.True_, "1", [1], None])
@pytest.mark.parametrize("name", ["layout", "input_forget", "linear_before_reset", "hidden_size"])
def test_arguments_that_pass_as_integers(name, value):
    if name == "hidden_size" and value is None:
        return
    op_type, rows = {"input_forget": ("LSTM", 4), "linear_before_reset": ("GRU", 3)}.get(name, ("RNN", 1))
    with pytest.raises((TypeError, ValueError), match=f"{name} is "):
        Operator(op_type, np.ones((1, rows, 3)), np.ones((1, rows, 1)), **{name: value})
    with pytest.raises(ValueError, match="direction is "):
        Operator("RNN", W, R, direction=["forward"])


def tensor(**fields):
    return TensorProto(**fields)


TENSORS = {
    "texts": helper.make_tensor("w", TensorProto.STRING, [1], [b"a"]),
    "integers": numpy_helper.from_array(np.ones((1, H, 3), np.int64), "w"),
    "complex": numpy_helper.from_array(np.ones((1, H, 3), np.complex64), "w"),
    "truths": numpy_helper.from_array(np.ones((1, H, 3), bool), "w"),
    "four bits": helper.make_tensor("w", TensorProto.INT4, [1, H, 3], [1] * 12),
    "no type": TensorProto(name="w", dims=[1, H, 3], raw_data=bytes(48)),
    "unknown type": TensorProto(name="w", dims=[1, H, 3], data_type=99, raw_data=bytes(48)),
    "too few": TensorProto(name="w", dims=[1, H, 3], data_type=1, raw_data=bytes(44)),
    "odd": TensorProto(name="w", dims=[1, H, 3], data_type=1, raw_data=bytes(47)),
    "none": TensorProto(name="w", dims=[1, H, 3], data_type=1),
    "negative": TensorProto(name="w", dims=[1, H, -3], data_type=1, raw_data=bytes(48)),
    "huge": TensorProto(name="w", dims=[2**62, 2**62], data_type=1, raw_data=bytes(48)),
    "many": TensorProto(name="w", dims=[1] * 70, data_type=1, raw_data=bytes(4)),
    "elsewhere": TensorProto(name="w", dims=[1, H, 3], data_type=1, data_location=TensorProto.EXTERNAL),
    "segment": TensorProto(
        name="w", dims=[1, H, 3], data_type=1, raw_data=bytes(48), segment=TensorProto.Segment(begin=1, end=2)
    ),
}


@pytest.mark.parametrize("kind", TENSORS)
def test_tensors_that_are_wrong(kind):
    model = model_of("y = RNN (x, w, r)")
    model.graph.initializer[0].CopyFrom(TENSORS[kind])
    refused(model, "RNN 'y' cannot be read: ")
    model = model_of("w2 = Identity (w) y = RNN (x, w2, r)")
    model.graph.initializer[0].CopyFrom(TENSORS[kind])
    refused(model, "RNN 'y' (cannot be read|has an input W that depends on texts)")


# ---- nodes that cannot be computed

BROKEN = {
    "an index beyond": "i = Constant <value_ints = [99]> () c = Gather <axis = 0> (w, i)",
    "an axis beyond": "c = Concat <axis = 9> (w, w)",
    "no axis": "c = Concat (w, w)",
    "an axis that is no integer": "c = Concat <axis = 1.5> (w, w)",
    "a shape that does not fit": "s = Constant <value_ints = [5, 7]> () c = Reshape (w, s)",
    "a negative shape": "s = Constant <value_ints = [-5, 7]> () c = Reshape (w, s)",
    "shapes that do not fit": "c = Add (w, floats)",
    "sizes that do not fit": "c = MatMul (w, floats)",
    "permutation": "c = Transpose <perm = [0, 0, 7]> (w)",
    "too few inputs": "c = Concat <axis = 0> ()",
    "too many inputs": "c = Identity (w, w)",
    "too many outputs": "c, d = Identity (w)",
    "a constant of nothing": "c = Constant ()",
    "an unknown operator": "c = Nonsense (w)",
    "an unknown domain": "c = other.Identity (w)",
    "a function that is missing": "c = local.nothing (w)",
    "an attribute that is unknown": "c = Identity <nonsense = 1> (w)",
    "a cast to nothing": "c = Cast <to = 99> (w)",
    "a condition of floats": "c = If (w) <then_branch = a () => (float t) { t = Identity (w) }>",
    "a branch that is missing": """f = Constant <value = bool {0}> ()
        c = If (f) <then_branch = a () => (float t) { t = Identity (w) }>""",
    "a branch without outputs": """f = Constant <value = bool {1}> ()
        c = If (f) <then_branch = a () => () { t = Identity (w) }, else_branch = b () => () { t = Identity (w) }>""",
    "a body of too few": """n = Constant <value_int = 3> () t = Constant <value = bool {1}> ()
        c = Loop (n, t, w) <body = b (int64 i) => (float z) { z = Identity (w) }>""",
    "a split": "s = Constant <value_ints = [1, 1]> () c, d = Split <axis = 1> (w, s)",
    "ends beyond": "a = Constant <value_ints = [9, 9]> () c = Slice (w, a, axis)",
}


@pytest.mark.parametrize("kind", BROKEN)
def test_nodes_that_cannot_be_computed(kind):
    refused(model_of(f"{BROKEN[kind]} y = RNN (x, c, r)"), "RNN 'y' (cannot be read|has an input W)")
    refused(model_of(f"{BROKEN[kind]} y = RNN (x, w, r, , , c)"), "RNN 'y' (cannot be read|has an input initial_h)")


def test_the_node_that_cannot_be_computed_is_named():
    model = model_of("i = Constant <value_ints = [99]> () c = Gather <axis = 0> (w, i) y = RNN (x, c, r)")
    refused(model, "RNN 'y' cannot be read: Gather 'c' cannot be computed: IndexError")
    model.graph.node[1].name = "rows"
    refused(model, "RNN 'y' cannot be read: Gather 'rows' cannot be computed: IndexError")
    model = model_of("y = RNN (x, w, r)")
    del model.opset_import[:]
    assert list(load(model)) == ["y"]  # which needs no operators' versions
    model = model_of("c = Identity (w) y = RNN (x, c, r)")
    del model.opset_import[:]
    refused(model, "RNN 'y' cannot be read: Identity 'c' cannot be computed")


def test_models_that_run_tell_which_node_failed():
    text = "i = Constant <value_ints = [99]> () c = Gather <axis = 0> (x, i) y = RNN <hidden_size = 4> (c, w, r)"
    with pytest.raises(ValueError, match="Gather 'c' cannot be computed: IndexError"):
        Backend.prepare(model_of(text)).run([np.ones((2, 5, 3), np.float32)])
    with pytest.raises(ValueError, match="RNN 'y' cannot be computed: TypeError: X has dtype float64"):
        Backend.prepare(model_of("y = RNN (x, w, r)")).run([np.ones((2, 5, 3))])


# ---- what would be endless

DOUBLED = "c0 = Identity (w) {} c = Identity (c40)".format(
    " ".join(f"c{i + 1} = Concat <axis = 0> (c{i}, c{i})" for i in range(40))
)
LOOP = """n{0} = Constant <value_int = {1}> () t{0} = Constant <value = bool {{1}}> ()
    c{0} = Loop (n{0}, t{0}, w)
    <body = b (int64 i{0}, bool go{0}, float[1, 4, 3] z{0}) => (bool {2}{0}, float[1, 4, 3] {3}{0})
    {{ {4} }}>"""


def loop(rounds, body, name="", on="on", state="new"):
    return LOOP.format(name, rounds, on, state, body)


ON = "on = Identity (go) "
LARGE = "s = Constant <value_ints = [1024, 1024, 1024]> () "
ENDLESS = {
    "concat": DOUBLED,
    "loop": loop(2_000_000, ON + "new = Identity (z)"),
    "loop that does nothing": loop(2_000_000, "", on="go", state="z"),
    "loop in a loop": loop(
        3000, loop(3000, "on2 = Identity (go2) new2 = Identity (z2)", "2") + ON + "new = Identity (c2)"
    ),
    "loop that grows": loop(40, ON + "new = Concat <axis = 0> (z, z)"),
    "loop that collects": loop(100, ON + "s = Constant <value_ints = [9999999]> () e = Expand (axis, s) new = Neg (z)")
    .replace("c = Loop", "d, c = Loop")
    .replace("new)\n", "new, float[N] e)\n"),
    "loop without a condition": loop(3, ON + "new = Neg (z)").replace("(n, t, w)", "(n, , w)"),
    "constant of shape": LARGE + "c = ConstantOfShape (s)",
    "expand": LARGE + "c = Expand (axis, s)",
    "tile": LARGE + "c = Tile (w, s)",
    "range": """a = Constant <value_int = 0> () z = Constant <value_int = 999999999> ()
        d = Constant <value_int = 1> () c = Range (a, z, d)""",
    "pad": "s = Constant <value_ints = [0, 0, 0, 1024, 1024, 1024]> () c = Pad (w, s)",
    "resize": "s = Constant <value_floats = [1024.0, 1024.0, 1024.0]> () c = Resize (w, , s)",
    "one hot": """s = Constant <value_int = 999999999> () v = Constant <value_floats = [0.0, 1.0]> ()
        c = OneHot (axis, s, v)""",
    "window": "s = Constant <value_int = 999999999> () c = HannWindow (s)",
    "outer product": 'd = Tile (floats, k) c = Einsum <equation = "i,j,k->ijk"> (d, d, d)',
    "broadcast": "a = Expand (axis, m) b = Transpose (a) c = Add (a, b)",
    "product": "a = Expand (axis, m2) c = MatMul (a, a)",
    "python": "a = Expand (floats, m3) c = Erf (a)",
    "texts": 't = Constant <value_strings = ["abc"]> () c = StringConcat (t, t)',
    "scan": """a = Expand (axis, m4)
        c = Scan <num_scan_inputs = 1, body = b (int64[1] i) => (int64[1] o) { o = Identity (i) }> (a)""",
    "nonzero": "c = NonZero (w)",
}
SIZES = {"k": [100], "m": [1 << 14, 1 << 14], "m2": [2048, 2048], "m3": [4000, 100], "m4": [200_000, 1]}


@pytest.fixture(scope="module", autouse=True)
def imported():
    """What is imported at the first use, so that no test pays for it."""
    load(model_of("c = Identity (w) y = RNN (x, c, r)"))


@pytest.mark.parametrize("kind", ENDLESS)
def test_what_would_be_endless_is_refused_soon(kind):
    model = model_of(f"{ENDLESS[kind]} y = RNN (x, c, r)", **{name: np.array(size) for name, size in SIZES.items()})
    model.opset_import[0].version = 20 if "String" in ENDLESS[kind] else 17
    start = time.process_time()
    refused(model, "RNN 'y' has an input W that (takes more work|depends on)")
    assert time.process_time() - start < 1
    if kind in ("loop", "loop that does nothing", "loop in a loop", "scan"):  # many steps, which tracing makes slow
        return
    tracemalloc.start()
    refused(model, "RNN 'y'")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 400 << 20


def test_many_nodes_share_what_may_be_computed():
    each = " ".join(f"a{i} = Expand (floats, s) c{i} = Identity (a{i})" for i in range(40))
    nodes = " ".join(f"y{i} = RNN (x, w, r, , , c{i})" for i in range(40))
    model = model_of(f"s = Constant <value_ints = [100000, 100]> () {each} {nodes} y = Identity (y0)")
    start = time.process_time()
    refused(model, "RNN 'y[0-9]+' has an input initial_h that takes more work")
    assert time.process_time() - start < 1


def test_many_nodes_of_one_name():
    model = model_of("y = RNN (x, w, r)")
    model.graph.node[0].name = "node"
    for _ in range(4000):
        model.graph.node.add().CopyFrom(model.graph.node[0])
    start = time.process_time()
    assert list(load(model, ["node#3", "node#4001"])) == ["node#3", "node#4001"]
    assert time.process_time() - start < 1
    with pytest.raises(ValueError, match=r"names has 'no', and .* and 3989 more") as caught:
        load(model, ["no"])
    assert len(str(caught.value)) < 1000


def test_what_several_nodes_read_is_computed_once(monkeypatch):
    nodes = " ".join(f"y{i} = RNN (x, c, r)" for i in range(50))
    ran = []
    run = fastrnn.onnx_folding.Folding._run
    monkeypatch.setattr(fastrnn.onnx_folding.Folding, "_run", lambda *given: (ran.append(given[1]), run(*given)))
    assert len(load(model_of(f"b = Identity (w) c = Neg (b) {nodes} y = Identity (y0)"))) == 50
    assert [node.op_type for node in ran] == ["Identity", "Neg"]


def functions(count, body, calls="local.f0 (w)"):
    """Return a model whose functions call each other."""
    text = f"{HEAD} g (float[2, B, 3] x) => (float[2, 1, B, 4] y) {{ c = {calls} y = RNN (x, c, r) }}"
    parts = [
        f'<domain: "local", opset_import: ["" : 17, "local" : 1]> f{i} (a) => (c) {{ {body(i)} }}' for i in range(count)
    ]
    model = parser.parse_model("\n".join([text, *parts]))
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in (("w", W), ("r", R)))
    return model


def test_functions_that_would_be_endless():
    def doubled(i):
        return "c = Identity (a)" if i == 39 else f"b = local.f{i + 1} (a) c = local.f{i + 1} (b)"

    start = time.process_time()
    refused(
        functions(40, doubled),
        "functions cannot be written out where they are called: ValueError: they would make it too large",
    )
    refused(
        functions(2, lambda i: f"c = local.f{1 - i} (a)"),
        "functions cannot be written out .*: the function 'f0' calls itself",
    )
    refused(
        functions(
            1,
            lambda i: (
                """t = Constant <value = bool {1}> () c = If (t) <
        then_branch = p () => (d) { d = local.f0 (a) }, else_branch = q () => (d) { d = Identity (a) }>"""
            ),
        ),
        "calls itself",
    )
    assert time.process_time() - start < 1
    assert list(load(functions(8, lambda i: doubled(39 if i == 7 else i)))) == ["y"]


# ---- what may be computed as before

MAY = {
    "a loop": loop(10, ON + "new = Add (z, w)"),
    "a product": "p = Constant <value = float[1, 4, 2] {1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0}> () "
    "q = Constant <value = float[1, 2, 3] {1.0, 2.0, 3.0, 4.0, 5.0, 6.0}> () c = MatMul (p, q)",
    "python": "c = Erf (w)",
    "einsum": 'c = Einsum <equation = "dhi->dhi"> (w)',
    "a scan": """s = Scan <num_scan_inputs = 1, body = b (float[4, 3] i) => (float[4, 3] o) { o = Neg (i) }> (w)
        c = Identity (s)""",
    "quantised": "b = Constant <value = int8[1, 4, 3] {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}> () "
    "s = Constant <value_float = 0.5> () c = DequantizeLinear (b, s)",
    "shapes": "a = Shape (w) z = ConstantOfShape (a) c = Add (z, w)",
}


@pytest.mark.parametrize("kind", MAY)
def test_what_may_be_computed(kind):
    model = model_of(f"{MAY[kind]} y = RNN (x, c, r)")
    other = model_of(f"{MAY[kind]} y = Identity (c)")
    for one in (model, other):
        one.opset_import[0].version = 21 if kind == "quantised" else 17
    plain = onnx.reference.ReferenceEvaluator(other)
    (expected,) = plain.run(None, {"x": np.ones((2, 1, 3), np.float32)})
    np.testing.assert_array_equal(load(model)["y"].W, expected)


def test_large_weights_may_be_computed():
    """Several times the tensors of the file, however large it is."""
    rows = np.zeros((4 * 1500, 1500), np.float32)
    text = (
        "a = Transpose <perm = [1, 0]> (p) b = Transpose <perm = [1, 0]> (a) c = Unsqueeze (b, axis) y = LSTM (x, v, c)"
    )
    model = model_of(text, p=rows, v=np.zeros((1, 6000, 3), np.float32))
    assert load(model)["y"].R.shape == (1, 6000, 1500)
    text = text.replace("y = LSTM", " ".join(f"d{i} = Neg (c)" for i in range(10)) + " y = LSTM")
    text += " " + " ".join(f"y{i} = LSTM (x, v, d{i})" for i in range(10))
    assert len(load(model_of(text, p=rows, v=np.zeros((1, 6000, 3), np.float32)))) == 11


# ---- outputs without shapes


@pytest.mark.parametrize("what", ["output's shape", "output's type", "input's shape", "a sequence's"])
def test_models_that_do_not_tell_shapes(what):
    ort = pytest.importorskip("onnxruntime", reason="the package onnxruntime is not installed")
    model = model_of("y = RNN <hidden_size = 4> (x, w, r)")
    value = model.graph.input[0] if "input" in what else model.graph.output[0]
    if what == "output's type":
        value.ClearField("type")
    elif what == "a sequence's":
        model.graph.node.append(helper.make_node("SequenceConstruct", ["y"], ["s"]))
        model.graph.output.append(helper.make_tensor_sequence_value_info("s", TensorProto.FLOAT, None))
    else:
        value.type.tensor_type.ClearField("shape")
    before = model.SerializeToString()
    x = np.random.default_rng(0).uniform(-1, 1, (2, 5, 3)).astype(np.float32)
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    theirs = ort.InferenceSession(before, options, providers=["CPUExecutionProvider"]).run(None, {"x": x})
    ours = Backend.prepare(model).run([x])
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-5, atol=1e-6)
    assert model.SerializeToString() == before
    np.testing.assert_array_equal(load(model)["y"](x)[0], ours[0])


def test_models_without_shapes_are_checked_for_all_else():
    model = model_of("y = RNN <hidden_size = 4> (x, w, r)")
    model.graph.output[0].type.tensor_type.ClearField("shape")
    model.graph.node[0].input[0] = "nothing"
    with pytest.raises(onnx.checker.ValidationError, match=re.escape("nothing")):
        Backend.prepare(model)
