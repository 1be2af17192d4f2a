"""Packed weights and the register-tiled product (CPU).

A product adds A W to C for some rows. Each element of C gets its terms in one order, in blocks of k that are summed by
themselves and then added, whatever tile it falls into: the same bits for any number of rows and threads, and errors
that grow with the length of a block rather than of the whole sum.

Weights are packed as [panel][K][V][lanes]: a panel is V vectors of columns, and the loop over k reads it as one stream.
A tile is some rows times one panel: its sums stay in registers over the whole loop. V is a property of the product's
type: kernels hand it over as a tuple of V integers (``columns``). So is how many operands A there are: a tuple says
where each begins (``a0``), one for the whole panel, or one for each gate in it, which has an equal share of the V.
"""

from __future__ import annotations

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from fastrnn.kernels import simd
from fastrnn.kernels.lean import register_jitable
from fastrnn.kernels.simd import INT64, lanes, load, store
from fastrnn.kernels.tiles import BLOCK, IN_FLIGHT, OUTER_BLOCK, OUTER_TILES, TALL, rows_in_tile


@register_jitable
def panels_together(rows, vectors):
    """Panels that a tile of few rows takes at a time, so that enough sums are under way."""
    return max(1, -(-IN_FLIGHT // (rows * vectors)))


def _emit_tile(builder, vector, shape, a, w, c, ahead, k_count):
    """One tile: C += A W for `shape` = (rows, panels, vectors, operands). a, w, c give pointers to their elements,
    `ahead` to what is to be fetched meanwhile.
    """
    rows, panels, vectors, operands = shape
    places = [(r, p, v) for r in range(rows) for p in range(panels) for v in range(vectors)]
    zero = simd.constant(vector, 0)
    before = builder.block
    loop, after = builder.append_basic_block("k"), builder.append_basic_block("k_end")
    builder.branch(loop)

    builder.position_at_end(loop)
    k = builder.phi(INT64)
    k.add_incoming(ir.Constant(INT64, 0), before)
    sums = [builder.phi(vector.llvm) for _ in places]
    for value in sums:
        value.add_incoming(zero, before)
    weights = {(p, v): simd.load_vector(builder, vector, w(k, p, v)) for p in range(panels) for v in range(vectors)}
    if rows >= TALL:
        simd.emit_prefetch(builder, ahead(k))
    elements = {
        (r, o): simd.splat(builder, vector, builder.load(a(r, o, k))) for r in range(rows) for o in range(operands)
    }
    new = [
        simd.multiply_add(builder, vector, elements[r, v * operands // vectors], weights[p, v], value)
        for (r, p, v), value in zip(places, sums, strict=True)
    ]
    k_next = builder.add(k, ir.Constant(INT64, 1))
    k.add_incoming(k_next, builder.block)
    for value, following in zip(sums, new, strict=True):
        value.add_incoming(following, builder.block)
    builder.cbranch(builder.icmp_signed("<", k_next, k_count), loop, after)

    builder.position_at_end(after)
    for place, total in zip(places, new, strict=True):
        simd.store_vector(builder, vector, builder.fadd(simd.load_vector(builder, vector, c(*place)), total), c(*place))


@intrinsic
def multiply_tile(
    typingctx, columns, rows, panels, a, a0, k0, places, place, step, w, w0, w_panel, ahead, k_count, c, c0, c_row,
    c_panel,
):  # fmt: skip
    """C[r, p] += sum over k of A[r, k] W[p, k] for one tile of `rows` rows (1 to rows_in_tile) and `panels` panels,
    k_count > 0.

    A[r, k] stands at a[a0 + k0 + places[place + r] + k * step], W[p, k] at w[w0 + p * w_panel + k * V * lanes], C[r, p]
    (V vectors, is modified) at c[c0 + r * c_row + p * c_panel]. `panels` is 1 or panels_together(rows, V).

    Meanwhile a tall tile has k_count vectors fetched from w[ahead] on.
    """
    vectors, operands = len(columns), len(a0)
    vector = simd.vector_of(a)
    shapes = {}
    for r in range(1, rows_in_tile(vectors) + 1):
        for p in {1, panels_together(r, vectors)}:
            shapes[r, p] = (r, p, vectors, operands)

    def emit(context, builder, sig, args):
        (_, rows, panels, a, a0, k0, places, place, step, w, w0, w_panel, ahead, k_count, c, c0, c_row, c_panel) = args
        array = {name: sig.args[i] for name, i in (("a", 3), ("places", 6), ("w", 9), ("c", 14))}
        starts = [builder.add(start, k0) for start in cgutils.unpack_tuple(builder, a0)]

        def pointer(name, value, index):
            return simd.address(context, builder, array[name], value, index)

        def times(x, n):
            return builder.mul(x, ir.Constant(INT64, n))

        def tile(shape):
            at = [
                builder.load(pointer("places", places, builder.add(place, ir.Constant(INT64, r))))
                for r in range(shape[0])
            ]
            a_rows = [[pointer("a", a, builder.add(start, offset)) for start in starts] for offset in at]
            w_panels = [pointer("w", w, builder.add(w0, times(w_panel, p))) for p in range(shape[1])]
            c_rows = [
                [
                    pointer("c", c, builder.add(c0, builder.add(times(c_row, r), times(c_panel, p))))
                    for p in range(shape[1])
                ]
                for r in range(shape[0])
            ]

            fetched = pointer("w", w, ahead)

            def w_at(k, p, v):
                index = builder.add(
                    builder.mul(k, ir.Constant(INT64, vectors * vector.lanes)), ir.Constant(INT64, v * vector.lanes)
                )
                return builder.bitcast(builder.gep(w_panels[p], [index]), vector.llvm.as_pointer())

            def c_at(r, p, v):
                return builder.bitcast(
                    builder.gep(c_rows[r][p], [ir.Constant(INT64, v * vector.lanes)]), vector.llvm.as_pointer()
                )

            _emit_tile(
                builder,
                vector,
                shape,
                lambda r, o, k: builder.gep(a_rows[r][o], [builder.mul(k, step)]),
                w_at,
                c_at,
                lambda k: builder.gep(fetched, [times(k, vector.lanes)]),
                k_count,
            )

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
    return types.void(columns, i, i, a, a0, i, places, i, i, w, i, i, i, i, c, i, i, i), emit


@intrinsic
def tile_rows(typingctx, columns):
    """rows_in_tile(V), as a constant."""
    return types.intp(columns), lambda context, builder, sig, args: ir.Constant(INT64, rows_in_tile(len(sig.args[0])))


@register_jitable
def multiply(columns, rows, panels, a, a0, places, place, w, w0, w_panel, k_count, c, c0, c_row, c_panel):
    """C[r, p] += A[r] W[p] for any number of rows. `panels` above 1 only where panels_together(rows, V) says so.

    Rows are dealt to tiles of nearly equal height; all of them visit a block of k before the next one is begun, so
    that all but the first find the panel's share in the first-level cache. Those have the next block's share fetched,
    each a vector's part of it.
    """
    most = tile_rows(columns)
    tiles = (rows + most - 1) // most
    for k in range(0, k_count, BLOCK):
        count = min(BLOCK, k_count - k)
        r = 0
        for tile in range(tiles):
            height = (rows - r + tiles - tile - 1) // (tiles - tile)
            multiply_tile(
                columns,
                height,
                panels,
                a,
                a0,
                k,
                places,
                place + r,
                1,
                w,
                w0 + k * len(columns) * lanes(w),
                w_panel,
                w0 + k * len(columns) * lanes(w) + (len(columns) + min(tile, len(columns)) - 1) * count * lanes(w),
                count,
                c,
                c0 + r * c_row,
                c_row,
                c_panel,
            )
            r += height


@register_jitable
def clear(c, start, count):
    for i in range(start, start + count):
        c[i] = 0


# ---- the product of the weight gradients


@register_jitable
def _pack_rows(b, places, q0, count, first, width, columns, packed, to):
    """packed[to + q, j] = b[places[q0 + q] + first + j] for j < columns, else 0."""
    n = min(width, columns - first)
    for q in range(count):
        at = places[q0 + q] + first
        for j in range(0, width, lanes(b)):
            store(packed, to + q * width + j, load(b, at + j, max(0, n - j)), lanes(b))


@register_jitable
def _pack_tiles(d, d0, d_row, m0, m1, count, height, packed):
    """packed[tile, q, r] = d[d0 + q * d_row + m0 + tile * height + r], for rows q < count.

    Whole vectors are copied: what is too much is overwritten by the next ones, or lies behind the last tile. `d` is
    read up to one vector behind its last row.
    """
    width = lanes(d)
    for m in range(m0, m1, height):
        at = (m - m0) * OUTER_BLOCK
        for q in range(count):
            for r in range(0, height, width):
                store(packed, at + q * height + r, load(d, d0 + q * d_row + m + r, width), width)


@register_jitable
def add_outer_products(columns, d, d0, d_row, m0, m1, b, places, rows, n_count, c, tile_places, work):
    """C[m, n] += sum over rows q of D[q, m] B[q, n] for m0 <= m < m1.

    D[q, m] stands at d[d0 + q * d_row + m], B[q, n] at b[places[q] + n], C [., n_count] is flat (is modified).
    tile_places is 0, 1, 2, ...; `work` has room for outer_work(V) numbers.
    """
    height = tile_rows(columns)
    width = len(columns) * lanes(b)
    b_at = OUTER_TILES * height * OUTER_BLOCK + lanes(b)
    c_at = b_at + width * OUTER_BLOCK
    for q0 in range(0, rows, OUTER_BLOCK):
        count = min(OUTER_BLOCK, rows - q0)
        for m in range(m0, m1, OUTER_TILES * height):
            m_end = min(m1, m + OUTER_TILES * height)
            _pack_tiles(d, d0 + q0 * d_row, d_row, m, m_end, count, height, work)
            for first in range(0, n_count, width):
                n = n_count - first
                _pack_rows(b, places, q0, count, first, width, n_count, work, b_at)
                for i in range(m, m_end, height):
                    tile = min(height, m_end - i)
                    to, at, row = c, i * n_count + first, n_count
                    if n < width:  # the last columns: by way of a whole tile
                        clear(work, c_at, tile * width)
                        to, at, row = work, c_at, width
                    multiply_tile(
                        columns, tile, 1, work, ((i - m) * OUTER_BLOCK,), 0, tile_places, 0, height, work, b_at, 0,
                        b_at, count, to, at, row, 0,
                    )  # fmt: skip
                    if n < width:
                        _add_first_columns(c, i * n_count + first, n_count, n, work, c_at, width, tile)


@register_jitable
def _add_first_columns(c, at, c_row, n, work, work_at, width, rows):
    """Add n columns of a tile in `work` to c."""
    for r in range(rows):
        for j in range(0, n, lanes(c)):
            to = at + r * c_row + j
            store(c, to, load(c, to, n - j) + load(work, work_at + r * width + j, n - j), n - j)
