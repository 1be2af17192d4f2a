"""One layer in one direction: check everything, choose the backend, call it. Every error is raised here.

The letters: T time, B batch, I input size, H hidden size, P projection size, G gates; W = P or, without one, H is the
size of h and of the output. ``params`` has PyTorch's names and shapes (see `fastrnn.weights.cell_shapes`), ``state`` is
a tuple with h first: (h,), and (h, c) for the LSTM.
"""

import functools
import operator
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastrnn import backend as backends
from fastrnn.weights import CELLS, GATES, Params, Shape, cell_shapes

State = tuple[np.ndarray, ...]

DTYPES = (np.dtype(np.float32), np.dtype(np.float64))

_NAMES = tuple(cell_shapes("lstm", 1, 1, 1))


@dataclass(frozen=True, eq=False)
class Tape:
    """What `backward` needs of a `forward` in training. It may be used any number of times.

    It refers to what forward was given and returned, and copies none of it: backward has to see it as forward left it.
    """

    backend: Any
    tape: Any
    dtype: np.dtype
    output_shape: Shape
    state_shapes: tuple[Shape, ...]
    like: Any = None  # an array on a GPU, in whose kind results are given; None: NumPy's


def forward(
    cell: str,
    x: Any,
    params: Mapping[str, Any],
    state: Sequence[Any] | None = None,
    *,
    lengths: Any = None,
    reset: Any = None,
    reverse: bool = False,
    training: bool = False,
    recompute: bool = False,
    backend: str | None = None,
    output: np.ndarray | None = None,
    column: int = 0,
    recurrent_masks: Any = None,
) -> tuple[np.ndarray, State, Tape | None]:
    """Run one layer in one direction over a batch of sequences.

    The formulas are those of `fastrnn.RNN`, `fastrnn.LSTM` and `fastrnn.GRU`. Arrays are NumPy's; or x, params and
    state are all on one NVIDIA GPU, tensors of PyTorch, or arrays of CuPy, JAX or Numba: then the work is done there,
    on their library's current stream, and results are of the same kind. Nothing waits for it.

    Parameters
    ----------
    cell : str
        "rnn_tanh", "rnn_relu", "rnn_sigmoid", "lstm", "gru" or "gru_reset_before".
    x : numpy.ndarray
        (T, B, I), float32 or float64: all other arrays have its dtype. Any strides and byte order; never written.
    params : mapping of str to numpy.ndarray
        "weight_ih" (G·H, I), "weight_hh" (G·H, W); "bias_ih" and "bias_hh" (G·H,), both or neither; for a projected
        LSTM "weight_hr" (P, H). Gates in PyTorch's order: i f g o; r z n.
    state : tuple of numpy.ndarray, optional
        (h,), or (h, c) for "lstm": h (B, W), c (B, H). Zeros by default.
    lengths : (B,) integers, optional
        How many steps each row has, 0 to T, in any order; T by default. The output is 0 beyond them.
    reset : (T, B) booleans, optional
        Where true, the row's state is set to zero before that step.
    reverse : bool
        Walk from each row's last step to its first.
    training : bool
        Whether to return a tape for `backward`.
    recompute : bool
        Keep no activations but the output and a state now and then, and let `backward` run the forward pass again,
        piece by piece: the same gradients, to the last bit, for less memory and more time. Only with `training`.
    backend : str, optional
        "cpu" (the default), "reference" or "cuda"; see `fastrnn.backend.check`. Arrays on a GPU take "cuda".
    output : numpy.ndarray, optional
        (T, B, at least column + W), C-contiguous; of it ``[..., column : column + W]`` is written (is modified).
        So both directions of a layer, or several layers, share one buffer. By default a new (T, B, W).
    column : int
    recurrent_masks : numpy.ndarray, optional
        (B, W), or (G, B, W), one for each gate: what the previous h is multiplied by before W_hh, at every step the
        same. Drawn as dropout's masks they are the dropout of Gal and Ghahramani, arXiv 1512.05287, and Keras'
        ``recurrent_dropout``. Any values; no gradient goes back to them. What is carried past the product, GRU's z·h,
        is h as it is; "gru_reset_before" multiplies r·h. Not with "cuda".

    Returns
    -------
    output : numpy.ndarray
        (T, B, W), h of every step; or the buffer that was given.
    state : tuple of numpy.ndarray
        As `state`: after each row's last step (the first in time if `reverse`).
    tape : Tape or None
        None unless `training`.

    Raises
    ------
    TypeError
        If an argument is of the wrong kind or dtype.
    ValueError
        If a shape or a value is wrong.
    MemoryError
        If the result cannot fit into this machine's memory.
    NotImplementedError
        If recurrent_masks are for a GPU.
    ImportError, RuntimeError
        If a GPU is asked for, and a package, the driver or the GPU is missing: the message says which, and how to get
        it. All of them before anything is computed or written.

    Examples
    --------
    >>> import numpy as np
    >>> params = {"weight_ih": np.ones((4, 3)), "weight_hh": np.zeros((4, 4))}
    >>> output, (h,), tape = forward("rnn_relu", np.ones((2, 1, 3)), params)
    >>> output[:, 0]
    array([[3., 3., 3., 3.],
           [3., 3., 3., 3.]])

    Dropout at a rate of one half between the steps, one mask for all gates:

    >>> keep = np.random.default_rng(0).random((1, 4)) < 0.5
    >>> output, (h,), _ = forward("rnn_relu", np.ones((2, 1, 3)), params, recurrent_masks=keep / 0.5)
    """
    check_cell(cell)
    like = x if type(x) is not np.ndarray and backends.is_on_gpu(x) else None
    if like is not None:
        backend, x, params, state = _take_from_gpu(backend, x, params, state, output)
    backend = backends.check(backend)
    if recurrent_masks is not None and backend.startswith("cuda"):
        wanted = "None, or NumPy arrays and the backend 'cpu'"
        raise NotImplementedError(f"recurrent_masks is given with the backend {backend!r}, expected {wanted}")
    x = check_array("x", x, DTYPES, (None, None, None), "(T, B, I)")
    T, B, I = x.shape
    if I < 1:
        raise ValueError(f"x has shape {x.shape}, expected (T, B, I) with I of 1 or more")
    dtype = x.dtype.newbyteorder("=")
    params, H, P = _check_params(cell, params, I, dtype)
    W = P or H
    sizes = (W, H) if cell == "lstm" else (W,)
    if like is not None and state is None:
        state = backends.load(backend).zeros(x, [(B, size) for size in sizes])
    state = _check_state(state, B, sizes, dtype)
    # An argument of the backends that have it.
    masks = {} if recurrent_masks is None else {"recurrent_masks": _check_masks(recurrent_masks, cell, B, W, dtype)}
    lengths = check_lengths(lengths, T, B)
    reset = check_reset(reset, (T, B), "(T, B)")
    reverse = check_flag("reverse", reverse)
    training = check_flag("training", training)
    recompute = check_recompute(recompute, training)
    column = check_integer("column", column, 0)
    if output is not None:
        _check_output(output, T, B, W, column, dtype)
    elif column:
        raise ValueError(f"column is {column} without an output, expected 0")
    items = 0 if output is not None else T * B * W
    items += T * B * (GATES[cell] + len(sizes)) * H if training and not recompute else 0
    if like is None:
        what = f"{cell} forward with T = {T}, B = {B}, I = {I} and H = {H}"
        check_memory(items * dtype.itemsize + copied_bytes(x), what)
    x = contiguous(x)
    if output is not None:
        _check_overlap(output, {"x": x, "state": state, **params, **masks})
    kernels = backends.load(backend)
    result, last, tape = kernels.forward(
        cell,
        x,
        params,
        state,
        lengths=lengths,
        reset=reset,
        reverse=reverse,
        training=training,
        recompute=recompute,
        output=output,
        column=column,
        **masks,
    )
    if like is not None:
        result, *last = kernels.give([result, *last], like)
    if not training:
        return result, tuple(last), None
    return result, tuple(last), Tape(kernels, tape, dtype, (T, B, W), tuple((B, size) for size in sizes), like)


def backward(
    tape: Tape, d_output: np.ndarray | None = None, d_state: Sequence[np.ndarray | None] | None = None
) -> tuple[np.ndarray, Params, State]:
    """Return the gradients of all that a `forward` was given.

    Parameters
    ----------
    tape : Tape
        What ``forward(..., training=True)`` returned.
    d_output : numpy.ndarray, optional
        (T, B, W), the gradient of what forward wrote. Zero by default.
    d_state : tuple of numpy.ndarray, optional
        The gradient of the final state, as `state`; an entry may be None for zero.

    Returns
    -------
    dx : numpy.ndarray
        (T, B, I); 0 beyond a row's length.
    dparams : dict of str to numpy.ndarray
        As `params`.
    dstate : tuple of numpy.ndarray
        The gradient of the initial state, as `state`.

    Raises
    ------
    TypeError
        If an argument is of the wrong kind or dtype.
    ValueError
        If a shape is wrong, or there is no gradient at all.

    Examples
    --------
    >>> import numpy as np
    >>> params = {"weight_ih": np.ones((4, 3)), "weight_hh": np.zeros((4, 4))}
    >>> output, state, tape = forward("rnn_relu", np.ones((2, 1, 3)), params, training=True)
    >>> dx, dparams, (dh,) = backward(tape, np.ones((2, 1, 4)))
    >>> dparams["weight_ih"]
    array([[2., 2., 2.],
           [2., 2., 2.],
           [2., 2., 2.],
           [2., 2., 2.]])
    """
    if not isinstance(tape, Tape):
        raise TypeError(f"tape is {_a(tape)}, expected what forward(..., training=True) returned")
    if tape.like is not None:
        d_output, d_state = _take_gradients_from_gpu(tape, d_output, d_state)
    if d_output is not None:
        d_output = contiguous(check_array("d_output", d_output, (tape.dtype,), tape.output_shape, "(T, B, W)"))
    if d_state is not None:
        check_structure("d_state", d_state, len(tape.state_shapes))
        d_state = tuple(
            None
            if value is None
            else contiguous(check_array(f"d_state[{i}]", value, (tape.dtype,), shape, "(B, size)"))
            for i, (value, shape) in enumerate(zip(d_state, tape.state_shapes, strict=True))
        )
    check_any_gradient(d_output, d_state)
    dx, dparams, dstate = tape.backend.backward(tape.tape, d_output, d_state)
    if tape.like is not None:
        dx, *dstate = tape.backend.give([dx, *dstate], tape.like)
        dparams = dict(zip(dparams, tape.backend.give(list(dparams.values()), tape.like), strict=True))
    return dx, dparams, tuple(dstate)


def _take_from_gpu(backend: Any, x: Any, params: Any, state: Any, output: Any) -> tuple[str, Any, Any, Any]:
    """Return the backend's name, and x, params and state as buffers that share the arrays' memory."""
    name = "cuda" if backend is None else backends.check(backend)
    if not name.startswith("cuda"):
        raise ValueError(f"backend is {name!r} and x is on a GPU, expected 'cuda'")
    if output is not None:
        raise TypeError("output is given and x is on a GPU, expected None: results are new arrays there")
    kernels = backends.load(name)
    x = kernels.take("x", x)
    if isinstance(params, Mapping):
        params = {key: kernels.take(f"params[{key!r}]", value, x) for key, value in params.items()}
    if isinstance(state, (tuple, list)):
        state = tuple(kernels.take(f"state[{i}]", value, x) for i, value in enumerate(state))
    return name, x, params, state


def _take_gradients_from_gpu(tape: Tape, d_output: Any, d_state: Any) -> tuple[Any, Any]:
    """Return them as buffers."""
    take = tape.backend.take
    if d_output is not None:
        d_output = take("d_output", d_output)
    if isinstance(d_state, (tuple, list)):
        d_state = tuple(None if part is None else take(f"d_state[{i}]", part) for i, part in enumerate(d_state))
    return d_output, d_state


# The checks, which the layers share.


def check_array(
    name: str,
    value: Any,
    dtypes: Sequence[np.dtype],
    shape: tuple[int | None, ...],
    letters: str,
) -> np.ndarray:
    """Return `value`, an array of one of the dtypes in any byte order and of the shape, where None is any length.

    `letters` tells what the shape means, for the message.
    """
    if type(value) is not np.ndarray and not getattr(value, "is_buffer", False):  # what the usual argument is
        if not isinstance(value, np.ndarray):
            raise TypeError(f"{name} is {_a(value)}, expected a NumPy array of {_or(dtypes)} and shape {letters}")
        if isinstance(value, np.ma.MaskedArray):
            raise TypeError(f"{name} is a masked array, expected one without a mask: see its method filled()")
    if value.dtype not in dtypes and value.dtype.newbyteorder("=") not in dtypes:
        raise TypeError(_dtype_message(name, value.dtype, dtypes))
    if value.shape != shape and not _fits(value.shape, shape):
        sizes = ", ".join("any" if length is None else str(length) for length in shape)
        raise ValueError(f"{name} has shape {value.shape}, expected {letters} = ({sizes}{',' * (len(shape) == 1)})")
    return value


def is_array(value: Any) -> bool:
    """Whether `value` is a NumPy array, or the buffer of an array on a GPU."""
    return isinstance(value, np.ndarray) or getattr(value, "is_buffer", False)


def _fits(given: Shape, shape: tuple[int | None, ...]) -> bool:
    if len(given) != len(shape):
        return False
    for length, expected in zip(given, shape, strict=True):  # noqa: SIM110 (all() takes half a microsecond more)
        if length != expected and expected is not None:
            return False
    return True


def contiguous(array: np.ndarray) -> np.ndarray:
    """Return the array as a backend takes it, a copy only where it has to be: contiguous, aligned, native, plain."""
    if type(array) is np.ndarray:
        flags = array.flags
        if flags.c_contiguous and flags.aligned and array.dtype.isnative:
            return array
    elif getattr(array, "is_buffer", False):  # on a GPU
        return array
    return np.require(np.asarray(array), array.dtype.newbyteorder("="), ("C", "A"))


def copied_bytes(array: np.ndarray) -> int:
    """Return how many bytes `contiguous` allocates for the array."""
    flags = array.flags
    return 0 if flags.c_contiguous and flags.aligned and array.dtype.isnative else array.nbytes


def check_structure(name: str, value: Any, length: int) -> None:
    """Check that a state is a tuple or a list of `length` arrays, whatever they are."""
    wanted = "a tuple (h, c)" if length == 2 else "a tuple (h,)"
    if not isinstance(value, (tuple, list)):
        raise TypeError(f"{name} is {_a(value)}, expected {wanted}")
    if len(value) != length:
        raise ValueError(f"{name} has {len(value)} entries, expected {wanted}")


def check_lengths(lengths: Any, T: int, B: int | None) -> np.ndarray | None:
    """Return `lengths` as new int64 (B,), or None. For one sequence without a batch, B is None, it is an integer."""
    if lengths is None:
        return None
    shape = () if B is None else (B,)
    wanted = "an integer" if B is None else f"B = {B} integers"
    try:
        array = np.asarray(lengths)
    except (TypeError, ValueError) as error:
        raise TypeError(f"lengths cannot be read as an array, expected {wanted}: {error}") from error
    if array.size == 0 and isinstance(lengths, (list, tuple)):
        array = array.astype(np.int64)  # [] is float64 otherwise
    if array.dtype.kind not in "iu":
        raise TypeError(f"lengths has dtype {array.dtype}, expected {wanted}")
    if array.shape != shape:
        raise ValueError(f"lengths has shape {array.shape}, expected {shape}: {wanted}")
    if array.size and (array.min() < 0 or array.max() > T):
        wrong = int(np.argmax((array < 0) | (array > T)))
        place = "" if B is None else f"[{wrong}]"
        raise ValueError(f"lengths{place} is {array.reshape(-1)[wrong]}, expected 0 to T = {T}")
    return np.array(array.reshape(-1), np.int64)  # a copy: the tape's must stay as they were checked


def check_reset(reset: Any, shape: Shape, letters: str) -> np.ndarray | None:
    """Return `reset` as a new boolean array of the shape, or None."""
    if reset is None:
        return None
    try:
        array = np.asarray(reset)
    except (TypeError, ValueError) as error:
        raise TypeError(f"reset cannot be read as an array of booleans: {error}") from error
    if array.size == 0 and isinstance(reset, (list, tuple)):
        array = array.astype(np.bool_)
    if array.dtype != np.bool_:
        raise TypeError(f"reset has dtype {array.dtype}, expected bool: see its method astype(bool)")
    if array.shape != shape:
        raise ValueError(f"reset has shape {array.shape}, expected {letters} = {shape}")
    return np.array(array, order="C", subok=False)  # a copy, likewise


def check_any_gradient(d_output: Any, d_state: Any) -> None:
    """Check that there is a gradient to go back with."""
    if d_output is None and (d_state is None or all(value is None for value in d_state)):
        raise ValueError("d_output and d_state are both None, expected a gradient in at least one of them")


def check_memory(size: int, what: str) -> None:
    """Raise MemoryError if that many bytes cannot fit into this machine's memory, however free it is."""
    if size > _memory():
        raise MemoryError(f"{what} needs {_bytes(size)} of memory, and this machine has {_bytes(_memory())}")


def check_cell(cell: Any) -> str:
    if not isinstance(cell, str):
        raise TypeError(f"cell is {_a(cell)}, expected one of {_or(CELLS)}")
    if cell not in GATES:
        raise ValueError(f"cell is {cell!r}, expected one of {_or(CELLS)}")
    return cell


def check_dtype(dtype: Any) -> np.dtype:
    try:
        known = None if dtype is None else np.dtype(dtype)
    except (TypeError, ValueError):
        known = None
    if known is None or known not in DTYPES:  # NumPy takes None for float64
        raise TypeError(f"dtype is {dtype!r}, expected float32 or float64")
    return known


def check_integer(name: str, value: Any, minimum: int) -> int:
    """Return `value` as a Python int. A bool is not a number here: it is an argument in the wrong place."""
    if isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} is {value!r}, expected an integer of {minimum} or more")
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} is {_a(value)}, expected an integer of {minimum} or more") from None
    if number < minimum:
        raise ValueError(f"{name} is {number}, expected an integer of {minimum} or more")
    return number


def check_flag(name: str, value: Any) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} is {_a(value)}, expected True or False")
    return bool(value)


def check_recompute(recompute: Any, training: bool) -> bool:
    recompute = check_flag("recompute", recompute)
    if recompute and not training:
        raise ValueError("recompute is True without training: there is no backward pass that could compute again")
    return recompute


def check_names(name: str, values: Any) -> list[Any]:
    """Return the values as a list: a single string is not the list of its letters."""
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise TypeError(f"{name} is {_a(values)}, expected a list of names")
    return list(values)


def _check_params(cell: str, params: Any, I: int, dtype: np.dtype) -> tuple[Params, int, int]:
    """Return the parameters as a backend takes them, H and P (0 without a projection)."""
    if not isinstance(params, Mapping):
        raise TypeError(f"params is {_a(params)}, expected a dict of names to arrays")
    known = _NAMES if cell == "lstm" else _NAMES[:4]
    missing = [name for name in known[:2] if name not in params]
    if ("bias_ih" in params) != ("bias_hh" in params):
        missing.append("bias_ih" if "bias_hh" in params else "bias_hh")
    if missing:
        raise ValueError(f"params has no {_or(missing)}, which {cell} needs")
    unexpected = [name for name in params if name not in known]
    if unexpected:
        raise ValueError(f"params has {_or(unexpected)}, which {cell} does not: expected {_or(known)}")
    projected = "weight_hr" in params
    name, letters = ("weight_hr", "(P, H)") if projected else ("weight_hh", "(G * H, H)")
    P, H = check_array(f"params[{name!r}]", params[name], (dtype,), (None, None), letters).shape
    P = P if projected else 0
    if H < 1 or (projected and P < 1):
        raise ValueError(f"params[{name!r}] has shape {params[name].shape}, expected sizes of 1 or more")
    shapes = cell_shapes(cell, I, H, P, "bias_ih" in params)
    letters = f"the shape for I = {I} and H = {H}"
    checked = {
        name: contiguous(check_array(f"params[{name!r}]", params[name], (dtype,), shape, letters))
        for name, shape in shapes.items()
    }
    return checked, H, P


def _check_state(state: Any, B: int, sizes: tuple[int, ...], dtype: np.dtype) -> State:
    if state is None:
        return tuple(np.zeros((B, size), dtype) for size in sizes)
    check_structure("state", state, len(sizes))
    return tuple(
        _check_part(f"state[{i}]", value, (B, size), dtype)
        for i, (value, size) in enumerate(zip(state, sizes, strict=True))
    )


def _check_part(name: str, value: Any, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    return contiguous(check_array(name, value, (dtype,), shape, "(B, size)"))


def _check_masks(masks: Any, cell: str, B: int, W: int, dtype: np.dtype) -> np.ndarray:
    shape: Shape = (B, W)
    letters = "(G, B, W) or (B, W)"
    if getattr(masks, "ndim", 2) == 3:
        shape, letters = (GATES[cell], B, W), "(B, W) or (G, B, W)"
    return contiguous(check_array("recurrent_masks", masks, (dtype,), shape, letters))


def _check_output(output: Any, T: int, B: int, W: int, column: int, dtype: np.dtype) -> None:
    check_array("output", output, (dtype,), (T, B, None), "(T, B, at least column + W)")
    if output.shape[2] < column + W:
        wanted = f"at least column + W = {column} + {W} = {column + W} columns"
        raise ValueError(f"output has shape {output.shape}, expected {wanted}")
    flags = output.flags
    if not (type(output) is np.ndarray and flags.carray and output.dtype.isnative):
        raise ValueError(
            "output is strided, misaligned, read-only or of foreign byte order, expected a plain new array"
        )


def _check_overlap(output: np.ndarray, others: Mapping[str, Any]) -> None:
    for name, value in others.items():
        for array in value if isinstance(value, tuple) else (value,):
            if np.may_share_memory(output, array):  # exact: all of them are contiguous
                raise ValueError(f"output shares memory with {name}, expected memory of its own")


def _dtype_message(name: str, dtype: np.dtype, dtypes: Sequence[np.dtype]) -> str:
    message = f"{name} has dtype {dtype}, expected {_or(dtypes)}"
    if dtype.kind == "c":
        return message + ": complex numbers are not supported"
    if dtype.kind in "fiub" or dtype.name.startswith(("bfloat", "float")):
        return message + f": cast it, {name}.astype(np.{dtypes[0]})"
    return message


def _a(value: Any) -> str:
    """Name a value's type, and the value itself where that is short and helps."""
    if value is None or isinstance(value, (bool, int, float, str)):
        text = repr(value)
        return text if len(text) <= 60 else text[:57] + "..."
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiouAEIOU' or name == 'ndarray' else 'a'} {name}"


def _or(values: Iterable[Any]) -> str:
    names = [repr(value) if isinstance(value, str) else str(value) for value in values]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"


def _bytes(size: int) -> str:
    """Write a number of bytes for people, whatever its size."""
    units = ("bytes", "KiB", "MiB", "GiB", "TiB")
    power = min(len(units) - 1, max(0, (size.bit_length() - 4) // 10))
    return f"{size // 1024**power} {units[power]}"


@functools.cache
def _memory() -> int:
    """Return this machine's memory in bytes, or what an address can reach where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return sys.maxsize
