"""What the texts of all GPU kernels are made with.

A kernel's text is a Python function that a maker returns: ``make(ops, *constants)``. `ops` is what the target brings:
:mod:`fastrnn.kernels.ptx` for NVIDIA GPUs; the tests bring two simulators, which run the same text as plain Python.
`constants` are the cell's stage, sizes and numbers' types: the compiler sees them as such.

Arrays are bare pointers to their first element, indexed in one dimension, and so flat NumPy arrays in a simulator.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import NamedTuple

from fastrnn.kernels import cells


class Kernel(NamedTuple):
    """A kernel's text, and what is needed to compile and launch it."""

    make: Callable  # make(ops, *constants) -> the function
    constants: tuple  # strings, numbers, and tuples of them
    arguments: tuple[str, ...]  # dtypes in order: "int32"; with a star, "float32*", for a pointer
    threads: int  # of a block


STAGES = {stage.name: stage for cell in cells.CELLS.values() for stage in cell.stages}


def load_each(ops, places):
    """A function (p, start, stride) -> the numbers p[start + place * stride], a tuple."""
    if not places:
        return ops.device(lambda p, start, stride: ())
    place, others = places[0], load_each(ops, places[1:])
    return ops.device(lambda p, start, stride: (p[start + place * stride],) + others(p, start, stride))  # noqa: RUF005


def store_each(ops, places):
    """A function (p, start, stride, values): p[start + place * stride] = value for each; p is modified."""
    if not places:
        return ops.device(lambda p, start, stride, values: None)
    place, others = places[0], store_each(ops, places[1:])

    def store(p, start, stride, values):
        p[start + place * stride] = values[0]
        others(p, start, stride, values[1:])

    return ops.device(store)


def formula(ops, function, dtype):
    """A cell's formula from :mod:`fastrnn.kernels.cells`, with the target's activations, for numbers of `dtype`."""
    return _bound(ops, function, ops.activations(dtype))


def _bound(ops, function, names):
    scope = {**function.__globals__, **names}
    for name in function.__code__.co_names:
        other = scope.get(name)
        if name not in names and isinstance(other, FunctionType) and other.__module__ == cells.__name__:
            scope[name] = _bound(ops, other, names)
    return ops.device(FunctionType(function.__code__, scope, function.__name__))
