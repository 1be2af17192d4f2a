"""Forward, backward and single steps of every cell: fastrnn, its NumPy reference, and PyTorch where it is installed.

All run in one process here, where idle threads of one library can get in another's way; compare.py gives each a process
of its own.
"""

import contextlib
import importlib.util
from typing import NamedTuple

import pytest

import fastrnn
from grid import CELLS, shape_name
from libraries import LIBRARIES, check


class Implementation(NamedTuple):
    library: str
    threads: int | None = None

    def __str__(self):
        return f"{self.library}-{self.threads}" if self.threads else self.library

    @contextlib.contextmanager
    def own_threads(self):
        """Use that many threads; other libraries than fastrnn use what they choose."""
        before = fastrnn.get_num_threads()
        fastrnn.set_num_threads(self.threads or before)
        yield
        fastrnn.set_num_threads(before)


IMPLEMENTATIONS = [Implementation("reference"), Implementation("fastrnn", 1)]
if fastrnn.get_num_threads() > 1:
    IMPLEMENTATIONS.append(Implementation("fastrnn", fastrnn.get_num_threads()))
if importlib.util.find_spec("torch"):
    IMPLEMENTATIONS.append(Implementation("torch"))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=str)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("operation", ["forward", "backward", "step"])
def test_layer(benchmark, machine, operation, cell, shape, implementation):
    benchmark.group = f"{operation} {cell} {shape_name(shape)}"
    benchmark.extra_info.update(machine, threads=implementation.threads)
    with implementation.own_threads():
        contestant = LIBRARIES[implementation.library](cell, shape)
        check(contestant, cell, shape, operation)
        benchmark(getattr(contestant, operation))
