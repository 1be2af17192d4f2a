"""Language in JAX: a character model with its recurrent function changed, and what that saves.

The model reads Python's documentation of itself and foretells each next character. It is trained for an epoch with a
GRU by jax.lax.scan, which is how JAX's libraries have it, and for the same epoch with fastrnn.jax.gru in its place,
which must end at the same loss; then it is trained on, and its perplexity on text that it has not seen is compared with
that of n-grams.
"""

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import fastrnn.jax
from common import documentation, is_quick, ngram_perplexity, report

STEPS, BATCH, HIDDEN, SIZE = 100, 32, 256, 64
Params = dict[str, Any]
Recurrent = Callable[[jax.Array, jax.Array, Params], tuple[jax.Array, jax.Array]]


def gru_by_scan(x: jax.Array, state: jax.Array, params: Params) -> tuple[jax.Array, jax.Array]:
    of_x = x @ params["weight_ih_l0"].T + params["bias_ih_l0"]  # one product for all steps

    def step(h: jax.Array, a: jax.Array) -> tuple[jax.Array, jax.Array]:
        b = h @ params["weight_hh_l0"].T + params["bias_hh_l0"]
        (r_x, z_x, n_x), (r_h, z_h, n_h) = jnp.split(a, 3, -1), jnp.split(b, 3, -1)
        r, z = jax.nn.sigmoid(r_x + r_h), jax.nn.sigmoid(z_x + z_h)
        h = (1 - z) * jnp.tanh(n_x + r * n_h) + z * h
        return h, h

    h, output = jax.lax.scan(step, state[0], of_x)
    return output, h[None]


def init(characters: int) -> Params:
    keys = jax.random.split(jax.random.key(0), 3)
    head = jax.random.normal(keys[2], (HIDDEN, characters)) / HIDDEN**0.5
    embedding = jax.random.normal(keys[0], (characters, SIZE))
    return {"embedding": embedding, "gru": fastrnn.jax.init("gru", keys[1], SIZE, HIDDEN), "head": head}


def loss(params: Params, window: jax.Array, state: jax.Array, recurrent: Recurrent) -> tuple[jax.Array, jax.Array]:
    """Return the mean cross-entropy of each next character, and the state to go on with."""
    output, state = recurrent(params["embedding"][window[:-1]], state, params["gru"])
    logits = jax.nn.log_softmax(output @ params["head"])
    chosen = jnp.take_along_axis(logits, window[1:, :, None], axis=-1)
    return -chosen.mean(), state


@functools.partial(jax.jit, static_argnames="recurrent")
def update(params: Params, moments: Any, step: int, rate: float, window: Any, state: Any, recurrent: Recurrent) -> Any:
    """Adam, with gradients clipped at norm 1."""
    (value, state), gradients = jax.value_and_grad(loss, has_aux=True)(params, window, state, recurrent)
    norm = jnp.sqrt(sum((g**2).sum() for g in jax.tree.leaves(gradients)))
    gradients = jax.tree.map(lambda g: g * jnp.minimum(1.0, 1.0 / norm), gradients)
    first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, moments[0], gradients)
    second = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g**2, moments[1], gradients)
    rate *= jnp.sqrt(1 - 0.999**step) / (1 - 0.9**step)
    params = jax.tree.map(lambda p, m, v: p - rate * m / (jnp.sqrt(v) + 1e-8), params, first, second)
    return params, (first, second), value, state


class Training:
    """The parameters, and what Adam keeps."""

    def __init__(self, characters: int, recurrent: Recurrent) -> None:
        self.recurrent, self.step = recurrent, 0
        self.params = init(characters)
        self.moments = (jax.tree.map(jnp.zeros_like, self.params),) * 2

    def epoch(self, text: np.ndarray, rate: float) -> tuple[float, float]:
        """Go through the text once, window by window; return the mean loss and the seconds."""
        start, values = time.perf_counter(), []
        state = jnp.zeros((1, BATCH, HIDDEN))
        for window in windows(text):
            self.step += 1
            arguments = self.params, self.moments, self.step, rate, window, state
            self.params, self.moments, value, state = update(*arguments, recurrent=self.recurrent)
            values.append(value)
        return float(jnp.stack(values).mean()), time.perf_counter() - start


def windows(text: np.ndarray) -> list[np.ndarray]:
    """Cut the columns of a text into windows of one length: another would be compiled anew."""
    return [text[start : start + STEPS + 1] for start in range(0, len(text) - STEPS, STEPS)]


def main() -> None:
    quick = is_quick(__doc__)
    text = documentation()
    text = text[: len(text) // 8] if quick else text
    cut, vocabulary = len(text) * 9 // 10, sorted(set(text))
    ids = np.array([vocabulary.index(character) for character in text], np.int32)
    length = cut // BATCH
    training, test = ids[: length * BATCH].reshape(BATCH, length).T, ids[cut:, None]

    results = []
    for name, recurrent in (("jax.lax.scan", gru_by_scan), ("fastrnn.jax.gru", fastrnn.jax.gru)):
        Training(len(vocabulary), recurrent).epoch(training[: STEPS + 1], 0.0)  # compiles
        model = Training(len(vocabulary), recurrent)
        results.append(model.epoch(training, 4e-3))
        print(f"{name}: loss {results[-1][0]:.5f} after an epoch of {results[-1][1]:.2f} s", flush=True)
    (theirs, their_seconds), (ours, our_seconds) = results
    if abs(ours - theirs) > 1e-3 * theirs:  # they round differently, and training doubles a difference many times
        raise SystemExit(f"the losses differ: {ours} with fastrnn.jax, {theirs} with jax.lax.scan")

    for number in range(2, 4 if quick else 9):
        value, seconds = model.epoch(training, 4e-3 if number < 7 else 1e-3)
        print(f"epoch {number}: loss {value:.3f}, {seconds:.1f} s", flush=True)
    state = jnp.zeros((1, 1, HIDDEN))
    perplexity = float(jnp.exp(loss(model.params, test, state, fastrnn.jax.gru)[0]))
    order = 2 if quick else 4
    baseline = ngram_perplexity(text[:cut], text[cut:], order, len(vocabulary))
    report("perplexity of a character", perplexity, f"{order}-grams", baseline)
    report("seconds an epoch", our_seconds, "a GRU by jax.lax.scan", their_seconds)


if __name__ == "__main__":
    main()
