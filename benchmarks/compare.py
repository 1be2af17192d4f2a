"""Time fastrnn, its NumPy reference and torch.nn on the grid and write benchmarks/results/<name>.json.

    python benchmarks/compare.py --name my-machine

Each library has a process of its own for each number of threads, so that no pool of threads meets another's. In a
round, each library in turn is asked for the median time of some calls. A library's figure is the median of its rounds,
a ratio the median of the rounds' ratios. Every answer is checked against the reference before it is timed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from datetime import date
from importlib import metadata
from pathlib import Path

from grid import CELLS, QUICK, SHAPES, shape_name

RESULTS = Path(__file__).parent / "results"
PASSES = ("forward", "training")  # inference; forward and every gradient
THREAD_VARIABLES = ("FASTRNN_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


class Worker:
    """A process that runs one library on some threads."""

    def __init__(self, library: str, threads: int) -> None:
        environment = {**os.environ, **{name: str(threads) for name in THREAD_VARIABLES}}
        command = [sys.executable, __file__, "--serve", library]
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )

    def seconds(self, **request) -> float:
        """Median time of a call."""
        self.process.stdin.write(json.dumps(request) + "\n")
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"the process that was asked for {request} has ended")
        return json.loads(answer)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def serve(library: str) -> None:
    """Answer requests, one a line, until the input ends."""
    from libraries import LIBRARIES, check

    contestant, last = None, None
    for line in sys.stdin:
        request = json.loads(line)
        cell, shape, operation = request["cell"], tuple(request["shape"]), request["operation"]
        if last != (cell, shape):
            contestant, last = LIBRARIES[library](cell, shape), (cell, shape)
        if request["check"] and library != "reference":
            check(contestant, cell, shape, operation)
            time.sleep(0.05)  # until NumPy's threads, which the check has woken, sleep again
        print(json.dumps(median_time(getattr(contestant, operation), request["budget"])), flush=True)


def median_time(function, budget: float) -> float:
    """Median seconds of a call, over calls for `budget` seconds and three at least, after one that is not counted."""
    function()
    times, begin = [], time.perf_counter()
    while len(times) < 3 or time.perf_counter() - begin < budget:
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def measure(workers: dict[str, Worker], cell: str, shape: tuple, operation: str, rounds: int, budget: float) -> dict:
    """Milliseconds of each library, and how many times as long as fastrnn the others take."""
    request = {"cell": cell, "shape": shape, "operation": operation, "budget": budget}
    seconds: dict[str, list[float]] = {name: [] for name in workers}
    for i in range(rounds):
        for name, worker in workers.items():
            seconds[name].append(worker.seconds(**request, check=i == 0))
    ratios = {
        name: statistics.median(other / own for other, own in zip(times, seconds["fastrnn"], strict=True))
        for name, times in seconds.items()
        if name != "fastrnn"
    }
    milliseconds = {name: 1e3 * statistics.median(times) for name, times in seconds.items()}
    return {
        "milliseconds": {name: float(f"{value:.4g}") for name, value in milliseconds.items()},
        "ratio": {name: float(f"{value:.4g}") for name, value in ratios.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", help="name of the machine, for the file of results")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], metavar="N")
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=CELLS)
    parser.add_argument("--quick", action="store_true", help="a few small shapes")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--budget", type=float, default=0.1, help="seconds of calls in a round")
    parser.add_argument("--serve", metavar="LIBRARY", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return serve(options.serve)
    if not options.name:
        parser.error("--name is needed: the file of results is called after it")

    import fastrnn.machine

    libraries = ["fastrnn", "reference"] + ["torch"] * bool(importlib.util.find_spec("torch"))
    machine = {**fastrnn.machine.versions(), **fastrnn.machine.processor()}
    if "torch" in libraries:
        machine["torch"] = metadata.version("torch")
    cases = []
    for threads in options.threads:
        workers = {name: Worker(name, threads) for name in libraries}
        for cell in options.cells:
            for shape in QUICK if options.quick else SHAPES:
                for operation in PASSES:
                    figures = measure(workers, cell, shape, operation, options.rounds, options.budget)
                    case = {"cell": cell, "shape": shape, "operation": operation, "threads": threads, **figures}
                    cases.append(case)
                    print(f"{threads} {cell:<9} {operation:<9} {shape_name(shape):<16}", figures, flush=True)
        for worker in workers.values():
            worker.close()
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{options.name}.json"
    lines = ",\n".join("    " + json.dumps(case) for case in cases)
    head = json.dumps({"name": options.name, "date": str(date.today()), "machine": machine}, indent=2)
    path.write_text(head[: -len("\n}")] + ',\n  "cases": [\n' + lines + "\n  ]\n}\n")
    print("wrote", path)


if __name__ == "__main__":
    main()
