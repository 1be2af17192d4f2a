"""Language: a character model with carried state, its perplexity beside n-grams, and text that it writes.

The text is Python's documentation of its own language. A GRU reads it in parallel streams and foretells each next
character; its state goes on from window to window, and gradients go back through one window: truncated
backpropagation through time. It is measured on the last tenth of the text, of which it has seen nothing, beside
n-grams with Witten-Bell smoothing from the same training text; of 1- to 8-grams, 5-grams are best there. Then it
writes, character after character (one to many), at two temperatures.

With --quick a smaller model reads an eighth of the text for seconds, beside 2-grams; longer n-grams are better there.
"""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # its threads would spin on the cores that fastrnn needs

import numpy as np

from common import documentation, is_quick, ngram_perplexity, report
from fastrnn import GRU
from fastrnn.train import (
    Adam,
    Cosine,
    CrossEntropy,
    Dropout,
    Embedding,
    Linear,
    Sequential,
    Trainer,
    generate,
    perplexity,
    streams,
)

STEPS = 100


def build(characters: int, hidden: int) -> Sequential:
    return Sequential(
        embedding=Embedding(characters, 64, seed=0),
        gru=GRU(64, hidden, seed=0),
        dropout=Dropout(0.1, seed=0),
        output=Linear(hidden, characters, seed=0),
    )


def train(model: Sequential, ids: np.ndarray, batch: int, epochs: int) -> Trainer:
    x, y = streams(ids, batch, STEPS)
    schedule = Cosine(4e-3, steps=epochs * len(x) // batch, minimum=2e-4)
    trainer = Trainer(model, CrossEntropy(), Adam(schedule), clip_norm=1.0)
    trainer.fit(x, y, epochs=epochs, batch_size=batch, stateful=True)
    return trainer


def write(model: Sequential, vocabulary: list[str], prompt: str, temperature: float) -> None:
    labels = generate(model, [vocabulary.index(c) for c in prompt], 400, temperature=temperature, seed=0)
    print(f"--- temperature {temperature}\n{prompt}{''.join(vocabulary[label] for label in labels)}")


def main() -> None:
    quick = is_quick(__doc__)
    text = documentation()
    text = text[: len(text) // 8] if quick else text
    hidden, batch, epochs, order = (128, 8, 2, 2) if quick else (256, 32, 8, 5)
    vocabulary = sorted(set(text))
    ids = np.array([vocabulary.index(character) for character in text])
    cut = len(text) * 9 // 10

    model = build(len(vocabulary), hidden)
    trainer = train(model, ids[:cut], batch, epochs)
    test = ids[None, cut:]  # one row, in one go: windows only bound the memory that it takes
    ours = perplexity(trainer.evaluate(test[:, :-1], test[:, 1:], truncate=1000)["loss"])
    for temperature in (0.5, 1.0):
        write(model, vocabulary, "The statement ", temperature)
    theirs = ngram_perplexity(text[:cut], text[cut:], order, len(vocabulary))
    report("perplexity of a character", ours, f"{order}-grams", theirs)


if __name__ == "__main__":
    main()
