"""Fine-tuning: a language model of one text goes on with a small other one, parts of it frozen.

A character model learns Python's documentation of its own language and is saved. The new text is of another kind:
scikit-learn's descriptions of its data sets, 6000 characters for training, 3000 for early stopping and 34 000 for the
measure. A new model loads the weights; first the embedding and the recurrent layer are frozen and only the output is
trained, then all of it at a lower rate. The baseline is the same model trained on the new text alone, from the start.
"""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # its threads would spin on the cores that fastrnn needs

import string
import tempfile
from importlib import resources

import numpy as np

from common import documentation, is_quick, report
from fastrnn import GRU
from fastrnn.train import (
    Adam,
    CrossEntropy,
    Dropout,
    Embedding,
    Linear,
    Sequential,
    Trainer,
    perplexity,
    streams,
)

STEPS = 100
CHARACTERS = string.printable  # of both texts; the few others are left out


def descriptions() -> str:
    """Return the descriptions of the data sets that come with scikit-learn."""
    folder = resources.files("sklearn.datasets.descr")
    files = sorted(file.name for file in folder.iterdir() if file.name.endswith(".rst"))
    return "\n".join(folder.joinpath(name).read_text("utf-8") for name in files)


def encode(text: str) -> np.ndarray:
    return np.array([CHARACTERS.index(character) for character in text if character in CHARACTERS])


def build(hidden: int) -> Sequential:
    return Sequential(
        embedding=Embedding(len(CHARACTERS), 64, seed=0),
        gru=GRU(64, hidden, seed=0),
        dropout=Dropout(0.2, seed=0),
        output=Linear(hidden, len(CHARACTERS), seed=0),
    )


def train(model: Sequential, ids: np.ndarray, held: np.ndarray | None, *, rate: float, epochs: int, batch: int) -> None:
    """Train a model; with a held-out text until it gets no better there, and it has its best epoch's weights then."""
    x, y = streams(ids, batch, STEPS)
    validation = None if held is None else streams(held, batch, STEPS)
    trainer = Trainer(model, CrossEntropy(), Adam(rate), clip_norm=1.0)
    patience = None if held is None else 3
    trainer.fit(x, y, batch_size=batch, stateful=True, validation=validation, epochs=epochs, patience=patience)


def measure(name: str, model: Sequential, ids: np.ndarray) -> float:
    """Return, and print, the perplexity of a character."""
    trainer = Trainer(model, CrossEntropy(), Adam())
    found = perplexity(trainer.evaluate(ids[None, :-1], ids[None, 1:], truncate=1000)["loss"])
    print(f"{name}, of {model.num_parameters:,} numbers: perplexity {found:.3f}", flush=True)
    return found


def main() -> None:
    quick = is_quick(__doc__)
    old, new = encode(documentation()), encode(descriptions())
    hidden, batch, epochs = (128, 8, 3) if quick else (256, 32, 4)
    old = old[: len(old) // 8] if quick else old
    small, held, test = new[:6000], new[6000:9000], new[9000:]

    with tempfile.TemporaryDirectory() as folder:
        model = build(hidden)
        train(model, old, None, rate=4e-3, epochs=epochs, batch=batch)
        model.save(f"{folder}/old.npz")
        tuned = build(hidden)
        tuned.load(f"{folder}/old.npz")
    measure("as loaded", tuned, test)

    most = 6 if quick else 30
    scratch = build(hidden)
    train(scratch, small, held, rate=4e-3, epochs=2 * most, batch=4)  # as many as the other's two trainings together
    theirs = measure("from the start", scratch, test)

    tuned.freeze("embedding", "gru")
    train(tuned, small, held, rate=2e-3, epochs=most, batch=4)
    frozen = measure("output trained", tuned, test)

    tuned.unfreeze("embedding", "gru")
    train(tuned, small, held, rate=1e-3, epochs=most, batch=4)
    ours = measure("all trained", tuned, test)

    report("perplexity of a character, fine-tuned", ours, "trained from the start", theirs)
    report("perplexity of a character, only the output fine-tuned", frozen, "trained from the start", theirs)


if __name__ == "__main__":
    main()
