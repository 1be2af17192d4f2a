"""ONNX' operators RNN, LSTM and GRU with all attributes, in plain NumPy: what the compiled kernels do not have.

Other activations than each operator's own, clipping of what goes into them, peepholes, and the LSTM's input gate
coupled to the forget gate. One loop over time for one layer in one direction, in the operator's own order of gates.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


def _sigmoid(x, a, b):
    return 1 / (1 + np.exp(-x))


def _softplus(x, a, b):
    return np.logaddexp(x, 0)


def _elu(x, a, b):
    return np.where(x >= 0, x, a * np.expm1(np.minimum(x, 0)))


NEEDED = float("nan")  # a number for which ONNX knows no default

# By ONNX' name: the function of x, alpha and beta, and the defaults of those of the two that it has.
ACTIVATIONS = {
    "Affine": (lambda x, a, b: a * x + b, NEEDED, NEEDED),
    "Elu": (_elu, 1.0, None),
    "HardSigmoid": (lambda x, a, b: np.clip(a * x + b, 0, 1), 0.2, 0.5),
    "LeakyRelu": (lambda x, a, b: np.where(x >= 0, x, a * x), 0.01, None),
    "Relu": (lambda x, a, b: np.maximum(x, 0), None, None),
    "ScaledTanh": (lambda x, a, b: a * np.tanh(b * x), NEEDED, NEEDED),
    "Sigmoid": (_sigmoid, None, None),
    "Softplus": (_softplus, None, None),
    "Softsign": (lambda x, a, b: x / (1 + np.abs(x)), None, None),
    "Tanh": (lambda x, a, b: np.tanh(x), None, None),
    "ThresholdedRelu": (lambda x, a, b: np.where(x >= a, x, 0), 1.0, None),
}


class Activation(NamedTuple):
    """One of `ACTIVATIONS` with its numbers."""

    name: str
    alpha: float | None = None
    beta: float | None = None

    def __call__(self, x):
        # Python's floats leave x its dtype.
        return ACTIVATIONS[self.name][0](x, self.alpha, self.beta)


class Direction(NamedTuple):
    """What one direction of an operator computes, all but its input and states."""

    op_type: str  # "RNN", "LSTM" or "GRU"
    W: np.ndarray  # (G·H, I)
    R: np.ndarray  # (G·H, H)
    Wb: np.ndarray  # (G·H,)
    Rb: np.ndarray
    P: np.ndarray | None  # (3·H,): the peepholes of i, o and f
    activations: tuple  # of Activation: f; f, g, h; f, g
    clip: float | None
    input_forget: bool
    linear_before_reset: bool

    def clipped(self, x):
        """What goes into an activation."""
        return x if self.clip is None else np.clip(x, -self.clip, self.clip)


@np.errstate(over="ignore", invalid="ignore")  # infinity where exp overflows, as the other kernels
def forward(direction, x, state, *, lengths=None, reverse=False):
    """One layer in one direction.

    Parameters
    ----------
    direction : Direction
    x : numpy.ndarray
        (T, B, I).
    state : tuple of numpy.ndarray
        (h,) or (h, c), each (B, H).
    lengths : numpy.ndarray, optional
        (B,) int64: beyond them the output is 0 and the state stays.
    reverse : bool

    Returns
    -------
    output : numpy.ndarray
        (T, B, H).
    state : tuple of numpy.ndarray
    """
    T, B, I = x.shape
    step, H = _STEPS[direction.op_type], state[0].shape[1]
    sums = (x.reshape(T * B, I) @ direction.W.T + direction.Wb).reshape(T, B, len(direction.W))
    output = np.empty((T, B, H), x.dtype)
    for t in range(T - 1, -1, -1) if reverse else range(T):
        new = step(direction, sums[t], *state)
        if lengths is None:
            state, output[t] = new, new[0]
        else:
            valid = (t < lengths)[:, None]
            state = tuple(np.where(valid, after, before) for after, before in zip(new, state, strict=True))
            output[t] = np.where(valid, new[0], 0)
    return output, tuple(array.copy() for array in state)


def _rnn(direction, sums, h):
    (f,) = direction.activations
    return (f(direction.clipped(sums + h @ direction.R.T + direction.Rb)),)


def _lstm(direction, sums, h, c):
    f, g, activate_c = direction.activations
    i, o, forget, new = np.split(sums + h @ direction.R.T + direction.Rb, 4, axis=1)
    p_i, p_o, p_f = (0, 0, 0) if direction.P is None else np.split(direction.P, 3)
    i = f(direction.clipped(i + p_i * c))
    forget = 1 - i if direction.input_forget else f(direction.clipped(forget + p_f * c))
    c = forget * c + i * g(direction.clipped(new))
    return f(direction.clipped(o + p_o * c)) * activate_c(c), c  # the output's peephole sees the new c


def _gru(direction, sums, h):
    f, g = direction.activations
    H = h.shape[1]
    R, Rb = direction.R, direction.Rb
    z, r = np.split(f(direction.clipped(sums[:, : 2 * H] + h @ R[: 2 * H].T + Rb[: 2 * H])), 2, axis=1)
    if direction.linear_before_reset:
        recurrent = r * (h @ R[2 * H :].T + Rb[2 * H :])
    else:
        recurrent = (r * h) @ R[2 * H :].T + Rb[2 * H :]
    return ((1 - z) * g(direction.clipped(sums[:, 2 * H :] + recurrent)) + z * h,)


_STEPS = {"RNN": _rnn, "LSTM": _lstm, "GRU": _gru}
