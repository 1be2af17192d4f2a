"""Language in Keras: a character model with one import changed, and what that saves.

The model reads Python's documentation of itself and foretells each next character. It is trained for an epoch with
keras.layers.GRU and for the same epoch with fastrnn.keras.GRU in its place, which must end at the same loss; then it is
trained on, and its perplexity on text that it has not seen is compared with that of n-grams. KERAS_BACKEND chooses
jax (the default, which compiles Keras's loop over time), torch or tensorflow.
"""

import os
import time

os.environ.setdefault("KERAS_BACKEND", "jax")

import keras
import numpy as np

from common import documentation, is_quick, ngram_perplexity, report
from fastrnn.keras import GRU  # instead of: from keras.layers import GRU

STEPS, BATCH, HIDDEN = 100, 32, 256


def build(characters: int, layer: type[keras.layers.Layer]) -> keras.Model:
    keras.utils.set_random_seed(0)
    model = keras.Sequential([
        keras.layers.Embedding(characters, 64, keras.initializers.RandomNormal(stddev=1.0)),
        layer(HIDDEN, return_sequences=True),
        keras.layers.Dense(characters),
    ])  # fmt: skip
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(4e-3, global_clipnorm=1.0), loss)
    return model


def windows(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cut a text into windows, each with the characters that follow its own: (number, STEPS) twice."""
    number = (len(ids) - 1) // STEPS
    number -= number % BATCH  # compiled backends would compile again for a last, smaller batch
    return ids[: number * STEPS].reshape(-1, STEPS), ids[1 : number * STEPS + 1].reshape(-1, STEPS)


def epoch(model: keras.Model, x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    start = time.perf_counter()
    history = model.fit(x, y, batch_size=BATCH, shuffle=False, verbose=0)
    return history.history["loss"][0], time.perf_counter() - start


def main() -> None:
    quick = is_quick(__doc__)
    text = documentation()
    text = text[: len(text) // 8] if quick else text
    cut, vocabulary = len(text) * 9 // 10, sorted(set(text))
    ids = np.array([vocabulary.index(character) for character in text])
    (x, y), test = windows(ids[:cut]), windows(ids[cut:])

    results = {}
    for layer in (keras.layers.GRU, GRU):
        model = build(len(vocabulary), layer)
        model.fit(x[:BATCH], y[:BATCH], verbose=0)  # compiles
        results[layer] = loss, seconds = epoch(model, x, y)
        print(f"{layer.__module__}.{layer.__name__}: loss {loss:.5f} after an epoch of {seconds:.2f} s", flush=True)
    (theirs, their_seconds), (ours, our_seconds) = results.values()
    if abs(ours - theirs) > 1e-3 * theirs:  # they round differently, and training doubles a difference many times
        raise SystemExit(f"the losses differ: {ours} with fastrnn.keras, {theirs} with Keras's own")

    for number in range(2, 4 if quick else 9):
        if number == 7:
            model.optimizer.learning_rate = 1e-3
        loss, seconds = epoch(model, x, y)
        print(f"epoch {number}: loss {loss:.3f}, {seconds:.1f} s", flush=True)
    perplexity = float(np.exp(model.evaluate(*test, batch_size=BATCH, verbose=0)))
    order = 2 if quick else 4
    baseline = ngram_perplexity(text[:cut], text[cut:], order, len(vocabulary))
    report("perplexity of a character", perplexity, f"{order}-grams", baseline)
    report("seconds an epoch", our_seconds, f"keras.layers.GRU on {keras.backend.backend()}", their_seconds)


if __name__ == "__main__":
    main()
