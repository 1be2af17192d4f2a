"""Topics: which of ten packages a paragraph of SciPy's documentation is about, from its words (many to one).

The paragraphs are those of the docstrings of SciPy's public functions and classes, as lower-case words of letters
alone; one that occurs twice anywhere is left out, and all of a docstring is either for training or for testing. The
model is the usual one: an embedding of 1000 words, an LSTM, and a linear layer behind its last step, with early
stopping by a validation part. The baseline is the most frequent topic; a logistic regression and a naive Bayes
classifier of scikit-learn's, on the counts of the same 1000 words, are printed beside it: they do not know the order
of the words, and need not, for a topic.
"""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # its threads would spin on the cores that fastrnn needs

import importlib
import inspect
import re
from collections import Counter

import numpy as np
from sklearn.dummy import DummyClassifier
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score
from sklearn.model_selection import GroupShuffleSplit
from sklearn.naive_bayes import MultinomialNB
from sklearn.pipeline import make_pipeline

from common import is_quick, report
from fastrnn import LSTM
from fastrnn.train import (
    Adam,
    CrossEntropy,
    Dropout,
    Embedding,
    Last,
    Linear,
    Sequential,
    Trainer,
    accuracy,
)

TOPICS = ["fft", "integrate", "interpolate", "linalg", "ndimage", "optimize", "signal", "sparse", "special", "stats"]
WORDS, LONGEST = 1000, 60
PADDING, UNKNOWN = 0, 1


def paragraphs() -> tuple[list[str], np.ndarray, np.ndarray]:
    """Return paragraphs as words with a space between, the topic of each, and the number of its docstring."""
    found = []
    for topic, package in enumerate(TOPICS):
        module = importlib.import_module(f"scipy.{package}")
        for name in sorted(module.__all__):
            for paragraph in (inspect.getdoc(getattr(module, name)) or "").split("\n\n"):
                words = re.findall("[a-z]+", paragraph.lower())
                found.append((" ".join(words), topic, f"{package}.{name}"))
    times = Counter(text for text, _, _ in found)
    texts, topics, names = zip(*[row for row in found if times[row[0]] == 1 and row[0].count(" ") >= 7], strict=True)
    return list(texts), np.array(topics), np.unique(names, return_inverse=True)[1]


def split(groups: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    return next(GroupShuffleSplit(1, test_size=share, random_state=seed).split(groups, groups=groups))


def encode(texts: list[str], vocabulary: dict[str, int]) -> tuple[np.ndarray, np.ndarray]:
    """Return labels of words (N, T), padded, and how many each row has."""
    rows = [[vocabulary.get(word, UNKNOWN) for word in text.split()[:LONGEST]] for text in texts]
    lengths = np.array([len(row) for row in rows])
    x = np.full((len(rows), LONGEST), PADDING)
    x[np.arange(LONGEST) < lengths[:, None]] = np.concatenate(rows)
    return x, lengths


def build() -> Sequential:
    model = Sequential(
        embedding=Embedding(WORDS, 64, seed=0),
        words=Dropout(0.5, seed=0),
        lstm=LSTM(64, 128, seed=0),
        last=Last(),
        features=Dropout(0.5, seed=1),
        output=Linear(128, len(TOPICS), seed=0),
    )
    model.single_bias()  # 164 106 numbers are trained
    model.summary()
    return model


def scores(name: str, targets: np.ndarray, predictions: np.ndarray) -> tuple[float, float]:
    """Return, and print, the accuracy and the mean of the topics' F1."""
    found = accuracy_score(targets, predictions), f1_score(targets, predictions, average="macro", zero_division=0)
    print(f"{name}: accuracy {found[0]:.3f}, macro F1 {found[1]:.3f}")
    return found


def main() -> None:
    quick = is_quick(__doc__)
    texts, topics, groups = paragraphs()
    rest, test = split(groups, 0.2, seed=0)
    rest = rest[::3] if quick else rest
    training, validation = (rest[part] for part in split(groups[rest], 0.125, seed=0))
    parts = [[texts[i] for i in part] for part in (training, validation, test)]
    print(f"paragraphs for training, validation and test: {', '.join(str(len(part)) for part in parts)}")

    counts = Counter(" ".join(parts[0]).split())
    known = {word: label for label, (word, _) in enumerate(counts.most_common(WORDS - 2), start=2)}
    (x, lengths), (x_held, lengths_held), (x_test, lengths_test) = (encode(part, known) for part in parts)
    trainer = Trainer(build(), CrossEntropy(), Adam(2e-3), clip_norm=1.0, metrics={"accuracy": accuracy})
    held = x_held, topics[validation], lengths_held
    epochs, batch = (2, 16) if quick else (30, 32)
    trainer.fit(x, topics[training], lengths=lengths, batch_size=batch, validation=held, epochs=epochs, patience=4)
    ours = scores("LSTM", topics[test], trainer.predict(x_test, lengths=lengths_test).argmax(axis=1))

    majority, *bags = (
        DummyClassifier(),
        make_pipeline(CountVectorizer(vocabulary=list(known)), MultinomialNB()),
        make_pipeline(CountVectorizer(vocabulary=list(known)), LogisticRegression(max_iter=1000)),
    )
    theirs = scores("most frequent topic", topics[test], majority.fit(parts[0], topics[training]).predict(parts[2]))
    for name, bag in zip(("naive Bayes of words", "logistic regression of words"), bags, strict=True):
        scores(name, topics[test], bag.fit(parts[0], topics[training]).predict(parts[2]))
    report("accuracy of the topic", ours[0], "most frequent topic", theirs[0], larger_is_better=True)
    report("macro F1 of the topic", ours[1], "most frequent topic", theirs[1], larger_is_better=True)


if __name__ == "__main__":
    main()
