"""For tests of recurrent layers: random problems, comparison within rounding, gradients against finite differences.

A backend is given by its name, "cpu" or "reference", or as anything with functions ``forward`` and ``backward`` that
take what those of `fastrnn.functional` take (that module, for one), or as a tuple of two such functions.

>>> from fastrnn import testing
>>> problem = testing.problem("gru", T=5, B=3, I=4, H=6, lengths=True, dtype="float64")
>>> results, expected = testing.run("cpu", problem), testing.run("reference", problem)
>>> for name in expected:
...     testing.assert_close(results[name], expected[name], name)
>>> testing.gradcheck("cpu", problem)
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from fastrnn import backend as backends
from fastrnn.functional import State
from fastrnn.weights import Params, cell_shapes

Backend = Any  # a name, a module, or a tuple of two functions


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """What one layer in one direction is given, and the gradients that come back to it. See `problem`.

    ``dataclasses.replace(problem, d_output=None)`` is another one with something changed.
    """

    cell: str
    x: np.ndarray
    params: Params
    state: State
    lengths: np.ndarray | None
    reset: np.ndarray | None
    reverse: bool
    d_output: np.ndarray | None
    d_state: tuple[np.ndarray | None, ...] | None

    def astype(self, dtype: npt.DTypeLike) -> "Problem":
        """Return a problem with copies of all arrays, those of numbers as `dtype`."""

        def copy(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(map(copy, value))
            if isinstance(value, dict):
                return {name: copy(array) for name, array in value.items()}
            if isinstance(value, np.ndarray):
                return value.astype(dtype if value.dtype.kind == "f" else value.dtype)
            return value

        return Problem(**{field.name: copy(getattr(self, field.name)) for field in dataclasses.fields(self)})


def problem(
    cell: str,
    T: int,
    B: int,
    I: int,
    H: int,
    *,
    P: int = 0,
    bias: bool = True,
    lengths: bool | npt.ArrayLike = False,
    reset: bool | npt.ArrayLike = False,
    reverse: bool = False,
    dtype: npt.DTypeLike = np.float32,
    seed: int = 0,
) -> Problem:
    """Make a random problem whose numbers are all of the order of 1: inputs, gates and gradients of the output.

    Parameters
    ----------
    cell : str
        "rnn_tanh", "rnn_relu", "rnn_sigmoid", "lstm", "gru" or "gru_reset_before".
    T, B, I, H : int
        Time, batch, sizes of the input and of the hidden state.
    P : int
        Size of an LSTM's projection; 0: none.
    bias : bool
    lengths : bool or (B,) integers
        True: random ones, in any order, with T and 0 among them where B is 3 or more.
    reset : bool or (T, B) booleans
        True: at random, at one in five.
    reverse : bool
    dtype : dtype
        float32 or float64. The numbers are the same, but for their rounding.
    seed : int

    Returns
    -------
    Problem
        With x, params, state, lengths, reset, d_output, d_state and what else was given.

    Examples
    --------
    >>> p = problem("lstm", T=4, B=3, I=2, H=5, lengths=[4, 0, 1])
    >>> [s.shape for s in p.state], p.d_output.shape, p.lengths
    ([(3, 5), (3, 5)], (4, 3, 5), array([4, 0, 1]))
    """
    random = np.random.default_rng(seed)

    def normal(*shape: int, scale: float = 1.0) -> np.ndarray:
        return (scale * random.standard_normal(shape)).astype(dtype)

    shapes = cell_shapes(cell, I, H, P, bias)
    params = {name: normal(*shape, scale=1 / math.sqrt(max(shape[1:], default=4))) for name, shape in shapes.items()}
    W = P or H
    sizes = (W, H) if cell == "lstm" else (W,)
    given = {}
    x, d_output = normal(T, B, I), normal(T, B, W)
    state, d_state = (tuple(normal(B, size) for size in sizes) for _ in range(2))
    steps = random.integers(0, T + 1, B)
    if B >= 3:
        steps[random.permutation(B)[:2]] = T, 0
    starts = random.random((T, B)) < 0.2
    for name, value, made, kind in (("lengths", lengths, steps, np.int64), ("reset", reset, starts, np.bool_)):
        given[name] = made if value is True else None if value is False or value is None else np.array(value, kind)
    return Problem(cell, x, params, state, **given, reverse=reverse, d_output=d_output, d_state=d_state)


def run(backend: Backend, problem: Problem) -> dict[str, np.ndarray]:
    """Run forward and backward.

    Parameters
    ----------
    backend : str, module or tuple of two functions
    problem : Problem

    Returns
    -------
    dict of str to numpy.ndarray
        "output", "h" and perhaps "c", the final state; then the gradients: "dx", "dweight_ih" and so on, "dh" and
        perhaps "dc", those of the initial state.

    Examples
    --------
    >>> list(run("reference", problem("lstm", T=2, B=1, I=2, H=3, bias=False)))
    ['output', 'h', 'c', 'dx', 'dweight_ih', 'dweight_hh', 'dh', 'dc']
    """
    forward, backward = _functions(backend)
    output, state, tape = _forward(forward, problem, training=True)
    dx, dparams, dstate = backward(tape, problem.d_output, problem.d_state)
    return {
        "output": output,
        **dict(zip("hc", state, strict=False)),
        "dx": dx,
        **{f"d{name}": array for name, array in dparams.items()},
        **dict(zip(("dh", "dc"), dstate, strict=False)),
    }


def assert_close(
    actual: npt.ArrayLike,
    expected: npt.ArrayLike,
    what: str = "result",
    *,
    terms: int = 1000,
    scale: float | None = None,
) -> None:
    """Check that two arrays agree but for rounding.

    An element may differ by ``4 * sqrt(terms) * eps * (abs(expected) + scale)``, eps being the coarser dtype's.
    Rounding errors are independent of each other, so that a sum of n terms, in any order, is off by some sqrt(n) of
    them; the 4 stands for the few roundings in a term and for the worst of many elements. Where a sum happens to be
    small, the errors of its terms are not: they are measured by `scale`, the usual size of the elements. A wrong or
    missing term is off by a good part of that size, in float32 thousands of times more than is allowed.

    Parameters
    ----------
    actual, expected : array of numbers
        Infinity agrees with itself only, NaN with NaN.
    what : str
        What is compared, for the message.
    terms : int
        How long the sums are that made an element, all in all: steps times the length of a product, for instance.
    scale : float, optional
        By default the root of the mean square of `expected`. Few elements may all be small by chance: give it then.

    Raises
    ------
    AssertionError
        Names what differs, the index that is worst, and both numbers.

    Examples
    --------
    >>> assert_close(np.float32([0.1, 0.2]), [0.1, 0.2])
    >>> assert_close(np.float32([0.1, 0.3]), [0.1, 0.2], "output")
    Traceback (most recent call last):
        ...
    AssertionError: output[1] is 0.3, expected 0.2: differs by 1e-01, allowed are 5.4e-06; 1 of 2 elements is wrong
    """
    actual, expected = np.asarray(actual), np.asarray(expected)
    if actual.shape != expected.shape:
        raise AssertionError(f"{what} has shape {actual.shape}, expected {expected.shape}")
    eps = max(np.finfo(array.dtype if array.dtype.kind == "f" else float).eps for array in (actual, expected))
    if scale is None:
        scale = _usual_size(expected)
    with np.errstate(invalid="ignore", over="ignore"):
        difference = np.abs(actual.astype(float) - expected)
        allowed = 4 * math.sqrt(terms) * float(eps) * (np.abs(expected) + scale)
        excess = np.asarray(difference - allowed)
    same = (actual == expected) | (np.isnan(actual) & np.isnan(expected))
    wrong = ~same & ~((excess <= 0) & np.isfinite(expected))
    if wrong.any():
        excess[np.isnan(excess)] = np.inf
        worst = tuple(int(i) for i in np.unravel_index(np.argmax(np.where(wrong, excess, -1)), wrong.shape))
        count = np.count_nonzero(wrong)
        raise AssertionError(
            f"{what}{list(worst) or ''} is {actual[worst]!s}, expected {expected[worst]!s}: "
            f"differs by {difference[worst]:.0e}, allowed are {allowed[worst]:.1e}; {count} of {wrong.size} elements "
            f"{'is' if count == 1 else 'are'} wrong"
        )


def gradcheck(backend: Backend, problem: Problem, *, entries: int = 100, seed: int = 0) -> None:
    """Check backward against finite differences of forward, in float64.

    The loss is the sum of the output times d_output and of the final state times d_state, so that what backward
    returns are its derivatives. Each entry of each input is moved up and down by a step h, and the slope of the loss
    between must be the gradient, within 1e-6 of its size and of the usual size in its array. The slope itself is off
    by about h² for the loss's curvature and eps/h for its rounding, below 1e-9 with h = 1e-5. A relu may have its
    kink between the two points: a slope that does not fit is taken again with steps of 1e-6 and 1e-7, which mends
    that and nothing else.

    Parameters
    ----------
    backend : str, module or tuple of two functions
    problem : Problem
        Of any dtype; float64 is what is computed in.
    entries : int
        How many entries of an array are tried, at random, where it has more.
    seed : int
        Of their choice.

    Raises
    ------
    AssertionError
        Names the gradient, the index, and both numbers.

    Examples
    --------
    >>> gradcheck("reference", problem("gru", T=3, B=2, I=2, H=3, reset=True, reverse=True))
    """
    problem = problem.astype(np.float64)
    forward, _ = _functions(backend)
    gradients = run(backend, problem)
    random = np.random.default_rng(seed)

    def losses() -> np.ndarray:
        output, state, _ = _forward(forward, problem, training=False)
        weights = (problem.d_output, *(problem.d_state or ()))
        pairs = [(array, d) for array, d in zip((output, *state), weights, strict=False) if d is not None]
        return np.concatenate([np.zeros(1), *(np.ravel(array * d) for array, d in pairs)])

    rounding = 4 * np.finfo(float).eps * np.abs(losses()).sum()
    for name, array in _inputs(problem):
        gradient = gradients[f"d{name}"]
        if gradient.shape != array.shape or gradient.dtype != array.dtype:
            raise AssertionError(
                f"d{name} is {gradient.dtype} {gradient.shape}, expected {array.dtype} {array.shape} as {name} is"
            )
        scale = _usual_size(gradient)
        chosen = random.permutation(array.size)[:entries]
        for index in zip(*np.unravel_index(chosen, array.shape), strict=True):
            slopes = []
            for step in (1e-5, 1e-6, 1e-7):
                slopes.append(_slope(losses, array, index, step))
                allowed = 1e-6 * (abs(gradient[index]) + scale) + rounding / step
                if abs(slopes[-1] - gradient[index]) <= allowed:
                    break
            else:
                where = [int(i) for i in index]
                raise AssertionError(f"d{name}{where} is {gradient[index]}, differences of the loss give {slopes[0]}")


def _slope(losses: Callable[[], np.ndarray], array: np.ndarray, index: tuple[Any, ...], step: float) -> float:
    """Return the derivative of the sum of `losses` with respect to array[index] (is modified, and set back)."""
    value = array[index]
    high, low = value + step, value - step
    array[index] = high
    above = losses()
    array[index] = low
    below = losses()
    array[index] = value
    return float((above - below).sum() / (high - low))  # term by term: most of them have not changed


def _usual_size(array: np.ndarray) -> float:
    """Return the root of the mean square of what is finite."""
    finite = array[np.isfinite(array)].astype(float)
    largest = float(np.abs(finite).max(initial=0))
    return largest * float(np.sqrt(np.mean((finite / largest) ** 2))) if largest else 0.0


def _inputs(problem: Problem) -> Iterator[tuple[str, np.ndarray]]:
    """Everything that has a gradient, by name."""
    yield "x", problem.x
    yield from problem.params.items()
    yield from zip("hc", problem.state, strict=False)


def _functions(backend: Backend) -> tuple[Callable[..., Any], Callable[..., Any]]:
    if isinstance(backend, tuple):
        return backend
    module = backends.load(backend) if isinstance(backend, str) else backend
    return module.forward, module.backward


def _forward(forward: Callable[..., Any], problem: Problem, training: bool) -> Any:
    return forward(
        problem.cell,
        problem.x,
        problem.params,
        problem.state,
        lengths=problem.lengths,
        reset=problem.reset,
        reverse=problem.reverse,
        training=training,
    )
