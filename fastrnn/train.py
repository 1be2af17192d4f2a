"""A thin kit to train models of recurrent layers, for those without a framework: NumPy and this package alone.

It is what such a model needs around its layers, and no more: layers (`fastrnn.models`), losses, decoding and metrics
(`fastrnn.losses`), optimisers, schedules and clipping (`fastrnn.optimizers`), and here the `Trainer`. All of it can be
had from this module::

    from fastrnn import LSTM
    from fastrnn.train import Adam, Cosine, CrossEntropy, Embedding, Last, Linear, Sequential, Trainer, accuracy

    model = Sequential(embedding=Embedding(1000, 64), lstm=LSTM(64, 128), last=Last(), output=Linear(128, 10))
    model.summary()
    optimizer = Adam(Cosine(3e-3, steps=500))
    trainer = Trainer(model, CrossEntropy(), optimizer, clip_norm=1.0, metrics={"accuracy": accuracy})
    trainer.fit(x, y, lengths=lengths, epochs=10, validation=0.1, patience=3, checkpoint="run.npz")
    trainer.evaluate(x_test, y_test, lengths=lengths_test)  # {"loss": ..., "accuracy": ...}
    logits = trainer.predict(x_test, lengths=lengths_test)

The batch comes first in all arrays: x is (N, T, size), or labels (N, T); y is (N,) for one label a row, (N, T) for one
a step, and has the output's shape for numbers. Rows of different length are padded, with any label or number that is
allowed, and `lengths` tells how long they are: what is beyond teaches nothing.

=====================  ================================================================================================
one to one             ``Sequential(Linear(...), Activation("relu"), Linear(...))``
many to one            ``Sequential(..., LSTM(...), Last(), Linear(...))``
many to many, aligned  the same without `Last`
encoder and decoder    ``EncoderDecoder(Sequential(...), Sequential(...))``, trained on x = (source, target input);
                       ``model.decode(source, ...)``
one to many            `generate`, from a prompt
long sequences         ``fit(..., truncate=100)``: backpropagation is truncated to 100 steps, the state goes on;
                       ``fit(..., stateful=True)``: the state goes on from batch to batch, see `streams`
fine-tuning            ``model.load(path, strict=False)``, ``model.freeze("embedding")``, then train the rest
a loop of one's own    ``model.forward``, a loss, ``model.backward``, `clip_by_norm`, ``optimizer.step``
a model of one's own   a subclass of `Model`, with ``__call__``, ``forward`` and ``backward``
=====================  ================================================================================================

`Linear` multiplies by NumPy's BLAS, whose threads spin after each product on the cores that the recurrent layers need:
let a program begin with ``os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")``, before it imports NumPy, unless its
Linear layers are much larger than its recurrent ones.

>>> import numpy as np
>>> from fastrnn import GRU
>>> random = np.random.default_rng(0)
>>> x = random.integers(0, 2, (256, 8))
>>> y = x.cumsum(axis=1) % 2  # the parity so far
>>> model = Sequential(Embedding(2, 4, seed=0), GRU(4, 16, seed=0), Linear(16, 2, seed=0))
>>> trainer = Trainer(model, CrossEntropy(), Adam(0.02), clip_norm=1.0, metrics={"accuracy": accuracy})
>>> history = trainer.fit(x, y, epochs=30, validation=0.25, progress=False)
>>> history[-1]["val_accuracy"] > 0.95
True
"""

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from fastrnn import checkpoints, functional, weights
from fastrnn.layers import Gradients
from fastrnn.losses import (
    CTC,
    BinaryCrossEntropy,
    CrossEntropy,
    Loss,
    MeanSquaredError,
    accuracy,
    ctc_beam,
    ctc_greedy,
    edit_distance,
    error_rate,
    f1,
    log_softmax,
    mean_absolute_error,
    mean_squared_error,
    perplexity,
    precision,
    recall,
    sigmoid,
    softmax,
    word_error_rate,
)
from fastrnn.models import (
    Activation,
    Dropout,
    Embedding,
    EncoderDecoder,
    Last,
    Linear,
    Model,
    Sequential,
    generate,
    gradient_norms,
)
from fastrnn.optimizers import (
    SGD,
    Adam,
    AdamW,
    Constant,
    Cosine,
    Optimizer,
    ReduceOnPlateau,
    RMSprop,
    Schedule,
    StepDecay,
    Warmup,
    check_number,
    clip_by_norm,
    clip_by_value,
    global_norm,
)
from fastrnn.weights import Params

__all__ = [
    "CTC",
    "SGD",
    "Activation",
    "Adam",
    "AdamW",
    "BinaryCrossEntropy",
    "Constant",
    "Cosine",
    "CrossEntropy",
    "Diverged",
    "Dropout",
    "Embedding",
    "EncoderDecoder",
    "Gradients",
    "Last",
    "Linear",
    "Loss",
    "MeanSquaredError",
    "Model",
    "Optimizer",
    "RMSprop",
    "ReduceOnPlateau",
    "Schedule",
    "Sequential",
    "StepDecay",
    "Trainer",
    "Warmup",
    "accuracy",
    "clip_by_norm",
    "clip_by_value",
    "ctc_beam",
    "ctc_greedy",
    "edit_distance",
    "error_rate",
    "f1",
    "generate",
    "global_norm",
    "gradient_norms",
    "log_softmax",
    "mean_absolute_error",
    "mean_squared_error",
    "perplexity",
    "precision",
    "predict",
    "recall",
    "sigmoid",
    "softmax",
    "streams",
    "word_error_rate",
]

Array = np.ndarray
History = list[dict[str, float]]


class Diverged(ArithmeticError):
    """The loss or a gradient became infinite or NaN. The trainer stands where the epoch began."""


# ---- data


@dataclass(frozen=True, eq=False)
class _Data:
    """Examples, checked. x and lengths may be tuples, of a model that takes several arrays."""

    x: Any
    y: Array
    lengths: Any
    size: int

    @classmethod
    def checked(cls, trainer: "Trainer", x: Any, y: Any, lengths: Any, where: str = "") -> "_Data":
        """Raise for what does not fit together, before anything is computed."""
        y = np.asarray(y)
        x, lengths = _check_examples(x, lengths, where, {f"{where}y": y})
        trainer.model.check(x)
        if trainer.model.output_size is not None:
            trainer.loss.check(y, trainer.model.output_size)
        return cls(x, y, lengths, len(y))

    def take(self, rows: Any) -> "_Data":
        """Return some examples."""
        y = self.y[rows]
        return _Data(_rows(self.x, rows), y, _rows(self.lengths, rows), len(y))

    def windows(self, steps: int | None) -> Iterator["_Data"]:
        """Yield the examples cut into windows of so many steps."""
        if steps is None:
            yield self
            return
        T = self.x.shape[1]
        for t in range(0, T, steps):
            lengths = None if self.lengths is None else np.clip(self.lengths - t, 0, min(steps, T - t))
            yield _Data(self.x[:, t : t + steps], self.y[:, t : t + steps], lengths, self.size)

    def lengths_of(self, output: Array) -> tuple[Any, ...]:
        """Return the lengths of the output, if it has any: those of the last array, of several."""
        lengths = self.lengths[-1] if isinstance(self.lengths, tuple) else self.lengths
        return () if lengths is None or output.ndim < 3 else (lengths,)

    def check_windows(self, steps: int | None) -> int | None:
        """Raise if the examples cannot be cut into windows."""
        if steps is None:
            return None
        steps = functional.check_integer("truncate", steps, 1)
        if isinstance(self.x, tuple):
            raise ValueError(f"truncate is {steps} with x of {len(self.x)} arrays, expected one array of sequences")
        if self.x.ndim < 2 or self.y.ndim < 2 or self.x.shape[1] != self.y.shape[1]:
            shapes = f"x has shape {self.x.shape} and y {self.y.shape}"
            raise ValueError(f"truncate is {steps}, and {shapes}: expected a target for each step, (N, T, ...)")
        return steps


def _check_examples(x: Any, lengths: Any, where: str = "", others: Mapping[str, Array] | None = None) -> Any:
    """Return x and its lengths, arrays or tuples of them, if they and the others have as many rows."""
    x = tuple(map(np.asarray, x)) if isinstance(x, tuple) else np.asarray(x)
    parts = x if isinstance(x, tuple) else (x,)
    counts = {f"{where}x[{i}]" if len(parts) > 1 else f"{where}x": part for i, part in enumerate(parts)}
    counts |= others or {}
    for name, array in counts.items():
        if array.ndim == 0 or len(array) == 0:
            raise ValueError(f"{name} has shape {array.shape}, expected at least one example along the first axis")
    if len({len(array) for array in counts.values()}) > 1:
        sizes = ", ".join(f"{len(array)} in {name}" for name, array in counts.items())
        raise ValueError(f"there are different numbers of examples: {sizes}")
    if not isinstance(x, tuple):
        return x, _check_lengths(f"{where}lengths", lengths, x)
    given = (None,) * len(x) if lengths is None else lengths
    if not isinstance(given, (tuple, list)) or len(given) != len(x):
        raise TypeError(f"{where}lengths is a {type(given).__name__}, expected {len(x)}, as there are arrays in x")
    return x, tuple(
        _check_lengths(f"{where}lengths[{i}]", own, part) for i, (own, part) in enumerate(zip(given, x, strict=True))
    )


def _rows(value: Any, rows: Any) -> Any:
    """Return some rows of an array, of each in a tuple, or None for None."""
    if isinstance(value, tuple):
        return tuple(_rows(part, rows) for part in value)
    return None if value is None else value[rows]


def _check_lengths(name: str, lengths: Any, x: Array) -> Array | None:
    if lengths is None:
        return None
    if x.ndim < 2:
        raise ValueError(f"{name} are given for x of shape {x.shape}, expected (N, T, ...) with them")
    try:
        return functional.check_lengths(lengths, x.shape[1], len(x))
    except (TypeError, ValueError) as error:
        raise type(error)(str(error).replace("lengths", name, 1)) from None


def streams(labels: Any, batch_size: int, steps: int) -> tuple[Array, Array]:
    """Cut one long sequence of labels into rows for ``fit(..., stateful=True, batch_size=batch_size)``.

    The sequence becomes `batch_size` streams side by side; row i of a batch goes on where row i of the batch before
    ended. What is left at the end is dropped.

    Parameters
    ----------
    labels : (length,) integers
    batch_size, steps : int

    Returns
    -------
    x, y : numpy.ndarray
        (batches · batch_size, steps): each label, and the one that follows it.

    Raises
    ------
    ValueError
        If there are too few labels for one batch.

    Examples
    --------
    >>> x, y = streams(np.arange(13), batch_size=2, steps=3)
    >>> x.tolist(), y[0].tolist()
    ([[0, 1, 2], [6, 7, 8], [3, 4, 5], [9, 10, 11]], [1, 2, 3])
    """
    labels = np.asarray(labels)
    B, T = functional.check_integer("batch_size", batch_size, 1), functional.check_integer("steps", steps, 1)
    if labels.ndim != 1:
        raise ValueError(f"labels have shape {labels.shape}, expected one axis")
    count = (len(labels) - 1) // B // T
    if count < 1:
        raise ValueError(f"there are {len(labels)} labels, expected at least batch_size * steps + 1 = {B * T + 1}")
    length = (len(labels) - 1) // B

    def cut(part: Array) -> Array:
        rows = part[: B * length].reshape(B, length)[:, : count * T]
        return rows.reshape(B, count, T).swapaxes(0, 1).reshape(count * B, T)

    return cut(labels[:-1]), cut(labels[1:])


# ---- training


class Trainer:
    """A model with its loss and its optimiser, and how far its training is.

    Parameters
    ----------
    model : Sequential, EncoderDecoder or another Model
    loss : CrossEntropy, BinaryCrossEntropy, MeanSquaredError or CTC
        Or anything that is called and checks as they do.
    optimizer : Optimizer
    clip_norm, clip_value : float, optional
        The largest norm of all gradients together, and the largest element; see `clip_by_norm` and `clip_by_value`.
    metrics : dict of str to callable, optional
        ``metric(targets, predictions)``, of this module or scikit-learn, for `evaluate`. Labels are those with the
        largest logit, numbers are as they are, each in one axis without what is padding; of CTC, lists of labels.
    seed : int
        Of the order of the examples.

    Attributes
    ----------
    epoch : int
        How many epochs are done.
    history : list of dict
        One for each epoch: "loss", "learning_rate", "gradient_norm" (the mean, before clipping), "seconds" and, with
        validation data, "val_loss" and "val_" + each metric.
    best : dict or None
        "epoch", "weights", "monitor" and its "value": of the epoch that was the best by what `fit` monitored.

    Examples
    --------
    >>> from fastrnn import LSTM
    >>> model = Sequential(LSTM(1, 8, seed=0), Linear(8, 1, seed=0))
    >>> trainer = Trainer(model, MeanSquaredError(), Adam(0.01))
    >>> x = np.sin(np.arange(400.0)).astype(np.float32).reshape(8, 50, 1)
    >>> history = trainer.fit(x[:, :-1], x[:, 1:], epochs=3, progress=False)
    >>> [entry["loss"] < 1 for entry in history]
    [True, True, True]
    """

    def __init__(
        self,
        model: Model,
        loss: Any,
        optimizer: Optimizer,
        *,
        clip_norm: float | None = None,
        clip_value: float | None = None,
        metrics: Mapping[str, Callable[[Any, Any], float]] | None = None,
        seed: int = 0,
    ) -> None:
        if not isinstance(model, Model):
            raise TypeError(f"model is a {type(model).__name__}, expected a Model, such as Sequential(layer)")
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer is a {type(optimizer).__name__}, expected an Optimizer, such as Adam()")
        if not callable(loss) or isinstance(loss, type) or not hasattr(loss, "check"):
            raise TypeError(f"loss is {loss!r}, expected a loss such as CrossEntropy()")
        self.model, self.loss, self.optimizer = model, loss, optimizer
        self.clip_norm = None if clip_norm is None else check_number("clip_norm", clip_norm, 0.0, above=True)
        self.clip_value = None if clip_value is None else check_number("clip_value", clip_value, 0.0, above=True)
        self.metrics = dict(metrics or {})
        if "loss" in self.metrics:
            raise ValueError("metrics has a 'loss', which is the name of the loss itself: expected another name")
        self.seed = functional.check_integer("seed", seed, 0)
        self.epoch = 0
        self.history: History = []
        self.best: dict[str, Any] | None = None
        self._position = 0  # updates in this epoch
        self._sums = [0.0, 0.0, 0.0]  # of this epoch: loss times count, count, gradient norm
        self._state: Any = None  # to go on with
        self._plan: dict[str, Any] = {}  # how the epoch is cut into updates

    def fit(
        self,
        x: Any,
        y: Any,
        *,
        epochs: int,
        batch_size: int = 32,
        lengths: Any = None,
        validation: Any = None,
        shuffle: bool | None = None,
        truncate: int | None = None,
        stateful: bool = False,
        patience: int | None = None,
        monitor: str | None = None,
        maximize: bool = False,
        checkpoint: weights.Path | None = None,
        checkpoint_every: int | None = None,
        callbacks: Iterable[Callable[["Trainer"], Any]] = (),
        progress: bool = True,
    ) -> History:
        """Train the model.

        Parameters
        ----------
        x : numpy.ndarray or tuple
            (N, ...), the examples; a tuple of arrays for a model that takes several.
        y : numpy.ndarray
            (N, ...), what the loss compares the output with.
        epochs : int
            Until so many are done in all. A trainer that was loaded goes on from where it was saved.
        batch_size : int
        lengths : (N,) integers, optional
            How many steps each row has; a tuple for a model that takes several arrays. Where the output is a sequence,
            only those steps count in the loss.
        validation : tuple or float, optional
            (x, y) or (x, y, lengths), evaluated after each epoch; or which part of the examples, the last ones, is
            kept for that.
        shuffle : bool, optional
            Whether the examples are in another order in each epoch, by the trainer's seed. By default unless
            `stateful`.
        truncate : int, optional
            Cut sequences into windows of so many steps, with an update after each: gradients go back no further, the
            state goes on. It needs a target for each step.
        stateful : bool
            Whether row i of a batch goes on with the state of row i of the batch before, as `streams` arranges it.
        patience : int, optional
            Stop after so many epochs without a better value than the best; at the end, the model gets the weights of
            the best epoch.
        monitor : str, optional
            Which entry of the history is compared: "val_loss" where there is validation, else "loss".
        maximize : bool
            Whether a larger value is better, as of "val_accuracy".
        checkpoint : str or path, optional
            An .npz file that is written after every epoch; see `save`.
        checkpoint_every : int, optional
            Write it after so many updates, too.
        callbacks : iterable of callables, optional
            Each is called with the trainer after every epoch; one that returns True ends the training.
        progress : bool
            Whether to show it: a line an epoch, and a bar in a terminal where tqdm is installed.

        Returns
        -------
        list of dict
            `history`.

        Raises
        ------
        TypeError, ValueError
            If an argument is wrong, or the arrays do not fit together or the model: before anything is computed.
        Diverged
            If the loss or a gradient is not finite. After any error in an epoch, the weights and all of the trainer are
            as at its begin, the last good ones; after an interrupt they are as they are.
        """
        data = _Data.checked(self, x, y, lengths)
        epochs = functional.check_integer("epochs", epochs, 0)
        if not self.model.trainable:
            raise ValueError("all parameters are frozen: there is nothing to train")
        data, held_out = self._split(data, validation)
        plan = self._check_plan(data, held_out, batch_size, shuffle, truncate, stateful)
        watch = self._check_watch(held_out is not None, patience, monitor, maximize)
        save = _check_saving(checkpoint, checkpoint_every)
        callbacks = list(callbacks)
        show = _Progress(progress, epochs)
        while self.epoch < epochs and not watch.over(self):
            start, good = time.perf_counter(), self._snapshot(copy=True)
            try:
                self._run_epoch(data, plan, show, save)
                self._end_epoch(held_out, plan, start)
            except BaseException as error:
                show.close()
                if isinstance(error, Exception):  # else an interrupt: what was learned stays
                    self._restore(*good)
                raise
            watch.look(self)
            show.line(self)
            save.after_epoch(self)
            if True in [callback(self) for callback in callbacks]:
                break
        if watch.patience is not None and self.best is not None:
            self.model.parameters.update(self.best["weights"])
        return self.history

    def evaluate(
        self,
        x: Any,
        y: Any,
        *,
        lengths: Any = None,
        batch_size: int = 256,
        truncate: int | None = None,
        stateful: bool = False,
    ) -> dict[str, float]:
        """Return the mean loss and the metrics over examples, without dropout.

        Parameters
        ----------
        x, y, lengths, batch_size, truncate, stateful
            As for `fit`. `truncate` changes no result here, only the memory that is needed.

        Returns
        -------
        dict of str to float
            "loss" and each metric.

        Raises
        ------
        TypeError, ValueError
            As `fit`.
        """
        data = _Data.checked(self, x, y, lengths)
        return self._evaluate(data, self._check_plan(data, None, batch_size, False, truncate, stateful))

    def predict(self, x: Any, *, lengths: Any = None, batch_size: int = 256) -> Array:
        """Return the model's output for examples; see the function `predict`."""
        return predict(self.model, x, lengths=lengths, batch_size=batch_size)

    # -- what fit does

    def _run_epoch(self, data: _Data, plan: dict[str, Any], show: "_Progress", save: "_Saving") -> None:
        """Make the updates that remain of this epoch."""
        if self._position and plan != self._plan:
            raise ValueError(f"epoch {self.epoch + 1} was begun with {self._plan}, and is to go on with {plan}")
        self._plan = plan
        order = np.random.default_rng((self.seed, self.epoch)).permutation(data.size) if plan["shuffle"] else None
        total = -(-data.size // plan["batch_size"]) * _windows_in(data, plan)
        if self._position > total:
            raise ValueError(f"epoch {self.epoch + 1} has {total} updates, and is to go on after {self._position}")
        for piece in _pieces(data, plan, order, self._position):
            self._update(piece)
            self._state = self._state if plan["truncate"] or plan["stateful"] else None
            save.after_update(self)
            show.bar(self, total)
        if not self._sums[1]:
            raise ValueError("no target of the epoch counts: all are ignored or beyond the rows' lengths")

    def _update(self, piece: "_Piece") -> None:
        """Make one update; raise Diverged, with the parameters as they were, if a number is not finite."""
        data = piece.data
        output, state, tape = self.model.forward(data.x, None if piece.fresh else self._state, lengths=data.lengths)
        loss = self.loss(output, data.y, *data.lengths_of(output))
        if not math.isfinite(loss.value):
            raise self._diverged("the loss", loss.value, piece)
        params = self.model.backward(tape, loss.gradient).params
        gradients = {name: params[name] for name in self.model.trainable}
        norm = global_norm(gradients)
        if not math.isfinite(norm):  # clipping would hide it
            raise self._diverged("the gradients' norm", norm, piece)
        if self.clip_value is not None:
            clip_by_value(gradients, self.clip_value)
        if self.clip_norm is not None:
            clip_by_norm(gradients, self.clip_norm)
        if loss.terms:
            self.optimizer.step(self.model.parameters, gradients)
        self._state = state
        self._position += 1
        self._sums = [a + b for a, b in zip(self._sums, (loss.value * loss.terms, loss.terms, norm), strict=True)]

    def _diverged(self, what: str, value: float, piece: "_Piece") -> Diverged:
        where = f"epoch {self.epoch + 1}, batch {piece.batch + 1}" + f", window {piece.window + 1}" * (piece.window > 0)
        return Diverged(
            f"{what} is {value} in {where}, at a learning rate of {self.optimizer.learning_rate:g}. The weights are "
            f"those from before this epoch; a lower learning rate or clip_norm may help, or the data are not finite"
        )

    def _end_epoch(self, held_out: _Data | None, plan: dict[str, Any], start: float) -> None:
        """Evaluate, and write down what the epoch came to, which began at `start`."""
        total, terms, norm = self._sums
        entry = {
            "loss": total / terms,
            "learning_rate": self.optimizer.schedule(max(self.optimizer.steps - 1, 0)),
            "gradient_norm": norm / self._position,
            "seconds": time.perf_counter() - start,
        }
        if held_out is not None:
            found = self._evaluate(held_out, {**plan, "shuffle": False})
            entry |= {f"val_{name}": value for name, value in found.items()}
        self.optimizer.schedule.observe(entry.get("val_loss", entry["loss"]))
        self.history.append(entry)
        self.epoch += 1
        self._position, self._sums, self._state = 0, [0.0, 0.0, 0.0], None

    def _evaluate(self, data: _Data, plan: dict[str, Any]) -> dict[str, float]:
        total = terms = 0.0
        state: Any = None
        pairs = []
        for piece in _pieces(data, plan):
            own = piece.data
            output, state = self.model(own.x, None if piece.fresh else state, lengths=own.lengths)
            loss = self.loss(output, own.y, *own.lengths_of(output))
            total, terms = total + loss.value * loss.terms, terms + loss.terms
            if self.metrics:
                pairs.append(self.loss.compare(output, own.y, *own.lengths_of(output)))
        if not terms:
            raise ValueError("no target counts: all are ignored or beyond the rows' lengths")
        found = {"loss": total / terms}
        if self.metrics:
            targets, predictions = map(_join, zip(*pairs, strict=True))
            found |= {name: float(metric(targets, predictions)) for name, metric in self.metrics.items()}
        return found

    # -- what fit checks first

    def _split(self, data: _Data, validation: Any) -> tuple[_Data, _Data | None]:
        """Return the examples for training, and those for validation."""
        if validation is None:
            return data, None
        if isinstance(validation, (tuple, list)):
            if len(validation) not in (2, 3):
                raise ValueError(f"validation has {len(validation)} entries, expected (x, y) or (x, y, lengths)")
            x, y, *lengths = validation
            return data, _Data.checked(self, x, y, lengths[0] if lengths else None, "validation ")
        share = check_number("validation", validation, 0.0, 1.0, above=True, below=True)
        kept = data.size - round(share * data.size)
        if not 0 < kept < data.size:
            raise ValueError(
                f"validation is {share} of {data.size} examples, expected a part with at least one in each"
            )
        return data.take(slice(0, kept)), data.take(slice(kept, None))

    def _check_plan(
        self,
        data: _Data,
        held_out: _Data | None,
        batch_size: int,
        shuffle: bool | None,
        truncate: int | None,
        stateful: bool,
    ) -> dict[str, Any]:
        """Return how an epoch is cut into updates."""
        batch_size = functional.check_integer("batch_size", batch_size, 1)
        stateful = functional.check_flag("stateful", stateful)
        shuffle = not stateful if shuffle is None else functional.check_flag("shuffle", shuffle)
        if truncate is not None or stateful:
            self.model.check_carried()
        if stateful and shuffle:
            raise ValueError("shuffle is True with stateful=True, which goes on from batch to batch: expected False")
        for part in (data, held_out):
            if part is None:
                continue
            truncate = part.check_windows(truncate)
            if stateful and part.size % batch_size:
                raise ValueError(
                    f"stateful is True with {part.size} examples and batch_size {batch_size}, expected whole batches: "
                    "each row goes on in the next one"
                )
        plan = {"examples": data.size, "batch_size": batch_size, "shuffle": shuffle}
        return {**plan, "truncate": truncate, "stateful": stateful}

    def _check_watch(self, validated: bool, patience: Any, monitor: Any, maximize: Any) -> "_Watch":
        patience = None if patience is None else functional.check_integer("patience", patience, 1)
        known = ["val_loss", *(f"val_{name}" for name in self.metrics)] if validated else []
        known.append("loss")
        if monitor is None:
            monitor = known[0]
        if monitor not in known:
            raise ValueError(f"monitor is {monitor!r}, expected one of {', '.join(map(repr, known))}")
        if self.best is not None and self.best["monitor"] != monitor:
            self.best = None
        return _Watch(monitor, functional.check_flag("maximize", maximize), patience)

    # -- files

    def save(self, path: weights.Path) -> None:
        """Write a checkpoint: all that is needed to go on as if the training had not stopped, to the last bit.

        Those are the parameters, what the optimiser and the schedule remember, the random generators, how far the epoch
        is and the state that is carried on in it, the history, and the best weights so far. It is written in one step:
        whole, or not at all.

        Parameters
        ----------
        path : str or path
            A name that ends in .npz.

        Raises
        ------
        ValueError
            If it has another ending, or the trainer was changed by hand to what `load` would refuse, such as a history
            without an entry for each epoch.
        OSError
            If the file cannot be written; one that was there is as it was.
        """
        path = _check_npz(path)
        arrays, meta = self._snapshot()
        headers = {name: weights.Header(array.shape, array.dtype) for name, array in arrays.items()}
        try:
            checkpoints.check(self, meta, headers)
            checkpoints.check_values(meta, arrays)
        except ValueError as error:
            raise ValueError(f"{path} cannot be written, as it could not be loaded: {error}") from error
        weights.write(path, arrays, meta)

    def load(self, path: weights.Path) -> None:
        """Read a checkpoint of a trainer that was made alike: the next `fit`, given the same, goes on from there.

        Hyperparameters are this trainer's, not the file's. The file need not be trusted: nothing in it is executed.

        Parameters
        ----------
        path : str or path

        Raises
        ------
        ValueError
            If the file is no checkpoint, or one of another model or optimiser, which is looked at before anything is
            read; this trainer is as it was then.
        OSError
            If the file cannot be opened.

        Examples
        --------
        >>> import tempfile
        >>> def trainer():
        ...     return Trainer(Sequential(Linear(3, 2, seed=0)), MeanSquaredError(), Adam())
        >>> x, y = np.ones((4, 3), np.float32), np.ones((4, 2))
        >>> a, b = trainer(), trainer()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = a.fit(x, y, epochs=2, checkpoint=f"{folder}/run.npz", progress=False)
        ...     b.load(f"{folder}/run.npz")
        >>> b.epoch, bool((b.model.parameters["0.weight"] == a.model.parameters["0.weight"]).all())
        (2, True)
        """
        path = _check_npz(path)

        def select(meta: Mapping[str, Any], headers: Mapping[str, weights.Header]) -> list[str]:
            with _explained(path):
                checkpoints.check(self, meta, headers)
                if sum(header.nbytes for header in headers.values()) > os.path.getsize(path):
                    raise ValueError("its arrays are larger than the file: a checkpoint is not compressed")
            return list(headers)

        arrays, meta = weights.read(path, select)
        with _explained(path):
            checkpoints.check_values(meta, arrays)
            self._restore(arrays, meta)

    def _snapshot(self, copy: bool = False) -> tuple[Params, dict[str, Any]]:
        """Return all that changes in training, as arrays and as what JSON can hold."""
        arrays = {f"model/{name}": array for name, array in self.model.parameters.items()}
        arrays |= {
            f"optimizer/{slot}/{name}": array
            for slot, own in self.optimizer.slots.items()
            for name, array in own.items()
        }
        if self.best is not None:
            arrays |= {f"best/{name}": array for name, array in self.best["weights"].items()}
        arrays |= {
            f"random/{path}": checkpoints.random_words(random) for path, random in self.model.generators().items()
        }
        counts = [self.optimizer.updates.get(name, 0) for name in self.model.parameters]
        arrays["updates"] = np.array(counts, float)
        for key in dict.fromkeys(key for entry in self.history for key in entry):
            arrays[f"history/{key}"] = np.array(
                [(i, entry[key]) for i, entry in enumerate(self.history) if key in entry], float
            )
        meta = {
            "checkpoint": checkpoints.FORMAT,
            "model": checkpoints.describe(self.model),
            "optimizer": type(self.optimizer).__name__,
            "steps": self.optimizer.steps,
            "schedule": self.optimizer.schedule.state(),
            "seed": self.seed,
            "epoch": self.epoch,
            "position": self._position,
            "sums": self._sums,
            "plan": self._plan,
            "state": checkpoints.pack(self._state, arrays),
            "best": self.best and {key: value for key, value in self.best.items() if key != "weights"},
        }
        return ({name: array.copy() for name, array in arrays.items()} if copy else arrays), json.loads(
            json.dumps(meta)
        )

    def _restore(self, arrays: Mapping[str, Array], meta: Mapping[str, Any]) -> None:
        """Take back a snapshot of such a trainer; raise, and change nothing, if the schedule refuses its part."""
        groups: dict[str, Params] = {"model": {}, "best": {}, "history": {}, "random": {}}
        slots: dict[str, Params] = {slot: {} for slot in self.optimizer.slots}
        for full, array in arrays.items():
            group, _, name = full.partition("/")
            if group == "optimizer":
                slot, _, name = name.partition("/")
                slots[slot][name] = array.copy()
            elif group in groups:
                groups[group][name] = array.copy()
        history: History = [{} for _ in range(meta["epoch"])]
        for key, entries in groups["history"].items():
            for i, value in entries:
                history[int(i)][key] = float(value)
        state = checkpoints.unpack(meta["state"], arrays)
        best = meta["best"] and {**meta["best"], "weights": groups["best"]}
        states = {path: checkpoints.random_state(words) for path, words in groups["random"].items()}
        updates = {name: int(count) for name, count in zip(self.model.parameters, arrays["updates"], strict=True)}
        steps, seed, position, sums, plan = (meta[key] for key in ("steps", "seed", "position", "sums", "plan"))
        _restore_schedule(self.optimizer.schedule, meta["schedule"])
        for path, random in self.model.generators().items():
            random.bit_generator.state = states[path]
        self.model.parameters.update(groups["model"])
        self.optimizer.slots, self.optimizer.steps, self.optimizer.updates = slots, steps, updates
        self.seed, self.epoch, self.history, self.best = seed, meta["epoch"], history, best
        self._position, self._sums, self._plan, self._state = position, sums, plan, state


def predict(model: Model, x: Any, *, lengths: Any = None, batch_size: int = 256) -> Array:
    """Return a model's output for examples, without dropout.

    Parameters
    ----------
    model : Model
    x : numpy.ndarray or tuple
        (N, ...)
    lengths : (N,) integers, optional
        A tuple for a model that takes several arrays.
    batch_size : int
        How many examples are computed at a time.

    Returns
    -------
    numpy.ndarray
        (N, ...)

    Raises
    ------
    TypeError, ValueError
        If an argument is wrong.

    Examples
    --------
    >>> predict(Sequential(Linear(3, 2)), np.zeros((700, 3), np.float32)).shape
    (700, 2)
    """
    batch_size = functional.check_integer("batch_size", batch_size, 1)
    x, lengths = _check_examples(x, lengths)
    outputs = []
    for begin in range(0, len(x[0] if isinstance(x, tuple) else x), batch_size):
        rows = slice(begin, begin + batch_size)
        outputs.append(model(_rows(x, rows), lengths=_rows(lengths, rows))[0])
    return np.concatenate(outputs)


# ---- what fit is made of


class _Piece(NamedTuple):
    """What one update takes, whether the state begins anew with it, and where it stands in the epoch."""

    data: _Data
    fresh: bool
    batch: int
    window: int


def _pieces(data: _Data, plan: Mapping[str, Any], order: Array | None = None, begin: int = 0) -> Iterator[_Piece]:
    """Yield the pieces of an epoch from number `begin` on."""
    windows, size = _windows_in(data, plan), plan["batch_size"]
    for batch in range(begin // windows, -(-data.size // size)):
        rows: Any = slice(batch * size, (batch + 1) * size)
        part = data.take(rows if order is None else order[rows])
        for window, piece in enumerate(part.windows(plan["truncate"])):
            if batch * windows + window >= begin:
                yield _Piece(piece, window == 0 and not (plan["stateful"] and batch > 0), batch, window)


def _windows_in(data: _Data, plan: Mapping[str, Any]) -> int:
    return 1 if plan["truncate"] is None else max(1, -(-data.x.shape[1] // plan["truncate"]))


def _join(parts: Sequence[Any]) -> Any:
    """Return arrays, or lists, as one."""
    if isinstance(parts[0], list):
        return [row for part in parts for row in part]
    return np.concatenate(parts)


@dataclass(frozen=True)
class _Watch:
    """Which entry of the history is to become better, and how long that may take."""

    monitor: str
    maximize: bool
    patience: int | None

    def look(self, trainer: Trainer) -> None:
        """Keep the weights if they are the best so far."""
        value = trainer.history[-1][self.monitor]
        best = math.inf if trainer.best is None else trainer.best["value"] * (-1 if self.maximize else 1)
        if (-value if self.maximize else value) < best:
            kept = {name: array.copy() for name, array in trainer.model.parameters.items()}
            trainer.best = {"epoch": trainer.epoch, "monitor": self.monitor, "value": value, "weights": kept}

    def over(self, trainer: Trainer) -> bool:
        """Whether it has taken too long."""
        last = 0 if trainer.best is None else trainer.best["epoch"]
        return self.patience is not None and trainer.epoch - last >= self.patience


@dataclass(frozen=True)
class _Saving:
    """Where and when checkpoints are written."""

    path: Any
    every: int | None

    def after_update(self, trainer: Trainer) -> None:
        if self.every is not None and trainer.optimizer.steps % self.every == 0:
            trainer.save(self.path)

    def after_epoch(self, trainer: Trainer) -> None:
        if self.path is not None:
            trainer.save(self.path)


def _check_saving(path: Any, every: Any) -> _Saving:
    if path is None:
        if every is not None:
            raise ValueError(f"checkpoint_every is {every} without checkpoint, expected the path of a file there")
        return _Saving(None, None)
    folder = os.path.dirname(_check_npz(path)) or "."
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"checkpoint is {os.fsdecode(path)!r}, and there is no folder {folder!r}")
    return _Saving(path, None if every is None else functional.check_integer("checkpoint_every", every, 1))


class _Progress:
    """Tells how far a training is: a bar of tqdm's in a terminal, and a line an epoch."""

    def __init__(self, wanted: bool, epochs: int) -> None:
        self.wanted, self.epochs = functional.check_flag("progress", wanted), epochs
        self._make: Any = None
        self._bar: Any = None
        if wanted and sys.stderr.isatty():
            with contextlib.suppress(ImportError):
                from tqdm import tqdm

                self._make = tqdm

    def bar(self, trainer: Trainer, total: int) -> None:
        """Show how far the epoch is."""
        if self._make is None:
            return
        if self._bar is None:
            name = f"epoch {trainer.epoch + 1}/{self.epochs}"
            self._bar = self._make(total=total, initial=trainer._position - 1, desc=name, leave=False)
        self._bar.update()
        if trainer._sums[1]:
            self._bar.set_postfix(loss=f"{trainer._sums[0] / trainer._sums[1]:.4f}", refresh=False)

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def line(self, trainer: Trainer) -> None:
        """Write what the epoch came to."""
        self.close()
        if self.wanted:
            shown = "  ".join(f"{name} {value:.4g}" for name, value in trainer.history[-1].items())
            print(f"epoch {trainer.epoch}/{self.epochs}  {shown}", flush=True)


@contextlib.contextmanager
def _explained(path: str) -> Iterator[None]:
    """Let errors tell which file cannot be loaded."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path} cannot be loaded: {error}") from error


def _restore_schedule(schedule: Schedule, state: Mapping[str, float]) -> None:
    """Give a schedule its state, or raise ValueError when it is as it was."""
    before = schedule.state()
    try:
        schedule.restore(state)
    except Exception as error:  # of a schedule of one's own, too
        schedule.restore(before)
        reason = f"it has no {error}" if isinstance(error, KeyError) else f"its schedule cannot be taken: {error}"
        raise ValueError(reason) from error


def _check_npz(path: Any) -> str:
    """Return the path as a string if its ending is .npz."""
    name = os.fsdecode(path)
    if not name.endswith(".npz"):
        raise ValueError(f"path is {name!r}, expected a name that ends in .npz")
    return name
