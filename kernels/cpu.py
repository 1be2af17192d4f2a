"""The walk through time on the CPU: forward and backward of one layer in one direction.

Rows (sequences) are independent of each other: each thread walks through time with rows of its own, and only the weight
gradients, which sum over all rows, are a second phase. Within a step, a stage takes one panel of hidden units at a time: products
with x and h into a few gate sums, then the cell on them while they are in the first-level cache.

Rows are kept in the order of decreasing length, so that the rows active at a time step are the first ones. ``order`` maps
that order to the caller's, ``active[t]`` is the number of rows that are longer than t.

Buffers that belong to the walk hold rows of `ld` numbers, whole vectors, so that only the caller's arrays need care at
their ends. Letters: see :mod:`fastrnn.kernels`.
"""

from __future__ import annotations

import functools
import time
from typing import NamedTuple

import numpy as np
from llvmlite import binding
from numba import njit
from numba.core import config
from numba.extending import register_jitable

from fastrnn.kernels import threads
from fastrnn.kernels.cells import CELLS, LSTM_PROJECTED, Cell
from fastrnn.kernels.product import (
    BLOCK, VECTORS, add_outer_products, clear, multiply, outer_work, pack_columns, pack_gates, panels_together,
    rows_in_tile,
)  # fmt: skip
from fastrnn.kernels.simd import VECTOR_BITS, lanes, load, load_each, machine, store, store_each
from fastrnn.kernels.stage import SOURCE, units

ROWS = 48  # rows whose gate sums are under way at a time: they stay in the first-level cache
SLICE_FLOPS = 4e6 * VECTOR_BITS  # work between looks at Ctrl-C: a tenth of a second on a slow CPU with such vectors
CHUNK_BYTES = 1 << 22  # gate gradients that are kept until the weight gradients are summed
THREAD_FLOPS = 4e6  # work that is worth waking a thread for

TILE_ROWS = rows_in_tile(VECTORS)

_kernel = njit(cache=True, nogil=True, error_model="numpy")


# ---- forward: jitted


@register_jitable
def _together(rows, vectors):
    return max(1, (8 + rows * vectors - 1) // (rows * vectors))


@register_jitable
def _project_ahead(stage, x, x_size, places, rows, w, bias, panels, g):
    """g[row] = bias + W_ih x[row], for all panels of some rows."""
    width = lanes(g)
    panel = len(stage.slots) * stage.units * width
    vectors = len(stage.x_columns)
    for p in range(panels):
        for r in range(rows):
            at = r * panels * panel + p * panel
            for j in range(0, panel, width):
                store(g, at + j, load(bias, p * panel + j, width), width)
        multiply(stage.x_columns, rows, 1, x, 0, places, 0, w, p * x_size * vectors * width, 0, x_size, g, p * panel, panels * panel, 0)


@register_jitable
def _forward_stage(
    stage, size, k_count, rows, row0, projected, x, x_size, x_places, wx, wh, bias, g,
    values, before, now, value_size, ld, row_places, output, output_places, tape, tape_places, hidden, training,
):  # fmt: skip
    """One stage of one step for rows row0 .. row0 + rows: products, then the cell.

    `projected` is the first row of g that holds this step's bias + W_ih x, or -1 where that is still to be done.
    """
    width = lanes(g)
    vectors = len(stage.h_columns)
    panel = len(stage.slots) * stage.units * width  # numbers of g in a panel
    panel_units = stage.units * width
    panels = (size + panel_units - 1) // panel_units
    x_panel, h_panel = x_size * len(stage.x_columns) * width, k_count * vectors * width
    h_start = (len(stage.slots) - len(stage.h_blocks)) * stage.units * width
    operand = before if stage.operand == 0 else now + stage.operand * value_size
    together = _together(rows, vectors)
    p = 0
    while p < panels:
        count = together if p + together <= panels else 1
        for r0 in range(0, rows, ROWS):
            n = min(ROWS, rows - r0)
            if projected >= 0:
                g0, g_row = (projected + r0) * panels * panel + p * panel, panels * panel
            else:
                g0, g_row = 0, count * panel
                for r in range(n):
                    for j in range(0, g_row, width):
                        store(g, r * g_row + j, load(bias, p * panel + j, width), width)
                if len(stage.x_blocks) > 0:
                    multiply(stage.x_columns, n, count, x, 0, x_places, r0, wx, p * x_panel, x_panel, x_size, g, g0, g_row, panel)
            multiply(stage.h_columns, n, count, values, operand, row_places, row0 + r0, wh, p * h_panel, h_panel, k_count,
                     g, g0 + h_start, g_row, panel)  # fmt: skip
            for r in range(n):
                row = (row0 + r0 + r) * ld
                for i in range(count * stage.units):
                    unit = p * panel_units + i * width
                    m = size - unit
                    if m > 0:
                        at = g0 + r * g_row + (i // stage.units) * panel + (i % stage.units) * width
                        gates = load_each(g, at, stage.slots, panel_units, width)
                        state = load_each(values, before + row + unit, stage.reads, value_size, width)
                        handed = load_each(values, now + row + unit, stage.reads_now, value_size, width)
                        results, saved = stage.forward(gates, state + handed)
                        store_each(values, now + row + unit, stage.results, value_size, results, width)
                        if stage.gives_h:
                            store(output, output_places[r0 + r] + unit, results[0], m)
                        if training:
                            store_each(tape, tape_places[r0 + r] + unit, stage.saves, hidden, saved, m)
        p += count


@_kernel
def _forward_rows(
    first, second, x, x_size, wx, wh, bias, wh2, wx2, bias2, values, states, ld, h_size, hidden,
    output, output_ld, column, tape, tape_size, order, active, reset, final, steps, batch, reverse, training,
    s0, s1, row0, row1, ahead, g, g2, places,
):  # fmt: skip
    """Steps s0 to s1 of rows row0 to row1. Is modified: values, output, tape, final, and the scratch arrays g, g2 and places.

    values [V, 2, B, ld] holds each value before and after the step in turn; final [states, B, ld] the last valid ones.
    """
    value_size = 2 * batch * ld
    slot_size = batch * ld
    most = row1 - row0
    width = lanes(g)
    panels = (hidden + first.units * width - 1) // (first.units * width)
    x_at, out_at, tape_at, row_at = 0, max(1, ahead) * most, (max(1, ahead) + 1) * most, (max(1, ahead) + 2) * most
    for row in range(batch):
        places[row_at + row] = row * ld
    projected_until, projected = s0, -1
    for s in range(s0, s1):
        t = steps - 1 - s if reverse else s
        rows = min(active[t], row1) - row0
        if rows <= 0:
            continue
        before, now = (s & 1) * slot_size, (1 - (s & 1)) * slot_size
        if len(reset) > 0:
            for row in range(row0, row0 + rows):
                if reset[t * batch + order[row]]:
                    for v in range(states):
                        clear(values, v * value_size + before + row * ld, ld)
        if ahead > 0:
            if s >= projected_until:
                projected_until, projected, n = min(s + ahead, s1), 0, 0
                for s2 in range(s, projected_until):
                    t2 = steps - 1 - s2 if reverse else s2
                    for row in range(row0, min(active[t2], row1)):
                        places[x_at + n] = (t2 * batch + order[row]) * x_size
                        n += 1
                _project_ahead(first, x, x_size, places, n, wx, bias, panels, g)
        else:
            for r in range(rows):
                places[x_at + r] = (t * batch + order[row0 + r]) * x_size
        for r in range(rows):
            place = t * batch + order[row0 + r]
            places[out_at + r] = place * output_ld + column
            places[tape_at + r] = place * tape_size
        _forward_stage(
            first, hidden, h_size, rows, row0, projected, x, x_size, places[x_at:], wx, wh, bias, g, values, before, now,
            value_size, ld, places[row_at:], output, places[out_at:], tape, places[tape_at:], hidden, training,
        )  # fmt: skip
        if second is not None:
            _forward_stage(
                second, h_size, hidden, rows, row0, -1, x, x_size, places[x_at + max(projected, 0):], wx2, wh2, bias2, g2, values, before, now,
                value_size, ld, places[row_at:], output, places[out_at:], tape, places[tape_at:], hidden, training,
            )  # fmt: skip
        if ahead > 0:
            projected += rows
        # Rows that end here leave their state.
        still = 0 if reverse or t + 1 == steps else max(0, active[t + 1] - row0)
        if reverse and t > 0:
            still = rows
        for row in range(row0 + still, row0 + rows):
            for v in range(states):
                for j in range(ld):
                    final[(v * batch + row) * ld + j] = values[v * value_size + now + row * ld + j]


# ---- backward: jitted


@register_jitable
def _multiply_panels(a, places, rows, k_offset, w, k_count, c, c0, c_row, n_count):
    """C[row] = A[row] W for all panels of a plain product."""
    width = VECTORS * lanes(c)
    for p in range((n_count + width - 1) // width):
        for r in range(rows):
            clear(c, c0 + r * c_row + p * width, width)
        multiply((0, 1, 2, 3), rows, 1, a, k_offset, places, 0, w, p * k_count * width, 0, k_count, c, c0 + p * width, c_row, 0)


@register_jitable
def _backward_stage(
    stage, size, rows, row0, hidden, dh, ld, carried, d_output, out_places, tape, tape_places,
    previous, q0, previous_size, d, d_row, d_column,
):  # fmt: skip
    """Gate gradients of one stage of one step, into d (is modified), from the gradient dh of its result."""
    width = lanes(d)
    for r in range(rows):
        row, q = row0 + r, q0 + r
        for unit in range(0, size, width):
            m = size - unit
            gradient = load(dh, row * ld + unit, width)
            if len(d_output) > 0:
                gradient = gradient + load(d_output, out_places[r] + unit, m)
            back = load_each(carried, row * ld + unit, stage.carried_places, 0, width)
            saved = load_each(tape, tape_places[r] + unit, stage.saved, hidden, m)
            state = load_each(previous, q * ld + unit, stage.state, previous_size, width)
            dgates, back = stage.backward(gradient, back, saved, state)
            store_each(d, q * d_row + d_column + unit, stage.dgates, hidden, dgates, m)
            store_each(carried, row * ld + unit, stage.carried_places, 0, back, width)


@_kernel
def _backward_rows(
    first, second, x_size, wx, wh, wh2, h_slot2, h_start, initial, states, ld, h_size, hidden, output, output_ld, column,
    tape, tape_size, c_place, d_output, order, active, reset, steps, batch, reverse, s0, s1, row0, row1,
    bases, dh, d_middle, carried, previous, d, d_row, dx, x_gates, g, places, x_places,
):  # fmt: skip
    """Steps s1 - 1 down to s0 of rows row0 to row1.

    Is modified: dh and carried [B, ld] (gradients on their way back), previous [states, Q, ld], d [Q, d_row], dx, x_places [Q],
    and the scratch arrays d_middle, g, places. Row j of step s is row bases[s - s0] + j of the chunk.
    """
    previous_size = bases[s1 - s0] * ld
    most = row1 - row0
    h_count = len(first.h_blocks) * hidden
    for s in range(s1 - 1, s0 - 1, -1):
        t = steps - 1 - s if reverse else s
        rows = min(active[t], row1) - row0
        if rows <= 0:
            continue
        q0 = bases[s - s0] + row0
        for r in range(rows):
            row = row0 + r
            b = order[row]
            q = q0 + r
            x_places[q] = (t * batch + b) * x_size
            places[r] = (t * batch + b) * h_size
            places[most + r] = (t * batch + b) * tape_size
            places[2 * most + r] = q * d_row
            cut = len(reset) > 0 and reset[t * batch + b]
            start = (t + 1 == steps or row >= active[t + 1]) if reverse else t == 0
            earlier = (t + 1 if reverse else t - 1) * batch + b
            for v in range(states):
                at = v * previous_size + q * ld
                if cut:
                    clear(previous, at, ld)
                elif start:
                    for j in range(ld):
                        previous[at + j] = initial[(v * batch + row) * ld + j]
                elif v == 0:
                    for j in range(h_size):
                        previous[at + j] = output[earlier * output_ld + column + j]
                else:
                    for j in range(hidden):
                        previous[at + j] = tape[earlier * tape_size + c_place * hidden + j]
        if second is not None:
            _backward_stage(second, h_size, rows, row0, hidden, dh, ld, carried, d_output, places, tape, places[most:],
                            previous, q0, previous_size, d, d_row, 0 if h_size == hidden else h_slot2 * hidden)  # fmt: skip
            _multiply_panels(d, places[2 * most:], rows, h_slot2 * hidden, wh2, h_size, d_middle, row0 * ld, ld, hidden)
            _backward_stage(first, hidden, rows, row0, hidden, d_middle, ld, carried, d_output[:0], places, tape, places[most:],
                            previous, q0, previous_size, d, d_row, 0)  # fmt: skip
        else:
            _backward_stage(first, hidden, rows, row0, hidden, dh, ld, carried, d_output, places, tape, places[most:],
                            previous, q0, previous_size, d, d_row, 0)  # fmt: skip
        _multiply_panels(d, places[2 * most:], rows, h_start, wh, h_count, dh, row0 * ld, ld, h_size)
        if len(reset) > 0:
            for row in range(row0, row0 + rows):
                if reset[t * batch + order[row]]:
                    clear(dh, row * ld, ld)
                    clear(carried, row * ld, ld)
    _backward_inputs(x_size, wx, order, active, steps, reverse, s0, s1, row0, row1, bases, d, d_row, dx, x_gates * hidden, g, places, x_places)


@register_jitable
def _backward_inputs(x_size, wx, order, active, steps, reverse, s0, s1, row0, row1, bases, d, d_row, dx, k_count, g, places, x_places):
    """dx = d W_ih for the rows row0 to row1 of all steps, a few rows at a time."""
    width = VECTORS * lanes(g)
    block = len(g) // width
    for p in range((x_size + width - 1) // width):
        n = min(width, x_size - p * width)
        count = 0
        for s in range(s0, s1):
            t = steps - 1 - s if reverse else s
            for row in range(row0, min(active[t], row1)):
                places[count] = (bases[s - s0] + row) * d_row
                places[block + count] = x_places[bases[s - s0] + row]
                count += 1
                if count == block:
                    _input_block(d, places, count, wx, p, k_count, g, dx, block, n)
                    count = 0
        _input_block(d, places, count, wx, p, k_count, g, dx, block, n)


@register_jitable
def _input_block(d, places, rows, wx, p, k_count, g, dx, block, n):
    width = VECTORS * lanes(g)
    clear(g, 0, rows * width)
    multiply((0, 1, 2, 3), rows, 1, d, 0, places, 0, wx, p * k_count * width, 0, k_count, g, 0, width, 0)
    for r in range(rows):
        for j in range(0, n, lanes(g)):
            store(dx, places[block + r] + p * width + j, load(g, r * width + j, lanes(g)), n - j)


@_kernel
def _weight_gradient(source, d, d0, d_row, m_count, b, places, rows, n_count, c, tile_places, work, part, parts):
    """Add D^T B to c [M, N] (is modified), for this part's rows of c."""
    height = TILE_ROWS
    tiles = (m_count + height - 1) // height
    m0, m1 = tiles * part // parts * height, min(m_count, tiles * (part + 1) // parts * height)
    if m1 > m0:
        add_outer_products((0, 1, 2, 3), d, d0, d_row, m0, m1, b, places, rows, n_count, c, tile_places, work)


@_kernel
def _bias_gradient(source, d, d_row, rows, count, total, part, parts):
    """Add the sum of D's rows to total (is modified), for this part's columns."""
    width = lanes(d)
    vectors = (count + width - 1) // width
    for v in range(vectors * part // parts, vectors * (part + 1) // parts):
        n = count - v * width
        sums = load(d, v * width, 0)
        for q in range(rows):
            sums = sums + load(d, q * d_row + v * width, n)
        store(total, v * width, load(total, v * width, n) + sums, n)


# ---- what the layers call


class Tape(NamedTuple):
    """What backward needs of a forward pass. Refers to the caller's x, params and output; owns the rest."""

    cell: Cell
    x: np.ndarray
    params: dict
    initial: np.ndarray  # [states, B, ld], rows in order
    rows: Rows
    reset: np.ndarray
    reverse: bool
    output: np.ndarray
    column: int
    saved: np.ndarray  # [T, B, tape, H]


class Rows(NamedTuple):
    """Rows by decreasing length, and how many of them are active at each step."""

    order: np.ndarray
    active: np.ndarray
    lengths: np.ndarray | None  # in order

    def share(self, part: int, parts: int) -> tuple[int, int]:
        """First and last row of a part, parts being of nearly equal work."""
        batch = len(self.order)
        if self.lengths is None:
            return batch * part // parts, batch * (part + 1) // parts
        done = np.concatenate(([0], np.cumsum(self.lengths)))
        cuts = np.searchsorted(done, done[-1] * np.arange(parts + 1) / parts)
        cuts[0], cuts[-1] = 0, batch
        return int(cuts[part]), int(cuts[part + 1])


class Sizes(NamedTuple):
    """The sizes of a problem, and of the rows of its buffers."""

    time: int
    batch: int
    inputs: int
    hidden: int
    h: int  # P where there is a projection, else H
    width: int  # numbers in a vector
    ld: int  # numbers in a row of a buffer


def _rows(lengths, time, batch):
    if lengths is None:
        return Rows(np.arange(batch), np.full(time, batch), None)
    order = np.argsort(-lengths, kind="stable")
    longer = np.searchsorted(-lengths[order], -np.arange(time), side="left")
    return Rows(order, longer.astype(np.int64), lengths[order])


def _cell(name, params):
    return CELLS["lstm_projected"] if "weight_hr" in params else CELLS[name]


def _sizes(x, cell, params):
    time, batch, inputs = x.shape
    hidden = params["weight_ih"].shape[0] // cell.gates
    width = VECTOR_BITS // (8 * x.itemsize)
    line = VECTORS * width
    return Sizes(time, batch, inputs, hidden, params["weight_hh"].shape[1], width, -(-max(hidden, 1) // line) * line)


def _aligned(count, dtype, zero=False):
    """A one-dimensional array that starts on a cache line."""
    size = np.dtype(dtype).itemsize
    memory = (np.zeros if zero else np.empty)(count + 64 // size, dtype)
    start = -memory.ctypes.data % 64 // size
    return memory[start : start + count]


def _flat(array):
    """One-dimensional and read-only, so that a kernel is compiled once whatever the caller's flags."""
    flat = array.reshape(-1)
    flat.flags.writeable = False
    return flat


@functools.cache
def _blocks(blocks):
    return np.array(blocks, np.int64)


def _pack_rows_of(weight, blocks, hidden, unit_vectors, width):
    """`weight`'s gate blocks for the forward product."""
    panels = -(-hidden // (unit_vectors * width))
    packed = _aligned(panels * weight.shape[1] * len(blocks) * unit_vectors * width, weight.dtype)
    pack_gates(SOURCE, _flat(weight), weight.shape[1], _blocks(blocks), hidden, unit_vectors, packed)
    return packed


def _pack_columns_of(weight, blocks, block_rows, width):
    """`weight` for the product with gate gradients."""
    line = VECTORS * width
    packed = _aligned(-(-weight.shape[1] // line) * len(blocks) * block_rows * line, weight.dtype)
    pack_columns(SOURCE, _flat(weight), weight.shape[1], _blocks(blocks), block_rows, packed)
    return packed


class _Packed(NamedTuple):
    """A stage's weights and bias as the forward kernel takes them."""

    wx: np.ndarray
    wh: np.ndarray
    bias: np.ndarray


def _pack_stage(stage, second, params, size):
    """Weights and biases of one stage, packed for the forward walk."""
    unit_vectors = units(stage)
    projects = second and not stage.x_blocks
    units_out = size.h if projects else size.hidden
    dtype = params["weight_ih"].dtype
    empty = np.empty(0, dtype)
    wx = _pack_rows_of(params["weight_ih"], stage.x_blocks, size.hidden, unit_vectors, size.width) if stage.x_blocks else empty
    wh = _pack_rows_of(params["weight_hr" if projects else "weight_hh"], stage.h_blocks, units_out, unit_vectors, size.width)
    bias = np.zeros((stage.gates, units_out), dtype)
    if "bias_ih" in params and not projects:
        for slot, block in enumerate(stage.x_blocks):
            bias[slot] += params["bias_ih"].reshape(-1, size.hidden)[block]
        for slot, block in enumerate(stage.h_blocks, stage.gates - len(stage.h_blocks)):
            bias[slot] += params["bias_hh"].reshape(-1, size.hidden)[block]
    panel = unit_vectors * size.width
    panels = -(-units_out // panel)
    packed = np.zeros((panels, stage.gates, panel), dtype)
    padded = np.zeros((stage.gates, panels * panel), dtype)
    padded[:, :units_out] = bias
    packed[:] = padded.reshape(stage.gates, panels, panel).transpose(1, 0, 2)
    return _Packed(wx, wh, packed.reshape(-1))


def _flops(cell, size, steps_rows):
    """Multiplications and additions of a forward pass over so many rows."""
    return 2.0 * steps_rows * cell.gates * size.hidden * (size.inputs + size.h)


def _parts(flops, batch):
    """Threads that the work is worth."""
    return int(max(1, min(threads.get_num_threads(), batch, flops // THREAD_FLOPS)))


def _states(state, rows, cell, size, values):
    """values[v, slot, row]: the initial state in both slots, in the order of the rows, zero behind its end."""
    buffer = _aligned(values * 2 * size.batch * size.ld, state[0].dtype, zero=True)
    view = buffer.reshape(values, 2, size.batch, size.ld)
    for v, s in enumerate(state):
        view[v, :, :, : s.shape[1]] = s[rows.order]
    return buffer, view


def forward(cell, x, params, state, *, lengths=None, reset=None, reverse=False, training=False, output=None, column=0):
    """One layer in one direction. The contract is that of :func:`fastrnn.functional.forward`, without its checks.

    x (T, B, I), state (h,) or (h, c), output (T, B, >= column + H) where given (is modified in H columns).
    Returns output, state and, when training, a tape for :func:`backward`.
    """
    cell = _cell(cell, params)
    size = _sizes(x, cell, params)
    rows = _rows(lengths, size.time, size.batch)
    if output is None:
        output = np.empty((size.time, size.batch, size.h), x.dtype)
    if lengths is not None:
        output[:, :, column : column + size.h] = 0
    first, second = (*cell.stages, None)[:2]
    packed = _pack_stage(first, False, params, size)
    packed2 = packed if second is None else _pack_stage(second, True, params, size)
    values, slots = _states(state, rows, cell, size, cell.values)
    initial = slots[: cell.states, 0].copy()
    final = initial.copy()
    tape = np.empty((size.time, size.batch, cell.tape, size.hidden) if training else 0, x.dtype)
    no_reset = np.empty(0, np.bool_)
    flat = {"x": _flat(x), "reset": no_reset if reset is None else _flat(reset), "output": output.reshape(-1)}
    steps = int(rows.active.sum())
    flops = _flops(cell, size, steps)
    parts = _parts(flops, size.batch)
    shares = [rows.share(p, parts) for p in range(parts)]
    scratch = [_forward_scratch(first, second, size, *share, x.dtype) for share in shares]

    def walk(s0, s1):
        def part(p, _):
            ahead, g, g2, places = scratch[p]
            _forward_rows(
                first, second, flat["x"], size.inputs, packed.wx, packed.wh, packed.bias, packed2.wh, packed2.wx, packed2.bias,
                values, cell.states, size.ld, size.h, size.hidden, flat["output"], output.shape[2], column,
                tape.reshape(-1), cell.tape * size.hidden, rows.order, rows.active, flat["reset"], final.reshape(-1),
                size.time, size.batch, reverse, training, s0, s1, *shares[p], ahead, g, g2, places,
            )  # fmt: skip

        threads.run(part, parts)

    for s0, s1 in _slices(size.time, flops):
        walk(s0, s1)
    back = np.empty_like(rows.order)
    back[rows.order] = np.arange(size.batch)
    ends = tuple(np.ascontiguousarray(final[v, back, : s.shape[1]]) for v, s in enumerate(state))
    kept = Tape(cell, x, params, initial, rows, flat["reset"], reverse, output, column, tape) if training else None
    return output, ends, kept


def _slices(time, flops):
    """Cuts of the time axis between which Ctrl-C is looked at."""
    steps = max(1, min(time, int(time * SLICE_FLOPS / max(flops, 1.0))))
    return [(s, min(s + steps, time)) for s in range(0, time, steps)]


def _forward_scratch(first, second, size, row0, row1, dtype):
    """Steps to project ahead, room for gate sums, and for the places of rows."""
    most = row1 - row0
    width = size.width
    panel = first.gates * units(first) * width
    panels = -(-size.hidden // (units(first) * width))
    ahead = 0
    if 0 < most < rows_in_tile(len(first.x_blocks) * units(first)):
        ahead = max(1, max(BLOCK // most, 1) if panels * panel * size.width <= 0 else _ahead(most, panels * panel, dtype))
    together = max(panels_together(1, 3), 4)
    g_size = max(ahead * most * panels * panel, ROWS * panel, together * VECTORS * units(first) * width * 2)
    g = _aligned(g_size, dtype)
    g2 = g
    if second is not None:
        g2 = _aligned(max(ROWS * second.gates * units(second) * width, together * VECTORS * width * 4), dtype)
    return ahead, g, g2, np.empty((max(1, ahead) + 2) * most + size.batch, np.int64)


def _ahead(rows, row_size, dtype):
    """Steps whose input products are made together: tiles full of rows, in a part of the second-level cache."""
    room = (1 << 17) // (row_size * np.dtype(dtype).itemsize * rows)
    return int(min(max(room, -(-8 // rows)), 256))


def backward(tape, d_output, d_state):
    """Gradients of one layer in one direction, from its tape. See :func:`fastrnn.functional.backward`.

    d_output (T, B, H) or None, d_state a tuple of arrays or None. Returns dx, dparams, dstate.
    """
    cell, x, params, rows = tape.cell, tape.x, tape.params, tape.rows
    size = _sizes(x, cell, params)
    first, second = (*cell.stages, None)[:2]
    dtype = x.dtype
    hidden, width = size.hidden, size.width
    wx_blocks = tuple(b for stage in cell.stages for b in stage.x_blocks)
    wx = _pack_columns_of(params["weight_ih"], wx_blocks, hidden, width)
    wh = _pack_columns_of(params["weight_hh"], first.h_blocks, hidden, width)
    wh2, h_slot2 = np.empty(0, dtype), 0
    if second is not None:
        h_slot2 = cell.slots if not second.x_blocks else len(first.h_blocks)
        name = "weight_hh" if second.x_blocks else "weight_hr"
        wh2 = _pack_columns_of(params[name], second.h_blocks, hidden if second.x_blocks else size.h, width)
    d_row = cell.slots * hidden + (size.h if second is not None and not second.x_blocks else 0)
    h_start = (first.gates - len(first.h_blocks)) * hidden

    dh, d_middle, carried = (_aligned(size.batch * size.ld, dtype, zero=True) for _ in range(3))
    for v, s in enumerate(d_state or ()):
        if s is not None:
            (dh if v == 0 else carried).reshape(size.batch, size.ld)[:, : s.shape[1]] = s[rows.order]
    dx = (np.empty if rows.lengths is None else np.zeros)(x.shape, dtype)
    gradients = {name: np.zeros(p.shape, dtype) for name, p in params.items() if not name.startswith("bias")}
    dw_ih = np.zeros((len(wx_blocks) * hidden, size.inputs), dtype)
    bias_sums = np.zeros(cell.slots * hidden, dtype)
    d_flat = np.empty(0, dtype) if d_output is None else d_output.reshape(-1)
    d_flat = _flat(d_flat)
    output, saved, x_flat = _flat(tape.output), _flat(tape.saved), _flat(x)

    total = int(rows.active.sum())
    flops = 2 * _flops(cell, size, total)
    chunks = _chunks(rows.active[::-1] if tape.reverse else rows.active, d_row * x.itemsize, flops / max(total, 1))
    most_rows = max((bases[-1] for _, _, bases in chunks), default=0)
    d = _aligned(most_rows * d_row + 2 * width, dtype)  # products read a vector behind the end
    previous = _aligned(cell.states * most_rows * size.ld, dtype)
    x_places = np.empty(most_rows, np.int64)
    parts = _parts(flops, size.batch)
    shares = [rows.share(p, parts) for p in range(parts)]
    g = [_aligned(ROWS * VECTORS * width, dtype) for _ in range(parts)]
    places = [np.empty(max(3 * size.batch, 2 * ROWS), np.int64) for _ in range(parts)]
    work = [_aligned(outer_work(VECTORS, width), dtype) for _ in range(parts)]
    tile_places = np.arange(TILE_ROWS)

    for s0, s1, bases in reversed(chunks):
        count = int(bases[-1])

        def walk(p, _, s0=s0, s1=s1, bases=bases):
            _backward_rows(
                first, second, size.inputs, wx, wh, wh2, h_slot2, h_start, tape.initial.reshape(-1), cell.states, size.ld,
                size.h, hidden, output, tape.output.shape[2], tape.column, saved, cell.tape * hidden, 4, d_flat,
                rows.order, rows.active, tape.reset, size.time, size.batch, tape.reverse, s0, s1, *shares[p], bases,
                dh, d_middle, carried, previous, d, d_row, dx.reshape(-1), len(wx_blocks), g[p], places[p], x_places,
            )  # fmt: skip

        def sum_up(p, parts, count=count):
            def add(d0, m_count, b, b_places, n_count, c):
                _weight_gradient(SOURCE, d, d0, d_row, m_count, b, b_places, count, n_count, c.reshape(-1), tile_places, work[p], p, parts)

            add(0, len(wx_blocks) * hidden, x_flat, x_places, size.inputs, dw_ih)
            row_starts = np.arange(count) * size.ld
            previous_flat = _flat(previous.view())
            h_rows = len(first.h_blocks) * hidden
            add(h_start, h_rows, previous_flat, row_starts, size.h, gradients["weight_hh"][:h_rows])
            if second is not None:
                # The second product's operand stands in the tape, at the same rows as x.
                at = x_places[:count] // max(size.inputs, 1) * (cell.tape * hidden)
                place = 2 if second.x_blocks else 5
                into = gradients["weight_hh"][h_rows:] if second.x_blocks else gradients["weight_hr"]
                add(h_slot2 * hidden, into.shape[0], saved, at + place * hidden, hidden, into)
            _bias_gradient(SOURCE, d, d_row, count, cell.slots * hidden, bias_sums, p, parts)

        threads.run(walk, parts)
        threads.run(sum_up, parts)
    return dx, _unpack_gradients(cell, params, gradients, dw_ih, bias_sums, hidden), _state_gradients(
        cell, rows, size, dh, carried
    )


def _chunks(active, row_bytes, row_flops):
    """(first step, last step, first row of each step) of the pieces between which weight gradients are summed.

    They depend on the sizes alone, so that sums are the same for any number of threads.
    """
    most = max(1, int(min(max(CHUNK_BYTES // max(row_bytes, 1), BLOCK), SLICE_FLOPS / max(row_flops, 1.0))))
    chunks, start, bases = [], 0, [0]
    for s, rows in enumerate(active.tolist()):
        bases.append(bases[-1] + rows)
        if bases[-1] >= most or s + 1 == len(active):
            chunks.append((start, s + 1, np.array(bases, np.int64)))
            start, bases = s + 1, [0]
    return chunks


def _unpack_gradients(cell, params, gradients, dw_ih, bias_sums, hidden):
    """Gradients under the parameters' names, gate blocks in their order."""
    x_blocks = [b for stage in cell.stages for b in stage.x_blocks]
    where = [x_blocks.index(b) for b in range(cell.gates)]
    dw_ih = dw_ih.reshape(cell.gates, hidden, -1)
    gradients["weight_ih"] = dw_ih[where].reshape(params["weight_ih"].shape)
    if "bias_ih" in params:
        sums = bias_sums.reshape(cell.slots, hidden)
        gradients["bias_ih"] = sums[where].reshape(-1)
        gradients["bias_hh"] = sums[cell.slots - cell.gates :].reshape(-1).copy()
    return {name: gradients[name] for name in params}


def _state_gradients(cell, rows, size, dh, carried):
    back = np.empty_like(rows.order)
    back[rows.order] = np.arange(size.batch)
    dh = dh.reshape(size.batch, size.ld)[:, : size.h]
    carried = carried.reshape(size.batch, size.ld)[:, : size.hidden]
    if cell.states == 2:
        return np.ascontiguousarray(dh[back]), np.ascontiguousarray(carried[back])
    if any(stage.carried for stage in cell.stages):
        dh = dh + carried
    return (np.ascontiguousarray(dh[back]),)


# ---- about itself


def warmup(cells=None, dtypes=("float32",), training=True) -> dict[str, float]:
    """Compile ahead, or load from the cache, the kernels of `cells` (all of them where None).

    Returns the seconds that each took, by "cell dtype".
    """
    seconds = {}
    for name in CELLS if cells is None else cells:
        for dtype in dtypes:
            start = time.perf_counter()
            cell = CELLS[name]
            shapes = {"weight_ih": (cell.gates, 1), "weight_hh": (cell.gates, 1), "bias_ih": (cell.gates,), "bias_hh": (cell.gates,)}
            if name == LSTM_PROJECTED.name:
                shapes["weight_hr"] = (1, 1)
            params = {key: np.zeros(shape, dtype) for key, shape in shapes.items()}
            state = tuple(np.zeros((1, 1), dtype) for _ in range(cell.states))
            _, _, tape = forward(name, np.zeros((1, 1, 1), dtype), params, state, training=training)
            if training:
                backward(tape, None, state)
            seconds[f"{name} {np.dtype(dtype).name}"] = time.perf_counter() - start
    return seconds


def describe() -> dict:
    """What the kernels are compiled for and where they are kept."""
    return {
        "cpu": config.CPU_NAME or binding.get_host_cpu_name(),
        **machine(),
        "lanes": {"float32": VECTOR_BITS // 32, "float64": VECTOR_BITS // 64},
        "cache": _forward_rows.stats.cache_path,
        "threads": threads.get_num_threads(),
    }
