"""Products with weights that stay in registers, by tensor cores: each warp's part of the sum over k.

A fragment is a small matrix that the lanes of a warp hold together. Lane (g, q) = (lane // 4, lane % 4) has words of
row g of the exchanged vectors. It loads four consecutive ones, 4q to 4q + 3 of GROUP, which are its part of two
fragments: these want other k in that place, but a sum may be made in any order of k if weights and vector follow the
same one.

Tensor cores take 16 rows of A and 8 columns of B. Forward has the weights in A, so that a tile of the batch is 8 rows;
backward, with fewer units of longer sums in a block, has them in B, and 16 rows of the batch in a tile.
"""

from __future__ import annotations

from fastrnn.kernels.cuda.exchange import GROUP, MODES, fetcher

CHUNK = 4  # vectors of four words that a lane asks for at a time


def in_turn(ops, functions):
    """One function that calls some, for what a compiler might not unroll if it were a loop: registers have no index."""
    if len(functions) == 1:
        return functions[0]
    half = len(functions) // 2
    first, others = in_turn(ops, functions[:half]), in_turn(ops, functions[half:])

    def both(*arguments):
        first(*arguments)
        others(*arguments)

    return ops.device(both)


def chunks(groups):
    """(first, count) of the groups that are taken together."""
    return [(first, min(CHUNK, groups - first)) for first in range(0, groups, CHUNK)]


def multiplier(ops, mode_name, *, weights_first):
    """A function (sums, at, a0, a1, a2, a3, b0, b1): sums[at : at + 4] += A B, of fragments (sums is modified)."""
    mma, three = ops.FORMATS[mode_name].mma, MODES[mode_name].products == 3
    upper_a, upper_b = (ops.upper_again, ops.upper) if weights_first else (ops.upper, ops.upper_again)
    number_of, word_of, nothing = ops.number_of, ops.word_of, ops.uint32(0)

    def lower(x, upper):
        return nothing if x == upper else word_of(number_of(x) - number_of(upper))  # infinity has no rest

    lower = ops.device(lower)

    def multiply(sums, at, a0, a1, a2, a3, b0, b1):
        c0, c1, c2, c3 = sums[at], sums[at + 1], sums[at + 2], sums[at + 3]
        if three:  # (A + a) (B + b) without a b, which is below float32's last digit
            h0, h1, h2, h3, k0, k1 = upper_a(a0), upper_a(a1), upper_a(a2), upper_a(a3), upper_b(b0), upper_b(b1)
            c0, c1, c2, c3 = mma(h0, h1, h2, h3, lower(b0, k0), lower(b1, k1), c0, c1, c2, c3)
            c0, c1, c2, c3 = mma(
                lower(a0, h0), lower(a1, h1), lower(a2, h2), lower(a3, h3), k0, k1, c0, c1, c2, c3
            )  # fmt: skip
            c0, c1, c2, c3 = mma(h0, h1, h2, h3, k0, k1, c0, c1, c2, c3)
        else:
            c0, c1, c2, c3 = mma(a0, a1, a2, a3, b0, b1, c0, c1, c2, c3)
        sums[at], sums[at + 1], sums[at + 2], sums[at + 3] = c0, c1, c2, c3

    return ops.device(multiply)


def weights_in_a(ops, mode_name, vector, tiles, weight):
    """Sums of 16 * `tiles` rows of weights, for 8 rows of the batch.

    Returns the number of words that a lane keeps, and the functions

    * load(w, weights, start, first): fill w (is modified) with ``weight(weights, start, row, k)``, 0 beyond the vector;
      `first` is the first word of the warp's part of the vector;
    * multiply(sums, w, words, exchange, row, first, here, patience, status): add to sums[4 * tile + ...] (is modified)
      the products with the vector at word `row` of the exchange, if it is `here`. A lane has, of the tile's row g and
      then of g + 8, columns 2q and 2q + 1. `words` is scratch for 4 * CHUNK words.
    """
    groups, multiply = vector.groups, multiplier(ops, mode_name, weights_first=True)
    word_at = _word_of_weights(ops, mode_name, vector, weight)

    def load_group(tile, k):
        def load(w, weights, start, first):
            lane = ops.cuda.threadIdx.x % 32
            for e in range(8):  # word e // 2 of a lane's four; row g, or g + 8
                place = first + GROUP * k + lane % 4 * 4 + e // 2
                row = 16 * tile + lane // 4 + e % 2 * 8
                w[(tile * groups + k) * 8 + e] = word_at(weights, start, row, place)

        return ops.device(load)

    def multiply_words(k, a):
        """Group k of the weights, and words a to a + 3 of the vector: two fragments."""

        def multiply_two(sums, w, words):
            for tile in range(tiles):
                i = (tile * groups + k) * 8
                multiply(sums, 4 * tile, w[i], w[i + 1], w[i + 2], w[i + 3], words[a], words[a + 1])
                multiply(sums, 4 * tile, w[i + 4], w[i + 5], w[i + 6], w[i + 7], words[a + 2], words[a + 3])

        return ops.device(multiply_two)

    def multiply_part(part):
        start_of_part, count = part
        fetch = fetcher(ops, mode_name, vector, count)
        multiply_all = in_turn(ops, [multiply_words(start_of_part + k, 4 * k) for k in range(count)])

        def multiply_chunk(sums, w, words, exchange, row, first, here, patience, status):
            place = first + GROUP * start_of_part + ops.cuda.threadIdx.x % 4 * 4
            fetch(words, 0, exchange, row, place, here, patience, status)
            ops.sync_warp()
            multiply_all(sums, w, words)

        return ops.device(multiply_chunk)

    parts = chunks(groups)
    return (
        8 * groups * tiles,
        in_turn(ops, [load_group(tile, k) for tile in range(tiles) for k in range(groups)]),
        in_turn(ops, [multiply_part(part) for part in parts]),
    )


def weights_in_b(ops, mode_name, vector, tiles, weight, rows):
    """Sums of 8 * `tiles` columns of weights, for 16 rows of the batch, or 8.

    As `weights_in_a`; but weight(weights, start, column, k), and multiply takes the vectors of two rows of the batch,
    `row` and `row8`, each with its own `here`. A lane has, of the tile's rows g and then g + 8 of the batch, the
    columns 2q and 2q + 1. `words` has room for 8 * CHUNK.
    """
    groups, multiply = vector.groups, multiplier(ops, mode_name, weights_first=False)
    word_at = _word_of_weights(ops, mode_name, vector, weight)
    zero = ops.uint32(0)

    def load_group(tile, k):
        def load(w, weights, start, first):
            lane = ops.cuda.threadIdx.x % 32
            for e in range(4):
                place = first + GROUP * k + lane % 4 * 4 + e
                w[(tile * groups + k) * 4 + e] = word_at(weights, start, 8 * tile + lane // 4, place)

        return ops.device(load)

    def multiply_words(k, a, a8):
        """Group k of the weights, and words a to a + 3 of the vector, a8 to a8 + 3 of row g + 8's: two fragments."""

        def multiply_two(sums, w, words):
            b0, b1, b2, b3 = zero, zero, zero, zero
            if rows == 16:
                b0, b1, b2, b3 = words[a8], words[a8 + 1], words[a8 + 2], words[a8 + 3]
            for tile in range(tiles):
                i = (tile * groups + k) * 4
                multiply(sums, 4 * tile, words[a], b0, words[a + 1], b1, w[i], w[i + 1])
                multiply(sums, 4 * tile, words[a + 2], b2, words[a + 3], b3, w[i + 2], w[i + 3])

        return ops.device(multiply_two)

    def multiply_part(part):
        start_of_part, count = part
        fetch = fetcher(ops, mode_name, vector, count)
        multiply_all = in_turn(ops, [multiply_words(start_of_part + k, 4 * k, 4 * (count + k)) for k in range(count)])

        def multiply_chunk(sums, w, words, exchange, row, row8, first, here, here8, patience, status):
            place = first + GROUP * start_of_part + ops.cuda.threadIdx.x % 4 * 4
            fetch(words, 0, exchange, row, place, here, patience, status)
            if rows == 16:
                fetch(words, 4 * count, exchange, row8, place, here8, patience, status)
            ops.sync_warp()
            multiply_all(sums, w, words)

        return ops.device(multiply_chunk)

    parts = chunks(groups)
    return (
        4 * groups * tiles,
        in_turn(ops, [load_group(tile, k) for tile in range(tiles) for k in range(groups)]),
        in_turn(ops, [multiply_part(part) for part in parts]),
    )


def _word_of_weights(ops, mode_name, vector, weight):
    """A function (weights, start, line, place): the word at `place` of a line of weights, 0 beyond the vector."""
    numbers, pack, zero, count = MODES[mode_name].numbers, ops.FORMATS[mode_name].pack, ops.float32(0), vector.numbers

    def word_at(weights, start, line, place):
        k = place * numbers
        first = weight(weights, start, line, k) if k < count else zero
        second = weight(weights, start, line, k + 1) if numbers == 2 and k + 1 < count else zero
        return pack(first, second)

    return ops.device(word_at)
