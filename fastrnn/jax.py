"""JAX: lstm, gru and rnn as functions of arrays, under jit, grad, vmap, scan and shard_map.

>>> import jax
>>> from fastrnn.jax import init, lstm
>>> params = init("lstm", jax.random.key(0), 8, 16, num_layers=2)
>>> x = jax.numpy.zeros((20, 4, 8))  # time, batch, input
>>> output, (h, c) = lstm(x, None, params)
>>> output.shape, h.shape
((20, 4, 16), (2, 4, 16))
>>> gradients = jax.grad(lambda params: lstm(x, None, params)[0].sum())(params)
>>> gradients["weight_hh_l0"].shape
(64, 16)

They compute in float32 and float64 on the CPU, with as many threads as `fastrnn.set_num_threads` says. A mapped axis of
x or the state becomes a part of the batch; if the parameters are mapped, the layer runs once for each of them.

There are neither second nor forward-mode derivatives, and no arrays on other devices than the CPU: all of these raise
an exception.
"""

import atexit
import collections
import ctypes
import dataclasses
import functools
import itertools
import re
import threading
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

try:
    import jax
except ImportError as error:
    message = "fastrnn.jax needs JAX, and it cannot be imported: pip install 'fastrnn[jax]'"
    raise ImportError(message) from error

import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from fastrnn import backend as backends
from fastrnn import functional, stack
from fastrnn.kernels import xla
from fastrnn.stack import Spec
from fastrnn.weights import GATES, Architecture, compare_names, names_error

__all__ = ["gru", "init", "lstm", "rnn"]

Array = Any  # of JAX
Params = Mapping[str, Array]

INFER, TRAIN, BACKWARD = "infer", "train", "backward"


@dataclasses.dataclass(frozen=True)
class Call:
    """One pass through a stack of layers: all that its arrays do not tell, and so all that it is compiled for.

    The operands are x, the states, the parameters, the masks of dropout, lengths and reset, in this order and as far as
    they are there. Of the results, `INFER` gives the output and the last states, `TRAIN` besides what backward needs.
    `BACKWARD` takes, behind the others, the output, what was kept, and the gradients of the output and the last states;
    it gives the gradients of x, the states that were given, and the parameters.
    """

    kind: str
    spec: Spec
    layers: int
    given: bool  # whether there are initial states: else they are zeros
    dropout: bool
    lengths: bool
    reset: bool

    @property
    def states(self) -> int:
        return 2 if self.spec.cell == "lstm" else 1

    @functools.cached_property
    def counts(self) -> list[int]:
        """How many operands there are of each sort."""
        K, masks = self.layers * self.spec.directions, self.layers - 1 if self.dropout else 0
        forward = [1, self.states * self.given, K * self.spec.each, masks, int(self.lengths), int(self.reset)]
        backward = [1, self.layers - 1 + K, 1, self.states]
        return forward + backward if self.kind == BACKWARD else forward

    @functools.cached_property
    def slices(self) -> list[slice]:
        """Where the operands of each sort are."""
        ends = list(itertools.accumulate(self.counts))
        return [slice(end - count, end) for end, count in zip(ends, self.counts, strict=True)]

    @functools.cached_property
    def plain(self) -> bool:
        """Whether it is the least that there can be."""
        return self.kind == INFER and self.layers * self.spec.directions == 1 and not (self.lengths or self.reset)

    def split(self, operands: Sequence[Any]) -> list[Any]:
        """Return the operands of each sort."""
        return [operands[place] for place in self.slices]

    def batch_axes(self) -> list[int | None]:
        """Return where each operand of a forward pass has its batch; None: nowhere."""
        axes = [1, 1, None, 1, 0, 1]
        return [axis for axis, count in zip(axes, self.counts, strict=False) for _ in range(count)]

    def shapes(self, operands: Sequence[Any]) -> list[tuple[int, ...]]:
        """Return the shapes of the results."""
        (x,), states, params, *_ = self.split(operands)
        if self.kind == BACKWARD:
            return [array.shape for array in (x, *states, *params)]
        (T, B, _), (K, W, H) = x.shape, self.spec.sizes(params)
        last = [(K, B, size) for size in (W, H)[: self.states]]
        kept = self.spec.kept_shapes(1, 1, params) if self.kind == TRAIN else []
        return [(T, B, self.spec.directions * W), *last, *((T, B, shape[-1]) for shape in kept)]

    def text(self) -> str:
        """Return it as it stands in a compiled program, which JAX may keep on disk."""
        flags = self.given, self.dropout, self.lengths, self.reset
        return " ".join(map(str, (self.kind, *self.spec, self.layers, *map(int, flags))))


@functools.cache
def _parse(text: bytes) -> Call:
    kind, cell, *numbers = text.decode().split()
    each, directions, layers, *flags = map(int, numbers)
    return Call(kind, Spec(cell, each, directions), layers, *map(bool, flags))


# ---- on the other side: NumPy arrays in, NumPy arrays out


def _compute(call: Call, operands: Sequence[Any], prepared: list[Any]) -> Sequence[np.ndarray]:
    """Return the results of a pass, in any shape; `prepared` are the parameters in the backend's hands."""
    (x,), given, _, masks, lengths, reset, *others = call.split(operands)
    T, B, I = x.shape
    if call.plain:
        result = prepared[0].again(x.reshape(T * B, I), T, tuple(given) or None)
        if result is not None:
            return result[0], *result[1]
    rows = functional.check_lengths(lengths[0], T, B) if lengths else None, reset[0] if reset else None
    h, c = (*given, None, None)[:2]
    states = stack.initial(call.spec, prepared, h, c, B)
    if call.kind != BACKWARD:
        output, last, kept = stack.forward(call.spec, prepared, x, states, masks, rows, call.kind == TRAIN)
        return [output, *last, *kept]
    (output,), kept, (d_output,), d_last = others
    below = call.layers - 1
    tape = output, [*kept[:below], *[array.reshape(-1) for array in kept[below:]]]
    dx, d_states, d_params = stack.backward(call.spec, prepared, x, states, masks, tape, rows, d_output, d_last)
    return [dx, *d_states[: len(given)], *d_params]


def _call_back(call: Call, shapes: Sequence[jax.ShapeDtypeStruct], operands: Sequence[Array]) -> list[np.ndarray]:
    """Run a pass for `jax.pure_callback`."""
    arrays = [functional.contiguous(np.asarray(operand)) for operand in operands]
    results = _compute(call, arrays, stack.prepare(call.spec, call.split(arrays)[2]))
    return [result.reshape(like.shape) for result, like in zip(results, shapes, strict=True)]


# XLA gives the addresses of its arrays. From this buffer, which is all of the memory, NumPy makes arrays of them in no
# time; it begins at 1, for NumPy takes the address 0 for no buffer.
_MEMORY: Any = (ctypes.c_char * (1 << 62)).from_address(1)

# By XLA's numbers.
_DTYPES = {
    number: np.dtype(name)
    for number, name in {
        1: "bool", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "uint8", 7: "uint16", 8: "uint32", 9: "uint64",
        11: "float32", 12: "float64",
    }.items()
}  # fmt: skip

_REMEMBERED = 32  # stacks of layers
_stacks: dict[Any, list[Any]] = {}
_used: collections.Counter[int] = collections.Counter()  # how many passes use each, by its id
_lock = threading.Lock()
_thread = threading.local()


def _array(dtype: int, address: int, shape: Sequence[int]) -> np.ndarray:
    return np.ndarray(shape, _DTYPES[dtype], _MEMORY, (address or 1) - 1)


def _read(call: Call, count: int, table: list[int]) -> tuple[list[Any], list[Any]]:
    """Return the arrays of a table of dtypes, addresses, ranks and lengths, and the parameters in the backend's hands.

    These are to be given back to `_leave`.
    """
    where = call.slices[2]
    rows: list[Any] = []
    at = 0
    while at < len(table):
        end = at + 3 + table[at + 2]
        rows.append(table[at:end])
        at = end
    if count != call.slices[-1].stop:
        raise RuntimeError(f"{call} has {count} operands, expected {call.slices[-1].stop}")
    prepared = _enter(call.spec, rows[where])
    rows[where] = [None] * len(rows[where])
    return [row and _array(row[0], row[1], row[3:]) for row in rows], prepared


def _enter(spec: Spec, rows: list[list[int]]) -> list[Any]:
    """Return the parameters of these rows of the table in the backend's hands.

    They are those of an earlier call, where the parameters stood at the same places: the backend notices where the
    numbers have changed since then. XLA puts those of each training step somewhere else; so, once there are many, those
    of the same shapes move that were used least recently, with all the memory that they work in.
    """
    key = spec, *map(tuple, rows)
    with _lock:
        prepared = _stacks.pop(key, None)
        if prepared is None:
            params = [_array(row[0], row[1], row[3:]) for row in rows]
            if len(_stacks) >= _REMEMBERED:
                shapes = _shapes(key)
                old = next((k for k, one in _stacks.items() if not _used[id(one)] and _shapes(k) == shapes), None)
                oldest = _stacks.pop(next(iter(_stacks)) if old is None else old)
                prepared = None if old is None else oldest
            if prepared is None:
                prepared = stack.prepare(spec, params)
            else:
                for one, part in zip(prepared, spec.split(params), strict=True):
                    one.move(part)
        _stacks[key] = prepared  # the last again, so that the first is the one that was used least recently
        _used[id(prepared)] += 1
    return prepared


def _leave(prepared: list[Any]) -> None:
    """Note that a pass uses them no longer."""
    with _lock:
        _used[id(prepared)] -= 1
        if not _used[id(prepared)]:
            del _used[id(prepared)]


def _shapes(key: Any) -> tuple[Any, ...]:
    """Return what a key says besides addresses."""
    return key[0], *((dtype, lengths) for dtype, _, _, *lengths in key[1:])


def _serve(address: int, count: int, to: int) -> None:
    """Run a pass for XLA, whose table is at `address`, and write to `to` how it went."""
    try:
        if not hasattr(_thread, "known"):
            # Python forgets a thread of XLA's at the end of each call, and making its acquaintance takes ten times as
            # long as the call: say once more that it is here.
            ctypes.pythonapi.PyGILState_Ensure()
            _thread.known = True
        name, size, number, *table = _array(5, address, (count,)).tolist()
        call = _parse(ctypes.string_at(name, size))
        arrays, prepared = _read(call, number, table)
        try:
            for result, into in zip(_compute(call, arrays, prepared), arrays[number:], strict=True):
                into[...] = result if result.shape == into.shape else result.reshape(into.shape)
        finally:
            _leave(prepared)
        xla.answer(to, xla.DONE)
    except BaseException as error:
        code = next((code for kind, code in xla.CODES.items() if isinstance(error, kind)), xla.INTERNAL)
        xla.answer(to, code, f"fastrnn: {type(error).__name__}: {error}")


@functools.cache
def _native() -> bool:
    """Make the pass known to XLA, and return whether that went; else there is `jax.pure_callback`."""
    backends.load("cpu")  # here, and not on a thread of XLA's
    try:
        header = Path(jax.ffi.include_dir(), "xla", "ffi", "api", "c_api.h").read_text()
        if re.search(r"^#define XLA_FFI_API_MAJOR 0$", header, re.MULTILINE) is None:
            raise RuntimeError("XLA's foreign function interface is not of version 0")
        handler = jax.ffi.pycapsule(xla.make_handler(_serve))
        jax.ffi.register_ffi_target("fastrnn", handler, platform="cpu", api_version=1)
        atexit.register(jax.effects_barrier)  # what is to be printed still, before no call is let in any more
    except Exception as error:
        warnings.warn(f"fastrnn.jax takes jax.pure_callback, which is slower: {error}", stacklevel=2)
        return False
    return True


# ---- the primitive

_layer = Primitive("fastrnn")
_layer.multiple_results = True


def _bind(call: Call, operands: Sequence[Array]) -> list[Array]:
    return _layer.bind(*_vary(operands), call=call)


def _vary(operands: Sequence[Array]) -> list[Array]:
    """Return the operands of a `jax.shard_map` as varying along the same axes of the mesh, as JAX's own do."""
    if not hasattr(jax, "typeof"):  # before it kept account of that
        return list(operands)
    axes = [_varying(jax.typeof(operand)) for operand in operands]
    every = frozenset[str]().union(*axes)
    return [
        _cast(operand, tuple(every - own)) if every - own else operand
        for operand, own in zip(operands, axes, strict=True)
    ]


def _varying(kind: Any) -> frozenset[str]:
    """Return the axes of the mesh along which an array of this type varies."""
    manual = getattr(kind, "manual_axis_type", None)
    return frozenset(getattr(kind, "vma", ()) if manual is None else manual.varying)


def _cast(operand: Array, axes: tuple[str, ...]) -> Array:
    return jax.lax.pcast(operand, axes, to="varying") if hasattr(jax.lax, "pcast") else jax.lax.pvary(operand, axes)


@functools.cache
def _compiled(call: Call) -> Any:
    return jax.jit(functools.partial(_layer.bind, call=call))


@_layer.def_impl
def _eager(*operands: Array, call: Call) -> list[Array]:
    with jax.disable_jit(False):
        return _compiled(call)(*operands)


@_layer.def_abstract_eval
def _abstract(*operands: Any, call: Call) -> list[Any]:
    x, shapes = operands[0], call.shapes(operands)
    if not _varying(x):
        return [jax.core.ShapedArray(shape, x.dtype) for shape in shapes]
    # JAX has renamed how it says so several times: let one of its own functions do it.
    return jax.make_jaxpr(lambda x: [jnp.broadcast_to(x.sum(), shape) for shape in shapes])(x).out_avals


def _lower(context: Any, *operands: Any, call: Call) -> Any:
    if _native():
        return jax.ffi.ffi_lowering("fastrnn")(context, *operands, call=call.text())
    shapes = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in context.avals_out]

    def call_back(*operands: Array) -> list[Array]:
        return jax.pure_callback(lambda *arrays: _call_back(call, shapes, arrays), shapes, *operands)

    return mlir.lower_fun(call_back, multiple_results=True)(context, *operands)


def _refuse(context: Any, *operands: Any, call: Call) -> Any:
    raise NotImplementedError(
        "fastrnn.jax computes on the CPU only: put arrays there with jax.device_put(x, jax.devices('cpu')[0]), "
        "or set JAX_PLATFORMS=cpu"
    )


mlir.register_lowering(_layer, _refuse)
mlir.register_lowering(_layer, _lower, platform="cpu")


def _batch(operands: Sequence[Array], dims: Sequence[int | None], *, call: Call) -> tuple[list[Array], list[int]]:
    """Make a mapped axis a part of the batch, where the parameters are the same for all of it."""
    size, B = next(operand.shape[dim] for operand, dim in zip(operands, dims, strict=True) if dim is not None), 0
    axes = call.batch_axes()
    if call.kind == BACKWARD or any(d is not None and a is None for d, a in zip(dims, axes, strict=True)):
        return _batch_by_loop(operands, dims, call)
    folded = []
    for operand, dim, axis in zip(operands, dims, axes, strict=True):
        if axis is not None:
            operand = jnp.stack([operand] * size, axis) if dim is None else jnp.moveaxis(operand, dim, axis)
            shape = operand.shape
            B = shape[axis + 1]
            operand = operand.reshape(*shape[:axis], size * B, *shape[axis + 2 :])
        folded.append(operand)
    results = _bind(call, folded)
    return [r.reshape(r.shape[0], size, B, *r.shape[2:]) for r in results], [1] * len(results)


def _batch_by_loop(operands: Sequence[Array], dims: Sequence[int | None], call: Call) -> tuple[list[Array], list[int]]:
    mapped = [jnp.moveaxis(operand, d, 0) for operand, d in zip(operands, dims, strict=True) if d is not None]

    def one(parts: Sequence[Array]) -> list[Array]:
        rest = iter(parts)
        return _bind(call, [operand if d is None else next(rest) for operand, d in zip(operands, dims, strict=True)])

    results = jax.lax.map(one, mapped)
    return results, [0] * len(results)


batching.primitive_batchers[_layer] = _batch


def _differentiate(primals: Sequence[Array], tangents: Sequence[Any], *, call: Call) -> tuple[list[Array], list[Any]]:
    if call.kind != INFER:
        raise NotImplementedError(
            "fastrnn.jax has no second derivatives, nor forward-mode ones of a gradient: write the layer with "
            "jax.lax.scan where they are needed"
        )
    count = sum(call.counts[:3])
    fixed = primals[count:]
    given = [ad.instantiate_zeros(tangent) for tangent in tangents[:count]]
    return jax.jvp(lambda *operands: _with_gradient(call, operands, fixed), tuple(primals[:count]), tuple(given))


ad.primitive_jvps[_layer] = _differentiate


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _with_gradient(call: Call, operands: tuple[Array, ...], fixed: tuple[Array, ...]) -> list[Array]:
    return _bind(call, [*operands, *fixed])


def _keep(call: Call, operands: tuple[Array, ...], fixed: tuple[Array, ...]) -> tuple[list[Array], Any]:
    results = _bind(dataclasses.replace(call, kind=TRAIN), [*operands, *fixed])
    known = 1 + call.states
    return results[:known], (operands, fixed, results[:1], results[known:])


def _go_back(call: Call, residuals: Any, gradients: list[Array]) -> tuple[Any, ...]:
    operands, fixed, output, kept = residuals
    back = dataclasses.replace(call, kind=BACKWARD)
    return tuple(_bind(back, [*operands, *fixed, *output, *kept, *gradients])), None


_with_gradient.defvjp(_keep, _go_back)


# ---- what a user calls

_NAME = re.compile(r"(?:weight_ih|weight_hh|bias_ih|bias_hh|weight_hr)_l([0-9]{1,4})(_reverse)?")


def lstm(
    x: Array,
    state: tuple[Array, Array] | None,
    params: Params,
    *,
    lengths: Any = None,
    reset: Any = None,
    batch_first: bool = False,
    dropout: float | None = None,
    key: Array | None = None,
) -> tuple[Array, tuple[Array, Array]]:
    """Run long short-term memory over a batch of sequences; the formula is that of `fastrnn.LSTM`.

    Parameters
    ----------
    x : jax.Array
        (T, B, I), float32 or float64; (B, T, I) with `batch_first`; (T, I) for one sequence without a batch.
    state : tuple of jax.Array or None
        The initial (h, c), each (layers · directions, B, size), without B if x is without, the reverse direction of a
        layer behind the other; None for zeros.
    params : dict of str to jax.Array
        Parameters under PyTorch's names: "weight_ih_l0" (4·H, I), "weight_hh_l0" (4·H, H), "bias_ih_l0" and
        "bias_hh_l0" (4·H,), with "_l1" and so on for layers stacked on it, and "_reverse" behind these for the reverse
        direction; for a projection to P numbers "weight_hr_l0" (P, H). Gates in the order i f g o. There are as many
        layers, directions and biases as there are names. See `init`.
    lengths : (B,) integers, optional
        How many steps each row has, 0 to T, in any order; an integer if x is without B. The output is 0 beyond them,
        the last state is that of the row's last step, and the reverse direction starts there.
    reset : booleans, optional
        (T, B); (B, T) with `batch_first`; (T,) if x is without B. Where true, the row's state is zero before that step,
        in all layers and directions.
    batch_first : bool
        Whether x and the output are (B, T, size) in place of (T, B, size). The state is as it is.
    dropout : float, optional
        With what probability each element is set to zero that goes from one layer to the next.
    key : jax.Array, optional
        A random key, with `dropout` only.

    Returns
    -------
    output : jax.Array
        As x, with directions · H (or P) in place of I: the last layer's h of every step.
    state : tuple of jax.Array
        The last (h, c), as `state`.

    Raises
    ------
    TypeError
        If an argument is of the wrong kind or dtype.
    ValueError
        If a shape, a name or a value is wrong. Under ``jax.jit`` these two are raised when the function is traced; only
        wrong values of `lengths` that JAX computes are found later, and raise ValueError or
        ``jax.errors.JaxRuntimeError``.
    NotImplementedError
        For second derivatives, and on other devices than the CPU.

    Examples
    --------
    >>> params = init("lstm", jax.random.key(0), 3, 5, bidirectional=True)
    >>> x = jnp.ones((7, 4, 3))
    >>> output, (h, c) = jax.jit(lstm)(x, None, params, lengths=jnp.array([7, 2, 0, 5]))
    >>> output.shape, h.shape, c.shape
    ((7, 4, 10), (2, 4, 5), (2, 4, 5))
    >>> output, state = jax.vmap(lstm, in_axes=(1, None, None))(x, None, params)  # of functions of one sequence
    >>> output.shape
    (4, 7, 10)
    """
    output, (h, c) = _run("lstm", x, state, params, lengths, reset, batch_first, dropout, key)
    return output, (h, c)


def gru(
    x: Array,
    state: Array | None,
    params: Params,
    *,
    lengths: Any = None,
    reset: Any = None,
    batch_first: bool = False,
    dropout: float | None = None,
    key: Array | None = None,
    reset_after: bool = True,
) -> tuple[Array, Array]:
    """Run gated recurrent units over a batch of sequences; the formulas are those of `fastrnn.GRU`.

    Parameters
    ----------
    x, params, lengths, reset, batch_first, dropout, key
        As for `lstm`, with 3 gates in place of 4, in the order r z n, and without a projection.
    state : jax.Array or None
        The initial h, (layers · directions, B, H), without B if x is without; None for zeros.
    reset_after : bool
        Whether the reset gate acts behind the product with h, as PyTorch has it, or before it.

    Returns
    -------
    output, state : jax.Array
        The last layer's h of every step, and the last h of every layer.

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        As `lstm`.

    Examples
    --------
    >>> params = init("gru", jax.random.key(0), 3, 5)
    >>> output, h = gru(jnp.ones((7, 3)), None, params, reset_after=False)
    >>> output.shape, h.shape
    ((7, 5), (1, 5))
    """
    cell = "gru" if functional.check_flag("reset_after", reset_after) else "gru_reset_before"
    output, (h,) = _run(cell, x, state, params, lengths, reset, batch_first, dropout, key)
    return output, h


def rnn(
    x: Array,
    state: Array | None,
    params: Params,
    *,
    lengths: Any = None,
    reset: Any = None,
    batch_first: bool = False,
    dropout: float | None = None,
    key: Array | None = None,
    nonlinearity: str = "tanh",
) -> tuple[Array, Array]:
    """Run Elman's recurrent units over a batch of sequences; the formula is that of `fastrnn.RNN`.

    Parameters
    ----------
    x, params, lengths, reset, batch_first, dropout, key
        As for `lstm`, with 1 gate in place of 4, and without a projection.
    state : jax.Array or None
        The initial h, (layers · directions, B, H), without B if x is without; None for zeros.
    nonlinearity : str
        "tanh", "relu" or "sigmoid".

    Returns
    -------
    output, state : jax.Array
        The last layer's h of every step, and the last h of every layer.

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        As `lstm`.

    Examples
    --------
    >>> params = init("rnn", jax.random.key(0), 3, 5)
    >>> output, h = rnn(jnp.ones((4, 7, 3)), None, params, batch_first=True, nonlinearity="relu")
    >>> output.shape, h.shape
    ((4, 7, 5), (1, 4, 5))
    """
    if nonlinearity not in ("tanh", "relu", "sigmoid"):
        raise ValueError(f"nonlinearity is {nonlinearity!r}, expected 'tanh', 'relu' or 'sigmoid'")
    output, (h,) = _run(f"rnn_{nonlinearity}", x, state, params, lengths, reset, batch_first, dropout, key)
    return output, h


def init(
    cell: str,
    key: Array,
    input_size: int,
    hidden_size: int,
    *,
    num_layers: int = 1,
    bias: bool = True,
    bidirectional: bool = False,
    proj_size: int = 0,
    dtype: Any = np.float32,
) -> dict[str, Array]:
    """Draw the parameters of a stack of layers, from the uniform distribution in ±1/sqrt(hidden_size), as PyTorch does.

    Parameters
    ----------
    cell : str
        "lstm", "gru" or "rnn".
    key : jax.Array
        A random key.
    input_size, hidden_size, num_layers : int
    bias, bidirectional : bool
    proj_size : int
        The size of an LSTM's h if it is projected, less than hidden_size; 0 for no projection.
    dtype
        float32, or float64 where JAX has been told to have it.

    Returns
    -------
    dict of str to jax.Array
        As `lstm`, `gru` and `rnn` take them.

    Raises
    ------
    TypeError, ValueError
        If an argument is of the wrong kind, or out of range.

    Examples
    --------
    >>> params = init("gru", jax.random.key(0), 3, 5)
    >>> {name: array.shape for name, array in params.items()}
    {'weight_ih_l0': (15, 3), 'weight_hh_l0': (15, 5), 'bias_ih_l0': (15,), 'bias_hh_l0': (15,)}
    """
    if cell not in ("lstm", "gru", "rnn"):
        raise ValueError(f"cell is {cell!r}, expected 'lstm', 'gru' or 'rnn'")
    dtype = functional.check_dtype(dtype)
    if dtype == np.float64 and not jax.config.jax_enable_x64:
        raise ValueError("dtype is float64, which JAX has to be told first: jax.config.update('jax_enable_x64', True)")
    H, P = functional.check_integer("hidden_size", hidden_size, 1), functional.check_integer("proj_size", proj_size, 0)
    if P >= H or (P and cell != "lstm"):
        wanted = f"less than hidden_size = {H}, or 0" if cell == "lstm" else f"0: a {cell} has no projection"
        raise ValueError(f"proj_size is {P}, expected {wanted}")
    shapes = Architecture(
        "rnn_tanh" if cell == "rnn" else cell,
        functional.check_integer("input_size", input_size, 1),
        H,
        functional.check_integer("num_layers", num_layers, 1),
        functional.check_flag("bias", bias),
        functional.check_flag("bidirectional", bidirectional),
        P,
    ).shapes()
    bound, keys = H**-0.5, jax.random.split(key, len(shapes))
    return {
        name: jax.random.uniform(one, shape, dtype, -bound, bound)
        for one, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def _run(
    cell: str,
    x: Any,
    state: Any,
    params: Any,
    lengths: Any,
    reset: Any,
    batch_first: bool,
    dropout: float | None,
    key: Any,
) -> tuple[Array, list[Array]]:
    """Check everything, and return the output and the last states."""
    x = _check_array("x", x)
    if x.ndim not in (2, 3):
        raise ValueError(f"x has shape {x.shape}, expected (T, B, I), or (T, I) for one sequence without a batch")
    batched, first = x.ndim == 3, functional.check_flag("batch_first", batch_first) and x.ndim == 3
    architecture, arrays = _check_params(cell, params, x)
    if x.shape[-1] != architecture.input_size:
        raise ValueError(f"x has shape {x.shape}, expected a last axis of {architecture.input_size}: weight_ih_l0's I")
    states = _check_states(state, architecture, x, None if not batched else x.shape[0 if first else 1])
    lengths, reset = _check_lengths(lengths, x, batched, first), _check_reset(reset, x, batched, first)
    if not batched:
        x, states = x[:, None], [s[:, None] for s in states]
    elif first:
        x = jnp.swapaxes(x, 0, 1)
    masks = _masks(dropout, key, architecture, x)
    spec = Spec(cell, 2 + 2 * architecture.bias + (architecture.proj_size > 0), architecture.directions)
    optional = [array for array in (lengths, reset) if array is not None]
    layers, given = architecture.num_layers, bool(states)
    call = Call(INFER, spec, layers, given, bool(masks), lengths is not None, reset is not None)
    output, *last = _bind(call, [x, *states, *arrays, *masks, *optional])
    if not batched:
        return output[:, 0], [s[:, 0] for s in last]
    return jnp.swapaxes(output, 0, 1) if first else output, last


def _check_array(name: str, value: Any, like: Any = None) -> Array:
    """Return an array of numbers, of the dtype of x."""
    if not isinstance(value, (jax.Array, np.ndarray)):
        raise TypeError(f"{name} is a {type(value).__name__}, expected a JAX or NumPy array")
    array = jnp.asarray(value)
    if array.dtype not in functional.DTYPES:
        cast = f": cast it, {name}.astype(jnp.float32)" if array.dtype.kind != "c" else ""
        raise TypeError(f"{name} has dtype {array.dtype}, expected float32 or float64{cast}")
    if like is not None and array.dtype != like.dtype:
        raise TypeError(f"{name} has dtype {array.dtype}, expected that of x, {like.dtype}")
    return array


def _check_params(cell: str, params: Any, x: Array) -> tuple[Architecture, list[Array]]:
    """Return what the names and sizes say of the layers, and the parameters in their order."""
    if not isinstance(params, Mapping):
        raise TypeError(f"params is a {type(params).__name__}, expected a dict of names to arrays")
    found = {name: match for name in params if isinstance(name, str) and (match := _NAME.fullmatch(name))}
    missing = [name for name in ("weight_ih_l0", "weight_hh_l0") if name not in found]
    if missing:
        raise ValueError(f"params has no {' and no '.join(map(repr, missing))}, only {', '.join(map(repr, params))}")
    W_ih, W_hh = (_check_array(f"params[{name!r}]", params[name], x) for name in ("weight_ih_l0", "weight_hh_l0"))
    for name, array in (("weight_ih_l0", W_ih), ("weight_hh_l0", W_hh)):
        if array.ndim != 2 or array.shape[0] % GATES[cell] or not array.size:
            wanted = f"({GATES[cell]} * H, {'I' if name == 'weight_ih_l0' else 'H'})"
            raise ValueError(f"params[{name!r}] has shape {array.shape}, expected {wanted} for {cell}")
    architecture = Architecture(
        cell,
        W_ih.shape[1],
        W_ih.shape[0] // GATES[cell],
        1 + max(int(match[1]) for match in found.values()),
        any(name.startswith("bias") for name in found),
        any(match[2] for match in found.values()),
        W_hh.shape[1] if cell == "lstm" and any(name.startswith("weight_hr") for name in found) else 0,
    )
    shapes = architecture.shapes()
    missing, unexpected = compare_names(params, shapes)
    if missing or unexpected:
        raise names_error("params", missing, unexpected)
    arrays = [_check_array(f"params[{name!r}]", params[name], x) for name in shapes]
    for (name, shape), array in zip(shapes.items(), arrays, strict=True):
        if array.shape != shape:
            sizes = f"I = {architecture.input_size} and H = {architecture.hidden_size}"
            raise ValueError(f"params[{name!r}] has shape {array.shape}, expected {shape} for {cell} with {sizes}")
    return architecture, arrays


def _check_states(state: Any, architecture: Architecture, x: Array, B: int | None) -> list[Array]:
    """Return the initial states; none for zeros."""
    if state is None:
        return []
    sizes = architecture.state_sizes
    if len(sizes) == 2:
        functional.check_structure("state", state, 2)
    given = [(f"state[{i}]", part) for i, part in enumerate(state)] if len(sizes) == 2 else [("state", state)]
    states = [_check_array(name, value, x) for name, value in given]
    K = architecture.num_layers * architecture.directions
    for (name, _), array, size in zip(given, states, sizes, strict=True):
        shape = (K, size) if B is None else (K, B, size)
        if array.shape != shape:
            letters = "(layers * directions, size)" if B is None else "(layers * directions, B, size)"
            raise ValueError(f"{name} has shape {array.shape}, expected {letters} = {shape}")
    return states


def _check_lengths(lengths: Any, x: Array, batched: bool, first: bool) -> Array | None:
    """Return `lengths` as (B,); values that are not known yet are looked at where the work is done."""
    if lengths is None:
        return None
    T, B = x.shape[1 if first else 0], x.shape[0 if first else 1] if batched else None
    if not isinstance(lengths, jax.core.Tracer):
        return jnp.asarray(functional.check_lengths(lengths, T, B), jnp.int32)
    if lengths.dtype.kind not in "iu":
        raise TypeError(f"lengths has dtype {lengths.dtype}, expected integers")
    shape = () if B is None else (B,)
    if lengths.shape != shape:
        raise ValueError(f"lengths has shape {lengths.shape}, expected {shape}")
    return lengths.reshape(-1)


def _check_reset(reset: Any, x: Array, batched: bool, first: bool) -> Array | None:
    """Return `reset` as (T, B)."""
    if reset is None:
        return None
    shape, letters = (x.shape[:2], "(B, T)" if first else "(T, B)") if batched else (x.shape[:1], "(T,)")
    if not isinstance(reset, jax.core.Tracer):
        reset = jnp.asarray(functional.check_reset(reset, shape, letters))
    if reset.dtype != np.bool_:
        raise TypeError(f"reset has dtype {reset.dtype}, expected bool: reset.astype(bool)")
    if reset.shape != shape:
        raise ValueError(f"reset has shape {reset.shape}, expected {letters} = {shape}")
    if not batched:
        return reset[:, None]
    return jnp.swapaxes(reset, 0, 1) if first else reset


def _masks(dropout: Any, key: Any, architecture: Architecture, x: Array) -> list[Array]:
    """Draw what dropout multiplies by between layers."""
    if (dropout is None) != (key is None):
        raise ValueError(f"{'key' if dropout is None else 'dropout'} is given without the other, expected both or none")
    if dropout is None:
        return []
    if not isinstance(dropout, (int, float, np.floating)) or isinstance(dropout, bool):
        raise TypeError(f"dropout is a {type(dropout).__name__}, expected a number that is known before it is compiled")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is {dropout}, expected a probability of at least 0 and less than 1")
    below = architecture.num_layers - 1
    if dropout and not below:
        message = f"dropout is {dropout}, which does nothing for one layer: it acts between layers"
        warnings.warn(message, stacklevel=4)
    if not dropout or not below:
        return []
    shape = (*x.shape[:2], architecture.directions * architecture.output_size)
    kept = [jax.random.bernoulli(one, 1 - dropout, shape) for one in jax.random.split(key, below)]
    return [mask.astype(x.dtype) / (1 - dropout) for mask in kept]
