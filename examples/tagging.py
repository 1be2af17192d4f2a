"""Tagging: what each name in a Python function is, from the tokens around it (many to many, aligned).

The functions are those of the modules of Python's standard library; its tokenizer cuts them into tokens, and its parser
says what a name is: a parameter, a variable of the function, a name from outside, an attribute, a method, a keyword
argument or the function itself. A bidirectional LSTM reads the tokens and tags every name; other tokens have no tag.
Names that are not among the 2000 most frequent words look all alike to it. All of a module is either for training or
for testing. The baseline is the tag that a name most often has in training, and for one that is not there the most
frequent tag of all.
"""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # its threads would spin on the cores that fastrnn needs

import ast
import bisect
import io
import itertools
import tokenize
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from sklearn.metrics import accuracy_score, classification_report, f1_score

from common import is_quick, report
from fastrnn import LSTM
from fastrnn.train import (
    Adam,
    Cosine,
    CrossEntropy,
    Dropout,
    Embedding,
    Linear,
    Sequential,
    Trainer,
)

TAGS = ["parameter", "variable", "outside", "attribute", "method", "keyword argument", "function"]
NO_TAG = -1
WORDS, LONGEST = 2000, 100  # words; tokens of a function
PADDING, UNKNOWN = 0, 1
SKIPPED = {tokenize.NL, tokenize.COMMENT, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
Tagged = list[tuple[str, int]]  # tokens, each with its tag


def modules() -> list[str]:
    """Return the source of the standard library's modules, without those of packages.

    Where there is more than ASCII, it is left out: columns are bytes to the parser, and characters to the tokenizer.
    """
    sources = (path.read_text("utf-8") for path in sorted(Path(os.__file__).parent.glob("*.py")))
    return [source for source in sources if source.isascii()]


def functions(source: str) -> Iterator[Tagged]:
    """Yield the tokens of a module's functions and methods, with their tags; one inside another is a part of it."""
    module = ast.parse(source)
    tokens = [token for token in tokenize.generate_tokens(io.StringIO(source).readline) if token.type not in SKIPPED]
    lines = [token.start[0] for token in tokens]
    scopes = [module, *(node for node in module.body if isinstance(node, ast.ClassDef))]
    for node in itertools.chain.from_iterable(scope.body for scope in scopes):
        if isinstance(node, ast.FunctionDef):
            places = dict(named(node))
            own = tokens[bisect.bisect_left(lines, node.lineno) : bisect.bisect_right(lines, node.end_lineno)]
            if len(own) <= LONGEST:
                yield [(word(token), places.get(token.start, NO_TAG)) for token in own]


def word(token: tokenize.TokenInfo) -> str:
    alike = {tokenize.STRING: "<string>", tokenize.NUMBER: "<number>"}
    return alike.get(token.type, token.string.strip() or "<end of line>")


def walk(node: ast.AST) -> Iterator[ast.AST]:
    """Do as ast.walk does, but not into f-strings, where the parser tells no right places before Python 3.12."""
    yield node
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.JoinedStr):
            yield from walk(child)


def named(function: ast.FunctionDef) -> Iterator[tuple[tuple[int, int], int]]:
    """Yield where each name in a function stands, line and column, and the index of its tag."""
    nodes = list(walk(function))
    parameters = {node.arg for node in nodes if isinstance(node, ast.arg)}
    bound = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    bound |= {node.name for node in nodes[1:] if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.ExceptHandler))}
    bound -= {name for node in nodes if isinstance(node, ast.Global) for name in node.names}
    called = {id(node.func) for node in nodes if isinstance(node, ast.Call)}
    yield (function.lineno, function.col_offset + len("def ")), TAGS.index("function")
    for node in nodes:
        place, kind = (getattr(node, "lineno", 0), getattr(node, "col_offset", 0)), None
        if isinstance(node, ast.arg):
            kind = "parameter"
        elif isinstance(node, ast.keyword) and node.arg:
            kind = "keyword argument"
        elif isinstance(node, ast.Attribute):
            place = node.end_lineno, node.end_col_offset - len(node.attr)
            kind = "method" if id(node) in called else "attribute"
        elif isinstance(node, ast.Name):
            kind = "parameter" if node.id in parameters else "variable" if node.id in bound else "outside"
        if kind is not None:
            yield place, TAGS.index(kind)


def encode(rows: list[Tagged], vocabulary: dict[str, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return words and tags, (N, T) and padded, and how many each row has."""
    x, y = np.full((len(rows), LONGEST), PADDING), np.full((len(rows), LONGEST), NO_TAG)
    for i, row in enumerate(rows):
        x[i, : len(row)] = [vocabulary.get(word, UNKNOWN) for word, _ in row]
        y[i, : len(row)] = [tag for _, tag in row]
    return x, y, np.array([len(row) for row in rows])


def build() -> Sequential:
    return Sequential(
        embedding=Embedding(WORDS, 64, seed=0),
        words=Dropout(0.2, seed=0),
        lstm=LSTM(64, 128, bidirectional=True, seed=0),
        features=Dropout(0.2, seed=1),
        output=Linear(256, len(TAGS), seed=0),
    )


def most_frequent(training: list[Tagged], test: list[Tagged]) -> np.ndarray:
    """Return the baseline's tags for the names of the test."""
    counts = defaultdict(Counter)
    for word, tag in itertools.chain.from_iterable(training):
        if tag != NO_TAG:
            counts[word][tag] += 1
    usual = sum(counts.values(), Counter()).most_common(1)[0][0]
    known = {word: tags.most_common(1)[0][0] for word, tags in counts.items()}
    return np.array([known.get(word, usual) for row in test for word, tag in row if tag != NO_TAG])


def main() -> None:
    quick = is_quick(__doc__)
    sources = modules()[:: 6 if quick else 1]
    test = [row for source in sources[::5] for row in functions(source)]
    training = [row for number, source in enumerate(sources) if number % 5 for row in functions(source)]
    words = Counter(word for row in training for word, _ in row)
    vocabulary = {word: label for label, (word, _) in enumerate(words.most_common(WORDS - 2), start=2)}
    (x, y, lengths), (x_test, y_test, lengths_test) = encode(training, vocabulary), encode(test, vocabulary)
    print(f"{len(training)} functions for training, {len(test)} for testing, of {lengths.mean():.0f} tokens")

    epochs, batch = (3, 8) if quick else (6, 16)
    schedule = Cosine(4e-3, steps=epochs * len(x) // batch, minimum=2e-4)
    trainer = Trainer(build(), CrossEntropy(ignore_index=NO_TAG), Adam(schedule), clip_norm=1.0)
    trainer.fit(x, y, lengths=lengths, epochs=epochs, batch_size=batch)

    tagged = y_test != NO_TAG
    targets, ours = y_test[tagged], trainer.predict(x_test, lengths=lengths_test).argmax(axis=-1)[tagged]
    theirs = most_frequent(training, test)
    print(classification_report(targets, ours, target_names=TAGS))
    for measure, figure in {
        "accuracy of a name's tag": accuracy_score,
        "macro F1 of the tags": lambda targets, tags: f1_score(targets, tags, average="macro"),
    }.items():
        baseline = "the name's most frequent tag"
        report(measure, figure(targets, ours), baseline, figure(targets, theirs), larger_is_better=True)


if __name__ == "__main__":
    main()
