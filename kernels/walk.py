"""The walk through time on the CPU, compiled: forward and backward of one layer in one direction, for some of its rows.

Rows (sequences) are independent of each other, so each thread walks through time with rows of its own. Rows are kept
in the order of decreasing length: those that are active at step t are the first ``active[t]`` ones, and row j is row
``order[j]`` of the caller's batch.

Within a step, a stage takes one panel of hidden units at a time: the products with x and h go into a few gate sums,
and the cell works on them while they are in the first-level cache. Buffers that belong to the walk have rows of `ld`
numbers, whole vectors, so that only the caller's arrays need care at their ends. Letters: see :mod:`fastrnn.kernels`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit
from numba.extending import register_jitable

from fastrnn.kernels.product import VECTORS, add_outer_products, clear, multiply, panels_together, rows_in_tile
from fastrnn.kernels.simd import borrowed, lanes, load, load_each, store, store_each

ROWS = 48  # rows whose gate sums are under way at a time: they stay in the first-level cache
COLUMNS = tuple(range(VECTORS))  # of a panel in a plain product
TILE_ROWS = rows_in_tile(VECTORS)
TAPE_OF_C = 4  # where LSTM's c stands in its tape

_kernel = njit(cache=True, nogil=True, error_model="numpy")


class Sizes(NamedTuple):
    """The sizes of a problem and of the rows of its buffers."""

    steps: int  # T
    batch: int
    inputs: int
    hidden: int
    h: int  # P where there is a projection, else H
    ld: int  # numbers in a row of a buffer


class Sequences(NamedTuple):
    """The caller's sequences, flat, and how to walk through them."""

    x: np.ndarray  # [T, B, I]
    output: np.ndarray  # [T, B, output_row], of which h columns from `column` on are this direction's
    output_row: int
    column: int
    tape: np.ndarray  # [T, B, tape, H]; empty where there is to be none
    tape_row: int
    order: np.ndarray  # [B]
    active: np.ndarray  # [T]
    reset: np.ndarray  # [T, B]; empty where there are none
    reverse: bool


class Weights(NamedTuple):
    """Of one stage, packed in panels."""

    x: np.ndarray
    h: np.ndarray
    bias: np.ndarray


class Sums(NamedTuple):
    """A thread's scratch for the forward walk."""

    ahead: int  # steps whose products with x are made together; 0: each step makes its own
    first: np.ndarray  # gate sums [row][panel][slot][unit], of `ahead` steps or of one panel
    second: np.ndarray  # the same of a second stage, of one panel
    x: np.ndarray  # places of rows in x,
    output: np.ndarray  # in output,
    tape: np.ndarray  # in tape,
    values: np.ndarray  # and in the walk's own buffers


class Way(NamedTuple):
    """Buffers of the way back, over all rows."""

    dh: np.ndarray  # [B, ld]: gradient of h after the step that comes next
    middle: np.ndarray  # [B, ld]: gradient of what a first stage hands to a second
    carried: np.ndarray  # [B, ld]: gradient that goes back by itself
    initial: np.ndarray  # [states, B, ld]
    previous: np.ndarray  # [states, Q, ld]: states before each step of the chunk
    d: np.ndarray  # [Q, d_row]: gate gradients of the chunk
    d_row: int
    numbers: np.ndarray  # [Q]: t * B + b of each row
    bases: np.ndarray  # row j of step s is row bases[s - s0] + j of the chunk


@register_jitable
def time_of(walk, size, s):
    """The time step that is computed as number s."""
    return size.steps - 1 - s if walk.reverse else s


@register_jitable
def rows_at(walk, t, row0, row1):
    """How many of the rows row0 to row1 are active at time t."""
    return max(0, min(walk.active[t], row1) - row0)


@register_jitable
def is_reset(walk, number):
    return len(walk.reset) > 0 and walk.reset[number]


# ---- forward


@register_jitable
def _fill(g, at, bias, bias_at, count):
    for j in range(0, count, lanes(g)):
        store(g, at + j, load(bias, bias_at + j, lanes(g)), lanes(g))


@register_jitable
def _project_ahead(stage, size, walk, weights, s, s1, row0, row1, sums):
    """Gate sums bias + W_ih x for the steps s to s1, row after row."""
    width = lanes(sums.first)
    rows = 0
    for s2 in range(s, s1):
        t = time_of(walk, size, s2)
        for row in range(row0, row0 + rows_at(walk, t, row0, row1)):
            sums.x[rows] = (t * size.batch + walk.order[row]) * size.inputs
            rows += 1
    panel = len(stage.slots) * stage.units * width
    panels = (size.hidden + stage.units * width - 1) // (stage.units * width)
    w_panel = size.inputs * len(stage.x_columns) * width
    for p in range(panels):
        for r in range(rows):
            _fill(sums.first, (r * panels + p) * panel, weights.bias, p * panel, panel)
        multiply(
            stage.x_columns,
            rows,
            1,
            walk.x,
            0,
            sums.x,
            0,
            weights.x,
            p * w_panel,
            0,
            size.inputs,
            sums.first,
            p * panel,
            panels * panel,
            0,
        )


@register_jitable
def _forward_stage(
    stage, results, k_count, size, walk, weights, values, before, now, row0, rows, g, projected, places, sums
):
    """One stage of one step, with `results` hidden units, for `rows` rows from row0 on: products, then the cell.

    Row r's sums bias + W_ih x stand in row projected + r of g; where projected < 0 they are made here, at places[r]
    of x.
    """
    width = lanes(g)
    value_size = 2 * size.batch * size.ld
    panel_units = stage.units * width
    panel = len(stage.slots) * panel_units
    panels = (results + panel_units - 1) // panel_units
    x_panel = size.inputs * len(stage.x_columns) * width
    h_panel = k_count * len(stage.h_columns) * width
    h_start = (len(stage.slots) - len(stage.h_blocks)) * panel_units
    operand = before if stage.operand == 0 else now + stage.operand * value_size
    together = panels_together(rows, len(stage.h_columns))
    p = 0
    while p < panels:
        count = together if p + together <= panels else 1
        for r0 in range(0, rows, ROWS):
            n = min(ROWS, rows - r0)
            g0, g_row = ((projected + r0) * panels + p) * panel, panels * panel
            if projected < 0:
                g0, g_row = 0, count * panel
                for r in range(n):
                    _fill(g, r * g_row, weights.bias, p * panel, g_row)
                if len(stage.x_blocks) > 0:
                    multiply(
                        stage.x_columns,
                        n,
                        count,
                        walk.x,
                        0,
                        places,
                        r0,
                        weights.x,
                        p * x_panel,
                        x_panel,
                        size.inputs,
                        g,
                        g0,
                        g_row,
                        panel,
                    )
            multiply(
                stage.h_columns,
                n,
                count,
                values,
                operand,
                sums.values,
                row0 + r0,
                weights.h,
                p * h_panel,
                h_panel,
                k_count,
                g,
                g0 + h_start,
                g_row,
                panel,
            )
            for r in range(n):
                for i in range(count * stage.units):
                    unit = p * panel_units + i * width
                    left = results - unit
                    if left > 0:
                        at = g0 + r * g_row + i // stage.units * panel + i % stage.units * width
                        place = (row0 + r0 + r) * size.ld + unit
                        gates = load_each(g, at, stage.slots, panel_units, width)
                        state = load_each(values, before + place, stage.reads, value_size, width)
                        handed = load_each(values, now + place, stage.reads_now, value_size, width)
                        new, saved = stage.forward(gates, state + handed)
                        store_each(values, now + place, stage.results, value_size, new, width)
                        if stage.gives_h:
                            store(walk.output, sums.output[r0 + r] + unit, new[0], left)
                        if len(walk.tape) > 0:
                            store_each(walk.tape, sums.tape[r0 + r] + unit, stage.saves, size.hidden, saved, left)
        p += count


@register_jitable
def _leave(size, values, value_size, now, states, final, row0, row1):
    """Rows row0 to row1 end here: keep their state."""
    for v in range(states):
        for i in range(row0 * size.ld, row1 * size.ld):
            final[v * size.batch * size.ld + i] = values[v * value_size + now + i]


@_kernel
def forward_rows(first, second, size, walk, weights, weights2, states, values, final, sums, s0, s1, row0, row1):
    """Steps s0 to s1 of rows row0 to row1. Is modified: values, final, sums, walk.output, walk.tape.

    values [V, 2, B, ld] holds each state, and each value that one stage hands to the next, before and after the step in
    turn; final [states, B, ld] the states that rows end with.
    """
    walk, sums, values, final = borrowed(walk), borrowed(sums), borrowed(values), borrowed(final)
    weights, weights2 = borrowed(weights), borrowed(weights2)
    slot, value_size = size.batch * size.ld, 2 * size.batch * size.ld
    for row in range(size.batch):
        sums.values[row] = row * size.ld
    projected, projected_until = 0, s0
    for s in range(s0, s1):
        t = time_of(walk, size, s)
        rows = rows_at(walk, t, row0, row1)
        if rows == 0:
            continue
        before, now = (s & 1) * slot, (1 - (s & 1)) * slot
        if sums.ahead > 0 and s >= projected_until:
            projected, projected_until = 0, min(s + sums.ahead, s1)
            _project_ahead(first, size, walk, weights, s, projected_until, row0, row1, sums)
        for r in range(rows):
            number = t * size.batch + walk.order[row0 + r]
            sums.output[r] = number * walk.output_row + walk.column
            sums.tape[r] = number * walk.tape_row
            if sums.ahead == 0:
                sums.x[r] = number * size.inputs
            if is_reset(walk, number):
                for v in range(states):
                    clear(values, v * value_size + before + (row0 + r) * size.ld, size.ld)
        here = projected if sums.ahead > 0 else -1
        _forward_stage(
            first,
            size.hidden,
            size.h,
            size,
            walk,
            weights,
            values,
            before,
            now,
            row0,
            rows,
            sums.first,
            here,
            sums.x,
            sums,
        )
        if second is not None:
            _forward_stage(
                second,
                size.h,
                size.hidden,
                size,
                walk,
                weights2,
                values,
                before,
                now,
                row0,
                rows,
                sums.second,
                -1,
                sums.x[max(here, 0) :],
                sums,
            )
        projected += rows
        still = 0
        if walk.reverse:
            still = rows if t > 0 else 0
        elif t + 1 < size.steps:
            still = rows_at(walk, t + 1, row0, row1)
        _leave(size, values, value_size, now, states, final, row0 + still, row0 + rows)


# ---- backward


@register_jitable
def _multiply_panels(a, a0, places, rows, w, k_count, c, c0, c_row, n_count):
    """C[row] += A[row] W for all panels of a plain product."""
    width = VECTORS * lanes(c)
    for p in range((n_count + width - 1) // width):
        multiply(COLUMNS, rows, 1, a, a0, places, 0, w, p * k_count * width, 0, k_count, c, c0 + p * width, c_row, 0)


@register_jitable
def _gather_previous(size, walk, states, way, t, row, q):
    """The state before time t of a row: what it was reset to, begins with, or came out of the step before."""
    b = walk.order[row]
    ends = t + 1 == size.steps or row >= walk.active[t + 1]
    begins = ends if walk.reverse else t == 0
    earlier = (t + 1 if walk.reverse else t - 1) * size.batch + b
    for v in range(states):
        to = (v * len(way.numbers) + q) * size.ld
        if is_reset(walk, t * size.batch + b):
            clear(way.previous, to, size.ld)
        elif begins:
            _copy(way.initial, (v * size.batch + row) * size.ld, way.previous, to, size.ld)
        elif v == 0:
            _copy(walk.output, earlier * walk.output_row + walk.column, way.previous, to, size.h)
        else:
            _copy(walk.tape, earlier * walk.tape_row + TAPE_OF_C * size.hidden, way.previous, to, size.hidden)


@register_jitable
def _copy(source, at, target, to, count):
    for j in range(0, count, lanes(source)):
        store(target, to + j, load(source, at + j, count - j), count - j)


@register_jitable
def _backward_stage(stage, results, size, walk, way, dh, d_output, d_column, rows, row0, q0):
    """Gate gradients of one stage of one step, from the gradient dh of its `results` results, into way.d (is
    modified).
    """
    width = lanes(way.d)
    for r in range(rows):
        row, q = row0 + r, q0 + r
        number = way.numbers[q]
        for unit in range(0, results, width):
            left = results - unit
            gradient = load(dh, row * size.ld + unit, width)
            if len(d_output) > 0:
                gradient = gradient + load(d_output, number * size.h + unit, left)
            carried = load_each(way.carried, row * size.ld + unit, stage.carried_places, 0, width)
            saved = load_each(walk.tape, number * walk.tape_row + unit, stage.saved, size.hidden, left)
            state = load_each(way.previous, q * size.ld + unit, stage.state, len(way.numbers) * size.ld, width)
            dgates, carried = stage.backward(gradient, carried, saved, state)
            store_each(way.d, q * way.d_row + d_column + unit, stage.dgates, size.hidden, dgates, left)
            store_each(way.carried, row * size.ld + unit, stage.carried_places, 0, carried, width)


@_kernel
def backward_rows(
    first,
    second,
    size,
    walk,
    states,
    way,
    wx,
    x_rows,
    wh,
    h_column,
    wh2,
    h_column2,
    d_output,
    dx,
    g,
    places,
    s0,
    s1,
    row0,
    row1,
):
    """Steps s1 - 1 down to s0 of rows row0 to row1. Is modified: way, dx, and the scratch arrays g and places.

    wh and wh2 are the packed weights of the stages' products with h, whose gate gradients begin at the columns
    h_column and h_column2 of way.d; the x_rows first columns are those of wx.
    """
    walk, way, wx, wh, wh2 = borrowed(walk), borrowed(way), borrowed(wx), borrowed(wh), borrowed(wh2)
    d_output, dx, g, places = borrowed(d_output), borrowed(dx), borrowed(g), borrowed(places)
    for s in range(s1 - 1, s0 - 1, -1):
        t = time_of(walk, size, s)
        rows = rows_at(walk, t, row0, row1)
        if rows == 0:
            continue
        q0 = way.bases[s - s0] + row0
        for r in range(rows):
            way.numbers[q0 + r] = t * size.batch + walk.order[row0 + r]
            places[r] = (q0 + r) * way.d_row
            _gather_previous(size, walk, states, way, t, row0 + r, q0 + r)
        to = row0 * size.ld
        if second is None:
            _backward_stage(first, size.hidden, size, walk, way, way.dh, d_output, 0, rows, row0, q0)
        else:
            d_column = 0 if len(second.x_blocks) > 0 else h_column2
            _backward_stage(second, size.h, size, walk, way, way.dh, d_output, d_column, rows, row0, q0)
            clear(way.middle, to, rows * size.ld)
            _multiply_panels(way.d, h_column2, places, rows, wh2, size.h, way.middle, to, size.ld, size.hidden)
            _backward_stage(first, size.hidden, size, walk, way, way.middle, d_output[:0], 0, rows, row0, q0)
        if first.carries_h:
            _copy(way.carried, to, way.dh, to, rows * size.ld)
        else:
            clear(way.dh, to, rows * size.ld)
        _multiply_panels(
            way.d, h_column, places, rows, wh, len(first.h_blocks) * size.hidden, way.dh, to, size.ld, size.h
        )
        for r in range(rows):
            if is_reset(walk, way.numbers[q0 + r]):
                clear(way.dh, to + r * size.ld, size.ld)
                clear(way.carried, to + r * size.ld, size.ld)
    _backward_inputs(size, walk, way, wx, x_rows, dx, g, places, s0, s1, row0, row1)


@register_jitable
def _backward_inputs(size, walk, way, wx, x_rows, dx, g, places, s0, s1, row0, row1):
    """dx = d W_ih for the rows row0 to row1 of the steps s0 to s1, ROWS of them at a time."""
    for p in range((size.inputs + VECTORS * lanes(g) - 1) // (VECTORS * lanes(g))):
        count = 0
        for s in range(s0, s1):
            rows = rows_at(walk, time_of(walk, size, s), row0, row1)
            for q in range(way.bases[s - s0] + row0, way.bases[s - s0] + row0 + rows):
                places[count] = q * way.d_row
                places[ROWS + count] = way.numbers[q] * size.inputs
                count += 1
                if count == ROWS:
                    _input_rows(size, way, wx, x_rows, dx, g, places, count, p)
                    count = 0
        _input_rows(size, way, wx, x_rows, dx, g, places, count, p)


@register_jitable
def _input_rows(size, way, wx, x_rows, dx, g, places, rows, p):
    """Panel p of dx for the rows at `places`."""
    width = VECTORS * lanes(g)
    clear(g, 0, rows * width)
    multiply(COLUMNS, rows, 1, way.d, 0, places, 0, wx, p * x_rows * width, 0, x_rows, g, 0, width, 0)
    for r in range(rows):
        _copy(g, r * width, dx, places[ROWS + r] + p * width, min(width, size.inputs - p * width))


@_kernel
def weight_gradient(source, d, d0, d_row, m_count, b, places, rows, n_count, c, tile_places, work, part, parts):
    """Add D^T B to c [M, N] (is modified): this part's rows of c, so that each sum is made by one thread."""
    tiles = (m_count + TILE_ROWS - 1) // TILE_ROWS
    m0, m1 = tiles * part // parts * TILE_ROWS, min(m_count, tiles * (part + 1) // parts * TILE_ROWS)
    if m1 > m0:
        add_outer_products(COLUMNS, d, d0, d_row, m0, m1, b, places, rows, n_count, c, tile_places, work)


@_kernel
def bias_gradient(source, d, d_row, rows, count, total, part, parts):
    """Add the sum of D's rows to total (is modified): this part's columns."""
    width = lanes(d)
    vectors = (count + width - 1) // width
    for v in range(vectors * part // parts, vectors * (part + 1) // parts):
        n = count - v * width
        sums = load(d, v * width, 0)
        for q in range(rows):
            sums = sums + load(d, q * d_row + v * width, n)
        store(total, v * width, load(total, v * width, n) + sums, n)
