"""The most memory that a call takes, above its arguments and its results.

    python benchmarks/memory.py

Each library has a fresh process for each case, which runs once on a small shape, compiles for the large one, hands free
memory back to the system, and calls once. The peak is the process's largest resident size during the call (Linux's
VmHWM) less that before. `traced` is what NumPy asked for, to the byte, for the libraries whose memory is NumPy's.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import inspect
import json
import tracemalloc
from pathlib import Path

import fastrnn
import results
from fastrnn.bench import LIBRARIES, Case, Fastrnn, installed

CASES = tuple(
    Case(cell, shape, operation)
    for cell, shape in (("lstm", (200, 32, 256, 256)), ("gru", (200, 32, 256, 256)), ("lstm", (1000, 16, 256, 256)))
    for operation in ("forward", "training")
)


class Recompute(Fastrnn):
    """fastrnn, which computes in backward again what it has not kept."""

    options = {"recompute": True}  # noqa: RUF012


CONTESTANTS = LIBRARIES | {"fastrnn recompute": Recompute}


def contestants(operation):
    """Those that are there and have the operation."""
    names = [name for name in installed() if operation in LIBRARIES[name].operations]
    if operation == "training" and "recompute" in inspect.signature(fastrnn.LSTM.forward).parameters:
        names.append("fastrnn recompute")
    return names


def status(field):
    """Bytes of a line such as `VmHWM: 1234 kB`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise SystemExit(f"/proc/self/status has no {field}: the memory of a call is measured on Linux only")


def peak(name, case):
    """Bytes above arguments and results, by the system's account and by NumPy's."""
    small = CONTESTANTS[name](case._replace(shape=(2, 2, *case.shape[2:])))
    small.answer(getattr(small, case.operation)())
    del small
    contestant = CONTESTANTS[name](case)
    contestant.prepare(case.operation)
    call = getattr(contestant, case.operation)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    result = call()
    after = status("VmHWM")
    size = sum(array.nbytes for array in contestant.answer(result).values())
    del result
    found = {"bytes": max(after - before - size, 0), "results": size}
    if name in ("fastrnn", "fastrnn recompute", "reference"):
        tracemalloc.start()
        result = call()  # held, as above
        found["traced"] = tracemalloc.get_traced_memory()[1] - size
        del result
    return found


def main():
    parser = results.parser(__doc__)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        name, (cell, shape, operation, lengths) = json.loads(options.one)
        print(json.dumps(peak(name, Case(cell, tuple(shape), operation, lengths))))
        return
    records = []
    for case in CASES[:2] if options.quick else CASES:
        for name in contestants(case.operation):
            found = results.fresh(__file__, "--one", json.dumps([name, case]))
            key = {"library": name, "cell": case.cell, "shape": case.shape, "operation": case.operation}
            records.append(key | found)
            print(f"{case!s:<34} {name:<18} {found['bytes'] / 2**20:7.1f} MiB", flush=True)
    print("wrote", results.merge(options.name, "memory", records))


if __name__ == "__main__":
    main()
