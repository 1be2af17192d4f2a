"""What the benchmarks measure: cells, shapes and cases. A shape is T, B, I, H."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from fastrnn.bench import Case, Shape

CELLS = ("rnn_tanh", "lstm", "gru")
PASSES = ("forward", "training")  # inference; forward and every gradient

#: Single steps, streams, small and large batches.
SHAPES: tuple[Shape, ...] = (
    (1, 1, 64, 64),
    (100, 1, 32, 32),
    (100, 1, 64, 64),
    (100, 1, 128, 128),
    (100, 1, 256, 256),
    (100, 1, 512, 512),
    (100, 8, 128, 128),
    (100, 32, 64, 64),
    (100, 32, 128, 128),
    (100, 32, 256, 256),
    (50, 64, 512, 512),
    (25, 64, 1024, 1024),
    (100, 128, 128, 128),
)

#: The same range in sizes that fill no vector and no tile.
ODD: tuple[Shape, ...] = (
    (1, 1, 67, 61),
    (99, 1, 27, 13),
    (101, 1, 59, 63),
    (97, 1, 131, 101),
    (103, 1, 203, 251),
    (95, 1, 301, 509),
    (101, 7, 131, 133),
    (99, 31, 45, 67),
    (101, 33, 77, 150),
    (97, 29, 300, 275),
    (51, 61, 513, 497),
    (25, 67, 999, 1001),
    (105, 130, 130, 125),
)

#: Rows of 1 to 200 steps; and one step of a stream.
LENGTHS: Shape = (200, 32, 128, 128)
STEP: Shape = (1, 1, 64, 64)

#: Enough to see that everything works, and roughly how fast.
QUICK: tuple[Shape, ...] = ((1, 1, 64, 64), (100, 8, 128, 128))

#: For benchmarks that run as tests.
TINY: tuple[Shape, ...] = ((10, 3, 20, 30),)

SETS = ("grid", "odd", "lengths", "step", "quick")


def shape_name(shape: Iterable[int]) -> str:
    """'100,32,128,128': T, B, I, H."""
    return ",".join(map(str, shape))


def cases(sets: Iterable[str], cells: Iterable[str] = CELLS, passes: Iterable[str] = PASSES) -> Iterator[Case]:
    """Yield every case of the named sets, cell by cell."""
    sets, passes = list(sets), list(passes)
    shapes = [s for name, some in (("grid", SHAPES), ("odd", ODD), ("quick", QUICK)) if name in sets for s in some]
    for cell in cells:
        yield from (Case(cell, shape, operation) for shape in shapes for operation in passes)
        if "lengths" in sets:
            yield from (Case(cell, LENGTHS, operation, lengths=True) for operation in passes)
        if "step" in sets:
            yield Case(cell, STEP, "step")
