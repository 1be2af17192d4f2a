"""Kernels by their names: from the machine code that the package carries, or compiled by Numba when first asked for."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import NamedTuple

from fastrnn.kernels import guard, records, shipped

RECORDS = {
    "forward": records.FORWARD,
    "backward": records.BACKWARD,
    "weight_gradient": records.OUTER,
    "bias_gradient": records.BIAS,
    "pack_stage": records.PACK_STAGE,
    "pack_columns": records.PACK_COLUMNS,
    "checksum": records.ARRAYS,
}


class Kernel(NamedTuple):
    """``function(*prefix, address of a record)`` runs it, without the interpreter's lock."""

    function: Callable[..., int]
    prefix: tuple


def symbol(name, dtype, cell=None) -> str:
    """What a kernel is called in a library."""
    return "_".join(part for part in ("fastrnn", name, cell, dtype.name) if part)


@functools.cache
def find(name, dtype, cell=None, masks=0) -> Kernel:
    """The kernel for numbers of a dtype, of a cell where that matters, with so many masks: 0, 1 or 2 for more."""
    function, prefix = None if masks else shipped.function(symbol(name, dtype, cell)), ()
    if function is None:
        from fastrnn.kernels import compiled

        function, prefix = compiled.function(name, dtype, cell, masks)
    if guard.ENABLED:
        function = guard.guarded(function, name, RECORDS[name])
    return Kernel(function, prefix)


def call(name, dtype, *numbers) -> int:
    """Run a kernel on a record of these numbers."""
    kernel, record = find(name, dtype), records.Words(*numbers)
    return kernel.function(*kernel.prefix, ctypes.addressof(record))
