"""Kernels compiled on the spot, for the processor at hand and for what the shipped machine code does not have."""

from __future__ import annotations

from numba.core import types

from fastrnn.kernels import packing, walk
from fastrnn.kernels.cells import CELLS
from fastrnn.kernels.stage import NumbersType, StageType


def cache_folder() -> str | None:
    """Where what is compiled is kept; None where no folder can be written to."""
    return walk.forward.stats.cache_path


KERNELS = {
    "forward": walk.forward,
    "backward": walk.backward,
    "weight_gradient": walk.weight_gradient,
    "bias_gradient": walk.bias_gradient,
    "pack_stage": packing.pack_stage,
    "pack_columns": packing.pack_columns,
    "checksum": packing.checksum_of,
}


def signature(dtype, cell=None, masks=0):
    """The types of a kernel's arguments, of which the last is the address of a record."""
    numbers = getattr(types, dtype.name)
    if cell is None:
        return NumbersType(numbers), types.int64
    first, second = [
        StageType(stage.name, numbers, masks > 0 and bool(stage.x_blocks), masks > 1 and bool(stage.x_blocks))
        for stage in CELLS[cell].stages
    ] + [types.none] * (2 - len(CELLS[cell].stages))
    return first, second, types.int64


def function(name, dtype, cell=None, masks=0):
    """A compiled kernel, and what it takes before the address."""
    kernel, arguments = KERNELS[name], signature(dtype, cell, masks)
    kernel.compile(arguments)
    return kernel.overloads[arguments].entry_point, (None,) * (len(arguments) - 1)
