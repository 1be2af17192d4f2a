"""The values that a model's constants have, computed by onnx' reference implementation within bounds.

A model need not be trusted: what it asks for is paid from a budget of work that grows with the bytes that are in the
file. Before a node runs, the size of its outputs is inferred from those of its inputs; a node of which nobody can tell
that size before is not run. Nodes in the branches and bodies of If, Loop and Scan pay likewise.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx.reference
from onnx import helper, numpy_helper

from fastrnn.weights import told

Array = np.ndarray

_WORK = 1 << 28  # about as many bytes as NumPy copies in a tenth of a second
_PER_BYTE = 32  # what each byte of the file's tensors adds to it
_NODE = 1 << 16  # what a node costs before it does anything, and a round of a loop
_SLOW = 1000  # how much more a byte costs where the reference implementation may walk through elements in Python
_SMALL = 1024  # elements of which the inference may need the values: shapes, axes, counts

_RANDOM = ("Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike")
_GRAPHS = ("If", "Loop", "Scan", "SequenceMap")  # whose nodes pay themselves
_PRODUCTS = ("MatMul", "Gemm")
_FAST = frozenset(
    "Abs Add And Cast CastLike Ceil Clip Concat Constant ConstantOfShape CumSum DequantizeLinear Div Equal Exp Expand "
    "EyeLike Flatten Floor Gather Greater GreaterOrEqual Identity Less LessOrEqual Log Max Min Mod Mul Neg Not Or Pad "
    "Pow Range Reciprocal ReduceL2 ReduceMax ReduceMean ReduceMin ReduceSum ReduceSumSquare Relu Reshape Round Shape "
    "Sign Size Slice Split Sqrt Squeeze Sub Sum Tanh Tile Transpose Unsqueeze Where Xor".split()
)


class Scope:
    """What the names in a graph mean, and in the graphs around it."""

    def __init__(self, graph: onnx.GraphProto, outer: "Scope | None") -> None:
        self.graph, self.outer = graph, outer
        self.tensors = {tensor.name: tensor for tensor in graph.initializer}
        self.producers = {name: node for node in graph.node for name in node.output if name}
        self.inputs = {value.name for value in graph.input}

    def find(self, name: str) -> tuple["Scope | None", Any]:
        """Return where a name stands, and for which tensor or node; the latter is None for an input without a value."""
        scope: Scope | None = self
        while scope is not None:
            found = scope.tensors.get(name) or scope.producers.get(name)
            if found is not None or name in scope.inputs:
                return scope, found
            scope = scope.outer
        return None, None


class NotConstant(Exception):
    """What a value depends on, in words."""


class Unfolded(Exception):
    """Why a constant is not computed, in words."""


class NodeError(ValueError):
    """A node that cannot be computed, with its name."""


def name_of(node: onnx.NodeProto) -> str:
    """Return a node's name; of one without, that of its first output."""
    return node.name or next(filter(None, node.output), node.op_type)


def subgraphs(node: onnx.NodeProto) -> list[onnx.GraphProto]:
    return [g for attribute in node.attribute for g in ([attribute.g] if attribute.HasField("g") else attribute.graphs)]


class Evaluator(onnx.reference.ReferenceEvaluator):
    """onnx' reference implementation, whose errors tell which node they are of."""

    def _init(self) -> None:
        super()._init()
        for node in self.rt_nodes_:
            node.run = functools.partial(self._run_node, node, node.run)

    def _run_node(self, node: Any, run: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
        proto = node.onnx_node
        try:
            return self._compute(node, run, *inputs, **options)
        except (NodeError, Unfolded, NotImplementedError):
            raise
        except Exception as error:
            reason = told(error.__cause__ or error)  # the reference implementation hides what it was
            raise NodeError(f"{proto.op_type} {name_of(proto)!r} cannot be computed: {reason}") from error

    def _compute(self, node: Any, run: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
        return run(*inputs, **options)


class Folding:
    """The constants of one model, each computed once."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.imports, self.ir_version = list(model.opset_import), model.ir_version
        self.versions = {entry.domain or "ai.onnx": entry.version for entry in self.imports}
        self.left = _WORK
        self.known: dict[tuple[Scope, str], Any] = {}
        folding = self

        class Paying(Evaluator):
            def run(self, *arguments: Any, **options: Any) -> Any:
                folding.pay(_NODE)  # a body without nodes, too
                return super().run(*arguments, **options)

            def _compute(self, node: Any, run: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
                folding.pay(folding.price(node.onnx_node, inputs))
                return run(*inputs, **options)

        self.evaluator = Paying

    def value(self, name: str, scope: Scope) -> Array:
        """Return the value that a name always has."""
        stack, started = [(name, scope)], set()
        while stack:
            wanted, around = stack[-1]
            owner, found = around.find(wanted)
            if owner is None or found is None:
                raise NotConstant(f"that depends on {wanted!r}, which is an input or has no dense value")
            place = owner, wanted
            if place in self.known:
                stack.pop()
            elif isinstance(found, onnx.TensorProto):
                self.known[place] = self._read(found)
            else:
                if found.op_type in _RANDOM:
                    raise NotConstant(f"that depends on {wanted!r}, which is drawn by {found.op_type}")
                missing = [other for other in reads(found) if (owner.find(other)[0], other) not in self.known]
                if missing and place in started:  # it waits for itself
                    raise NotConstant(f"that depends on {wanted!r}, which depends on itself")
                started.add(place)
                if not missing:
                    self._run(found, owner)
                stack += [(other, owner) for other in missing]
        return np.asarray(self.known[scope.find(name)[0], name])  # type: ignore[index]

    def pay(self, work: int) -> None:
        """Take some work from what is left."""
        if work > self.left:
            raise Unfolded("that takes more work or memory to compute than a model of its size may ask for")
        self.left -= work

    def _read(self, tensor: onnx.TensorProto) -> Array:
        try:
            if any(length < 0 for length in tensor.dims):  # which NumPy takes for one that it may choose
                raise ValueError(f"its shape is {list(tensor.dims)}")
            array = numpy_helper.to_array(tensor)
        except Exception as error:
            raise NodeError(f"its tensor {tensor.name!r} cannot be read: {told(error)}") from error
        self.left += _PER_BYTE * array.nbytes
        return array

    def _run(self, node: onnx.NodeProto, owner: Scope) -> None:
        """Compute a node, whose inputs are known."""
        feeds = {name: self.known[owner.find(name)[0], name] for name in dict.fromkeys(reads(node))}  # type: ignore[index]
        inputs = [onnx.ValueInfoProto(name=name, type=_type_of(array)) for name, array in feeds.items()]
        names = [name for name in node.output if name]
        outputs = [onnx.ValueInfoProto(name=name) for name in names]
        graph = helper.make_graph([node], "constant", inputs, outputs)
        model = helper.make_model(graph, opset_imports=self.imports, ir_version=self.ir_version)
        try:
            values = self.evaluator(model).run(None, feeds)
        except (NodeError, Unfolded):
            raise
        except Exception as error:  # before it runs: unknown operators, wrong attributes
            raise NodeError(f"{node.op_type} {name_of(node)!r} cannot be computed: {told(error)}") from error
        if node.op_type == "Constant":
            self.left += _PER_BYTE * sum(np.asarray(value).nbytes for value in values)
        self.known.update({(owner, name): value for name, value in zip(names, values, strict=True)})

    def price(self, node: onnx.NodeProto, inputs: tuple[Any, ...]) -> int:
        """Return how much work a node is; raise if nobody can tell."""
        if node.op_type == "Loop" and inputs[1] is None:  # the reference implementation makes no round then
            raise Unfolded(f"that depends on the Loop {name_of(node)!r}, which has no condition")
        if node.op_type in _GRAPHS or node.op_type == "Constant":  # whose value is in the file
            return _NODE
        arrays = [array for array in inputs if array is not None]
        made = self._infer(node, inputs)
        total = sum(array.nbytes for array in arrays) + sum(made)
        if node.op_type in _PRODUCTS and len(arrays) > 1:
            steps = math.isqrt(arrays[0].size * arrays[1].size * max(made))  # of (M, K), (K, N), (M, N): M · K · N
            return _NODE + total + (steps // 8 if arrays[0].dtype.name in ("float32", "float64") else steps)
        return _NODE + total * (1 if node.op_type in _FAST and node.domain in ("", "ai.onnx") else _SLOW)

    def _infer(self, node: onnx.NodeProto, inputs: tuple[Any, ...]) -> list[int]:
        """Return the bytes of a node's outputs."""
        given = {name: array for name, array in zip(node.input, inputs, strict=False) if name}
        types = {name: _type_of(array) for name, array in given.items()}
        data = {name: numpy_helper.from_array(array) for name, array in given.items() if array.size <= _SMALL}
        domain = node.domain if node.domain != "ai.onnx" else ""
        try:
            schema = onnx.defs.get_schema(node.op_type, self.versions[domain or "ai.onnx"], domain)
            made = onnx.shape_inference.infer_node_outputs(
                schema, node, types, data, opset_imports=self.imports, ir_version=self.ir_version
            )
        except Exception as error:
            raise NodeError(f"{node.op_type} {name_of(node)!r} is not valid: {told(error)}") from error
        return [_bytes_of(node, made.get(name)) for name in node.output if name]


def reads(node: onnx.NodeProto) -> list[str]:
    """Return the names that a node takes from around it, those of its subgraphs included."""
    names = list(node.input)
    for graph in subgraphs(node):
        own = {value.name for value in (*graph.input, *graph.initializer)}
        own.update(name for inner in graph.node for name in inner.output)
        within = [name for inner in graph.node for name in reads(inner)] + [value.name for value in graph.output]
        names += [name for name in within if name not in own]
    return [name for name in names if name]


def _type_of(array: Any) -> onnx.TypeProto:
    if not isinstance(array, (np.ndarray, np.generic)) or array.dtype.kind in "OUS":
        raise Unfolded("that depends on texts or sequences, which are not computed here")
    return helper.make_tensor_type_proto(helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)


def _bytes_of(node: onnx.NodeProto, kind: onnx.TypeProto | None) -> int:
    """Return the bytes that an output of an inferred type has."""
    tensor = (kind or onnx.TypeProto()).tensor_type
    known = tensor.HasField("shape") and all(d.HasField("dim_value") for d in tensor.shape.dim)
    if not known or tensor.elem_type in (onnx.TensorProto.UNDEFINED, onnx.TensorProto.STRING):
        what = f"{node.op_type} {name_of(node)!r}"
        raise Unfolded(f"that depends on what {what} computes, whose size nobody knows before")
    lengths = [max(d.dim_value, 0) for d in tensor.shape.dim]
    return math.prod(lengths) * helper.tensor_dtype_to_np_dtype(tensor.elem_type).itemsize
