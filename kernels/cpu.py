"""One layer in one direction on the CPU: packs the weights, allocates, and splits the walk over threads.

The work is done in :mod:`fastrnn.kernels.walk`. Rows are dealt to threads, each of which walks through time alone; the
weight gradients, which sum over all rows, are a second phase in which each thread owns some of the weights. No sum
is ever shared, so results do not depend on the number of threads.
"""

from __future__ import annotations

import functools
import itertools
import time
from typing import NamedTuple

import numpy as np
from numpy import empty, ndarray

from fastrnn.kernels import barrier, native, notice, records, shipped, threads
from fastrnn.kernels.cells import CELLS, LSTM_PROJECTED
from fastrnn.kernels.records import DONE, RUN, Back, Crew, Scratch, Sequences, Sizes, Weights, address
from fastrnn.kernels.tiles import (
    IN_FLIGHT,
    OUTER_BLOCK,
    ROWS,
    TILE_ROWS,
    UNITS,
    VECTOR_BITS,
    VECTORS,
    machine,
    outer_work,
    rows_in_tile,
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
    start = -address(memory) % CACHE_LINE // size
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
    line, weight = _line(weight.dtype), np.ascontiguousarray(weight)
    packed = _aligned(-(-weight.shape[1] // line) * len(blocks) * block_rows * line, weight.dtype)
    native.call(
        "pack_columns", weight.dtype, address(weight), weight.shape[1], address(_constant(*blocks)), len(blocks),
        block_rows, address(packed),
    )  # fmt: skip
    return packed


def _pack_stage(stage, params, hidden, h_size) -> Weights:
    """One stage's weights and biases for the forward walk."""
    # Parameters may come in any order.
    params = {name: np.ascontiguousarray(array) for name, array in params.items()}
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
    native.call(
        "pack_stage", dtype, address(x), inputs, address(_constant(*stage.x_blocks)), len(stage.x_blocks), address(h),
        h.shape[1], address(_constant(*stage.h_blocks)), len(stage.h_blocks), address(params["bias_ih"]) if bias else 0,
        address(params["bias_hh"]) if bias else 0, stage.gates, results, UNITS[stage.name], address(packed[:h_at]),
        address(packed[h_at:bias_at]), address(packed[bias_at:]), len(packed) - bias_at,
    )  # fmt: skip
    return Weights(packed, h_at, bias_at)


class Packed(NamedTuple):
    """Weights as the forward walk takes them."""

    checksum: int  # of what they were made of
    first: Weights
    second: Weights


# ---- forward


class _Jobs:
    """A record for each thread, and what all of them share."""

    def __init__(self, dtype, run, size, crews, **fields):
        self.records = np.zeros(len(crews), dtype)
        self.words = records.words_of(self.records)
        self.bytes = memoryview(self.words).cast("B")  # where `run`, what changes from run to run, is written
        self.run = run
        first = address(self.words)
        self.addresses = [first + i * dtype.itemsize for i in range(len(crews))]
        self.memory = [crew.sync for crew in crews]  # what their addresses need alive, and more that is put there
        for name, value in (size._asdict() | fields).items():
            self.records[name] = value
        for record, crew in zip(self.records, crews, strict=True):
            record["row0"], record["row1"], record["part"], record["sync"] = *crew[:3], address(crew.sync)

    def write(self, p, *run) -> int:
        """Say what the run of part p is about; returns the record's address."""
        self.run.pack_into(self.bytes, p * self.records.itemsize, *run)
        return self.addresses[p]


class Plan:
    """How calls of one shape are carried out, and the memory that one of them at a time works in.

    It outlives the calls, and its jobs hold addresses. So all that they point to is the plan's own, or kept alive by
    it: `memory`, `arrays`, `packed`; but for what is a call's, whose addresses stand there from `begin` to `end`.
    """

    _OF_A_CALL = records.place_of(records.FORWARD, "tape", "masks")
    _ASKED = records.place_of(records.FORWARD, "output_row", "reverse")

    def __init__(self, prepared, key, kernel, size, crews, scratch, length):
        self.key = key
        self.kernel = kernel
        self.size = size
        self.crews = crews
        self.length = length  # steps of a call
        self.threads = key[-1]
        self.entry_steps = -1  # of the last call, where it was a plain one
        self.asked = (-1,) * 5  # what the last call was asked for: nothing yet
        self.output_shape = (size.steps * size.batch, size.h)
        self.states = tuple([(1, size.batch, n) for n in (size.h, size.hidden)][: prepared.cell.states])
        self.zeros = tuple([np.zeros(shape, prepared.dtype) for shape in self.states])
        self.packed: Packed | None = None
        values = _aligned(prepared.cell.values * size.slots * size.batch * size.ld, prepared.dtype, zero=True)
        self.jobs = _Jobs(records.FORWARD, RUN, size, crews, values=address(values))
        self.memory = [values, scratch]
        for job, own in zip(self.jobs.records, scratch, strict=True):
            job["ahead"] = own.ahead
            job["sums"] = address(own.first), address(own.second)
            job["masked"] = address(own.masked)
            job["places"] = address(own.places)
            job["buffer_places"], job["output_places"], job["tape_places"] = own.buffer, own.output, own.tape
        self.jobs.records["counts"] = [array.size for array in prepared.arrays]
        self.look_at(prepared.arrays)
        # The shortest way to a run of the first job.
        self.write = functools.partial(RUN.pack_into, self.jobs.bytes, 0)
        self.run = functools.partial(kernel.function, *kernel.prefix, self.jobs.addresses[0])

    def look_at(self, arrays):
        """These are the parameters, whose checksum is taken."""
        self.arrays = arrays
        self.jobs.records["params"] = [address(array) for array in arrays]

    def take(self, packed):
        """Use these weights. A single thread checks on its way whether they are still those of the parameters."""
        self.packed = packed
        both, jobs = (packed.first, packed.second), self.jobs.records
        jobs["packed"] = [address(weights.packed) for weights in both]
        jobs["packed_h"] = [weights.h for weights in both]
        jobs["packed_bias"] = [weights.bias for weights in both]
        jobs["checksum"] = packed.checksum if len(self.crews) == 1 else 0

    def state(self, s, rows) -> tuple:
        """A copy of the states before step s, in the caller's order."""
        size = self.size
        slots = self.memory[0].reshape(-1, size.slots, size.batch, size.ld)[:, s % size.slots]
        return tuple([rows.restore(slots[v, :, : shape[2]])[None] for v, shape in enumerate(self.states)])

    def begin(self, walk):
        """What the call is asked for, and where its arrays are."""
        asked = walk.output_row, walk.column, walk.tape_row, walk.tape_start, walk.reverse
        if asked != self.asked:
            self.asked, self.entry_steps = asked, -1
            self.jobs.words[:, self._ASKED] = asked
        if walk.tape.size or walk.order.size or walk.active.size or walk.reset.size or walk.masks.size:
            arrays = walk.tape, walk.order, walk.active, walk.reset, walk.masks
            self.jobs.words[:, self._OF_A_CALL] = [address(array) for array in arrays]

    def end(self):
        """Forget the call's arrays."""
        self.jobs.words[:, self._OF_A_CALL] = 0

    def is_plain(self, steps) -> bool:
        """Whether the last call, of so many steps, was one that :meth:`Prepared.again` can make once more."""
        row, column, _, start, reverse = self.asked
        asked = row == self.size.h and not (column or start or reverse)
        return asked and len(self.crews) == 1 and self.key[2] == 0 and 0 < steps <= self.length


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

    def kernel(self, name, masks) -> native.Kernel:
        """The forward or backward kernel, for calls with so many masks."""
        return native.find(name, self.dtype, self.cell.name, min(masks, 2))

    def checksum(self) -> int:
        """Of the parameters as they are now."""
        arrays = self.arrays
        return native.call("checksum", self.dtype, *map(address, arrays), *[array.size for array in arrays])

    def packed(self) -> Packed:
        """The weights as they are now."""
        checksum = self.checksum() if self.keep else 0
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
            plan.entry_steps = size.steps
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
                output = empty(plan.output_shape, dtype)
                plan.write(1, id(x), id(output), id(state[0]), id(state[-1]), id(final[0]), id(final[-1]), 1, 0, steps)
                if plan.run() == DONE:
                    result = output, tuple(final)
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
        x, output = walk.x.reshape(-1, plan.size.inputs), walk.output
        arrays = x, output, initial[0], initial[-1], final[0], final[-1]
        one, jobs, (function, prefix) = len(plan.crews) == 1, plan.jobs, plan.kernel
        if plan.packed is None or not one:
            packed = self.packed()
            if packed is not plan.packed:
                plan.take(packed)

        def part(crew, p):
            record = jobs.write(p, crew.parts, *map(id, arrays), begins and start == s0, start, end)
            return function(*prefix, record)

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
        return Plan(self, key, self.kernel("forward", masks), size, crews, scratch, length)

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
        """The products of the way back, with x, and with h of the first and the second stage."""
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
        packed = Back(wx, 0, len(x_blocks) * hidden), back, back2
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
        self.kernel = prepared.kernel("backward", masks)
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
        self.previous = _aligned(cell.states * most_rows * size.ld, dtype, zero=True)
        operands = len(prepared.x_blocks) if masks > 1 else masks * len([s for s in cell.stages if s.x_blocks])
        self.masked = _aligned(operands * most_rows * size.ld, dtype)
        self.d = _aligned(most_rows * prepared.d_row + size.ld, dtype)  # products read a vector behind the end
        self.d_row, self.chunk_rows, self.numbers = prepared.d_row, most_rows, np.empty(most_rows, np.int64)
        self.jobs = _Jobs(
            records.BACKWARD, records.BACK_RUN, self.size, self.crews, dh=address(dh), middle=address(middle),
            carried=address(carried), previous=address(self.previous), masked=address(self.masked),
            d=address(self.d), d_row=self.d_row, numbers=address(self.numbers), chunk_rows=most_rows,
        )  # fmt: skip
        sums = 2 if masks else 1
        scratch = [
            (_aligned(sums * ROWS * _line(dtype), dtype), np.empty(max(crew.row1 - crew.row0, 2 * ROWS), np.int64))
            for crew in self.crews
        ]
        for job, (own_sums, places) in zip(self.jobs.records, scratch, strict=True):
            job["sums"], job["places"] = address(own_sums), address(places)
        self.memory = [dh, carried, middle, scratch]
        width = VECTOR_BITS // (8 * dtype.itemsize)
        self.outer_work = [_aligned(outer_work(VECTORS, width), dtype) for _ in range(self.parts)]
        self.places = np.arange(most_rows, dtype=np.int64) * size.ld  # in `previous`

    _OF_A_CALL = records.place_of(records.BACKWARD, "x", "d_initial")
    _ASKED = records.place_of(records.BACKWARD, "output_row", "start")

    def begin(self, walk, start, initial, packed, ends):
        """What the way back through a chunk is about, and where the call's arrays are."""
        words, (weights_x, back, back2) = self.jobs.words, packed
        words[:, self._ASKED] = (
            walk.output_row, walk.column, walk.tape_row, walk.tape_start, walk.reverse, start
        )  # fmt: skip
        none = (None,) * (2 - len(initial))  # of c, where a cell has none
        arrays = (
            walk.x, walk.output, walk.tape, walk.order, walk.active, walk.reset, walk.masks, ends.d_output, ends.dx,
            weights_x.weights, back.weights, back2.weights, *initial, *none, *ends.d_final, *none, *ends.d_initial,
            *none,
        )  # fmt: skip
        words[:, self._OF_A_CALL] = [0 if array is None else address(array) for array in arrays]
        jobs = self.jobs.records
        jobs["rows_x"] = weights_x.count
        jobs["columns"], jobs["counts"] = (back.column, back2.column), (back.count, back2.count)

    def end(self):
        """Forget the call's arrays."""
        self.jobs.words[:, self._OF_A_CALL] = 0


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

    def products(self, walk, rows):
        """(first column of d, operand, places of its rows, its columns, gradient) of each weight."""
        stages, plan, size = self.prepared.cell.stages, self.plan, self.plan.size
        numbers = plan.numbers[:rows]
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
                    yield column, plan.masked, plan.places + masked, size.h, part
                    column += len(part)
                    masked += plan.chunk_rows * size.ld
            elif stage.operand == 0:
                yield column, plan.previous, plan.places, size.h, into
            else:  # what the first stage handed over stands in its tape
                place = stages[0].saves[-1]
                places = (numbers - walk.tape_start * size.batch) * walk.tape_row + place * size.hidden
                yield column, walk.tape, places, size.hidden, into

    def add(self, walk, rows):
        """Add the sums over the first `rows` rows of the chunk's gate gradients."""
        plan, dtype, tile_places = self.plan, self.prepared.dtype, address(_tile_places())
        d, products = address(plan.d), list(self.products(walk, rows))

        def part(p, parts):
            work = address(plan.outer_work[p])
            for d0, b, places, n_count, c in products:
                native.call(
                    "weight_gradient", dtype, d, d0, plan.d_row, len(c), address(b), address(places), rows, n_count,
                    address(c), tile_places, work, p, parts,
                )  # fmt: skip
            native.call("bias_gradient", dtype, d, plan.d_row, rows, len(self.bias), address(self.bias), p, parts)

        threads.run(part, len(plan.outer_work))

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


class Ends(NamedTuple):
    """The gradients that a way back begins with, and those that it ends with: of x, and of the initial states."""

    d_output: np.ndarray | None
    d_final: tuple
    dx: np.ndarray
    d_initial: tuple


def backward(tape, d_output, d_state):
    """Gradients of one layer in one direction; as :func:`fastrnn.functional.backward`, unchecked."""
    prepared, rows, walk, initial = tape.prepared, tape.rows, tape.walk, tape.states[0]
    dtype = prepared.dtype
    packed = prepared.packed_back(tape.checksum)
    plan = prepared.back_plan(tape)
    size, jobs, (function, prefix) = plan.size, plan.jobs, plan.kernel

    given = d_state or (None,) * len(initial)
    d_initial = tuple([np.zeros_like(s[0]) if d is None else d.copy() for s, d in zip(initial, given, strict=True)])
    ends = Ends(d_output, tuple(given), np.empty((size.steps, size.batch, size.inputs), dtype), d_initial)
    gradients = _Gradients(prepared, plan, [back.column for back in packed[1:]])

    def part(crew, p):
        record = jobs.write(p, crew.parts, s1 == size.steps, s0, s1, address(bases[s0 - c0 :]))
        return function(*prefix, record)

    recomputed = _Recomputed(tape, plan.chunks) if tape.recompute else None
    start = 0
    for number in reversed(range(len(plan.chunks))):
        c0, c1, bases = plan.chunks[number]
        if recomputed:
            walk, initial, start = recomputed.chunk(number)
        plan.begin(walk, start, initial, packed, ends)
        try:
            for s1 in range(c1, c0, -plan.length):
                s0 = max(c0, s1 - plan.length)
                _run(part, plan.crews)
        finally:
            plan.end()
        gradients.add(walk, int(bases[-1]))
    if recomputed:
        prepared.give_back(recomputed.plan, rows)
    if prepared.keep and plan.small and rows.lengths is None:
        prepared.back_plans.append(plan)
    return ends.dx, gradients.named(), d_initial


class _Recomputed:
    """The tape of a forward pass that kept none, made again chunk by chunk."""

    def __init__(self, tape, chunks):
        self.tape, self.chunks = tape, chunks
        prepared, walk = tape.prepared, tape.walk
        self.plan = prepared.plan(tape.size[:3], tape.rows, walk.reset.size > 0, len(walk.masks))
        steps = max((s1 - s0 for s0, s1, _ in chunks), default=0)
        self.memory = np.empty(steps * tape.size.batch * walk.tape_row, prepared.dtype)
        self.final = tuple([np.empty_like(s) for s in tape.states[0]])

    def chunk(self, number):
        """The sequences, with the tape of a chunk, the states before it, and its first step."""
        s0, s1, _ = self.chunks[number]
        walk, states = self.tape.walk, self.tape.states[number]
        walk = walk._replace(tape=self.memory, tape_start=self.tape.size.steps - s1 if walk.reverse else s0)
        self.tape.prepared.walk(self.plan, walk, states, self.final, s0, s1, begins=True)
        return walk, states, s0


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
            with notice.silence():  # `begin` says it
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
        **machine(),
        "lanes": {"float32": VECTOR_BITS // 32, "float64": VECTOR_BITS // 64},
        "machine_code": shipped.describe(),
        "threads": threads.get_num_threads(),
    }
