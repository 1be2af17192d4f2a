"""How far the kernels are from what one core of this machine can do: multiply-adds, and weights read from the caches.

python benchmarks/limits.py
"""

from __future__ import annotations

import time

import numpy as np
from numba import njit

import fastrnn
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


@njit(error_model="numpy")
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


def median(function, *arguments, repeats=15):
    function(*arguments)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function(*arguments)
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def layer_times(cell, T, B, I, H):
    """Seconds of inference and of training on one thread."""
    layer = {"lstm": fastrnn.LSTM, "gru": fastrnn.GRU}[cell](I, H, seed=0)
    x = np.random.default_rng(0).standard_normal((T, B, I), np.float32)
    d_output = np.ones((T, B, H), np.float32)
    return median(layer, x), median(lambda: layer.backward(layer.forward(x)[2], d_output))


def main():
    fastrnn.set_num_threads(1)
    x = np.zeros(1024, np.float32)
    n = 2_000_000
    peak = 12 * 2 * n * (VECTOR_BITS // 32) / median(multiply_adds, x, n)
    print(f"multiply-adds, one core: {peak / 1e9:.0f} GFLOP/s")
    T, B, I, H = 50, 64, 512, 512
    for cell, gates in (("lstm", 4), ("gru", 3)):
        inference, training = layer_times(cell, T, B, I, H)
        operations = 2 * T * B * gates * H * (I + H)
        share, share_training = operations / inference / peak, 3 * operations / training / peak
        print(f"{cell} {T},{B},{I},{H}: inference {share:.0%}, training {share_training:.0%} of it")
    for T, B, I, H in ((100, 1, 256, 256), (100, 1, 512, 512)):
        weights = 4 * H * H
        rate = 4 * weights * 200 / median(read, np.zeros(weights, np.float32), 200)
        inference, _ = layer_times("lstm", T, B, I, H)
        reached = 4 * weights * T / inference
        print(
            f"lstm {T},{B},{I},{H}: recurrent weights at {reached / 1e9:.0f} GB/s, all else included; "
            f"{4 * weights / 2**20:.1f} MiB are read at {rate / 1e9:.0f} GB/s by a bare loop"
        )


if __name__ == "__main__":
    main()
