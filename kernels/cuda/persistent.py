"""The persistent walk on a GPU: one launch for a whole sequence, with the recurrent weights in registers.

A block has some hidden units of the layer, for some rows of the batch, and keeps their weights through all steps: the
weights are read once. What a step needs of all units, h, goes through the second-level cache, where it is its own flag
(:mod:`fastrnn.kernels.cuda.exchange`). So a step has one barrier, inside a block, and takes as long as a store needs to
become visible, not as long as a launch or a barrier of the grid.

Within a block the sum over k is split over warps, and made by tensor cores (:mod:`fastrnn.kernels.cuda.fragments`);
the parts meet in shared memory and are added in a fixed order, so that results are the same bits every time. Then each
(unit, row) has a thread, which holds its state and applies the cell's formula.

Backward is the same walk the other way round: what is exchanged are the gradients of the gates, and a block has the
columns of W_hh for its units.

Weights in registers: Diamos et al. 2016, "Persistent RNNs: stashing recurrent weights on-chip".
"""

from __future__ import annotations

from typing import NamedTuple

from fastrnn.kernels.cells import C, H
from fastrnn.kernels.cuda.exchange import publisher, vector_of
from fastrnn.kernels.cuda.fragments import CHUNK, weights_in_a, weights_in_b
from fastrnn.kernels.cuda.text import STAGES, Kernel, formula, load_each, store_each

C_PLACE = 4  # where LSTM's c stands in its tape

# Which of the arrays are there, in the argument `given`.
LENGTHS, RESET, D_OUTPUT, D_H, D_C = 1, 2, 4, 8, 16


class Shape(NamedTuple):
    """What a kernel is compiled for."""

    stage: str
    mode: str
    hidden: int
    units: int  # of a block
    warps: int  # of a block, among which the sum over k is split
    tile: int  # rows of the batch in a tile: 8; or 16, on the way back
    items: int  # (unit, row) pairs of a thread
    tape: int = 0  # numbers of a unit and step in the tape; 0: there is none


def forward_vector(shape):
    return vector_of(shape.mode, shape.hidden, shape.warps)


def backward_vector(shape):
    return vector_of(shape.mode, shape.hidden * len(STAGES[shape.stage].h_blocks), shape.warps)


def forward_shared(shape, tiles):
    """Bytes of shared memory: each warp's part of the sums, twice, so that one barrier a step is enough."""
    return 2 * 4 * shape.warps * tiles * _row_tiles(shape) * 16 * shape.tile


def backward_shared(shape, tiles):
    return 2 * 4 * shape.warps * tiles * shape.tile * shape.units


def forward_kept(shape):
    """Words of weights in a thread."""
    return 8 * forward_vector(shape).groups * _row_tiles(shape)


def backward_kept(shape):
    return 4 * backward_vector(shape).groups * (shape.units // 8)


def _row_tiles(shape):
    """Tiles of 16 rows of weights: a block's units for one gate after the other."""
    return -(-len(STAGES[shape.stage].h_blocks) * shape.units // 16)


def _flags(ops):
    """Functions (array, given, ...) that tell whether a row is active at time t, and whether it is reset there."""

    def is_active(lengths, given, t, b):
        return given & LENGTHS == 0 or t < lengths[b]

    def is_reset(reset, given, at):
        return given & RESET != 0 and reset[at] != 0

    return ops.device(is_active), ops.device(is_reset)


def forward(
    device, plan, cell, size, sums, weights, bias, initial, final, output, row, column, states, *, lengths=None,
    reset=None, tape=None, reverse=0,
):  # fmt: skip
    """Launch the walk forward, of all directions. Is modified: output, states, final, tape.

    `plan` is of :mod:`fastrnn.kernels.cuda.plan`, the other buffers as :func:`fastrnn.kernels.cuda.simple.forward` has
    them; but weights are not transposed.
    """
    layout, T, B, D = plan.forward, size.T, size.B, size.D
    shape = layout.shape._replace(tape=layout.shape.tape if tape is not None else 0)
    exchange = device.empty((D, T + 1, B, forward_vector(shape).words), "uint32")
    device.fill(exchange, 0xFF)
    c, c_n = (initial[1], final[1]) if len(initial) > 1 else (None, None)
    given = LENGTHS * (lengths is not None) + RESET * (reset is not None)
    arguments = [weights[0], bias, sums, initial[0], c, lengths, reset, exchange, output, states, tape, final[0], c_n]
    arguments += [device.status, T, B, layout.tiles, given, reverse, row, column]
    shared = forward_shared(shape, layout.tiles)
    device.launch(forward_kernel(shape), layout.grid(D), arguments, shared=shared, cooperative=True)


def backward(
    device, plan, cell, size, weights, d_output, d_final, c0, states, tape, d, d_initial, *, lengths=None, reset=None,
    reverse=0,
):  # fmt: skip
    """Launch the walk back, of all directions. Is modified: d and d_initial."""
    layout, T, B, D = plan.backward, size.T, size.B, size.D
    shape = layout.shape
    exchange = device.empty((D, T, B, backward_vector(shape).words), "uint32")
    device.fill(exchange, 0xFF)
    d_h, d_c, *_ = (*(d_final or ()), None, None)
    given = LENGTHS * (lengths is not None) + RESET * (reset is not None) + D_OUTPUT * (d_output is not None)
    given += D_H * (d_h is not None) + D_C * (d_c is not None)
    dc0 = d_initial[1] if len(d_initial) > 1 else None
    arguments = [weights[0], lengths, reset, exchange, d_output, d_h, d_c, states, tape, c0, d, d_initial[0], dc0]
    arguments += [device.status, T, B, layout.tiles, given, reverse, D]
    shared = backward_shared(shape, layout.tiles)
    device.launch(backward_kernel(shape), layout.grid(D), arguments, shared=shared, cooperative=True)


# ---- forward

FORWARD = (
    "float32*", "float32*", "float32*", "float32*", "float32*", "int32*", "uint8*", "uint32*", "float32*", "float32*",
    "float32*", "float32*", "float32*", "int32*", "int32", "int32", "int32", "int32", "int32", "int32", "int32",
)  # fmt: skip


def forward_kernel(shape):
    return Kernel(make_forward, (shape,), FORWARD, 32 * shape.warps)


def make_forward(ops, shape):
    """Text of the walk forward. The grid: blocks of units, groups of rows, directions."""
    stage, cuda, number = STAGES[shape.stage], ops.cuda, ops.float32
    hidden, units, warps, tile = shape.hidden, shape.units, shape.warps, shape.tile
    threads, items, taped = 32 * warps, shape.items, shape.tape
    slots, x_slots, h_slots = stage.gates, len(stage.x_blocks), len(stage.h_blocks)
    vector, row_tiles = forward_vector(shape), _row_tiles(shape)
    rows, blocks = 16 * row_tiles, len(set(stage.x_blocks))
    is_active, is_reset = _flags(ops)
    publish = publisher(ops, shape.mode, vector)
    step = formula(ops, stage.forward, "float32")
    load_sums, store_sums = load_each(ops, stage.x_blocks), store_each(ops, tuple(range(x_slots)))
    load_gates, load_state = load_each(ops, tuple(range(slots))), load_each(ops, stage.reads)
    store_state, store_tape = store_each(ops, stage.results), store_each(ops, stage.saves)
    has_c = C in stage.results

    def weight(weights, unit0, row, k):
        """W_hh for a row of the block's tiles: gate row // units, unit row % units."""
        unit = unit0 + row % units
        if row < h_slots * units and unit < hidden:
            return weights[(row // units * hidden + unit) * hidden + k]
        return number(0)

    kept, load, multiply = weights_in_a(ops, shape.mode, vector, row_tiles, ops.device(weight))
    word, some_words, some_sums, states_of_items, sums_of_items = (
        ops.uint32, 4 * CHUNK, 4 * row_tiles, 2 * items, x_slots * items,
    )  # fmt: skip

    def kernel(
        weight_hh, bias, sums, h0, c0, lengths, reset, exchange, output, states, tape, h_n, c_n, status, T, B, tiles,
        given, reverse, row, column,
    ):  # fmt: skip
        w, words = cuda.local.array(kept, word), cuda.local.array(some_words, word)
        acc, gates = cuda.local.array(some_sums, number), cuda.local.array(slots, number)
        state, of_x = cuda.local.array(states_of_items, number), cuda.local.array(sums_of_items, number)
        biases = cuda.local.array(slots, number)
        parts = cuda.shared.array(0, number)
        thread, z = cuda.threadIdx.x, cuda.blockIdx.z
        warp, g, q = thread // 32, thread % 32 // 4, thread % 4
        unit0, row0 = cuda.blockIdx.x * units, cuda.blockIdx.y * tile * tiles
        backwards, first = reverse >> z & 1, warp * vector.groups * 16
        weight_hh, bias = ops.at(weight_hh, z * h_slots * hidden * hidden), ops.at(bias, z * slots * hidden)
        sums, tape = ops.at(sums, z * T * B * blocks * hidden), ops.at(tape, z * T * B * taped * hidden)
        states = ops.at(states, z * (T + 1) * B * hidden)
        exchange = ops.at(exchange, z * (T + 1) * B * vector.words)
        h0, c0 = ops.at(h0, z * B * hidden), ops.at(c0, z * B * hidden)
        h_n, c_n = ops.at(h_n, z * B * hidden), ops.at(c_n, z * B * hidden)
        column += z * hidden
        load(w, weight_hh, unit0, first)
        unit = unit0 + thread % units
        for e in range(slots):
            biases[e] = bias[e * hidden + unit] if unit < hidden else number(0)
        for i in range(items):
            r = (thread + i * threads) // units
            b = row0 + r
            if r < tile * tiles and b < B and unit < hidden:
                state[2 * i] = h0[b * hidden + unit]
                state[2 * i + 1] = c0[b * hidden + unit] if has_c else number(0)
                publish(exchange, b * vector.words, unit, state[2 * i])
                if taped:
                    states[(backwards * T * B + b) * hidden + unit] = state[2 * i]
        for s in range(T):
            t = T - 1 - s if backwards else s
            for i in range(items):  # what does not wait for the others
                r = (thread + i * threads) // units
                if r < tile * tiles and row0 + r < B and unit < hidden:
                    at = (t * B + row0 + r) * blocks * hidden + unit
                    store_sums(of_x, i * x_slots, 1, load_sums(sums, at, hidden))
            half = s % 2 * warps * tiles * rows * tile
            for n in range(tiles):
                for e in range(4 * row_tiles):
                    acc[e] = number(0)
                b = row0 + n * tile + g
                here = b < B and is_active(lengths, given, t, b) and not is_reset(reset, given, t * B + b)
                multiply(acc, w, words, exchange, (s * B + b) * vector.words, first, here, status)
                at = half + ((warp * tiles + n) * rows + g) * tile + 2 * q
                for e in range(row_tiles):
                    parts[at + 16 * e * tile], parts[at + 16 * e * tile + 1] = acc[4 * e], acc[4 * e + 1]
                    parts[at + (16 * e + 8) * tile] = acc[4 * e + 2]
                    parts[at + (16 * e + 8) * tile + 1] = acc[4 * e + 3]
            cuda.syncthreads()
            for i in range(items):
                r = (thread + i * threads) // units
                b = row0 + r
                if r < tile * tiles and b < B and unit < hidden:
                    at_x = t * B + b
                    active = is_active(lengths, given, t, b)
                    if active:
                        if is_reset(reset, given, at_x):
                            state[2 * i], state[2 * i + 1] = number(0), number(0)
                        for e in range(slots):
                            gates[e] = biases[e]
                        for e in range(x_slots):
                            gates[e] += of_x[i * x_slots + e]
                        for e in range(h_slots):
                            at = half + (r // tile * rows + e * units + thread % units) * tile + r % tile
                            total = number(0)
                            for k in range(warps):
                                total += parts[at + k * tiles * rows * tile]
                            gates[slots - h_slots + e] += total
                        new, saved = step(load_gates(gates, 0, 1), load_state(state, 2 * i, 1))
                        store_state(state, 2 * i, 1, new)
                        if taped:
                            store_tape(tape, at_x * taped * hidden + unit, hidden, saved)
                    elif taped and has_c:
                        tape[(at_x * taped + C_PLACE) * hidden + unit] = state[2 * i + 1]
                    publish(exchange, ((s + 1) * B + b) * vector.words, unit, state[2 * i])
                    output[at_x * row + column + unit] = state[2 * i] if active else number(0)
                    if taped:
                        states[((t + 1 - backwards) * B + b) * hidden + unit] = state[2 * i]
        for i in range(items):
            r = (thread + i * threads) // units
            b = row0 + r
            if r < tile * tiles and b < B and unit < hidden:
                h_n[b * hidden + unit] = state[2 * i]
                if has_c:
                    c_n[b * hidden + unit] = state[2 * i + 1]

    return kernel


# ---- backward

BACKWARD = (
    "float32*", "int32*", "uint8*", "uint32*", "float32*", "float32*", "float32*", "float32*", "float32*", "float32*",
    "float32*", "float32*", "float32*", "int32*", "int32", "int32", "int32", "int32", "int32", "int32",
)  # fmt: skip


def backward_kernel(shape):
    return Kernel(make_backward, (shape,), BACKWARD, 32 * shape.warps)


def make_backward(ops, shape):
    """Text of the walk back. The grid: blocks of units, groups of rows, directions."""
    stage, cuda, number = STAGES[shape.stage], ops.cuda, ops.float32
    hidden, units, warps, tile = shape.hidden, shape.units, shape.warps, shape.tile
    threads, items, taped = 32 * warps, shape.items, shape.tape
    d_slots, h_slots = len(stage.dgates), len(stage.h_blocks)
    vector, unit_tiles = backward_vector(shape), units // 8
    is_active, is_reset = _flags(ops)
    publish = publisher(ops, shape.mode, vector)
    step = formula(ops, stage.backward, "float32")
    load_saved, store_d = load_each(ops, stage.saved), store_each(ops, stage.dgates)
    saves = tuple(range(len(stage.saved)))
    keep, load_kept = store_each(ops, saves), load_each(ops, saves)
    each_d, load_d = store_each(ops, tuple(range(d_slots))), d_slots - h_slots
    only = (0,) * len(stage.carried)
    load_carried, store_carried = load_each(ops, only), store_each(ops, only)
    load_before = load_each(ops, (0,) * len(stage.state))
    has_c, carries_h, reads_h = C in stage.carried, H in stage.carried, H in stage.state

    def weight(weights, unit0, column, k):
        """W_hh for a unit of the block; k goes through the gates of a unit, one unit after the other."""
        unit = unit0 + column
        if unit < hidden:
            return weights[(k % h_slots * hidden + k // h_slots) * hidden + unit]
        return number(0)

    kept, load, multiply = weights_in_b(ops, shape.mode, vector, unit_tiles, ops.device(weight), tile)
    saved_count = len(saves)
    word, some_words, some_sums, saved_of_items = ops.uint32, 8 * CHUNK, 4 * unit_tiles, saved_count * items

    def kernel(
        weight_hh, lengths, reset, exchange, d_output, dh_n, dc_n, states, tape, c0, d, dh0, dc0, status, T, B, tiles,
        given, reverse, directions,
    ):  # fmt: skip
        w, words = cuda.local.array(kept, word), cuda.local.array(some_words, word)
        acc, dgates = cuda.local.array(some_sums, number), cuda.local.array(d_slots, number)
        dh, carried = cuda.local.array(items, number), cuda.local.array(items, number)
        saved, before = cuda.local.array(saved_of_items, number), cuda.local.array(items, number)
        asked = cuda.local.array(items, number)
        parts = cuda.shared.array(0, number)
        thread, z = cuda.threadIdx.x, cuda.blockIdx.z
        warp, g, q = thread // 32, thread % 32 // 4, thread % 4
        unit0, row0 = cuda.blockIdx.x * units, cuda.blockIdx.y * tile * tiles
        backwards, first = reverse >> z & 1, warp * vector.groups * 16
        weight_hh = ops.at(weight_hh, z * h_slots * hidden * hidden)
        exchange, d = ops.at(exchange, z * T * B * vector.words), ops.at(d, z * T * B * d_slots * hidden)
        states, tape = ops.at(states, z * (T + 1) * B * hidden), ops.at(tape, z * T * B * taped * hidden)
        dh_n, dc_n, c0 = ops.at(dh_n, z * B * hidden), ops.at(dc_n, z * B * hidden), ops.at(c0, z * B * hidden)
        dh0, dc0 = ops.at(dh0, z * B * hidden), ops.at(dc0, z * B * hidden)
        load(w, weight_hh, unit0, first)
        unit = unit0 + thread % units
        for i in range(items):
            r = (thread + i * threads) // units
            at = (row0 + r) * hidden + unit
            there = r < tile * tiles and row0 + r < B and unit < hidden
            dh[i] = dh_n[at] if there and given & D_H else number(0)
            carried[i] = dc_n[at] if there and given & D_C else number(0)
        for i_step in range(T + 1):
            t = i_step if backwards else T - 1 - i_step  # whose gates' gradients are made, but at the last
            later = t - 1 if backwards else t + 1
            for i in range(items):  # what does not wait for the others
                r = (thread + i * threads) // units
                b = row0 + r
                if i_step < T and r < tile * tiles and b < B and unit < hidden and is_active(lengths, given, t, b):
                    at = t * B + b
                    keep(saved, i * saved_count, 1, load_saved(tape, at * taped * hidden + unit, hidden))
                    asked[i] = number(0)
                    if given & D_OUTPUT:
                        asked[i] = d_output[(at * directions + z) * hidden + unit]
                    earlier = t + 1 if backwards else t - 1
                    if is_reset(reset, given, at):
                        before[i] = number(0)
                    elif reads_h:
                        before[i] = states[((t + backwards) * B + b) * hidden + unit]
                    elif not has_c:
                        before[i] = number(0)
                    elif earlier < 0 or earlier == T:
                        before[i] = c0[b * hidden + unit]
                    else:
                        before[i] = tape[((earlier * B + b) * taped + C_PLACE) * hidden + unit]
            half = i_step % 2 * warps * tiles * tile * units
            if i_step > 0:
                for n in range(tiles):
                    for e in range(4 * unit_tiles):
                        acc[e] = number(0)
                    b = row0 + n * tile + g
                    here = b < B and is_active(lengths, given, later, b) and not is_reset(reset, given, later * B + b)
                    here8 = (
                        tile == 16
                        and b + 8 < B
                        and is_active(lengths, given, later, b + 8)
                        and not is_reset(reset, given, later * B + b + 8)
                    )
                    at = (later * B + b) * vector.words
                    multiply(acc, w, words, exchange, at, at + 8 * vector.words, first, here, here8, status)
                    at = half + ((warp * tiles + n) * tile + g) * units + 2 * q
                    for e in range(unit_tiles):
                        parts[at + 8 * e], parts[at + 8 * e + 1] = acc[4 * e], acc[4 * e + 1]
                        if tile == 16:
                            parts[at + 8 * units + 8 * e] = acc[4 * e + 2]
                            parts[at + 8 * units + 8 * e + 1] = acc[4 * e + 3]
            cuda.syncthreads()
            for i in range(items):
                r = (thread + i * threads) // units
                b = row0 + r
                if r < tile * tiles and b < B and unit < hidden:
                    if i_step > 0 and is_active(lengths, given, later, b):
                        if is_reset(reset, given, later * B + b):
                            dh[i], carried[i] = number(0), number(0)
                        else:
                            dh[i] = carried[i] if carries_h else number(0)
                            for k in range(warps):
                                dh[i] += parts[half + k * tiles * tile * units + r * units + thread % units]
                    if i_step == T:
                        dh0[b * hidden + unit] = dh[i]
                        if has_c:
                            dc0[b * hidden + unit] = carried[i]
                    else:
                        at = t * B + b
                        if is_active(lengths, given, t, b):
                            made, back = step(
                                dh[i] + asked[i], load_carried(carried, i, 1), load_kept(saved, i * saved_count, 1),
                                load_before(before, i, 1),
                            )  # fmt: skip
                            store_carried(carried, i, 1, back)
                            each_d(dgates, 0, 1, made)
                            for e in range(h_slots):
                                publish(exchange, at * vector.words, unit * h_slots + e, dgates[load_d + e])
                            store_d(d, at * d_slots * hidden + unit, hidden, made)
                        else:
                            for e in range(d_slots):
                                d[(at * d_slots + e) * hidden + unit] = number(0)

    return kernel
