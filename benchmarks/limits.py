"""How near the kernels come to what this machine can do.

    python benchmarks/limits.py

A large batch is bound by multiply-adds: its share is that of a loop of them that never leaves the registers, on one
core. One row is bound by reading the recurrent weights anew in each step: its share is that of a loop that reads as
many bytes and does nothing else, each thread its part of them. All that a layer does besides counts as time lost.
"""

from __future__ import annotations

import os
import statistics
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numba import njit

import fastrnn
import results
from fastrnn.bench import Case, Fastrnn, call_times
from fastrnn.kernels.simd import VECTOR_BITS, fused, lanes, load, store


@njit(error_model="numpy")
def multiply_adds(x, n):
    """12 chains of n fused multiply-adds that never leave the registers."""
    width = lanes(x)
    a, b, c, d, e, f = (load(x, 0, width), load(x, 1, width), load(x, 2, width), load(x, 3, width), load(x, 4, width),
                        load(x, 5, width))  # fmt: skip
    g, h, i, j, k, m = a + 1, b + 1, c + 1, d + 1, e + 1, f + 1
    y, z = load(x, 6, width), load(x, 7, width)
    for _ in range(n):
        a, b, c, d, e, f = (
            fused(a, y, z),
            fused(b, y, z),
            fused(c, y, z),
            fused(d, y, z),
            fused(e, y, z),
            fused(f, y, z),
        )
        g, h, i, j, k, m = (
            fused(g, y, z),
            fused(h, y, z),
            fused(i, y, z),
            fused(j, y, z),
            fused(k, y, z),
            fused(m, y, z),
        )
    store(x, 8, a + b + c + d + e + f + g + h + i + j + k + m, width)


@njit(error_model="numpy", nogil=True)
def read(x, times):
    """Sum of x, read so many times, in 8 chains."""
    width = lanes(x)
    a = b = c = d = e = f = g = h = load(x, 0, 0)
    for _ in range(times):
        for at in range(0, len(x) - 8 * width + 1, 8 * width):
            a, b = a + load(x, at, width), b + load(x, at + width, width)
            c, d = c + load(x, at + 2 * width, width), d + load(x, at + 3 * width, width)
            e, f = e + load(x, at + 4 * width, width), f + load(x, at + 5 * width, width)
            g, h = g + load(x, at + 6 * width, width), h + load(x, at + 7 * width, width)
    store(x, 0, a + b + c + d + e + f + g + h, width)


def median(function, *arguments, seconds=0.5):
    function(*arguments)  # compiles
    return statistics.median(call_times(lambda: function(*arguments), seconds))


def multiply_adds_a_second():
    n = 2_000_000
    return 12 * n * (VECTOR_BITS // 32) / median(multiply_adds, np.zeros(1024, np.float32), n)


def bytes_read_a_second(size, threads, times=200):
    """How fast `threads` read `size` bytes again and again, each its own part of them."""
    parts = [np.zeros(size // 4 // threads, np.float32) for _ in range(threads)]
    with ThreadPoolExecutor(threads) as pool:
        seconds = median(lambda: list(pool.map(read, parts, [times] * threads)))
    return times * size / seconds


def record(limit, case, threads, reached, possible):
    shown = {"reached": results.rounded(reached), "possible": results.rounded(possible)}
    print(f"{limit}: {case}, {threads} threads: {reached / possible:.0%} of {possible / 1e9:.0f} G/s", flush=True)
    key = {"limit": limit, "cell": case.cell, "shape": case.shape, "operation": case.operation, "threads": threads}
    return key | shown | {"share": results.rounded(reached / possible)}


def large_batches():
    """Multiply-adds a second on one core. Backward has two products for each of forward's."""
    fastrnn.set_num_threads(1)
    possible = multiply_adds_a_second()
    T, B, I, H = shape = (50, 64, 512, 512)
    for cell, gates in (("lstm", 4), ("gru", 3)):
        for operation, products in (("forward", 1), ("backward", 2), ("training", 3)):
            case = Case(cell, shape, operation)
            seconds = median(getattr(Fastrnn(case), operation))
            yield record("multiply-adds", case, 1, products * T * B * gates * H * (I + H) / seconds, possible)


def single_rows():
    """Bytes of recurrent weights a second."""
    for H in (256, 512):
        case = Case("lstm", (100, 1, H, H), "forward")
        size = 4 * 4 * H * H
        for threads in sorted({1, min(2, os.cpu_count() or 1)}):
            fastrnn.set_num_threads(threads)
            seconds = median(Fastrnn(case).forward)
            yield record("reading", case, threads, case.shape[0] * size / seconds, bytes_read_a_second(size, threads))


def main():
    options = results.parser(__doc__).parse_args()
    print("wrote", results.merge(options.name, "limits", [*large_batches(), *single_rows()]))


if __name__ == "__main__":
    main()
