"""One layer in one direction on the CPU: packs the weights, allocates, and splits the walk over threads.

The work is done in :mod:`fastrnn.kernels.walk`. Rows are dealt to threads, each of which walks through time alone; the
weight gradients, which sum over all rows, are a second phase in which each thread owns some of the weights. No sum
is ever shared, so results do not depend on the number of threads.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import time
from typing import NamedTuple

import numpy as np
from llvmlite import binding
from numba.core import config
from numpy import empty, ndarray

from fastrnn.kernels import barrier, guard, threads
from fastrnn.kernels.cells import CELLS, LSTM_PROJECTED
from fastrnn.kernels.packing import address, checksum_of, pack_columns, pack_stage
from fastrnn.kernels.product import (
    IN_FLIGHT,
    OUTER_BLOCK,
    VECTORS,
    outer_work,
    rows_in_tile,
)
from fastrnn.kernels.simd import VECTOR_BITS, machine
from fastrnn.kernels.stage import SOURCE, UNITS, Masked, call, entry
from fastrnn.kernels.walk import (
    ADDRESSES,
    DONE,
    JOB,
    OF_A_CALL,
    ROWS,
    TILE_ROWS,
    Back,
    Crew,
    Scratch,
    Sequences,
    Sizes,
    Way,
    Weights,
    backward_rows,
    bias_gradient,
    forward_rows,
    weight_gradient,
)

SLICE_SECONDS = 0.08  # between looks at Ctrl-C, as estimated from what a slow CPU with such vectors does:
SLOW_FLOPS, SLOW_BYTES = 2e8 * VECTOR_BITS, 1e10  # operations, and bytes of weights read, in a second
CHUNK_BYTES = 1 << 22  # gate gradients that are kept until the weight gradients are summed
AHEAD_BYTES = 1 << 17  # gate sums that are made ahead: a part of the second-level cache
THREAD_FLOPS = 6e6  # work that is worth waking a thread for
FEW_ROWS = 2  # a thread: fewer share units rather than rows
SMALL_BYTES = 1 << 18  # gate gradients of a backward pass whose memory is kept for the next
STEP_ROWS = 2.0  # rows whose work is that of a step besides its rows
CACHE_LINE = 64  # bytes
SLOT_BYTES = 1 << 18  # states of steps that threads share


class Rows(NamedTuple):
    """Rows by decreasing length, and how many of them are active at each step; all empty where all have every step."""

    order: np.ndarray
    active: np.ndarray
    lengths: np.ndarray | None  # in order
    steps: int  # of all rows together

    def counts(self, size, reverse) -> list[int]:
        """How many rows are active at each step, in the order of the walk."""
        if self.lengths is None:
            return [size.batch] * size.steps
        return (self.active[::-1] if reverse else self.active).tolist()

    def shares(self, parts: int, batch: int) -> list[tuple[int, int]]:
        """First and last row of each part, parts being of nearly equal work."""
        if self.lengths is None or parts == 1:
            cuts = [batch * p // parts for p in range(parts + 1)]
        else:
            cuts = [0, *_cuts(self.lengths, parts, 0), batch]
        return list(itertools.pairwise(cuts))

    def restore(self, array: np.ndarray) -> np.ndarray:
        """A copy of [B, ...] in the caller's order."""
        if self.lengths is None:
            return array.copy()
        restored = np.empty(array.shape, array.dtype)
        restored[self.order] = array
        return restored


def _cuts(lengths, parts, start) -> list[int]:
    """The rows, counted from `start`, before which decreasing lengths are to be cut into parts of nearly equal work."""
    if parts == 1:
        return []
    first = parts // 2
    done = np.cumsum(lengths)
    longest = np.append(lengths[1:], 0)  # of what is left behind each row
    costs = done + STEP_ROWS * lengths[0], done[-1] - done + STEP_ROWS * longest
    cut = 1 + int(np.argmin(np.maximum(costs[0] / first, costs[1] / (parts - first))))
    behind = [start + cut] * (parts - first - 1)  # where there are fewer rows than parts
    if cut < len(lengths):
        behind = _cuts(lengths[cut:], parts - first, start + cut)
    return [*_cuts(lengths[:cut], first, start), start + cut, *behind]


class Tape(NamedTuple):
    """What backward needs of a forward pass. It refers to the caller's arrays, and owns the rest."""

    prepared: Prepared
    size: Sizes
    rows: Rows
    walk: Sequences
    states: list[tuple]  # the initial ones; with `recompute`, those before each chunk
    recompute: bool
    checksum: int  # of the parameters


def _sort(lengths, steps, batch) -> Rows:
    if lengths is None:
        return Rows(_constant(), _constant(), None, steps * batch)
    order = np.argsort(-lengths, kind="stable").astype(np.int64, copy=False)
    active = np.searchsorted(-lengths[order], -np.arange(steps), side="left").astype(np.int64)
    return Rows(order, active, lengths[order], int(lengths.sum()))


def _aligned(count, dtype, zero=False):
    """A one-dimensional array that starts on a cache line."""
    size = dtype.itemsize
    memory = (np.zeros if zero else np.empty)(count + CACHE_LINE // size, dtype)
    start = -ctypes.addressof(ctypes.c_char.from_buffer(memory)) % CACHE_LINE // size
    return memory[start : start + count]


@functools.cache
def _none(dtype):
    """No numbers, where there could be some."""
    return np.empty(0, dtype)


@functools.cache
def _constant(*numbers):
    return np.array(numbers, np.int64)


# ---- weights


def _pack_columns(weight, blocks, block_rows):
    line = _line(weight.dtype)
    packed = _aligned(-(-weight.shape[1] // line) * len(blocks) * block_rows * line, weight.dtype)
    call(
        pack_columns, weight.dtype, SOURCE, weight.reshape(-1), weight.shape[1], _constant(*blocks), block_rows, packed
    )
    return packed


def _pack_stage(stage, params, hidden, h_size) -> Weights:
    """One stage's weights and biases for the forward walk."""
    x, h = params["weight_ih"], params["weight_hh" if stage.x_blocks else "weight_hr"]
    dtype, inputs = x.dtype, x.shape[1]
    gated = bool(stage.x_blocks)  # if not, it is the projection
    results = hidden if gated else h_size
    line = UNITS[stage.name] * VECTOR_BITS // (8 * dtype.itemsize)
    panels = -(-results // line)
    h_at = panels * inputs * len(stage.x_blocks) * line
    bias_at = h_at + panels * h.shape[1] * len(stage.h_blocks) * line
    packed = _aligned(bias_at + panels * stage.gates * line, dtype)
    bias = gated and "bias_ih" in params
    call(
        pack_stage, dtype, SOURCE, x.reshape(-1), inputs, _constant(*stage.x_blocks), h.reshape(-1), h.shape[1],
        _constant(*stage.h_blocks), params["bias_ih"].reshape(-1) if bias else _none(dtype),
        params["bias_hh"].reshape(-1) if bias else _none(dtype), stage.gates, results, UNITS[stage.name],
        packed[:h_at], packed[h_at:bias_at], packed[bias_at:],
    )  # fmt: skip
    return Weights(packed, h_at, bias_at)


class Packed(NamedTuple):
    """Weights as the forward walk takes them."""

    checksum: int  # of what they were made of
    first: Weights
    second: Weights


# ---- forward


def _address(array) -> int:
    """Where a contiguous array's numbers are; 0 if it has none."""
    return guard.note(array, call(address, array.dtype, SOURCE, array.ravel())) if array.size else 0


guard.addresses[JOB] = ADDRESSES


class Plan:
    """How calls of one shape are carried out, and the memory that one of them at a time works in.

    It outlives the calls, and its jobs hold addresses. So all that they point to is the plan's own, or kept alive by
    it: `memory`, `arrays`, `packed`; but for what is a call's, whose addresses stand there from `begin` to `end`.
    """

    def __init__(self, prepared, key, kernel, stages, size, crews, scratch, length):
        self.key = key
        self.kernel = kernel  # the key of the compiled one
        self.size = size
        self.crews = crews
        self.length = length  # steps of a call
        self.threads = key[-1]
        self.entry = None  # the compiled kernel, where the last call was a plain one,
        self.entry_steps = -1  # and its steps
        self.asked: tuple | None = None  # what the last call was asked for, in the order of ASKED
        self.of_a_call: list[str] = []  # the fields that hold addresses of its arrays
        self.output_shape = (size.steps * size.batch, size.h)
        self.states = tuple([(1, size.batch, n) for n in (size.h, size.hidden)][: prepared.cell.states])
        self.zeros = tuple([np.zeros(shape, prepared.dtype) for shape in self.states])
        self.packed: Packed | None = None
        values = _aligned(prepared.cell.values * size.slots * size.batch * size.ld, prepared.dtype, zero=True)
        self.memory = [values, scratch, [crew.sync for crew in crews]]
        self.jobs = jobs = np.zeros(len(crews), JOB)
        for name, value in size._asdict().items():
            jobs[name] = value
        jobs["values"] = _address(values)
        jobs["tape_row"] = prepared.cell.tape * size.hidden
        self.look_at(prepared.arrays)
        jobs["counts"] = [array.size for array in prepared.arrays]
        for job, crew, own in zip(jobs, crews, scratch, strict=True):
            job["row0"], job["row1"], job["part"], _, sync = crew
            job["sync"] = _address(sync)
            job["ahead"] = own.ahead
            job["sums"] = _address(own.first), _address(own.second)
            job["masked"] = _address(own.masked)
            job["places"] = _address(own.places)
            job["begins"] = own.buffer, own.output, own.tape
        self.stages = stages
        self.arguments = (*stages, jobs, 0, 1)

    def take(self, packed):
        """Use these weights. A single thread checks on its way whether they are still those of the parameters."""
        self.packed = packed
        both = packed.first, packed.second
        self.jobs["packed"] = [_address(weights.packed) for weights in both]
        self.jobs["packed_h"] = [weights.h for weights in both]
        self.jobs["packed_bias"] = [weights.bias for weights in both]
        self.jobs["checksum"] = packed.checksum if len(self.crews) == 1 else 0

    def state(self, s, rows) -> tuple:
        """A copy of the states before step s, in the caller's order."""
        size = self.size
        slots = self.memory[0].reshape(-1, size.slots, size.batch, size.ld)[:, s % size.slots]
        return tuple([rows.restore(slots[v, :, : shape[2]])[None] for v, shape in enumerate(self.states)])

    def look_at(self, arrays):
        """These are the parameters, whose checksum is taken."""
        self.arrays = arrays
        self.jobs["params"] = [_address(array) for array in arrays]

    def begin(self, walk):
        """What the call is asked for, and where its arrays are."""
        asked = walk.output_row, walk.column, walk.tape_start, walk.reverse
        if asked != self.asked:
            self.asked, self.entry_steps = asked, -1
            for name, value in zip(ASKED, asked, strict=True):
                self.jobs[name] = value
        for name in OF_A_CALL:
            array = getattr(walk, name)
            if array.size:
                self.of_a_call.append(name)
                self.jobs[name] = _address(array)

    def end(self):
        """Forget the call's arrays."""
        for name in self.of_a_call:
            self.jobs[name] = 0
        self.of_a_call.clear()

    def is_plain(self, steps) -> bool:
        """Whether the last call, of so many steps, was one that :meth:`Prepared.again` can make once more."""
        asked = self.asked == (self.size.h, 0, 0, False)
        return asked and len(self.crews) == 1 and self.key[2] == 0 and 0 < steps <= self.length


ASKED = ("output_row", "column", "tape_start", "reverse")


class Prepared:
    """One layer in one direction, for calls again and again: packed weights and memory to work in are kept.

    The parameters may change between calls, in place, too: each call compares their checksum with that of what was
    packed. Any number of threads may call at once.
    """

    def __init__(self, cell, params, keep=True):
        self.cell = LSTM_PROJECTED if "weight_hr" in params else CELLS[cell]
        self.stages = self.cell.stages if len(self.cell.stages) == 2 else (*self.cell.stages, None)
        self.dtype = params["weight_ih"].dtype
        self.hidden = params["weight_ih"].shape[0] // self.cell.gates
        self.h = params["weight_hh"].shape[1]
        # Gate gradients of a row; and a cache line more, or the rows would all fall into the same sets of the caches.
        columns = self.cell.slots * self.hidden + (self.h if "weight_hr" in params else 0)
        self.d_row = columns + CACHE_LINE // self.dtype.itemsize
        self.ld = -(-self.hidden // _line(self.dtype)) * _line(self.dtype)
        self.x_blocks = [block for stage in self.cell.stages for block in stage.x_blocks]
        # What is kept is compared with the arrays that are seen here: not with those that would be copied first.
        self.keep = keep and all(array.flags.c_contiguous for array in params.values())
        self._packed: Packed | None = None
        self._packed_back: tuple | None = None
        self._plans: list[Plan] = []
        self.back_plans: list[BackPlan] = []
        self.move(params)

    def move(self, params):
        """Take the parameters from other arrays of these shapes, in order as well. No call may be under way."""
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
        self.params = params
        self.arrays = [params[name].reshape(-1) if name in params else _none(self.dtype) for name in names]

    def kernel(self, masks) -> tuple[tuple, tuple]:
        """The key of the compiled kernel and its stages, for calls with so many masks."""
        stages = self.stages
        if masks:
            stages = tuple([Masked(stage, masks > 1) if stage and stage.x_blocks else stage for stage in stages])
        return (self.cell.name, self.dtype, min(masks, 2)), stages

    def packed(self) -> Packed:
        """The weights as they are now."""
        checksum = call(checksum_of, self.dtype, SOURCE, *self.arrays) if self.keep else 0
        packed = self._packed
        if packed is None or packed.checksum != checksum or not self.keep:
            first = _pack_stage(self.stages[0], self.params, self.hidden, self.h)
            second = self.stages[1] and _pack_stage(self.stages[1], self.params, self.hidden, self.h)
            packed = self._packed = Packed(checksum, first, second or first)
        return packed

    def forward(
        self, x, state, *, lengths=None, reset=None, reverse=False, training=False, recompute=False, output=None,
        column=0, recurrent_masks=None,
    ):  # fmt: skip
        """As the module's :func:`forward`."""
        rows = _sort(lengths, *x.shape[:2])
        masks = self.masks(recurrent_masks, rows)
        plan = self.plan(x.shape, rows, reset is not None, len(masks))
        size = plan.size
        if output is None:
            output = np.empty((size.steps, size.batch, size.h), self.dtype)
        initial = tuple([s[None] for s in state])
        # Rows without a step keep their state.
        final = tuple([s.copy() if lengths is not None or not size.steps else np.empty_like(s) for s in initial])
        tape_row = self.cell.tape * size.hidden
        walk = Sequences(
            x.reshape(-1), output.reshape(-1), output.shape[2], column,
            np.empty(size.steps * size.batch * tape_row if training and not recompute else 0, self.dtype), tape_row, 0,
            rows.order, rows.active, _none(np.bool_) if reset is None else reset.reshape(-1), reverse, masks,
        )  # fmt: skip
        states = [initial]  # before each chunk of the way back
        for s0, s1, _ in self.chunks(size, rows, reverse) if recompute else [(0, size.steps, None)]:
            if s0:
                states.append(plan.state(s0, rows))
            self.walk(plan, walk, initial, final, s0, s1, begins=s0 == 0)
        if plan.is_plain(size.steps):
            plan.entry, plan.entry_steps = entry(forward_rows, plan.kernel), size.steps
        packed = plan.packed or self.packed()
        tape = Tape(self, size, rows, walk, states, recompute, packed.checksum) if training else None
        self.give_back(plan, rows)
        return output, tuple([s[0] for s in final]), tape

    def again(self, x, steps, state):
        """The last call once more with other numbers, if it was a plain one of these sizes: its output and state.

        None if it was not, or if the numbers are not arrays in order. Here x is (T * B, I), so is the output, and the
        state's arrays have a first axis of length 1; None is a state of zeros.
        """
        plans = self._plans
        if not plans:
            return None
        try:
            plan = plans.pop()
        except IndexError:  # another thread was faster
            return None
        result = None
        dtype, shapes = self.dtype, plan.states
        alike = plan.entry_steps == steps and plan.threads == threads.get_num_threads() and x.dtype is dtype
        if alike and plan.arrays is self.arrays:
            if state is None:
                state = plan.zeros
            final = [
                empty(shape, dtype)
                for shape, s in zip(shapes, state)  # noqa: B905 (strict takes longer)
                if type(s) is ndarray and s.dtype is dtype and s.ndim == 3
            ]
            if len(final) == len(state) == len(shapes):
                output, final = empty(plan.output_shape, dtype), tuple(final)
                if plan.entry(*plan.arguments, x, output, state, final, True, 0, steps) == DONE:
                    result = output, final
        plans.append(plan)
        return result

    def walk(self, plan, walk, initial, final, s0, s1, begins):
        """Steps s0 to s1, on as many threads as there are crews."""
        plan.begin(walk)
        try:
            self._walk(plan, walk, initial, final, s0, s1, begins)
        finally:
            plan.end()

    def _walk(self, plan, walk, initial, final, s0, s1, begins):
        x, output = walk.x.reshape(-1, plan.size.inputs), walk.output.reshape(-1, walk.output_row)
        one = len(plan.crews) == 1
        if plan.packed is None or not one:
            packed = self.packed()
            if packed is not plan.packed:
                plan.take(packed)

        def part(crew, p):
            return call(
                forward_rows, plan.kernel, *plan.stages, plan.jobs, p, crew.parts, x, output, initial, final,
                begins and start == s0, start, end,
            )  # fmt: skip

        for start in range(s0, s1, plan.length):
            end = min(start + plan.length, s1)
            if not one:
                _run(part, plan.crews)
            elif part(plan.crews[0], 0) != DONE:  # the parameters have changed
                plan.take(self.packed())
                part(plan.crews[0], 0)

    def chunks(self, size, rows, reverse):
        """(first step, last step, first row of each step) of the pieces between which weight gradients are summed."""
        seconds = _slice(self.cell, size, 2 * _flops(self.cell, size, rows.steps))
        return _chunks(rows.counts(size, reverse), self.d_row * self.dtype.itemsize, seconds)

    def plan(self, shape, rows, reset, masks) -> Plan:
        """How to go about x of that shape, with so many masks: the last plan if it was for such a call."""
        key = (shape, reset, masks, threads.get_num_threads())
        plan = _taken(self._plans, key) if rows.lengths is None else None
        if plan is not None:
            if plan.arrays is not self.arrays:
                plan.look_at(self.arrays)
            return plan
        size = Sizes(*shape, self.hidden, self.h, self.ld, 2)
        flops = _flops(self.cell, size, rows.steps)
        size, crews = self.crews(size, rows, flops, can_share=not reset)
        length = min(_slice(self.cell, size, flops), _length(size, crews))
        scratch = [_scratch(*self.stages, size, crew.row1 - crew.row0, masks, self.dtype) for crew in crews]
        return Plan(self, key, *self.kernel(masks), size, crews, scratch, length)

    def masks(self, given, rows) -> np.ndarray:
        """The masks [masks, B, ld] in the order of the rows; empty where there are none."""
        if given is None:
            return _none(self.dtype).reshape(0, 0, 0)
        given = given if given.ndim == 3 else given[None]
        count, batch, width = given.shape
        masks = _aligned(count * batch * self.ld, self.dtype, zero=True).reshape(count, batch, self.ld)
        masks[..., :width] = given if rows.lengths is None else given[:, rows.order]
        return masks

    def tape(
        self, x, state, output, column, kept, *, lengths=None, reset=None, reverse=False, recurrent_masks=None
    ) -> Tape:
        """The tape that :meth:`forward` returned, again, from its arguments, its output and its ``tape.walk.tape``.

        For a caller who can keep arrays, but no objects.
        """
        rows = _sort(lengths, *x.shape[:2])
        size, checksum = Sizes(*x.shape, self.hidden, self.h, self.ld, 2), self.packed().checksum if self.keep else 0
        walk = Sequences(
            x.reshape(-1), output.reshape(-1), output.shape[2], column, kept.reshape(-1), self.cell.tape * self.hidden,
            0, rows.order, rows.active, _none(np.bool_) if reset is None else reset.reshape(-1), reverse,
            self.masks(recurrent_masks, rows),
        )  # fmt: skip
        return Tape(self, size, rows, walk, [tuple([s[None] for s in state])], False, checksum)

    def back_plan(self, tape) -> BackPlan:
        """How to go back: the last plan if it was for such a tape."""
        walk, rows, size = tape.walk, tape.rows, tape.size
        reset, masks = walk.reset.size > 0, len(walk.masks)
        key = (size.steps, size.batch, reset, masks, threads.get_num_threads())
        plan = _taken(self.back_plans, key) if rows.lengths is None else None
        return plan or BackPlan(self, key, size, rows, walk.reverse, reset, masks)

    def give_back(self, plan, rows):
        """Keep a plan for the next call."""
        if self.keep and rows.lengths is None:
            self._plans.append(plan)

    def crews(self, size, rows, flops, can_share) -> tuple[Sizes, list[Crew]]:
        """Who does what: threads share the rows or, where these are few, the units; the latter needs more slots."""
        batch, parts = size.batch, _parts(self.cell, size, flops)
        most = min(threads.cores(), -(-size.h // _line(self.dtype)))  # more could not run at a time
        if can_share and 0 < batch < parts * FEW_ROWS and min(parts, most) > 1:
            parts = min(parts, most)
            slots = SLOT_BYTES // (self.cell.values * batch * size.ld * self.dtype.itemsize)
            sync = barrier.new(parts, _patience(flops / max(1, size.steps)))
            crews = [Crew(0, batch, p, parts, sync) for p in range(parts)]
            return size._replace(slots=1 + max(8, min(slots, size.steps))), crews
        parts = max(1, min(parts, batch))
        return size._replace(slots=2), [Crew(*share, 0, 1, _constant()) for share in rows.shares(parts, batch)]

    def packed_back(self, checksum):
        """(weights of x, its rows, products of the first and second stage with h) for the way back."""
        if self._packed_back is not None and self.keep and self._packed_back[0] == checksum:
            return self._packed_back[1]
        first, second = self.stages
        hidden, params = self.hidden, self.params
        x_blocks = first.x_blocks
        # Columns of d where the gate gradients of each stage's product with h begin.
        column = (first.gates - len(first.h_blocks)) * hidden
        count = len(first.h_blocks) * hidden
        back = back2 = Back(_pack_columns(params["weight_hh"], first.h_blocks, hidden), column, count)
        if second is not None and second.x_blocks:
            x_blocks += second.x_blocks
            back2 = Back(
                _pack_columns(params["weight_hh"], second.h_blocks, hidden), count, len(second.h_blocks) * hidden
            )
        elif second is not None:
            back2 = Back(_pack_columns(params["weight_hr"], second.h_blocks, self.h), self.cell.slots * hidden, self.h)
        wx = _pack_columns(params["weight_ih"], x_blocks, hidden)
        packed = (wx, len(x_blocks) * hidden, back, back2)
        self._packed_back = (checksum, packed)
        return packed


def _taken(plans, key):
    """The plan that was kept last, taken from the list, if it is for such a call."""
    try:
        plan = plans.pop()
    except IndexError:  # none, or another thread was faster
        return None
    return plan if plan.key == key else None


def _line(dtype) -> int:
    """Numbers in a panel of a plain product; buffers have rows of so many, too."""
    return VECTORS * VECTOR_BITS // (8 * dtype.itemsize)


def _length(size, crews) -> int:
    """Most steps in a call: those that share units take a slot for each."""
    return size.slots - 1 if crews[0].parts > 1 else max(1, size.steps)


def _run(part, crews):
    """part(crew, p) for each crew, on as many threads."""
    if len(crews) == 1:
        part(crews[0], 0)
    elif crews[0].parts == 1:
        threads.run(lambda p, _: part(crews[p], p), len(crews))
    else:
        sync = crews[0].sync
        barrier.renew(sync)
        in_time = threads.share(lambda p, parts: part(crews[p]._replace(parts=parts), p), len(crews))
        if sync[barrier.MODE] != barrier.OPEN:  # else nobody was asked: the pool is taken or resting
            threads.shared(not barrier.failed(sync) and in_time)


def _flops(cell, size, rows) -> float:
    """Multiplications and additions of a forward pass over so many rows and steps."""
    return 2.0 * rows * cell.gates * size.hidden * (size.inputs + size.h)


def _parts(cell, size, flops) -> int:
    """How many threads the work is worth; reading the weights at every step counts, too."""
    reading = 2.0 * 4 * size.steps * cell.gates * size.hidden * size.h
    return int(max(1, min(threads.get_num_threads(), max(flops, reading) // THREAD_FLOPS)))


def _patience(flops) -> int:
    """Pauses after which a thread is given up that takes part in steps of so much work."""
    return int(1500 + flops / 500)


def _slice(cell, size, flops) -> int:
    """Steps between two looks at Ctrl-C."""
    weights = cell.gates * size.hidden * (size.inputs + size.h)
    seconds = flops / max(size.steps, 1) / SLOW_FLOPS + 4 * weights / SLOW_BYTES
    return max(1, int(SLICE_SECONDS / max(seconds, 1e-9)))


def _ahead(stage, size, rows, sums_row, itemsize) -> int:
    """Steps whose products with x are made together: where a step's own rows are fewer than fill a tile."""
    if rows == 0 or rows >= rows_in_tile(len(stage.x_blocks) * UNITS[stage.name]):
        return 0
    room = AHEAD_BYTES // (sums_row * itemsize * rows)
    return max(1, min(size.steps, max(room, -(-8 // rows)), 256))


def _scratch(first, second, size, rows, masks, dtype) -> Scratch:
    """Memory of the forward walk for so many rows, with so many masks."""
    width = VECTOR_BITS // (8 * dtype.itemsize)
    panel = first.gates * UNITS[first.name] * width
    sums_row = -(-size.hidden // (UNITS[first.name] * width)) * panel
    ahead = _ahead(first, size, rows, sums_row, dtype.itemsize)
    few_rows = IN_FLIGHT * VECTORS * width * 2  # of several panels
    g = _aligned(max(ahead * rows * sums_row, min(rows, ROWS) * panel, few_rows), dtype)
    g2 = g if second is None else _aligned(max(ROWS * second.gates * UNITS[second.name] * width, few_rows), dtype)
    buffer = max(1, ahead) * rows
    places = np.empty(buffer + 3 * rows, np.int64)
    masked = _aligned(masks * rows * size.ld, dtype)
    return Scratch(ahead, g, g2, masked, places, buffer, buffer + rows, buffer + 2 * rows)


prepare = Prepared


def forward(
    cell, x, params, state, *, lengths=None, reset=None, reverse=False, training=False, recompute=False, output=None,
    column=0, recurrent_masks=None,
):  # fmt: skip
    """One layer in one direction; arguments and results are those of :func:`fastrnn.functional.forward`, unchecked."""
    return Prepared(cell, params, keep=False).forward(
        x, state, lengths=lengths, reset=reset, reverse=reverse, training=training, recompute=recompute, output=output,
        column=column, recurrent_masks=recurrent_masks,
    )  # fmt: skip


# ---- backward


def _chunks(active, row_bytes, steps):
    """(first step, last step, first row of each step) of the pieces between which weight gradients are summed.

    At most `steps` steps and, roughly, CHUNK_BYTES of gate gradients. They depend on the sizes alone, so that sums
    are the same for any number of threads.
    """
    most = max(CHUNK_BYTES // row_bytes, OUTER_BLOCK)
    chunks, start, bases = [], 0, [0]
    for s, rows in enumerate(active):
        bases.append(bases[-1] + rows)
        if bases[-1] >= most or len(bases) > steps or s + 1 == len(active):
            chunks.append((start, s + 1, np.array(bases, np.int64)))
            start, bases = s + 1, [0]
    return chunks


class BackPlan:
    """How backward calls of one shape are carried out, and the memory that one of them at a time works in."""

    def __init__(self, prepared, key, size, rows, reverse, reset, masks):
        cell, dtype = prepared.cell, prepared.dtype
        self.key = key
        self.kernel, self.stages = prepared.kernel(masks)
        flops = 2 * _flops(cell, size, rows.steps)
        self.chunks = prepared.chunks(size, rows, reverse)
        most_rows = int(max((bases[-1] for _, _, bases in self.chunks), default=0))
        one_stage = prepared.stages[1] is None
        self.size, self.crews = prepared.crews(size, rows, flops, can_share=one_stage and not reset)
        self.length = _length(self.size, self.crews)
        self.parts = max(1, min(_parts(cell, size, flops), threads.cores()))  # of the weight gradients
        self.small = most_rows * prepared.d_row * dtype.itemsize <= SMALL_BYTES

        dh, carried = (_aligned(self.size.slots * size.batch * size.ld, dtype, zero=True) for _ in range(2))
        middle = _aligned(0 if one_stage else size.batch * size.ld, dtype)
        previous = _aligned(cell.states * most_rows * size.ld, dtype, zero=True)
        operands = len(prepared.x_blocks) if masks > 1 else masks * len([s for s in cell.stages if s.x_blocks])
        masked = _aligned(operands * most_rows * size.ld, dtype)
        d = _aligned(most_rows * prepared.d_row + size.ld, dtype)  # products read a vector behind the end
        numbers = np.empty(most_rows, np.int64)
        self.way = Way(
            dh, middle, carried, (), 0, (), (), previous, masked, d, prepared.d_row, numbers, most_rows, numbers
        )  # fmt: skip
        sums = 2 if masks else 1
        self.scratch = [
            (_aligned(sums * ROWS * _line(dtype), dtype), np.empty(max(crew.row1 - crew.row0, 2 * ROWS), np.int64))
            for crew in self.crews
        ]
        width = VECTOR_BITS // (8 * dtype.itemsize)
        self.outer_work = [_aligned(outer_work(VECTORS, width), dtype) for _ in range(self.parts)]
        self.places = np.arange(most_rows, dtype=np.int64) * size.ld  # in `previous`


class _Gradients:
    """The gradients of the parameters while they are being summed."""

    def __init__(self, prepared, plan, h_columns):
        cell, dtype, params, hidden = prepared.cell, prepared.dtype, prepared.params, prepared.hidden
        self.prepared, self.plan, self.h_columns = prepared, plan, h_columns
        self.x_blocks = prepared.x_blocks
        self.weight_ih = np.zeros((len(self.x_blocks) * hidden, plan.size.inputs), dtype)
        self.others = {
            name: np.zeros(params[name].shape, dtype) for name in ("weight_hh", "weight_hr") if name in params
        }
        self.bias = np.zeros(cell.slots * hidden, dtype)

    def products(self, way, walk, rows):
        """(first column of d, operand, places of its rows, its columns, gradient) of each weight."""
        stages, size = self.prepared.cell.stages, self.plan.size
        numbers = way.numbers[:rows]
        yield 0, walk.x, numbers * size.inputs, size.inputs, self.weight_ih
        done = masked = 0
        for stage, column in zip(stages, self.h_columns, strict=False):
            if stage.x_blocks:
                into = self.others["weight_hh"][done : done + len(stage.h_blocks) * size.hidden]
                done += len(into)
            else:
                into = self.others["weight_hr"]
            if stage.x_blocks and len(walk.masks):
                for part in np.split(into, len(stage.h_blocks) if len(walk.masks) > 1 else 1):
                    yield column, way.masked, self.plan.places + masked, size.h, part
                    column += len(part)
                    masked += way.chunk_rows * size.ld
            elif stage.operand == 0:
                yield column, way.previous, self.plan.places, size.h, into
            else:  # what the first stage handed over stands in its tape
                place = stages[0].saves[-1]
                places = (numbers - walk.tape_start * size.batch) * walk.tape_row + place * size.hidden
                yield column, walk.tape, places, size.hidden, into

    def add(self, way, walk, rows):
        """Add the sums over the first rows of way.d."""
        products = [(d0, b, at, n, c.shape[0], c.reshape(-1)) for d0, b, at, n, c in self.products(way, walk, rows)]
        dtype, work, tile_places = self.prepared.dtype, self.plan.outer_work, _tile_places()

        def part(p, parts):
            for d0, b, places, n_count, m_count, c in products:
                call(
                    weight_gradient, dtype, SOURCE, way.d, d0, way.d_row, m_count, b, places, rows, n_count, c,
                    tile_places, work[p], p, parts,
                )  # fmt: skip
            call(bias_gradient, dtype, SOURCE, way.d, way.d_row, rows, len(self.bias), self.bias, p, parts)

        threads.run(part, len(work))

    def named(self):
        """Gradients under the parameters' names, gate blocks in their order."""
        cell, hidden, params = self.prepared.cell, self.prepared.hidden, self.prepared.params
        gradients = {**self.others, "weight_ih": self.weight_ih}
        sums = self.bias.reshape(cell.slots, hidden)
        first = sums[: cell.gates]
        if self.x_blocks != list(range(cell.gates)):
            where = [self.x_blocks.index(block) for block in range(cell.gates)]
            gradients["weight_ih"] = self.weight_ih.reshape(cell.gates, hidden, -1)[where].reshape(self.weight_ih.shape)
            first = sums[where]
        gradients["bias_ih"] = first.reshape(-1)
        gradients["bias_hh"] = sums[cell.slots - cell.gates :].reshape(-1).copy()
        return {name: gradients[name] for name in params}


@functools.cache
def _tile_places():
    return np.arange(TILE_ROWS, dtype=np.int64)


def backward(tape, d_output, d_state):
    """Gradients of one layer in one direction; as :func:`fastrnn.functional.backward`, unchecked."""
    prepared, rows, walk, initial = tape.prepared, tape.rows, tape.walk, tape.states[0]
    dtype = prepared.dtype
    wx, x_rows, back, back2 = prepared.packed_back(tape.checksum)
    plan = prepared.back_plan(tape)
    size = plan.size

    # Kernels are handed flat arrays, whatever there is of them: one form, for which they are compiled once.
    dx = np.empty((size.steps, size.batch, size.inputs), dtype)
    flat_dx, d_output = dx.reshape(-1), _none(dtype) if d_output is None else d_output.reshape(-1)
    given = d_state or (None,) * len(initial)
    d_initial = tuple([np.zeros_like(s[0]) if d is None else d.copy() for s, d in zip(initial, given, strict=True)])
    way = plan.way._replace(
        initial=initial,
        d_final=tuple([_none(dtype) if d is None else d.reshape(-1) for d in given]),
        d_initial=tuple([d.reshape(-1) for d in d_initial]),
    )
    gradients = _Gradients(prepared, plan, (back.column, back2.column))

    def part(crew, p):
        call(
            backward_rows, plan.kernel, *plan.stages, size, walk, here, wx, x_rows, back, back2, d_output, flat_dx,
            *plan.scratch[p], crew, s1 == size.steps, s0, s1,
        )  # fmt: skip

    recomputed = _Recomputed(tape, plan.chunks) if tape.recompute else None
    for number in reversed(range(len(plan.chunks))):
        c0, c1, bases = plan.chunks[number]
        if recomputed:
            walk, way = recomputed.chunk(number, way)
        for s1 in range(c1, c0, -plan.length):
            s0 = max(c0, s1 - plan.length)
            here = way._replace(bases=bases[s0 - c0 :])
            _run(part, plan.crews)
        gradients.add(way, walk, int(bases[-1]))
    if recomputed:
        prepared.give_back(recomputed.plan, rows)
    if prepared.keep and plan.small and rows.lengths is None:
        prepared.back_plans.append(plan)
    return dx, gradients.named(), d_initial


class _Recomputed:
    """The tape of a forward pass that kept none, made again chunk by chunk."""

    def __init__(self, tape, chunks):
        self.tape, self.chunks = tape, chunks
        prepared, walk = tape.prepared, tape.walk
        self.plan = prepared.plan(tape.size[:3], tape.rows, walk.reset.size > 0, len(walk.masks))
        steps = max((s1 - s0 for s0, s1, _ in chunks), default=0)
        self.memory = np.empty(steps * tape.size.batch * walk.tape_row, prepared.dtype)
        self.final = tuple([np.empty_like(s) for s in tape.states[0]])

    def chunk(self, number, way):
        """The sequences, with the tape of a chunk, and the buffers for the way back through it."""
        s0, s1, _ = self.chunks[number]
        walk, states = self.tape.walk, self.tape.states[number]
        walk = walk._replace(tape=self.memory, tape_start=self.tape.size.steps - s1 if walk.reverse else s0)
        self.tape.prepared.walk(self.plan, walk, states, self.final, s0, s1, begins=True)
        return walk, way._replace(initial=states, start=s0)


# ---- about itself


def warmup(cells=None, dtypes=("float32",), training=True, begin=lambda name: None) -> dict[str, float]:
    """Compile ahead, or load from the cache, the kernels of `cells` (all of them where None).

    Returns the seconds that each took, by "cell dtype"; begin("cell dtype") is called before.
    """
    seconds = {}
    for name in CELLS if cells is None else cells:
        for dtype in dtypes:
            begin(f"{name} {np.dtype(dtype).name}")
            start = time.perf_counter()
            _call_once(CELLS[name], np.dtype(dtype), training)
            seconds[f"{name} {np.dtype(dtype).name}"] = time.perf_counter() - start
    return seconds


def _call_once(cell, dtype, training):
    """Call every kernel of a cell that a layer may call."""
    shapes = {
        "weight_ih": (cell.gates, 1),
        "weight_hh": (cell.gates, 1),
        "bias_ih": (cell.gates,),
        "bias_hh": (cell.gates,),
    }
    if cell is LSTM_PROJECTED:
        shapes["weight_hr"] = (1, 1)
    params = {key: np.zeros(shape, dtype) for key, shape in shapes.items()}
    state = tuple(np.zeros((1, 1), dtype) for _ in range(cell.states))
    x, prepared = np.zeros((1, 1, 1), dtype), prepare(cell.name, params)
    lengths, reset = np.ones(1, np.int64), np.ones((1, 1), np.bool_)
    _, _, tape = prepared.forward(x, state, lengths=lengths, reset=reset, training=training)
    if training:
        backward(tape, None, state)


def describe() -> dict:
    """What the kernels are compiled for and where they are kept."""
    return {
        "cpu": config.CPU_NAME or binding.get_host_cpu_name(),
        **machine(),
        "lanes": {"float32": VECTOR_BITS // 32, "float64": VECTOR_BITS // 64},
        "cache": forward_rows.stats.cache_path,
        "threads": threads.get_num_threads(),
    }
