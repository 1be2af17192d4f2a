"""Every call of a CPU kernel looked at before it is made: for tests, where FASTRNN_CHECK_CALLS is 1.

A compiled kernel believes what it is told. It is called by its address, with arguments of the types that it was
compiled for, and takes from a record where some of the arrays are. A wrong type, or the address of an array that has
gone, writes into somebody else's memory, and what comes of it is seen much later. Here both are errors at once.
"""

from __future__ import annotations

import functools
import os
import weakref

import numpy as np
from numba import typeof
from numba.core import types

ENABLED = os.environ.get("FASTRNN_CHECK_CALLS", "0") not in ("", "0")

_owners: dict[int, weakref.ref] = {}  # by address, the array that owns the memory there


def note(array: np.ndarray, address: int) -> int:
    """`address`, which a record is about to hold: that of `array`."""
    if ENABLED:
        while isinstance(array.base, np.ndarray):
            array = array.base
        _owners[address] = weakref.ref(array)
    return address


def _is_alive(address: int) -> bool:
    owner = _owners.get(address)
    return owner is not None and owner() is not None


def check_addresses(record: np.ndarray, fields) -> None:
    """Raise if one of the addresses in a record is not that of a live array; 0 is none."""
    for field in fields:
        for address in np.atleast_1d(record[field]).ravel().tolist():
            if address and not _is_alive(address):
                raise AssertionError(f"{field} is the address {address:#x}, where no array of a caller's is alive")


def form(typ):
    """A type by what a compiled function makes of an argument: flags of an array are not part of it."""
    if isinstance(typ, types.Array):
        return f"array({typ.dtype}, {typ.ndim}d)"
    if isinstance(typ, types.BaseNamedTuple):
        return typ.instance_class.__name__, *map(form, typ.types)
    if isinstance(typ, types.BaseTuple):
        return tuple(map(form, typ.types))
    if isinstance(typ, types.IntegerLiteral | types.Integer):
        return "integer"
    return str(typ)


addresses: dict[np.dtype, tuple[str, ...]] = {}  # by a record's type, its fields that hold some


def guarded(point, name, types_of):
    """`point`, a compiled kernel, with a look at what it is called with."""

    @functools.wraps(point)
    def call(*args):
        for i, (argument, typ) in enumerate(zip(args, types_of, strict=True)):
            given, expected = form(typeof(argument)), form(typ)
            if given != expected:
                raise AssertionError(f"argument {i} of {name} is {given}, and it was compiled for {expected}")
            if isinstance(argument, np.ndarray) and argument.dtype in addresses:
                check_addresses(argument, addresses[argument.dtype])
        return point(*args)

    return call
