"""One layer on a GPU, its directions in one launch: what surrounds the walk through time, and the choice of the walk.

There are three: the simple one (any GPU, any cell), one of a product and a kernel for each step (weights of any size),
and the persistent one (weights in registers). They take the same arguments and agree in what they leave for backward.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from fastrnn.kernels.cells import CELLS
from fastrnn.kernels.cuda import parameters, persistent, simple, steps
from fastrnn.kernels.cuda.plan import choose
from fastrnn.kernels.cuda.products import before
from fastrnn.kernels.cuda.simple import Size


class Layer(NamedTuple):
    """What stays the same from call to call. Buffers are on the device."""

    device: Any
    cell: str  # of CELLS: a projected LSTM has a name of its own
    params: tuple[dict, ...]  # PyTorch's, one dict for each direction
    mode: str = "float32"  # how the products of a walk are made: see exchange.MODES
    way: str | None = None  # "simple", "steps" or "persistent"; None: the fastest
    kept: dict | None = None  # what is made of the parameters, where these stay as they are


class Options(NamedTuple):
    """Of a call. Buffers are on the device."""

    lengths: Any = None  # (B,) int32
    reset: Any = None  # (T, B) bytes
    reverse: int = 0  # a bit for each direction


def name_of(cell, params):
    """The cell's name in CELLS."""
    return "lstm_projected" if "weight_hr" in params else cell


def options_of(device, lengths, reset, reverse):
    """Options with `lengths` and `reset`, NumPy arrays or None, on the device."""
    return Options(
        None if lengths is None else device.upload(lengths.astype(np.int32)),
        None if reset is None else device.upload(reset.astype(np.uint8)),
        reverse,
    )


class Tape(NamedTuple):
    """What backward needs of forward."""

    layer: Layer
    size: Size
    plan: Any
    x: Any
    initial: tuple
    options: Options
    weights: tuple  # of all directions, one behind the other: W_hh and perhaps W_hr
    states: Any  # None: backward computes them again
    tape: Any


def forward(layer, x, initial, options, *, training=False, recompute=False):
    """Run the layer.

    x is (T, B, I), the initial states (D, B, .), where D may be left out if it is 1. Returns the output (T, B, D W),
    the final states and a Tape or None.
    """
    device, cell = layer.device, CELLS[layer.cell]
    (T, B, I), (columns, W), D = x.shape, layer.params[0]["weight_hh"].shape, len(layer.params)
    H = columns // cell.gates
    size = Size(T, B, H, W, D)
    output = device.empty((T, B, D * W), x.dtype)
    final = tuple(device.empty(state.shape, state.dtype) for state in initial)
    weights = _kept(layer, "weights", lambda: _weights(layer, D))
    plan = states = tape = None
    if T and B:
        plan = choose(device, layer, size, x.dtype.name)
        weights_ih = [given["weight_ih"] for given in layer.params]
        sums = parameters.sums_of_x(device, layer.cell, size, x, I, weights_ih, layer.mode)
        bias = _kept(layer, "bias", lambda: parameters.bias_of_slots(device, layer.cell, size, layer.params))
        if (training and not recompute) or plan.way != "persistent":
            states = device.empty((D, T + 1, B, W), x.dtype)
        if training and not recompute:
            tape = device.empty((D, T, B, cell.tape, H), x.dtype)
        _walk(
            layer, plan, size, sums, weights, bias, initial, final, output, D * W, 0, states,
            lengths=options.lengths, reset=options.reset, tape=tape, reverse=options.reverse,
        )  # fmt: skip
    else:
        for ended, begun in zip(final, initial, strict=True):
            if begun.size:
                device.copy(ended, begun)
    if not training:
        return output, final, None
    states = None if recompute else states
    return output, final, Tape(layer, size, plan, x, initial, options, weights, states, tape)


def backward(tape, d_output, d_final):
    """Gradients: dx, a dict of the parameters' for each direction, and those of the initial states.

    d_output is (T, B, D W) or None, d_final like the states, or None for all or for some of them.
    """
    layer, size, plan, x, initial, options, weights, states, kept = tape
    device, cell = layer.device, CELLS[layer.cell]
    d_initial = tuple(device.empty(state.shape, state.dtype) for state in initial)
    if not (size.T and size.B):
        return _nothing(tape, d_final, d_initial)
    if states is None:
        *_, again = forward(layer, x, initial, options, training=True)
        states, kept = again.states, again.tape
    d = device.empty((size.D, size.T, size.B, parameters.d_row(cell, size)), x.dtype)
    _walk_back(
        plan, device, layer.cell, size, weights, d_output, d_final, initial[1] if len(initial) > 1 else None, states,
        kept, d, d_initial, lengths=options.lengths, reset=options.reset, reverse=options.reverse,
    )  # fmt: skip
    h_before = before(device, size, states, options.reset, options.reverse)
    I = x.shape[2]
    dx, dparams = parameters.gradients(device, layer.cell, size, x, I, layer.params, d, h_before, kept, layer.mode)
    return dx, dparams, d_initial


def _walk(layer, plan, size, sums, weights, *arguments, **options):
    device, cell = layer.device, layer.cell
    if plan.way == "persistent":
        persistent.forward(device, plan, cell, size, sums, weights, *arguments, **options)
    elif plan.way == "steps":
        steps.forward(device, cell, size, sums, weights, *arguments, mode=plan.mode, **options)
    else:
        weights = _kept(layer, "transposed", lambda: simple.transposed(device, cell, size, weights))
        simple.forward(device, cell, size, sums, weights, *arguments, **options)


def _walk_back(plan, device, *arguments, **options):
    if plan.way == "persistent":
        persistent.backward(device, plan, *arguments, **options)
    elif plan.way == "steps":
        steps.backward(device, *arguments, mode=plan.mode, **options)
    else:
        simple.backward(device, *arguments, **options)


def _kept(layer, name, make):
    """What `make` makes of the parameters, once for layers that keep it."""
    if layer.kept is None:
        return make()
    if name not in layer.kept:
        layer.kept[name] = make()
    return layer.kept[name]


def _weights(layer, D):
    """W_hh, and W_hr of a projection, of all directions: where there is one, as they stand."""
    names = [name for name in ("weight_hh", "weight_hr") if name in layer.params[0]]
    return tuple(_stacked(layer.device, [given[name] for given in layer.params], D) for name in names)


def _stacked(device, buffers, D):
    if D == 1:
        return buffers[0]
    whole = device.empty((D, *buffers[0].shape), buffers[0].dtype)
    for direction, buffer in enumerate(buffers):
        device.copy(whole.at(direction * buffer.size), buffer)
    return whole


def _nothing(tape, d_final, d_initial):
    """The gradients where there were no steps, or no rows."""
    device = tape.layer.device
    dx = device.empty(tape.x.shape, tape.x.dtype)
    dparams = [
        {name: device.empty(given.shape, given.dtype) for name, given in params.items()} for params in tape.layer.params
    ]
    for buffer in (gradient for made in dparams for gradient in made.values()):
        device.fill(buffer, 0)
    for made, given in zip(d_initial, d_final or (None,) * len(d_initial), strict=True):
        if made.size and given is not None:
            device.copy(made, given)
        elif made.size:
            device.fill(made, 0)
    return dx, dparams, d_initial
