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

import json
import os
import secrets
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any, NoReturn

import numpy as np

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


def _size(shape: Shape) -> int:
    size = 1
    for length in shape:
        size *= length
    return size


# The blocks of H rows in the order in which each system stacks them, by PyTorch's letters (g is Keras' and ONNX' c).
ORDERS = {
    "lstm": {"pytorch": "ifgo", "keras": "ifgo", "onnx": "iofg"},
    "gru": {"pytorch": "rzn", "keras": "zrn", "onnx": "zrn"},
    "gru_reset_before": {"pytorch": "rzn", "keras": "zrn", "onnx": "zrn"},
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
        "pytorch", "keras" or "onnx".

    Returns
    -------
    numpy.ndarray
        (G·H, ...)

    Raises
    ------
    ValueError
        If there is no such cell or system, or the rows do not divide into the cell's gates.

    Examples
    --------
    >>> reorder_gates("gru", np.array([1.0, 2.0, 3.0]), "pytorch", "keras")  # r z n to z r n
    array([2., 1., 3.])
    """
    if cell not in GATES:
        raise ValueError(f"cell is {cell!r}, expected one of {_some(CELLS)}")
    for name, system in (("source", source), ("target", target)):
        if system not in ("pytorch", "keras", "onnx"):
            raise ValueError(f"{name} is {system!r}, expected 'pytorch', 'keras' or 'onnx'")
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
    w = {name: reorder_gates(cell, array, "pytorch", "keras") for name, array in _unprojected(cell, params).items()}
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
            raise ValueError(f"bias has shape {bias[0].shape}, expected {(2, *rows) if two else rows} for {cell}")
        params["bias_ih"], params["bias_hh"] = bias[0] if two else (bias[0], np.zeros_like(bias[0]))
    return {
        name: np.ascontiguousarray(reorder_gates(cell, array, "keras", "pytorch"))
        for name, array in _unprojected(cell, params).items()
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
    if len({tuple(sorted(params)) for params in directions}) > 1:
        raise ValueError("directions hold different parameters, expected the same names in both")
    parts = [
        {name: reorder_gates(cell, array, "pytorch", "onnx") for name, array in _unprojected(cell, params).items()}
        for params in directions
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
        params = dict(_unprojected(cell, params))
        parts.append({name: reorder_gates(cell, array, "onnx", "pytorch") for name, array in params.items()})
    return parts


def _unprojected(cell: str, params: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
    """Return `params` if they are those of an unprojected layer."""
    if cell not in GATES:
        raise ValueError(f"cell is {cell!r}, expected one of {_some(CELLS)}")
    if "weight_hr" in params:
        raise ValueError("params hold weight_hr: a projected LSTM exists neither in Keras nor in ONNX")
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

Select = Callable[[Mapping[str, Any], Mapping[str, Shape]], Iterable[str]]


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
        If it has another ending.
    ModuleNotFoundError
        For .safetensors without the package of that name.
    OSError
        If the file cannot be written.
    """
    path, kind = _path(path)
    text = json.dumps(dict(meta or {}))
    if kind == ".safetensors":
        data = _safetensors().numpy.save(dict(arrays), {_META: text})
        with _replacing(path) as stream:
            stream.write(data)
    else:
        with _replacing(path) as stream:
            entries: dict[str, Any] = {_META: np.array(text), **arrays}
            np.savez(stream, **entries)


def read(path: Path, select: Select | None = None) -> tuple[Params, dict[str, Any]]:
    """Read arrays from a .npz or .safetensors file that need not be trusted. Nothing in it is ever executed.

    Parameters
    ----------
    path : str or path
    select : callable, optional
        Called with the file's meta and the shapes of its arrays before any of them is read; it returns the names of
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
        opened = _Safetensors(path) if kind == ".safetensors" else _Npz(path, stream)
        with opened:
            names = list(opened.shapes) if select is None else select(opened.meta, opened.shapes)
            return {name: opened.read(name) for name in names}, opened.meta


class _Npz:
    """A .npz file as np.savez writes it: a zip of .npy files, whose headers are read before any data.

    np.load trusts what a header says about the size and allocates it; here it has to agree with the zip's own record.
    """

    def __init__(self, path: str, stream: IO[bytes]) -> None:
        self.path = path
        self.meta: dict[str, Any] = {}
        self.shapes: dict[str, Shape] = {}
        self._members: dict[str, tuple[zipfile.ZipInfo, np.dtype, bool, int]] = {}
        with self._explained():
            self._archive = zipfile.ZipFile(stream)
            for info in self._archive.infolist():
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
        with self._archive.open(info) as member:
            version = np.lib.format.read_magic(member)
            if version not in ((1, 0), (2, 0)):
                raise _Malformed(f"its entry {_some([name])} has the unknown .npy version {version}")
            one = version == (1, 0)
            header = np.lib.format.read_array_header_1_0 if one else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = header(member)
            offset = member.tell()
        if dtype.hasobject:
            raise _Malformed(f"its entry {_some([name])} holds pickled objects, which are never loaded")
        if any(length < 0 for length in shape) or _size(shape) * dtype.itemsize != info.file_size - offset:
            raise _Malformed(f"the header of its entry {_some([name])} does not agree with the entry's size")
        if name == _META:
            if dtype.kind != "U" or shape != () or dtype.itemsize > _META_BYTES:
                raise _Malformed(f"its entry {_META!r} is not a short text")
            self.meta = _parse_meta(np.frombuffer(self._bytes(info, offset), dtype)[0].item())
            return
        if dtype.kind != "f" or dtype.itemsize > 8:
            raise _Malformed(f"its entry {_some([name])} has dtype {dtype}, expected floats of 16, 32 or 64 bits")
        self._members[name] = (info, dtype, fortran, offset)
        self.shapes[name] = shape

    def _bytes(self, info: zipfile.ZipInfo, offset: int) -> bytes:
        with self._archive.open(info) as member:
            member.read(offset)
            return member.read()

    def read(self, name: str) -> np.ndarray:
        info, dtype, fortran, offset = self._members[name]
        with self._explained():
            flat = np.frombuffer(self._bytes(info, offset), dtype)
            array = flat.reshape(self.shapes[name], order="F" if fortran else "C")
            return np.asarray(array, dtype.newbyteorder("="), order="C")

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except _Malformed as error:
            raise ValueError(f"{self.path} cannot be loaded: {error}") from None
        except Exception as error:
            message = f"{self.path} cannot be loaded: it is not a whole .npz file ({type(error).__name__}: {error})"
            raise ValueError(message) from error


class _Safetensors:
    """A .safetensors file through the package of that name, which checks the header and never executes anything."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._package = _safetensors()
        with self._explained():
            self._file = self._package.safe_open(path, framework="numpy")
            self.meta = _parse_meta((self._file.metadata() or {}).get(_META, "{}"))
            self.shapes = {name: tuple(self._file.get_slice(name).get_shape()) for name in self._file.keys()}  # noqa: SIM118
            for name in self.shapes:
                kind = self._file.get_slice(name).get_dtype()
                if kind not in _KINDS:
                    raise _Malformed(f"its array {_some([name])} has dtype {kind}, expected one of {_some(_KINDS)}")

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
            text = (
                f"{self.path} cannot be loaded: it is not a whole .safetensors file ({type(error).__name__}: {error})"
            )
            raise ValueError(text) from error


class _Malformed(Exception):
    """What is wrong with a file, in words."""


def _parse_meta(text: str) -> dict[str, Any]:
    if len(text) > _META_BYTES:
        raise _Malformed(f"its entry {_META!r} is not a short text")
    try:
        meta = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _Malformed(f"its entry {_META!r} is not JSON ({error})") from None
    if not isinstance(meta, dict):
        raise _Malformed(f"its entry {_META!r} is not a JSON object")
    return meta


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
def _replacing(path: str) -> Iterator[IO[bytes]]:
    """Give a stream to a new file beside `path` that takes its place when all is written, and goes when it is not."""
    temporary = f"{path}.{secrets.token_hex(8)}.tmp"
    try:
        with open(temporary, "xb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.remove(temporary)
        raise
