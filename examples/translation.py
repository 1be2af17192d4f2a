"""Translation: numbers in words to digits and back, with an encoder and a decoder.

"four hundred and eighty seven thousand and three", a word at a time, becomes "487003". A bidirectional GRU reads the
source, and a GRU that starts from its last states writes the target: in training it reads the target a step late
(teacher forcing), afterwards what it has written itself, always the most probable. Source: I. Sutskever et al.,
Sequence to sequence learning, 2014. The numbers are below a thousand million, each drawn below a power of ten that is
drawn first; none of the test occurs in training.

For digits, the baseline is scikit-learn's logistic regression, one for each of the nine places, on the counts of words
and of pairs of words. The same with three words in a row, which nearly tell what stands at which place, is printed
beside it, and is nearly as good: no number here needs a longer view. For words, the baseline is the training number
that has the most digits at its end in common, whose words are right in many places: the measure is the rate of wrong
words.

With --quick the numbers are below ten thousand, and the regression counts single words.
"""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # its threads would spin on the cores that fastrnn needs

import random

import numpy as np
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression

from common import is_quick, report
from fastrnn import GRU
from fastrnn.train import (
    Adam,
    Cosine,
    CrossEntropy,
    Embedding,
    EncoderDecoder,
    Linear,
    Sequential,
    Trainer,
    error_rate,
)

SMALL = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
).split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
UNITS = {"million": 10**6, "thousand": 1000, "hundred": 100}
WORDS = [*SMALL, *TENS, *UNITS, "and"]
DIGITS = list("0123456789")
BATCH = 32
Row = list[str]


def in_words(number: int) -> Row:
    """Return a number below a thousand million in English words."""
    if number < 20:
        return [SMALL[number]]
    if number < 100:
        return [TENS[number // 10 - 2], *(in_words(number % 10) if number % 10 else [])]
    name, unit = next((name, unit) for name, unit in UNITS.items() if unit <= number)
    rest = number % unit
    link = ["and"] if 0 < rest < 100 else []
    return [*in_words(number // unit), name, *link, *(in_words(rest) if rest else [])]


def different_numbers(count: int, places: int) -> list[int]:
    found: dict[int, None] = {}  # in the order in which they were drawn
    while len(found) < count:
        found[random.randrange(10 ** random.randint(1, places))] = None
    return list(found)


def encode(rows: list[Row], symbols: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return the symbols' labels (N, T), padded with 0, and how many each row has."""
    label = {symbol: number for number, symbol in enumerate(symbols)}
    lengths = np.array([len(row) for row in rows])
    x = np.zeros((len(rows), lengths.max()), int)
    x[np.arange(x.shape[1]) < lengths[:, None]] = [label[symbol] for row in rows for symbol in row]
    return x, lengths


class Translator:
    """From rows of some symbols to rows of others."""

    def __init__(self, source: list[str], target: list[str]) -> None:
        self.source, self.target = source, [*target, "<start>", "<stop>"]
        size = len(self.target)
        encoder = Sequential(Embedding(len(source), 32, seed=0), GRU(32, 64, bidirectional=True, seed=0))
        decoder = Sequential(Embedding(size, 32, seed=1), GRU(32, 128, seed=1), Linear(128, size, seed=1))
        self.model = EncoderDecoder(encoder, decoder)

    def train(self, sources: list[Row], targets: list[Row], epochs: int) -> None:
        x, lengths = encode(sources, self.source)
        read, steps = encode([["<start>", *row] for row in targets], self.target)
        written, _ = encode([[*row, "<stop>"] for row in targets], self.target)
        schedule = Cosine(5e-3, steps=epochs * -(-len(x) // BATCH), minimum=1e-4)
        trainer = Trainer(self.model, CrossEntropy(), Adam(schedule), clip_norm=1.0)
        trainer.fit((x, read), written, lengths=(lengths, steps), epochs=epochs, batch_size=BATCH)

    def __call__(self, sources: list[Row]) -> list[Row]:
        x, lengths = encode(sources, self.source)
        start, stop = (self.target.index(symbol) for symbol in ("<start>", "<stop>"))
        rows = self.model.decode(x, lengths=lengths, start=start, stop=stop, limit=30)
        return [[self.target[label] for label in row] for row in rows]


def digits_by_regression(words: list[Row], digits: list[Row], test: list[Row], longest: int) -> list[Row]:
    """Return digits for the words of the test: a classifier for each place from the right, "" where there is none."""
    counter = CountVectorizer(ngram_range=(1, longest), min_df=3)
    x = counter.fit_transform(" ".join(row) for row in words)
    x_test = counter.transform(" ".join(row) for row in test)
    columns = []
    for place in range(1, 1 + max(map(len, digits))):
        y = [row[-place] if place <= len(row) else "" for row in digits]
        columns.append(LogisticRegression(max_iter=1000).fit(x, y).predict(x_test))
    return [[digit for digit in reversed(row) if digit] for row in zip(*columns, strict=True)]


def words_of_neighbours(words: list[Row], digits: list[Row], test: list[Row]) -> list[Row]:
    """Return, for the digits of the test, the words of that training number which shares the most digits at its end."""
    by_end = {tuple(row[-k:]): own for own, row in zip(words, digits, strict=True) for k in range(1, len(row) + 1)}
    return [next(by_end[end] for k in range(len(row)) if (end := tuple(row[k:])) in by_end) for row in test]


def exact(targets: list[Row], translations: list[Row]) -> float:
    return 100.0 * np.mean([target == own for target, own in zip(targets, translations, strict=True)])


def translated(source: list[str], target: list[str], rows: list[tuple[Row, Row]], test: int, epochs: int) -> list[Row]:
    """Return the translations of the last `test` rows, by a model of the others; print three of them."""
    sources, targets = map(list, zip(*rows, strict=True))
    translator = Translator(source, target)
    translator.train(sources[:-test], targets[:-test], epochs)
    found = translator(sources[-test:])
    for row, own in zip(sources[-test:][:3], found, strict=False):
        print(f"{' '.join(row)} → {' '.join(own)}")
    print(f"exactly right: {exact(targets[-test:], found):.2f} %")
    return found


def main() -> None:
    quick = is_quick(__doc__)
    random.seed(0)
    training, test, places, epochs, longest = (3000, 500, 4, 4, 1) if quick else (60_000, 2000, 9, 3, 2)
    numbers = different_numbers(training + test, places)
    words, digits = [in_words(number) for number in numbers], [list(str(number)) for number in numbers]
    in_digits = translated(WORDS, DIGITS, list(zip(words, digits, strict=True)), test, epochs)
    back = translated(DIGITS, WORDS, list(zip(digits, words, strict=True)), test, epochs)

    known, right = (words[:training], digits[:training]), (words[training:], digits[training:])
    ours = exact(right[1], in_digits)
    theirs, more = (exact(right[1], digits_by_regression(*known, right[0], n)) for n in (longest, longest + 1))
    baseline, other = (f"logistic regressions, {n}-grams of words" for n in (longest, longest + 1))
    print(f"{other}: {more:.2f} %")
    report("numbers exactly right in digits, %", ours, baseline, theirs, larger_is_better=True)
    ours, theirs = (100 * error_rate(right[0], rows) for rows in (back, words_of_neighbours(*known, right[1])))
    report("wrong words, %", ours, "most similar number", theirs)


if __name__ == "__main__":
    main()
