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
from numba.extending import register_jitable

from fastrnn.kernels.barrier import LEAVE, TOGETHER, close, invite, join, meet
from fastrnn.kernels.cached import kernel as _kernel
from fastrnn.kernels.cells import TAPE_OF_C
from fastrnn.kernels.packing import checksum
from fastrnn.kernels.product import VECTORS, add_outer_products, clear, multiply, panels_together, rows_in_tile
from fastrnn.kernels.simd import (
    at_address,
    borrowed,
    flags_at,
    given,
    integers_at,
    lanes,
    load,
    load_each,
    prefetch,
    spread,
    store,
    store_each,
)

ROWS = 48  # rows whose gate sums are under way at a time: they stay in the first-level cache
AHEAD_ALONE = 4  # steps whose products with x a thread makes ahead that may soon share the work
COLUMNS = tuple(range(VECTORS))  # of a panel in a plain product
TILE_ROWS = rows_in_tile(VECTORS)


class Sizes(NamedTuple):
    """The sizes of a problem and of its buffers."""

    steps: int  # T
    batch: int
    inputs: int
    hidden: int
    h: int  # P where there is a projection, else H
    ld: int  # numbers in a row of a buffer
    slots: int  # places of a state, taken in turn by its values at each step: 2, or one more than steps in a call


class Sequences(NamedTuple):
    """The caller's sequences, flat, and how to walk through them."""

    x: np.ndarray  # [T, B, I]
    output: np.ndarray  # [T, B, output_row], of which h columns from `column` on are this direction's
    output_row: int
    column: int
    tape: np.ndarray  # [steps, B, tape, H], where the first step is `tape_start`; empty where there is to be none
    tape_row: int
    tape_start: int
    order: np.ndarray  # [B]; empty where rows stand as the caller's
    active: np.ndarray  # [T]; empty where all are active at all times
    reset: np.ndarray  # [T, B]; empty where there are none
    reverse: bool
    masks: np.ndarray  # [masks, B, ld]: rows in `order`; empty where the recurrent product has none


class Weights(NamedTuple):
    """Of one stage: one array holding its products with x and h, packed in panels, and its bias."""

    packed: np.ndarray
    h: int  # where the product with h begins
    bias: int


class Scratch(NamedTuple):
    """What a thread needs for the forward walk."""

    ahead: int  # steps whose products with x are made together; 0: each step makes its own
    first: np.ndarray  # gate sums [row][panel][slot][unit], of `ahead` steps or of one panel
    second: np.ndarray  # the same of a second stage, of one panel
    masked: np.ndarray  # [operands][row][ld]: what a product with masks multiplies
    places: np.ndarray  # of rows in x (those of `ahead` steps), and then
    buffer: int  # of each row in a buffer,
    output: int  # in output,
    tape: int  # and in tape: where in `places` these begin


DONE, CHANGED = 1, 0
# What `forward_rows` is called for: sizes, and addresses of arrays.
JOB = np.dtype(
    [
        (name, np.int64)
        for name in """steps batch inputs hidden h ld slots  output_row column tape tape_row tape_start order active
        reset reverse masks  ahead values masked  row0 row1 part sync  checksum""".split()
    ]
    + [(name, np.int64, 2) for name in "packed packed_h packed_bias sums".split()]
    + [("places", np.int64, 4), ("params", np.int64, 5), ("counts", np.int64, 5)]
)


class Crew(NamedTuple):
    """Which part of the work a thread has."""

    row0: int
    row1: int
    part: int  # of the hidden units
    parts: int
    sync: np.ndarray  # see barrier.py


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


class Back(NamedTuple):
    """A product that takes gate gradients back to what they came from: the packed weights, and the columns of d."""

    weights: np.ndarray
    column: int  # where the gate gradients begin,
    count: int  # and how many there are


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
                _copy(initial[v], source, values, place, count)


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
            _copy(values, place, final[v], number_of(walk, size, 0, row) * count, count)


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


@_kernel
def forward_rows(first, second, jobs, number, parts, x, output, initial, final, begins, s0, s1):
    """Steps s0 to s1 of some rows and hidden units: job `number` of `jobs`, which `parts` threads share.

    Returns DONE, or CHANGED if the parameters or the arrays' sizes are not what the job was made for; nothing is done
    then. x is (T * B, I). `initial`, the states that a walk `begins` with at s0, and `final` are tuples of arrays
    (1, B, .). Is modified: output, final, and what the job names.

    Most of what a job is does not change from call to call, and stands in a record: to begin with as many arguments
    takes as long as a small step.
    """
    job = jobs[number]
    if not _in_order(x, job.steps * job.batch, job.inputs):
        return CHANGED
    for v in range(len(initial)):
        if not _in_order(initial[v][0], job.batch, job.h if v == 0 else job.hidden) or len(initial[v]) != 1:
            return CHANGED
    x, output, initial, final = borrowed(x), borrowed(output), borrowed(initial), borrowed(final)
    if begins and job.checksum != 0 and _checksum_now(job, x) != job.checksum:
        return CHANGED
    size = Sizes(job.steps, job.batch, job.inputs, job.hidden, job.h, job.ld, job.slots)
    walk = Sequences(
        x, output, job.output_row, job.column, at_address(job.tape, x), job.tape_row, job.tape_start,
        integers_at(job.order), integers_at(job.active), flags_at(job.reset), job.reverse != 0,
        at_address(job.masks, x),
    )  # fmt: skip
    weights = Weights(at_address(job.packed[0], x), job.packed_h[0], job.packed_bias[0])
    weights2 = Weights(at_address(job.packed[1], x), job.packed_h[1], job.packed_bias[1])
    scratch = Scratch(
        job.ahead, at_address(job.sums[0], x), at_address(job.sums[1], x), at_address(job.masked, x),
        integers_at(job.places[0]), job.places[1], job.places[2], job.places[3],
    )  # fmt: skip
    crew = Crew(job.row0, job.row1, job.part, parts, integers_at(job.sync))
    _forward_rows(
        first, second, size, walk, weights, weights2, initial, final, at_address(job.values, x), scratch, crew, begins,
        s0, s1,
    )  # fmt: skip
    return DONE


@register_jitable
def _in_order(array, rows, columns):
    """Whether an array has that shape and is contiguous: its type may say so where nobody has looked."""
    n, m = array.shape
    row, item = array.strides
    return n == rows and m == columns and (item == array.itemsize or m == 1) and (row == m * array.itemsize or n == 1)


@register_jitable
def _checksum_now(job, x):
    a, n = job.params, job.counts
    return checksum(
        (at_address(a[0], x), at_address(a[1], x), at_address(a[2], x), at_address(a[3], x), at_address(a[4], x)),
        (n[0], n[1], n[2], n[3], n[4]),
    )  # fmt: skip


@register_jitable
def _forward_rows(first, second, size, walk, weights, weights2, initial, final, values, scratch, crew, begins, s0, s1):
    """As `forward_rows`. values [V, slots, B, ld] holds each state, and each value that one stage hands to the next,
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
            _copy(way.initial[v], (number - t * size.batch) * count, way.previous, to, count)
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
                if given(way.d_final[v]):
                    _copy(way.d_final[v], number_of(walk, size, 0, row) * count, buffer, to, count)
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
            _copy(buffer, step.now + row * size.ld, way.d_initial[v], to, count)


@_kernel
def backward_rows(
    first, second, size, walk, way, wx, x_rows, back, back2, d_output, dx, g, places, crew, begins, s0, s1
):
    """Steps s1 - 1 down to s0 of some rows and units. Is modified: way, dx, and the scratch arrays g and places.

    back and back2 are the stages' products with h. The x_rows first columns of d are those of wx.
    """
    walk, way, wx, back, back2 = borrowed(walk), borrowed(way), borrowed(wx), borrowed(back), borrowed(back2)
    d_output, dx, g, places, crew = borrowed(d_output), borrowed(dx), borrowed(g), borrowed(places), borrowed(crew)
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


@_kernel
def weight_gradient(source, d, d0, d_row, m_count, b, places, rows, n_count, c, tile_places, work, part, parts):
    """Add D^T B to c [M, N] (is modified): this part's rows of c, so that each sum is made by one thread."""
    d, b, places, c = borrowed(d), borrowed(b), borrowed(places), borrowed(c)
    tile_places, work = borrowed(tile_places), borrowed(work)
    tiles = (m_count + TILE_ROWS - 1) // TILE_ROWS
    m0, m1 = tiles * part // parts * TILE_ROWS, min(m_count, tiles * (part + 1) // parts * TILE_ROWS)
    if m1 > m0:
        add_outer_products(COLUMNS, d, d0, d_row, m0, m1, b, places, rows, n_count, c, tile_places, work)


@_kernel
def bias_gradient(source, d, d_row, rows, count, total, part, parts):
    """Add the sum of D's rows to total (is modified): this part's columns."""
    d, total = borrowed(d), borrowed(total)
    width = lanes(d)
    vectors = (count + width - 1) // width
    for v in range(vectors * part // parts, vectors * (part + 1) // parts):
        n = count - v * width
        sums = load(d, v * width, 0)
        for q in range(rows):
            sums = sums + load(d, q * d_row + v * width, n)
        store(total, v * width, load(total, v * width, n) + sums, n)
