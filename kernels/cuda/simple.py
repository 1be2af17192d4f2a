"""The walk through time on a GPU, written plainly: any cell, any size, any option, in either direction.

One block of threads walks with one row of the batch; its threads share the hidden units, and a barrier parts what one
of them writes from what another reads. Nothing else is asked of the GPU. It is what larger or stranger layers fall
back to, and what the fast kernels are compared with: to be read first.

Sums are made in the order of their terms, each by one thread: the same bits every time, whatever the size of a block.

Letters: see :mod:`fastrnn.kernels`. Slots, blocks and stages: see :mod:`fastrnn.kernels.cells`. States stand in the
order of time, with one slot more than there are steps: a direction walks from slot t to t + 1, or in reverse back.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from fastrnn.kernels.cells import CELLS, TAPE_OF_C, C, H
from fastrnn.kernels.cuda.products import transpose
from fastrnn.kernels.cuda.text import Kernel, formula, load_each, store_each

THREADS = 128
# What is given; bits of an argument, as kernels can't ask a pointer.
LENGTHS, RESET, TAPE, D_OUTPUT, D_H, D_C = (1 << bit for bit in range(6))


class Size(NamedTuple):
    """The sizes of a layer and its input."""

    T: int
    B: int
    H: int
    W: int  # of h: P where there is a projection, else H
    D: int


def transposed(device, cell, size, weights):
    """The weights as `forward` reads them, neighbouring threads neighbouring numbers: [D, W, G*H], and [D, H, P].

    weights is ([D, G*H, W],), or with a projection's ([D, P, H],) behind.
    """
    shapes = (CELLS[cell].gates * size.H, size.W), (size.W, size.H)
    return tuple(transpose(device, w, size.D, *shape) for w, shape in zip(weights, shapes, strict=False))


def forward(
    device, cell, size, sums, weights, bias, initial, final, output, row, column, states, *, lengths=None, reset=None,
    tape=None, reverse=0, threads=THREADS,
):  # fmt: skip
    """Launch the walk forward, of all directions. Is modified: output, states, final, tape.

    `weights` are what `transposed` returns, the other buffers as in :mod:`fastrnn.kernels.cuda`.
    """
    dtype = sums.dtype.name
    pointer, handed = f"{dtype}*", CELLS[cell].values - 1
    # c, and what a first stage hands to the second: [D, B, values - 1, H].
    scratch = device.empty((size.D, size.B, handed, size.H), sums.dtype) if handed else None
    arguments = {
        "sums": sums, "weights": weights[0], "weights2": weights[-1], "bias": bias,
        "h0": initial[0], "c0": initial[1] if len(initial) > 1 else None, "output": output, "states": states,
        "scratch": scratch, "tape": tape, "h": final[0], "c": final[1] if len(final) > 1 else None,
    }  # fmt: skip
    flags = LENGTHS * (lengths is not None) + RESET * (reset is not None) + TAPE * (tape is not None)
    numbers = (size.T, size.B, size.H, size.W, row, column, reverse, flags)
    types = (*[pointer] * len(arguments), "int32*", "uint8*", *["int64"] * len(numbers))
    kernel = Kernel(make_forward, (cell, dtype), types, threads)
    device.launch(kernel, (size.B, 1, size.D), [*arguments.values(), lengths, reset, *numbers])


def backward(
    device, cell, size, weights, d_output, d_final, c0, states, tape, d, d_initial, *, lengths=None, reset=None,
    reverse=0, threads=THREADS,
):  # fmt: skip
    """Launch the walk backward, of all directions. Is modified: d and d_initial.

    `weights` are not transposed; c0 is the initial c, or None; the other buffers as in :mod:`fastrnn.kernels.cuda`.
    """
    dtype = tape.dtype.name
    pointer, d_final = f"{dtype}*", (*(d_final or (None,)), None)
    if len(d_initial) > 1:
        carried = d_initial[1]
    else:
        carried = device.empty((size.D, size.B, size.H), tape.dtype)
    arguments = {
        "weights": weights[0], "weights2": weights[-1], "d_output": d_output,
        "d_h": d_final[0], "d_c": d_final[1], "c0": c0, "states": states, "tape": tape, "d": d, "dh": d_initial[0],
        "carried": carried,
    }  # fmt: skip
    flags = LENGTHS * (lengths is not None) + RESET * (reset is not None) + D_OUTPUT * (d_output is not None)
    flags += D_H * (d_final[0] is not None) + D_C * (d_final[1] is not None)
    numbers = (size.T, size.B, size.H, size.W, reverse, flags)
    types = (*[pointer] * len(arguments), "int32*", "uint8*", *["int64"] * len(numbers))
    kernel = Kernel(make_backward, (cell, dtype), types, threads)
    device.launch(kernel, (size.B, 1, size.D), [*arguments.values(), lengths, reset, *numbers])


# ---- forward


class Place(NamedTuple):
    """Where this row's numbers of a step begin in their arrays."""

    sums: int
    bias: int
    before: int  # in states
    after: int
    scratch: int
    output: int
    tape: int


def make_forward(ops, cell, dtype):
    """Make the kernel of a grid (B, 1, D), any number of threads."""
    cuda, cell = ops.cuda, CELLS[cell]
    stages, values, saves, blocks = cell.stages, cell.values - 1, cell.tape, cell.gates
    slots, first_slots = sum(stage.gates for stage in stages), stages[0].gates
    first = forward_stage(ops, stages[0], dtype)
    second = forward_stage(ops, stages[1], dtype) if len(stages) > 1 else ops.device(nothing)
    operand = stages[-1].operand - 1
    projects = cell.name == "lstm_projected"
    beyond = pass_by(ops, cell, dtype)
    copy_c = copy(ops) if cell.states > 1 else ops.device(nothing)
    copy_h = copy(ops)

    def kernel(
        sums, weights, weights2, bias, h0, c0, output, states, scratch, tape, h, c, lengths, reset,
        T, B, H, W, row, column, reverse, flags,
    ):  # fmt: skip
        b, direction = cuda.blockIdx.x, cuda.blockIdx.z
        back = (reverse >> direction) & 1
        length = lengths[b] if flags & LENGTHS else T
        line = direction * B + b
        row2 = W if projects else blocks * H
        slot0 = direction * (T + 1) * B + b  # this row's slot of time 0
        at = line * values * H
        copy_h(h0, line * W, states, (slot0 + back * T * B) * W, W)
        copy_c(c0, line * H, scratch, at, H)
        cuda.syncthreads()
        for s in range(T):
            t = T - 1 - s if back else s
            number = direction * T * B + t * B + b
            place = Place(
                number * blocks * H, direction * slots * H, (slot0 + (t + back) * B) * W,
                (slot0 + (t + 1 - back) * B) * W, at, (t * B + b) * row + column + direction * W, number * saves * H,
            )  # fmt: skip
            if t < length:
                cleared = (flags & RESET) != 0 and reset[t * B + b] != 0
                first(
                    place, H, 0 if cleared else W, states, place.before, weights, direction * W * blocks * H,
                    blocks * H, cleared, sums, bias, place.bias, states, scratch, output, tape, flags, H,
                )  # fmt: skip
                second(
                    place, W, H, scratch, at + operand * H, weights2, direction * H * row2, row2, cleared, sums, bias,
                    place.bias + first_slots * H, states, scratch, output, tape, flags, H,
                )  # fmt: skip
            else:
                beyond(place, states, scratch, output, tape, flags, H, W)
                cuda.syncthreads()
        copy_h(states, (slot0 + (1 - back) * T * B) * W, h, line * W, W)
        copy_c(scratch, at, c, line * H, H)

    return kernel


def forward_stage(ops, stage, dtype):
    """A stage of one step, of the units that are this thread's, and a barrier."""
    cuda = ops.cuda
    gate_sums, function = sums_of(ops, stage, dtype), formula(ops, stage.forward, dtype)
    read, read_now = values_before(ops, stage.reads, dtype), values_before(ops, stage.reads_now, dtype)
    keep, save = keep_values(ops, stage.results), store_each(ops, stage.saves)

    def run(
        place, units, count, operand, operand_at, w, w_at, w_row, cleared, sums, bias, bias_at, states, scratch,
        output, tape, flags, H,
    ):  # fmt: skip
        for j in range(cuda.threadIdx.x, units, cuda.blockDim.x):
            gates = gate_sums(
                sums, place.sums + j, bias, bias_at + j, operand, operand_at, count, w, w_at + j, w_row, H
            )
            state = read(states, place.before + j, scratch, place.scratch + j, H, cleared)
            handed = read_now(states, place.after + j, scratch, place.scratch + j, H, False)
            new, saved = function(gates, state + handed)
            keep(states, place.after + j, output, place.output + j, scratch, place.scratch + j, H, new)
            if flags & TAPE:
                save(tape, place.tape + j, H, saved)
        cuda.syncthreads()

    return ops.device(run)


def sums_of(ops, stage, dtype):
    """A function that makes the sums of one unit's gates: W x + bias, and the product with h behind."""
    h_slots = len(stage.h_blocks)
    zeros = (np.dtype(dtype).type(0),) * h_slots
    load_x, add_product = load_each(ops, stage.x_blocks), product(ops, stage.h_blocks)
    load_bias = load_each(ops, tuple(range(stage.gates)) if stage.x_blocks else ())
    join = joined(ops, stage, 0)

    def make(sums, sums_at, bias, bias_at, operand, operand_at, count, w, w_at, w_row, H):
        total = zeros
        for k in range(count):
            total = add_product(total, operand[operand_at + k], w, w_at + k * w_row, H)
        return join(load_x(sums, sums_at, H), load_bias(bias, bias_at, H), total)

    return ops.device(make)


def product(ops, blocks):
    """A function (sums, x, w, at, stride) -> sums + x * w[at + block * stride], of each sum its own block."""
    if not blocks:
        return ops.device(lambda sums, x, w, at, stride: ())
    block, others = blocks[0], product(ops, blocks[1:])

    def add(sums, x, w, at, stride):
        return (sums[0] + x * w[at + block * stride],) + others(sums[1:], x, w, at, stride)  # noqa: RUF005

    return ops.device(add)


def joined(ops, stage, slot):
    """A function (x, bias, h) -> the sums from `slot` on: of x and bias, of h and bias, or of all three."""
    if slot == stage.gates:
        return ops.device(lambda x, bias, h: ())
    others, of_h = joined(ops, stage, slot + 1), slot - (stage.gates - len(stage.h_blocks))
    if not stage.x_blocks:
        return ops.device(lambda x, bias, h: (h[of_h],) + others(x, bias, h))  # noqa: RUF005
    if slot >= len(stage.x_blocks):
        return ops.device(lambda x, bias, h: (bias[slot] + h[of_h],) + others(x, bias, h))  # noqa: RUF005
    if of_h < 0:
        return ops.device(lambda x, bias, h: (x[slot] + bias[slot],) + others(x, bias, h))  # noqa: RUF005
    return ops.device(lambda x, bias, h: (x[slot] + bias[slot] + h[of_h],) + others(x, bias, h))  # noqa: RUF005


def values_before(ops, places, dtype):
    """A function (states, at, scratch, scratch_at, stride, cleared) -> the values at `places`, 0 where cleared."""
    if not places:
        return ops.device(lambda states, at, scratch, scratch_at, stride, cleared: ())
    zero, place, others = np.dtype(dtype).type(0), places[0] - 1, values_before(ops, places[1:], dtype)

    def with_h(states, at, scratch, scratch_at, stride, cleared):
        value = zero if cleared else states[at]
        return (value,) + others(states, at, scratch, scratch_at, stride, cleared)  # noqa: RUF005

    def with_other(states, at, scratch, scratch_at, stride, cleared):
        value = zero if cleared else scratch[scratch_at + place * stride]
        return (value,) + others(states, at, scratch, scratch_at, stride, cleared)  # noqa: RUF005

    return ops.device(with_h if places[0] == H else with_other)


def keep_values(ops, places):
    """A function that puts `values` to their places: h into states and output, the others into scratch."""
    if not places:
        return ops.device(lambda states, at, output, output_at, scratch, scratch_at, stride, values: None)
    place, others = places[0] - 1, keep_values(ops, places[1:])

    def keep_h(states, at, output, output_at, scratch, scratch_at, stride, values):
        states[at] = output[output_at] = values[0]
        others(states, at, output, output_at, scratch, scratch_at, stride, values[1:])

    def keep_other(states, at, output, output_at, scratch, scratch_at, stride, values):
        scratch[scratch_at + place * stride] = values[0]
        others(states, at, output, output_at, scratch, scratch_at, stride, values[1:])

    return ops.device(keep_h if places[0] == H else keep_other)


def pass_by(ops, cell, dtype):
    """A step beyond the row's length: its states go on as they are, its output is 0."""
    cuda, zero = ops.cuda, np.dtype(dtype).type(0)
    keeps_c = cell.states > 1
    cleared = tuple(place for place in range(cell.tape) if not keeps_c or place != TAPE_OF_C)
    clear, zeros = store_each(ops, cleared), (zero,) * len(cleared)
    keep_c = copy_one(ops) if keeps_c else ops.device(nothing)

    def run(place, states, scratch, output, tape, flags, H, W):
        for j in range(cuda.threadIdx.x, W, cuda.blockDim.x):
            states[place.after + j] = states[place.before + j]
            output[place.output + j] = zero
        if flags & TAPE:
            for j in range(cuda.threadIdx.x, H, cuda.blockDim.x):
                clear(tape, place.tape + j, H, zeros)
                keep_c(scratch, place.scratch + j, tape, place.tape + TAPE_OF_C * H + j)

    return ops.device(run)


def nothing(*_):
    """What a cell has no need of."""


def copy_one(ops):
    def copy(source, at, target, to):
        target[to] = source[at]

    return ops.device(copy)


def copy(ops):
    cuda = ops.cuda

    def run(source, at, target, to, count):
        for j in range(cuda.threadIdx.x, count, cuda.blockDim.x):
            target[to + j] = source[at + j]

    return ops.device(run)


# ---- backward


class PlaceBack(NamedTuple):
    """Where this row's numbers of a step begin in their arrays."""

    before: int  # in states
    c: int  # in c0, or in tape
    tape: int
    d: int
    carried: int


def make_backward(ops, cell, dtype):
    """Make the kernel of a grid (B, 1, D), any number of threads.

    Each thread keeps the gradients of the states of its own units; what threads wait for of each other is d alone.
    """
    cuda, cell, zero = ops.cuda, CELLS[cell], np.dtype(dtype).type(0)
    first, last = cell.stages[0], cell.stages[-1]
    projects, saves, slots, blocks = cell.name == "lstm_projected", cell.tape, cell.slots, cell.gates
    d_slot, h_blocks = first.gates - len(first.h_blocks), len(first.h_blocks)
    last_stage = backward_stage(ops, last, dtype, slots if projects else 0)
    hand_over = first_of_two(ops, cell, dtype) if last is not first else ops.device(nothing)
    row_times = row_times_matrix(ops, dtype)
    if first.carried == (H,):
        join = ops.device(lambda total, carried, at: total + carried[at])
    else:
        join = ops.device(lambda total, carried, at: total)

    def kernel(
        weights, weights2, d_output, d_h, d_c, c0, states, tape, d, dh, carried, lengths, reset,
        T, B, H, W, reverse, flags,
    ):  # fmt: skip
        b, direction = cuda.blockIdx.x, cuda.blockIdx.z
        back = (reverse >> direction) & 1
        length = lengths[b] if flags & LENGTHS else T
        line = direction * B + b
        d_row = slots * H + (W if projects else 0)
        for j in range(cuda.threadIdx.x, W, cuda.blockDim.x):
            dh[line * W + j] = d_h[line * W + j] if flags & D_H else zero
        for j in range(cuda.threadIdx.x, H, cuda.blockDim.x):
            carried[line * H + j] = d_c[line * H + j] if flags & D_C else zero
        for s in range(T - 1, -1, -1):
            t = T - 1 - s if back else s
            number = direction * T * B + t * B + b
            if t >= length:
                for j in range(cuda.threadIdx.x, d_row, cuda.blockDim.x):
                    d[number * d_row + j] = zero
                continue
            cleared = (flags & RESET) != 0 and reset[t * B + b] != 0
            begins = s == 0
            c_at = line * H if begins else ((number + (2 * back - 1) * B) * saves + TAPE_OF_C) * H
            place = PlaceBack(
                ((direction * (T + 1) + t + back) * B + b) * W, c_at, number * saves * H, number * d_row, line * H
            )
            for j in range(cuda.threadIdx.x, W, cuda.blockDim.x):
                gradient = dh[line * W + j]
                if flags & D_OUTPUT:
                    gradient = gradient + d_output[((t * B + b) * cuda.gridDim.z + direction) * W + j]
                last_stage(j, gradient, place, states, c0, tape, d, carried, begins, cleared, H)
            cuda.syncthreads()
            hand_over(place, weights2, direction, states, c0, tape, d, carried, begins, cleared, H, W)
            for j in range(cuda.threadIdx.x, W, cuda.blockDim.x):
                at = direction * blocks * H * W + j
                total = row_times(d, place.d + d_slot * H, weights, at, W, h_blocks * H)
                dh[line * W + j] = zero if cleared else join(total, carried, place.carried + j)

    return kernel


def backward_stage(ops, stage, dtype, column):
    """A stage of one step for one unit: from the gradient of its first result to those of its gates, in d.

    d's slots stand from `column` units on.
    """
    function, load_saved = formula(ops, stage.backward, dtype), load_each(ops, stage.saved)
    previous, store_d = state_before(ops, stage, dtype), store_each(ops, stage.dgates)
    one = tuple(range(len(stage.carried)))
    load_carried, store_carried, zeros = (
        load_each(ops, one),
        store_each(ops, one),
        (np.dtype(dtype).type(0),) * len(one),
    )

    def run(j, gradient, place, states, c0, tape, d, carried, begins, cleared, H):
        saved = load_saved(tape, place.tape + j, H)
        state = previous(states, c0, tape, place, j, begins, cleared)
        dgates, new = function(gradient, load_carried(carried, place.carried + j, 0), saved, state)
        store_d(d, place.d + column * H + j, H, dgates)
        store_carried(carried, place.carried + j, 0, zeros if cleared else new)

    return ops.device(run)


def state_before(ops, stage, dtype):
    """A function that loads what the stage's backward reads of the state before the step: h, c or nothing."""
    zero = np.dtype(dtype).type(0)

    def h(states, c0, tape, place, j, begins, cleared):
        return (zero if cleared else states[place.before + j],)

    def c(states, c0, tape, place, j, begins, cleared):
        if cleared:
            return (zero,)
        return (c0[place.c + j] if begins else tape[place.c + j],)

    def none(states, c0, tape, place, j, begins, cleared):
        return ()

    return ops.device({(H,): h, (C,): c, (): none}[stage.state])


def first_of_two(ops, cell, dtype):
    """The first stage of a step of a cell of two, behind the second: it gets what the second's product gives back."""
    cuda = ops.cuda
    stage, second = cell.stages
    run_stage, row_times = backward_stage(ops, stage, dtype, 0), row_times_matrix(ops, dtype)
    projects, blocks, block = cell.name == "lstm_projected", cell.gates, second.h_blocks[0]
    column = cell.slots if projects else stage.gates

    def run(place, weights, direction, states, c0, tape, d, carried, begins, cleared, H, W):
        at = direction * H * W if projects else (direction * blocks + block) * H * W
        for j in range(cuda.threadIdx.x, H, cuda.blockDim.x):
            gradient = row_times(d, place.d + column * H, weights, at + j, H, W)
            run_stage(j, gradient, place, states, c0, tape, d, carried, begins, cleared, H)
        cuda.syncthreads()

    return ops.device(run)


def row_times_matrix(ops, dtype):
    """A function (d, d_at, w, w_at, stride, count) -> the sum over k of d[d_at + k] * w[w_at + k * stride]."""
    zero = np.dtype(dtype).type(0)

    def run(d, d_at, w, w_at, stride, count):
        total = zero
        for k in range(count):
            total = total + d[d_at + k] * w[w_at + k * stride]
        return total

    return ops.device(run)
