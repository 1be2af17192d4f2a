"""What of a layer does not wait for the walk through time: large products before it, and the gradients after it.

Slots and blocks: see :mod:`fastrnn.kernels.cells`. `d` are the gradients of all gates, [D, T, B, d_row], slot behind
slot; parameters and their gradients have PyTorch's blocks.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from fastrnn.kernels.cells import CELLS
from fastrnn.kernels.cuda.products import Matrix, column_sums, multiply
from fastrnn.kernels.cuda.text import Kernel

THREADS = 128
RESET_H, HIDDEN = 2, 5  # where r h of "gru_reset_before" and h before the projection stand in the tape


class Run(NamedTuple):
    """Neighbouring slots that are neighbouring blocks as well."""

    slot: int
    block: int
    count: int


def runs(first, blocks):
    """The slots from `first` on, which are those `blocks`, as few runs."""
    found = []
    for slot, block in enumerate(blocks, first):
        if found and block == found[-1].block + found[-1].count:
            found[-1] = found[-1]._replace(count=found[-1].count + 1)
        else:
            found.append(Run(slot, block, 1))
    return found


def x_runs(cell):
    """Of the gradients that go to x."""
    return runs(0, cell.stages[0].x_blocks if len(cell.stages) == 1 else range(cell.gates))


def h_runs(cell):
    """Of those that go to h, or to what is multiplied in its place: pairs of a run and a place in the tape, or None."""
    if cell.name == "gru_reset_before":
        return [(Run(0, 0, 2), None), (Run(2, 2, 1), RESET_H)]
    first = cell.stages[0]
    return [(run, None) for run in runs(first.gates - len(first.h_blocks), first.h_blocks)]


def d_row(cell, size):
    """Gradients of a row and step: those of the slots, and of the projection behind them."""
    return cell.slots * size.H + (size.W if cell.name == "lstm_projected" else 0)


# ---- before the walk


def sums_of_x(device, cell, size, x, I, weights, mode):
    """W_ih x for all steps: [D, T, B, G*H]. `weights` has one W_ih for each direction."""
    rows, columns = size.T * size.B, CELLS[cell].gates * size.H
    sums = device.empty((size.D, size.T, size.B, columns), x.dtype)
    for direction, w in enumerate(weights):
        c = Matrix(sums, direction * rows * columns, rows, columns, columns)
        multiply(device, Matrix(x, 0, rows, I, I), Matrix(w, 0, columns, I, I).T, c, mode=mode)
    return sums


def bias_of_slots(device, cell, size, params):
    """What is added to each slot's sum, [D, S, H]: b_ih, b_hh, or both; 0 without a bias."""
    slots = sum(stage.gates for stage in CELLS[cell].stages)
    bias = device.empty((size.D, slots, size.H), params[0]["weight_hh"].dtype)
    if "bias_ih" not in params[0]:
        device.fill(bias, 0)
        return bias
    dtype = bias.dtype.name
    kernel = Kernel(make_bias, (cell, dtype), (f"{dtype}*",) * 3 + ("int64", "int64"), THREADS)
    for direction, given in enumerate(params):
        arguments = [given["bias_ih"], given["bias_hh"], bias, direction * slots * size.H, size.H]
        device.launch(kernel, (-(-size.H // THREADS), 1, 1), arguments)
    return bias


def make_bias(ops, cell, dtype):
    """Make the kernel of a grid (H / threads, 1, 1)."""
    cuda, zero = ops.cuda, np.dtype(dtype).type(0)
    each = in_slots(ops, [pair for stage in CELLS[cell].stages for pair in blocks_of_slots(stage)], zero)

    def kernel(bias_ih, bias_hh, bias, start, H):
        j = cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x
        if j < H:
            each(bias_ih, bias_hh, bias, j, start + j, H)

    return kernel


def blocks_of_slots(stage):
    """(block of x or None, block of h or None) for each slot of a stage; a projection has no bias."""
    if not stage.x_blocks:
        return [(None, None)] * stage.gates
    of_x = [*stage.x_blocks, *[None] * (stage.gates - len(stage.x_blocks))]
    of_h = [*[None] * (stage.gates - len(stage.h_blocks)), *stage.h_blocks]
    return list(zip(of_x, of_h, strict=True))


def in_slots(ops, slots, zero):
    """A function (bias_ih, bias_hh, bias, j, at, H) that fills the slots from `at` on."""
    if not slots:
        return ops.device(lambda bias_ih, bias_hh, bias, j, at, H: None)
    (x, h), others = slots[0], in_slots(ops, slots[1:], zero)
    has_x, has_h, x, h = x is not None, h is not None, x or 0, h or 0

    def fill(bias_ih, bias_hh, bias, j, at, H):
        total = zero
        if has_x:
            total = bias_ih[x * H + j]
        if has_h:
            total = total + bias_hh[h * H + j]
        bias[at] = total
        others(bias_ih, bias_hh, bias, j, at + H, H)

    return ops.device(fill)


# ---- after the walk


def gradients(device, cell, size, x, I, params, d, before, tape, mode):
    """Return dx, and a dict of the parameters' gradients for each direction.

    `before` has a Matrix (T*B, W) for each direction: h before each step.
    """
    dx = device.empty((size.T, size.B, I), d.dtype)
    dparams = [
        _gradients(device, CELLS[cell], size, x, I, given, d, before[direction], tape, dx, direction, mode)
        for direction, given in enumerate(params)
    ]
    return dx, dparams


def _gradients(device, cell, size, x, I, params, d, before, tape, dx, direction, mode):
    """Of one direction; dx is modified: what comes from this direction is added."""
    rows, H, W, row = size.T * size.B, size.H, size.W, d_row(cell, size)

    def of_gates(slot, columns):
        return Matrix(d, direction * rows * row + slot * H, rows, columns, row)

    def of_tape(place):
        return Matrix(tape, (direction * rows * cell.tape + place) * H, rows, H, cell.tape * H)

    made = {name: device.empty(given.shape, given.dtype) for name, given in params.items()}
    add = direction > 0
    for run in x_runs(cell):
        gates = of_gates(run.slot, run.count * H)
        start = run.block * H
        weights = Matrix(params["weight_ih"], start * I, gates.columns, I, I)
        multiply(device, gates, weights, Matrix(dx, 0, rows, I, I), add=add, mode=mode)
        multiply(device, gates.T, Matrix(x, 0, rows, I, I), weights._replace(buffer=made["weight_ih"]), mode=mode)
        if "bias_ih" in made:
            column_sums(device, gates, made["bias_ih"], start)
        add = True
    for run, place in h_runs(cell):
        gates = of_gates(run.slot, run.count * H)
        start, operand = run.block * H, before if place is None else of_tape(place)
        multiply(device, gates.T, operand, Matrix(made["weight_hh"], start * W, gates.columns, W, W), mode=mode)
        if "bias_hh" in made:
            column_sums(device, gates, made["bias_hh"], start)
    if "weight_hr" in made:
        weights = Matrix(made["weight_hr"], 0, W, H, H)
        multiply(device, of_gates(cell.slots, W).T, of_tape(HIDDEN), weights, mode=mode)
    return made
