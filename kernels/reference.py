"""Recurrent layers in plain NumPy, as the textbook writes them: to read, and to compare answers and speed with.

A recurrent layer walks through time. At every step it takes weighted sums of the input x and of its own previous output
h, and an elementwise formula makes the next state of them::

    sums = W_ih x[t] + b_ih + W_hh h + b_hh          (B, G·H)
    state = formula(sums, state)                     h, or h and c

The sums over x do not wait for the state: one product makes them for all steps, before the walk. Only W_hh h is left
for each step.

Backward is the chain rule, from the last step to the first (backpropagation through time: Werbos 1990,
https://doi.org/10.1109/5.58337). On the way back, ``d_state`` is the gradient of the loss with respect to the state
between two steps. At each step

1. what the loss asks of this step's output is added: ``dh += d_output[t]``;
2. the derivative of the formula takes it to the gradient of the sums, with the activations that forward has kept;
3. that times W_hh is the gradient of the previous h.

The weights are the same at every step, so their gradients are sums over all steps and rows: one product after the walk.
Nobody waits for the input's gradient either: it is one product, too.

Three things interrupt the walk; the cells know nothing of them. Beyond a row's length the step is computed with the
others, but what comes out is not taken: state and gradient pass by as they are. At a reset the state before the step is
zero, and its gradient with it. In reverse, time runs from T-1 to 0, so that a row passes its padding first and
starts at its own last step.

Letters and conventions: :mod:`fastrnn.kernels`. Everything is in the dtype of x.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np

# A product or exp that overflows gives infinity, which is right, and inf - inf is NaN: no kernel warns of either.
_quiet = np.errstate(over="ignore", invalid="ignore")


# ---- the walk


class Prepared:
    """One layer in one direction, for calls again and again."""

    def __init__(self, cell, params):
        self.cell, self.params = cell, params

    def forward(
        self, x, state, *, lengths=None, reset=None, reverse=False, training=False, recompute=False, output=None,
        column=0, recurrent_masks=None,
    ):  # fmt: skip
        """As the module's :func:`forward`."""
        return forward(
            self.cell, x, self.params, state, lengths=lengths, reset=reset, reverse=reverse, training=training,
            recompute=recompute, output=output, column=column, recurrent_masks=recurrent_masks,
        )  # fmt: skip

    def again(self, x, steps, state):
        """Nothing is kept that would make the last call shorter."""
        return None


prepare = Prepared


@_quiet
def forward(
    cell, x, params, state, *, lengths=None, reset=None, reverse=False, training=False, recompute=False, output=None,
    column=0, recurrent_masks=None,
):  # fmt: skip
    """One layer in one direction.

    Parameters
    ----------
    cell : str
        A name in `CELLS`; an "lstm" with "weight_hr" is projected.
    x : numpy.ndarray
        (T, B, I).
    params : dict of str to numpy.ndarray
        "weight_ih" (G·H, I), "weight_hh" (G·H, W), perhaps "bias_ih" and "bias_hh" (G·H,), perhaps "weight_hr" (P, H).
    state : tuple of numpy.ndarray
        (h,) or (h, c): h (B, W), c (B, H).
    lengths : numpy.ndarray, optional
        (B,) int64.
    reset : numpy.ndarray, optional
        (T, B) bool.
    reverse, training : bool
    output : numpy.ndarray, optional
        (T, B, at least column + W) (is modified in W columns).
    column : int
    recurrent_masks : numpy.ndarray, optional
        (B, W), or (G, B, W), one for each gate.

    Returns
    -------
    output : numpy.ndarray
        (T, B, W), or what was given.
    state : tuple of numpy.ndarray
    tape : Tape or None
    """
    initial = state
    T, B, _ = x.shape
    W = params["weight_hh"].shape[1]
    layer = CELLS["lstm_projected" if "weight_hr" in params else cell](params)
    if recurrent_masks is not None:
        layer.masks = np.broadcast_to(recurrent_masks, (layer.blocks, B, W))
    if output is None:
        output = np.empty((T, B, W), x.dtype)
    hs = output[:, :, column : column + W]
    valid = None if lengths is None else np.arange(T)[:, None] < lengths
    if reset is not None and valid is not None:
        reset = reset & valid

    sums = _rows(x) @ params["weight_ih"].T
    if "bias_ih" in params:
        sums += layer.bias()
    sums = sums.reshape(T, B, layer.gates)
    befores = [np.empty((T, *s.shape), x.dtype) for s in state] if training else []
    kept = np.empty((T, B, layer.keeps), x.dtype) if training else None

    for t in _walk(T, reverse):
        before = state if reset is None else _zero(state, reset[t])
        state, extra = layer.forward(sums[t], before)
        if valid is not None:
            state = _choose(valid[t], state, before)
        hs[t] = state[0]
        if training:
            for array, value in zip(befores, before, strict=True):
                array[t] = value
            if layer.keeps:
                kept[t] = extra
    if valid is not None:
        hs[~valid] = 0
    state = tuple(s.copy() for s in state)  # arrays of its own: until here a part of `sums`, or what was given
    if recompute:
        options = {"lengths": lengths, "reset": reset, "reverse": reverse, "recurrent_masks": recurrent_masks}
        again = functools.partial(forward, cell, x, params, initial, **options)
        return output, state, again
    return output, state, Tape(layer, x, sums, befores, kept, valid, reset, reverse) if training else None


class Tape(NamedTuple):
    """What backward needs of forward, for all steps, in the order of time."""

    layer: Cell
    x: np.ndarray
    gates: np.ndarray  # (T, B, G·H): what the formula has made of the sums, the gates' activations
    befores: list[np.ndarray]  # the state before each step: h (T, B, W), c (T, B, H)
    kept: np.ndarray  # (T, B, 0 or H): one thing more where the cell needs it
    valid: np.ndarray | None  # (T, B): within the row's length
    reset: np.ndarray | None  # (T, B)
    reverse: bool


@_quiet
def backward(tape, d_output, d_state):
    """Gradients of one layer in one direction.

    Parameters
    ----------
    tape : Tape or callable
        Of `forward` with training=True; with recompute=True, a call of forward that makes one.
    d_output : numpy.ndarray or None
        (T, B, W).
    d_state : tuple of (numpy.ndarray or None), or None
        Like forward's state.

    Returns
    -------
    dx : numpy.ndarray
        (T, B, I).
    dparams : dict of str to numpy.ndarray
    dstate : tuple of numpy.ndarray
    """
    if not isinstance(tape, Tape):
        _, _, tape = tape(training=True)
    layer, x, gates, befores, kept, valid, reset, reverse = tape
    T, B, _ = x.shape
    params = layer.params
    d_state = tuple(
        np.zeros(before.shape[1:], x.dtype) if given is None else given.copy()
        for given, before in zip(d_state or [None] * len(befores), befores, strict=True)
    )
    d_sums = np.empty((T, B, layer.sums), x.dtype)

    for t in reversed(_walk(T, reverse)):
        d_after = d_state if d_output is None else (d_state[0] + d_output[t], *d_state[1:])
        d_before = layer.backward(d_after, gates[t], [array[t] for array in befores], kept[t], d_sums[t])
        if reset is not None:
            d_before = _zero(d_before, reset[t])
        d_state = d_before if valid is None else _choose(valid[t], d_before, d_state)

    # What stands in the padding stays out of the sums: 0 times it need not be 0.
    d, x_rows, *saved = (_rows(array, valid) for array in (d_sums, x, gates, befores[0], kept))
    d_ih, d_hh = d[:, : layer.gates], layer.recurrent(d)
    masks = layer.masks
    if masks is not None:
        masks = [_rows(np.broadcast_to(mask, befores[0].shape), valid) for mask in masks]
    dparams = {"weight_ih": d_ih.T @ x_rows, **layer.weight_gradients(d, *saved, masks)}
    if "bias_ih" in params:
        dparams |= {"bias_ih": d_ih.sum(axis=0), "bias_hh": d_hh.sum(axis=0)}
    dx = d_ih @ params["weight_ih"]
    if valid is None:
        dx = dx.reshape(x.shape)
    else:
        dx, of_rows = np.zeros_like(x), dx
        dx[valid] = of_rows
    return dx, {name: dparams[name] for name in params}, d_state


def _walk(T, reverse):
    """The steps in the order in which they are taken."""
    return range(T - 1, -1, -1) if reverse else range(T)


def _rows(array, valid=None):
    """Steps and rows (T, B, n) in one list (N, n), of the valid ones where not all are."""
    T, B, n = array.shape
    return array.reshape(T * B, n) if valid is None else array[valid]


def _zero(state, where):
    """The state with some rows set to zero. By assignment: 0 times NaN is not 0."""
    if not where.any():
        return state
    state = tuple(s.copy() for s in state)
    for s in state:
        s[where] = 0
    return state


def _choose(where, new, old):
    """The state `new` in some rows, `old` in the others."""
    return tuple(np.where(where[:, None], a, b) for a, b in zip(new, old, strict=True))


# ---- the cells: the formula of one step, forward and back


# Gates are columns of one array. Functions of a gate return an array of their own, which is then copied into the
# columns: in-place operations on strided views are where NumPy has been wrong (np.negative(v, out=v) in 2.4.6).


def sigmoid(a):
    """1 / (1 + exp(-a)); where exp overflows, 1 / infinity is 0, as it should be."""
    y = np.negative(a)
    np.exp(y, out=y)
    y += 1
    return np.reciprocal(y, out=y)


def relu(a):
    """max(a, 0)."""
    return np.maximum(a, 0)


def d_sigmoid(y, dy):
    """dy times the derivative of the sigmoid, from the sigmoid's value y."""
    return dy * y * (1 - y)


def d_tanh(y, dy):
    """dy times the derivative of tanh, from tanh's value y."""
    return dy * (1 - y * y)


def d_relu(y, dy):
    """dy times the derivative of relu, from relu's value y. In the kink it is taken as 0."""
    return np.where(y > 0, dy, 0)


def _blocks(a, count):
    """`count` blocks of columns, one for each gate."""
    H = a.shape[1] // count
    return [a[:, k * H : (k + 1) * H] for k in range(count)]


def _times(a, W, masks):
    """a Wᵀ; or, where there are masks, the columns of each gate from a times the gate's mask."""
    if masks is None:
        return a @ W.T
    return np.concatenate([(a * m) @ block.T for m, block in zip(masks, _gates(W, masks), strict=True)], axis=1)


def _times_back(d, W, masks):
    """The gradient of a in a Wᵀ, from that of the product."""
    if masks is None:
        return d @ W
    parts = zip(masks, _gates(d.T, masks), _gates(W, masks), strict=True)
    return sum(m * (d_gate.T @ block) for m, d_gate, block in parts)


def _weight_gradient(d, a, masks):
    """The gradient of W in a Wᵀ, from that of the product."""
    if masks is None:
        return d.T @ a
    return np.concatenate([d_gate @ (a * m) for m, d_gate in zip(masks, _gates(d.T, masks), strict=True)])


def _gates(W, masks):
    """The rows of each gate that has a mask."""
    return np.split(W, len(masks))


class Cell:
    """A cell with the parameters of one layer, for whole batches.

    ``forward(sums, state)`` gets W_ih x + bias (B, G·H) and turns it into the gates' activations (is modified). Returns
    the next state, and what backward needs besides, or None.

    ``backward(d_state, gates, before, kept, d)`` gets the gradient of the state after the step and, from forward, the
    activations, the state before the step and what was kept. It fills d (B, sums) with the gradients of all sums (is
    modified): the G·H over x first, then those over h where they differ. Returns the gradient of the state before it.
    """

    blocks = 1  # G
    masks = None  # (G, B, W): factors of h where it is multiplied by W_hh, for each gate

    def __init__(self, params):
        self.params = params
        self.W_hh = params["weight_hh"]
        self.gates = len(self.W_hh)  # G·H
        self.H = self.gates // self.blocks
        self.sums = self.gates  # how many sums have a gradient
        self.keeps = 0  # size of what forward keeps

    def bias(self):
        """What is added to W_ih x before the walk."""
        return self.params["bias_ih"] + self.params["bias_hh"]

    def recurrent(self, d):
        """The gradient of W_hh h + b_hh among that of all sums."""
        return d[:, : self.gates]

    def weight_gradients(self, d, gates, h, kept, masks):
        """Gradients of the recurrent weights; all arguments have the rows of all steps. `h` is that before the step."""
        return {"weight_hh": _weight_gradient(self.recurrent(d), h, masks)}


class RNN(Cell):
    """h' = activation(W_ih x + b_ih + W_hh h + b_hh): Elman 1990, https://doi.org/10.1207/s15516709cog1402_1."""

    activation = staticmethod(np.tanh)
    derivative = staticmethod(d_tanh)

    def forward(self, sums, state):
        (h,) = state
        sums[:] = self.activation(sums + _times(h, self.W_hh, self.masks))
        return (sums,), None

    def backward(self, d_state, gates, before, kept, d):
        (dh,) = d_state
        d[:] = self.derivative(gates, dh)
        return (_times_back(d, self.W_hh, self.masks),)


class ReluRNN(RNN):
    activation = staticmethod(relu)
    derivative = staticmethod(d_relu)


class SigmoidRNN(RNN):
    activation = staticmethod(sigmoid)
    derivative = staticmethod(d_sigmoid)


class LSTM(Cell):
    """Long short-term memory: Hochreiter and Schmidhuber 1997, https://doi.org/10.1162/neco.1997.9.8.1735.

    With the forget gate of Gers, Schmidhuber and Cummins 2000, https://doi.org/10.1162/089976600300015015::

        i, f, o = sigmoid(sums);  g = tanh(sums)      input, forget and output gate; candidate
        c' = f c + i g
        h' = o tanh(c')
    """

    blocks = 4

    def __init__(self, params):
        super().__init__(params)
        self.keeps = self.H  # tanh(c')

    def forward(self, sums, state):
        h, c = state
        sums += _times(h, self.W_hh, self.masks)
        i, f, g, o = _blocks(sums, 4)
        sums[:, : 2 * self.H] = sigmoid(sums[:, : 2 * self.H])  # i and f
        g[:] = np.tanh(g)
        o[:] = sigmoid(o)
        c = f * c + i * g
        tanh_c = np.tanh(c)
        return (o * tanh_c, c), tanh_c

    def backward(self, d_state, gates, before, kept, d):
        dh, dc = d_state
        _, c = before
        tanh_c = kept
        i, f, g, o = _blocks(gates, 4)
        di, df, dg, do = _blocks(d[:, : self.gates], 4)
        dc = dc + d_tanh(tanh_c, dh * o)
        di[:] = d_sigmoid(i, dc * g)
        df[:] = d_sigmoid(f, dc * c)
        dg[:] = d_tanh(g, dc * i)
        do[:] = d_sigmoid(o, dh * tanh_c)
        return _times_back(d[:, : self.gates], self.W_hh, self.masks), dc * f


class ProjectedLSTM(LSTM):
    """LSTM whose h is projected: h' = W_hr (o tanh(c')). Sak, Senior and Beaufays 2014, arXiv 1402.1128."""

    def __init__(self, params):
        super().__init__(params)
        self.W_hr = params["weight_hr"]
        self.sums += len(self.W_hr)  # dh' behind the gates' gradients

    def forward(self, sums, state):
        (m, c), tanh_c = super().forward(sums, state)
        return (m @ self.W_hr.T, c), tanh_c

    def backward(self, d_state, gates, before, kept, d):
        dh, dc = d_state
        d[:, self.gates :] = dh
        return super().backward((dh @ self.W_hr, dc), gates, before, kept, d)

    def weight_gradients(self, d, gates, h, kept, masks):
        m = gates[:, 3 * self.H :] * kept  # o tanh(c')
        return super().weight_gradients(d, gates, h, kept, masks) | {"weight_hr": d[:, self.gates :].T @ m}


class GRU(Cell):
    """Gated recurrent unit, reset after the product: Cho et al. 2014, arXiv 1406.1078v1; cuDNN's and PyTorch's.

    ::

        r, z = sigmoid(sums)                          reset and update gate
        n = tanh(W_in x + b_in + r m)                 candidate, with m = W_hn h + b_hn
        h' = (1 - z) n + z h

    The candidate's two sums may not be added before r is known, so the gradients of the sums over x and over h differ.
    """

    blocks = 3

    def __init__(self, params):
        super().__init__(params)
        self.keeps = self.H  # m
        self.sums = 2 * self.gates

    def bias(self):
        return self.params["bias_ih"]

    def recurrent(self, d):
        return d[:, self.gates :]

    def forward(self, sums, state):
        (h,) = state
        over_h = _times(h, self.W_hh, self.masks)
        if "bias_hh" in self.params:
            over_h += self.params["bias_hh"]
        r, z, n = _blocks(sums, 3)
        m = over_h[:, 2 * self.H :]
        rz = sums[:, : 2 * self.H]
        rz[:] = sigmoid(rz + over_h[:, : 2 * self.H])
        n[:] = np.tanh(n + r * m)
        return ((1 - z) * n + z * h,), m

    def backward(self, d_state, gates, before, kept, d):
        (dh,), (h,), m = d_state, before, kept
        r, z, n = _blocks(gates, 3)
        dr, dz, dn, dr_h, dz_h, dm = _blocks(d, 6)
        dn[:] = d_tanh(n, dh * (1 - z))
        dz[:] = d_sigmoid(z, dh * (h - n))
        dr[:] = d_sigmoid(r, dn * m)
        dr_h[:], dz_h[:], dm[:] = dr, dz, dn * r
        return (dh * z + _times_back(self.recurrent(d), self.W_hh, self.masks),)


class GRUResetBefore(Cell):
    """Gated recurrent unit, reset before the product: arXiv 1406.1078v3; ONNX's default, Keras' reset_after=False.

    ::

        r, z = sigmoid(sums)
        n = tanh(W_in x + b_in + W_hn (r h) + b_hn)
        h' = (1 - z) n + z h

    Two products with the state, one after the other: the rows of W_hh for r and z, then those for n.
    """

    blocks = 3

    def __init__(self, params):
        super().__init__(params)
        self.W_rz, self.W_n = self.W_hh[: 2 * self.H], self.W_hh[2 * self.H :]

    def forward(self, sums, state):
        (h,) = state
        r, z, n = _blocks(sums, 3)
        rz = sums[:, : 2 * self.H]
        of_rz, of_n = self._split(self.masks)
        rz[:] = sigmoid(rz + _times(h, self.W_rz, of_rz))
        n[:] = np.tanh(n + _times(r * h, self.W_n, of_n))
        return ((1 - z) * n + z * h,), None

    def backward(self, d_state, gates, before, kept, d):
        (dh,), (h,) = d_state, before
        r, z, n = _blocks(gates, 3)
        dr, dz, dn = _blocks(d, 3)
        dn[:] = d_tanh(n, dh * (1 - z))
        dz[:] = d_sigmoid(z, dh * (h - n))
        of_rz, of_n = self._split(self.masks)
        drh = _times_back(dn, self.W_n, of_n)
        dr[:] = d_sigmoid(r, drh * h)
        return (dh * z + drh * r + _times_back(d[:, : 2 * self.H], self.W_rz, of_rz),)

    def weight_gradients(self, d, gates, h, kept, masks):
        of_rz, of_n = self._split(masks)
        rh = gates[:, : self.H] * h
        d_rz, d_n = d[:, : 2 * self.H], d[:, 2 * self.H :]
        return {"weight_hh": np.concatenate([_weight_gradient(d_rz, h, of_rz), _weight_gradient(d_n, rh, of_n)])}

    @staticmethod
    def _split(masks):
        """The masks of r and z, and that of n."""
        return (None, None) if masks is None else (masks[:2], masks[2:])


CELLS = {
    "rnn_tanh": RNN,
    "rnn_relu": ReluRNN,
    "rnn_sigmoid": SigmoidRNN,
    "lstm": LSTM,
    "lstm_projected": ProjectedLSTM,
    "gru": GRU,
    "gru_reset_before": GRUResetBefore,
}
