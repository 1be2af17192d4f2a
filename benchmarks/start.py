"""What a program waits for before its first result: the import, and the first call, compiled anew or from a cache.

    python benchmarks/start.py

Every figure is the best of some fresh processes. fastrnn compiles into a new folder and then loads from it; JAX
compiles each time; ONNX Runtime reads a model that is there. The second call tells what the first one had besides.
"""

from __future__ import annotations

import argparse
import functools
import json
import tempfile
import time

import results
from fastrnn.bench import LIBRARIES, Case, environment, installed

SHAPE = (100, 32, 128, 128)


def once(library, case):
    """Seconds of the first call and of the second, in this process."""
    call = getattr(LIBRARIES[library](case), case.operation)
    seconds = {}
    for name in ("first", "second"):
        start = time.perf_counter()
        call()
        seconds[name] = time.perf_counter() - start
    return seconds


@functools.cache
def import_seconds(module, repeats):
    """Of processes that do nothing else: one that can be asked for more has imported NumPy and fastrnn before."""
    program = f"import time; a = time.perf_counter(); import {module}; print(time.perf_counter() - a)"
    return min(results.fresh("-c", program) for _ in range(repeats))


def figures(library, case, repeats):
    """Milliseconds, each the least of its processes."""

    def seconds():
        return results.fresh(__file__, "--one", json.dumps([library, case]), variables=variables)

    modules = {"fastrnn": ("fastrnn",), "reference": ("numpy",)}.get(library, LIBRARIES[library].modules)
    with tempfile.TemporaryDirectory() as folder:
        variables = environment(1) | {"NUMBA_CACHE_DIR": folder}
        found = {"import": import_seconds(modules[0], repeats), "first": seconds()["first"]}
        later = [seconds() for _ in range(repeats)]
    cached = min(one["first"] for one in later)
    found |= {"cached": cached} if library == "fastrnn" else {"first": min(found["first"], cached)}
    found["second"] = min(one["second"] for one in later)
    return {name: results.rounded(1e3 * value) for name, value in found.items()}


def main():
    parser = results.parser(__doc__)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        library, (cell, shape, operation, lengths) = json.loads(options.one)
        print(json.dumps(once(library, Case(cell, tuple(shape), operation, lengths))))
        return
    records = []
    for cell in ("lstm",) if options.quick else ("lstm", "gru"):
        for operation in ("forward", "training"):
            for library in installed():
                if operation in LIBRARIES[library].operations:
                    found = figures(library, Case(cell, SHAPE, operation), 1 if options.quick else 3)
                    records.append({"library": library, "cell": cell, "operation": operation, **found})
                    print(cell, operation, library, found, flush=True)
    print("wrote", results.merge(options.name, "start", records))


if __name__ == "__main__":
    main()
