"""Which walk a layer takes, and how a persistent one is laid out over the GPU.

The choice is by modelled times. Nothing here has been measured on a GPU yet: the constants are those of an H200 as its
documentation and published measurements of others have them.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

from fastrnn.kernels.cells import CELLS
from fastrnn.kernels.cuda.exchange import MODES
from fastrnn.kernels.cuda.persistent import (
    Shape,
    backward_kept,
    backward_registers,
    backward_shared,
    backward_vector,
    forward_kept,
    forward_registers,
    forward_shared,
    forward_vector,
)

WAYS = ("simple", "steps", "persistent")
CAPABILITY = (8, 0)  # of a GPU, for the persistent kernels' instructions
WARPS = 8
UNITS = (8, 16, 32)  # of a block
# Of a thread, forward and on the way back, by the GPU's generation: of 255 registers those for what is counted in
# `forward_registers`. So many compile without spills; for 8.x the assembler needs far more for the same text.
REGISTERS = {8: (85, 85), 9: (170, 200), 10: (175, 160)}

# Seconds. A model.
EXCHANGE = 0.8e-6  # from a store in one block until another has the word
PRODUCT = 1e-9  # of two fragments on one multiprocessor
CACHE_BYTES = 5.5e12  # a second, from the second-level cache to all multiprocessors
LAUNCH = 2.5e-6  # of a kernel in a graph
FLOPS = 25e12  # a second, of a product of some rows with W_hh
LINE_BYTES = 3e10  # a second, that one block can read


class Layout(NamedTuple):
    """Of one pass of a persistent walk."""

    shape: Shape
    groups: int  # of the batch's rows
    tiles: int  # of a group

    def grid(self, directions):
        return -(-self.shape.hidden // self.shape.units), self.groups, directions


class Plan(NamedTuple):
    way: str
    mode: str
    forward: Layout | None = None  # of a persistent walk
    backward: Layout | None = None


def choose(device, layer, size, dtype):
    """The plan for a layer. Raises ValueError if the way that is asked for cannot be gone."""
    capable = device.capability >= CAPABILITY
    generation = max((known for known in REGISTERS if known <= device.capability[0]), default=8)
    chips = device.multiprocessors, device.shared_memory, REGISTERS[generation]
    has_library = device.has_library
    return _choose(layer.cell, layer.mode, layer.way, size._replace(T=0), dtype, capable, chips, has_library)


@functools.lru_cache(maxsize=1024)
def _choose(cell, mode, way, size, dtype, capable, chips, has_library):
    layouts = None
    if way in (None, "persistent"):
        why = _why_not_persistent(cell, dtype, capable)
        if why is None:
            layouts = [_layout(cell, mode, size, chips, back) for back in (False, True)]
            if None in layouts:
                why = f"H = {size.H} with B = {size.B} does not fit into the registers of {chips[0]} multiprocessors"
                layouts = None
        if way == "persistent" and layouts is None:
            raise ValueError(f"backend 'cuda' cannot go the way 'persistent' here: {why}. Leave the way open")
    if way is None:
        times = {"simple": simple_seconds(cell, size, chips[0]), "steps": steps_seconds(cell, size, has_library)}
        if layouts is not None:
            times["persistent"] = sum(_seconds(layout, size, back) for back, layout in enumerate(layouts)) / 2
        way = min(times, key=times.__getitem__)
    return Plan(way, mode, *layouts) if way == "persistent" else Plan(way, mode)


def _why_not_persistent(cell, dtype, capable):
    if dtype != "float32":
        return f"it is for float32, not {dtype}"
    if len(CELLS[cell].stages) > 1:
        return f"{cell} has two products in a step"
    if not capable:
        return "it needs a GPU of compute capability {}.{} or later".format(*CAPABILITY)
    return None


def _layout(cell, mode, size, chips, back):
    """The fastest that fits, or None."""
    found = [
        layout
        for units in UNITS
        for tile in ((8, 16) if back else (8,))
        if (layout := _fitting(cell, mode, size, chips, back, units, tile)) is not None
    ]
    return min(found, key=lambda layout: _seconds(layout, size, back), default=None)


def _fitting(cell, mode, size, chips, back, units, tile):
    processors, shared_memory, registers = chips
    room = processors // (-(-size.H // units) * size.D)  # for groups of rows: a block on each multiprocessor
    if room == 0:
        return None
    all_tiles = -(-size.B // tile)
    tiles = -(-all_tiles // min(room, all_tiles))
    cell = CELLS[cell]
    items = -(-units * tile * tiles // (32 * WARPS))
    shape = Shape(cell.stages[0].name, mode, size.H, units, WARPS, tile, items, cell.tape)
    shared = (backward_shared if back else forward_shared)(shape, tiles)
    if (backward_registers if back else forward_registers)(shape) > registers[back] or shared > shared_memory:
        return None
    return Layout(shape, -(-all_tiles // tiles), tiles)


def _seconds(layout, size, back):
    """A step: the exchange, the products, and the vectors that every block reads."""
    shape = layout.shape
    vector = (backward_vector if back else forward_vector)(shape)
    kept = (backward_kept if back else forward_kept)(shape)
    fragments = kept / (2 if back else 4) * layout.tiles * shape.warps * MODES[shape.mode].products
    blocks, _, _ = layout.grid(size.D)
    read = vector.words * 4 * size.B * blocks * size.D
    return EXCHANGE + fragments * PRODUCT + read / CACHE_BYTES


def simple_seconds(cell, size, processors):
    """A step: one block for each row reads all weights."""
    weights = 4 * CELLS[cell].gates * size.H * size.W
    return 2e-6 + -(-size.B * size.D // processors) * weights / LINE_BYTES


def steps_seconds(cell, size, has_library):
    """A step: a product and a kernel for each stage, all directions."""
    flops = 2 * CELLS[cell].gates * size.H * size.W * size.B * size.D
    weights = 4 * CELLS[cell].gates * size.H * size.W * size.D
    slower = 1 if has_library else 4
    return len(CELLS[cell].stages) * (1 + size.D) * LAUNCH + slower * (flops / FLOPS + weights / CACHE_BYTES)
