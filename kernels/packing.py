"""Weights as the kernels read them: packed in panels, and a checksum by which a change of theirs is noticed.

How they are packed is told in :mod:`fastrnn.kernels.product`.
"""

from __future__ import annotations

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic, register_jitable

from fastrnn.kernels import simd
from fastrnn.kernels.cached import kernel
from fastrnn.kernels.product import VECTORS, clear
from fastrnn.kernels.simd import INT32, INT64, address_of, borrowed, lanes, load, store


def _transpose(builder, vector, rows):
    """The square block of vectors `rows` transposed: pairs of lanes, then pairs of pairs, and so on change places."""
    distance = 1
    while distance < vector.lanes:
        rows = list(rows)
        for i in range(vector.lanes):
            if i & distance == 0:
                a, b = rows[i], rows[i + distance]
                low = [j if j & distance == 0 else vector.lanes + j - distance for j in range(vector.lanes)]
                high = [j + distance if j & distance == 0 else vector.lanes + j for j in range(vector.lanes)]
                lanes_type = ir.VectorType(INT32, vector.lanes)
                rows[i] = builder.shuffle_vector(a, b, ir.Constant(lanes_type, low))
                rows[i + distance] = builder.shuffle_vector(a, b, ir.Constant(lanes_type, high))
        distance *= 2
    return rows


@intrinsic
def pack_block(typingctx, weight, at, row_size, rows, columns, packed, to, step):
    """Write a square block of `weight` (flat, at `at`, rows row_size apart) transposed: its columns at packed[to],
    [to + step] ...

    Of the block only `rows` rows and `columns` columns exist; missing rows count as zeros, missing columns are not
    written.
    """

    def emit(context, builder, sig, args):
        vector = simd.vector_of(sig.args[0])
        weight, at, row_size, rows, columns, packed, to, step = args
        nothing = ir.Constant(INT64, 0)
        block = []
        for r in range(vector.lanes):
            place = builder.add(at, builder.mul(row_size, ir.Constant(INT64, r)))
            pointer = simd.address(context, builder, sig.args[0], weight, place, vector)
            n = builder.select(builder.icmp_signed(">", rows, ir.Constant(INT64, r)), columns, nothing)
            block.append(simd.load_first(builder, vector, pointer, n))
        for k, value in enumerate(_transpose(builder, vector, block)):
            place = builder.add(to, builder.mul(step, ir.Constant(INT64, k)))
            pointer = simd.address(context, builder, sig.args[5], packed, place, vector)
            with builder.if_then(builder.icmp_signed(">", columns, ir.Constant(INT64, k)), likely=True):
                simd.store_vector(builder, vector, value, pointer)
        return context.get_dummy_value()

    i = types.intp
    return types.void(weight, i, i, i, i, packed, i, i), emit


@register_jitable
def _pack_gates(weight, k_count, blocks, hidden, units, packed):
    """Pack `weight` [G*H, K] (flat) as [panel][K][gate][unit vector][lane] into `packed` (is modified).

    A panel holds the gate blocks `blocks` of `units` vectors of hidden units; units beyond `hidden` become 0.
    """
    width = lanes(packed)
    gates = len(blocks)
    step = gates * units * width
    for vector in range((hidden + units * width - 1) // (units * width) * units):
        panel, u = vector // units, vector % units
        unit = vector * width
        rows = max(0, min(width, hidden - unit))
        for g in range(gates):
            row = (blocks[g] * hidden + unit) * k_count
            to = panel * k_count * step + (g * units + u) * width
            for k in range(0, k_count, width):
                columns = min(width, k_count - k)
                pack_block(weight, row + k, k_count, rows, columns, packed, to + k * step, step)


@register_jitable
def _pack_bias(bias, blocks, slot, slots, hidden, units, packed):
    """Add the gate blocks `blocks` of a bias to `packed` [panel][slot][unit vector][lane] (modified), from `slot`."""
    panel_units = units * lanes(packed)
    for g in range(len(blocks)):
        for unit in range(hidden):
            panel, j = unit // panel_units, unit % panel_units
            packed[(panel * slots + slot + g) * panel_units + j] += bias[blocks[g] * hidden + unit]


@kernel
def pack_stage(source, x, x_count, x_blocks, h, h_count, h_blocks, bias_x, bias_h, slots, hidden, units, wx, wh, bias):
    """Pack a stage's weights (flat: x [., x_count], h [., h_count]) and biases (empty where there are none).

    Is modified: wx, wh, bias.
    """
    size, there = len(bias), len(bias_x) > 0
    x, h, bias_x, bias_h = borrowed(x), borrowed(h), borrowed(bias_x), borrowed(bias_h)
    wx, wh, bias = borrowed(wx), borrowed(wh), borrowed(bias)
    _pack_gates(x, x_count, x_blocks, hidden, units, wx)
    _pack_gates(h, h_count, h_blocks, hidden, units, wh)
    clear(bias, 0, size)
    if there:
        _pack_bias(bias_x, x_blocks, 0, slots, hidden, units, bias)
        _pack_bias(bias_h, h_blocks, slots - len(h_blocks), slots, hidden, units, bias)


@kernel
def pack_columns(source, weight, columns, blocks, block_rows, packed):
    """Pack `weight` [., N] (flat) as [panel][K][column], where K runs over the rows of `blocks`, into `packed` (is
    modified).
    """
    weight, packed = borrowed(weight), borrowed(packed)
    width = VECTORS * lanes(packed)
    at = 0
    for first in range(0, columns, width):
        for block in blocks:
            for row in range(block * block_rows, (block + 1) * block_rows):
                for j in range(0, width, lanes(packed)):
                    n = max(0, columns - first - j)
                    store(packed, at, load(weight, row * columns + first + j, n), lanes(packed))
                    at += lanes(packed)


# ---- checksums

CHAINS = 8  # vectors that are under way at a time
MULTIPLIER, ROTATION = 0x9E3779B1, 13  # odd, so that no change is lost; and what it did to high bits goes to low ones
MULTIPLIER64 = 0x9E3779B97F4A7C15


def _mixed(builder, chain, words):
    """rotate((chain ^ words) * MULTIPLIER)."""
    product = builder.mul(builder.xor(chain, words), ir.Constant(chain.type, [MULTIPLIER] * chain.type.count))
    left, right = (ir.Constant(chain.type, [n] * chain.type.count) for n in (ROTATION, 32 - ROTATION))
    return builder.or_(builder.shl(product, left), builder.lshr(product, right))


def _mixed_to_one(builder, chains):
    """64 bits of the chains, never 0."""
    start = ir.Constant(INT64, 0)
    total = chains[0]
    for chain in chains[1:]:
        total = _mixed(builder, total, chain)
    halves = builder.bitcast(total, ir.VectorType(INT64, total.type.count // 2))
    for i in range(halves.type.count):
        start = builder.xor(start, builder.extract_element(halves, ir.Constant(INT32, i)))
        start = builder.mul(start, ir.Constant(INT64, MULTIPLIER64))
        start = builder.xor(start, builder.lshr(start, ir.Constant(INT64, 29)))
    return builder.or_(start, ir.Constant(INT64, 1))


def _mix_array(builder, vector, data, count, chains):
    """Deal the 32-bit words of `count` numbers to the chains."""
    words = chains[0].type.pointee
    block = ir.Constant(INT64, CHAINS * vector.lanes)
    rest = builder.sub(count, builder.srem(count, block))

    def place(at, i):
        at = builder.add(at, ir.Constant(INT64, i * vector.lanes))
        return at, builder.bitcast(builder.gep(data, [at]), vector.llvm.as_pointer())

    def mix(i, value):
        builder.store(_mixed(builder, builder.load(chains[i]), builder.bitcast(value, words)), chains[i])

    with cgutils.for_range_slice(builder, ir.Constant(INT64, 0), rest, block) as (at, _):
        for i in range(CHAINS):
            mix(i, simd.load_vector(builder, vector, place(at, i)[1]))
    with builder.if_then(builder.icmp_signed("<", rest, count)):
        for i in range(CHAINS):
            at, pointer = place(rest, i)
            mix(i, simd.load_first(builder, vector, pointer, builder.sub(count, at)))


@intrinsic
def checksum(typingctx, pointers, counts):
    """Of some borrowed arrays and how many numbers they hold: two tuples.

    The numbers' 32-bit words are dealt to many chains, x = rotate((x ^ word) * MULTIPLIER). A change of one word always
    changes its chain. Changes of several can cancel each other in one chain by a chance of 1 in 2^32, and would have to
    in every chain.
    """

    def emit(context, builder, sig, args):
        words = ir.VectorType(INT32, simd.VECTOR_BITS // 32)
        begin = [ir.Constant(words, [chain + 1] * words.count) for chain in range(CHAINS)]
        chains = [cgutils.alloca_once_value(builder, value) for value in begin]
        for i, pointer in enumerate(sig.args[0]):
            data, count = (builder.extract_value(tuple_, i) for tuple_ in args)
            _mix_array(builder, simd.vector_of(pointer), data, count, chains)
        return _mixed_to_one(builder, [builder.load(chain) for chain in chains])

    return types.int64(pointers, counts), emit


@kernel
def checksum_of(source, a, b, c, d, e):
    """Of five arrays; see `checksum`."""
    return checksum(borrowed((a, b, c, d, e)), (a.size, b.size, c.size, d.size, e.size))


@kernel
def address(source, array):
    """Where an array's numbers are: 0 for an empty one."""
    return address_of(array) if array.size > 0 else 0
