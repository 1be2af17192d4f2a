"""How parameters follow their gradients: SGD, RMSprop, Adam and AdamW, schedules of the learning rate, clipping.

The update formulas are those of ``torch.optim``. A schedule is a function of the number of updates that were made.

>>> import numpy as np
>>> parameters = {"a": np.array([1.0, -1.0])}
>>> optimizer = Adam(Cosine(0.1, steps=100))
>>> optimizer.step(parameters, {"a": np.array([3.0, 0.5])})
>>> parameters["a"].round(4)
array([ 0.9, -1.1])
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastrnn import functional
from fastrnn.weights import Params

Array = np.ndarray


def check_number(
    name: str, value: Any, low: float, high: float = math.inf, *, above: bool = False, below: bool = False
) -> float:
    """Return `value` as a float if it lies from `low` to `high`, without the ends if `above` or `below`.

    Raises
    ------
    TypeError
        If it is not a number.
    ValueError
        If it lies elsewhere, or is not finite.
    """
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"{name} is a {type(value).__name__}, expected a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    too_low = number <= low if above else number < low
    too_high = number >= high if below else number > high
    if not math.isfinite(number) or too_low or too_high:
        lower = f"above {low:g}" if above else f"at least {low:g}"
        upper = "" if high == math.inf else f" and below {high:g}" if below else f" and at most {high:g}"
        raise ValueError(f"{name} is {value}, expected a finite number {lower}{upper}")
    return number


# ---- schedules


class Schedule:
    """A learning rate for each update: ``schedule(step)``, where `step` counts the updates before it, from 0."""

    def __call__(self, step: int) -> float:
        raise NotImplementedError

    def observe(self, value: float) -> None:
        """Hear of an epoch's loss, which only `ReduceOnPlateau` minds."""

    def state(self) -> dict[str, float]:
        """What a checkpoint has to keep beside the number of updates."""
        return {}

    def restore(self, state: Mapping[str, float]) -> None:
        """Take back what `state` returned."""


@dataclass
class Constant(Schedule):
    """Always `rate`.

    Examples
    --------
    >>> Constant(0.1)(1000)
    0.1
    """

    rate: float

    def __post_init__(self) -> None:
        self.rate = check_number("rate", self.rate, 0.0)

    def __call__(self, step: int) -> float:
        return self.rate


@dataclass
class StepDecay(Schedule):
    """`rate` times `factor` after every `every` updates.

    Examples
    --------
    >>> schedule = StepDecay(0.5, every=10, factor=0.5)
    >>> schedule(9), schedule(10), schedule(20)
    (0.5, 0.25, 0.125)
    """

    rate: float
    every: int
    factor: float = 0.1

    def __post_init__(self) -> None:
        self.rate = check_number("rate", self.rate, 0.0)
        self.every = functional.check_integer("every", self.every, 1)
        self.factor = check_number("factor", self.factor, 0.0, above=True)

    def __call__(self, step: int) -> float:
        return self.rate * self.factor ** (step // self.every)


@dataclass
class Cosine(Schedule):
    """From `rate` down to `minimum` along half a wave of the cosine in `steps` updates, and `minimum` after them.

    Source: I. Loshchilov and F. Hutter, SGDR, 2017, without restarts.

    Examples
    --------
    >>> schedule = Cosine(0.5, steps=10)
    >>> schedule(0), round(schedule(5), 12), schedule(10)
    (0.5, 0.25, 0.0)
    """

    rate: float
    steps: int
    minimum: float = 0.0

    def __post_init__(self) -> None:
        self.rate = check_number("rate", self.rate, 0.0)
        self.steps = functional.check_integer("steps", self.steps, 1)
        self.minimum = check_number("minimum", self.minimum, 0.0)

    def __call__(self, step: int) -> float:
        share = min(step, self.steps) / self.steps
        return self.minimum + (self.rate - self.minimum) * (1.0 + math.cos(math.pi * share)) / 2.0


@dataclass
class Warmup(Schedule):
    """Linearly from `start` times the first rate of `schedule` up to it in `steps` updates, and then `schedule`.

    Examples
    --------
    >>> schedule = Warmup(Constant(0.5), steps=4, start=0.0)
    >>> [schedule(step) for step in range(6)]
    [0.0, 0.125, 0.25, 0.375, 0.5, 0.5]
    """

    schedule: Schedule
    steps: int
    start: float = 0.1

    def __post_init__(self) -> None:
        self.schedule = as_schedule(self.schedule)
        self.steps = functional.check_integer("steps", self.steps, 1)
        self.start = check_number("start", self.start, 0.0, 1.0)

    def __call__(self, step: int) -> float:
        if step >= self.steps:
            return self.schedule(step - self.steps)
        return self.schedule(0) * (self.start + (1.0 - self.start) * step / self.steps)

    def observe(self, value: float) -> None:
        self.schedule.observe(value)

    def state(self) -> dict[str, float]:
        return self.schedule.state()

    def restore(self, state: Mapping[str, float]) -> None:
        self.schedule.restore(state)


@dataclass
class ReduceOnPlateau(Schedule):
    """`rate`, times `factor` whenever the loss has not become smaller for more than `patience` epochs.

    Smaller is what lies below the best loss by the part `threshold` of it. The rate never falls below `minimum`. The
    loss is that of validation where there is one, else that of training.

    Examples
    --------
    >>> schedule = ReduceOnPlateau(0.5, factor=0.5, patience=1)
    >>> for loss in (2.0, 1.0, 1.0, 1.0):
    ...     schedule.observe(loss)
    >>> schedule(0)
    0.25
    """

    rate: float
    factor: float = 0.1
    patience: int = 10
    threshold: float = 1e-4
    minimum: float = 0.0

    def __post_init__(self) -> None:
        self.rate = check_number("rate", self.rate, 0.0)
        self.factor = check_number("factor", self.factor, 0.0, 1.0, above=True, below=True)
        self.patience = functional.check_integer("patience", self.patience, 0)
        self.threshold = check_number("threshold", self.threshold, 0.0)
        self.minimum = check_number("minimum", self.minimum, 0.0)
        self._now, self._best, self._waited = self.rate, math.inf, 0

    def __call__(self, step: int) -> float:
        return self._now

    def observe(self, value: float) -> None:
        better = value < (self._best if math.isinf(self._best) else self._best - abs(self._best) * self.threshold)
        self._best, self._waited = (value, 0) if better else (self._best, self._waited + 1)
        if self._waited > self.patience:
            self._now, self._waited = max(self._now * self.factor, self.minimum), 0

    def state(self) -> dict[str, float]:
        return {"now": self._now, "best": self._best, "waited": self._waited}

    def restore(self, state: Mapping[str, float]) -> None:
        now, best = check_number("now", state["now"], 0.0), state["best"]
        if isinstance(best, bool) or not isinstance(best, (int, float)) or math.isnan(best):  # infinite at first
            raise ValueError(f"best is {best!r}, expected a number")
        waited = functional.check_integer("waited", state["waited"], 0)
        self._now, self._best, self._waited = now, float(best), waited


def as_schedule(rate: Any) -> Schedule:
    """Return a schedule: the one given, or a number as a constant."""
    if isinstance(rate, Schedule):
        return rate
    return Constant(check_number("learning_rate", rate, 0.0))


# ---- optimisers


class Optimizer:
    """What SGD, RMSprop, Adam and AdamW share.

    Attributes
    ----------
    schedule : Schedule
    steps : int
        How many updates were made.
    updates : dict of str to int
        How many of them each parameter had: fewer where it was frozen for a while.
    slots : dict of str to dict
        What it remembers, such as "mean" and "square", for each parameter by name.
    """

    def __init__(self, learning_rate: float | Schedule, weight_decay: float, slots: tuple[str, ...]) -> None:
        self.schedule = as_schedule(learning_rate)
        self.weight_decay = check_number("weight_decay", weight_decay, 0.0)
        self.steps = 0
        self.updates: dict[str, int] = {}
        self.slots: dict[str, Params] = {slot: {} for slot in slots}

    @property
    def learning_rate(self) -> float:
        """That of the next update."""
        return self.schedule(self.steps)

    def step(self, parameters: Mapping[str, Array], gradients: Mapping[str, Array]) -> None:
        """Take one step.

        Parameters
        ----------
        parameters : mapping of str to numpy.ndarray
            Those that have a gradient are modified, in place.
        gradients : mapping of str to numpy.ndarray

        Raises
        ------
        ValueError
            If a gradient has no parameter, or not its shape; before anything is modified.
        """
        for name, gradient in gradients.items():
            if name not in parameters:
                raise ValueError(f"gradients hold {name!r}, and parameters do not")
            if gradient.shape != parameters[name].shape:
                expected = parameters[name].shape
                raise ValueError(f"gradients[{name!r}] has shape {gradient.shape}, expected {expected}")
        rate = self.learning_rate
        self.steps += 1
        for name, gradient in gradients.items():
            parameter = parameters[name]
            for slot in self.slots.values():
                if name not in slot:
                    slot[name] = np.zeros_like(parameter)
            count = self.updates[name] = self.updates.get(name, 0) + 1
            self._update(parameter, gradient, rate, count, *[slot[name] for slot in self.slots.values()])

    def _update(self, parameter: Array, gradient: Array, rate: float, count: int, *slots: Array) -> None:
        """Make the parameter's update number `count`, from 1."""
        raise NotImplementedError

    def _decayed(self, parameter: Array, gradient: Array) -> Array:
        """Return the gradient with that of weight_decay / 2 times the sum of squares of the parameter."""
        return gradient + self.weight_decay * parameter if self.weight_decay else gradient


class SGD(Optimizer):
    """Gradient descent: ``p -= rate * g``, or with momentum ``v = momentum * v + g; p -= rate * v``.

    Parameters
    ----------
    learning_rate : float or Schedule
    momentum : float
        0 to below 1.
    nesterov : bool
        Whether to step along ``g + momentum * v`` (Y. Nesterov, 1983; I. Sutskever et al., 2013).
    weight_decay : float
        Adds ``weight_decay * p`` to g.

    Examples
    --------
    >>> parameters = {"a": np.array([1.0])}
    >>> SGD(0.5).step(parameters, {"a": np.array([1.0])})
    >>> parameters["a"]
    array([0.5])
    """

    def __init__(
        self,
        learning_rate: float | Schedule = 1e-2,
        momentum: float = 0.0,
        nesterov: bool = False,
        weight_decay: float = 0.0,
    ) -> None:
        self.momentum = check_number("momentum", momentum, 0.0, 1.0, below=True)
        self.nesterov = functional.check_flag("nesterov", nesterov)
        if nesterov and not momentum:
            raise ValueError("nesterov is True with momentum=0, expected a momentum above 0")
        super().__init__(learning_rate, weight_decay, ("velocity",) if momentum else ())

    def _update(self, parameter: Array, gradient: Array, rate: float, count: int, *slots: Array) -> None:
        gradient = self._decayed(parameter, gradient)
        for velocity in slots:
            velocity *= self.momentum
            velocity += gradient
            gradient = gradient + self.momentum * velocity if self.nesterov else velocity
        parameter -= rate * gradient


class RMSprop(Optimizer):
    """Each gradient by the root of the running mean of its square (G. Hinton, 2012).

    Parameters
    ----------
    learning_rate : float or Schedule
    alpha : float
        How much of the mean stays at a step.
    epsilon : float
        Is added to the root.
    weight_decay : float
        Adds ``weight_decay * p`` to the gradient.
    momentum : float
        Of what the parameters are moved by.
    centered : bool
        Whether the mean of the gradient is taken off: the root of its variance, then.

    Examples
    --------
    >>> parameters = {"a": np.array([1.0])}
    >>> RMSprop(0.01, alpha=0.75).step(parameters, {"a": np.array([5.0])})
    >>> parameters["a"].round(6)
    array([0.98])
    """

    def __init__(
        self,
        learning_rate: float | Schedule = 1e-2,
        alpha: float = 0.99,
        epsilon: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        centered: bool = False,
    ) -> None:
        self.alpha = check_number("alpha", alpha, 0.0, 1.0, below=True)
        self.epsilon = check_number("epsilon", epsilon, 0.0, above=True)
        self.momentum = check_number("momentum", momentum, 0.0, 1.0, below=True)
        self.centered = functional.check_flag("centered", centered)
        slots = ("square",) + ("velocity",) * bool(momentum) + ("mean",) * centered
        super().__init__(learning_rate, weight_decay, slots)

    def _update(self, parameter: Array, gradient: Array, rate: float, count: int, *slots: Array) -> None:
        gradient = self._decayed(parameter, gradient)
        square = slots[0]
        square *= self.alpha
        square += (1.0 - self.alpha) * gradient * gradient
        if self.centered:
            mean = slots[-1]
            mean += (1.0 - self.alpha) * (gradient - mean)
            root = np.sqrt(np.maximum(square - mean * mean, 0))  # rounding makes it negative where all are alike
        else:
            root = np.sqrt(square)
        root += self.epsilon
        change = np.divide(gradient, root, out=root)
        if self.momentum:
            velocity = slots[1]
            velocity *= self.momentum
            velocity += change
            change = velocity
        parameter -= rate * change


class Adam(Optimizer):
    """The running mean of the gradient by the root of that of its square (D. Kingma and J. Ba, 2015).

    Parameters
    ----------
    learning_rate : float or Schedule
    betas : tuple of float
        How much of the mean, and of the mean square, stays at a step.
    epsilon : float
        Is added to the root.
    weight_decay : float
        Adds ``weight_decay * p`` to the gradient. `AdamW` does it better.

    Examples
    --------
    >>> parameters = {"a": np.array([1.0, 1.0])}
    >>> Adam(0.01).step(parameters, {"a": np.array([2.0, -0.1])})
    >>> parameters["a"].round(6)
    array([0.99, 1.01])
    """

    def __init__(
        self,
        learning_rate: float | Schedule = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        epsilon: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        if not isinstance(betas, (tuple, list)) or len(betas) != 2:
            raise TypeError(f"betas is {betas!r}, expected two numbers")
        self.betas = tuple(check_number(f"betas[{i}]", beta, 0.0, 1.0, below=True) for i, beta in enumerate(betas))
        self.epsilon = check_number("epsilon", epsilon, 0.0)
        super().__init__(learning_rate, weight_decay, ("mean", "square"))

    def _update(self, parameter: Array, gradient: Array, rate: float, count: int, *slots: Array) -> None:
        gradient = self._decayed(parameter, gradient)
        (mean, square), (beta1, beta2) = slots, self.betas
        change = gradient - mean
        change *= 1.0 - beta1
        mean += change
        np.multiply(gradient, gradient, out=change)
        change *= 1.0 - beta2
        square *= beta2
        square += change
        np.sqrt(square, out=change)
        change *= 1.0 / math.sqrt(1.0 - beta2**count)
        change += self.epsilon
        np.divide(mean, change, out=change)
        change *= rate / (1.0 - beta1**count)
        parameter -= change


class AdamW(Adam):
    """Adam, with a weight decay beside it: ``p *= 1 - rate * weight_decay`` (I. Loshchilov and F. Hutter, 2019).

    Parameters
    ----------
    learning_rate, betas, epsilon
        As for `Adam`.
    weight_decay : float

    Examples
    --------
    >>> parameters = {"a": np.array([1.0])}
    >>> AdamW(0.5, weight_decay=0.5).step(parameters, {"a": np.array([0.0])})
    >>> parameters["a"]
    array([0.75])
    """

    def __init__(
        self,
        learning_rate: float | Schedule = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        epsilon: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        super().__init__(learning_rate, betas, epsilon, weight_decay)

    def _update(self, parameter: Array, gradient: Array, rate: float, count: int, *slots: Array) -> None:
        if self.weight_decay:
            parameter *= 1.0 - rate * self.weight_decay
        super()._update(parameter, gradient, rate, count, *slots)

    def _decayed(self, parameter: Array, gradient: Array) -> Array:
        return gradient


# ---- clipping


def global_norm(gradients: Mapping[str, Array]) -> float:
    """Return the root of the sum of squares of all gradients.

    Examples
    --------
    >>> global_norm({"a": np.array([3.0, 0.0]), "b": np.array([[4.0]])})
    5.0
    """
    return math.sqrt(sum(float(np.vdot(gradient, gradient)) for gradient in gradients.values()))


def clip_by_norm(gradients: Mapping[str, Array], limit: float) -> float:
    """Scale all gradients by one factor, so that their common norm is at most `limit`.

    As ``torch.nn.utils.clip_grad_norm_``, which divides by the norm plus 1e-6.

    Parameters
    ----------
    gradients : mapping of str to numpy.ndarray
        (is modified)
    limit : float

    Returns
    -------
    float
        The norm before.

    Raises
    ------
    ValueError
        If `limit` is not above 0.

    Examples
    --------
    >>> gradients = {"a": np.array([3.0, 0.0]), "b": np.array([4.0])}
    >>> clip_by_norm(gradients, 1.0)
    5.0
    >>> gradients["a"].round(4)
    array([0.6, 0. ])
    """
    limit = check_number("limit", limit, 0.0, above=True)
    norm = global_norm(gradients)
    if norm + 1e-6 > limit:
        for gradient in gradients.values():
            gradient *= limit / (norm + 1e-6)
    return norm


def clip_by_value(gradients: Mapping[str, Array], limit: float) -> None:
    """Clip every element to -limit to limit, as ``torch.nn.utils.clip_grad_value_``.

    Parameters
    ----------
    gradients : mapping of str to numpy.ndarray
        (is modified)
    limit : float

    Raises
    ------
    ValueError
        If `limit` is not above 0.

    Examples
    --------
    >>> gradients = {"a": np.array([3.0, -0.5])}
    >>> clip_by_value(gradients, 1.0)
    >>> gradients["a"]
    array([ 1. , -0.5])
    """
    limit = check_number("limit", limit, 0.0, above=True)
    for gradient in gradients.values():
        np.clip(gradient, -limit, limit, out=gradient)
