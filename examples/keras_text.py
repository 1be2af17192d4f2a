"""Text in Keras: which package of Python's library a piece of source is from, with one import changed.

The model is the one of many articles on Keras: Embedding 1000 to 64, LSTM 128, Dense 10, 164 106 parameters. It sees
100 words and signs from one of the ten largest packages and names the package; what it is tested on are files that it
has not seen. The same epoch with keras.layers.LSTM and with fastrnn.keras.LSTM is timed, after a few updates that must
end at the same loss. KERAS_BACKEND chooses torch (the default), jax or tensorflow.
"""

import os
import re
import sysconfig
import time
from collections import Counter
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "torch")

import keras
import numpy as np

from common import is_quick, report
from fastrnn.keras import LSTM  # instead of: from keras.layers import LSTM

WORDS, STEPS, BATCH, CLASSES = 1000, 100, 32, 10


def build(layer: type[keras.layers.Layer]) -> keras.Model:
    keras.utils.set_random_seed(0)
    model = keras.Sequential([
        keras.Input((STEPS,), dtype="int32"),
        keras.layers.Embedding(WORDS, 64),
        layer(128),
        keras.layers.Dense(CLASSES),
    ])  # fmt: skip
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(2e-3, global_clipnorm=1.0), loss, metrics=["accuracy"])
    return model


def packages() -> list[list[Path]]:
    """Return the files of the ten largest packages of Python's library."""
    root = Path(sysconfig.get_path("stdlib"))
    folders = [folder for folder in root.iterdir() if (folder / "__init__.py").exists()]
    own = {folder.name: sorted(folder.rglob("*.py")) for folder in folders if folder.name not in ("test", "encodings")}
    files = {name: [file for file in found if "test" not in str(file.relative_to(root))] for name, found in own.items()}
    sizes = Counter({name: sum(file.stat().st_size for file in found) for name, found in files.items()})
    names = sorted(name for name, _ in sizes.most_common(CLASSES))
    print("packages:", *names)
    return [files[name] for name in names]


def data(most: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return pieces of source as numbers of words (number, STEPS), their packages, and both to test with."""
    pieces: tuple[list[list[str]], list[list[str]]] = [], []
    answers: tuple[list[int], list[int]] = [], []
    for package, files in enumerate(packages()):
        for number, file in enumerate(files):
            words = re.findall(r"[A-Za-z]+|[^\sA-Za-z]", file.read_text(encoding="utf-8", errors="replace"))
            test = number % 4 == 3
            for start in range(0, len(words) - STEPS, STEPS):
                pieces[test].append(words[start : start + STEPS])
                answers[test].append(package)
    known = Counter(word for piece in pieces[0] for word in piece).most_common(WORDS - 1)
    numbers = {word: number for number, (word, _) in enumerate(known, 1)}  # 0: all others
    result = []
    for part, right in zip(pieces, answers, strict=True):
        chosen = np.random.default_rng(0).permutation(len(part))[: min(most, len(part)) // BATCH * BATCH]
        result += [np.array([[numbers.get(word, 0) for word in part[i]] for i in chosen], np.int32)]
        result += [np.array(right, np.int32)[chosen]]
    return result[0], result[1], result[2], result[3]


def epochs(model: keras.Model, x: np.ndarray, y: np.ndarray, number: int) -> tuple[float, float]:
    """Train, and return the last epoch's loss and the seconds an epoch."""
    start = time.perf_counter()
    history = model.fit(x, y, batch_size=BATCH, epochs=number, shuffle=False, verbose=0)
    return history.history["loss"][-1], (time.perf_counter() - start) / number


def main() -> None:
    quick = is_quick(__doc__)
    x, y, x_test, y_test = data(640 if quick else 1920)
    few = slice(10 * BATCH)  # updates, behind which roundings are not yet seen in the loss
    results = []
    for layer in (keras.layers.LSTM, LSTM):
        build(layer).fit(x[:BATCH], y[:BATCH], verbose=0)  # what is compiled once
        model = build(layer)
        loss, _ = epochs(model, x[few], y[few], 1)
        _, seconds = epochs(model, x, y, 1)
        results.append((loss, seconds))
    build(LSTM).summary()  # one that has not been trained: Keras counts an optimizer's numbers, too
    (theirs, slow), (ours, fast) = results
    name = keras.backend.backend()
    print(f"{name}: {slow:.2f} s an epoch with keras.layers.LSTM, {fast:.2f} s with fastrnn.keras.LSTM")
    if not abs(theirs - ours) < 1e-4 * theirs:
        raise SystemExit(f"the losses are {theirs} and {ours}, expected the same")
    if model.count_params() != 164_106:
        raise SystemExit(f"the model has {model.count_params()} parameters, expected 164 106")
    epochs(model, x, y, 9)
    _, accuracy = model.evaluate(x_test, y_test, batch_size=BATCH, verbose=0)
    majority = np.bincount(y_test).max() / len(y_test)
    report("accuracy on files not seen", accuracy, "the most frequent package", majority, larger_is_better=True)


if __name__ == "__main__":
    main()
