"""The exchange between the blocks of a persistent kernel: vectors in memory that are their own flag.

The exchange is filled with a pattern that no number has. A block publishes its numbers when it has them; whoever needs
a vector loads it, and looks again while a part of it is missing. Nobody signals, and nobody waits for a barrier.
(NVIDIA has called it Lamport's way.)

A vector is in words of 32 bits: one float32, or two numbers of 16 bits.
"""

from __future__ import annotations

from typing import NamedTuple

MISSING, NOT_A_NUMBER = 0xFFFFFFFF, 0x7FFFFFFF  # what stands in the exchange at first; the NaN that is published
MISSING_HALF, NOT_A_HALF = 0xFFFF, 0x7FFF
LOOKS = 1 << 20  # at a missing word, about half a second: then its block is taken for lost
GROUP = 16  # words of a vector that a warp takes at a time: four a lane, the same ones in lanes of the same rank mod 4


class Mode(NamedTuple):
    """How recurrent products are made. Sums, states and activations are float32 in all of them."""

    numbers: int  # in a word
    products: int  # of parts of the factors: 3 are as accurate as float32 itself


MODES = {"float32": Mode(1, 3), "tf32": Mode(1, 1), "bfloat16": Mode(2, 1), "float16": Mode(2, 1)}


class Vector(NamedTuple):
    """What is exchanged for a row and a step, and how a block's warps share it."""

    numbers: int
    words: int  # in memory: a multiple of four; beyond `numbers` it is 0
    groups: int  # of GROUP words, for each warp


def vector_of(mode_name, numbers, warps):
    words = -(-numbers // (4 * MODES[mode_name].numbers)) * 4
    return Vector(numbers, words, -(-words // (GROUP * warps)))


def publisher(ops, mode_name, vector):
    """A function (exchange, row, k, x): number k of the vector that begins at word `row`; the last brings the rest."""
    word, mode, pack = ops.uint32, MODES[mode_name], ops.FORMATS[mode_name].pack
    zero, last, end = ops.float32(0), vector.numbers - 1, vector.words * mode.numbers
    missing, other = (MISSING, NOT_A_NUMBER) if mode.numbers == 1 else (MISSING_HALF, NOT_A_HALF)
    store = ops.store_word if mode.numbers == 1 else ops.store_half

    def publish(exchange, row, k, x):
        packed = pack(x, zero) & missing
        store(exchange, row * mode.numbers + k, word(other if packed == missing else packed))
        if k == last:
            for rest in range(last + 1, end):
                store(exchange, row * mode.numbers + rest, word(0))

    return ops.device(publish)


def fetcher(ops, mode_name, vector, count):
    """A function that takes `count` times four words of a row from the exchange, and waits until they are there.

    (words, at, exchange, row, place, here, patience, status): into words[at...] (is modified), from word `place` of the
    row at `row` on, every GROUP; zeros if the row is not `here`. patience[0] is how often to look for what is missing;
    in vain once, it becomes 1, and status[0], too (both are modified): then a lost block is waited for no more.
    """
    word, load_words, pause = ops.uint32, ops.load_words, ops.pause
    one, length = MODES[mode_name].numbers == 1, vector.words

    def absent(a):
        if one:
            return a == MISSING
        return (a & MISSING_HALF == MISSING_HALF) | (a >> 16 == MISSING_HALF)

    absent = ops.device(absent)

    def fetch(words, at, exchange, row, place, here, patience, status):
        for k in range(4 * count):
            words[at + k] = word(0)
        looks, missing = 0, here
        while missing:
            for k in range(count):
                if place + GROUP * k < length:
                    a, b, c, d = load_words(exchange, row + place + GROUP * k)
                    words[at + 4 * k], words[at + 4 * k + 1], words[at + 4 * k + 2], words[at + 4 * k + 3] = a, b, c, d
            missing = False
            for k in range(4 * count):
                missing = missing | absent(words[at + k])
            if missing:
                looks += 1
                if looks >= patience[0]:
                    patience[0] = status[0] = 1
                    missing = False
                pause()

    return ops.device(fetch)
