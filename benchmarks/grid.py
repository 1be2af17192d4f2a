"""What the benchmarks measure: cells, shapes, and the machine that they run on."""

from __future__ import annotations

CELLS = ("rnn_tanh", "lstm", "gru")

#: (T, B, I, H): single steps, streams, small and large batches.
SHAPES = (
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

#: Enough to see that everything works, and roughly how fast.
QUICK = ((1, 1, 64, 64), (100, 1, 128, 128), (100, 8, 128, 128), (100, 32, 64, 64))

#: For benchmarks that run as tests: sizes that fill no vector.
TINY = ((1, 1, 64, 64), (10, 3, 20, 30))


def shape_name(shape: tuple[int, int, int, int]) -> str:
    """'100,32,128,128': T, B, I, H."""
    return ",".join(map(str, shape))
