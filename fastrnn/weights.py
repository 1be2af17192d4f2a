"""Parameters: their names and shapes, other systems' gate orders, and files.

One layer in one direction has the parameters that PyTorch gives it, G gates of H rows each:

=============  =====================  =========================================
name           shape
=============  =====================  =========================================
``weight_ih``  (G·H, I)               what multiplies the input
``weight_hh``  (G·H, H), or (G·H, P)  what multiplies the state h
``bias_ih``    (G·H,)                 both biases or neither
``bias_hh``    (G·H,)
``weight_hr``  (P, H)                 the projection of an LSTM that has one
=============  =====================  =========================================

A stack of layers appends ``_l0``, ``_l1`` and so on to them, and ``_reverse`` for the reverse direction.
"""

import errno
import io
import json
import os
import re
import secrets
import stat
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import IO, Any, NamedTuple, NoReturn

import numpy as np

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

Shape = tuple[int, ...]
Params = dict[str, np.ndarray]
Path = str | os.PathLike[str]

GATES = {"rnn_tanh": 1, "rnn_relu": 1, "rnn_sigmoid": 1, "lstm": 4, "gru": 3, "gru_reset_before": 3}
CELLS = tuple(GATES)


def cell_shapes(cell: str, I: int, H: int, P: int = 0, bias: bool = True) -> dict[str, Shape]:
    """Return the shape of each parameter of one layer in one direction.

    Parameters
    ----------
    cell : str
        One of `CELLS`.
    I, H, P : int
        Sizes of the input, of the hidden state and of the projection (0: none).
    bias : bool

    Returns
    -------
    dict of str to tuple

    Examples
    --------
    >>> cell_shapes("gru", 2, 4, bias=False)
    {'weight_ih': (12, 2), 'weight_hh': (12, 4)}
    """
    rows = GATES[cell] * H
    shapes: dict[str, Shape] = {"weight_ih": (rows, I), "weight_hh": (rows, P or H)}
    if bias:
        shapes |= {"bias_ih": (rows,), "bias_hh": (rows,)}
    if P:
        shapes["weight_hr"] = (P, H)
    return shapes


@dataclass(frozen=True)
class Architecture:
    """What decides the names and shapes of a layer's parameters and states: sizes that were checked before."""

    cell: str
    input_size: int
    hidden_size: int
    num_layers: int = 1
    bias: bool = True
    bidirectional: bool = False
    proj_size: int = 0

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def output_size(self) -> int:
        """The size of h, which is what one direction puts out."""
        return self.proj_size or self.hidden_size

    @property
    def state_sizes(self) -> tuple[int, ...]:
        """The size of each array of the state, h first."""
        return (self.output_size, self.hidden_size) if self.cell == "lstm" else (self.output_size,)

    @property
    def num_arrays(self) -> int:
        """How many parameter arrays there are, without a list of them, which a hostile file could make endless."""
        one = 2 + 2 * self.bias + (self.proj_size > 0)
        return one * self.num_layers * self.directions

    @property
    def num_parameters(self) -> int:
        """How many numbers the parameters hold, likewise."""
        first, other = (sum(map(_size, self._one(layer).values())) for layer in (0, 1))
        return self.directions * (first + (self.num_layers - 1) * other)

    def suffixes(self) -> list[str]:
        """Return what follows a parameter's name, layer by layer, forward before reverse."""
        endings = ("", "_reverse")[: self.directions]
        return [f"_l{layer}{ending}" for layer in range(self.num_layers) for ending in endings]

    def shapes(self) -> dict[str, Shape]:
        """Return the shape of every parameter by its full name, in PyTorch's order."""
        return {
            name + suffix: shape
            for index, suffix in enumerate(self.suffixes())
            for name, shape in self._one(index // self.directions).items()
        }

    def split(self, parameters: Mapping[str, np.ndarray]) -> list[Params]:
        """Return the parameters of each layer and direction under the names that they have there."""
        return [{name: parameters[name + suffix] for name in self._one(0)} for suffix in self.suffixes()]

    def join(self, parts: Sequence[Params]) -> Params:
        """Return all parameters, or their gradients, under their full names: the inverse of `split`."""
        return {name + suffix: part[name] for suffix, part in zip(self.suffixes(), parts, strict=True) for name in part}

    def _one(self, layer: int) -> dict[str, Shape]:
        I = self.output_size * self.directions if layer else self.input_size
        return cell_shapes(self.cell, I, self.hidden_size, self.proj_size, self.bias)


class Parameters(dict[str, np.ndarray]):
    """A layer's parameters by name. An assignment writes into the array that is there; none comes or goes.

    So both ``parameters[name] -= step`` and ``parameters[name] = value`` do what they say, and the layer, which
    holds the same arrays, sees it.
    """

    def __setitem__(self, name: str, value: Any) -> None:
        if name not in self or value is not self[name]:  # which the last step of parameters[name] -= ... assigns
            self.update({name: value})

    def update(self, *args: Any, **kwargs: Any) -> None:
        """Assign each of the given arrays, rounded to the parameters' dtype: all of them or, after an error, none."""
        values = dict(*args, **kwargs)
        for name in values:
            if name not in self:
                raise KeyError(f"there is no parameter {name!r}, only {_some(self)}")
        # Copies, all made before the first is written: a value may be a view of another parameter.
        new = {
            name: check_value(name, value, self[name].shape).astype(self[name].dtype) for name, value in values.items()
        }
        for name, array in new.items():
            self[name][...] = array

    def __ior__(self, other: Any) -> "Parameters":  # type: ignore[override, misc]
        self.update(other)
        return self

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError("a layer's parameters can be assigned, but none can be added or removed")

    __delitem__ = pop = popitem = clear = setdefault = _refuse

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (dict(self),)


def check_value(name: str, value: Any, shape: Shape) -> np.ndarray:
    """Return `value`, anything that NumPy can make a real floating array from, if it has the shape.

    Raises
    ------
    TypeError
        If it is not made of floating point numbers.
    ValueError
        If the shape differs.
    """
    try:
        array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:  # a PyTorch tensor that needs gradients: RuntimeError
        raise TypeError(f"{name} cannot be read as an array of floats: {error}") from error
    if array.dtype.kind != "f":
        raise TypeError(f"{name} has dtype {array.dtype}, expected a floating point array of shape {shape}")
    if array.shape != shape:
        raise ValueError(f"{name} has shape {array.shape}, expected {shape}")
    return array


def compare_names(given: Iterable[str], expected: Iterable[str]) -> tuple[list[str], list[str]]:
    """Return the names that are missing and those that are unexpected, in their order."""
    given, expected = list(given), list(expected)
    present, wanted = set(given), set(expected)
    return [name for name in expected if name not in present], [name for name in given if name not in wanted]


def names_error(what: str, missing: Sequence[str], unexpected: Sequence[str]) -> ValueError:
    """Return the exception that lists the missing and the unexpected names."""
    parts = [f"{label}: {_some(names)}" for label, names in (("missing", missing), ("unexpected", unexpected)) if names]
    return ValueError(f"{what} does not fit the layer; {'; '.join(parts)}")


def _some(names: Iterable[Any], limit: int = 12) -> str:
    """List names for a message, which a file with a million of them must not make endless."""
    names = list(names)
    shown = [repr(name) if len(repr(name)) <= 80 else repr(name)[:77] + "..." for name in names[:limit]]
    return ", ".join(shown) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def told(error: BaseException) -> str:
    """Return what an error of another package says, which may have a hostile file's content in it."""
    text = str(error)
    return f"{type(error).__name__}: {text if len(text) <= 1000 else text[:1000] + '...'}"


def _size(shape: Shape) -> int:
    size = 1
    for length in shape:
        size *= length
    return size


# The blocks of H rows in the order in which each system stacks them, by PyTorch's letters (g is Keras' and ONNX' c).
ORDERS = {
    "lstm": {"pytorch": "ifgo", "keras": "ifgo", "onnx": "iofg", "flax": "ifgo", "equinox": "ifgo", "cudnn": "ifgo"},
    "gru": {"pytorch": "rzn", "keras": "zrn", "onnx": "zrn", "flax": "rzn", "equinox": "rzn", "cudnn": "rzn"},
    "gru_reset_before": {"pytorch": "rzn", "keras": "zrn", "onnx": "zrn"},
}

# The systems as they are written, and why some have no place for some cells.
SYSTEMS = {
    "pytorch": "PyTorch",
    "keras": "Keras",
    "onnx": "ONNX",
    "flax": "Flax",
    "equinox": "Equinox",
    "cudnn": "cuDNN",
}
_AFTER = "its GRU resets after the recurrent product, another function, which these weights do not fit"
_EQUINOX_CELLS = "it has LSTMCell and GRUCell and no simple cell"
_LACKS = {
    "flax": {"gru_reset_before": _AFTER},
    "equinox": {"gru_reset_before": _AFTER, **dict.fromkeys(("rnn_tanh", "rnn_relu", "rnn_sigmoid"), _EQUINOX_CELLS)},
    "cudnn": {"gru_reset_before": _AFTER, "rnn_sigmoid": "its RNN has tanh and relu only"},
}


def reorder_gates(cell: str, array: np.ndarray, source: str, target: str) -> np.ndarray:
    """Return a copy of `array` with its blocks of rows in another system's order.

    Parameters
    ----------
    cell : str
        One of `CELLS`.
    array : numpy.ndarray
        (G·H, ...), a weight or a bias with the gates along the first axis.
    source, target : str
        "pytorch", "keras", "onnx", "flax", "equinox" or "cudnn".

    Returns
    -------
    numpy.ndarray
        (G·H, ...)

    Raises
    ------
    ValueError
        If there is no such cell or system, the system does not have the cell, or the rows do not divide into the
        cell's gates.

    Examples
    --------
    >>> reorder_gates("gru", np.array([1.0, 2.0, 3.0]), "pytorch", "keras")  # r z n to z r n
    array([2., 1., 3.])
    """
    for name, system in (("source", source), ("target", target)):
        if system not in SYSTEMS:
            raise ValueError(f"{name} is {system!r}, expected one of {_some(SYSTEMS)}")
        _check_has(system, cell)
    G = GATES[cell]
    if array.ndim == 0 or array.shape[0] % G:
        raise ValueError(f"array has shape {array.shape}, expected ({G} * H, ...): {cell} has {G} gates")
    if G == 1:
        return array.copy()
    blocks = array.reshape(G, array.shape[0] // G, *array.shape[1:])
    orders = ORDERS[cell]
    return blocks[[orders[source].index(gate) for gate in orders[target]]].reshape(array.shape)


def to_keras(cell: str, params: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """Return one layer's parameters as the list that a Keras layer's ``set_weights`` takes.

    Parameters
    ----------
    cell : str
        One of `CELLS`. "gru" is Keras' ``GRU(reset_after=True)``, "gru_reset_before" is ``reset_after=False``.
    params : mapping
        One layer in one direction, with the names of `cell_shapes`.

    Returns
    -------
    list of numpy.ndarray
        ``kernel`` (I, G·H), ``recurrent_kernel`` (H, G·H) and, with biases, ``bias``: (2, 3·H) for "gru", the input's
        row first; (G·H,) for the others, where it is the sum of the two biases, rounded once.

    Raises
    ------
    ValueError
        For a projected LSTM, which Keras does not have, and for parameters that do not fit the cell.

    Examples
    --------
    >>> params = {name: np.ones(shape, np.float32) for name, shape in cell_shapes("gru", 2, 4).items()}
    >>> [array.shape for array in to_keras("gru", params)]
    [(2, 12), (4, 12), (2, 12)]
    """
    w = {
        name: reorder_gates(cell, array, "pytorch", "keras")
        for name, array in _converted("keras", cell, params).items()
    }
    arrays = [w["weight_ih"].T, w["weight_hh"].T]
    if "bias_ih" in w:
        pair = (w["bias_ih"], w["bias_hh"])
        # Behind the reset gate the two biases of "gru" cannot be one: n = tanh(... + b_in + r * (... + b_hn)).
        arrays.append(np.stack(pair) if cell == "gru" else pair[0] + pair[1])
    return [np.ascontiguousarray(array) for array in arrays]


def from_keras(cell: str, arrays: Sequence[np.ndarray]) -> Params:
    """Return a Keras layer's ``get_weights()`` as one layer's parameters: the inverse of `to_keras`.

    Parameters
    ----------
    cell : str
        As for `to_keras`.
    arrays : sequence of numpy.ndarray
        ``kernel``, ``recurrent_kernel`` and, if the layer has one, ``bias``. A single bias becomes ``bias_ih``, and
        ``bias_hh`` is zero.

    Returns
    -------
    dict of str to numpy.ndarray

    Raises
    ------
    ValueError
        If the number of arrays or a shape is not what the cell has.

    Examples
    --------
    >>> params = from_keras("lstm", [np.ones((2, 16)), np.ones((4, 16)), np.ones(16)])
    >>> {name: array.shape for name, array in params.items()}
    {'weight_ih': (16, 2), 'weight_hh': (16, 4), 'bias_ih': (16,), 'bias_hh': (16,)}
    """
    if len(arrays) not in (2, 3):
        raise ValueError(f"arrays holds {len(arrays)} arrays, expected kernel, recurrent_kernel and perhaps bias")
    kernel, recurrent, *bias = map(np.asarray, arrays)
    params = {"weight_ih": kernel.T, "weight_hh": recurrent.T}
    if bias:
        rows, two = kernel.shape[-1:], cell == "gru"
        if bias[0].shape != ((2, *rows) if two else rows):
            form = f": that is a GRU with reset_after={not two}, another function" if cell.startswith("gru") else ""
            wanted = (2, *rows) if two else rows
            raise ValueError(f"bias has shape {bias[0].shape}, expected {wanted} for {cell}{form}")
        params["bias_ih"], params["bias_hh"] = bias[0] if two else (bias[0], np.zeros_like(bias[0]))
    return {
        name: np.ascontiguousarray(reorder_gates(cell, array, "keras", "pytorch"))
        for name, array in _converted("keras", cell, params).items()
    }


def to_onnx(cell: str, directions: Sequence[Mapping[str, np.ndarray]]) -> Params:
    """Return one layer's parameters as the inputs of the ONNX operator RNN, LSTM or GRU.

    Parameters
    ----------
    cell : str
        One of `CELLS`. "gru" needs the operator's attribute ``linear_before_reset=1``, "gru_reset_before" its 0.
    directions : sequence of mapping
        The parameters of the forward direction, or of the forward and the reverse, with the names of `cell_shapes`.

    Returns
    -------
    dict of str to numpy.ndarray
        ``W`` (D, G·H, I), ``R`` (D, G·H, H) and, with biases, ``B`` (D, 2·G·H).

    Raises
    ------
    ValueError
        For a projected LSTM, which ONNX does not have, and for parameters that do not fit the cell.

    Examples
    --------
    >>> params = {name: np.ones(shape, np.float32) for name, shape in cell_shapes("lstm", 2, 4).items()}
    >>> {name: array.shape for name, array in to_onnx("lstm", [params]).items()}
    {'W': (1, 16, 2), 'R': (1, 16, 4), 'B': (1, 32)}
    """
    if len(directions) not in (1, 2):
        raise ValueError(f"directions holds {len(directions)} entries, expected 1 or 2")
    _check_alike("directions", directions)
    parts = [
        {name: reorder_gates(cell, array, "pytorch", "onnx") for name, array in _converted("onnx", cell, part).items()}
        for part in directions
    ]
    inputs = {
        "W": np.stack([part["weight_ih"] for part in parts]),
        "R": np.stack([part["weight_hh"] for part in parts]),
    }
    if "bias_ih" in parts[0]:
        inputs["B"] = np.stack([np.concatenate([part["bias_ih"], part["bias_hh"]]) for part in parts])
    return inputs


def from_onnx(cell: str, W: np.ndarray, R: np.ndarray, B: np.ndarray | None = None) -> list[Params]:
    """Return the inputs of the ONNX operator RNN, LSTM or GRU as parameters: the inverse of `to_onnx`.

    Parameters
    ----------
    cell : str
        As for `to_onnx`.
    W, R, B : numpy.ndarray
        (D, G·H, I), (D, G·H, H) and (D, 2·G·H) or None.

    Returns
    -------
    list of dict
        One for each direction.

    Raises
    ------
    ValueError
        If a shape is not what the cell has.

    Examples
    --------
    >>> (params,) = from_onnx("gru", np.ones((1, 12, 2)), np.ones((1, 12, 4)))
    >>> {name: array.shape for name, array in params.items()}
    {'weight_ih': (12, 2), 'weight_hh': (12, 4)}
    """
    if W.ndim != 3:
        raise ValueError(f"W has shape {W.shape}, expected (D, G * H, I)")
    D, rows = W.shape[:2]
    if R.ndim != 3 or R.shape[:2] != (D, rows):
        raise ValueError(f"R has shape {R.shape}, expected ({D}, {rows}, H)")
    if B is not None and B.shape != (D, 2 * rows):
        raise ValueError(f"B has shape {B.shape}, expected {(D, 2 * rows)}")
    parts = []
    for d in range(D):
        params = {"weight_ih": W[d], "weight_hh": R[d]}
        if B is not None:
            params |= {"bias_ih": B[d, :rows], "bias_hh": B[d, rows:]}
        params = dict(_converted("onnx", cell, params))
        parts.append({name: reorder_gates(cell, array, "onnx", "pytorch") for name, array in params.items()})
    return parts


def to_flax(cell: str, params: Mapping[str, np.ndarray], form: str = "nnx") -> dict[str, Params]:
    """Return one layer's parameters as the nested dict of a Flax cell.

    Parameters
    ----------
    cell : str
        One of `CELLS`. "rnn_tanh", "rnn_relu" and "rnn_sigmoid" are Flax' ``SimpleCell`` with that ``activation_fn``.
    params : mapping
        One layer in one direction, with the names of `cell_shapes`.
    form : str
        "nnx" for ``nnx.OptimizedLSTMCell``, ``nnx.GRUCell`` and ``nnx.SimpleCell``; "nnx_gates" for ``nnx.LSTMCell``,
        which has a matrix for each gate; "linen" for the cells of ``flax.linen``.

    Returns
    -------
    dict of str to dict
        For "nnx" ``dense_i`` and ``dense_h`` with ``kernel`` (I, G·H) and (H, G·H), for the others a matrix (I, H) or
        (H, H) for each gate; the one ``bias``, the sum of ours, stands where the cell has it. Flax' cells always have a
        bias: it is zero for params without.

    Raises
    ------
    ValueError
        For "gru_reset_before" and a projected LSTM, which Flax does not have; for a "gru" whose b_hn, the last third of
        ``bias_hh``, is not zero in the form "nnx", where nothing can hold it ("linen" can); for parameters that do not
        fit the cell.

    Examples
    --------
    >>> params = {name: np.ones(shape, np.float32) for name, shape in cell_shapes("lstm", 2, 4).items()}
    >>> tree = to_flax("lstm", params)
    >>> [(name, key, array.shape) for name, part in tree.items() for key, array in part.items()]
    [('dense_i', 'kernel', (2, 16)), ('dense_h', 'kernel', (4, 16)), ('dense_h', 'bias', (16,))]
    """
    params = _converted("flax", cell, params)
    names_i, names_h = _flax_names(cell, form)
    bias, bias_n = _one_bias(cell, params)
    if bias is None:
        rows = len(params["weight_ih"])
        bias, bias_n = (np.zeros(n, params["weight_ih"].dtype) for n in (rows, rows // GATES[cell]))
    kernels = [params["weight_ih"], params["weight_hh"]]
    tree: dict[str, Params] = {}
    for names, kernel in zip((names_i, names_h), kernels, strict=True):
        for name, block in zip(names, np.split(kernel, len(names)), strict=True):
            tree[name] = {"kernel": np.ascontiguousarray(block.T)}
    owners = names_h if cell == "lstm" else names_i
    for name, block in zip(owners, np.split(bias, len(owners)), strict=True):
        tree[name]["bias"] = block.copy()
    if cell == "gru" and form == "linen":
        tree["hn"]["bias"] = np.asarray(bias_n)
    elif cell == "gru" and np.any(bias_n):
        message = "the last third of bias_hh, b_hn inside the reset gate's product, is not zero, and nnx.GRUCell has"
        raise ValueError(f"{message} no place for it: flax.linen's GRUCell has, form='linen'")
    return tree


def from_flax(cell: str, tree: Mapping[str, Mapping[str, Any]]) -> Params:
    """Return a Flax cell's parameters as one layer's parameters: the inverse of `to_flax`.

    Parameters
    ----------
    cell : str
        As for `to_flax`.
    tree : mapping of str to mapping
        In any of the forms of `to_flax`, which its names tell: ``nnx.to_pure_dict(nnx.state(cell, nnx.Param))``, or
        ``variables["params"]`` of ``flax.linen``. A bias at the input's matrices becomes ``bias_ih``, one at the
        state's ``bias_hh``, and what is missing is zero.

    Returns
    -------
    dict of str to numpy.ndarray

    Raises
    ------
    ValueError
        If the names are those of no form, Flax does not have the cell, or a shape is not what the cell has.

    Examples
    --------
    >>> tree = {"dense_i": {"kernel": np.ones((2, 12)), "bias": np.ones(12)}, "dense_h": {"kernel": np.ones((4, 12))}}
    >>> params = from_flax("gru", tree)
    >>> {name: array.shape for name, array in params.items()}
    {'weight_ih': (12, 2), 'weight_hh': (12, 4), 'bias_ih': (12,), 'bias_hh': (12,)}
    """
    _check_has("flax", cell)
    forms = [_flax_names(cell, form) for form in ("nnx", "linen", *["nnx_gates"] * (cell == "lstm"))]
    fitting = [sides for sides in forms if set(tree) == {*sides[0], *sides[1]}]
    if not fitting:
        expected = ", or ".join(_some([*inputs, *states]) for inputs, states in forms)
        raise ValueError(f"tree has the names {_some(tree)}, expected {expected}")
    params: Params = {}
    for side, names in zip(("ih", "hh"), fitting[0], strict=True):
        for name in names:
            if "kernel" not in tree[name] or np.ndim(tree[name]["kernel"]) != 2:
                raise ValueError(f"tree[{name!r}] needs a matrix 'kernel'")
        kernels = [np.asarray(tree[name]["kernel"]) for name in names]
        params[f"weight_{side}"] = np.ascontiguousarray(np.concatenate([kernel.T for kernel in kernels]))
        biases = [
            np.asarray(tree[name]["bias"]) if "bias" in tree[name] else np.zeros(kernel.shape[1], kernel.dtype)
            for name, kernel in zip(names, kernels, strict=True)
        ]
        params[f"bias_{side}"] = np.concatenate(biases)
    params = dict(_converted("flax", cell, params))
    return {name: params[name] for name in cell_shapes(cell, 1, 1)}


def _flax_names(cell: str, form: str) -> tuple[list[str], list[str]]:
    """Return the names of the matrices over the input and of those over the state, in the order of the gates."""
    if form not in ("nnx", "nnx_gates", "linen"):
        raise ValueError(f"form is {form!r}, expected 'nnx', 'nnx_gates' or 'linen'")
    if form == "nnx":
        return ["dense_i"], ["dense_h"]
    if form == "nnx_gates" and cell != "lstm":
        raise ValueError(f"form is 'nnx_gates' and cell is {cell!r}: only nnx.LSTMCell has it, expected 'nnx'")
    gates = ORDERS[cell]["flax"] if cell in ORDERS else [""]
    ends = [gate + "_" if form == "nnx_gates" and gate == "f" else gate for gate in gates]  # `if` is no attribute
    return [f"i{end}" for end in ends], [f"h{gate}" for gate in gates]


def to_equinox(cell: str, params: Mapping[str, np.ndarray]) -> Params:
    """Return one layer's parameters as the arrays of an Equinox cell.

    Parameters
    ----------
    cell : str
        "lstm" for ``equinox.nn.LSTMCell``, "gru" for ``equinox.nn.GRUCell``.
    params : mapping
        One layer in one direction, with the names of `cell_shapes`.

    Returns
    -------
    dict of str to numpy.ndarray
        By the cell's attributes: ``weight_ih`` (G·H, I), ``weight_hh`` (G·H, H) and, with biases, ``bias`` (G·H,), the
        sum of ours; for "gru" also ``bias_n`` (H,), the one that the reset gate multiplies.

    Raises
    ------
    ValueError
        For the other cells and a projected LSTM, which Equinox does not have, and for parameters that do not fit the
        cell.

    Examples
    --------
    >>> params = {name: np.ones(shape, np.float32) for name, shape in cell_shapes("gru", 2, 4).items()}
    >>> {name: array.shape for name, array in to_equinox("gru", params).items()}
    {'weight_ih': (12, 2), 'weight_hh': (12, 4), 'bias': (12,), 'bias_n': (4,)}
    """
    params = _converted("equinox", cell, params)
    bias, bias_n = _one_bias(cell, params)
    arrays = {name: params[name].copy() for name in ("weight_ih", "weight_hh")}
    return arrays | {name: array for name, array in (("bias", bias), ("bias_n", bias_n)) if array is not None}


def from_equinox(cell: str, arrays: Mapping[str, Any]) -> Params:
    """Return an Equinox cell's arrays as one layer's parameters: the inverse of `to_equinox`.

    Parameters
    ----------
    cell : str
        "lstm" or "gru".
    arrays : mapping of str to array
        As `to_equinox` returns them; ``bias`` and ``bias_n`` may be None or missing together. ``bias`` becomes
        ``bias_ih``, and ``bias_hh`` is zero but for the block that ``bias_n`` is.

    Returns
    -------
    dict of str to numpy.ndarray

    Raises
    ------
    ValueError
        If an array is missing or too many, Equinox does not have the cell, or a shape is not what the cell has.

    Examples
    --------
    >>> params = from_equinox("lstm", {"weight_ih": np.ones((16, 2)), "weight_hh": np.ones((16, 4)), "bias": None})
    >>> {name: array.shape for name, array in params.items()}
    {'weight_ih': (16, 2), 'weight_hh': (16, 4)}
    """
    _check_has("equinox", cell)
    given = {name: np.array(array) for name, array in arrays.items() if array is not None}
    expected = ["weight_ih", "weight_hh", "bias", "bias_n"][: 4 if cell == "gru" else 3]
    if set(given) != set(expected[:2]) and set(given) != set(expected):
        raise ValueError(f"arrays has {_some(given)}, expected {_some(expected)}, or the first two")
    params = {name: given[name] for name in expected[:2]}
    if "bias" in given:
        params |= {"bias_ih": given["bias"], "bias_hh": np.zeros_like(given["bias"])}
    params = dict(_converted("equinox", cell, params))
    if "bias_n" in given:
        H = params["weight_hh"].shape[1]
        params["bias_hh"][2 * H :] = check_value("bias_n", given["bias_n"], (H,))
    return params


def to_cudnn(cell: str, parts: Sequence[Mapping[str, np.ndarray]]) -> np.ndarray:
    """Return the parameters of a stack of layers as one array in the order of cuDNN's weight space.

    Parameters
    ----------
    cell : str
        "rnn_tanh", "rnn_relu", "lstm" or "gru".
    parts : sequence of mapping
        The parameters of each layer and direction, layer by layer and forward before reverse, with the names of
        `cell_shapes`.

    Returns
    -------
    numpy.ndarray
        One-dimensional: ``weight_ih``, ``weight_hh`` of each part, gates in PyTorch's order and row after row, and
        behind them ``bias_ih``, ``bias_hh`` of each part, if there are biases.

    Raises
    ------
    ValueError
        For "gru_reset_before" and "rnn_sigmoid", which cuDNN does not have; for a projected LSTM, for which it adds
        matrices; for parameters that do not fit the cell.

    Examples
    --------
    >>> params = {name: np.ones(shape, np.float32) for name, shape in cell_shapes("lstm", 2, 4).items()}
    >>> to_cudnn("lstm", [params]).shape  # 16 · 2 + 16 · 4 + 16 + 16
    (128,)
    """
    if not parts:
        raise ValueError("parts is empty, expected the parameters of at least one layer")
    _check_alike("parts", parts)
    parts = [_converted("cudnn", cell, part) for part in parts]
    kinds = [("weight_ih", "weight_hh"), ("bias_ih", "bias_hh")][: 2 if "bias_ih" in parts[0] else 1]
    return np.concatenate([part[name].ravel() for kind in kinds for part in parts for name in kind])


def from_cudnn(
    cell: str,
    array: np.ndarray,
    input_size: int,
    hidden_size: int,
    num_layers: int = 1,
    *,
    bias: bool = True,
    bidirectional: bool = False,
) -> list[Params]:
    """Return what is in cuDNN's weight space as parameters: the inverse of `to_cudnn`.

    Parameters
    ----------
    cell : str
        As for `to_cudnn`.
    array : numpy.ndarray
        One-dimensional, in the order that `to_cudnn` returns.
    input_size, hidden_size, num_layers, bias, bidirectional
        Of the stack of layers.

    Returns
    -------
    list of dict
        One for each layer and direction, layer by layer and forward before reverse.

    Raises
    ------
    ValueError
        If cuDNN does not have the cell, or the array has another size.

    Examples
    --------
    >>> parts = from_cudnn("gru", np.ones(12 * 2 + 12 * 4 + 24), 2, 4)
    >>> {name: block.shape for name, block in parts[0].items()}
    {'weight_ih': (12, 2), 'weight_hh': (12, 4), 'bias_ih': (12,), 'bias_hh': (12,)}
    """
    _check_has("cudnn", cell)
    spec = Architecture(cell, input_size, hidden_size, num_layers, bias, bidirectional)
    if array.shape != (spec.num_parameters,):
        raise ValueError(f"array has shape {array.shape}, expected {(spec.num_parameters,)} for {spec}")
    shapes, parameters, at = spec.shapes(), {}, 0
    for name in sorted(shapes, key=lambda name: name.startswith("bias")):  # a stable sort: weights before biases
        size = _size(shapes[name])
        parameters[name] = array[at : at + size].reshape(shapes[name]).copy()
        at += size
    return spec.split(parameters)


def _one_bias(cell: str, params: Mapping[str, np.ndarray]) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Return the sum of the two biases and, for "gru", apart what cannot be added: b_hn is inside the reset gate."""
    if "bias_ih" not in params:
        return None, None
    bias = params["bias_ih"] + params["bias_hh"]
    if cell != "gru":
        return bias, None
    n = len(bias) // 3 * 2
    bias[n:] = params["bias_ih"][n:]
    return bias, params["bias_hh"][n:].copy()


def _check_has(system: str, cell: str) -> None:
    """Check that there is such a cell, in that system."""
    if cell not in GATES:
        raise ValueError(f"cell is {cell!r}, expected one of {_some(CELLS)}")
    if cell in _LACKS.get(system, ()):
        raise ValueError(f"cell is {cell!r}, which {SYSTEMS[system]} does not have: {_LACKS[system][cell]}")


def _check_alike(name: str, parts: Sequence[Mapping[str, np.ndarray]]) -> None:
    if len({tuple(sorted(params)) for params in parts}) > 1:
        raise ValueError(f"{name} hold different parameters, expected the same names in all")


def _converted(system: str, cell: str, params: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
    """Return `params` if they are those of one layer that the system can have."""
    _check_has(system, cell)
    if "weight_hr" in params:
        raise ValueError(f"params hold weight_hr: a projected LSTM cannot be converted to {SYSTEMS[system]}")
    for name in ("weight_ih", "weight_hh"):
        if name not in params or params[name].ndim != 2:
            raise ValueError(f"params need a matrix {name}")
    expected = cell_shapes(cell, params["weight_ih"].shape[1], params["weight_hh"].shape[1], bias="bias_ih" in params)
    shapes = {name: params[name].shape for name in params}
    if shapes != expected:
        raise ValueError(f"params have the shapes {shapes}, expected {expected} for {cell}")
    return params


_META = "__fastrnn__"  # the entry of an .npz file that tells the architecture, as JSON
_META_BYTES = 1 << 16
_KINDS = {"F16": np.float16, "F32": np.float32, "F64": np.float64}  # of safetensors

# What a file may ask for before anybody knows whether it is the right one; `write` keeps to it, too.
_ENTRIES = 10_000  # arrays
_NAME = 500  # bytes of a name
_DIRECTORY = 6 << 20  # bytes of the list of entries, in which each has some 100 beside its name
_HEADER = 10_000  # bytes that tell one array's shape, NumPy's own limit


class Header(NamedTuple):
    """What a file tells of an array before it is read."""

    shape: Shape
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        return _size(self.shape) * self.dtype.itemsize


Select = Callable[[Mapping[str, Any], Mapping[str, Header]], Iterable[str]]


def write(
    path: str | os.PathLike[str], arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any] | None = None
) -> None:
    """Write arrays to a .npz or .safetensors file: either all of it or, after an error, nothing.

    Parameters
    ----------
    path : str or path
        Its ending decides the format. A file that is there is replaced at the end, in one step.
    arrays : mapping of str to numpy.ndarray
    meta : mapping, optional
        What JSON can hold, kept with the arrays.

    Raises
    ------
    TypeError
        If `path` is not a path.
    ValueError
        If it has another ending, or there is so much of `arrays` or `meta` that `read` would refuse the file.
    ModuleNotFoundError
        For .safetensors without the package of that name.
    OSError
        If the file cannot be written.
    """
    path, kind = _path(path)
    text = json.dumps(dict(meta or {}))
    try:
        _check_names([_META, *arrays])
        _check_text(text)
    except _Malformed as error:
        raise ValueError(f"{path} cannot be written, as it could not be loaded: {error}") from None
    if kind == ".safetensors":
        data = _safetensors().numpy.save(dict(arrays), {_META: text})
        with replacing(path) as stream:
            stream.write(data)
    else:
        with replacing(path) as stream:
            entries: dict[str, Any] = {_META: np.array(text), **arrays}
            np.savez(stream, **entries)


def read(path: Path, select: Select | None = None) -> tuple[Params, dict[str, Any]]:
    """Read arrays from a .npz or .safetensors file that need not be trusted. Nothing in it is ever executed.

    Parameters
    ----------
    path : str or path
    select : callable, optional
        Called with the file's meta and the headers of its arrays before any of them is read; it returns the names of
        those to read, or raises.

    Returns
    -------
    arrays : dict of str to numpy.ndarray
        float16, float32 or float64, perhaps read-only.
    meta : dict
        What `write` was given, {} for a file that somebody else wrote.

    Raises
    ------
    TypeError
        If `path` is not a path.
    ValueError
        If it has another ending, or the file is not what its ending says: corrupt, pickled, of other than floats.
    ModuleNotFoundError
        For .safetensors without the package of that name.
    OSError
        If the file cannot be opened.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write(f"{folder}/weights.npz", {"a": np.ones(2)}, {"epoch": 3})
    ...     read(f"{folder}/weights.npz")
    ({'a': array([1., 1.])}, {'epoch': 3})
    """
    path, kind = _path(path)
    with open(path, "rb") as stream:  # whether it is there and can be opened is OSError's to say
        opened = (_Safetensors if kind == ".safetensors" else _Npz)(path, stream)
        with opened:
            names = list(opened.headers) if select is None else select(opened.meta, opened.headers)
            return {name: opened.read(name) for name in names}, opened.meta


class _Bounded:
    """A stream that `zipfile` opens a file through: the list of entries, which it reads at once, must be short."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.stream, self.opened = stream, False

    def read(self, size: int = -1) -> bytes:
        if size > _DIRECTORY and not self.opened:
            raise _Malformed(f"its list of entries has {size} bytes, expected at most {_DIRECTORY}")
        return self.stream.read(size)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


class _Npz:
    """A .npz file as np.savez writes it: a zip of .npy files, whose headers are read before any data.

    np.load trusts what a header says about the size and allocates it; here it has to agree with the zip's own record.
    """

    def __init__(self, path: str, stream: IO[bytes]) -> None:
        self.path = path
        self.meta: dict[str, Any] = {}
        self.headers: dict[str, Header] = {}
        self._members: dict[str, tuple[zipfile.ZipInfo, np.dtype, bool, int]] = {}
        with self._explained():
            bounded = _Bounded(stream)
            self._archive = zipfile.ZipFile(bounded)
            bounded.opened = True
            entries = self._archive.infolist()
            _check_names(info.filename.removesuffix(".npy") for info in entries)
            self._length = os.fstat(stream.fileno()).st_size
            for info in entries:
                self._add(info)

    def __enter__(self) -> "_Npz":
        return self

    def __exit__(self, *exception: Any) -> None:
        self._archive.close()

    def _add(self, info: zipfile.ZipInfo) -> None:
        name = info.filename.removesuffix(".npy")
        if name == info.filename:
            raise _Malformed(f"its entry {_some([name])} is not an array")
        if name in self._members or (name == _META and self.meta):
            raise _Malformed(f"it has two entries {_some([name])}")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise _Malformed(f"its entry {_some([name])} is compressed in a way that np.savez_compressed does not have")
        if info.compress_size > self._length:
            raise _Malformed(f"its entry {_some([name])} is larger than the file")
        with self._archive.open(info) as member:
            shape, fortran, dtype, offset = _read_header(name, member)
        if dtype.hasobject:
            raise _Malformed(f"its entry {_some([name])} holds pickled objects, which are never loaded")
        if any(length < 0 for length in shape) or _size(shape) * dtype.itemsize != info.file_size - offset:
            raise _Malformed(f"the header of its entry {_some([name])} does not agree with the entry's size")
        if name == _META:
            if dtype.kind != "U" or shape != () or dtype.itemsize > 4 * _META_BYTES:
                raise _Malformed(f"its entry {_META!r} is not a short text")
            self.meta = _parse_meta(np.frombuffer(self._bytes(info, offset), dtype)[0].item())
            return
        if dtype.kind != "f" or dtype.itemsize > 8:
            raise _Malformed(f"its entry {_some([name])} has dtype {dtype}, expected floats of 16, 32 or 64 bits")
        self._members[name] = (info, dtype, fortran, offset)
        self.headers[name] = Header(shape, dtype.newbyteorder("="))

    def _bytes(self, info: zipfile.ZipInfo, offset: int) -> bytes:
        """Return the data behind a header: as much as was promised, however much a deflated entry would give."""
        with self._archive.open(info) as member:
            member.read(offset)
            return member.read(info.file_size - offset)

    def read(self, name: str) -> np.ndarray:
        info, dtype, fortran, offset = self._members[name]
        with self._explained():
            flat = np.frombuffer(self._bytes(info, offset), dtype)
            array = flat.reshape(self.headers[name].shape, order="F" if fortran else "C")
            return np.asarray(array, dtype.newbyteorder("="), order="C")

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except _Malformed as error:
            raise ValueError(f"{self.path} cannot be loaded: {error}") from None
        except Exception as error:
            message = f"{self.path} cannot be loaded: it is not a whole .npz file ({told(error)})"
            raise ValueError(message) from error


class _Safetensors:
    """A .safetensors file through the package of that name, which checks the header and never executes anything."""

    def __init__(self, path: str, stream: IO[bytes]) -> None:
        self.path = path
        self._package = _safetensors()
        with self._explained():
            size = int.from_bytes(stream.read(8), "little")
            if _DIRECTORY < size <= os.fstat(stream.fileno()).st_size:  # of a file that has so much
                raise _Malformed(f"its list of entries has {size} bytes, expected at most {_DIRECTORY}")
            self._file = self._package.safe_open(path, framework="numpy")
            self.meta = _parse_meta((self._file.metadata() or {}).get(_META, "{}"))
            names = list(self._file.keys())
            _check_names(names)
            self.headers = {name: self._header(name) for name in names}

    def _header(self, name: str) -> Header:
        entry = self._file.get_slice(name)
        kind = entry.get_dtype()
        if kind not in _KINDS:
            raise _Malformed(f"its array {_some([name])} has dtype {kind}, expected one of {_some(_KINDS)}")
        return Header(tuple(entry.get_shape()), np.dtype(_KINDS[kind]))

    def __enter__(self) -> "_Safetensors":
        self._file.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._file.__exit__(*exception)

    def read(self, name: str) -> np.ndarray:
        with self._explained():
            return self._file.get_tensor(name)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except _Malformed as error:
            raise ValueError(f"{self.path} cannot be loaded: {error}") from None
        except Exception as error:
            message = f"{self.path} cannot be loaded: it is not a whole .safetensors file ({told(error)})"
            raise ValueError(message) from error


class _Malformed(Exception):
    """What is wrong with a file, in words."""


def _read_header(name: str, member: IO[bytes]) -> tuple[Shape, bool, np.dtype, int]:
    """Return the shape, whether the order is Fortran's, the dtype and the size of a .npy file's header."""
    magic = member.read(8)
    version, fields = tuple(magic[6:]), {(1, 0): 2, (2, 0): 4}
    if magic[:6] != b"\x93NUMPY":
        raise ValueError(f"{_some([name])} does not begin as a .npy file")
    if version not in fields:
        raise _Malformed(f"its entry {_some([name])} has the unknown .npy version {version}")
    field = member.read(fields[version])
    size = int.from_bytes(field, "little")
    if size > _HEADER:  # which NumPy reads before it refuses it
        raise _Malformed(f"the header of its entry {_some([name])} has {size} bytes, expected at most {_HEADER}")
    text = io.BytesIO(field + member.read(size))
    one = version == (1, 0)
    shape, fortran, dtype = (np.lib.format.read_array_header_1_0 if one else np.lib.format.read_array_header_2_0)(text)
    if any(type(length) is not int for length in shape):
        raise _Malformed(f"the header of its entry {_some([name])} has the shape {shape}, expected integers")
    return shape, fortran, dtype, len(magic) + len(field) + size


def _check_names(names: Iterable[str]) -> None:
    """Raise for more entries than a file may have, or too long names."""
    names = list(names)
    if len(names) > _ENTRIES:
        raise _Malformed(f"it has {len(names)} entries, expected at most {_ENTRIES}")
    for name in names:
        if len(name.encode(errors="replace")) > _NAME:
            raise _Malformed(f"its entry {_some([name])} has a name of {len(name)} characters, expected {_NAME} bytes")


def _check_text(text: str) -> None:
    if len(text) > _META_BYTES:
        raise _Malformed(f"its entry {_META!r} is not a short text")


def _parse_meta(text: str) -> dict[str, Any]:
    _check_text(text)
    try:
        meta = json.loads(text, parse_int=_parse_int)
    except (ValueError, RecursionError) as error:
        raise _Malformed(f"its entry {_META!r} is not JSON ({error})") from None
    if not isinstance(meta, dict):
        raise _Malformed(f"its entry {_META!r} is not a JSON object")
    return meta


def _parse_int(digits: str) -> int:
    if len(digits) > 1000:  # messages and products of such would be beyond what Python writes out
        raise ValueError(f"a number has {len(digits)} digits")
    return int(digits)


def same(given: Any, expected: Any) -> bool:
    """Whether a value of a file's meta is another, of the same type: True is not 1 there, nor is 1.0."""
    return type(given) is type(expected) and bool(given == expected)


def _path(path: Any) -> tuple[str, str]:
    """Return the path as a string, and its ending."""
    try:
        name = os.fsdecode(path)
    except TypeError:
        raise TypeError(f"path is a {type(path).__name__}, expected a str or a path") from None
    kind = os.path.splitext(name)[1].lower()
    if kind not in (".npz", ".safetensors"):
        raise ValueError(f"path is {name!r}, expected a name that ends in .npz or .safetensors")
    return name, kind


def _safetensors() -> Any:
    try:
        import safetensors
        import safetensors.numpy
    except ModuleNotFoundError as error:
        message = "the package safetensors is needed for .safetensors files, not for .npz: pip install safetensors"
        raise ModuleNotFoundError(message) from error
    return safetensors


@contextmanager
def replacing(path: str) -> Iterator[IO[bytes]]:
    """Give a stream to a new file beside `path` that takes its place when all is written, and goes when it is not.

    A symbolic link stays one: what it points to is replaced. The new file has the old one's mode and, if the system
    allows it, its owner. What saves to the same path left behind when they were killed is removed.
    """
    target = os.path.realpath(path)
    old = _status(path)
    _clear(target)
    temporary, stream = _begin(target, old)
    try:
        with stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
            if fcntl is not None:  # while it is locked: nobody takes it for a leftover
                os.replace(temporary, target)
        if fcntl is None:  # an open file cannot be replaced there
            os.replace(temporary, target)
    except BaseException:
        with suppress(FileNotFoundError):
            os.remove(temporary)
        raise


def _status(path: str) -> os.stat_result | None:
    """Return the status of the file that is to be replaced, None if there is none."""
    try:
        old = os.stat(path)
    except FileNotFoundError:
        return None
    if stat.S_ISDIR(old.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    if not stat.S_ISREG(old.st_mode):
        raise OSError(errno.EINVAL, "it is a device or a pipe, which a file would take the place of", path)
    return old


def _begin(target: str, old: os.stat_result | None) -> tuple[str, IO[bytes]]:
    """Make a file beside `target`, locked as long as it is open: after a kill the lock is gone, and tells it."""
    while True:
        temporary = f"{target}.{secrets.token_hex(8)}.tmp"
        mode = 0o666 if old is None else 0o600  # never wider than the old file's, which it gets before any content
        number = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), mode)
        stream = os.fdopen(number, "wb")
        try:
            if _lock(number, wait=True) and not os.fstat(number).st_nlink:  # another save was faster, and removed it
                stream.close()
                continue
            if old is not None:
                if hasattr(os, "fchown"):
                    with suppress(OSError):  # only root gives files away
                        os.fchown(number, old.st_uid, old.st_gid)
                os.chmod(temporary, stat.S_IMODE(old.st_mode))
        except BaseException:
            stream.close()
            with suppress(FileNotFoundError):
                os.remove(temporary)
            raise
        return temporary, stream


def _clear(target: str) -> None:
    """Remove the leftovers of saves to `target` that were killed, and none of one that goes on in whatever process."""
    folder, name = os.path.split(target)
    own = re.compile(re.escape(name) + r"\.[0-9a-f]{16}\.tmp")
    with suppress(OSError):  # a folder that cannot be listed is no reason not to save
        for left in filter(own.fullmatch, os.listdir(folder)):
            with suppress(OSError):
                _remove_if_left(os.path.join(folder, left))


def _remove_if_left(temporary: str) -> None:
    if fcntl is None:  # there, what a process has open cannot be removed
        os.remove(temporary)
        return
    number = os.open(temporary, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        if _lock(number, wait=False):
            os.remove(temporary)
    finally:
        os.close(number)


def _lock(number: int, wait: bool) -> bool:
    """Lock an open file, and return whether that was possible: not every file system can."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(number, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        return False
    return True
