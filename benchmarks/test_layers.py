"""Forward, backward, training and single steps of every cell, with rows of one length and of many, in every library.

All run in one process here, where idle threads of one library can get in another's way; compare.py gives each a process
of its own.
"""

import contextlib
from typing import NamedTuple

import pytest

import fastrnn
import grid
from fastrnn.bench import LIBRARIES, OPERATIONS, PEERS, Case, check, installed


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
IMPLEMENTATIONS += [Implementation(library) for library in installed() if library in PEERS]


def of(operations):
    """Parametrise over operations and the libraries that have them."""
    pairs = [(each, one) for each in operations for one in IMPLEMENTATIONS if each in LIBRARIES[one.library].operations]
    return pytest.mark.parametrize(("operation", "implementation"), pairs, ids=str)


def run(benchmark, machine, case, implementation):
    benchmark.group = str(case)
    benchmark.extra_info.update(machine, threads=implementation.threads)
    with implementation.own_threads():
        contestant = LIBRARIES[implementation.library](case)
        check(contestant, case)
        benchmark(getattr(contestant, case.operation))


@pytest.mark.parametrize("cell", grid.CELLS)
@of([operation for operation in OPERATIONS if operation != "step"])
def test_layer(benchmark, machine, cell, operation, shape, implementation):
    run(benchmark, machine, Case(cell, shape, operation), implementation)


@pytest.mark.parametrize("cell", grid.CELLS)
@of(["step"])
def test_step(benchmark, machine, cell, operation, implementation):
    run(benchmark, machine, Case(cell, grid.STEP, operation), implementation)


@pytest.mark.parametrize("cell", grid.CELLS)
@of(grid.PASSES)
def test_lengths(benchmark, machine, request, cell, operation, implementation):
    shape = grid.TINY[0] if request.config.option.benchmark_disable else grid.LENGTHS
    run(benchmark, machine, Case(cell, shape, operation, lengths=True), implementation)
