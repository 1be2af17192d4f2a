"""What becomes of a call when the machine is not its own.

    python benchmarks/disturbed.py

    idle      nothing else runs: with more threads than one, and with more than there are cores
    spinning  other processes spin, one for each core
    product   NumPy multiplies two matrices before each call, and its threads spin on for a while

Median and 90th percentile of the calls, both by the library's own median on one thread of an idle machine: what is
above 1 is slower than one thread alone would have been.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import sys

import results
from fastrnn.bench import LIBRARIES, Case, Worker, installed

CASES = (
    Case("lstm", (100, 1, 256, 256), "forward"),
    Case("lstm", (100, 32, 128, 128), "forward"),
    Case("lstm", (100, 32, 128, 128), "training"),
)


@contextlib.contextmanager
def spinning():
    """Other processes, one for each core, that never rest."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count() or 1)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def conditions():
    """(threads, disturbance): one thread and idle first."""
    cores = os.cpu_count() or 1
    yield from ((1, "idle"), (1, "spinning"))
    if cores > 1:
        yield from ((cores, "idle"), (cores, "spinning"), (cores, "product"))
    yield from ((2 * cores, "idle"), (2 * cores, "spinning"))


def percentile(times, part):
    """The time that so large a part of the calls has kept to."""
    return sorted(times)[min(int(part * len(times)), len(times) - 1)]


def measure(library, cases, seconds):
    """Records of one library under all conditions."""
    workers = {threads: Worker(library, threads) for threads, _ in conditions()}
    try:
        for case in cases:
            alone = None
            for threads, disturbance in conditions():
                with spinning() if disturbance == "spinning" else contextlib.nullcontext():
                    times = workers[threads].times(case, seconds, check=True, product=disturbance == "product")
                alone = alone or statistics.median(times)
                median, slow = statistics.median(times) / alone, percentile(times, 0.9) / alone
                key = {"library": library, "cell": case.cell, "shape": case.shape, "operation": case.operation}
                figures = {"alone": 1e3 * alone, "median": median, "slow": slow}
                rounded = {name: results.rounded(value) for name, value in figures.items()}
                yield {**key, "threads": threads, "disturbance": disturbance, **rounded}
    finally:
        for worker in workers.values():
            worker.close()


def main():
    options = results.parser(__doc__).parse_args()
    for library in ["fastrnn"] if options.quick else installed():
        cases = [case for case in CASES if case.operation in LIBRARIES[library].operations]
        records = []
        for one in measure(library, cases[:1] if options.quick else cases, 0.1 if options.quick else 1.0):
            records.append(one)
            shown = f"{library} {one['operation']} {one['shape']} {one['threads']} threads {one['disturbance']}"
            print(f"{shown:<66} {one['median']:8.2f} {one['slow']:8.2f}", flush=True)
        path = results.merge(options.name, "disturbed", records)
    print("wrote", path)


if __name__ == "__main__":
    main()
