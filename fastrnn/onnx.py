"""ONNX: read the RNN, LSTM and GRU nodes of models, run them, and write layers as models.

>>> import numpy as np, tempfile, fastrnn.onnx
>>> gru = fastrnn.GRU(3, 5, bidirectional=True)
>>> with tempfile.TemporaryDirectory() as folder:
...     fastrnn.onnx.export(gru, f"{folder}/gru.onnx")
...     (operator,) = fastrnn.onnx.load(f"{folder}/gru.onnx").values()
>>> operator
Operator('gru_l0', 'GRU', input_size=3, hidden_size=5, direction='bidirectional', linear_before_reset=1)
>>> Y, Y_h = operator(np.zeros((7, 4, 3), np.float32))  # as the node computes it: (T, D, B, H) and (D, B, H)
>>> Y.shape, Y_h.shape
((7, 2, 4, 5), (2, 4, 5))
>>> operator.to_layer()  # for training, or step by step
GRU(3, 5, bidirectional=True)

An `Operator` has every attribute of the node. Activations that the compiled kernels do not have, clip, input_forget and
peepholes run through NumPy, the others through the kernels. `Backend` runs whole models for ``onnx.backend``.
"""

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

try:
    import onnx
except ImportError as error:
    message = "fastrnn.onnx needs the package onnx, and it cannot be imported: pip install 'fastrnn[onnx]'"
    raise ImportError(message) from error

import onnx.backend.base
import onnx.inliner
import onnx.reference
from onnx import helper, numpy_helper

from fastrnn import backend as backends
from fastrnn import functional, weights
from fastrnn.layers import GRU, LSTM, RNN, Recurrent
from fastrnn.onnx_folding import Evaluator, Folding, NotConstant, Scope, Unfolded, name_of, subgraphs

__all__ = ["Backend", "Operator", "export", "load"]

Array = np.ndarray

_GATES = {"RNN": 1, "LSTM": 4, "GRU": 3}
_DEFAULTS = {"RNN": ["Tanh"], "LSTM": ["Sigmoid", "Tanh", "Tanh"], "GRU": ["Sigmoid", "Tanh"]}  # of one direction
_DIRECTIONS = ("forward", "reverse", "bidirectional")
_DTYPES = ("float16", "bfloat16", "float32", "float64")
_INPUTS = ("X", "W", "R", "B", "sequence_lens", "initial_h", "initial_c", "P")
_OUTPUTS = ("Y", "Y_h", "Y_c")
_ATTRIBUTES = {  # each with the type that it has
    "activation_alpha": "FLOATS", "activation_beta": "FLOATS", "activations": "STRINGS", "clip": "FLOAT",
    "direction": "STRING", "hidden_size": "INT", "input_forget": "INT", "layout": "INT", "linear_before_reset": "INT",
}  # fmt: skip


class Operator:
    """One node RNN, LSTM or GRU with its weights, called with its inputs.

    Parameters
    ----------
    op_type : str
        "RNN", "LSTM" or "GRU".
    W, R : numpy.ndarray
        (D, G·H, I) and (D, G·H, H), gates in ONNX' order. float16, bfloat16, float32 or float64; the smaller two are
        computed in float32, and results rounded.
    B : numpy.ndarray, optional
        (D, 2·G·H): the biases of W, then those of R.
    P : numpy.ndarray, optional
        (D, 3·H), of an LSTM only: the peepholes of the gates i, o and f.
    name : str
        The node's.
    direction, activations, activation_alpha, activation_beta, clip, hidden_size, input_forget, layout,
    linear_before_reset
        The node's attributes, as ONNX documents them. Values in activation_alpha and activation_beta belong to those
        activations that have one, in their order. Affine and ScaledTanh need both; a ThresholdedRelu without has 1,
        as ONNX says, where ONNX Runtime has 0.
    initial : mapping, optional
        Values of ``sequence_lens``, ``initial_h`` and ``initial_c`` that are taken where a call gives none.
    inputs, outputs : mapping, optional
        What the node's inputs and outputs are called in its graph.

    Attributes
    ----------
    W, R, B, P, name, op_type, direction, clip, input_forget, layout, linear_before_reset, initial, inputs, outputs
        As given. The first call reads the weights: do not change them after it.
    activations : tuple of tuple
        For each direction its activations, each with name, alpha and beta.
    input_size, hidden_size : int
    dtype : numpy.dtype

    Raises
    ------
    TypeError, ValueError
        If an array or an attribute is not what ONNX allows, by its name.

    Examples
    --------
    >>> import numpy as np
    >>> W, R = np.ones((1, 4, 3), np.float32), np.ones((1, 4, 4), np.float32)
    >>> rnn = Operator("RNN", W, R, activations=["HardSigmoid"], activation_alpha=[0.5], clip=2.0)
    >>> Y, Y_h = rnn(np.ones((5, 2, 3), np.float32), sequence_lens=[5, 1])
    >>> Y.shape, Y_h.shape
    ((5, 1, 2, 4), (1, 2, 4))
    """

    def __init__(
        self,
        op_type: str,
        W: Array,
        R: Array,
        B: Array | None = None,
        P: Array | None = None,
        *,
        name: str = "",
        direction: str = "forward",
        activations: Sequence[str] | None = None,
        activation_alpha: Sequence[float] | None = None,
        activation_beta: Sequence[float] | None = None,
        clip: float | None = None,
        hidden_size: int | None = None,
        input_forget: int = 0,
        layout: int = 0,
        linear_before_reset: int = 0,
        initial: Mapping[str, Array] | None = None,
        inputs: Mapping[str, str] | None = None,
        outputs: Mapping[str, str] | None = None,
    ) -> None:
        if op_type not in _GATES:
            raise ValueError(f"op_type is {op_type!r}, expected 'RNN', 'LSTM' or 'GRU'")
        if not isinstance(direction, str) or direction not in _DIRECTIONS:
            raise ValueError(f"direction is {direction!r}, expected 'forward', 'reverse' or 'bidirectional'")
        self.name, self.op_type, self.direction = name, op_type, direction
        self.inputs, self.outputs, self.initial = dict(inputs or {}), dict(outputs or {}), dict(initial or {})
        self._set_weights(W, R, B, P)
        if hidden_size is not None and functional.check_integer("hidden_size", hidden_size, 0) != self.hidden_size:
            raise ValueError(f"hidden_size is {hidden_size} and R has shape {self.R.shape}, expected the same H")
        self.clip = None if clip is None else float(clip)
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"clip is {clip}, expected a positive number")
        self.input_forget = _check_bit("input_forget", input_forget, op_type, "LSTM")
        self.linear_before_reset = _check_bit("linear_before_reset", linear_before_reset, op_type, "GRU")
        self.layout = _check_bit("layout", layout)
        given = list(activations) if activations else _DEFAULTS[op_type] * self.num_directions
        self.activations = self._read_activations(given, activation_alpha, activation_beta)
        self._walks: list[Any] | None = None

    def _set_weights(self, W: Array, R: Array, B: Array | None, P: Array | None) -> None:
        D, G = self.num_directions, _GATES[self.op_type]
        dtype = np.asarray(W).dtype
        if dtype.name not in _DTYPES:
            raise TypeError(f"W has dtype {dtype}, expected {', '.join(_DTYPES[:-1])} or {_DTYPES[-1]}")
        self.R = functional.check_array("R", np.asarray(R), (dtype,), (D, None, None), "(D, G * H, H)")
        H = self.R.shape[2]
        if H < 1 or self.R.shape[1] != G * H:
            raise ValueError(f"R has shape {self.R.shape}, expected (D, G * H, H) with G = {G}, H of 1 or more")
        self.W = functional.check_array("W", np.asarray(W), (dtype,), (D, G * H, None), "(D, G * H, I)")
        if not self.W.shape[2]:
            raise ValueError(f"W has shape {self.W.shape}, expected (D, G * H, I) with I of 1 or more")
        wanted = (D, 2 * G * H), "(D, 2 * G * H)"
        self.B = None if B is None else functional.check_array("B", np.asarray(B), (dtype,), *wanted)
        if P is not None and self.op_type != "LSTM":
            raise ValueError(f"P is given, and {self.op_type} has no peepholes, expected None")
        self.P = None if P is None else functional.check_array("P", np.asarray(P), (dtype,), (D, 3 * H), "(D, 3 * H)")
        self.dtype, self.hidden_size, self.input_size = dtype, H, self.W.shape[2]

    def _read_activations(self, names: list[str], alpha: Any, beta: Any) -> tuple[tuple[Any, ...], ...]:
        """Return each direction's activations with their numbers, which only those take that have one."""
        from fastrnn.kernels import general

        ACTIVATIONS, Activation = general.ACTIVATIONS, general.Activation
        count = len(_DEFAULTS[self.op_type])
        if len(names) != count * self.num_directions:
            wanted = f"{count} for {self.op_type}" + (" in each of two directions" if self.num_directions == 2 else "")
            raise ValueError(f"activations has {len(names)} entries, expected {wanted}")
        known = {name.lower(): name for name in ACTIVATIONS}
        numbers = [[float(number) for number in values or ()] for values in (alpha, beta)]
        read = []
        for name in names:
            if not isinstance(name, str) or name.lower() not in known:
                raise ValueError(f"activations has {name!r}, expected one of {', '.join(ACTIVATIONS)}")
            defaults = ACTIVATIONS[known[name.lower()]][1:]
            own = [
                default if default is None or not left else left.pop(0)
                for default, left in zip(defaults, numbers, strict=True)
            ]
            read.append(Activation(known[name.lower()], *own))
            if any(number is not None and np.isnan(number) for number in own):
                both = "activation_alpha and activation_beta"
                raise ValueError(f"activations has {name!r}, for which ONNX has no defaults, expected {both} for it")
        for label, left in zip(("activation_alpha", "activation_beta"), numbers, strict=True):
            if left:
                raise ValueError(f"{label} has {len(left)} numbers more than activations that have one: {names}")
        return tuple(tuple(read[d * count : (d + 1) * count]) for d in range(self.num_directions))

    @property
    def num_directions(self) -> int:
        return 2 if self.direction == "bidirectional" else 1

    def __repr__(self) -> str:
        given = {"input_size": self.input_size, "hidden_size": self.hidden_size}
        if self.direction != "forward":
            given["direction"] = self.direction
        names = [activation.name for one in self.activations for activation in one]
        if names != _DEFAULTS[self.op_type] * self.num_directions:
            given["activations"] = names
        options = ("clip", "input_forget", "layout", "linear_before_reset")
        given |= {name: getattr(self, name) for name in options if getattr(self, name)}
        return f"Operator({self.name!r}, {self.op_type!r}, {', '.join(f'{k}={v!r}' for k, v in given.items())})"

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_walks": None}

    # ---- what it computes

    def __call__(
        self, X: Array, sequence_lens: Any = None, initial_h: Array | None = None, initial_c: Array | None = None
    ) -> tuple[Array, ...]:
        """Compute the node's outputs.

        Where ONNX leaves something open, it is as in ONNX Runtime: clip acts on the sums that go into the gates, and
        not on c; a row of no steps has no state.

        Parameters
        ----------
        X : numpy.ndarray
            (T, B, input_size), or (B, T, input_size) with layout 1. Of the operator's dtype.
        sequence_lens : (B,) integers, optional
            How many steps each row has, 0 to T. Y is 0 beyond them; Y_h and Y_c are those of the row's last step, and 0
            for a row of no steps, whatever its initial state is.
        initial_h, initial_c : numpy.ndarray, optional
            (D, B, H), or (B, D, H) with layout 1: zeros by default. initial_c is of the LSTM only.

        Returns
        -------
        Y : numpy.ndarray
            (T, D, B, H), or (B, T, D, H) with layout 1.
        Y_h : numpy.ndarray
            As initial_h.
        Y_c : numpy.ndarray
            Of the LSTM only.

        Raises
        ------
        TypeError, ValueError
            If an argument is of the wrong kind, dtype or shape. Before anything is computed.
        """
        dtype, D, H = self.dtype, self.num_directions, self.hidden_size
        letters = "(B, T, input_size)" if self.layout else "(T, B, input_size)"
        X = functional.check_array("X", X, (dtype,), (None, None, self.input_size), letters)
        x = X.swapaxes(0, 1) if self.layout else X
        T, B = x.shape[:2]
        lengths = _check_lengths(self._given("sequence_lens", sequence_lens), T, B)
        states = [self._check_state("initial_h", initial_h, B)]
        if self.op_type == "LSTM":
            states.append(self._check_state("initial_c", initial_c, B))
        elif initial_c is not None:
            raise ValueError(f"initial_c is given, and {self.op_type} has no c, expected None")

        output = np.empty((T, B, D * H), self._computed)
        x, last = functional.contiguous(x.astype(self._computed, copy=False)), []
        for d, walk in enumerate(self._walks or self._prepare()):
            own = tuple(np.ascontiguousarray(state[d]) for state in states)
            reverse = d == 1 or self.direction == "reverse"
            _, new, _ = walk.forward(x, own, lengths=lengths, reverse=reverse, output=output, column=d * H)
            last.append(new)
        Y = output.reshape(T, B, D, H).transpose((1, 0, 2, 3) if self.layout else (0, 2, 1, 3))
        results = [Y]
        for arrays in zip(*last, strict=True):
            state = np.stack(arrays)
            if lengths is not None:
                state[:, lengths == 0] = 0
            results.append(state.swapaxes(0, 1) if self.layout else state)
        return tuple(np.ascontiguousarray(result.astype(dtype, copy=False)) for result in results)

    @property
    def _computed(self) -> np.dtype:
        """In what dtype it computes."""
        return self.dtype if self.dtype.name in ("float32", "float64") else np.dtype(np.float32)

    def _given(self, name: str, value: Any) -> Any:
        return self.initial.get(name) if value is None else value

    def _check_state(self, name: str, value: Any, B: int) -> Array:
        """Return a state as (D, B, H) in the dtype of the computation."""
        value, D, H = self._given(name, value), self.num_directions, self.hidden_size
        if value is None:
            return np.zeros((D, B, H), self._computed)
        shape, letters = ((B, D, H), "(B, D, H)") if self.layout else ((D, B, H), "(D, B, H)")
        array = functional.check_array(name, value, (self.dtype,), shape, letters)
        return (array.swapaxes(0, 1) if self.layout else array).astype(self._computed)

    def _prepare(self) -> list[Any]:
        """Return what walks through time for each direction."""
        if any(self._beyond(d) for d in range(self.num_directions)):
            self._walks = [_General(self, d) for d in range(self.num_directions)]
        else:
            prepare = backends.load("cpu").prepare
            parts = zip(self._cells(), self._params(), strict=True)
            self._walks = [prepare(cell, params) for cell, params in parts]
        return self._walks

    def _beyond(self, d: int) -> list[str]:
        """Return what a direction has that the compiled kernels have not."""
        names = [activation.name for activation in self.activations[d]]
        known = (
            names in (["Tanh"], ["Relu"], ["Sigmoid"]) if self.op_type == "RNN" else names == _DEFAULTS[self.op_type]
        )
        reasons = [] if known else [f"activations {names}"]
        reasons += [f"clip={self.clip}"] if self.clip is not None else []
        reasons += ["input_forget=1"] if self.input_forget else []
        return reasons + (["peepholes P"] if self.P is not None and self.P.any() else [])

    def _cells(self) -> list[str]:
        """Return each direction's cell, by fastrnn's names."""
        if self.op_type == "RNN":
            return [f"rnn_{one.name.lower()}" for (one,) in self.activations]
        gru = "gru" if self.linear_before_reset else "gru_reset_before"
        return [gru if self.op_type == "GRU" else "lstm"] * self.num_directions

    def _params(self) -> list[weights.Params]:
        """Return each direction's parameters, by fastrnn's names and order."""
        arrays = [None if a is None else a.astype(self._computed) for a in (self.W, self.R, self.B)]
        assert arrays[0] is not None
        assert arrays[1] is not None
        parts = weights.from_onnx(self._cells()[0], arrays[0], arrays[1], arrays[2])
        return [{name: np.ascontiguousarray(array) for name, array in params.items()} for params in parts]

    def to_layer(self, backend: str | None = None) -> RNN | LSTM | GRU:
        """Return a layer of fastrnn with the same weights, for training or step by step.

        With layout 1 it is batch_first. Its output has both directions side by side, and a row of no steps keeps its
        initial state.

        Parameters
        ----------
        backend : str, optional
            The layer's.

        Returns
        -------
        RNN, LSTM or GRU

        Raises
        ------
        ValueError
            If the node has what fastrnn's layers have not: peepholes, clip, input_forget, other activations, different
            ones in the two directions, only the reverse direction, or a dtype that is neither float32 nor float64.

        Examples
        --------
        >>> W, R = np.ones((1, 12, 3), np.float32), np.ones((1, 12, 4), np.float32)
        >>> Operator("GRU", W, R, linear_before_reset=1, layout=1).to_layer()
        GRU(3, 4, bias=False, batch_first=True)
        """
        reasons = [reason for d in range(self.num_directions) for reason in self._beyond(d)]
        reasons += [f"dtype {self.dtype}"] if self._computed != self.dtype else []
        reasons += ["direction 'reverse'"] if self.direction == "reverse" else []
        if not reasons and len(set(self._cells())) > 1:
            reasons.append("different activations in the two directions")
        if reasons:
            wanted = ", ".join(dict.fromkeys(reasons))
            raise ValueError(f"{self!r} has what no layer of fastrnn has: {wanted}; call the operator itself")
        options: dict[str, Any] = {"dtype": self.dtype, "backend": backend, "seed": 0}
        options |= {"bias": self.B is not None, "batch_first": self.layout == 1}
        options |= {"bidirectional": self.num_directions == 2}
        sizes, cell = (self.input_size, self.hidden_size), self._cells()[0]
        layer: Any
        if self.op_type == "RNN":
            layer = RNN(*sizes, nonlinearity=cell.removeprefix("rnn_"), **options)
        elif self.op_type == "LSTM":
            layer = LSTM(*sizes, **options)
        else:
            layer = GRU(*sizes, reset_after=cell == "gru", **options)
        layer.load_state_dict(layer._spec.join(self._params()))
        return layer


class _General:
    """One direction of an operator by the general path, as the kernels have it prepared."""

    def __init__(self, operator: Operator, d: int) -> None:
        from fastrnn.kernels import general

        self._kernel = general
        W, R, B, P = (
            None if array is None else array[d].astype(operator._computed)
            for array in (operator.W, operator.R, operator.B, operator.P)
        )
        assert W is not None
        biases = np.zeros((2, len(W)), W.dtype) if B is None else B.reshape(2, len(W))
        self._direction = general.Direction(
            operator.op_type, W, R, *biases, P, operator.activations[d], operator.clip,
            bool(operator.input_forget), bool(operator.linear_before_reset),
        )  # fmt: skip

    def forward(
        self, x: Array, state: tuple[Array, ...], *, lengths: Any, reverse: bool, output: Array, column: int
    ) -> tuple[Array, tuple[Array, ...], None]:
        own, last = self._kernel.forward(self._direction, x, state, lengths=lengths, reverse=reverse)
        output[..., column : column + own.shape[2]] = own
        return output, last, None


def _check_bit(name: str, value: int, op_type: str = "", only: str = "") -> int:
    """Return an attribute that is 0 or 1, and 1 only for one of the operators."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)) or value not in (0, 1):
        raise ValueError(f"{name} is {value!r}, expected 0 or 1")
    if value and op_type != only:
        raise ValueError(f"{name} is {value}, and {op_type} does not have it: {only} does")
    return int(value)


def _check_lengths(lengths: Any, T: int, B: int) -> Array | None:
    try:
        return functional.check_lengths(lengths, T, B)
    except (TypeError, ValueError) as error:
        raise type(error)(str(error).replace("lengths", "sequence_lens", 1)) from None


# ---- reading


def load(model: Any, names: Iterable[str] | None = None) -> dict[str, Operator]:
    """Return the RNN, LSTM and GRU nodes of a model, with their weights.

    Nodes in the branches and bodies of If, Loop and Scan and in the model's functions are among them. W, R, B and P may
    be initialisers, or computed from such and from constants in any way: that is done here, once, by onnx' reference
    implementation, if it is not more work than a file of the model's size may ask for. sequence_lens, initial_h and
    initial_c become the operator's ``initial`` where they are constant. The model need not be trusted.

    Parameters
    ----------
    model : str, path or onnx.ModelProto
    names : iterable of str, optional
        Which nodes; by default all.

    Returns
    -------
    dict of str to Operator
        By the node's name; a node without one has that of its first output. Where several have one name, "#2" and so on
        stands behind the second's.

    Raises
    ------
    TypeError
        If `model` is neither a path nor a model.
    ValueError
        If the file is no ONNX model, there is no node of a given name, weights depend on an input of the model or
        cannot be computed, or an attribute has a type or a value that ONNX does not know: by the node's name.
    OSError
        If the file cannot be opened.

    Examples
    --------
    >>> from onnx import TensorProto, helper, numpy_helper
    >>> node = helper.make_node("RNN", ["x", "W", "R"], ["", "h"], name="rnn", hidden_size=4, clip=1.0)
    >>> arrays = {"W": np.ones((1, 4, 3), np.float32), "R": np.ones((1, 4, 4), np.float32)}
    >>> graph = helper.make_graph(
    ...     [node],
    ...     "model",
    ...     [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["T", "B", 3])],
    ...     [helper.make_tensor_value_info("h", TensorProto.FLOAT, [1, "B", 4])],
    ...     [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    ... )
    >>> load(helper.make_model(graph))
    {'rnn': Operator('rnn', 'RNN', input_size=3, hidden_size=4, clip=1.0)}
    """
    model = _read(model)
    folding = Folding(model)
    wanted = None if names is None else functional.check_names("names", names)
    nodes: dict[str, tuple[onnx.NodeProto, Scope]] = {}
    counts: dict[str, int] = {}
    for node, scope in _recurrent_nodes(Scope(model.graph, None)):
        first = name = name_of(node)
        while name in nodes:
            counts[first] = counts.get(first, 1) + 1
            name = f"{first}#{counts[first]}"
        nodes[name] = node, scope
    for name in wanted or ():
        if name not in nodes:
            raise ValueError(f"names has {name!r}, and the model's recurrent nodes are [{weights._some(nodes)}]")
    return {
        name: _read_node(name, node, scope, folding)
        for name, (node, scope) in nodes.items()
        if wanted is None or name in wanted
    }


def _read(model: Any) -> onnx.ModelProto:
    """Return a model whose functions are written out where they are called."""
    if isinstance(model, (str, os.PathLike)):
        path = os.fspath(model)
        try:
            model = onnx.load(path)
        except OSError:
            raise
        except Exception as error:
            raise ValueError(f"{path} cannot be read as an ONNX model ({weights.told(error)})") from error
    if not isinstance(model, onnx.ModelProto):
        raise TypeError(f"model is a {type(model).__name__}, expected a path or an onnx.ModelProto")
    return _written_out(model) if model.functions else model


_LONGEST = 1 << 27  # bytes of a model whose functions are written out, if they are not that long themselves


def _written_out(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a model with its functions where they are called: a few that call each other can make it endless."""
    functions = {(function.domain, function.name): function.node for function in model.functions}
    sizes: dict[tuple[str, str], int] = {}

    def size(nodes: Iterable[onnx.NodeProto], callers: tuple[Any, ...] = ()) -> int:
        return sum(of(node, callers) for node in nodes)

    def of(node: onnx.NodeProto, callers: tuple[Any, ...]) -> int:
        called = node.domain, node.op_type
        if called in callers:
            raise ValueError(f"the function {node.op_type!r} calls itself")
        if called in functions and called not in sizes:
            sizes[called] = size(functions[called], (*callers, called))
        inner = sum(size(graph.node, callers) for graph in subgraphs(node))
        return 1000 + node.ByteSize() + inner + sizes.get(called, 0)

    try:
        total = size(model.graph.node)
        if total > _LONGEST + 4 * sum(function.ByteSize() for function in model.functions) + 4 * model.graph.ByteSize():
            raise ValueError("they would make it too large")
        return onnx.inliner.inline_local_functions(model)
    except Exception as error:
        message = f"the model's functions cannot be written out where they are called: {weights.told(error)}"
        raise ValueError(message) from error


def _recurrent_nodes(scope: Scope) -> Iterator[tuple[onnx.NodeProto, Scope]]:
    """Walk through a graph and those in it."""
    for node in scope.graph.node:
        if node.domain in ("", "ai.onnx") and node.op_type in _GATES:
            yield node, scope
        for graph in subgraphs(node):
            yield from _recurrent_nodes(Scope(graph, scope))


def _read_node(name: str, node: onnx.NodeProto, scope: Scope, folding: Folding) -> Operator:
    """Return the operator that a node is."""
    inputs = {formal: actual for formal, actual in zip(_INPUTS, node.input, strict=False) if actual}
    outputs = {formal: actual for formal, actual in zip(_OUTPUTS, node.output, strict=False) if actual}
    constants: dict[str, Any] = {}
    initial: dict[str, Array] = {}
    try:
        for formal in ("W", "R", "B", "P"):
            if formal in inputs:
                constants[formal] = folding.value(inputs[formal], scope)
        for formal in ("sequence_lens", "initial_h", "initial_c"):
            with contextlib.suppress(NotConstant):  # then a call gives it
                if formal in inputs:
                    initial[formal] = folding.value(inputs[formal], scope)
        known: dict[str, Any] = {"inputs": inputs, "outputs": outputs, "initial": initial}
        return Operator(node.op_type, **constants, name=name, **_attributes(node), **known)
    except NotConstant as error:
        raise ValueError(f"{node.op_type} {name!r} has an input {formal} {error}: only constants can be read") from None
    except Unfolded as error:
        raise ValueError(f"{node.op_type} {name!r} has an input {formal} {error}") from None
    except (TypeError, ValueError) as error:
        raise ValueError(f"{node.op_type} {name!r} cannot be read: {error}") from error
    except Exception as error:
        raise ValueError(f"{node.op_type} {name!r} cannot be read: {weights.told(error)}") from error


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    """Return the attributes that a node gives, all of which must be known."""
    given = {attribute.name: attribute for attribute in node.attribute}
    given.pop("output_sequence", None)  # of the operators' first version: whether there is a Y
    unknown = [name for name in given if name not in _ATTRIBUTES]
    if unknown:
        raise ValueError(f"its attributes {', '.join(unknown)} are unknown, expected some of {', '.join(_ATTRIBUTES)}")
    values = {}
    for name, attribute in given.items():
        kinds = onnx.AttributeProto.AttributeType
        if attribute.type != kinds.Value(_ATTRIBUTES[name]) or attribute.ref_attr_name:
            kind = kinds.Name(attribute.type) if attribute.type in kinds.values() else attribute.type
            raise ValueError(f"its attribute {name} is of type {kind}, expected {_ATTRIBUTES[name]}")
        values[name] = helper.get_attribute_value(attribute)
    if "activations" in values:
        values["activations"] = [name.decode(errors="replace") for name in values["activations"]]
    if "direction" in values:
        values["direction"] = values["direction"].decode(errors="replace")
    return values


# ---- running whole models


class _Recurrent(onnx.reference.op_run.OpRun):
    """A node in onnx' reference implementation that is computed here."""

    op_domain = ""

    def _run(self, X: Array, W: Array, R: Array, *others: Any, **defaults: Any) -> tuple[Array, ...]:
        # The node's own attributes: among the schema's defaults are two activations for an RNN of one direction.
        names = _INPUTS[3:]
        given = dict(zip(names, others, strict=False))
        weights = {name: given.pop(name, None) for name in ("B", "P")}
        operator = Operator(self.op_type, W, R, **weights, **_attributes(self.onnx_node))
        return operator(X, **given)[: len(self.onnx_node.output)]


_OPS = [type(op_type, (_Recurrent,), {}) for op_type in _GATES]


class BackendRep(onnx.backend.base.BackendRep):
    """A model that is ready to be run."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self._evaluator = Evaluator(model, new_ops=_OPS)

    def run(self, inputs: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Return the model's outputs.

        Parameters
        ----------
        inputs : sequence or mapping of numpy.ndarray
            All of the model's inputs in their order, or by name.

        Returns
        -------
        tuple of numpy.ndarray

        Raises
        ------
        TypeError
            For any other argument.
        ValueError
            If there is another number of inputs, or a node cannot be computed, by its name.
        """
        if kwargs:
            raise TypeError(f"run has {', '.join(map(repr, kwargs))}, expected the inputs and nothing else")
        if not isinstance(inputs, Mapping):
            inputs, names = list(inputs), self._evaluator.input_names
            if len(inputs) != len(names):
                raise ValueError(f"inputs holds {len(inputs)} arrays, expected {len(names)}: {', '.join(names)}")
            inputs = dict(zip(names, inputs, strict=True))
        return tuple(self._evaluator.run(None, dict(inputs)))


class Backend(onnx.backend.base.Backend):
    """A backend as ``onnx.backend`` defines it: RNN, LSTM and GRU run here, the rest in onnx' reference implementation.

    The reference implementation is NumPy, made to be right and not fast: for one layer by itself `load` is better.

    Examples
    --------
    >>> from onnx import TensorProto, helper
    >>> shapes = {"x": [5, 2, 3], "W": [1, 4, 3], "R": [1, 4, 4]}
    >>> graph = helper.make_graph(
    ...     [helper.make_node("RNN", list(shapes), ["y"], hidden_size=4)],
    ...     "model",
    ...     [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()],
    ...     [helper.make_tensor_value_info("y", TensorProto.FLOAT, [5, 1, 2, 4])],
    ... )
    >>> rep = Backend.prepare(helper.make_model(graph))
    >>> (y,) = rep.run([np.ones(shape, np.float32) for shape in shapes.values()])
    >>> y.shape
    (5, 1, 2, 4)
    """

    @classmethod
    def supports_device(cls, device: str) -> bool:
        """Whether models run on it: on "CPU" alone."""
        return device == "CPU"

    @classmethod
    def prepare(cls, model: onnx.ModelProto, device: str = "CPU", **kwargs: Any) -> BackendRep:
        """Return a model, after onnx' checker has seen it, ready to be run.

        Raises
        ------
        TypeError
            If `model` is no onnx.ModelProto, or for any other argument.
        ValueError
            For another device.
        onnx.checker.ValidationError
            If the model is not valid.
        NotImplementedError, RuntimeError
            If it has an operator that the reference implementation does not know.
        """
        if kwargs:
            raise TypeError(f"prepare has {', '.join(map(repr, kwargs))}, expected a model and a device")
        if not cls.supports_device(device):
            raise ValueError(f"device is {device!r}, expected 'CPU'")
        if not isinstance(model, onnx.ModelProto):
            raise TypeError(f"model is a {type(model).__name__}, expected an onnx.ModelProto")
        onnx.checker.check_model(_with_shapes(model))
        return BackendRep(_read(model))

    @classmethod
    def run_node(
        cls, node: onnx.NodeProto, inputs: Any, device: str = "CPU", outputs_info: Any = None, **kwargs: Any
    ) -> tuple[Any, ...]:
        """Return a single node's outputs, by the newest version of its operator."""
        if kwargs or not cls.supports_device(device):
            raise ValueError(f"run_node has device {device!r} and {list(kwargs)}, expected 'CPU' and nothing else")
        evaluator = Evaluator(node, new_ops=_OPS)
        return tuple(evaluator.run(None, dict(zip(evaluator.input_names, inputs, strict=True))))


def _with_shapes(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a model as onnx' checker wants it: with a shape, whichever, where a graph's input or output has none."""
    values = [*model.graph.input, *model.graph.output]
    if all(value.type.HasField("tensor_type") and value.type.tensor_type.HasField("shape") for value in values):
        return model
    copied = onnx.ModelProto()
    copied.CopyFrom(model)
    for value in copied.graph.output:
        if value.type.WhichOneof("value") is None:  # a type need not be there either: it follows from the nodes
            value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    for value in (*copied.graph.input, *copied.graph.output):
        if value.type.HasField("tensor_type"):
            value.type.tensor_type.shape.SetInParent()
    return copied


# ---- writing

_OPSET, _IR = 17, 8  # of 2022: runtimes of many years read them
_LARGEST = 2**31 - 2**20  # bytes of parameters in a file, which protobuf limits to 2 GiB


def export(layer: Recurrent, path: weights.Path, *, state: bool = False, lengths: bool = False) -> None:
    """Write a layer as an ONNX model: either all of it or, after an error, nothing.

    Its input is ``x``, and its outputs are ``output``, ``h_n`` and, of an LSTM, ``c_n``, shaped as the layer has them;
    T and B are free. It computes what a call of the layer does: there is no dropout.

    Parameters
    ----------
    layer : fastrnn.RNN, fastrnn.LSTM or fastrnn.GRU
        Not projected: ONNX' LSTM has no projection.
    path : str or path
        A file that is there is replaced at the end, in one step.
    state : bool
        Whether the model has the inputs ``h_0`` and, for an LSTM, ``c_0``; otherwise the initial state is zero.
    lengths : bool
        Whether the model has an input ``lengths``, (B,) int32.

    Raises
    ------
    TypeError
        If an argument is of the wrong kind.
    ValueError
        For a projected layer, and one that is larger than the 2 GiB that a file can hold.
    OSError
        If the file cannot be written.

    Examples
    --------
    >>> import os, tempfile, fastrnn
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     export(fastrnn.LSTM(3, 4, num_layers=2), f"{folder}/lstm.onnx", state=True)
    ...     list(load(f"{folder}/lstm.onnx"))
    ['lstm_l0', 'lstm_l1']
    """
    if not isinstance(layer, Recurrent):
        raise TypeError(f"layer is a {type(layer).__name__}, expected an RNN, LSTM or GRU of fastrnn")
    if layer._spec.proj_size:
        raise ValueError(f"layer is {layer!r}, which is projected: ONNX' LSTM has no projection")
    if layer.num_parameters * layer.dtype.itemsize > _LARGEST:
        raise ValueError(f"layer is {layer!r}, which is larger than the 2 GiB that an ONNX file can hold")
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path is a {type(path).__name__}, expected a str or a path")
    state, lengths = functional.check_flag("state", state), functional.check_flag("lengths", lengths)
    model = _Writer(layer, state, lengths).model()
    onnx.checker.check_model(model, full_check=True)
    with weights.replacing(os.fsdecode(path)) as stream:
        stream.write(model.SerializeToString())


class _Writer:
    """Makes a model of a layer."""

    def __init__(self, layer: Recurrent, state: bool, lengths: bool) -> None:
        self.layer, self.state, self.lengths = layer, state, lengths
        self.spec = layer._spec
        self.letters = ("h", "c") if layer.cell == "lstm" else ("h",)
        self.nodes: list[onnx.NodeProto] = []
        self.tensors: list[onnx.TensorProto] = []

    def model(self) -> onnx.ModelProto:
        L = self.spec.num_layers
        x = self.node("Transpose", ["x"], "x_by_time", perm=[1, 0, 2]) if self.layer.batch_first else "x"
        initial = {letter: self.initial(letter) for letter in self.letters}
        if self.state and self.lengths:
            self.node("Equal", ["lengths", self.constant("zero", np.int32(0))], "no_steps")
            self.node("Unsqueeze", ["no_steps", self.constant("last", np.array([1]))], "no_steps_column")
        for k, parts in enumerate(self.parts()):
            x = self.one(k, x, parts, [initial[letter][k] for letter in self.letters])
        if self.layer.batch_first:
            self.node("Transpose", [x], "output", perm=[1, 0, 2])
        else:
            self.node("Identity", [x], "output")
        for letter in self.letters:
            self.node("Concat", [f"{letter}_n_l{k}" for k in range(L)], f"{letter}_n", axis=0)
        graph = helper.make_graph(self.nodes, type(self.layer).__name__, *self.signature(), self.tensors)
        opset = [helper.make_opsetid("", _OPSET)]
        return helper.make_model(graph, opset_imports=opset, ir_version=_IR, producer_name="fastrnn")

    def parts(self) -> list[list[weights.Params]]:
        """Return the parameters of each layer's directions."""
        split, D = self.spec.split(self.layer.parameters), self.spec.directions
        return [split[k : k + D] for k in range(0, len(split), D)]

    def signature(self) -> tuple[list[onnx.ValueInfoProto], list[onnx.ValueInfoProto]]:
        spec, kind = self.spec, helper.np_dtype_to_tensor_dtype(self.layer.dtype)
        rows = ["B", "T"] if self.layer.batch_first else ["T", "B"]
        states = [spec.num_layers * spec.directions, "B", spec.hidden_size]
        inputs = {"x": [*rows, spec.input_size]}
        inputs |= {f"{letter}_0": states for letter in self.letters} if self.state else {}
        outputs = {"output": [*rows, spec.directions * spec.hidden_size]}
        outputs |= {f"{letter}_n": states for letter in self.letters}
        given, made = (
            [helper.make_tensor_value_info(name, kind, shape) for name, shape in values.items()]
            for values in (inputs, outputs)
        )
        own = [helper.make_tensor_value_info("lengths", onnx.TensorProto.INT32, ["B"])] if self.lengths else []
        return given + own, made

    def constant(self, name: str, array: Any) -> str:
        self.tensors.append(numpy_helper.from_array(np.ascontiguousarray(array).reshape(np.shape(array)), name))
        return name

    def node(self, op_type: str, inputs: Sequence[str], *outputs: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op_type, inputs, outputs, **attributes))
        return outputs[0]

    def initial(self, letter: str) -> list[str]:
        """Return the names of the layers' initial states, "" where there is none."""
        L, D = self.spec.num_layers, self.spec.directions
        if not self.state:
            return [""] * L
        names = [f"{letter}_0_l{k}" for k in range(L)]
        self.node("Split", [f"{letter}_0", self.constant(f"{letter}_split", np.full(L, D))], *names, axis=0)
        return names

    def one(self, k: int, x: str, parts: list[weights.Params], initial: list[str]) -> str:
        """Add layer k, and return the name of its output (T, B, D · H)."""
        spec, cell = self.spec, self.layer.cell
        D, H, op_type = spec.directions, spec.hidden_size, type(self.layer).__name__
        arrays = weights.to_onnx(cell, parts)
        names = [self.constant(f"{name}_l{k}", array) for name, array in arrays.items()]
        inputs = [x, *names, *[""] * (3 - len(names)), "lengths" if self.lengths else "", *initial]
        while not inputs[-1]:
            inputs.pop()
        attributes: dict[str, Any] = {"hidden_size": H, "direction": "bidirectional" if D == 2 else "forward"}
        if op_type == "RNN":
            attributes["activations"] = [cell.removeprefix("rnn_").capitalize()] * D
        elif op_type == "GRU":
            attributes["linear_before_reset"] = int(cell == "gru")
        # For a row of no steps, ONNX Runtime gives zeros in place of the initial state.
        whole = self.state and self.lengths
        last = [f"{letter}_n_l{k}" for letter in self.letters]
        made = [f"{name}_of_steps" for name in last] if whole else last
        self.node(op_type, inputs, f"Y_l{k}", *made, name=f"{op_type.lower()}_l{k}", **attributes)
        for before, after, name in zip(initial, made, last, strict=True):
            if whole:
                self.node("Where", ["no_steps_column", before, after], name)
        self.node("Transpose", [f"Y_l{k}"], f"Y_l{k}_rows", perm=[0, 2, 1, 3])
        return self.node("Reshape", [f"Y_l{k}_rows", self.constant(f"shape_l{k}", [0, 0, D * H])], f"y_l{k}")
