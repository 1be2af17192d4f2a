"""What kernels are called with: records of integers, and how a Python program fills them.

A compiled kernel is a function of one integer, the address of a record. All that it works on stands there: sizes, and
addresses of arrays. So a kernel has one form, whoever compiled it and when, and a call costs the same however much it
is given. Of each array the record holds the address of its first number, 0 where there is none; of those that a call
may bring unlooked at, the address of the array object itself (:func:`fastrnn.kernels.walk.forward` looks at its shape).

An address does not keep an array alive. Whoever fills a record keeps what it names for as long as it is used, and
:mod:`fastrnn.kernels.guard` checks that in the tests.
"""

from __future__ import annotations

import ctypes
import struct
from typing import NamedTuple

import numpy as np

from fastrnn.kernels import guard

HEAD = object.__basicsize__  # bytes before an array object's own fields, of which the first is where its numbers are
_word_at = ctypes.c_int64.from_address
Words = ctypes.c_int64 * 20  # room for a short record


def address(array) -> int:
    """Where the numbers of a contiguous array are; 0 if it has none."""
    return _word_at(id(array) + HEAD).value if array.size else 0


_probe = np.zeros(1)
if _word_at(id(_probe) + HEAD).value != _probe.__array_interface__["data"][0]:
    raise ImportError("this NumPy keeps arrays in another way than fastrnn knows: please report its version")
if guard.ENABLED:
    address = guard.noting(address)


def _fields(text: str) -> list:
    """Names, each perhaps with how many numbers it stands for: "x", "initial:2"."""
    parts = [name.split(":") for name in text.split()]
    return [(name, np.int64, int(count[0])) if count else (name, np.int64) for name, *count in parts]


# Of a forward pass: what changes with every run comes first, and is written as a whole.
RUN = struct.Struct("=10q")
_SIZES = "steps batch inputs hidden h ld slots"
_SEQUENCES = "output_row column tape_row tape_start reverse"
FORWARD = np.dtype(
    _fields(
        f"""parts x output h_initial c_initial h_final c_final begins s0 s1
        tape order active reset masks
        {_SIZES} {_SEQUENCES}
        ahead values masked places buffer_places output_places tape_places
        row0 row1 part sync checksum
        packed:2 packed_h:2 packed_bias:2 sums:2 params:5 counts:5"""
    )
)
OF_A_CALL = ("tape", "order", "active", "reset", "masks")  # addresses that stand there during a call alone
guard.addresses[FORWARD] = (*OF_A_CALL, *"values masked places sync packed sums params".split())

# Of a backward pass.
BACK_RUN = struct.Struct("=5q")
_OF_A_BACK_CALL = """x output tape order active reset masks d_output dx weights_x weights_h:2 initial:2 d_final:2
    d_initial:2"""
BACKWARD = np.dtype(
    _fields(
        f"""parts begins s0 s1 bases
        {_OF_A_BACK_CALL}
        {_SEQUENCES} start {_SIZES}
        dh middle carried previous masked d d_row numbers chunk_rows
        rows_x columns:2 counts:2
        sums places row0 row1 part sync"""
    )
)
OF_A_BACK_CALL = tuple(name for name, *_ in _fields(_OF_A_BACK_CALL))
guard.addresses[BACKWARD] = (
    "bases", *OF_A_BACK_CALL, *"dh middle carried previous masked d numbers sums places sync".split()
)  # fmt: skip

# Of the others.
OUTER = np.dtype(_fields("d d0 d_row m_count b places rows n_count c tile_places work part parts"))
BIAS = np.dtype(_fields("d d_row rows count total part parts"))
PACK_STAGE = np.dtype(
    _fields(
        """x x_count x_blocks x_block_count h h_count h_blocks h_block_count bias_x bias_h slots hidden units
        wx wh bias bias_count"""
    )
)
PACK_COLUMNS = np.dtype(_fields("weight columns blocks block_count block_rows packed"))
ARRAYS = np.dtype(_fields("arrays:5 counts:5"))
guard.addresses |= {
    OUTER: ("d", "b", "places", "c", "tile_places", "work"),
    BIAS: ("d", "total"),
    PACK_STAGE: ("x", "x_blocks", "h", "h_blocks", "bias_x", "bias_h", "wx", "wh", "bias"),
    PACK_COLUMNS: ("weight", "blocks", "packed"),
    ARRAYS: ("arrays",),
}


def words_of(records: np.ndarray) -> np.ndarray:
    """The same memory as integers, [record, word]."""
    return records.view(np.int64).reshape(len(records), -1)


def place_of(dtype: np.dtype, first: str, last: str) -> slice:
    """Where in a record's words its fields from `first` to `last` stand."""
    kind, end = dtype.fields[last][:2]
    return slice(dtype.fields[first][1] // 8, (end + kind.itemsize) // 8)


DONE, CHANGED = 1, 0  # what a forward pass ends with

# ---- the same by names: what belongs together


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


class Weights(NamedTuple):
    """Of one stage: one array holding its products with x and h, packed in panels, and its bias."""

    packed: np.ndarray
    h: int  # where the product with h begins
    bias: int


class Back(NamedTuple):
    """A product that takes gate gradients back to what they came from: the packed weights, and the columns of d."""

    weights: np.ndarray
    column: int  # where the gate gradients begin,
    count: int  # and how many there are


class Crew(NamedTuple):
    """Which part of the work a thread has."""

    row0: int
    row1: int
    part: int  # of the hidden units
    parts: int
    sync: np.ndarray  # see barrier.py
