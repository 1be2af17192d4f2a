"""Every call of a CPU kernel looked at before it is made: for tests, where FASTRNN_CHECK_CALLS is 1.

A kernel believes what it is told: it is given the address of a record, and takes from there where the arrays are. The
address of an array that has gone would have it write into somebody else's memory, and what comes of that is seen much
later. Here it is an error at once.
"""

from __future__ import annotations

import ctypes
import functools
import os
import weakref

import numpy as np

ENABLED = os.environ.get("FASTRNN_CHECK_CALLS", "0") not in ("", "0")

addresses: dict[np.dtype, tuple[str, ...]] = {}  # by a record's type, its fields that hold some
_owners: dict[int, list] = {}  # by address, references to the arrays that keep the memory there alive


def noting(address):
    """`address`, a function that gives that of an array, with a note of whose it is."""

    @functools.wraps(address)
    def noted(array: np.ndarray) -> int:
        if not array.flags.c_contiguous:
            raise AssertionError(f"an array of shape {array.shape} and strides {array.strides} is not contiguous")
        place = address(array)
        while isinstance(array.base, np.ndarray):
            array = array.base
        # Several may: each time that a tensor's memory is seen as an array, it is another one.
        others = [owner for owner in _owners.get(place, ()) if owner() is not None and owner() is not array]
        _owners[place] = [*others, weakref.ref(array)]
        return place

    return noted


def _is_alive(address: int) -> bool:
    return any(owner() is not None for owner in _owners.get(address, ()))


def check_record(dtype: np.dtype, place: int) -> None:
    """Raise if the record at an address names an array that is not alive; 0 is none."""
    words = (ctypes.c_int64 * (dtype.itemsize // 8)).from_address(place)
    record = np.frombuffer(words, dtype)[0]
    for field in addresses[dtype]:
        for address in np.atleast_1d(record[field]).tolist():
            if address and not _is_alive(address):
                raise AssertionError(f"{field} is the address {address:#x}, where no array of a caller's is alive")


def guarded(function, name: str, dtype: np.dtype):
    """`function`, a kernel that takes the address of a record of that type, with a look at it."""

    @functools.wraps(function)
    def call(*arguments):
        place = arguments[-1]
        if type(place) is not int:
            raise AssertionError(f"{name} is called with {place!r}, expected the address of a record")
        check_record(dtype, place)
        return function(*arguments)

    return call
