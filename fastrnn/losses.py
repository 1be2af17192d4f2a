"""What a model's output is measured by: losses with their gradients, decoding of CTC, and metrics.

A loss is called with a batch of outputs and targets, the batch first, and returns a `Loss`: its value, the gradient of
the output and the number of terms that the value is the mean of. Metrics take targets and predictions in
scikit-learn's order, whose own metrics go in their place.

>>> import numpy as np
>>> loss = CrossEntropy()(np.zeros((2, 3, 4), np.float32), np.array([[0, 1, 2], [3, 0, 0]]), lengths=[3, 1])
>>> round(loss.value, 4), loss.gradient.shape, loss.terms  # log(4)
(1.3863, (2, 3, 4), 4.0)
"""

import math
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np

from fastrnn import functional
from fastrnn.optimizers import check_number

Array = np.ndarray


class Loss(NamedTuple):
    """The value of a loss, its gradient with respect to the output, and how many terms it is the mean of."""

    value: float
    gradient: Array
    terms: float


# ---- activations of outputs


def softmax(x: Array) -> Array:
    """Return exp(x) by its sum along the last axis: probabilities of logits.

    Examples
    --------
    >>> softmax(np.array([0.0, 0.0, np.log(2.0)]))
    array([0.25, 0.25, 0.5 ])
    """
    y = np.exp(x - x.max(axis=-1, keepdims=True))
    y /= y.sum(axis=-1, keepdims=True)
    return y


def log_softmax(x: Array) -> Array:
    """Return the logarithm of `softmax`, without its underflow.

    Examples
    --------
    >>> log_softmax(np.array([0.0, -2000.0]))
    array([    0., -2000.])
    """
    y = x - x.max(axis=-1, keepdims=True)
    y -= np.log(np.exp(y).sum(axis=-1, keepdims=True))
    return y


def sigmoid(x: Array) -> Array:
    """Return 1 / (1 + exp(-x)): the probability of a logit.

    Examples
    --------
    >>> sigmoid(np.array([-2000.0, 0.0, 2000.0]))
    array([0. , 0.5, 1. ])
    """
    small = np.exp(-np.abs(x))
    return np.where(x >= 0, 1, small) / (1 + small)


# ---- what losses check


def check_float(name: str, value: Any, ndim: int = 2) -> Array:
    """Return `value` if it is an array of float32 or float64 with `ndim` axes or more, and elements in the last."""
    functional.check_array(name, value, functional.DTYPES, (None,) * max(np.ndim(value), ndim), "(B, ..., size)")
    if value.shape[-1] == 0:
        raise ValueError(f"{name} has shape {value.shape}, expected a last axis that is not empty")
    return value


def check_labels(name: str, labels: Any, classes: int, ignore: int | None = None) -> Array:
    """Return `labels` as an array of integers if each is `ignore` or from 0 to classes - 1.

    Raises
    ------
    TypeError
        If they are not integers.
    ValueError
        If one is out of range: names the first.
    """
    array = np.asarray(labels)
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name} has dtype {array.dtype}, expected integers from 0 to {classes - 1}")
    wrong = (array < 0) | (array >= classes)
    if ignore is not None:
        wrong &= array != ignore
    if wrong.any():
        index = [int(i) for i in np.unravel_index(np.argmax(wrong), array.shape)]
        besides = "" if ignore is None else f", or {ignore}"
        raise ValueError(f"{name}{index} is {array[tuple(index)]}, expected 0 to {classes - 1}{besides}")
    return array


def valid(shape: tuple[int, ...], lengths: Any, mask: Any) -> Array | None:
    """Return which targets of the shape (B, T, ...) or (B,) count, as booleans of that shape; None for all."""
    counted = None
    if lengths is not None:
        if len(shape) < 2:
            raise ValueError(f"lengths are given for targets of shape {shape}, expected (B, T, ...) with them")
        lengths = functional.check_lengths(lengths, shape[1], shape[0])
        steps = np.arange(shape[1]) < lengths[:, None]
        counted = np.broadcast_to(steps.reshape(shape[:2] + (1,) * (len(shape) - 2)), shape)
    if mask is not None:
        mask = np.asarray(mask)
        if mask.dtype != np.bool_:
            raise TypeError(f"mask has dtype {mask.dtype}, expected bool")
        if mask.shape != shape[: mask.ndim]:
            raise ValueError(f"mask has shape {mask.shape}, expected {shape} or its first axes")
        mask = np.broadcast_to(mask.reshape(mask.shape + (1,) * (len(shape) - mask.ndim)), shape)
        counted = mask if counted is None else counted & mask
    return counted


def by_time(array: Array) -> bool:
    """Whether (B, T, ...) lies in memory as (T, B, ...), as the layers put it out."""
    return array.ndim > 2 and not array.flags.c_contiguous and array.swapaxes(0, 1).flags.c_contiguous


def rows_of(array: Array, swapped: bool, axes: int = 1) -> Array:
    """Return (B, T, ...) as rows: all axes but the last `axes` as one, after a swap of the first two if `swapped`.

    Where that is how the array lies in memory, it is a view.
    """
    array = array.swapaxes(0, 1) if swapped else array
    return array.reshape(-1, *array.shape[array.ndim - axes :])


def from_rows(rows: Array, shape: tuple[int, ...], swapped: bool) -> Array:
    """Return the rows of `rows_of` as an array that begins with `shape`."""
    if not swapped:
        return rows.reshape(*shape, *rows.shape[1:])
    return rows.reshape(shape[1], shape[0], *shape[2:], *rows.shape[1:]).swapaxes(0, 1)


# ---- losses


class CrossEntropy:
    """The mean of -log(softmax(logits)[label]).

    Parameters
    ----------
    ignore_index : int, optional
        A label that does not count, such as that of padding.
    weight : (K,) numbers, optional
        How much each label counts; the mean is by the sum of the weights, as in ``torch.nn.CrossEntropyLoss``.

    Examples
    --------
    >>> logits = np.zeros((2, 5), np.float32)
    >>> value, gradient, terms = CrossEntropy()(logits, np.array([4, 0]))
    >>> round(value, 4), gradient[0]
    (1.6094, array([ 0.1,  0.1,  0.1,  0.1, -0.4], dtype=float32))
    """

    def __init__(self, ignore_index: int | None = None, weight: Any = None) -> None:
        if ignore_index is not None:
            ignore_index = functional.check_integer("ignore_index", ignore_index, -(2**63))
        self.ignore_index = ignore_index
        self.weight = None if weight is None else np.asarray(weight, float)
        if self.weight is not None and (
            self.weight.ndim != 1 or not np.isfinite(self.weight).all() or (self.weight < 0).any()
        ):
            raise ValueError("weight must be a list of finite numbers of at least 0, one a label")

    def check(self, targets: Any, size: int) -> None:
        """Raise what a call would raise for targets, if the output's last axis has `size` entries."""
        if self.weight is not None and len(self.weight) != size:
            raise ValueError(f"weight has {len(self.weight)} entries, expected {size}: one for each label")
        check_labels("targets", targets, size, self.ignore_index)

    def __call__(self, output: Array, targets: Any, lengths: Any = None, mask: Any = None) -> Loss:
        """Return the loss.

        Parameters
        ----------
        output : numpy.ndarray
            (B, ..., K), logits: (B, K), or (B, T, K) for sequences.
        targets : integers
            (B, ...), from 0 to K-1 or `ignore_index`.
        lengths : (B,) integers, optional
            How many steps of each row count.
        mask : (B, ...) booleans, optional
            Which targets count.

        Returns
        -------
        Loss
            Of value 0 and 0 terms where no target counts.

        Raises
        ------
        TypeError, ValueError
            If an argument is of the wrong kind, shape or value, or a label is out of range.
        """
        check_float("output", output)
        targets = _same_shape("targets", np.asarray(targets), output.shape[:-1])
        self.check(targets, output.shape[-1])
        swapped = by_time(output)
        labels = rows_of(targets, swapped, 0)
        weights = self._weights(targets, lengths, mask)
        rows, every = rows_of(output, swapped), np.arange(labels.size)
        if self.ignore_index is not None:
            labels = np.where(labels == self.ignore_index, 0, labels)  # any label that there is: its weight is 0
        shifted = rows - rows.max(axis=1, keepdims=True)
        chosen = shifted[every, labels]
        gradient = np.exp(shifted, out=shifted)
        total = gradient.sum(axis=1)
        losses = np.log(total).astype(float) - chosen
        if weights is None:
            count, value = float(labels.size), float(losses.sum())
            gradient /= (total * gradient.dtype.type(max(count, 1.0)))[:, None]
            gradient[every, labels] -= 1.0 / max(count, 1.0)
        else:
            weights = rows_of(weights, swapped, 0)
            count = float(weights.sum())
            # a row that does not count may hold anything, infinity too
            value = float(np.where(weights > 0, losses, 0.0) @ weights)
            share = (weights / (count or 1.0)).astype(gradient.dtype)
            gradient *= (share / total)[:, None]
            gradient[every, labels] -= share
            gradient[weights == 0] = 0.0
        return Loss(value / (count or 1.0), from_rows(gradient, targets.shape, swapped), count)

    def _weights(self, targets: Array, lengths: Any, mask: Any) -> Array | None:
        """Return how much each target counts, or None for all alike."""
        counted = valid(targets.shape, lengths, mask)
        if self.ignore_index is not None:
            known = targets != self.ignore_index
            counted = known if counted is None else counted & known
        if self.weight is None:
            return None if counted is None else counted.astype(float)
        weights = self.weight[np.where(targets == self.ignore_index, 0, targets)]
        return weights if counted is None else weights * counted

    def predict(self, output: Array) -> Array:
        """The most probable labels."""
        return output.argmax(axis=-1)

    def compare(self, output: Array, targets: Any, lengths: Any = None) -> tuple[Array, Array]:
        """Return those targets that count, and the predictions in their places: what a metric takes."""
        targets = np.asarray(targets)
        counted = valid(targets.shape, lengths, None if self.ignore_index is None else targets != self.ignore_index)
        return _where(counted, targets, self.predict(output))


class _Elementwise:
    """What losses share that compare output and targets element by element."""

    def check(self, targets: Any, size: int) -> None:
        """Raise what a call would raise for targets, if the output's last axis has `size` entries."""
        targets = np.asarray(targets)
        if targets.dtype.kind not in "fiub":
            raise TypeError(f"targets have dtype {targets.dtype}, expected numbers")
        if targets.ndim < 2 or targets.shape[-1] != size:
            raise ValueError(f"targets have shape {targets.shape}, expected {size} in the last axis, as the output has")

    def __call__(self, output: Array, targets: Any, lengths: Any = None, mask: Any = None) -> Loss:
        """Return the loss.

        Parameters
        ----------
        output : numpy.ndarray
            (B, ..., size): (B, size), or (B, T, size) for sequences.
        targets : numbers
            Of the same shape.
        lengths : (B,) integers, optional
            How many steps of each row count.
        mask : booleans, optional
            Which targets count: of the shape of the targets, or of their first axes.

        Returns
        -------
        Loss
            Of value 0 and 0 terms where no element counts.

        Raises
        ------
        TypeError, ValueError
            If an argument is of the wrong kind, shape or value.
        """
        check_float("output", output)
        targets = _same_shape("targets", np.asarray(targets), output.shape)
        self.check(targets, output.shape[-1])
        counted = valid(targets.shape, lengths, mask)
        terms, slopes = self._terms(output, targets.astype(output.dtype))
        count = float(output.size)
        if counted is not None:
            count = float(np.count_nonzero(counted))
            terms, slopes = np.where(counted, terms, 0), np.where(counted, slopes, 0)
        slopes *= slopes.dtype.type(1.0 / (count or 1.0))
        return Loss(float(terms.sum(dtype=float)) / (count or 1.0), slopes, count)

    def _terms(self, output: Array, targets: Array) -> tuple[Array, Array]:
        """Return the loss of each element, and its derivative."""
        raise NotImplementedError

    def predict(self, output: Array) -> Array:
        """What the output says of the targets."""
        raise NotImplementedError

    def compare(self, output: Array, targets: Any, lengths: Any = None) -> tuple[Array, Array]:
        """Return those targets that count, and the predictions in their places: what a metric takes."""
        targets = np.asarray(targets)
        return _where(valid(targets.shape, lengths, None), targets, self.predict(output))


class MeanSquaredError(_Elementwise):
    """The mean of (output - target)².

    Examples
    --------
    >>> value, gradient, terms = MeanSquaredError()(np.array([[1.0, 2.0]]), [[0.0, 4.0]])
    >>> value, gradient
    (2.5, array([[ 1., -2.]]))
    """

    def _terms(self, output: Array, targets: Array) -> tuple[Array, Array]:
        difference = output - targets
        return difference * difference, 2 * difference

    def predict(self, output: Array) -> Array:
        """The output itself."""
        return output


class BinaryCrossEntropy(_Elementwise):
    """The mean of -log(sigmoid(logit)) for a target of 1, -log(1 - sigmoid(logit)) for one of 0.

    Targets may lie between, too.

    Parameters
    ----------
    positive_weight : float
        How many times as much a target of 1 counts; ``pos_weight`` of ``torch.nn.BCEWithLogitsLoss``.

    Examples
    --------
    >>> value, gradient, terms = BinaryCrossEntropy()(np.array([[0.0], [0.0]]), [[1], [0]])
    >>> round(value, 4), gradient[:, 0]
    (0.6931, array([-0.25,  0.25]))
    """

    def __init__(self, positive_weight: float = 1.0) -> None:
        self.positive_weight = check_number("positive_weight", positive_weight, 0.0, above=True)

    def check(self, targets: Any, size: int) -> None:
        """Raise what a call would raise for targets, if the output's last axis has `size` entries."""
        super().check(targets, size)
        targets = np.asarray(targets)
        wrong = ~((targets >= 0) & (targets <= 1))
        if wrong.any():
            index = [int(i) for i in np.unravel_index(np.argmax(wrong), targets.shape)]
            raise ValueError(f"targets{index} is {targets[tuple(index)]}, expected 0 to 1")

    def _terms(self, output: Array, targets: Array) -> tuple[Array, Array]:
        softplus = np.maximum(output, 0) + np.log1p(np.exp(-np.abs(output)))  # log(1 + exp(output))
        weight = output.dtype.type(self.positive_weight)
        probability = sigmoid(output)
        terms = (1 - targets) * softplus + weight * targets * (softplus - output)
        return terms, (1 - targets) * probability - weight * targets * (1 - probability)

    def predict(self, output: Array) -> Array:
        """1 where it is the more probable, else 0."""
        return (output > 0).astype(np.int64)


class CTC:
    """The loss of connectionist temporal classification: labels in order, at steps that nobody told.

    Per row, the loss is -log of the probability that a path of symbols, one drawn at each step from softmax(logits),
    becomes the row's labels when repeats are merged and blanks dropped. As ``torch.nn.CTCLoss`` with its mean: each
    row's loss is divided by its number of labels (at least 1), and the mean is over rows.

    Source: A. Graves et al., Connectionist temporal classification, 2006.

    Parameters
    ----------
    blank : int
        The symbol that stands for no label.
    zero_infinity : bool
        What to do with a row whose labels no path of its length can become: leave it out with a loss of 0, or raise.

    Examples
    --------
    >>> logits = np.zeros((1, 4, 3), np.float32)  # four steps, two labels and the blank
    >>> value, gradient, terms = CTC()(logits, [[1, 2]])
    >>> round(value, 4)  # half of -log(15 / 81): 15 of the 81 paths become 1 2
    0.8432
    """

    def __init__(self, blank: int = 0, zero_infinity: bool = False) -> None:
        self.blank = functional.check_integer("blank", blank, 0)
        self.zero_infinity = functional.check_flag("zero_infinity", zero_infinity)

    def check(self, targets: Any, size: int) -> None:
        """Raise what a call would raise for targets, if the output's last axis has `size` entries."""
        self._labels(targets, size)

    def _labels(self, targets: Any, size: int) -> tuple[Array, Array]:
        """Return the labels (B, S), and how many each row has."""
        targets = np.asarray(targets)
        if targets.dtype.kind not in "iu" or targets.ndim != 2:
            what = f"{targets.dtype} {targets.shape}"
            raise TypeError(f"targets are {what}, expected integers (B, S), negative after each row's last label")
        if self.blank >= size:
            raise ValueError(f"blank is {self.blank}, expected one of the output's {size} symbols")
        there = targets >= 0
        counts = there.sum(axis=1)
        if (there != (np.arange(targets.shape[1]) < counts[:, None])).any():
            row = int(np.argmax((there != (np.arange(targets.shape[1]) < counts[:, None])).any(axis=1)))
            raise ValueError(f"targets[{row}] has a label after a negative one, expected those at the end alone")
        check_labels("targets", np.where(there, targets, 0), size)
        if (targets == self.blank).any():
            row = int(np.argmax((targets == self.blank).any(axis=1)))
            raise ValueError(f"targets[{row}] holds the blank, {self.blank}, expected labels other than that")
        return targets, counts

    def __call__(self, output: Array, targets: Any, lengths: Any = None) -> Loss:
        """Return the loss.

        Parameters
        ----------
        output : numpy.ndarray
            (B, T, K), logits.
        targets : (B, S) integers
            Labels from 0 to K-1, none of them the blank. A row with fewer is filled with negative numbers.
        lengths : (B,) integers, optional
            How many steps of the output each row has, T by default.

        Returns
        -------
        Loss

        Raises
        ------
        TypeError, ValueError
            If an argument is of the wrong kind, shape or value, or without `zero_infinity` if a row has fewer steps
            than its labels need: one for each, and one more between two that are equal.
        """
        from fastrnn.kernels import train as kernels

        check_float("output", output, 3)
        B, T, K = output.shape
        labels, counts = self._labels(targets, K)
        if len(labels) != B:
            raise ValueError(f"targets have {len(labels)} rows, expected B = {B}")
        steps = functional.check_lengths(np.full(B, T) if lengths is None else lengths, T, B)
        self._check_steps(labels, counts, steps)
        logs = log_softmax(output.swapaxes(0, 1).astype(float, order="C"))
        losses, gradient = np.empty(B), np.empty((T, B, K))
        kernels.ctc(logs, labels.astype(np.int64, order="C"), steps, counts, self.blank, losses, gradient)
        losses = np.where(np.isinf(losses) & self.zero_infinity, 0.0, losses) / np.maximum(counts, 1)
        gradient /= (np.maximum(counts, 1) * max(B, 1))[:, None]
        return Loss(float(losses.mean()) if B else 0.0, gradient.astype(output.dtype).swapaxes(0, 1), float(B))

    def _check_steps(self, labels: Array, counts: Array, steps: Any) -> None:
        if self.zero_infinity:
            return
        repeats = ((labels[:, 1:] == labels[:, :-1]) & (labels[:, 1:] >= 0)).sum(axis=1)
        short = steps < counts + repeats
        if short.any():
            row = int(np.argmax(short))
            raise ValueError(
                f"targets[{row}] has {counts[row]} labels, of which {repeats[row]} repeat the one before, and needs "
                f"{counts[row] + repeats[row]} steps; it has {steps[row]}. zero_infinity=True leaves such rows out"
            )

    def predict(self, output: Array, lengths: Any = None) -> list[list[int]]:
        """The labels of the most probable path of each row."""
        return ctc_greedy(output, lengths, self.blank)

    def compare(self, output: Array, targets: Any, lengths: Any = None) -> tuple[list[list[int]], list[list[int]]]:
        """Return the labels of each row and those that are predicted: what `error_rate` takes."""
        labels, counts = self._labels(targets, output.shape[-1])
        return [row[:n].tolist() for row, n in zip(labels, counts, strict=True)], self.predict(output, lengths)


# ---- decoding of CTC


def ctc_greedy(logits: Array, lengths: Any = None, blank: int = 0) -> list[list[int]]:
    """Return the labels of each row's most probable path: repeats merged, blanks dropped.

    Parameters
    ----------
    logits : numpy.ndarray
        (B, T, K)
    lengths : (B,) integers, optional
    blank : int

    Returns
    -------
    list of list of int

    Examples
    --------
    >>> ctc_greedy(np.eye(3)[[[1, 1, 0, 1, 2]]])
    [[1, 1, 2]]
    """
    steps = _check_decoding(logits, lengths, blank)
    best = logits.argmax(axis=-1)
    new = best != blank
    new[:, 1:] &= best[:, 1:] != best[:, :-1]
    return [best[b, :n][new[b, :n]].tolist() for b, n in enumerate(steps)]


def ctc_beam(logits: Array, lengths: Any = None, blank: int = 0, beam: int = 16) -> list[list[int]]:
    """Return the most probable labels of each row among the `beam` best beginnings that are kept at each step.

    The probability of labels is the sum over all their paths, which the greedy way does not add up. Source: A. Graves,
    Supervised sequence labelling with recurrent neural networks, 2012, section 7.5.3.

    Parameters
    ----------
    logits : numpy.ndarray
        (B, T, K)
    lengths : (B,) integers, optional
    blank : int
    beam : int

    Returns
    -------
    list of list of int

    Examples
    --------
    >>> p = np.array([[[0.6, 0.4], [0.6, 0.4]]])  # the best path is blank, blank: 0.36; label 1 has 0.64
    >>> ctc_greedy(np.log(p)), ctc_beam(np.log(p))
    ([[]], [[1]])
    """
    steps = _check_decoding(logits, lengths, blank)
    beam = functional.check_integer("beam", beam, 1)
    logs = log_softmax(logits.astype(float))
    return [_beam_search(logs[b, :n], blank, beam) for b, n in enumerate(steps)]


def _check_decoding(logits: Any, lengths: Any, blank: Any) -> Array:
    """Return how many steps each row has."""
    check_float("logits", logits, 3)
    B, T, K = logits.shape
    if functional.check_integer("blank", blank, 0) >= K:
        raise ValueError(f"blank is {blank}, expected one of the {K} symbols of logits")
    return np.asarray(functional.check_lengths(np.full(B, T) if lengths is None else lengths, T, B))


def _beam_search(logs: Array, blank: int, beam: int) -> list[int]:
    """Search one row (T, K). A beginning has two probabilities: of its paths that end in a blank, and of the others."""
    nothing = -math.inf
    best: dict[tuple[int, ...], tuple[float, float]] = {(): (0.0, nothing)}
    for step in logs.tolist():
        found: dict[tuple[int, ...], tuple[float, float]] = {}

        def add(labels: tuple[int, ...], to_blank: float, to_label: float, found: dict[Any, Any] = found) -> None:
            a, b = found.get(labels, (nothing, nothing))
            found[labels] = float(np.logaddexp(a, to_blank)), float(np.logaddexp(b, to_label))

        for labels, (ends_blank, ends_label) in best.items():
            both = float(np.logaddexp(ends_blank, ends_label))
            for symbol, log in enumerate(step):
                if symbol == blank:
                    add(labels, both + log, nothing)
                elif labels and symbol == labels[-1]:
                    add(labels, nothing, ends_label + log)
                    add((*labels, symbol), nothing, ends_blank + log)
                else:
                    add((*labels, symbol), nothing, both + log)
        ranked = sorted(found.items(), key=lambda item: -np.logaddexp(*item[1]))
        best = dict(ranked[:beam])
    return list(next(iter(best)))


# ---- metrics


def accuracy(targets: Any, predictions: Any) -> float:
    """Return which part of the predictions is right.

    Examples
    --------
    >>> accuracy([1, 2, 3, 4], [1, 2, 3, 3])
    0.75
    """
    targets, predictions = _pair(targets, predictions)
    return float(np.mean(targets == predictions))


def precision(targets: Any, predictions: Any, average: str | None = "binary", positive: int = 1) -> Any:
    """Return which part of what was predicted to be a label is.

    Parameters
    ----------
    targets, predictions : integers
        Of one shape.
    average : str, optional
        "binary": of the label `positive`; "macro": the mean over labels; "micro": of all labels together; None: of each
        label that occurs, in order.
    positive : int

    Returns
    -------
    float or numpy.ndarray
        0 for a label that was never predicted.

    Examples
    --------
    >>> round(precision([0, 1, 1, 1], [1, 1, 0, 1]), 4)
    0.6667
    """
    return _rates(targets, predictions, average, positive)[0]


def recall(targets: Any, predictions: Any, average: str | None = "binary", positive: int = 1) -> Any:
    """Return which part of what is a label was predicted to be it. Arguments as for `precision`.

    Examples
    --------
    >>> recall([0, 1, 1, 1, 1], [1, 1, 0, 1, 1])
    0.75
    """
    return _rates(targets, predictions, average, positive)[1]


def f1(targets: Any, predictions: Any, average: str | None = "binary", positive: int = 1) -> Any:
    """Return the harmonic mean of precision and recall. Arguments as for `precision`; "macro" is the mean of F1.

    Examples
    --------
    >>> f1([0, 1, 1, 1], [1, 1, 0, 0])
    0.4
    """
    return _rates(targets, predictions, average, positive)[2]


def _rates(targets: Any, predictions: Any, average: str | None, positive: int) -> tuple[Any, ...]:
    """Return precision, recall and F1."""
    targets, predictions = _pair(targets, predictions)
    if average not in ("binary", "macro", "micro", None):
        raise ValueError(f"average is {average!r}, expected 'binary', 'macro', 'micro' or None")
    labels = np.array([positive]) if average == "binary" else np.union1d(targets, predictions)
    there, predicted = (array.reshape(-1, 1) == labels for array in (targets, predictions))
    counts = [both.sum(axis=0) for both in (there & predicted, predicted, there)]
    if average == "micro":
        counts = [count.sum(keepdims=True) for count in counts]
    right, predicted, there = counts
    rates = (
        right / np.maximum(predicted, 1),
        right / np.maximum(there, 1),
        2 * right / np.maximum(predicted + there, 1),
    )
    return rates if average is None else (*(float(rate.mean()) for rate in rates),)


def mean_squared_error(targets: Any, predictions: Any) -> float:
    """Return the mean of (target - prediction)².

    Examples
    --------
    >>> mean_squared_error([1.0, 2.0], [0.0, 4.0])
    2.5
    """
    targets, predictions = _pair(targets, predictions)
    return float(np.mean(np.square(np.subtract(targets, predictions, dtype=float))))


def mean_absolute_error(targets: Any, predictions: Any) -> float:
    """Return the mean of abs(target - prediction).

    Examples
    --------
    >>> mean_absolute_error([1.0, 2.0], [0.0, 4.0])
    1.5
    """
    targets, predictions = _pair(targets, predictions)
    return float(np.mean(np.abs(np.subtract(targets, predictions, dtype=float))))


def perplexity(cross_entropy: float) -> float:
    """Return exp of a mean cross-entropy: among how many equally probable labels the model seems to choose.

    Examples
    --------
    >>> round(perplexity(np.log(7.0)), 12)
    7.0
    """
    return math.exp(cross_entropy) if cross_entropy < 709.0 else math.inf


def edit_distance(a: Sequence[Hashable], b: Sequence[Hashable]) -> int:
    """Return how many insertions, deletions and replacements make b of a (V. Levenshtein, 1966).

    Parameters
    ----------
    a, b : sequence
        Strings, or lists of words or labels.

    Returns
    -------
    int

    Examples
    --------
    >>> edit_distance("kitten", "sitting"), edit_distance([1, 2, 3], [1, 3])
    (3, 1)
    """
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, right in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (left != right))
    return row[-1]


def error_rate(targets: Sequence[Sequence[Hashable]], predictions: Sequence[Sequence[Hashable]]) -> float:
    """Return the edit distances of all pairs by the length of all targets: of strings, the character error rate.

    Parameters
    ----------
    targets, predictions : sequence of sequences
        Strings, or lists of words or labels.

    Returns
    -------
    float
        Above 1 where the predictions are much too long.

    Raises
    ------
    ValueError
        If they are not equally many, or the targets are empty.

    Examples
    --------
    >>> error_rate(["abcd", "ef"], ["abd", "efg"])
    0.3333333333333333
    """
    if len(targets) != len(predictions):
        raise ValueError(f"there are {len(predictions)} predictions, expected {len(targets)} as there are targets")
    total = sum(map(len, targets))
    if not total:
        raise ValueError("the targets are empty, expected at least one element in all of them together")
    return sum(map(edit_distance, targets, predictions)) / total


def word_error_rate(targets: Sequence[str], predictions: Sequence[str]) -> float:
    """Return `error_rate` in words, which are what stands between white space.

    Examples
    --------
    >>> word_error_rate(["the cat sat"], ["the cat sat down"])
    0.3333333333333333
    """
    return error_rate([text.split() for text in targets], [text.split() for text in predictions])


def _pair(targets: Any, predictions: Any) -> tuple[Array, Array]:
    """Return both as arrays of one shape that is not empty."""
    targets = np.asarray(targets)
    predictions = _same_shape("predictions", np.asarray(predictions), targets.shape)
    if not targets.size:
        raise ValueError(f"targets have shape {targets.shape}, expected at least one element")
    return targets, predictions


def _where(counted: Array | None, targets: Array, predictions: Array) -> tuple[Array, Array]:
    """Return both in one axis, where they count."""
    if counted is None:
        return targets.reshape(-1), predictions.reshape(-1)
    return targets[counted], predictions[counted]


def _same_shape(name: str, array: Array, shape: tuple[int, ...]) -> Array:
    if array.shape != shape:
        raise ValueError(f"{name} have shape {array.shape}, expected {shape}")
    return array
