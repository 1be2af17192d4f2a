"""One layer in one direction on the CPU: packs the weights, allocates, and splits the walk over threads.

The work is done in :mod:`fastrnn.kernels.walk`. Rows are dealt to threads, each of which walks through time alone; the
weight gradients, which sum over all rows, are a second phase in which each thread owns some of the weights. No sum
is ever shared, so results do not depend on the number of threads.
"""

from __future__ import annotations

import ctypes
import functools
import time
from typing import NamedTuple

import numpy as np
from llvmlite import binding
from numba.core import config

from fastrnn.kernels import threads
from fastrnn.kernels.cells import CELLS, LSTM_PROJECTED, Cell
from fastrnn.kernels.product import (
    IN_FLIGHT,
    OUTER_BLOCK,
    VECTORS,
    outer_work,
    pack_columns,
    pack_stage,
    rows_in_tile,
)
from fastrnn.kernels.simd import VECTOR_BITS, machine
from fastrnn.kernels.stage import SOURCE, UNITS, call
from fastrnn.kernels.walk import (
    ROWS,
    TILE_ROWS,
    Sequences,
    Sizes,
    Sums,
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
THREAD_FLOPS = 8e6  # work that is worth waking a thread for


class Rows(NamedTuple):
    """Rows by decreasing length, and how many of them are active at each step."""

    order: np.ndarray
    active: np.ndarray
    lengths: np.ndarray | None  # in order
    steps: int  # of all rows together

    def share(self, part: int, parts: int) -> tuple[int, int]:
        """First and last row of a part, parts being of nearly equal work."""
        batch = len(self.order)
        if self.lengths is None or parts == 1:
            return batch * part // parts, batch * (part + 1) // parts
        done = np.cumsum(self.lengths)
        cut = [int(np.searchsorted(done, done[-1] * p / parts)) for p in (part, part + 1)]
        return cut[0] if part else 0, cut[1] if part + 1 < parts else batch

    def restore(self, array: np.ndarray) -> np.ndarray:
        """A copy of [B, ...] in the caller's order."""
        restored = np.empty(array.shape, array.dtype)
        restored[self.order] = array
        return restored


class Tape(NamedTuple):
    """What backward needs of a forward pass. It refers to the caller's x, params and output, and owns the rest."""

    cell: Cell
    size: Sizes
    x: np.ndarray
    params: dict
    rows: Rows
    walk: Sequences
    initial: np.ndarray  # [states, B, ld]


def _sort(lengths, steps, batch) -> Rows:
    if lengths is None:
        return Rows(np.arange(batch, dtype=np.int64), np.full(steps, batch, np.int64), None, steps * batch)
    order = np.argsort(-lengths, kind="stable").astype(np.int64, copy=False)
    active = np.searchsorted(-lengths[order], -np.arange(steps), side="left").astype(np.int64)
    return Rows(order, active, lengths[order], int(lengths.sum()))


def _sizes(cell, x, params) -> Sizes:
    steps, batch, inputs = x.shape
    hidden = params["weight_ih"].shape[0] // cell.gates
    line = VECTORS * VECTOR_BITS // (8 * x.itemsize)
    return Sizes(steps, batch, inputs, hidden, params["weight_hh"].shape[1], -(-hidden // line) * line)


def _aligned(count, dtype, zero=False):
    """A one-dimensional array that starts on a cache line."""
    size = dtype.itemsize
    memory = (np.zeros if zero else np.empty)(count + 64 // size, dtype)
    start = -ctypes.addressof(ctypes.c_char.from_buffer(memory)) % 64 // size
    return memory[start : start + count]


@functools.cache
def _none(dtype):
    """No numbers, where there could be some."""
    return np.empty(0, dtype)


@functools.cache
def _constant(*numbers):
    return np.array(numbers, np.int64)


def _flops(cell, size, rows) -> float:
    """Multiplications and additions of a forward pass over so many rows and steps."""
    return 2.0 * rows * cell.gates * size.hidden * (size.inputs + size.h)


def _shares(rows, flops):
    """(first row, last row) of each thread's part: as many parts as the work is worth."""
    parts = int(max(1, min(threads.get_num_threads(), len(rows.order), flops // THREAD_FLOPS)))
    return [rows.share(p, parts) for p in range(parts)]


# ---- weights


def _pack_columns(weight, blocks, block_rows, width):
    line = VECTORS * width
    packed = _aligned(-(-weight.shape[1] // line) * len(blocks) * block_rows * line, weight.dtype)
    call(
        pack_columns, weight.dtype, SOURCE, weight.reshape(-1), weight.shape[1], _constant(*blocks), block_rows, packed
    )
    return packed


def _pack_stage(stage, params, size) -> Weights:
    """One stage's weights and biases for the forward walk."""
    dtype = params["weight_ih"].dtype
    gated = bool(stage.x_blocks)  # if not, it is the projection
    results = size.hidden if gated else size.h
    x, h = params["weight_ih"], params["weight_hh" if gated else "weight_hr"]
    width, unit_vectors = VECTOR_BITS // (8 * dtype.itemsize), UNITS[stage.name]
    panels = -(-results // (unit_vectors * width))
    x_size = panels * size.inputs * len(stage.x_blocks) * unit_vectors * width
    h_size = panels * h.shape[1] * len(stage.h_blocks) * unit_vectors * width
    memory = _aligned(x_size + h_size + panels * stage.gates * unit_vectors * width, dtype)
    weights = Weights(memory[:x_size], memory[x_size : x_size + h_size], memory[x_size + h_size :])
    bias = gated and "bias_ih" in params
    call(
        pack_stage, dtype, SOURCE, x.reshape(-1), size.inputs, _constant(*stage.x_blocks), h.reshape(-1), h.shape[1],
        _constant(*stage.h_blocks), params["bias_ih"].reshape(-1) if bias else _none(dtype),
        params["bias_hh"].reshape(-1) if bias else _none(dtype), stage.gates, results, unit_vectors, *weights,
    )  # fmt: skip
    return weights


# ---- forward


def _ahead(stage, size, rows, sums_row, itemsize) -> int:
    """Steps whose products with x are made together: where a step's own rows are fewer than fill a tile."""
    if rows == 0 or rows >= rows_in_tile(len(stage.x_blocks) * UNITS[stage.name]):
        return 0
    room = AHEAD_BYTES // (sums_row * itemsize * rows)
    return max(1, min(size.steps, max(room, -(-8 // rows)), 256))


def _sums(first, second, size, row0, row1, dtype) -> Sums:
    """Scratch of the forward walk for the rows row0 to row1."""
    width = VECTOR_BITS // (8 * dtype.itemsize)
    rows = row1 - row0
    panel = first.gates * UNITS[first.name] * width
    sums_row = -(-size.hidden // (UNITS[first.name] * width)) * panel
    ahead = _ahead(first, size, rows, sums_row, dtype.itemsize)
    few_rows = IN_FLIGHT * VECTORS * width * 2  # of several panels
    g = _aligned(max(ahead * rows * sums_row, min(rows, ROWS) * panel, few_rows), dtype)
    g2 = g if second is None else _aligned(max(ROWS * second.gates * UNITS[second.name] * width, few_rows), dtype)
    places = [np.empty(n, np.int64) for n in (max(1, ahead) * rows, rows, rows, size.batch)]
    return Sums(ahead, g, g2, *places)


def _slice(cell, size, flops) -> int:
    """Steps between two looks at Ctrl-C."""
    weights = cell.gates * size.hidden * (size.inputs + size.h)
    seconds = flops / max(size.steps, 1) / SLOW_FLOPS + 4 * weights / SLOW_BYTES
    return max(1, int(SLICE_SECONDS / max(seconds, 1e-9)))


def forward(cell, x, params, state, *, lengths=None, reset=None, reverse=False, training=False, output=None, column=0):
    """One layer in one direction; arguments and results are those of :func:`fastrnn.functional.forward`, unchecked."""
    cell = LSTM_PROJECTED if "weight_hr" in params else CELLS[cell]
    dtype = x.dtype
    size = _sizes(cell, x, params)
    rows = _sort(lengths, size.steps, size.batch)
    first, second = cell.stages if len(cell.stages) == 2 else (*cell.stages, None)
    if output is None:
        output = np.empty((size.steps, size.batch, size.h), dtype)
    if lengths is not None:
        output[:, :, column : column + size.h] = 0
    tape = np.empty(size.steps * size.batch * cell.tape * size.hidden, dtype) if training else np.empty(0, dtype)
    walk = Sequences(
        x.reshape(-1),
        output.reshape(-1),
        output.shape[2],
        column,
        tape,
        cell.tape * size.hidden,
        rows.order,
        rows.active,
        _none(np.bool_) if reset is None else reset.reshape(-1),
        reverse,
    )
    weights = _pack_stage(first, params, size)
    weights2 = weights if second is None else _pack_stage(second, params, size)

    values = _aligned(cell.values * 2 * size.batch * size.ld, dtype, zero=True)
    slots = values.reshape(cell.values, 2, size.batch, size.ld)
    for v, s in enumerate(state):
        slots[v, :, :, : s.shape[1]] = s if lengths is None else s[rows.order]
    final = slots[: cell.states, 0].copy()
    initial = final.copy() if training else final

    flops = _flops(cell, size, rows.steps)
    shares = _shares(rows, flops)
    sums = [_sums(first, second, size, *share, dtype) for share in shares]
    length = _slice(cell, size, flops)
    for s0 in range(0, size.steps, length):
        s1 = min(s0 + length, size.steps)

        def part(p, _, s0=s0, s1=s1):
            call(
                forward_rows,
                (cell.name, dtype),
                first,
                second,
                size,
                walk,
                weights,
                weights2,
                cell.states,
                values,
                final.reshape(-1),
                sums[p],
                s0,
                s1,
                *shares[p],
            )

        threads.run(part, len(shares))
    ends = tuple(final[v, :, : s.shape[1]] for v, s in enumerate(state))
    ends = tuple(end.copy() if lengths is None else rows.restore(end) for end in ends)
    return output, ends, Tape(cell, size, x, params, rows, walk, initial) if training else None


# ---- backward


def _chunks(active, row_bytes, steps):
    """(first step, last step, first row of each step) of the pieces between which weight gradients are summed.

    At most `steps` steps and, roughly, CHUNK_BYTES of gate gradients. They depend on the sizes alone, so that sums
    are the same for any number of threads.
    """
    most = max(CHUNK_BYTES // row_bytes, OUTER_BLOCK)
    chunks, start, bases = [], 0, [0]
    for s, rows in enumerate(active.tolist()):
        bases.append(bases[-1] + rows)
        if bases[-1] >= most or len(bases) > steps or s + 1 == len(active):
            chunks.append((start, s + 1, np.array(bases, np.int64)))
            start, bases = s + 1, [0]
    return chunks


def _way(tape, d_state, most_rows, d_row) -> Way:
    """Buffers of the way back, holding the gradients of the final state."""
    size, dtype = tape.size, tape.x.dtype
    dh, middle, carried = (_aligned(size.batch * size.ld, dtype, zero=True) for _ in range(3))
    for buffer, s in zip((dh, carried), d_state or (), strict=False):
        if s is not None:
            buffer.reshape(size.batch, size.ld)[:, : s.shape[1]] = s[tape.rows.order]
    previous = _aligned(tape.cell.states * most_rows * size.ld, dtype, zero=True)
    d = _aligned(most_rows * d_row + size.ld, dtype)  # products read a vector behind the end
    numbers = np.empty(most_rows, np.int64)
    return Way(dh, middle, carried, tape.initial.reshape(-1), previous, d, d_row, numbers, numbers)


class _Gradients:
    """The gradients of the parameters while they are being summed."""

    def __init__(self, tape, h_columns, parts):
        cell, size, dtype = tape.cell, tape.size, tape.x.dtype
        width = VECTOR_BITS // (8 * dtype.itemsize)
        self.tape = tape
        self.x_blocks = [block for stage in cell.stages for block in stage.x_blocks]
        self.h_columns = h_columns
        self.weight_ih = np.zeros((len(self.x_blocks) * size.hidden, size.inputs), dtype)
        self.others = {k: np.zeros(p.shape, dtype) for k, p in tape.params.items() if k in ("weight_hh", "weight_hr")}
        self.bias = np.zeros(cell.slots * size.hidden, dtype)
        self.scratch = [_aligned(outer_work(VECTORS, width), dtype) for _ in range(parts)]
        self.tile_places = np.arange(TILE_ROWS, dtype=np.int64)

    def products(self, way, rows):
        """(first column of d, operand, places of its rows, its columns, gradient) of each weight."""
        cell, size, walk = self.tape.cell, self.tape.size, self.tape.walk
        numbers = way.numbers[:rows]
        yield 0, walk.x, numbers * size.inputs, size.inputs, self.weight_ih
        done = 0
        for stage, column in zip(cell.stages, self.h_columns, strict=False):
            if stage.operand == 0:
                operand, places, count = way.previous, np.arange(rows, dtype=np.int64) * size.ld, size.h
            else:  # what the first stage handed over stands in its tape
                place = cell.stages[0].saves[-1]
                operand, places, count = walk.tape, numbers * walk.tape_row + place * size.hidden, size.hidden
            if stage.x_blocks:
                into = self.others["weight_hh"][done : done + len(stage.h_blocks) * size.hidden]
                done += len(into)
            else:
                into = self.others["weight_hr"]
            yield column, operand, places, count, into

    def add(self, way, rows):
        """Add the sums over the first rows of way.d."""
        products = [
            (d0, b.reshape(-1), at, n, c.shape[0], c.reshape(-1)) for d0, b, at, n, c in self.products(way, rows)
        ]
        dtype, scratch = way.d.dtype, self.scratch

        def part(p, parts):
            for d0, b, places, n_count, m_count, c in products:
                call(
                    weight_gradient, dtype, SOURCE, way.d, d0, way.d_row, m_count, b, places, rows, n_count, c,
                    self.tile_places, scratch[p], p, parts,
                )  # fmt: skip
            call(bias_gradient, dtype, SOURCE, way.d, way.d_row, rows, len(self.bias), self.bias, p, parts)

        threads.run(part, len(scratch))

    def named(self):
        """Gradients under the parameters' names, gate blocks in their order."""
        cell, hidden, params = self.tape.cell, self.tape.size.hidden, self.tape.params
        where = [self.x_blocks.index(block) for block in range(cell.gates)]
        gradients = dict(self.others)
        gradients["weight_ih"] = self.weight_ih
        sums = self.bias.reshape(cell.slots, hidden)
        if where != list(range(cell.gates)):
            gradients["weight_ih"] = self.weight_ih.reshape(cell.gates, hidden, -1)[where].reshape(self.weight_ih.shape)
        gradients["bias_ih"] = sums[where].reshape(-1)
        gradients["bias_hh"] = sums[cell.slots - cell.gates :].reshape(-1).copy()
        return {name: gradients[name] for name in params}


def backward(tape, d_output, d_state):
    """Gradients of one layer in one direction; as :func:`fastrnn.functional.backward`, unchecked."""
    cell, size, x, params, rows, walk = tape.cell, tape.size, tape.x, tape.params, tape.rows, tape.walk
    first, second = cell.stages if len(cell.stages) == 2 else (*cell.stages, None)
    dtype, hidden = x.dtype, size.hidden
    width = VECTOR_BITS // (8 * dtype.itemsize)

    # Columns of d where the gate gradients of each stage's product with h begin.
    h_column, h_column2 = (first.gates - len(first.h_blocks)) * hidden, 0
    x_blocks = first.x_blocks
    wh = _pack_columns(params["weight_hh"], first.h_blocks, hidden, width)
    wh2, d_row = wh, cell.slots * hidden
    if second is not None and second.x_blocks:
        x_blocks, h_column2 = x_blocks + second.x_blocks, len(first.h_blocks) * hidden
        wh2 = _pack_columns(params["weight_hh"], second.h_blocks, hidden, width)
    elif second is not None:
        h_column2, d_row = d_row, d_row + size.h
        wh2 = _pack_columns(params["weight_hr"], second.h_blocks, size.h, width)
    wx = _pack_columns(params["weight_ih"], x_blocks, hidden, width)

    dx = (np.empty if rows.lengths is None else np.zeros)(x.shape, dtype)
    d_flat = _none(dtype) if d_output is None else d_output.reshape(-1)
    flops = 2 * _flops(cell, size, rows.steps)
    chunks = _chunks(
        rows.active[::-1] if walk.reverse else rows.active, d_row * dtype.itemsize, _slice(cell, size, flops)
    )
    way = _way(tape, d_state, int(max((bases[-1] for _, _, bases in chunks), default=0)), d_row)
    shares = _shares(rows, flops)
    gradients = _Gradients(tape, (h_column, h_column2), len(shares))
    scratch = [
        (_aligned(ROWS * VECTORS * width, dtype), np.empty(max(last - start, 2 * ROWS), np.int64))
        for start, last in shares
    ]
    for s0, s1, bases in reversed(chunks):
        here = way._replace(bases=bases)

        def part(p, _, s0=s0, s1=s1, here=here):
            call(
                backward_rows,
                (cell.name, dtype),
                first,
                second,
                size,
                walk,
                cell.states,
                here,
                wx,
                len(x_blocks) * hidden,
                wh,
                h_column,
                wh2,
                h_column2,
                d_flat,
                dx.reshape(-1),
                *scratch[p],
                s0,
                s1,
                *shares[p],
            )

        threads.run(part, len(shares))
        gradients.add(way, int(bases[-1]))
    return dx, gradients.named(), _state_gradients(tape, way)


def _state_gradients(tape, way):
    cell, size, rows = tape.cell, tape.size, tape.rows
    dh = rows.restore(way.dh.reshape(size.batch, size.ld)[:, : size.h])
    if cell.states == 1:
        return (dh,)
    return dh, rows.restore(way.carried.reshape(size.batch, size.ld)[:, : size.hidden])


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
            shapes = {
                "weight_ih": (cell.gates, 1),
                "weight_hh": (cell.gates, 1),
                "bias_ih": (cell.gates,),
                "bias_hh": (cell.gates,),
            }
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
        "cache": forward_rows.stats.cache_path,
        "threads": threads.get_num_threads(),
    }
