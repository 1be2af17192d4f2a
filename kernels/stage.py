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

from numba import typeof
from numba.core import types
from numba.core.imputils import lower_getattr_generic
from numba.core.typing.templates import AttributeTemplate, infer_getattr
from numba.extending import NativeValue, models, overload_method, register_model, unbox

from fastrnn.kernels import lean
from fastrnn.kernels.cells import CELLS, H, Stage
from fastrnn.kernels.shipped import CHECKSUM
from fastrnn.kernels.tiles import STAGES, UNITS

STATES = {stage.name: cell.states for cell in CELLS.values() for stage in cell.stages}


class StageType(types.Type):
    """Of a stage for numbers of type `dtype`; perhaps its operand h is multiplied by a mask, the same for all gates or
    one for `each`.
    """

    def __init__(self, stage_name, dtype, masked=False, each=False):
        self.stage_name, self.dtype, self.masked, self.each = stage_name, dtype, masked, each
        self.described = f"{stage_name} in {dtype}"
        masks = " with masks" if each else " with a mask" if masked else ""
        super().__init__(name=f"Stage({stage_name}{masks}, {dtype}, {CHECKSUM})")


class NumbersType(types.Type):
    """Of an argument that says no more than which numbers a kernel is for, and from which sources it is compiled."""

    def __init__(self, dtype):
        self.dtype = dtype
        self.described = f"arrays in {dtype}"
        super().__init__(name=f"Numbers({dtype}, {CHECKSUM})")


register_model(StageType)(models.OpaqueModel)
register_model(NumbersType)(models.OpaqueModel)


@unbox(StageType)
@unbox(NumbersType)
def _unbox(typ, obj, c):
    """Whatever is handed over: the type says all."""
    return NativeValue(c.context.get_dummy_value())


@functools.cache
def _constants(stage: Stage, masked: bool, each: bool) -> dict:
    """What a kernel may ask of a stage besides its own fields, as tuples whose length is known to the compiler."""
    width = UNITS[stage.name]
    masks = stage.h_blocks if each else (0,)
    constants = {
        **stage._asdict(),
        "units": width,
        "states": tuple(range(STATES[stage.name])),  # of the whole cell
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
    return {name: value for name, value in constants.items() if name not in ("name", "forward", "backward")}


@infer_getattr
class _Attributes(AttributeTemplate):
    """The constants, of which nothing need be compiled."""

    key = StageType

    def generic_resolve(self, stage, field):
        constants = _constants(STAGES[stage.stage_name], stage.masked, stage.each)
        return typeof(constants[field]) if field in constants else None


@lower_getattr_generic(StageType)
def _get(context, builder, stage, value, field):
    constant = _constants(STAGES[stage.stage_name], stage.masked, stage.each)[field]
    return context.get_constant_generic(builder, typeof(constant), constant)


@overload_method(StageType, "forward", jit_options=lean.CALLEE)
def _forward(stage, gates, state):
    function = STAGES[stage.stage_name].forward
    return lambda stage, gates, state: function(gates, state)


@overload_method(StageType, "backward", jit_options=lean.CALLEE)
def _backward(stage, dh, carried, saved, state):
    function = STAGES[stage.stage_name].backward
    return lambda stage, dh, carried, saved, state: function(dh, carried, saved, state)
