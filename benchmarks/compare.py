"""Time fastrnn, its NumPy reference and every library that is installed on the grid.

    python benchmarks/compare.py --cells lstm --shapes grid odd --threads 1 2

Each library has a process of its own for each number of threads, so that no pool of threads meets another's. In a
round, each library in turn is asked for the median time of some calls. A library's figure is the median of its rounds,
a ratio the median of the rounds' ratios. Every answer is checked against the reference before it is timed.

Each case is written when it is done: --budget stops after so many seconds, --missing goes on with what is not there.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence

import grid
import results
from fastrnn import bench
from fastrnn.bench import PEERS, Case, Worker


def figures(seconds: Mapping[str, Sequence[float]]) -> results.Record:
    """Milliseconds of each library, how many times as long as fastrnn the others take, and the fastest of the peers."""
    ratios = {name: bench.ratio(times, seconds["fastrnn"]) for name, times in seconds.items() if name != "fastrnn"}
    milliseconds = {name: 1e3 * statistics.median(times) for name, times in seconds.items()}
    return with_best_peer(
        {
            "milliseconds": {name: results.rounded(value) for name, value in milliseconds.items()},
            "ratio": {name: results.rounded(value) for name, value in ratios.items()},
        }
    )


def with_best_peer(found: results.Record) -> results.Record:
    ratios = found["ratio"]
    return {**found, "best_peer": min((name for name in ratios if name in PEERS), key=ratios.get, default=None)}


def beside(old: results.Record | None, found: results.Record) -> results.Record:
    """What was found, with what other libraries took in an earlier run; a ratio is always of one run."""
    if old is None:
        return found
    return with_best_peer({part: {**old[part], **found[part]} for part in ("milliseconds", "ratio")})


def record(case: Case, threads: int) -> results.Record:
    """The fields that say what was measured."""
    return {**case._asdict(), "threads": threads}


def options() -> argparse.Namespace:
    parser = results.parser(__doc__)
    cores = os.cpu_count() or 1
    default = sorted({1, min(2, cores), cores})
    there = bench.installed()
    parser.add_argument("--threads", type=int, nargs="+", default=default, metavar="N")
    parser.add_argument("--cells", nargs="+", choices=grid.CELLS, default=grid.CELLS)
    parser.add_argument("--shapes", nargs="+", choices=grid.SETS, default=["grid", "odd", "lengths", "step"])
    parser.add_argument("--passes", nargs="+", choices=grid.PASSES, default=grid.PASSES)
    parser.add_argument("--libraries", nargs="+", choices=there, default=there, help="besides fastrnn")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.05, help="of calls, of each library in a round")
    parser.add_argument("--limit", type=float, default=4, help="seconds for a case: three rounds, then no more")
    parser.add_argument("--budget", type=float, default=float("inf"), help="begin no case after so many seconds")
    parser.add_argument("--missing", action="store_true", help="only cases that the results do not have")
    given = parser.parse_args()
    if given.quick:
        given.shapes, given.rounds, given.seconds = ["quick", "step"], 1, 0.02
    return given


def missing(name: str, cases: Iterable[Case], threads: int) -> list[Case]:
    """Those of the cases that the results do not have."""
    there = {results.key("cases", case) for case in results.read(name).get("cases", [])}
    return [case for case in cases if results.key("cases", record(case, threads)) not in there]


def run(given: argparse.Namespace, cases: Iterable[Case], threads: int, deadline: float) -> bool:
    """Time the cases and merge each into the results; say whether there was time for all."""
    workers = {name: Worker(name, threads) for name in dict.fromkeys(["fastrnn", *given.libraries])}
    try:
        for case in cases:
            if time.monotonic() > deadline:
                return False
            seconds = bench.measure(workers, case, seconds=given.seconds, rounds=given.rounds, limit=given.limit)
            what, found = record(case, threads), figures(seconds)
            known = {results.key("cases", old): old for old in results.read(given.name).get("cases", [])}
            old = known.get(results.key("cases", what))
            results.merge(given.name, "cases", [{**what, **beside(old, found)}])
            print(f"{threads} {case!s:<44}", found["milliseconds"], flush=True)
        return True
    finally:
        for worker in workers.values():
            worker.close()


def main() -> None:
    given = options()
    deadline = time.monotonic() + given.budget
    for threads in given.threads:
        cases = list(grid.cases(given.shapes, given.cells, given.passes))
        cases = missing(given.name, cases, threads) if given.missing else cases
        if cases and not run(given, cases, threads, deadline):
            print("the time is up; --missing goes on")
            break
    print("results:", results.FOLDER / f"{given.name}.json")


if __name__ == "__main__":
    main()
