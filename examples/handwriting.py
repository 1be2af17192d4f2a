"""Handwriting: digits read row by row by a bidirectional LSTM, and which digit each is (many-to-one).

The digits are scikit-learn's, 1797 scans of 8 x 8 pixels (Alpaydin & Kaynak, UCI 1998). Each is a sequence of 8 rows
of pixels; two layers read it downwards and upwards, and what both directions know at their ends decides. A quarter of
the digits is kept for the test; a sixth of the others tells which epoch was the best, and when to stop. With so few
digits a model soon knows them by heart; dropout is against that. The baseline is scikit-learn's logistic regression of
all 64 pixels, which learns from the digits of the validation, too.

With --quick there are fewer epochs, and a weaker baseline: which of the ten digits' mean pictures is the nearest.
"""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # its threads would spin on the cores that fastrnn needs

import numpy as np
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split

from common import is_quick, report
from fastrnn import LSTM
from fastrnn.train import Adam, Cosine, CrossEntropy, Dropout, Last, Linear, Sequential, Trainer, accuracy

BATCH, HIDDEN = 32, 64


def build() -> Sequential:
    return Sequential(
        noise=Dropout(0.1, seed=1),
        lstm=LSTM(8, HIDDEN, num_layers=2, bidirectional=True, dropout=0.3, seed=0),
        last=Last(bidirectional=True),
        dropout=Dropout(0.5, seed=2),
        output=Linear(2 * HIDDEN, 10, seed=0),
    )


def nearest_mean(x: np.ndarray, y: np.ndarray, x_test: np.ndarray) -> np.ndarray:
    """Return which digit's mean picture is the nearest to each picture of the test."""
    means = np.stack([x[y == digit].mean(axis=0) for digit in range(10)])
    return np.square(x_test[:, None] - means).sum(axis=(2, 3)).argmin(axis=1)


def logistic_regression(x: np.ndarray, y: np.ndarray, x_test: np.ndarray) -> np.ndarray:
    return LogisticRegression(max_iter=1000).fit(x.reshape(-1, 64), y).predict(x_test.reshape(-1, 64))


def main() -> None:
    quick = is_quick(__doc__)
    pixels, digits = load_digits(return_X_y=True)
    rows = (pixels / 16).astype(np.float32).reshape(-1, 8, 8)
    known, x_test, known_digits, y_test = train_test_split(
        rows, digits, test_size=1 / 4, stratify=digits, random_state=0
    )
    x, x_chosen, y, y_chosen = train_test_split(
        known, known_digits, test_size=1 / 6, stratify=known_digits, random_state=0
    )

    model, epochs = build(), 16 if quick else 60
    model.summary()
    optimizer = Adam(Cosine(5e-3, steps=epochs * len(x) // BATCH))
    trainer = Trainer(model, CrossEntropy(), optimizer, clip_norm=1.0, metrics={"accuracy": accuracy})
    trainer.fit(x, y, epochs=epochs, batch_size=BATCH, validation=(x_chosen, y_chosen), patience=15)
    print(f"{trainer.epoch} epochs, the best was number {trainer.best['epoch']}")

    name, baseline = ("nearest mean", nearest_mean) if quick else ("logistic regression", logistic_regression)
    ours = trainer.evaluate(x_test, y_test)["accuracy"]
    theirs = accuracy(y_test, baseline(known, known_digits, x_test))
    report(f"accuracy on {len(y_test)} digits", ours, name, theirs, larger_is_better=True)


if __name__ == "__main__":
    main()
