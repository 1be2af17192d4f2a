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

from fastrnn.kernels.cells import TAPE_OF_C, C, H
from fastrnn.kernels.cuda.exchange import LOOKS, publisher, vector_of
from fastrnn.kernels.cuda.fragments import CHUNK, weights_in_a, weights_in_b
from fastrnn.kernels.cuda.simple import D_C, D_H, D_OUTPUT, LENGTHS, RESET
from fastrnn.kernels.cuda.text import STAGES, Kernel, formula, load_each, store_each


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


def forward_registers(shape):
    """Numbers that a thread has through a step: weights, sums, words of vectors, and what its items need."""
    stage = STAGES[shape.stage]
    return forward_kept(shape) + 4 * _row_tiles(shape) + 4 * CHUNK + shape.items * (2 + len(stage.x_blocks))


def backward_registers(shape):
    stage, words = STAGES[shape.stage], 4 * CHUNK * shape.tile // 8
    return backward_kept(shape) + 4 * (shape.units // 8) + words + shape.items * (4 + len(stage.saved))


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


class Here(NamedTuple):
    """Where a thread stands, and the numbers of the call."""

    T: int
    B: int
    tiles: int
    given: int
    backwards: int  # whether this direction walks in reverse
    unit0: int  # of the block
    unit: int  # of this thread's items
    row0: int  # of the block


def _items(ops, shape):
    """A function (i, here) -> the row of this thread's item i, counted from the block's first; -1 if there is none."""
    cuda, threads, units, rows, hidden = ops.cuda, 32 * shape.warps, shape.units, shape.tile, shape.hidden

    def row_of(i, here):
        r = (cuda.threadIdx.x + i * threads) // units
        return r if r < rows * here.tiles and here.row0 + r < here.B and here.unit < hidden else -1

    return ops.device(row_of)


def make_forward(ops, shape):
    """Text of the walk forward. The grid: blocks of units, groups of rows, directions."""
    stage, cuda, number = STAGES[shape.stage], ops.cuda, ops.float32
    hidden, units, tile, taped = shape.hidden, shape.units, shape.tile, shape.tape
    slots, x_slots, h_slots = stage.gates, len(stage.x_blocks), len(stage.h_blocks)
    blocks, vector, items = len(set(stage.x_blocks)), forward_vector(shape), shape.items
    kept, load, multiply_tiles = _forward_products(ops, shape)
    begin, end = _forward_ends(ops, shape)
    gather, apply = _gather_sums(ops, shape), _apply(ops, shape)
    word, whole, some_words, some_sums = ops.uint32, ops.int32, 4 * CHUNK, 4 * _row_tiles(shape)
    states_of_items, sums_of_items = 2 * items, x_slots * items

    def kernel(
        weight_hh, bias, sums, h0, c0, lengths, reset, exchange, output, states, tape, h_n, c_n, status, T, B, tiles,
        given, reverse, row, column,
    ):  # fmt: skip
        w, words = cuda.local.array(kept, word), cuda.local.array(some_words, word)
        acc, gates = cuda.local.array(some_sums, number), cuda.local.array(slots, number)
        state, of_x = cuda.local.array(states_of_items, number), cuda.local.array(sums_of_items, number)
        biases = cuda.local.array(slots, number)
        patience, parts = cuda.local.array(1, whole), cuda.shared.array(0, number)
        patience[0] = LOOKS
        z, unit0 = cuda.blockIdx.z, cuda.blockIdx.x * units
        unit = unit0 + cuda.threadIdx.x % units
        here = Here(T, B, tiles, given, reverse >> z & 1, unit0, unit, cuda.blockIdx.y * tile * tiles)
        bias, sums = ops.at(bias, z * slots * hidden), ops.at(sums, z * T * B * blocks * hidden)
        states, tape = ops.at(states, z * (T + 1) * B * hidden), ops.at(tape, z * T * B * taped * hidden)
        exchange = ops.at(exchange, z * (T + 1) * B * vector.words)
        load(w, ops.at(weight_hh, z * h_slots * hidden * hidden), unit0)
        for e in range(slots):
            biases[e] = bias[e * hidden + unit] if unit < hidden else number(0)
        begin(here, state, ops.at(h0, z * B * hidden), ops.at(c0, z * B * hidden), exchange, states)
        for s in range(T):
            t = T - 1 - s if here.backwards else s
            gather(here, t, sums, of_x)  # which does not wait for other blocks
            multiply_tiles(here, s, t, w, words, acc, exchange, lengths, reset, parts, patience, status)
            cuda.syncthreads()
            apply(
                here, s, t, state, gates, biases, of_x, parts, lengths, reset, exchange, output, row,
                column + z * hidden, states, tape,
            )  # fmt: skip
        end(here, state, ops.at(h_n, z * B * hidden), ops.at(c_n, z * B * hidden))

    return kernel


def _forward_products(ops, shape):
    """How many words of weights a thread keeps, and functions that load them, and make each warp's part of all sums."""
    cuda, number, zero = ops.cuda, ops.float32, ops.float32(0)
    hidden, units, warps, tile = shape.hidden, shape.units, shape.warps, shape.tile
    h_slots, vector, row_tiles = len(STAGES[shape.stage].h_blocks), forward_vector(shape), _row_tiles(shape)
    rows, each, (is_active, is_reset) = 16 * row_tiles, vector.groups * 16, _flags(ops)

    def weight(weights, unit0, row, k):
        """W_hh for a row of the block's tiles: gate row // units, unit row % units."""
        unit = unit0 + row % units
        if row < h_slots * units and unit < hidden:
            return weights[(row // units * hidden + unit) * hidden + k]
        return number(0)

    kept, load_words, multiply = weights_in_a(ops, shape.mode, vector, row_tiles, ops.device(weight))

    def load(w, weights, unit0):
        load_words(w, weights, unit0, cuda.threadIdx.x // 32 * each)

    def multiply_tiles(here, s, t, w, words, acc, exchange, lengths, reset, parts, patience, status):
        warp, g, q = cuda.threadIdx.x // 32, cuda.threadIdx.x % 32 // 4, cuda.threadIdx.x % 4
        for n in range(here.tiles):
            for e in range(4 * row_tiles):
                acc[e] = zero
            b = here.row0 + n * tile + g
            needed = b < here.B and is_active(lengths, here.given, t, b)
            needed = needed and not is_reset(reset, here.given, t * here.B + b)
            multiply(acc, w, words, exchange, (s * here.B + b) * vector.words, warp * each, needed, patience, status)
            at = (((s % 2 * warps + warp) * here.tiles + n) * rows + g) * tile + 2 * q
            for e in range(row_tiles):
                parts[at + 16 * e * tile], parts[at + 16 * e * tile + 1] = acc[4 * e], acc[4 * e + 1]
                below = at + (16 * e + 8) * tile
                parts[below], parts[below + 1] = acc[4 * e + 2], acc[4 * e + 3]

    return kept, ops.device(load), ops.device(multiply_tiles)


def _forward_ends(ops, shape):
    """Functions that take the initial states, and publish h; and that give the final ones."""
    hidden, taped, items, vector = shape.hidden, shape.tape, shape.items, forward_vector(shape)
    has_c, zero = C in STAGES[shape.stage].results, ops.float32(0)
    row_of, publish = _items(ops, shape), publisher(ops, shape.mode, vector)

    def begin(here, state, h0, c0, exchange, states):
        for i in range(items):
            r = row_of(i, here)
            if r >= 0:
                b = here.row0 + r
                state[2 * i] = h0[b * hidden + here.unit]
                state[2 * i + 1] = c0[b * hidden + here.unit] if has_c else zero
                publish(exchange, b * vector.words, here.unit, state[2 * i])
                if taped:
                    states[(here.backwards * here.T * here.B + b) * hidden + here.unit] = state[2 * i]

    def end(here, state, h_n, c_n):
        for i in range(items):
            r = row_of(i, here)
            if r >= 0:
                h_n[(here.row0 + r) * hidden + here.unit] = state[2 * i]
                if has_c:
                    c_n[(here.row0 + r) * hidden + here.unit] = state[2 * i + 1]

    return ops.device(begin), ops.device(end)


def _gather_sums(ops, shape):
    """A function that takes W_ih x of this thread's items at time t into of_x (is modified)."""
    stage, hidden, items = STAGES[shape.stage], shape.hidden, shape.items
    blocks, x_slots, row_of = len(set(stage.x_blocks)), len(stage.x_blocks), _items(ops, shape)
    load, store = load_each(ops, stage.x_blocks), store_each(ops, tuple(range(x_slots)))

    def gather(here, t, sums, of_x):
        for i in range(items):
            r = row_of(i, here)
            if r >= 0:
                at = (t * here.B + here.row0 + r) * blocks * hidden + here.unit
                store(of_x, i * x_slots, 1, load(sums, at, hidden))

    return ops.device(gather)


def _apply(ops, shape):
    """A function that adds the parts of this thread's sums and takes its items one step on; all arrays are modified."""
    stage, zero, hidden, units = STAGES[shape.stage], ops.float32(0), shape.hidden, shape.units
    warps, tile, items, taped = shape.warps, shape.tile, shape.items, shape.tape
    slots, x_slots, h_slots = stage.gates, len(stage.x_blocks), len(stage.h_blocks)
    rows, vector, has_c = 16 * _row_tiles(shape), forward_vector(shape), C in stage.results
    row_of, (is_active, is_reset) = _items(ops, shape), _flags(ops)
    publish, step = publisher(ops, shape.mode, vector), formula(ops, stage.forward, "float32")
    load_gates, load_state = load_each(ops, tuple(range(slots))), load_each(ops, stage.reads)
    store_state, store_tape = store_each(ops, stage.results), store_each(ops, stage.saves)

    def add_up(here, s, i, r, gates, biases, of_x, parts):
        for e in range(slots):
            gates[e] = biases[e]
        for e in range(x_slots):
            gates[e] += of_x[i * x_slots + e]
        for e in range(h_slots):
            line = e * units + here.unit - here.unit0
            total = zero
            for warp in range(warps):
                tiles_before = (s % 2 * warps + warp) * here.tiles + r // tile
                total += parts[(tiles_before * rows + line) * tile + r % tile]
            gates[slots - h_slots + e] += total

    add_up = ops.device(add_up)

    def apply(
        here, s, t, state, gates, biases, of_x, parts, lengths, reset, exchange, output, row, column, states, tape
    ):
        for i in range(items):
            r = row_of(i, here)
            if r >= 0:
                b = here.row0 + r
                at, active = t * here.B + b, is_active(lengths, here.given, t, b)
                if active:
                    if is_reset(reset, here.given, at):
                        state[2 * i], state[2 * i + 1] = zero, zero
                    add_up(here, s, i, r, gates, biases, of_x, parts)
                    new, saved = step(load_gates(gates, 0, 1), load_state(state, 2 * i, 1))
                    store_state(state, 2 * i, 1, new)
                    if taped:
                        store_tape(tape, at * taped * hidden + here.unit, hidden, saved)
                elif taped and has_c:
                    tape[(at * taped + TAPE_OF_C) * hidden + here.unit] = state[2 * i + 1]
                publish(exchange, ((s + 1) * here.B + b) * vector.words, here.unit, state[2 * i])
                output[at * row + column + here.unit] = state[2 * i] if active else zero
                if taped:
                    states[((t + 1 - here.backwards) * here.B + b) * hidden + here.unit] = state[2 * i]

    return ops.device(apply)


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
    hidden, units, tile, taped, items = shape.hidden, shape.units, shape.tile, shape.tape, shape.items
    d_slots, h_slots, vector = len(stage.dgates), len(stage.h_blocks), backward_vector(shape)
    kept, load, multiply_tiles = _backward_products(ops, shape)
    begin, gather, apply = _begin_back(ops, shape), _gather_saved(ops, shape), _apply_back(ops, shape)
    word, whole, some_words, some_sums = ops.uint32, ops.int32, 8 * CHUNK, 4 * (units // 8)
    saved_of_items = len(stage.saved) * items

    def kernel(
        weight_hh, lengths, reset, exchange, d_output, dh_n, dc_n, states, tape, c0, d, dh0, dc0, status, T, B, tiles,
        given, reverse, directions,
    ):  # fmt: skip
        w, words = cuda.local.array(kept, word), cuda.local.array(some_words, word)
        acc, dgates = cuda.local.array(some_sums, number), cuda.local.array(d_slots, number)
        dh, carried = cuda.local.array(items, number), cuda.local.array(items, number)
        saved, before = cuda.local.array(saved_of_items, number), cuda.local.array(items, number)
        asked = cuda.local.array(items, number)
        patience, parts = cuda.local.array(1, whole), cuda.shared.array(0, number)
        patience[0] = LOOKS
        z, unit0 = cuda.blockIdx.z, cuda.blockIdx.x * units
        unit = unit0 + cuda.threadIdx.x % units
        here = Here(T, B, tiles, given, reverse >> z & 1, unit0, unit, cuda.blockIdx.y * tile * tiles)
        exchange, d = ops.at(exchange, z * T * B * vector.words), ops.at(d, z * T * B * d_slots * hidden)
        states, tape = ops.at(states, z * (T + 1) * B * hidden), ops.at(tape, z * T * B * taped * hidden)
        c0, dh0, dc0 = ops.at(c0, z * B * hidden), ops.at(dh0, z * B * hidden), ops.at(dc0, z * B * hidden)
        load(w, ops.at(weight_hh, z * h_slots * hidden * hidden), unit0)
        begin(here, dh, carried, ops.at(dh_n, z * B * hidden), ops.at(dc_n, z * B * hidden))
        for i_step in range(T + 1):
            t = i_step if here.backwards else T - 1 - i_step  # whose gates' gradients are made; at last there is none
            later = t - 1 if here.backwards else t + 1
            if i_step < T:  # which does not wait for other blocks
                gather(here, t, lengths, reset, d_output, directions, z, states, tape, c0, saved, before, asked)
            if i_step > 0:
                multiply_tiles(here, i_step, later, w, words, acc, exchange, lengths, reset, parts, patience, status)
            cuda.syncthreads()
            apply(
                here, i_step, t, later, dh, carried, saved, before, asked, dgates, parts, lengths, reset, exchange, d,
                dh0, dc0,
            )  # fmt: skip

    return kernel


def _backward_products(ops, shape):
    """How many words of weights a thread keeps, and functions that load them, and make each warp's part of all sums."""
    cuda, number, zero = ops.cuda, ops.float32, ops.float32(0)
    hidden, units, warps, tile = shape.hidden, shape.units, shape.warps, shape.tile
    h_slots, vector, unit_tiles = len(STAGES[shape.stage].h_blocks), backward_vector(shape), units // 8
    each, (is_active, is_reset) = vector.groups * 16, _flags(ops)

    def weight(weights, unit0, column, k):
        """W_hh for a unit of the block; k goes through the gates of a unit, one unit after the other."""
        unit = unit0 + column
        if unit < hidden:
            return weights[(k % h_slots * hidden + k // h_slots) * hidden + unit]
        return number(0)

    kept, load_words, multiply = weights_in_b(ops, shape.mode, vector, unit_tiles, ops.device(weight), tile)

    def load(w, weights, unit0):
        load_words(w, weights, unit0, cuda.threadIdx.x // 32 * each)

    def is_needed(here, t, b, lengths, reset):
        found = b < here.B and is_active(lengths, here.given, t, b)
        return found and not is_reset(reset, here.given, t * here.B + b)

    is_needed = ops.device(is_needed)

    def multiply_tiles(here, i_step, later, w, words, acc, exchange, lengths, reset, parts, patience, status):
        warp, g, q = cuda.threadIdx.x // 32, cuda.threadIdx.x % 32 // 4, cuda.threadIdx.x % 4
        for n in range(here.tiles):
            for e in range(4 * unit_tiles):
                acc[e] = zero
            b = here.row0 + n * tile + g
            needed, needed8 = is_needed(here, later, b, lengths, reset), False
            if tile == 16:
                needed8 = is_needed(here, later, b + 8, lengths, reset)
            row = (later * here.B + b) * vector.words
            multiply(
                acc, w, words, exchange, row, row + 8 * vector.words, warp * each, needed, needed8, patience, status
            )  # fmt: skip
            at = (((i_step % 2 * warps + warp) * here.tiles + n) * tile + g) * units + 2 * q
            for e in range(unit_tiles):
                parts[at + 8 * e], parts[at + 8 * e + 1] = acc[4 * e], acc[4 * e + 1]
                if tile == 16:
                    below = at + 8 * units + 8 * e
                    parts[below], parts[below + 1] = acc[4 * e + 2], acc[4 * e + 3]

    return kept, ops.device(load), ops.device(multiply_tiles)


def _begin_back(ops, shape):
    """A function that takes the gradients of the final states into dh and carried (are modified)."""
    hidden, items, zero, row_of = shape.hidden, shape.items, ops.float32(0), _items(ops, shape)

    def begin(here, dh, carried, dh_n, dc_n):
        for i in range(items):
            r = row_of(i, here)
            at = (here.row0 + r) * hidden + here.unit
            dh[i] = dh_n[at] if r >= 0 and here.given & D_H else zero
            carried[i] = dc_n[at] if r >= 0 and here.given & D_C else zero

    return ops.device(begin)


def _gather_saved(ops, shape):
    """A function that takes what forward has saved for time t, the state before it and the gradient that is asked of
    its output into saved, before and asked (are modified).
    """
    stage, hidden, taped, items = STAGES[shape.stage], shape.hidden, shape.tape, shape.items
    zero, count, row_of, (is_active, is_reset) = ops.float32(0), len(stage.saved), _items(ops, shape), _flags(ops)
    load, store = load_each(ops, stage.saved), store_each(ops, tuple(range(count)))
    reads_h, reads_c = H in stage.state, C in stage.state

    def state_before(here, t, b, reset, states, tape, c0):
        if is_reset(reset, here.given, t * here.B + b):
            return zero
        if reads_h:
            return states[((t + here.backwards) * here.B + b) * hidden + here.unit]
        if not reads_c:
            return zero
        earlier = t + 1 if here.backwards else t - 1
        if earlier < 0 or earlier == here.T:
            return c0[b * hidden + here.unit]
        return tape[((earlier * here.B + b) * taped + TAPE_OF_C) * hidden + here.unit]

    state_before = ops.device(state_before)

    def gather(here, t, lengths, reset, d_output, directions, z, states, tape, c0, saved, before, asked):
        for i in range(items):
            r = row_of(i, here)
            b = here.row0 + r
            if r >= 0 and is_active(lengths, here.given, t, b):
                at = t * here.B + b
                store(saved, i * count, 1, load(tape, at * taped * hidden + here.unit, hidden))
                before[i] = state_before(here, t, b, reset, states, tape, c0)
                asked[i] = zero
                if here.given & D_OUTPUT:
                    asked[i] = d_output[(at * directions + z) * hidden + here.unit]

    return ops.device(gather)


def _apply_back(ops, shape):
    """A function that adds the parts of this thread's sums, gives dh and what is carried to the step before, and makes
    the gradients of its gates. All arrays are modified.
    """
    stage, zero, hidden, units = STAGES[shape.stage], ops.float32(0), shape.hidden, shape.units
    warps, tile, items, count = shape.warps, shape.tile, shape.items, len(stage.saved)
    d_slots, h_slots, vector = len(stage.dgates), len(stage.h_blocks), backward_vector(shape)
    row_of, (is_active, is_reset) = _items(ops, shape), _flags(ops)
    publish, step = publisher(ops, shape.mode, vector), formula(ops, stage.backward, "float32")
    load_saved, only = load_each(ops, tuple(range(count))), (0,) * len(stage.carried)
    load_carried, store_carried = load_each(ops, only), store_each(ops, only)
    load_before = load_each(ops, (0,) * len(stage.state))
    store_gates, store_d = store_each(ops, tuple(range(d_slots))), store_each(ops, stage.dgates)
    has_c, carries_h = C in stage.carried, H in stage.carried

    def hand_back(here, i_step, i, r, cut, dh, carried, parts):
        """From after the step that was later to before it."""
        total = carried[i] if carries_h else zero
        for warp in range(warps):
            tiles_before = (i_step % 2 * warps + warp) * here.tiles
            total += parts[(tiles_before * tile + r) * units + here.unit - here.unit0]
        dh[i] = zero if cut else total
        carried[i] = zero if cut else carried[i]

    hand_back = ops.device(hand_back)

    def apply(
        here, i_step, t, later, dh, carried, saved, before, asked, dgates, parts, lengths, reset, exchange, d, dh0, dc0
    ):
        for i in range(items):
            r = row_of(i, here)
            if r >= 0:
                b = here.row0 + r
                if i_step > 0 and is_active(lengths, here.given, later, b):
                    cut = is_reset(reset, here.given, later * here.B + b)
                    hand_back(here, i_step, i, r, cut, dh, carried, parts)
                at = t * here.B + b
                if i_step == here.T:
                    dh0[b * hidden + here.unit] = dh[i]
                    if has_c:
                        dc0[b * hidden + here.unit] = carried[i]
                elif is_active(lengths, here.given, t, b):
                    made, back = step(
                        dh[i] + asked[i], load_carried(carried, i, 1), load_saved(saved, i * count, 1),
                        load_before(before, i, 1),
                    )  # fmt: skip
                    store_carried(carried, i, 1, back)
                    store_gates(dgates, 0, 1, made)
                    for e in range(h_slots):
                        k = here.unit * h_slots + e
                        publish(exchange, at * vector.words, k, dgates[d_slots - h_slots + e])
                    store_d(d, at * d_slots * hidden + here.unit, hidden, made)
                else:
                    for e in range(d_slots):
                        d[(at * d_slots + e) * hidden + here.unit] = zero

    return ops.device(apply)
