"""Packed weights and the register-tiled product (CPU).

A product adds A W to C for some rows. Each element of C is one sum, taken in the order of k, whatever tile it falls into:
the same bits for any number of rows and threads.

Weights are packed as [panel][K][V][lanes]: a panel is V vectors of columns, and the loop over k reads it as one stream.
A tile is some rows times one panel: its sums stay in registers over the whole loop. V is a property of the product's
type: kernels hand it over as a tuple of V integers (``columns``).
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import njit
from numba.core import types
from numba.extending import intrinsic, register_jitable

from fastrnn.kernels import simd
from fastrnn.kernels.simd import INT64, REGISTERS, lanes, load, store

VECTORS = 4  # vectors of columns in a panel of a plain product
BLOCK = 128  # steps of k between visits of the next tile of rows: a panel's share stays in the first-level cache
IN_FLIGHT = 8  # sums under way that hide the latency of a fused multiply-add


def rows_in_tile(vectors: int) -> int:
    """Most rows that a tile can have: its sums, one row of weights and one element of A fill the registers."""
    return (REGISTERS * 3 // 4) // vectors


def panels_together(rows: int, vectors: int) -> int:
    """Panels that a tile of few rows takes at a time, so that enough sums are under way."""
    return max(1, -(-IN_FLIGHT // (rows * vectors)))


def _emit_tile(builder, vector, shape, a, w, c, k_count):
    """One tile: C += A W for `shape` = (rows, panels, vectors). a, w, c give pointers to their elements."""
    rows, panels, vectors = shape
    places = [(r, p, v) for r in range(rows) for p in range(panels) for v in range(vectors)]
    start = [simd.load_vector(builder, vector, c(*place)) for place in places]
    before = builder.block
    loop, after = builder.append_basic_block("k"), builder.append_basic_block("k_end")
    builder.cbranch(builder.icmp_signed(">", k_count, ir.Constant(INT64, 0)), loop, after)

    builder.position_at_end(loop)
    k = builder.phi(INT64)
    sums = [builder.phi(vector.llvm) for _ in places]
    k.add_incoming(ir.Constant(INT64, 0), before)
    for value, first in zip(sums, start, strict=True):
        value.add_incoming(first, before)
    weights = {
        (p, v): simd.load_vector(builder, vector, w(k, p, v)) for p in range(panels) for v in range(vectors)
    }
    elements = [simd.splat(builder, vector, builder.load(a(r, k))) for r in range(rows)]
    new = [
        simd.multiply_add(builder, vector, elements[r], weights[p, v], value)
        for (r, p, v), value in zip(places, sums, strict=True)
    ]
    k_next = builder.add(k, ir.Constant(INT64, 1))
    k.add_incoming(k_next, builder.block)
    for value, following in zip(sums, new, strict=True):
        value.add_incoming(following, builder.block)
    builder.cbranch(builder.icmp_signed("<", k_next, k_count), loop, after)

    builder.position_at_end(after)
    totals = [builder.phi(vector.llvm) for _ in places]
    for total, first, following in zip(totals, start, new, strict=True):
        total.add_incoming(first, before)
        total.add_incoming(following, loop)
    for place, total in zip(places, totals, strict=True):
        simd.store_vector(builder, vector, total, c(*place))


@intrinsic
def multiply_tile(typingctx, columns, rows, panels, a, a0, places, place, step, w, w0, w_panel, k_count, c, c0, c_row, c_panel):
    """C[r, p] += sum over k of A[r, k] W[p, k] for one tile of `rows` rows (1 to rows_in_tile) and `panels` panels.

    A[r, k] stands at a[a0 + places[place + r] + k * step], W[p, k] at w[w0 + p * w_panel + k * V * lanes], C[r, p] (V
    vectors, is modified) at c[c0 + r * c_row + p * c_panel]. `panels` is 1 or panels_together(rows, V).
    """
    vectors = len(columns)
    vector = simd.vector_of(a)
    shapes = {}
    for r in range(1, rows_in_tile(vectors) + 1):
        for p in {1, panels_together(r, vectors)}:
            shapes[r, p] = (r, p, vectors)

    def emit(context, builder, sig, args):
        (_, rows, panels, a, a0, places, place, step, w, w0, w_panel, k_count, c, c0, c_row, c_panel) = args
        array = {name: sig.args[i] for name, i in (("a", 3), ("places", 5), ("w", 8), ("c", 12))}
        pointer = lambda name, value, index, to=None: simd.address(context, builder, array[name], value, index, to)
        times = lambda x, n: builder.mul(x, ir.Constant(INT64, n)) if n != 1 else x

        def tile(shape):
            at = [builder.load(pointer("places", places, builder.add(place, ir.Constant(INT64, r)))) for r in range(shape[0])]
            a_rows = [pointer("a", a, builder.add(a0, offset)) for offset in at]
            w_panels = [pointer("w", w, builder.add(w0, times(w_panel, p))) for p in range(shape[1])]
            c_rows = [
                [pointer("c", c, builder.add(c0, builder.add(times(c_row, r), times(c_panel, p)))) for p in range(shape[1])]
                for r in range(shape[0])
            ]

            def w_at(k, p, v):
                index = builder.add(builder.mul(k, ir.Constant(INT64, vectors * vector.lanes)), ir.Constant(INT64, v * vector.lanes))
                return builder.bitcast(builder.gep(w_panels[p], [index]), vector.llvm.as_pointer())

            def c_at(r, p, v):
                return builder.bitcast(builder.gep(c_rows[r][p], [ir.Constant(INT64, v * vector.lanes)]), vector.llvm.as_pointer())

            _emit_tile(builder, vector, shape, lambda r, k: builder.gep(a_rows[r], [builder.mul(k, step)]), w_at, c_at, k_count)

        done = builder.append_basic_block("tile_end")
        which = builder.add(rows, builder.mul(panels, ir.Constant(INT64, 64)))
        switch = builder.switch(which, done)
        for (r, p), shape in shapes.items():
            block = builder.append_basic_block(f"tile_{r}_{p}")
            switch.add_case(ir.Constant(INT64, r + 64 * p), block)
            builder.position_at_end(block)
            tile(shape)
            builder.branch(done)
        builder.position_at_end(done)
        return context.get_dummy_value()

    i = types.intp
    return types.void(columns, i, i, a, i, places, i, i, w, i, i, i, c, i, i, i), emit


@intrinsic
def tile_rows(typingctx, columns):
    """rows_in_tile(V), as a constant."""
    return types.intp(columns), lambda context, builder, sig, args: ir.Constant(INT64, rows_in_tile(len(sig.args[0])))


@register_jitable
def multiply(columns, rows, panels, a, a0, places, place, w, w0, w_panel, k_count, c, c0, c_row, c_panel):
    """C[r, p] += A[r] W[p] for any number of rows. `panels` above 1 only where panels_together(rows, V) says so.

    Rows are dealt to tiles of nearly equal height; many rows walk through k in blocks, so that a block of the panel is
    read from the first-level cache by all but the first tile.
    """
    most = tile_rows(columns)
    tiles = (rows + most - 1) // most
    block = k_count if tiles <= 1 else BLOCK
    k = 0
    while k < k_count:
        count = min(block, k_count - k)
        r = 0
        for tile in range(tiles):
            height = (rows - r + tiles - tile - 1) // (tiles - tile)
            multiply_tile(
                columns, height, panels, a, a0 + k, places, place + r, 1, w, w0 + k * len(columns) * lanes(w), w_panel,
                count, c, c0 + r * c_row, c_row, c_panel,
            )  # fmt: skip
            r += height
        k += count


@register_jitable
def clear(c, start, count):
    for i in range(start, start + count):
        c[i] = 0


# ---- packing


@njit(cache=True, nogil=True, error_model="numpy")
def pack_gates(source, weight, blocks, hidden, units, packed):
    """Pack rows (gate blocks of units) of `weight` [G*H, K] as [panel][K][gate][unit vector][lane] into `packed` (is modified).

    A panel holds the gates `blocks` of `units` vectors of hidden units; units beyond `hidden` become 0.
    """
    k_count = weight.shape[1]
    width = lanes(packed)
    gates = len(blocks)
    panel_units = units * width
    panel = 0
    for first in range(0, hidden, panel_units):
        base = panel * k_count * gates * panel_units
        for g in range(gates):
            for j in range(panel_units):
                unit = first + j
                at = base + g * panel_units + j
                if unit < hidden:
                    row = blocks[g] * hidden + unit
                    for k in range(k_count):
                        packed[at + k * gates * panel_units] = weight[row, k]
                else:
                    for k in range(k_count):
                        packed[at + k * gates * panel_units] = 0
        panel += 1


@njit(cache=True, nogil=True, error_model="numpy")
def pack_columns(source, weight, blocks, block_rows, packed):
    """Pack the columns of `weight` [., N] as [panel][K][column], where K runs over the rows of `blocks` (is modified: packed)."""
    columns = weight.shape[1]
    width = VECTORS * lanes(packed)
    k_count = len(blocks) * block_rows
    for panel in range((columns + width - 1) // width):
        first = panel * width
        count = min(width, columns - first)
        at = panel * k_count * width
        for block in blocks:
            for k in range(block_rows):
                row = block * block_rows + k
                for j in range(count):
                    packed[at + j] = weight[row, first + j]
                for j in range(count, width):
                    packed[at + j] = 0
                at += width


# ---- the product of the weight gradients


@register_jitable
def _pack_rows(b, places, q0, count, first, width, columns, packed):
    """packed[q, j] = b[places[q0 + q] + first + j] for j < columns, else 0."""
    n = min(width, columns - first)
    for q in range(count):
        at = places[q0 + q] + first
        for j in range(0, width, lanes(b)):
            store(packed, q * width + j, load(b, at + j, max(0, n - j)), lanes(b))


@register_jitable
def add_outer_products(columns, d, d0, d_row, m0, m1, b, places, rows, n_count, c, c_row, work):
    """C[m, n] += sum over rows q of D[q, m] B[q, n] for m0 <= m < m1.

    D[q, m] stands at d[d0 + q * d_row + m], B[q, n] at b[places[q] + n], C[m, n] (is modified) at c[m * c_row + n]. Each block of
    rows is summed by itself and then added. `work` holds gradient_work(...) numbers.
    """
    height = tile_rows(columns)
    width = len(columns) * lanes(b)
    tiles = (m1 - m0 + height - 1) // height
    d_packed, b_packed, tile = 0, tiles * height * BLOCK, tiles * height * BLOCK + BLOCK * width
    places_in_tile = _places_in_tile(height)
    for q0 in range(0, rows, BLOCK):
        count = min(BLOCK, rows - q0)
        for i in range(tiles):
            m = m0 + i * height
            n = min(height, m1 - m)
            for q in range(count):
                at = d_packed + (i * BLOCK + q) * height
                for j in range(n):
                    work[at + j] = d[d0 + (q0 + q) * d_row + m + j]
                for j in range(n, height):
                    work[at + j] = 0
        for first in range(0, n_count, width):
            n = min(width, n_count - first)
            _pack_rows(b, places, q0, count, first, width, n_count, work[b_packed:tile])
            for i in range(tiles):
                clear(work, tile, height * width)
                multiply_tile(
                    columns, height, 1, work, d_packed + i * BLOCK * height, places_in_tile, 0, height, work, b_packed, 0,
                    count, work, tile, width, 0,
                )  # fmt: skip
                for r in range(min(height, m1 - m0 - i * height)):
                    at = (m0 + i * height + r) * c_row + first
                    for j in range(0, n, lanes(c)):
                        store(c, at + j, load(c, at + j, n - j) + load(work, tile + r * width + j, n - j), n - j)


@register_jitable
def _places_in_tile(height):
    return np.arange(height)
