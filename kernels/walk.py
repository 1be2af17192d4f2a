"""The walk through time on the CPU, compiled: forward and backward of one layer in one direction, for some of its rows.

Rows (sequences) are independent of each other, so each thread walks through time with rows of its own; where there are
few rows, threads share the hidden units of one walk instead (:mod:`fastrnn.kernels.barrier`). Rows are kept in the
order of decreasing length: those that are active at step t are the first ``active[t]`` ones, and row j is row
``order[j]`` of the caller's batch.

Within a step, a stage takes one panel of hidden units at a time: the products with x and h go into a few gate sums,
and the cell works on them while they are in the first-level cache. Buffers that belong to the walk have rows of `ld`
numbers, whole vectors, so that only the caller's arrays need care at their ends. Letters: see :mod:`fastrnn.kernels`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from fastrnn.kernels import records
from fastrnn.kernels.barrier import LEAVE, TOGETHER
from fastrnn.kernels.cells import TAPE_OF_C
from fastrnn.kernels.lean import kernel, register_jitable
from fastrnn.kernels.meeting import close, invite, join, meet
from fastrnn.kernels.packing import checksum_at
from fastrnn.kernels.product import add_outer_products, clear, multiply, panels_together
from fastrnn.kernels.records import CHANGED, DONE, HEAD, Back, Crew, Scratch, Sequences, Sizes, Weights
from fastrnn.kernels.simd import (
    first_of,
    flags_at,
    given,
    integers_at,
    lanes,
    load,
    load_each,
    numbers_at,
    pick,
    prefetch,
    record_at,
    spread,
    store,
    store_each,
)
from fastrnn.kernels.tiles import ROWS, TILE_ROWS, VECTOR_BITS, VECTORS

AHEAD_ALONE = 4  # steps whose products with x a thread makes ahead that may soon share the work
COLUMNS = tuple(range(VECTORS))  # of a panel in a plain product


class Step(NamedTuple):
    """One step of some rows."""

    before: int  # where in `values` the states before the step begin,
    now: int  # and those after it
    row0: int
    rows: int


class Way(NamedTuple):
    """Buffers of the way back, over all rows; gradients of states have slots as the states have."""

    dh: np.ndarray  # [slots, B, ld]: gradient of h before a step
    middle: np.ndarray  # [slots, B, ld]: gradient of what a first stage hands to a second
    carried: np.ndarray  # [slots, B, ld]: gradient that goes back by itself
    initial: tuple  # the states [B, .] before step `start`, in the caller's order
    start: int
    d_final: tuple  # gradients of the final states [B, .], in the caller's order; empty for 0
    d_initial: tuple  # and of the initial ones
    previous: np.ndarray  # [states, Q, ld]: states before each step of the chunk
    masked: np.ndarray  # [operands, Q, ld]: where there are masks, what the products multiplied, of all stages
    d: np.ndarray  # [Q, d_row]: gate gradients of the chunk
    d_row: int
    numbers: np.ndarray  # [Q]: t * B + b of each row
    chunk_rows: int  # Q
    bases: np.ndarray  # row j of step s is row bases[s - s0] + j of the chunk


@register_jitable
def time_of(walk, size, s):
    """The time step that is computed as number s."""
    return size.steps - 1 - s if walk.reverse else s


@register_jitable
def rows_at(walk, size, t, row0, row1):
    """How many of the rows row0 to row1 are active at time t."""
    return max(0, min(walk.active[t] if given(walk.active) else size.batch, row1) - row0)


@register_jitable
def number_of(walk, size, t, row):
    """Which of the caller's T * B rows is row `row` at time t."""
    return t * size.batch + (walk.order[row] if given(walk.order) else row)


@register_jitable
def is_reset(walk, number):
    return given(walk.reset) and walk.reset[number] != 0


@register_jitable
def _mask(masks, size, walk, row, source, at, target, to, apart, count):
    """target[to + i * apart] = source[at] times the row's mask number masks[i], for each of a stage's masks."""
    if masks is None:
        return  # and nothing of what follows is compiled
    width = lanes(source)
    for i in range(len(masks)):
        mask = (masks[i] * size.batch + row) * size.ld
        for j in range(0, count, width):
            value = load(source, at + j, count - j) * load(walk.masks, mask + j, width)
            store(target, to + i * apart + j, value, width)


# ---- forward


@register_jitable
def _fill(g, at, bias, bias_at, count):
    for j in range(0, count, lanes(g)):
        store(g, at + j, load(bias, bias_at + j, lanes(g)), lanes(g))


@register_jitable
def _panels(stage, results, width):
    return (results + stage.units * width - 1) // (stage.units * width)


@register_jitable
def _project_ahead(stage, size, walk, weights, scratch, s, s1, row0, row1, p0, p1):
    """Gate sums bias + W_ih x of the panels p0 to p1 for the steps s to s1, row after row."""
    width = lanes(scratch.first)
    rows = 0
    for s2 in range(s, s1):
        t = time_of(walk, size, s2)
        for row in range(row0, row0 + rows_at(walk, size, t, row0, row1)):
            scratch.places[rows] = number_of(walk, size, t, row) * size.inputs
            rows += 1
    panel = len(stage.slots) * stage.units * width
    panels = _panels(stage, size.hidden, width)
    w_panel = size.inputs * len(stage.x_columns) * width
    for p in range(p0, p1):
        for r in range(rows):
            _fill(scratch.first, (r * panels + p) * panel, weights.packed, weights.bias + p * panel, panel)
        multiply(
            stage.x_columns, rows, 1, walk.x, (0,), scratch.places, 0, weights.packed, p * w_panel, 0, size.inputs,
            scratch.first, p * panel, panels * panel, 0,
        )  # fmt: skip


@register_jitable
def _forward_stage(
    stage, results, k_count, size, walk, weights, values, step, g, projected, places, place, scratch, p0, p1
):
    """The panels p0 to p1 of one stage of one step, with `results` hidden units: products, then the cell.

    Row r's sums bias + W_ih x stand in row projected + r of g; where projected < 0 they are made here, from x at
    places[place + r].
    """
    width = lanes(g)
    value_size = size.slots * size.batch * size.ld
    panel_units = stage.units * width
    panel = len(stage.slots) * panel_units
    panels = _panels(stage, results, width)
    x_panel = size.inputs * len(stage.x_columns) * width
    h_panel = k_count * len(stage.h_columns) * width
    h_start = (len(stage.slots) - len(stage.h_blocks)) * panel_units
    operand, operand_at, apart = values, step.row0 * size.ld, 0
    operand_at += step.before if stage.operand == 0 else step.now + stage.operand * value_size
    if stage.masked:
        apart = step.rows * size.ld
        for r in range(step.rows):
            at = operand_at + r * size.ld
            _mask(stage.masks, size, walk, step.row0 + r, values, at, scratch.masked, r * size.ld, apart, k_count)
        operand, operand_at = scratch.masked, 0
    operands = spread(stage.operands, operand_at, apart)
    together = panels_together(step.rows, len(stage.h_columns))
    p = p0
    while p < p1:
        count = together if p + together <= p1 else 1
        for r0 in range(0, step.rows, ROWS):
            n = min(ROWS, step.rows - r0)
            g0, g_row = ((projected + r0) * panels + p) * panel, panels * panel
            if projected < 0:
                g0, g_row = 0, count * panel
                for r in range(n):
                    _fill(g, r * g_row, weights.packed, weights.bias + p * panel, g_row)
                if len(stage.x_blocks) > 0:
                    multiply(
                        stage.x_columns, n, count, walk.x, (0,), places, place + r0, weights.packed, p * x_panel,
                        x_panel, size.inputs, g, g0, g_row, panel,
                    )  # fmt: skip
            multiply(
                stage.h_columns, n, count, operand, operands, scratch.places, scratch.buffer + r0, weights.packed,
                weights.h + p * h_panel, h_panel, k_count, g, g0 + h_start, g_row, panel,
            )  # fmt: skip
            for r in range(n):
                for i in range(count * stage.units):
                    unit = p * panel_units + i * width
                    left = results - unit
                    if left > 0:
                        at = g0 + r * g_row + i // stage.units * panel + i % stage.units * width
                        place_now = (step.row0 + r0 + r) * size.ld + unit
                        gates = load_each(g, at, stage.slots, panel_units, width)
                        state = load_each(values, step.before + place_now, stage.reads, value_size, width)
                        handed = load_each(values, step.now + place_now, stage.reads_now, value_size, width)
                        new, saved = stage.forward(gates, state + handed)
                        store_each(values, step.now + place_now, stage.results, value_size, new, width)
                        if stage.gives_h:
                            store(walk.output, scratch.places[scratch.output + r0 + r] + unit, new[0], left)
                        if given(walk.tape):
                            at = scratch.places[scratch.tape + r0 + r] + unit
                            store_each(walk.tape, at, stage.saves, size.hidden, saved, left)
        p += count


@register_jitable
def _begin(size, walk, initial, values, s, row0, row1):
    """Put the initial states of the rows row0 to row1 into step s's slot; in reverse, where a row may begin at any
    later step, into every slot.
    """
    for v in range(len(initial)):
        count = size.h if v == 0 else size.hidden
        for row in range(row0, row1):
            source = number_of(walk, size, 0, row) * count
            for s2 in range(s, s + (size.slots if walk.reverse else 1)):
                place = ((v * size.slots + s2 % size.slots) * size.batch + row) * size.ld
                _copy(pick(initial, v), source, values, place, count)


@register_jitable
def _clear_padding(array, array_row, column, count, size, walk, row0, row1):
    """array[t, b, column : column + count] = 0 beyond the lengths of the rows row0 to row1."""
    for t in range(size.steps if given(walk.active) else 0):
        for row in range(row0 + rows_at(walk, size, t, row0, row1), row1):
            clear(array, number_of(walk, size, t, row) * array_row + column, count)


@register_jitable
def _leave(size, walk, values, now, final, row0, row1):
    """Rows row0 to row1 end here: keep their states."""
    for v in range(len(final)):
        count = size.h if v == 0 else size.hidden
        for row in range(row0, row1):
            place = v * size.slots * size.batch * size.ld + now + row * size.ld
            _copy(values, place, pick(final, v), number_of(walk, size, 0, row) * count, count)


@register_jitable
def _find(size, walk, values, scratch, states, t, step):
    """Where the rows stand that take part in a step; states that are reset become 0."""
    for r in range(step.rows):
        number = number_of(walk, size, t, step.row0 + r)
        scratch.places[scratch.output + r] = number * walk.output_row + walk.column
        scratch.places[scratch.tape + r] = (number - walk.tape_start * size.batch) * walk.tape_row
        if scratch.ahead == 0:
            scratch.places[r] = number * size.inputs
        if is_reset(walk, number):
            for v in range(states):
                place = v * size.slots * size.batch * size.ld + step.before + (step.row0 + r) * size.ld
                clear(values, place, size.ld)


@register_jitable
def _fetch(values, start, count):
    """Have what other cores have written on its way, all at once."""
    for i in range(0, count, 64 // 8):
        prefetch(values, start + i)


@register_jitable
def _still_active(size, walk, s, rows, row0, row1):
    """How many of a step's rows have a next one."""
    if s + 1 == size.steps:
        return 0
    return rows if walk.reverse else rows_at(walk, size, s + 1, row0, row1)


_forward_at, _backward_at = record_at(records.FORWARD), record_at(records.BACKWARD)


@kernel
def forward(first, second, record):
    """Steps s0 to s1 of some rows and hidden units, which `parts` threads share.

    Returns DONE, or CHANGED if the parameters or the arrays' sizes are not what the record was made for; nothing is
    done then. x is an array object of (T * B, I); h and c, the states that a walk `begins` with at s0, and h_final and
    c_final are objects of (1, B, .). Is modified: output, the final states, and what the record names.
    """
    r = _forward_at(record)
    size = Sizes(r.steps, r.batch, r.inputs, r.hidden, r.h, r.ld, r.slots)
    if not _fit(first, r, size):
        return CHANGED
    if r.begins != 0 and r.checksum != 0 and checksum_at(first, r.params, r.counts) != r.checksum:
        return CHANGED
    initial = first_of(first.states, (_data(first, r.h_initial), _data(first, r.c_initial)))
    final = first_of(first.states, (_data(first, r.h_final), _data(first, r.c_final)))
    walk = Sequences(
        _data(first, r.x), _data(first, r.output), r.output_row, r.column, numbers_at(first, r.tape), r.tape_row,
        r.tape_start, integers_at(r.order), integers_at(r.active), flags_at(r.reset), r.reverse != 0,
        numbers_at(first, r.masks),
    )  # fmt: skip
    weights = Weights(numbers_at(first, r.packed[0]), r.packed_h[0], r.packed_bias[0])
    weights2 = Weights(numbers_at(first, r.packed[1]), r.packed_h[1], r.packed_bias[1])
    scratch = Scratch(
        r.ahead, numbers_at(first, r.sums[0]), numbers_at(first, r.sums[1]), numbers_at(first, r.masked),
        integers_at(r.places), r.buffer_places, r.output_places, r.tape_places,
    )  # fmt: skip
    crew = Crew(r.row0, r.row1, r.part, r.parts, integers_at(r.sync))
    _forward_rows(
        first, second, size, walk, weights, weights2, initial, final, numbers_at(first, r.values), scratch, crew,
        r.begins != 0, r.s0, r.s1,
    )  # fmt: skip
    return DONE


# An array object begins, behind what all Python objects begin with, with: the address of its numbers, how many axes it
# has, the addresses of its shape and of its strides.


@register_jitable
def _data(like, array):
    """The numbers of an array object, at its address; none where there is no object."""
    return numbers_at(like, integers_at(array + HEAD)[0] if array != 0 else 0)


@register_jitable
def _fit(first, r, size):
    """Whether the caller's arrays have the sizes that the record was made for."""
    if not _in_order(first, r.x, 0, size.steps * size.batch, size.inputs):
        return False
    fit = _in_order(first, r.h_initial, 1, size.batch, size.h)
    return fit and (len(first.states) == 1 or _in_order(first, r.c_initial, 1, size.batch, size.hidden))


@register_jitable
def _in_order(like, array, axis, rows, columns):
    """Whether an array object has that shape, from `axis` on, and is contiguous; axes before are of length 1."""
    words = integers_at(array + HEAD)
    shape, strides = integers_at(words[2]), integers_at(words[3])
    itemsize = VECTOR_BITS // 8 // lanes(numbers_at(like, 0))
    n, m, row, item = shape[axis], shape[axis + 1], strides[axis], strides[axis + 1]
    fits = n == rows and m == columns and (axis == 0 or shape[0] == 1)
    return fits and (item == itemsize or m == 1) and (row == m * itemsize or n == 1)


@register_jitable
def _forward_rows(first, second, size, walk, weights, weights2, initial, final, values, scratch, crew, begins, s0, s1):
    """As `forward`. values [V, slots, B, ld] holds each state, and each value that one stage hands to the next,
    before and after a step.
    """
    slot, width = size.batch * size.ld, lanes(values)
    row0, row1, parts = crew.row0, crew.row1, crew.parts
    panels = _panels(first, size.hidden, width)
    for r in range(row1 - row0):
        scratch.places[scratch.buffer + r] = r * size.ld
    part, share = 0, 1  # this thread's part of the work on a step, and how many share it
    start = s0
    if crew.part > 0:
        start = join(crew.sync)
        part, share = crew.part, parts
        if start < 0:
            return
    elif begins:
        _begin(size, walk, initial, values, s0, row0, row1)
        _clear_padding(walk.output, walk.output_row, walk.column, size.h, size, walk, row0, row1)
    projected, projected_until = 0, start
    for s in range(start, s1):
        if share < parts and crew.part == 0 and part == 0 and invite(crew.sync, parts, s):
            share = parts
        t = time_of(walk, size, s)
        rows = rows_at(walk, size, t, row0, row1)
        if rows == 0:
            continue
        step = Step(s % size.slots * slot, (s + 1) % size.slots * slot, row0, rows)
        _find(size, walk, values, scratch, len(initial), t, step)
        while True:  # once; or once more, by a thread that goes on alone
            if scratch.ahead > 0 and s >= projected_until:
                ahead = scratch.ahead if share == parts else min(scratch.ahead, AHEAD_ALONE)
                projected, projected_until = 0, min(s + ahead, s1)
                _project_ahead(
                    first, size, walk, weights, scratch, s, projected_until, row0, row1, panels * part // share,
                    panels * (part + 1) // share,
                )  # fmt: skip
            here = projected if scratch.ahead > 0 else -1
            _forward_stage(
                first, size.hidden, size.h, size, walk, weights, values, step, scratch.first, here, scratch.places, 0,
                scratch, panels * part // share, panels * (part + 1) // share,
            )  # fmt: skip
            met = meet(crew.sync, crew.part, parts, 2 * s) if share > 1 else TOGETHER
            if met == TOGETHER:
                break
            if met == LEAVE:
                return
            part, share, projected_until = 0, 1, s
        while second is not None:
            panels2 = _panels(second, size.h, width)
            _forward_stage(
                second, size.h, size.hidden, size, walk, weights2, values, step, scratch.second, -1, scratch.places,
                max(here, 0), scratch, panels2 * part // share, panels2 * (part + 1) // share,
            )  # fmt: skip
            met = meet(crew.sync, crew.part, parts, 2 * s + 1) if share > 1 else TOGETHER
            if met == TOGETHER:
                break
            if met == LEAVE:
                return
            part, share, projected_until = 0, 1, s + 1
        if share > 1:
            for r in range(rows):
                _fetch(values, step.now + (row0 + r) * size.ld, size.h)
        projected += rows
        still = _still_active(size, walk, s, rows, row0, row1)
        _leave(size, walk, values, step.now, final, row0 + still, row0 + rows)
    if crew.part == 0 and parts > 1:
        close(crew.sync)


# ---- backward


@register_jitable
def _multiply_panels(a, a0, places, rows, w, k_count, c, c0, c_row, p0, p1):
    """C[row] += A[row] W for the panels p0 to p1 of a plain product."""
    width = VECTORS * lanes(c)
    for p in range(p0, p1):
        multiply(COLUMNS, rows, 1, a, (a0,), places, 0, w, p * k_count * width, 0, k_count, c, c0 + p * width, c_row, 0)


@register_jitable
def _gather_previous(size, walk, way, s, row, q):
    """The state before step s of a row: what it was reset to, begins with, or came out of the step before."""
    t = time_of(walk, size, s)
    number = number_of(walk, size, t, row)
    ends = t + 1 == size.steps or row >= rows_at(walk, size, t + 1, 0, size.batch)
    begins = s == way.start or (walk.reverse and ends)
    earlier = number + (size.batch if walk.reverse else -size.batch)
    for v in range(len(way.initial)):
        to = (v * way.chunk_rows + q) * size.ld
        count = size.h if v == 0 else size.hidden
        if is_reset(walk, number):
            clear(way.previous, to, size.ld)
        elif begins:
            _copy(pick(way.initial, v), (number - t * size.batch) * count, way.previous, to, count)
        elif v == 0:
            _copy(walk.output, earlier * walk.output_row + walk.column, way.previous, to, count)
        else:
            at = (earlier - walk.tape_start * size.batch) * walk.tape_row + TAPE_OF_C * size.hidden
            _copy(walk.tape, at, way.previous, to, count)


@register_jitable
def _gather_operands(first, second, size, walk, way, row, q):
    """What the products with masks have multiplied at a step of a row."""
    apart = way.chunk_rows * size.ld
    if first.masked:
        _mask(first.masks, size, walk, row, way.previous, q * size.ld, way.masked, q * size.ld, apart, size.h)
    if second is not None and second.masked:  # what the first stage handed over stands in its tape
        at = (way.numbers[q] - walk.tape_start * size.batch) * walk.tape_row + first.saves[-1] * size.hidden
        to = len(first.operands) * apart + q * size.ld
        _mask(second.masks, size, walk, row, walk.tape, at, way.masked, to, apart, size.hidden)


@register_jitable
def _copy(source, at, target, to, count):
    for j in range(0, count, lanes(source)):
        store(target, to + j, load(source, at + j, count - j), count - j)


@register_jitable
def _backward_stage(
    stage, results, size, walk, way, dh, dh_at, carried_at, d_output, asked, d_column, step, q0, u0, u1
):
    """Gate gradients of one stage of one step, from the gradient `dh` of its `results` results, into way.d (is
    modified): the units u0 to u1. Gradients that are carried go from carried_at to step.now. d_output is added if it
    is `asked` for this stage.
    """
    width = lanes(way.d)
    for r in range(step.rows):
        q = q0 + r
        number = way.numbers[q]
        for unit in range(u0, min(u1, results), width):
            left = results - unit
            place = (step.row0 + r) * size.ld + unit
            gradient = load(dh, dh_at + place, width)
            if asked and given(d_output):
                gradient = gradient + load(d_output, number * size.h + unit, left)
            at = (number - walk.tape_start * size.batch) * walk.tape_row + unit
            carried = load_each(way.carried, carried_at + place, stage.carried_places, 0, width)
            saved = load_each(walk.tape, at, stage.saved, size.hidden, left)
            state = load_each(way.previous, q * size.ld + unit, stage.state, way.chunk_rows * size.ld, width)
            dgates, carried = stage.backward(gradient, carried, saved, state)
            store_each(way.d, q * way.d_row + d_column + unit, stage.dgates, size.hidden, dgates, left)
            store_each(way.carried, step.now + place, stage.carried_places, 0, carried, width)


@register_jitable
def _hand_back(stage, size, walk, way, back, g, places, step, q0, p0, p1):
    """The gradient of h before a step: the panels p0 to p1 of d W_hh, and what is carried.

    The sums are made in g, this thread's own, and only then written: another thread may be writing the same. With
    masks, those of each of the product's operands are made by themselves, behind the total.
    """
    width = VECTORS * lanes(g)
    share = back.count // len(stage.operands)
    for p in range(p0, p1):
        for r0 in range(0, step.rows, ROWS):
            n = min(ROWS, step.rows - r0)
            to = step.now + (step.row0 + r0) * size.ld + p * width
            for r in range(n):
                places[r] = (q0 + r0 + r) * way.d_row
                if stage.carries_h:
                    _copy(way.carried, to + r * size.ld, g, r * width, width)
            if not stage.carries_h:
                clear(g, 0, n * width)
            sums = n * width if stage.masked else 0
            for i in range(len(stage.operands)):
                if stage.masked:
                    clear(g, sums, n * width)
                multiply(
                    COLUMNS, n, 1, way.d, (back.column + i * share,), places, 0, back.weights,
                    (p * back.count + i * share) * width, 0, share, g, sums, width, 0,
                )  # fmt: skip
                if stage.masked:
                    _add_masked(stage.masks, i, size, walk, step.row0 + r0, p * width, g, sums, n, width)
            for r in range(n):
                if is_reset(walk, way.numbers[q0 + r0 + r]):
                    clear(way.dh, to + r * size.ld, width)
                    # A projected LSTM's c is longer than h, and goes on behind its last panel.
                    clear(way.carried, to + r * size.ld, width if (p + 1) * width < size.h else size.ld - p * width)
                else:
                    _copy(g, r * width, way.dh, to + r * size.ld, width)


@register_jitable
def _add_masked(masks, i, size, walk, row0, unit, g, sums, rows, width):
    """g[r] += g[sums + r] times row row0 + r's mask number masks[i] of the units from `unit` on."""
    if masks is None:
        return
    for r in range(rows):
        mask = (masks[i] * size.batch + row0 + r) * size.ld + unit
        for j in range(0, width, lanes(g)):
            at = r * width + j
            more = load(g, sums + at, width) * load(walk.masks, mask + j, width)
            store(g, at, load(g, at, width) + more, width)


@register_jitable
def _begin_back(size, walk, way, s, row0, row1):
    """Put the gradients of the final states into step s's slot; where a row may end at any earlier step, into all."""
    for v in range(len(way.d_final)):
        count = size.h if v == 0 else size.hidden
        buffer = way.dh if v == 0 else way.carried
        for row in range(row0, row1):
            for s2 in range(s, s + (size.slots if given(walk.active) else 1)):
                to = (s2 % size.slots * size.batch + row) * size.ld
                if given(pick(way.d_final, v)):
                    _copy(pick(way.d_final, v), number_of(walk, size, 0, row) * count, buffer, to, count)
                else:
                    clear(buffer, to, count)


@register_jitable
def _leave_back(size, walk, way, s, step, row0, row1):
    """Keep the gradients of the initial states of the rows for which step s was the first."""
    more = 0  # rows with an earlier step
    if s > 0:
        more = rows_at(walk, size, time_of(walk, size, s - 1), row0, row1) if walk.reverse else step.rows
    for v in range(len(way.d_initial)):
        count = size.h if v == 0 else size.hidden
        buffer = way.dh if v == 0 else way.carried
        for row in range(row0 + min(more, step.rows), row0 + step.rows):
            to = number_of(walk, size, 0, row) * count
            _copy(buffer, step.now + row * size.ld, pick(way.d_initial, v), to, count)


@kernel
def backward(first, second, record):
    """Steps s1 - 1 down to s0 of some rows and units.

    Is modified: dx, d_initial, and the buffers that the record names.
    """
    r = _backward_at(record)
    size = Sizes(r.steps, r.batch, r.inputs, r.hidden, r.h, r.ld, r.slots)
    walk = Sequences(
        numbers_at(first, r.x), numbers_at(first, r.output), r.output_row, r.column, numbers_at(first, r.tape),
        r.tape_row, r.tape_start, integers_at(r.order), integers_at(r.active), flags_at(r.reset), r.reverse != 0,
        numbers_at(first, r.masks),
    )  # fmt: skip
    way = Way(
        numbers_at(first, r.dh), numbers_at(first, r.middle), numbers_at(first, r.carried), _pair(first, r.initial),
        r.start, _pair(first, r.d_final), _pair(first, r.d_initial), numbers_at(first, r.previous),
        numbers_at(first, r.masked), numbers_at(first, r.d), r.d_row, integers_at(r.numbers), r.chunk_rows,
        integers_at(r.bases),
    )  # fmt: skip
    back = Back(numbers_at(first, r.weights_h[0]), r.columns[0], r.counts[0])
    back2 = Back(numbers_at(first, r.weights_h[1]), r.columns[1], r.counts[1])
    crew = Crew(r.row0, r.row1, r.part, r.parts, integers_at(r.sync))
    _backward_rows(
        first, second, size, walk, way, numbers_at(first, r.weights_x), r.rows_x, back, back2,
        numbers_at(first, r.d_output), numbers_at(first, r.dx), numbers_at(first, r.sums), integers_at(r.places), crew,
        r.begins != 0, r.s0, r.s1,
    )  # fmt: skip
    return DONE


@register_jitable
def _pair(first, addresses):
    """An array for each state of the cell."""
    return first_of(first.states, (numbers_at(first, addresses[0]), numbers_at(first, addresses[1])))


@register_jitable
def _backward_rows(
    first, second, size, walk, way, wx, x_rows, back, back2, d_output, dx, g, places, crew, begins, s0, s1
):
    """As `backward`. back and back2 are the stages' products with h; the x_rows first columns of d are those of wx."""
    row0, row1, parts = crew.row0, crew.row1, crew.parts
    width = VECTORS * lanes(way.d)
    panels = (size.h + width - 1) // width
    part, share = 0, 1  # this thread's part of the work on a step, and how many share it
    start = 0
    if crew.part > 0:
        start = join(crew.sync)
        part, share = crew.part, parts
        if start < 0:
            return
    elif begins:
        _begin_back(size, walk, way, s1, row0, row1)
        _clear_padding(dx, size.inputs, 0, size.inputs, size, walk, row0, row1)
    for i in range(start, s1 - s0 + 1):
        s = s1 - 1 - i  # its gate gradients are next; what h is handed back of the step after it comes first
        if share < parts and crew.part == 0 and part == 0 and invite(crew.sync, parts, i):
            share = parts
        step, q0 = _step_back(size, walk, way, s0, s, row0, row1)
        after, q_after = step, q0
        if i > 0:
            after, q_after = _step_back(size, walk, way, s0, s + 1, row0, row1)
        if s >= s0:
            for r in range(step.rows):
                way.numbers[q0 + r] = number_of(walk, size, time_of(walk, size, s), row0 + r)
                _gather_previous(size, walk, way, s, row0 + r, q0 + r)
                _gather_operands(first, second, size, walk, way, row0 + r, q0 + r)
        while True:  # once; or once more, by a thread that goes on alone
            p0, p1 = panels * part // share, panels * (part + 1) // share
            if i > 0:
                _hand_back(first, size, walk, way, back, g, places, after, q_after, p0, p1)
            if s >= s0:
                _backward_stages(
                    first, second, size, walk, way, back2, d_output, places, step, q0, p0 * width, p1 * width
                )
            met = meet(crew.sync, crew.part, parts, i) if share > 1 else TOGETHER
            if met == TOGETHER:
                break
            if met == LEAVE:
                return
            part, share = 0, 1
        if i > 0:
            _leave_back(size, walk, way, s + 1, after, row0, row1)
    panels = (size.inputs + width - 1) // width
    p0, p1 = panels * part // share, panels * (part + 1) // share
    _backward_inputs(size, walk, way, wx, x_rows, dx, g, places, s0, s1, row0, row1, p0, p1)
    if crew.part == 0 and parts > 1:
        close(crew.sync)


@register_jitable
def _step_back(size, walk, way, s0, s, row0, row1):
    """Step s on the way back, and its first row in the chunk."""
    slot = size.batch * size.ld
    if s < s0:
        return Step(0, 0, row0, 0), row0
    rows = rows_at(walk, size, time_of(walk, size, s), row0, row1)
    return Step((s + 1) % size.slots * slot, s % size.slots * slot, row0, rows), way.bases[s - s0] + row0


@register_jitable
def _backward_stages(first, second, size, walk, way, back2, d_output, places, step, q0, u0, u1):
    """Gate gradients of one step: the units u0 to u1 of a cell of one stage, all units of one of two."""
    if second is None:
        _backward_stage(
            first, size.hidden, size, walk, way, way.dh, step.before, step.before, d_output, True, 0, step, q0, u0, u1
        )
    else:
        d_column = 0 if len(second.x_blocks) > 0 else back2.column
        _backward_stage(
            second, size.h, size, walk, way, way.dh, step.before, step.before, d_output, True, d_column, step, q0, 0,
            size.h,
        )  # fmt: skip
        to = step.row0 * size.ld
        width = VECTORS * lanes(way.d)
        for r in range(step.rows):
            places[r] = (q0 + r) * way.d_row
        clear(way.middle, to, step.rows * size.ld)
        _multiply_panels(
            way.d, back2.column, places, step.rows, back2.weights, back2.count, way.middle, to, size.ld, 0,
            (size.hidden + width - 1) // width,
        )  # fmt: skip
        if second.masked:
            for row in range(step.row0, step.row0 + step.rows):
                at = row * size.ld
                _mask(second.masks, size, walk, row, way.middle, at, way.middle, at, 0, size.hidden)
        # What the second stage carries back goes through the first as well.
        carried_at = step.now if len(second.carried_places) > 0 else step.before
        _backward_stage(
            first, size.hidden, size, walk, way, way.middle, 0, carried_at, d_output, False, 0, step, q0, 0,
            size.hidden,
        )  # fmt: skip


@register_jitable
def _backward_inputs(size, walk, way, wx, x_rows, dx, g, places, s0, s1, row0, row1, p0, p1):
    """dx = d W_ih for the rows row0 to row1 of the steps s0 to s1, ROWS of them at a time: the panels p0 to p1."""
    for p in range(p0, p1):
        count = 0
        for s in range(s0, s1):
            rows = rows_at(walk, size, time_of(walk, size, s), row0, row1)
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
    multiply(COLUMNS, rows, 1, way.d, (0,), places, 0, wx, p * x_rows * width, 0, x_rows, g, 0, width, 0)
    for r in range(rows):
        _copy(g, r * width, dx, places[ROWS + r] + p * width, min(width, size.inputs - p * width))


_outer_at, _bias_at = record_at(records.OUTER), record_at(records.BIAS)


@kernel
def weight_gradient(numbers, record):
    """Add D^T B to c [M, N] (is modified): this part's rows of c, so that each sum is made by one thread."""
    r = _outer_at(record)
    tiles = (r.m_count + TILE_ROWS - 1) // TILE_ROWS
    m0, m1 = tiles * r.part // r.parts * TILE_ROWS, min(r.m_count, tiles * (r.part + 1) // r.parts * TILE_ROWS)
    if m1 > m0:
        add_outer_products(
            COLUMNS, numbers_at(numbers, r.d), r.d0, r.d_row, m0, m1, numbers_at(numbers, r.b), integers_at(r.places),
            r.rows, r.n_count, numbers_at(numbers, r.c), integers_at(r.tile_places), numbers_at(numbers, r.work),
        )  # fmt: skip
    return DONE


@kernel
def bias_gradient(numbers, record):
    """Add the sum of D's rows to total (is modified): this part's columns."""
    r = _bias_at(record)
    d, total = numbers_at(numbers, r.d), numbers_at(numbers, r.total)
    width = lanes(d)
    vectors = (r.count + width - 1) // width
    for v in range(vectors * r.part // r.parts, vectors * (r.part + 1) // r.parts):
        n = r.count - v * width
        sums = load(d, v * width, 0)
        for q in range(r.rows):
            sums = sums + load(d, q * r.d_row + v * width, n)
        store(total, v * width, load(total, v * width, n) + sums, n)
    return DONE
