"""The walk through time on a GPU, step by step: for layers whose weights do not fit on the chip.

A step is a product of the states with the recurrent weights and a kernel that applies the cell's formula; a cell of two
stages has two of each. The weights are read again at every step, which is what takes the time, so the product is that
of a library where there is one. A sequence's launches are recorded once, and launched all at once from then on: see
:meth:`fastrnn.kernels.cuda.device.Device.graph`.

A product takes the states as they stand, without the resets: of rows that were reset, or that have ended, it is the
kernel behind it that leaves out the result. So no step needs a copy of its states.

In a kernel each (row, unit) has a thread. Sums are made in a fixed order, if the library does so, and nobody waits for
anybody within a launch. Buffers and arguments are those of :mod:`fastrnn.kernels.cuda.simple`.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np

from fastrnn.kernels.cells import CELLS, TAPE_OF_C, C, H
from fastrnn.kernels.cuda.products import Matrix, multiply
from fastrnn.kernels.cuda.simple import (
    D_OUTPUT,
    LENGTHS,
    RESET,
    TAPE,
    PlaceBack,
    backward_stage,
    copy_one,
    joined,
    keep_values,
    nothing,
    values_before,
)
from fastrnn.kernels.cuda.text import Kernel, formula, load_each, store_each

THREADS = 128


class Product(NamedTuple):
    """A stage's product with the recurrent weights, of all directions."""

    weights: Any
    start: int
    each: int  # numbers of a direction
    rows: int  # results
    columns: int  # of the operand
    units: int  # of the stage
    column: int  # where its gates' gradients begin in a row of d

    def matrix(self, direction):
        return Matrix(self.weights, self.start + direction * self.each, self.rows, self.columns, self.columns)


def products_of(cell, size, weights):
    """The product of each stage; its blocks stand one behind the other in PyTorch's weights."""
    H, W, slots, products = size.H, size.W, 0, []
    for stage in CELLS[cell].stages:
        count, slots = len(stage.h_blocks), slots + stage.gates
        if projects(cell, stage):
            products.append(Product(weights[1], 0, W * H, W, H, W, CELLS[cell].slots * H))
        else:
            start, each = stage.h_blocks[0] * H * W, CELLS[cell].gates * H * W
            products.append(Product(weights[0], start, each, count * H, W, H, (slots - count) * H))
    return products


def projects(cell, stage):
    return cell == "lstm_projected" and stage is CELLS[cell].stages[-1]


def forward(
    device, cell, size, sums, weights, bias, initial, final, output, row, column, states, *, lengths=None, reset=None,
    tape=None, reverse=0, threads=THREADS, mode="float32",
):  # fmt: skip
    """Launch the walk forward, of all directions. Is modified: output, states, final, tape.

    `weights` are PyTorch's, not transposed: ([D, G*H, W],), or with a projection's ([D, P, H],) behind. `mode`: see
    :func:`fastrnn.kernels.cuda.products.multiply`.
    """
    T, B, H, W, D = size
    products, handed = products_of(cell, size, weights), CELLS[cell].values - 1
    made = [device.empty((D, B, product.rows), sums.dtype) for product in products]
    # c, and what a first stage hands to the second.
    scratch = device.empty((D, handed, B, H), sums.dtype) if handed else None
    flags = LENGTHS * (lengths is not None) + RESET * (reset is not None) + TAPE * (tape is not None)
    buffers, numbers = [sums, bias, output, states, scratch, tape], (T, B, H, W, row, column, reverse, flags)
    # Where h and c stand during the walk: numbers to copy, those of a direction, and from where in reverse.
    places = (states, B * W, (T + 1) * B * W, T * B * W), (scratch, B * H, handed * B * H, 0)
    launch = functools.partial(_launch, device, sums.dtype.name, D, threads)

    def record():
        for begun, (during, count, each, end) in zip(initial, places, strict=False):
            launch(make_copy, (), count, [begun, during], (), count, count, 0, each, end, reverse)
        for s in range(T):
            for i, (stage, product) in enumerate(zip(CELLS[cell].stages, products, strict=True)):
                for d in range(D):
                    before = T - s if reverse >> d & 1 else s
                    operand = Matrix(states, (d * (T + 1) + before) * B * W, B, W, W)
                    if stage.operand:
                        operand = Matrix(scratch, (d * handed + stage.operand - 1) * B * H, B, H, H)
                    w = product.matrix(d)
                    c = Matrix(made[i], d * B * w.rows, B, w.rows, w.rows)
                    multiply(device, operand, w.T, c, mode=mode)
                step = [made[i], *buffers], (lengths, reset), s, *numbers
                launch(make_forward, (cell, i), B * product.units, *step)
        for ended, (during, count, each, end) in zip(final, places, strict=False):
            launch(make_copy, (), count, [during, ended], (), count, each, end, count, 0, ~reverse)

    every = [*made, *buffers, *weights, *initial, *final, lengths, reset]
    device.graph(("steps, forward", cell, sums.dtype.name, mode, D, threads, numbers, *map(_pointer, every)), record)


def backward(
    device, cell, size, weights, d_output, d_final, c0, states, tape, d, d_initial, *, lengths=None, reset=None,
    reverse=0, threads=THREADS, mode="float32",
):  # fmt: skip
    """Launch the walk backward, of all directions. Is modified: d and d_initial."""
    T, B, H, W, D = size
    products, d_row = products_of(cell, size, weights), d.shape[-1]
    # The gradient of what a first stage hands to the second.
    middle = device.empty((D, B, H), tape.dtype) if len(products) > 1 else None
    flags = LENGTHS * (lengths is not None) + RESET * (reset is not None) + D_OUTPUT * (d_output is not None)
    buffers = [d_output, middle, c0, states, tape, d, d_initial[0], d_initial[-1]]
    numbers, d_final = (T, B, H, W, d_row, reverse, flags), d_final or (None,) * len(d_initial)
    launch = functools.partial(_launch, device, tape.dtype.name, D, threads)

    def record():
        for target, given in zip(d_initial, d_final, strict=True):
            if given is None:
                device.fill(target, 0)
            else:
                device.copy(target, given)
        for s in reversed(range(T)):
            for i, product in reversed(list(enumerate(products))):
                launch(make_backward, (cell, i), B * product.units, buffers, (lengths, reset), s, *numbers)
                for z in range(D):
                    t = T - 1 - s if reverse >> z & 1 else s
                    gates = Matrix(d, (z * T + t) * B * d_row + product.column, B, product.rows, d_row)
                    # The gradient of h is what has gone back by itself, and this.
                    w, target = product.matrix(z), middle if i else d_initial[0]
                    c = Matrix(target, z * B * w.columns, B, w.columns, w.columns)
                    multiply(device, gates, w, c, add=i == 0, mode=mode)
        if reset is not None and T:
            launch(make_first_reset, (), B * W, [d_initial[0]], (lengths, reset), T, B, W, reverse, flags)

    every = [*buffers, *weights, *d_final, lengths, reset]
    device.graph(("steps, backward", cell, tape.dtype.name, mode, D, threads, numbers, *map(_pointer, every)), record)


def _pointer(buffer):
    return None if buffer is None else buffer.pointer


def _launch(device, dtype, D, threads, make, constants, items, buffers, options, *numbers):
    """Launch a kernel with a thread for each of `items` of each direction. Options: lengths and reset, or none."""
    types = (*[f"{dtype}*"] * len(buffers), *("int32*", "uint8*")[: len(options)], *["int64"] * len(numbers))
    kernel = Kernel(make, (*constants, dtype), types, threads)
    device.launch(kernel, (-(-items // threads), 1, D), [*buffers, *options, *numbers])


def make_copy(ops, dtype):
    """Make the kernel that copies `count` numbers of each direction, to or from what the bits of at_end say."""
    cuda = ops.cuda

    def kernel(source, target, count, source_each, source_end, target_each, target_end, at_end):
        i, z = cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x, cuda.blockIdx.z
        end = (at_end >> z) & 1
        if i < count:
            target[z * target_each + end * target_end + i] = source[z * source_each + end * source_end + i]

    return kernel


# ---- forward


def make_forward(ops, cell, number, dtype):
    """Make the kernel of one stage of one step, of a grid (rows * units / threads, 1, D)."""
    cuda, zero, stage = ops.cuda, np.dtype(dtype).type(0), CELLS[cell].stages[number]
    stages, values, saves, blocks = CELLS[cell].stages, CELLS[cell].values - 1, CELLS[cell].tape, CELLS[cell].gates
    slots, first_slot = sum(one.gates for one in stages), sum(one.gates for one in stages[:number])
    h_slots, is_projection = len(stage.h_blocks), projects(cell, stage)
    function, join = formula(ops, stage.forward, dtype), joined(ops, stage, 0)
    load_x, load_h = load_each(ops, stage.x_blocks), load_each(ops, tuple(range(h_slots)))
    load_bias = load_each(ops, tuple(range(stage.gates)) if stage.x_blocks else ())
    none, of_states = (zero,) * h_slots, stage.operand == H
    read, read_now = values_before(ops, stage.reads, dtype), values_before(ops, stage.reads_now, dtype)
    keep, save = keep_values(ops, stage.results), store_each(ops, stage.saves)
    pass_by = beyond(ops, cell, stage, dtype)

    def kernel(
        made, sums, bias, output, states, scratch, tape, lengths, reset,
        s, T, B, H, W, row, column, reverse, flags,
    ):  # fmt: skip
        i, z = cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x, cuda.blockIdx.z
        units = W if is_projection else H
        if i >= B * units:
            return
        b, j = i // units, i % units
        back = (reverse >> z) & 1
        t = T - 1 - s if back else s
        line, place = z * B + b, (z * T + t) * B + b
        before = ((z * (T + 1) + t + back) * B + b) * W + j
        after = before + (1 - 2 * back) * B * W
        at, each = (z * values * B + b) * H + j, B * H  # in scratch
        out, saved_at = (t * B + b) * row + column + z * W + j, place * saves * H + j
        if flags & LENGTHS and t >= lengths[b]:
            pass_by(states, before, after, output, out, scratch, at, tape, saved_at, H, flags & TAPE != 0)
            return
        cleared = (flags & RESET) != 0 and reset[t * B + b] != 0
        of_h = none if cleared and of_states else load_h(made, line * h_slots * units + j, units)
        of_x = load_x(sums, place * blocks * H + j, H)
        gates = join(of_x, load_bias(bias, (z * slots + first_slot) * H + j, H), of_h)
        state = read(states, before, scratch, at, each, cleared)
        new, saved = function(gates, state + read_now(states, after, scratch, at, each, False))
        keep(states, after, output, out, scratch, at, each, new)
        if flags & TAPE:
            save(tape, saved_at, H, saved)

    return kernel


def beyond(ops, cell, stage, dtype):
    """A step beyond a row's length: its states go on as they are; 0 in output and in what else is saved."""
    zero, gives_h, keeps_c = np.dtype(dtype).type(0), H in stage.results, CELLS[cell].states > 1 and C in stage.results
    cleared = tuple(place for place in stage.saves if not keeps_c or place != TAPE_OF_C)
    clear, zeros = store_each(ops, cleared), (zero,) * len(cleared)
    keep_c = copy_one(ops) if keeps_c else ops.device(nothing)

    def run(states, before, after, output, out, scratch, at, tape, saved_at, H, taped):
        if gives_h:
            states[after] = states[before]
            output[out] = zero
        if taped:
            clear(tape, saved_at, H, zeros)
            keep_c(scratch, at, tape, saved_at + TAPE_OF_C * H)

    return ops.device(run)


# ---- backward


def make_backward(ops, cell, number, dtype):
    """Make the kernel of one stage of one step, of a grid (rows * units / threads, 1, D).

    The gradient of h before the step becomes what goes back by itself; the product that follows adds the rest.
    """
    cuda, zero, stage = ops.cuda, np.dtype(dtype).type(0), CELLS[cell].stages[number]
    saves, slots, is_last = CELLS[cell].tape, CELLS[cell].slots, stage is CELLS[cell].stages[-1]
    is_projection = projects(cell, stage)
    first_slot = slots if is_projection else 0
    run = backward_stage(ops, stage, dtype, first_slot)
    clear, zeros = store_each(ops, stage.dgates), (zero,) * len(stage.dgates)
    carries_h, is_reset = stage.carried == (H,), reset_of(ops)

    def kernel(
        d_output, middle, c0, states, tape, d, dh, dc, lengths, reset,
        s, T, B, H, W, d_row, reverse, flags,
    ):  # fmt: skip
        i, z = cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x, cuda.blockIdx.z
        units = W if is_projection else H
        if i >= B * units:
            return
        b, j = i // units, i % units
        back = (reverse >> z) & 1
        t = T - 1 - s if back else s
        later, line, place = t + 1 - 2 * back, z * B + b, (z * T + t) * B + b
        active = (flags & LENGTHS) == 0 or t < lengths[b]
        if is_last:
            gradient = dh[line * W + j]
            if flags & RESET and s + 1 < T and is_reset(lengths, reset, flags, b, later, B):
                gradient = zero
            dh[line * W + j] = zero if active else gradient
            if flags & D_OUTPUT:
                gradient = gradient + d_output[((t * B + b) * cuda.gridDim.z + z) * W + j]
        else:
            gradient = middle[line * H + j]
        if not active:
            clear(d, place * d_row + first_slot * H + j, H, zeros)
            return
        cleared = (flags & RESET) != 0 and reset[t * B + b] != 0
        c_at = line * H if s == 0 else ((place + (2 * back - 1) * B) * saves + TAPE_OF_C) * H
        at = PlaceBack(((z * (T + 1) + t + back) * B + b) * W, c_at, place * saves * H, place * d_row, line * H)
        run(j, gradient, at, states, c0, tape, d, dh if carries_h else dc, s == 0, cleared, H)

    return kernel


def reset_of(ops):
    """A function that tells whether a row's state was 0 before an active step."""

    def run(lengths, reset, flags, b, t, B):
        return reset[t * B + b] != 0 and ((flags & LENGTHS) == 0 or t < lengths[b])

    return ops.device(run)


def make_first_reset(ops, dtype):
    """Make the kernel of a grid (rows * W / threads, 1, D): rows reset before their first step send nothing back."""
    cuda, zero, is_reset = ops.cuda, np.dtype(dtype).type(0), reset_of(ops)

    def kernel(dh, lengths, reset, T, B, W, reverse, flags):
        i, z = cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x, cuda.blockIdx.z
        b = i // W
        t = T - 1 if (reverse >> z) & 1 else 0
        if b < B and is_reset(lengths, reset, flags, b, t, B):
            dh[z * B * W + i] = zero

    return kernel
