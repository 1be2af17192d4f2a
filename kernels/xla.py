"""A function for XLA to call: it reads what XLA hands over and asks Python to do the work.

XLA's foreign function interface hands over a call frame: C structs, declared in ``xla/ffi/api/c_api.h``, which comes
with jaxlib. Each begins with its size, and grows at its end only as long as the interface's major version stays 0. The
offsets stand below in bytes, on a machine with 64 bits.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import time

import numpy as np
from llvmlite import binding, ir
from numba import njit
from numba.core import types
from numba.extending import intrinsic

from fastrnn.kernels import cached

# XLA_FFI_CallFrame, in which XLA_FFI_Args, _Rets and _Attrs stand one behind the other
FRAME_BYTES, EXTENSION, API, STAGE, ARGS, RETS, ATTRS = 168, 8, 16, 32, 40, 80, 120
EXECUTE = 3
# each of these three; attributes have names before their values
LIST_BYTES, COUNT, KINDS, VALUES = 40, 16, 24, 32
ATTRS_BYTES, ATTR_VALUES = 48, 40
BUFFER, STRING = 1, 4
# XLA_FFI_Buffer
BUFFER_BYTES, DTYPE, DATA, RANK, DIMS = 48, 16, 24, 32, 40
# XLA_FFI_Api
API_BYTES, MAJOR, ERROR_CREATE = 56, 32, 48
# XLA_FFI_Extension_Base, XLA_FFI_Metadata_Extension, XLA_FFI_Metadata
EXTENSION_KIND, METADATA_KIND, METADATA, VERSION = 8, 1, 24, 24
# XLA_FFI_Error_Create_Args
ERROR_BYTES, ERROR_TEXT, ERROR_CODE = 28, 16, 24

DONE = -1  # Python's answer; else an error's code
CODES = {ValueError: 3, MemoryError: 8, NotImplementedError: 12}
INTERNAL = 13
TEXT_BYTES = 2048  # of an error's message
SERVE, STATE = "fastrnn_xla_serve", "fastrnn_xla_state"  # symbols
INSIDE, ENDING = 0, 1  # of the state: how many calls are in Python's hands, and whether none may come in any more


def _words(text: str) -> np.ndarray:
    return np.frombuffer(text.encode().ljust(len(text) // 8 * 8 + 8, b"\0"), np.int64)


UNFIT = _words("fastrnn: XLA's call frame is not that of interface 0.x with one string and arrays")
SILENT = _words("fastrnn: the pass ended without telling how")
LATE = _words("fastrnn: Python is ending")


@intrinsic
def _load(typingctx, address, like):
    """The number at an address, of the type of `like`."""

    def emit(context, builder, sig, args):
        return builder.load(builder.inttoptr(args[0], context.get_value_type(sig.return_type).as_pointer()))

    return like(types.int64, like), emit


@intrinsic
def _store(typingctx, address, number):
    def emit(context, builder, sig, args):
        builder.store(args[1], builder.inttoptr(args[0], args[1].type.as_pointer()))
        return context.get_dummy_value()

    return types.void(types.int64, number), emit


@intrinsic
def _call(typingctx, function, argument):
    """What the C function at an address returns."""

    def emit(context, builder, sig, args):
        word = ir.IntType(64)
        return builder.call(builder.inttoptr(args[0], ir.FunctionType(word, [word]).as_pointer()), [args[1]])

    return types.int64(types.int64, types.int64), emit


@intrinsic
def _state(typingctx):
    """Where the state is."""

    def emit(context, builder, sig, args):
        word, module = ir.IntType(64), builder.module
        place = module.globals.get(STATE) or ir.GlobalVariable(module, word, STATE)
        return builder.ptrtoint(place, word)

    return types.int64(), emit


@intrinsic
def _add(typingctx, address, number):
    """Add to the number at an address, which other threads add to as well."""

    def emit(context, builder, sig, args):
        place = builder.inttoptr(args[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", place, args[1], "seq_cst")

    return types.int64(types.int64, types.int64), emit


@njit(inline="always")
def _word(address):
    return _load(address, np.int64(0))


@njit(inline="always")
def _int(address):
    return _load(address, np.int32(0))


@njit
def _knows(frame):
    """Whether it is a frame of an interface of this major version."""
    api = _word(frame + API)
    return _word(frame) >= FRAME_BYTES and api != 0 and _word(api) >= API_BYTES and _int(api + MAJOR) == 0


@njit
def _fits(frame):
    """Whether the structs in it are what is read here."""
    lists = min(_word(frame + ARGS), _word(frame + RETS))
    return lists >= LIST_BYTES and _word(frame + ATTRS) >= ATTRS_BYTES


@njit
def _size(frame):
    """How many numbers describe the buffers; less than 0 if there is something else among them."""
    count = 0
    for group in (ARGS, RETS):
        for i in range(_word(frame + group + COUNT)):
            buffer = _word(_word(frame + group + VALUES) + 8 * i)
            if _int(_word(frame + group + KINDS) + 4 * i) != BUFFER or _word(buffer) < BUFFER_BYTES:
                return -1
            count += 3 + _word(buffer + RANK)
    return count


@njit
def _fill(frame, table):
    """Write the attribute, how many arguments there are, and dtype, address, rank and lengths of each buffer."""
    span = _word(_word(frame + ATTRS + ATTR_VALUES))
    table[0], table[1], table[2] = _word(span), _word(span + 8), _word(frame + ARGS + COUNT)
    at = 3
    for group in (ARGS, RETS):
        for i in range(_word(frame + group + COUNT)):
            buffer = _word(_word(frame + group + VALUES) + 8 * i)
            rank = _word(buffer + RANK)
            table[at], table[at + 1], table[at + 2] = _int(buffer + DTYPE), _word(buffer + DATA), rank
            for d in range(rank):
                table[at + 3 + d] = _word(_word(buffer + DIMS) + 8 * d)
            at += 3 + rank


@njit
def _fail(frame, text, code):
    """An error of XLA's."""
    arguments = np.zeros(4, np.int64)
    arguments[0], arguments[ERROR_TEXT // 8], arguments[ERROR_CODE // 8] = ERROR_BYTES, text.ctypes.data, code
    # Numba frees an array behind its last use, and so there is one behind the call.
    arguments[1] = _call(_word(_word(frame + API) + ERROR_CREATE), arguments.ctypes.data)
    return arguments[1]


_serve = types.ExternalFunction(SERVE, types.void(types.int64, types.int64, types.int64))


def _handle(frame):
    extension = _word(frame + EXTENSION)
    if extension != 0 and _int(extension + EXTENSION_KIND) == METADATA_KIND:
        # Made for the version that is there, if it is one of these; else for one that XLA refuses. Old ones ask
        # without saying which they are.
        version = 0 if _word(frame + API) == 0 else _word(_word(frame + API) + MAJOR) if _knows(frame) else -1
        _store(_word(extension + METADATA) + VERSION, version)
        return 0
    if not (_knows(frame) and _fits(frame)):
        return _fail(frame, UNFIT, INTERNAL)
    if _int(frame + STAGE) != EXECUTE:
        return 0
    size = _size(frame)
    if size < 0 or _word(frame + ATTRS + COUNT) != 1 or _int(_word(frame + ATTRS + KINDS)) != STRING:
        return _fail(frame, UNFIT, INTERNAL)
    _add(_state() + 8 * INSIDE, 1)
    if _add(_state() + 8 * ENDING, 0):
        _add(_state() + 8 * INSIDE, -1)
        return _fail(frame, LATE, INTERNAL)
    memory = np.zeros(1 + TEXT_BYTES // 8 + 3 + size, np.int64)  # the answer, an error's text, and the table
    text, table = memory[1 : 1 + TEXT_BYTES // 8], memory[1 + TEXT_BYTES // 8 :]
    _fill(frame, table)
    _serve(table.ctypes.data, len(table), memory.ctypes.data)
    _add(_state() + 8 * INSIDE, -1)
    code = memory[0]
    if code == DONE:
        return 0
    if code == 0:  # there was an exception that nothing caught
        return _fail(frame, SILENT, INTERNAL)
    return _fail(frame, text, code)


_kept: list = []  # what XLA and the compiled code refer to


def make_handler(serve) -> ctypes.c_void_p:
    """The address of an XLA_FFI_Handler that calls `serve`.

    `serve` is given the address and the length of a table of integers: where a string is, and its length; how many
    arguments there are; and of each argument and result its dtype, by XLA's number, its address, its rank, and as many
    lengths. Its third argument is where it calls :func:`answer`: what it returns would be anything after an exception.
    """
    word = ctypes.c_int64
    callback = ctypes.CFUNCTYPE(None, word, word, word)(serve)
    state = np.zeros(2, np.int64)
    binding.add_symbol(SERVE, ctypes.cast(callback, ctypes.c_void_p).value)
    binding.add_symbol(STATE, state.ctypes.data)
    handler = cached.callback(types.int64(types.int64))(_handle)
    _kept.extend([callback, state, handler])
    atexit.register(_end, state, os.getpid())
    return ctypes.c_void_p(handler.address)


def answer(address, code, text=""):
    """Tell the handler how the call went: DONE, or an error's code and text."""
    if text:
        data = text.encode(errors="replace")[: TEXT_BYTES - 1] + b"\0"
        ctypes.memmove(address + 8, data, len(data))
    ctypes.c_int64.from_address(address).value = code


def _end(state, process):
    """Let no call in any more: XLA's threads do not return from a Python that is ending, and XLA waits for them."""
    if process == os.getpid():  # and not a forked child's
        state[ENDING] = 1
        while state[INSIDE]:
            time.sleep(1e-4)
