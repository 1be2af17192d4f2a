"""The cells: the gate equations, forward and backward, each written once.

A cell is the maths of hidden units for one time step: numbers in, numbers out, no loops and no arrays. The functions
run as they stand on Python numbers, and compile to the CPU's vectors (:mod:`fastrnn.kernels.simd`) and to other
targets.

The sums that enter a gate, W_ih x + b_ih + W_hh h + b_hh, are made before the cell is called: a cell gets them as
``gates``. Most cells are one :class:`Stage`: a product with the previous h, then the gates. Two need a second product
within the step and are two stages.

Forward, ``stage.forward(gates, state) -> results, saved``: `state` holds what the formula reads of the previous step,
`saved` what its backward needs. Derivatives are written in terms of the activations, which are saved, so that
sums are never needed again.

Backward, ``stage.backward(dh, carried, saved, state) -> dgates, carried``: `dh` is the gradient of the stage's first
result; `carried` is what reaches a state by itself and not through the gates: LSTM's c, and of GRU's h the part z h,
which the walk has added to dh by the time of the step before.

Names: i, f, g, o are LSTM's input, forget, candidate and output gates; r, z, n GRU's reset, update and candidate
gates, m its recurrent candidate W_hn h + b_hn; d + name is a gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

# ---- activations and their derivatives. Each target may bring its own sigmoid, tanh and relu, and its own ONE: where
# a number's type is strict, as on a GPU, a plain 1 would make all that it meets a double.

ONE = 1
FORMULAS: list[Callable] = []  # what a compiler is to know, by whoever brings one


def formula(function):
    """One of `FORMULAS`."""
    FORMULAS.append(function)
    return function


def sigmoid(x):
    """1 / (1 + exp(-x)), without overflow."""
    e = math.exp(-abs(x))
    return (e if x < 0 else 1.0) / (1.0 + e)


def tanh(x):
    """(exp(x) - exp(-x)) / (exp(x) + exp(-x))."""
    return math.tanh(x)


def relu(x):
    """max(x, 0)."""
    return 0.0 if x < 0 else x


@formula
def d_sigmoid(y):
    """Derivative of the sigmoid, from its value y."""
    return y - y * y


@formula
def d_tanh(y):
    """Derivative of tanh, from its value y."""
    return ONE - y * y


def d_relu(y, dy):
    """dy where relu's value y is above 0, else 0."""
    return dy if y > 0 else 0.0


# ---- simple recurrent net (Elman 1990): h' = activation(a)


@formula
def rnn_tanh(gates, state):
    """h' = tanh(a)."""
    h = tanh(gates[0])
    return (h,), (h,)


@formula
def rnn_tanh_backward(dh, carried, saved, state):
    return (dh * d_tanh(saved[0]),), ()


@formula
def rnn_relu(gates, state):
    """h' = max(a, 0)."""
    h = relu(gates[0])
    return (h,), (h,)


@formula
def rnn_relu_backward(dh, carried, saved, state):
    return (d_relu(saved[0], dh),), ()


@formula
def rnn_sigmoid(gates, state):
    """h' = 1 / (1 + exp(-a))."""
    h = sigmoid(gates[0])
    return (h,), (h,)


@formula
def rnn_sigmoid_backward(dh, carried, saved, state):
    return (dh * d_sigmoid(saved[0]),), ()


# ---- long short-term memory (Hochreiter and Schmidhuber 1997; forget gate: Gers, Schmidhuber and Cummins 2000)


@formula
def lstm(gates, state):
    """c' = sigmoid(f) c + sigmoid(i) tanh(g);  h' = sigmoid(o) tanh(c')."""
    i, f, g, o = gates
    (c,) = state
    i, f, g, o = sigmoid(i), sigmoid(f), tanh(g), sigmoid(o)
    c = f * c + i * g
    return (o * tanh(c), c), (i, f, g, o, c)


@formula
def lstm_backward(dh, carried, saved, state):
    i, f, g, o, c = saved
    (c_previous,) = state
    (dc,) = carried
    tanh_c = tanh(c)
    dc = dc + dh * o * d_tanh(tanh_c)
    di = dc * g * d_sigmoid(i)
    df = dc * c_previous * d_sigmoid(f)
    dg = dc * i * d_tanh(g)
    do = dh * tanh_c * d_sigmoid(o)
    return (di, df, dg, do), (dc * f,)


# With a projection (Sak, Senior and Beaufays 2014) what LSTM calls h is the input of a second product: h' = W_hr h.


@formula
def lstm_before_projection(gates, state):
    results, saved = lstm(gates, state)
    return results, saved + (results[0],)  # noqa: RUF005 - Numba joins tuples by + alone


@formula
def lstm_before_projection_backward(dh, carried, saved, state):
    i, f, g, o, c, _ = saved
    return lstm_backward(dh, carried, (i, f, g, o, c), state)


@formula
def projection(gates, state):
    """h' = a."""
    return (gates[0],), ()


@formula
def projection_backward(dh, carried, saved, state):
    return (dh,), ()


# ---- gated recurrent unit, reset after the product: arXiv 1406.1078v1, and what cuDNN and PyTorch compute


@formula
def gru(gates, state):
    """n' = tanh(n + sigmoid(r) m);  h' = (1 - z) n' + z h, with z = sigmoid(z)."""
    n, r, z, m = gates
    (h,) = state
    r, z = sigmoid(r), sigmoid(z)
    n = tanh(n + r * m)
    return (n + z * (h - n),), (n, r, z, m)


@formula
def gru_backward(dh, carried, saved, state):
    n, r, z, m = saved
    (h,) = state
    dn = dh * (ONE - z) * d_tanh(n)
    dz = dh * (h - n) * d_sigmoid(z)
    dr = dn * m * d_sigmoid(r)
    return (dn, dr, dz, dn * r), (dh * z,)


# ---- gated recurrent unit, reset before the product: arXiv 1406.1078v3, ONNX's default, Keras' reset_after=False


@formula
def gru_reset(gates, state):
    """First stage: r = sigmoid(r), z = sigmoid(z); r h goes into the candidate's product."""
    r, z = gates
    (h,) = state
    r, z = sigmoid(r), sigmoid(z)
    return (r * h, z), (r, z, r * h)


@formula
def gru_update(gates, state):
    """Second stage: n = tanh(n);  h' = (1 - z) n + z h."""
    n = tanh(gates[0])
    h, z = state
    return (n + z * (h - n),), (n,)


@formula
def gru_update_backward(dh, carried, saved, state):
    _, z, _, n = saved
    (h,) = state
    dz = dh * (h - n) * d_sigmoid(z)
    dn = dh * (ONE - z) * d_tanh(n)
    return (dz, dn), (dh * z,)


@formula
def gru_reset_backward(drh, carried, saved, state):
    r, _, _, _ = saved
    (h,) = state
    return (drh * h * d_sigmoid(r),), (carried[0] + drh * r,)


# ---- the table of cells

H, C = 0, 1  # the states' numbers; values that a first stage hands to the second come after them
TAPE_OF_C = 4  # where LSTM's c stands in its tape


class Stage(NamedTuple):
    """One product and the gates that follow it.

    The sums that enter the gates stand in `gates` slots: those from x fill the first slots, those from h the last
    ones. Where both fall into one slot they are added; GRU's n and m, which may not be, are the first and the last.
    Gate blocks are numbered as in PyTorch's weights.
    """

    name: str
    forward: Callable
    backward: Callable
    gates: int
    x_blocks: tuple[int, ...]  # blocks of weight_ih, in the order of the first slots
    h_blocks: tuple[int, ...]  # blocks of weight_hh (or weight_hr), in the order of the last slots
    operand: int = H  # what is multiplied by h_blocks: the previous h, or a value of the stage before
    reads: tuple[int, ...] = ()  # states of the previous step that `forward` takes,
    reads_now: tuple[int, ...] = ()  # and behind them values of this step's stage before
    results: tuple[int, ...] = (H,)  # the states and values that `forward` returns
    saves: tuple[int, ...] = ()  # places in the tape of what `forward` saves
    saved: tuple[int, ...] = ()  # places in the tape of what `backward` takes
    state: tuple[int, ...] = ()  # states of the previous step that `backward` takes
    carried: tuple[int, ...] = ()  # the state whose gradient also goes back by itself
    dgates: tuple[int, ...] = (0,)  # slots of the gate gradients that `backward` returns


class Cell(NamedTuple):
    """A recurrent cell: its stages, and the sizes that follow from them."""

    name: str
    stages: tuple[Stage, ...]
    states: int  # 1: h; 2: h and c
    values: int  # states, and values that are handed between stages
    gates: int  # gate blocks of weight_ih
    slots: int  # slots of gate gradients
    tape: int  # numbers saved for each unit and step


def _rnn(name, forward, backward):
    stage = Stage(name, forward, backward, gates=1, x_blocks=(0,), h_blocks=(0,), saves=(0,), saved=(0,))
    return Cell(name, (stage,), states=1, values=1, gates=1, slots=1, tape=1)


_IFGO = (0, 1, 2, 3)

LSTM = Cell(
    "lstm",
    stages=(
        Stage(
            "lstm", lstm, lstm_backward, gates=4, x_blocks=_IFGO, h_blocks=_IFGO, reads=(C,), results=(H, C),
            saves=(0, 1, 2, 3, 4), saved=(0, 1, 2, 3, 4), state=(C,), carried=(C,), dgates=_IFGO,
        ),
    ),
    states=2, values=2, gates=4, slots=4, tape=5,
)  # fmt: skip

LSTM_PROJECTED = Cell(
    "lstm_projected",
    stages=(
        Stage(
            "lstm_before_projection", lstm_before_projection, lstm_before_projection_backward,
            gates=4, x_blocks=_IFGO, h_blocks=_IFGO, reads=(C,), results=(2, C),
            saves=(0, 1, 2, 3, 4, 5), saved=(0, 1, 2, 3, 4, 5), state=(C,), carried=(C,), dgates=_IFGO,
        ),
        Stage("projection", projection, projection_backward, gates=1, x_blocks=(), h_blocks=(0,), operand=2),
    ),
    states=2, values=3, gates=4, slots=4, tape=6,
)  # fmt: skip

GRU = Cell(
    "gru",
    stages=(
        Stage(
            "gru", gru, gru_backward, gates=4, x_blocks=(2, 0, 1), h_blocks=(0, 1, 2), reads=(H,),
            saves=(0, 1, 2, 3), saved=(0, 1, 2, 3), state=(H,), carried=(H,), dgates=(0, 1, 2, 3),
        ),
    ),
    states=1, values=1, gates=3, slots=4, tape=4,
)  # fmt: skip

GRU_RESET_BEFORE = Cell(
    "gru_reset_before",
    stages=(
        Stage(
            "gru_reset", gru_reset, gru_reset_backward, gates=2, x_blocks=(0, 1), h_blocks=(0, 1), reads=(H,),
            results=(1, 2), saves=(0, 1, 2), saved=(0, 1, 2, 3), state=(H,), carried=(H,), dgates=(0,),
        ),
        Stage(
            "gru_update", gru_update, gru_update_backward, gates=1, x_blocks=(2,), h_blocks=(2,), operand=1,
            reads=(H,), reads_now=(2,), saves=(3,), saved=(0, 1, 2, 3), state=(H,), carried=(H,), dgates=(1, 2),
        ),
    ),
    states=1, values=3, gates=3, slots=3, tape=4,
)  # fmt: skip

CELLS = {
    cell.name: cell
    for cell in (
        _rnn("rnn_tanh", rnn_tanh, rnn_tanh_backward),
        _rnn("rnn_relu", rnn_relu, rnn_relu_backward),
        _rnn("rnn_sigmoid", rnn_sigmoid, rnn_sigmoid_backward),
        LSTM,
        LSTM_PROJECTED,
        GRU,
        GRU_RESET_BEFORE,
    )
}
