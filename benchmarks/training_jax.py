"""Training steps in JAX under jit: fastrnn's layer against one written with jax.lax.scan, in the same model.

python benchmarks/training_jax.py [--rounds N]    prints the medians, and the ratio of paired steps

A step is the loss of a sequence model with a linear head, its gradient, and plain gradient descent. The answers are
compared before anything is timed.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

import fastrnn.jax as ours

SIZES = [(100, 32, 128, 128), (100, 1, 64, 64)]  # T, B, I, H


def lstm_by_scan(x, state, p):
    inputs = x @ p["weight_ih_l0"].T + p["bias_ih_l0"] + p["bias_hh_l0"]  # one product for all steps, as one would

    def step(state, a):
        h, c = state
        i, f, g, o = jnp.split(a + h @ p["weight_hh_l0"].T, 4, -1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    zeros = jnp.zeros((x.shape[1], p["weight_hh_l0"].shape[1]), x.dtype)
    last, output = jax.lax.scan(step, (zeros, zeros), inputs)
    return output, last


def gru_by_scan(x, state, p):
    inputs = x @ p["weight_ih_l0"].T + p["bias_ih_l0"]

    def step(h, a):
        b = h @ p["weight_hh_l0"].T + p["bias_hh_l0"]
        (r, z, n), (rh, zh, nh) = jnp.split(a, 3, -1), jnp.split(b, 3, -1)
        z = jax.nn.sigmoid(z + zh)
        h = z * h + (1 - z) * jnp.tanh(n + jax.nn.sigmoid(r + rh) * nh)
        return h, h

    last, output = jax.lax.scan(step, jnp.zeros((x.shape[1], p["weight_hh_l0"].shape[1]), x.dtype), inputs)
    return output, last


def step_with(layer):
    def loss(params, x, y):
        output, _ = layer(x, None, params["layer"])
        return ((output @ params["head"] - y) ** 2).mean()

    @jax.jit
    def step(params, x, y):
        value, gradients = jax.value_and_grad(loss)(params, x, y)
        return value, jax.tree.map(lambda p, g: p - 0.01 * g, params, gradients)

    return step


def measure(cell, sizes, rounds):
    """Seconds of a step with either layer, in turns."""
    T, B, I, H = sizes
    keys = jax.random.split(jax.random.key(0), 4)
    x, y = jax.random.normal(keys[0], (T, B, I)), jax.random.normal(keys[1], (T, B, 1))
    start = {"layer": ours.init(cell, keys[2], I, H), "head": jax.random.normal(keys[3], (H, 1)) / H}
    steps = [step_with(getattr(ours, cell)), step_with({"lstm": lstm_by_scan, "gru": gru_by_scan}[cell])]
    for one, other in zip(*(jax.tree.leaves(step(start, x, y)) for step in steps), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5)  # float32, sums over T * B in another order
    times, params = ([], []), [start, start]
    for _ in range(rounds):
        for k, step in enumerate(steps):
            begin = time.perf_counter()
            _, params[k] = jax.block_until_ready(step(params[k], x, y))
            times[k].append(time.perf_counter() - begin)
    return times


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=100)
    rounds = parser.parse_args().rounds
    print("cell  T, B, I, H            fastrnn ms   lax.scan ms   ratio of pairs")
    for cell in ("lstm", "gru"):
        for sizes in SIZES:
            own, scan = measure(cell, sizes, rounds)
            ratio = statistics.median(b / a for a, b in zip(own, scan, strict=True))
            medians = [1e3 * statistics.median(times) for times in (own, scan)]
            print(f"{cell:5} {sizes!s:20} {medians[0]:11.2f} {medians[1]:13.2f} {ratio:16.2f}")


if __name__ == "__main__":
    main()
