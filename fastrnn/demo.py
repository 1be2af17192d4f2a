"""A character-level language model that is trained on Python's own sources and then writes: ``python -m fastrnn demo``.

Around the recurrent layer stands what `fastrnn.train` has. The loop is the demonstration's own: it ends within an epoch
when its time is over.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import os
import subprocess
import sys
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np

import fastrnn
from fastrnn.train import (
    Adam,
    Cosine,
    CrossEntropy,
    Embedding,
    Linear,
    Optimizer,
    Sequential,
    Trainer,
    clip_by_norm,
    generate,
    streams,
)

#: Modules whose sources every Python installation has; one that is missing is left out.
MODULES = """
    argparse ast bdb calendar configparser csv dataclasses difflib doctest enum fractions ftplib functools gettext heapq
    inspect ipaddress mailbox optparse pdb pickle pickletools platform pydoc random shutil smtplib socket statistics
    subprocess tarfile tempfile textwrap threading tokenize traceback typing uuid weakref
""".split()

LENGTH = 600_000  # characters of them that are read
BATCH, WINDOW = 32, 64  # streams side by side, and steps that a gradient goes back
EMBEDDING = 64
LEARNING_RATE, BETAS, CLIP = 4e-3, (0.9, 0.99), 1.0
SHORTEST = 50_000  # characters: with less, the part for validation is too short for a window
PROMPT, TEMPERATURE = "def ", 0.7
WARM_UP, LEAST_PAIRS = 2, 5  # steps beside the reference that are not timed, and that are in any case
BLAS_WAIT = "OPENBLAS_THREAD_TIMEOUT"  # how long OpenBLAS' threads spin: the logarithm of a number of cycles

Pair = tuple[np.ndarray, np.ndarray]  # inputs and targets, (BATCH, WINDOW)


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


def windows(ids: np.ndarray) -> list[Pair]:
    """Pairs of inputs and targets: a row goes on in the next pair where it ended in this one."""
    x, y = (part.reshape(-1, BATCH, WINDOW) for part in streams(ids, BATCH, WINDOW))
    return list(zip(x, y, strict=True))


# ---- the model and its training


def character_model(characters: int, hidden: int, *, seed: int = 0, backend: str | None = None) -> Sequential:
    """Embedding, GRU and a linear layer that rates each character as the next one."""
    model = Sequential(
        embedding=Embedding(characters, EMBEDDING, seed=seed),
        gru=fastrnn.GRU(EMBEDDING, hidden, seed=seed, backend=backend),
        output=Linear(hidden, characters, seed=seed),
    )
    model.parameters["output.weight"] *= np.sqrt(3.0)  # a variance of 1 / hidden: it learns faster from there
    return model


def train_step(model: Sequential, optimizer: Optimizer, pair: Pair, state: Any) -> tuple[float, Any]:
    """One step of truncated backpropagation through time; return the loss before it and the state to go on with."""
    inputs, targets = pair
    output, state, tape = model.forward(inputs, state)
    loss = CrossEntropy()(output, targets)
    gradients = model.backward(tape, loss.gradient).params
    clip_by_norm(gradients, CLIP)
    optimizer.step(model.parameters, gradients)
    return loss.value, state


class Progress:
    """Tells how far a training is: a bar that is written over on a terminal, and lines now and then elsewhere."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.live = stream.isatty()
        self.shown = 0.0 if self.live else time.perf_counter()
        self.pause = 0.1 if self.live else 1.0  # seconds; a first line soon, later ones seldom

    def show(self, share: float, text: str) -> None:
        """Draw the bar anew, ten times a second at most; or write a line where none was written for a while."""
        now = time.perf_counter()
        if now - self.shown <= self.pause:
            return
        self.shown = now
        if self.live:
            filled = int(24 * share)
            self.stream.write(f"\r\x1b[K  [{'#' * filled}{'.' * (24 - filled)}] {text}")
            self.stream.flush()
        else:
            self.pause = 10.0
            self.line(f"  {text}")

    def line(self, text: str) -> None:
        """Write a line that stays."""
        self.shown = 0.0 if self.live else time.perf_counter()
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


def train(model: Sequential, corpus: Corpus, epochs: int, seconds: float, progress: Progress) -> Trained:
    """Train `model`, which is modified, for `epochs` or until `seconds` have gone or Ctrl-C comes."""
    pairs, held_out = windows(corpus.training), streams(corpus.validation, BATCH, WINDOW)
    total = epochs * len(pairs)
    trainer = Trainer(model, CrossEntropy(), Adam(Cosine(LEARNING_RATE, total), BETAS))
    reached = Trained()
    begin = time.perf_counter()
    try:
        for epoch in range(1, epochs + 1):
            state, losses = None, []
            for pair in pairs:
                if time.perf_counter() - begin > seconds:
                    progress.line(f"  {seconds:g} s are over in epoch {epoch}")
                    return reached
                start = time.perf_counter()
                loss, state = train_step(model, trainer.optimizer, pair, state)
                losses.append(loss)
                reached.characters += BATCH * WINDOW
                reached.seconds += time.perf_counter() - start
                speed = reached.characters / reached.seconds
                share = trainer.optimizer.steps / total
                progress.show(share, f"epoch {epoch}/{epochs}  loss {loss:.3f}  {speed:,.0f} characters/s")
            found = trainer.evaluate(*held_out, batch_size=BATCH, stateful=True)
            reached.epochs, reached.validation_loss = epoch, found["loss"]
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


@dataclass
class Comparison:
    """The seconds of two training steps, the pair of `pairs` that stands in the middle by their quotient."""

    fast: float
    slow: float
    pairs: int


class Learner:
    """A new model that takes one timed step after the other."""

    def __init__(self, characters: int, hidden: int, backend: str | None) -> None:
        self.model, self.optimizer = character_model(characters, hidden, backend=backend), Adam(LEARNING_RATE, BETAS)
        self.state: Any = None

    def step(self, pair: Pair) -> tuple[float, float]:
        """The seconds that a step takes, and the loss before it."""
        start = time.perf_counter()
        loss, self.state = train_step(self.model, self.optimizer, pair, self.state)
        return time.perf_counter() - start, loss


def compare_with_reference(corpus: Corpus, hidden: int, steps: int = 25, seconds: float = 10.0) -> Comparison:
    """Training steps with fastrnn and with the NumPy reference, in turn: whatever disturbs the machine disturbs both.

    Both must come to the same losses. There are `steps` of each, or fewer where `seconds` are over before.
    """
    learners = [Learner(len(corpus.vocabulary), hidden, backend) for backend in (None, "reference")]
    begin, taken = time.perf_counter(), []
    for pair in windows(corpus.training)[:steps]:
        taken.append([learner.step(pair) for learner in learners])
        if len(taken) >= WARM_UP + LEAST_PAIRS and time.perf_counter() - begin > seconds:
            break
    times, losses = np.moveaxis(np.array(taken), 2, 0)
    if not np.allclose(losses[:, 0], losses[:, 1], rtol=1e-2):  # rounding differs, and grows from step to step
        raise RuntimeError(f"the losses are {losses[:, 0]}, with the NumPy reference {losses[:, 1]}")
    # Medians of either side alone would be of different moments: on a busy machine their quotient is anything.
    pairs = sorted(times[WARM_UP:].tolist(), key=lambda pair: pair[1] / pair[0])
    fast, slow = pairs[len(pairs) // 2]
    return Comparison(fast, slow, len(pairs))


def epochs_in_time(corpus: Corpus, hidden: int, epochs: int, seconds: float) -> int:
    """`epochs`, or as many as seem to fit into nine tenths of `seconds`: the learning rate is to come down in time."""
    learner, pairs = Learner(len(corpus.vocabulary), hidden, None), windows(corpus.training)
    step = float(np.median([learner.step(pair)[0] for pair in pairs[:9]]))
    return max(1, min(epochs, int(0.9 * seconds / (step * len(pairs)))))


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


def compile_backward() -> None:
    """Compile what a training step needs besides the way forth, or find that it is compiled."""
    from fastrnn.kernels import native

    dtype = np.dtype(np.float32)
    native.find("backward", dtype, "gru")
    for name in ("weight_gradient", "bias_gradient"):
        native.find(name, dtype)


def wait_for_kernels(model: Sequential, pair: Pair) -> None:
    """Run the model once, and say what is waited for.

    Where kernels are compiled, another process compiles those of the way back meanwhile; this one then finds them.
    """
    from fastrnn.kernels import notice, shipped

    other, start = None, time.perf_counter()
    if shipped.load() is None:
        print("Compiling kernels for this processor (some seconds, once: they are kept)", end=" ... ", flush=True)
        if (os.cpu_count() or 1) > 1:
            program = "from fastrnn import demo; demo.compile_backward()"
            other = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.DEVNULL)
    else:
        print("Loading kernels", end=" ... ", flush=True)
    with notice.silence():
        output, _, tape = model.forward(pair[0])
        model.backward(tape, output)
    print(f"{time.perf_counter() - start:.1f} s", flush=True)
    if other is not None:
        other.wait()


def is_busy() -> bool:
    """Whether many more threads want to run than this program has, where the system tells."""
    cores = os.cpu_count() or 1
    return hasattr(os, "getloadavg") and os.getloadavg()[0] > 1.5 * cores + 1


def read_text(path: Path | None) -> str:
    """The text of a file, or of the standard library's sources."""
    if path is None:
        return standard_library_text()
    return path.read_text(encoding="utf-8", errors="replace")


def write_and_time(model: Sequential, corpus: Corpus, length: int = 800) -> tuple[str, float]:
    """Let the model write `length` characters after the prompt; return the text and its characters a second."""
    prompt = PROMPT if set(PROMPT) <= set(corpus.vocabulary) else corpus.vocabulary[:1]
    number = {character: i for i, character in enumerate(corpus.vocabulary)}
    ids = np.array([number[character] for character in prompt])
    generate(model, ids, 2, seed=0)  # compiles the step
    start = time.perf_counter()
    written = generate(model, ids, length, temperature=TEMPERATURE, seed=0)
    seconds = time.perf_counter() - start
    return prompt + "".join(corpus.vocabulary[i] for i in written), length / seconds


def run(epochs: int = 6, hidden: int = 256, seconds: float = 60.0, text: Path | None = None) -> int:
    """Train, write and compare, and print what happens.

    Parameters
    ----------
    epochs
        How often the text is read; fewer where `seconds` do not suffice.
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
    model = character_model(len(corpus.vocabulary), hidden)
    print(
        f"Text: {len(source):,} characters of {text or 'the standard library'}, {len(corpus.vocabulary)} different ones"
    )
    count, threads = model.num_parameters, fastrnn.get_num_threads()
    print(f"Model: GRU with {hidden} hidden units, {count:,} parameters, on {threads} threads")

    wait_for_kernels(model, windows(corpus.training)[0])
    fitting = epochs_in_time(corpus, hidden, epochs, seconds)
    if fitting < epochs:
        print(f"About {fitting} of {epochs} epochs fit into {seconds:g} s here")
    reached = train(model, corpus, fitting, seconds, Progress(sys.stdout))
    print(
        f"Trained on {reached.characters:,} characters in {reached.seconds:.1f} s: "
        f"{reached.characters / max(reached.seconds, 1e-9):,.0f} characters/s"
    )
    if reached.interrupted:
        return 130

    written, speed = write_and_time(model, corpus)
    print(f"It writes, at {speed:,.0f} characters/s:\n")
    print(textwrap.indent(written.expandtabs(4), "    ") + "\n")
    found = compare_with_reference(corpus, hidden)
    if is_busy():
        print("Other programs keep this machine busy: times, and how they compare, swing.")
    print(
        f"One training step of {BATCH * WINDOW:,} characters: {1e3 * found.fast:.1f} ms. "
        f"With NumPy alone, just after it: {1e3 * found.slow:.1f} ms, {found.slow / found.fast:.1f} times as long "
        f"(the middle one of {found.pairs} pairs)."
    )
    return 0
