"""A cell's stage as an argument of a CPU kernel.

A kernel is one function for all cells. It takes :class:`fastrnn.kernels.cells.Stage` objects as arguments, whose Numba
type carries everything about them: each cell gets its own compiled kernel, in which ``stage.gates`` is a constant and
``stage.forward(...)`` the cell's formula, inlined.

The type's name also holds a checksum of the sources that a kernel is made of. Numba's cache looks at the types of a
kernel's arguments and at the file that the kernel stands in, but not at the files that this one uses: the checksum
does.
"""

from __future__ import annotations

import functools
import zlib
from pathlib import Path
from typing import NamedTuple

from numba import typeof
from numba.core import types
from numba.extending import (
    NativeValue,
    models,
    overload_attribute,
    overload_method,
    register_model,
    typeof_impl,
    unbox,
)

from fastrnn.kernels import guard
from fastrnn.kernels.cells import CELLS, H, Stage
from fastrnn.kernels.product import VECTORS

SOURCES = ("barrier", "cells", "packing", "product", "simd", "stage", "walk")


def _checksum() -> str:
    folder = Path(__file__).parent
    return f"{zlib.crc32(b''.join((folder / f'{name}.py').read_bytes() for name in SOURCES)):08x}"


CHECKSUM = _checksum()
STAGES = {stage.name: stage for cell in CELLS.values() for stage in cell.stages}


class Masked(NamedTuple):
    """A stage whose operand h is multiplied by a mask: the same for all gates, or one for each."""

    stage: Stage
    each: bool


class StageType(types.Type):
    def __init__(self, stage_name, masked="", each=False):
        self.stage_name, self.masked, self.each = stage_name, bool(masked), each
        super().__init__(name=f"Stage({stage_name}{masked}, {CHECKSUM})")


class SourceType(types.Type):
    """Of an argument that says no more than which sources a kernel was compiled from."""

    def __init__(self):
        super().__init__(name=f"Source({CHECKSUM})")


class Source:
    """Handed to kernels that take no stage, so that they too are compiled anew when a source changes."""


SOURCE = Source()

register_model(StageType)(models.OpaqueModel)
register_model(SourceType)(models.OpaqueModel)


@typeof_impl.register(Stage)
def _typeof_stage(stage, c):
    return StageType(stage.name)


@typeof_impl.register(Masked)
def _typeof_masked(masked, c):
    return StageType(masked.stage.name, " with masks" if masked.each else " with a mask", masked.each)


@typeof_impl.register(Source)
def _typeof_source(source, c):
    return SourceType()


@unbox(StageType)
@unbox(SourceType)
def _unbox(typ, obj, c):
    return NativeValue(c.context.get_dummy_value())


def _units(stage: Stage) -> int:
    """Vectors of hidden units in a panel: few gates leave room for several."""
    return max(1, VECTORS // len(stage.h_blocks))


UNITS = {name: _units(stage) for name, stage in STAGES.items()}


@functools.cache
def _constants(stage: Stage, masked: bool, each: bool) -> dict:
    """What a kernel may ask of a stage besides its own fields, as tuples whose length is known to the compiler."""
    width = UNITS[stage.name]
    masks = stage.h_blocks if each else (0,)
    return {
        **stage._asdict(),
        "units": width,
        "slots": tuple(range(stage.gates)),
        "x_columns": tuple(range(len(stage.x_blocks or stage.h_blocks) * width)),
        "h_columns": tuple(range(len(stage.h_blocks) * width)),
        "carried_places": tuple(2 for _ in stage.carried),
        "gives_h": H in stage.results,
        "carries_h": H in stage.carried,
        "masked": masked,
        "operands": tuple(range(len(masks))),  # what the product multiplies: one for all gates, or one for each
        "masks": masks if masked else None,  # the numbers of their masks
    }


def _attribute(field):
    @overload_attribute(StageType, field)
    def get(stage):
        value = _constants(STAGES[stage.stage_name], stage.masked, stage.each)[field]
        return lambda stage: value


for _field in _constants(next(iter(STAGES.values())), False, False):
    if _field not in ("name", "forward", "backward"):
        _attribute(_field)


@overload_method(StageType, "forward")
def _forward(stage, gates, state):
    function = STAGES[stage.stage_name].forward
    return lambda stage, gates, state: function(gates, state)


@overload_method(StageType, "backward")
def _backward(stage, dh, carried, saved, state):
    function = STAGES[stage.stage_name].backward
    return lambda stage, dh, carried, saved, state: function(dh, carried, saved, state)


def _of_any_flags(typ):
    """The type, with every array in it as a writeable one: a kernel is compiled once whatever flags come later."""
    if isinstance(typ, types.Array):
        return typ.copy(readonly=False)
    if isinstance(typ, types.BaseTuple):
        parts = tuple(map(_of_any_flags, typ.types))
        return types.BaseTuple.from_types(parts, getattr(typ, "instance_class", None))
    return typ


_entries: dict = {}


def call(kernel, key, *args):
    """kernel(*args), without looking at the arguments' types each time: `key` stands for them.

    Numba's own dispatch takes 10 µs for each argument of a type that it does not know, and compiles anew for read-only
    arrays. Whoever calls by a key gives arguments of the same types with it every time, or the process ends:
    :mod:`fastrnn.kernels.guard` checks it.
    """
    point = _entries.get((kernel, key))
    if point is None:
        types_of = tuple(_of_any_flags(typeof(argument)) for argument in args)
        kernel.compile(types_of)
        point = kernel.overloads[types_of].entry_point
        if guard.ENABLED:
            point = guard.guarded(point, kernel.py_func.__name__, types_of)
        _entries[kernel, key] = point
    return point(*args)


def entry(kernel, key):
    """What `call` calls by this key, once it has done so."""
    return _entries[kernel, key]
