"""A character-level language model that is trained on Python's own sources and then writes: ``python -m fastrnn demo``.

The recurrent layer is fastrnn's; all that stands round it is plain NumPy: the embedding, the softmax and its loss,
truncated backpropagation through time, clipping and Adam.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import multiprocessing
import os
import sys
import textwrap
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np

import fastrnn
from fastrnn.losses import CrossEntropy

#: Modules whose sources every Python installation has; one that is missing is left out.
MODULES = """
    argparse ast bdb calendar configparser csv dataclasses difflib doctest enum fractions ftplib functools gettext heapq
    inspect ipaddress mailbox optparse pdb pickle pickletools platform pydoc random shutil smtplib socket statistics
    subprocess tarfile tempfile textwrap threading tokenize traceback typing uuid weakref
""".split()

LENGTH = 600_000  # characters of them that are read
BATCH, WINDOW = 32, 64  # streams side by side, and steps that a gradient goes back
EMBEDDING = 64
LEARNING_RATE, CLIP = 4e-3, 1.0
SHORTEST = 50_000  # characters: with less, the part for validation is too short for a window
PROMPT = "def "
BLAS_WAIT = "OPENBLAS_THREAD_TIMEOUT"  # how long OpenBLAS' threads spin: the logarithm of a number of cycles

Parameters = dict[str, np.ndarray]
Pairs = list[tuple[np.ndarray, np.ndarray]]  # inputs and targets


# ---- the text


def standard_library_text(length: int = LENGTH) -> str:
    """The sources of well-known modules of the standard library, one after the other, cut to `length` characters.

    Four spaces become a tab: of the model's memory, indentation is to take one character a level.
    """
    text = ""
    for name in MODULES:
        spec = importlib.util.find_spec(name)
        loader = spec and spec.loader
        if isinstance(loader, importlib.abc.InspectLoader):
            try:
                text += (loader.get_source(name) or "").replace("    ", "\t")
            except (ImportError, OSError):  # an installation may hold compiled files alone
                continue
        if len(text) >= length:
            break
    return text[:length]


@dataclass
class Corpus:
    """A text as numbers: `vocabulary[i]` is the character that number i stands for."""

    vocabulary: str
    training: np.ndarray
    validation: np.ndarray

    @classmethod
    def from_text(cls, text: str) -> Corpus:
        """Number the characters of `text`; its last twentieth is for validation."""
        if len(text) < SHORTEST:
            raise ValueError(f"the text has {len(text)} characters; a model needs at least {SHORTEST}")
        vocabulary = "".join(sorted(set(text)))
        number = {character: i for i, character in enumerate(vocabulary)}
        ids = np.array([number[character] for character in text])
        cut = len(ids) - len(ids) // 20
        return cls(vocabulary, ids[:cut], ids[cut:])


def windows(ids: np.ndarray, batch: int = BATCH, steps: int = WINDOW) -> Pairs:
    """Pairs (inputs, targets), each (steps, batch): a column goes on in the next pair where it ended in this one."""
    length = (len(ids) - 1) // batch
    starts = np.arange(batch) * length
    pairs = []
    for t in range(0, length - steps + 1, steps):
        at = starts + np.arange(t, t + steps)[:, None]
        pairs.append((ids[at], ids[at + 1]))
    return pairs


# ---- the model


def cross_entropy(logits: np.ndarray, targets: np.ndarray) -> tuple[float, np.ndarray]:
    """Mean cross-entropy in nats of rows of `logits` (N,V), and its gradient."""
    loss = CrossEntropy()(logits, targets)
    return loss.value, loss.gradient


class CharacterModel:
    """Embedding, GRU and a linear layer that rates each character as the next one."""

    def __init__(
        self,
        characters: int,
        hidden_size: int,
        *,
        embedding_size: int = EMBEDDING,
        seed: int = 0,
        dtype: Any = np.float32,
        backend: str | None = None,
    ) -> None:
        random = np.random.default_rng(seed)
        self.gru = fastrnn.GRU(embedding_size, hidden_size, dtype=dtype, seed=seed, backend=backend)
        self.embedding = random.standard_normal((characters, embedding_size)).astype(dtype)
        self.weight = (random.standard_normal((characters, hidden_size)) / np.sqrt(hidden_size)).astype(dtype)
        self.bias = np.zeros(characters, dtype)

    @property
    def parameters(self) -> Parameters:
        """All parameters by name: the arrays themselves, to be updated in place."""
        return {"embedding": self.embedding, "weight": self.weight, "bias": self.bias, **self.gru.parameters}

    def logits(self, hidden: np.ndarray) -> np.ndarray:
        """The characters' ratings (N,V) for hidden units (N,H)."""
        return hidden @ self.weight.T + self.bias

    def loss(self, inputs: np.ndarray, targets: np.ndarray, state: Any = None) -> tuple[float, Any]:
        """Mean cross-entropy, and the state after the last step."""
        output, state = self.gru(self.embedding[inputs], state)
        loss, _ = cross_entropy(self.logits(output.reshape(targets.size, -1)), targets.ravel())
        return loss, state

    def loss_and_gradients(
        self, inputs: np.ndarray, targets: np.ndarray, state: Any = None
    ) -> tuple[float, Parameters, Any]:
        """Mean cross-entropy, its gradient for every parameter, and the state after the last step."""
        output, state, tape = self.gru.forward(self.embedding[inputs], state)
        hidden = output.reshape(targets.size, -1)
        loss, d_logits = cross_entropy(self.logits(hidden), targets.ravel())
        gru = self.gru.backward(tape, (d_logits @ self.weight).reshape(output.shape))
        d_embedding = np.zeros_like(self.embedding)
        np.add.at(d_embedding, inputs, gru.x)
        own = {"embedding": d_embedding, "weight": d_logits.T @ hidden, "bias": d_logits.sum(axis=0)}
        return loss, {**own, **gru.params}, state

    def write(self, prompt: np.ndarray, length: int, seed: int = 0, temperature: float = 0.7) -> Iterator[int]:
        """Draw `length` characters after `prompt`, one step of the GRU each."""
        random = np.random.default_rng(seed)
        output, state = self.gru(self.embedding[prompt][:, None])
        hidden = output[-1]
        for _ in range(length):
            logits = self.logits(hidden)[0] / temperature
            weights = np.exp(logits - logits.max()).cumsum()
            character = int(weights.searchsorted(random.random() * weights[-1], side="right"))
            yield character
            hidden, state = self.gru.step(self.embedding[[character]], state)


# ---- training


def clip_by_global_norm(gradients: Parameters, limit: float = CLIP) -> float:
    """Scale all gradients, which are modified, so that their common norm is at most `limit`; return what it was."""
    norm = float(np.sqrt(sum(float(np.vdot(g, g)) for g in gradients.values())))
    if norm > limit:
        for gradient in gradients.values():
            gradient *= limit / norm
    return norm


class Adam:
    """Adam, as its authors give it (Kingma and Ba 2015, algorithm 1)."""

    def __init__(self, parameters: Parameters, beta1: float = 0.9, beta2: float = 0.99, epsilon: float = 1e-8) -> None:
        self.beta1, self.beta2, self.epsilon = beta1, beta2, epsilon
        self.steps = 0
        self.mean = {name: np.zeros_like(p) for name, p in parameters.items()}
        self.square = {name: np.zeros_like(p) for name, p in parameters.items()}

    def update(self, parameters: Parameters, gradients: Parameters, learning_rate: float) -> None:
        """Take one step; the parameters are modified."""
        self.steps += 1
        correction = np.sqrt(1 - self.beta2**self.steps) / (1 - self.beta1**self.steps)
        for name, gradient in gradients.items():
            mean, square = self.mean[name], self.square[name]
            mean += (1 - self.beta1) * (gradient - mean)
            square += (1 - self.beta2) * (gradient * gradient - square)
            parameters[name] -= float(learning_rate * correction) * mean / (np.sqrt(square) + self.epsilon)


def train_step(
    model: CharacterModel, adam: Adam, inputs: np.ndarray, targets: np.ndarray, state: Any, learning_rate: float
) -> tuple[float, Any]:
    """One step of truncated backpropagation through time; return the loss before it and the state to go on with."""
    loss, gradients, state = model.loss_and_gradients(inputs, targets, state)
    clip_by_global_norm(gradients)
    adam.update(model.parameters, gradients, learning_rate)
    return loss, state


class Progress:
    """Tells how far a training is: a bar that is written over on a terminal, the lines of the epochs elsewhere."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.live = stream.isatty()
        self.shown = 0.0

    def show(self, share: float, text: str) -> None:
        """Draw the bar anew, ten times a second at most."""
        now = time.perf_counter()
        if self.live and now - self.shown > 0.1:
            self.shown = now
            filled = int(24 * share)
            self.stream.write(f"\r\x1b[K  [{'#' * filled}{'.' * (24 - filled)}] {text}")
            self.stream.flush()

    def line(self, text: str) -> None:
        """Write a line that stays."""
        self.stream.write(("\r\x1b[K" if self.live else "") + text + "\n")
        self.stream.flush()


@dataclass
class Trained:
    """What a training reached; `seconds` are those of its steps."""

    epochs: int = 0
    validation_loss: float = float("nan")
    characters: int = 0
    seconds: float = 0.0
    interrupted: bool = False


def validation_loss(model: CharacterModel, pairs: Pairs) -> float:
    """Mean cross-entropy over `pairs`, with the state carried through them."""
    losses, state = [], None
    for inputs, targets in pairs:
        loss, state = model.loss(inputs, targets, state)
        losses.append(loss)
    return float(np.mean(losses))


def train(model: CharacterModel, corpus: Corpus, epochs: int, seconds: float, progress: Progress) -> Trained:
    """Train `model`, which is modified, for `epochs` or until `seconds` have gone or Ctrl-C comes."""
    pairs, held_out = windows(corpus.training), windows(corpus.validation)
    adam = Adam(model.parameters)
    total = epochs * len(pairs)
    reached = Trained()
    begin = time.perf_counter()
    try:
        for epoch in range(1, epochs + 1):
            state, losses = None, []
            for inputs, targets in pairs:
                if time.perf_counter() - begin > seconds:
                    progress.line(f"  {seconds:g} s are over in epoch {epoch}")
                    return reached
                start = time.perf_counter()
                rate = LEARNING_RATE * (1 - adam.steps / total)
                loss, state = train_step(model, adam, inputs, targets, state, rate)
                losses.append(loss)
                reached.characters += inputs.size
                reached.seconds += time.perf_counter() - start
                speed = reached.characters / reached.seconds
                progress.show(adam.steps / total, f"epoch {epoch}/{epochs}  loss {loss:.3f}  {speed:,.0f} characters/s")
            reached.epochs, reached.validation_loss = epoch, validation_loss(model, held_out)
            progress.line(
                f"  epoch {epoch}/{epochs}  training loss {np.mean(losses):.3f}  "
                f"validation loss {reached.validation_loss:.3f}  perplexity {np.exp(reached.validation_loss):.2f}  "
                f"{speed:,.0f} characters/s  {time.perf_counter() - begin:.0f} s"
            )
    except KeyboardInterrupt:
        progress.line(f"  interrupted in epoch {reached.epochs + 1}")
        reached.interrupted = True
    return reached


# ---- against the NumPy reference


def seconds_per_step(backend: str | None, characters: int, hidden: int, pairs: Pairs) -> tuple[float, list[float]]:
    """Median time of a training step of a new model, and the losses of all steps."""
    model = CharacterModel(characters, hidden, backend=backend)
    adam, state = Adam(model.parameters), None
    seconds, losses = [], []
    for inputs, targets in pairs:
        start = time.perf_counter()
        loss, state = train_step(model, adam, inputs, targets, state, LEARNING_RATE)
        seconds.append(time.perf_counter() - start)
        losses.append(loss)
    return float(np.median(seconds[1:])), losses  # the first step is for warming up


def compare_with_reference(corpus: Corpus, hidden: int, steps: int = 12) -> tuple[float, float]:
    """Seconds of a training step with fastrnn, and with the NumPy reference in its place.

    The reference has a process of its own, in which the threads of NumPy's BLAS wait as long as they do by default:
    that makes it faster, and fastrnn slower. Both must come to the same losses.
    """
    work = len(corpus.vocabulary), hidden, windows(corpus.training)[:steps]
    fast, losses = seconds_per_step(None, *work)
    waiting = os.environ.pop(BLAS_WAIT, None)
    try:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as other:
            slow, expected = other.submit(seconds_per_step, "reference", *work).result()
    finally:
        if waiting is not None:
            os.environ[BLAS_WAIT] = waiting
    if not np.allclose(losses, expected, rtol=1e-2):  # rounding differs, and grows from step to step
        raise RuntimeError(f"the losses are {losses}, with the NumPy reference {expected}")
    return fast, slow


# ---- the whole


def start_anew_with_resting_blas() -> None:
    """Start this program anew with BLAS threads that sleep soon after a product, where nothing says how long they wait.

    NumPy's OpenBLAS keeps them spinning for 20 ms, on the cores that the layer then works on: a training step of this
    model takes 25 ms so, and 16 ms otherwise (2 cores of an AMD EPYC with Zen 5). It reads the variable once, when
    NumPy is loaded.
    """
    if os.name == "posix" and BLAS_WAIT not in os.environ:
        os.environ[BLAS_WAIT] = "16"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def read_text(path: Path | None) -> str:
    """The text of a file, or of the standard library's sources."""
    if path is None:
        return standard_library_text()
    return path.read_text(encoding="utf-8", errors="replace")


def write_and_time(model: CharacterModel, corpus: Corpus, length: int = 800) -> tuple[str, float]:
    """Let the model write `length` characters after the prompt; return the text and its characters a second."""
    prompt = PROMPT if set(PROMPT) <= set(corpus.vocabulary) else corpus.vocabulary[:1]
    number = {character: i for i, character in enumerate(corpus.vocabulary)}
    ids = np.array([number[character] for character in prompt])
    list(model.write(ids, 1))  # compiles the step
    start = time.perf_counter()
    written = list(model.write(ids, length))
    seconds = time.perf_counter() - start
    return prompt + "".join(corpus.vocabulary[i] for i in written), length / seconds


def run(epochs: int = 8, hidden: int = 256, seconds: float = 60.0, text: Path | None = None) -> int:
    """Train, write and compare, and print what happens.

    Parameters
    ----------
    epochs
        How often the text is read; fewer where `seconds` are over before.
    hidden
        Hidden units of the GRU.
    seconds
        Longest time for the training.
    text
        A file to learn from in place of the standard library's sources.

    Returns
    -------
    int
        The exit status: 0, or 130 where Ctrl-C ended the training.

    Raises
    ------
    OSError
        `text` cannot be read.
    ValueError
        The text is too short.
    """
    source = read_text(text)
    corpus = Corpus.from_text(source)
    model = CharacterModel(len(corpus.vocabulary), hidden)
    count = sum(parameter.size for parameter in model.parameters.values())
    print(
        f"Text: {len(source):,} characters of {text or 'the standard library'}, {len(corpus.vocabulary)} different ones"
    )
    print(f"Model: GRU with {hidden} hidden units, {count:,} parameters, on {fastrnn.get_num_threads()} threads")

    start = time.perf_counter()
    model.loss_and_gradients(*windows(corpus.training)[0])
    print(f"Compiled, or loaded from the cache, in {time.perf_counter() - start:.1f} s", flush=True)

    reached = train(model, corpus, epochs, seconds, Progress(sys.stdout))
    print(
        f"Trained on {reached.characters:,} characters in {reached.seconds:.1f} s: "
        f"{reached.characters / max(reached.seconds, 1e-9):,.0f} characters/s"
    )
    if reached.interrupted:
        return 130

    written, speed = write_and_time(model, corpus)
    print(f"It writes, at {speed:,.0f} characters/s:\n")
    print(textwrap.indent(written.expandtabs(4), "    ") + "\n")
    fast, slow = compare_with_reference(corpus, hidden)
    print(
        f"One training step of {BATCH * WINDOW:,} characters: {1e3 * fast:.1f} ms. "
        f"With NumPy alone: {1e3 * slow:.1f} ms, {slow / fast:.1f} times as long."
    )
    return 0
