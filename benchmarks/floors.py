"""Fail when a kernel has become much slower: `python benchmarks/floors.py`.

What is compared is how many times as long as fastrnn the NumPy reference takes, in one process, in turn, on one thread:
a ratio, which another machine or a busy one changes little. The floors, in floors.json, are half of what a calm machine
has measured (`--write` measures them anew). What is under its floor is measured again, longer, before it counts.
"""

from __future__ import annotations

import os

if __name__ == "__main__":  # before what imports NumPy, which reads them then
    os.environ.update({"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "FASTRNN_NUM_THREADS": "1"})

import argparse
import json
import statistics
import time
from pathlib import Path

from fastrnn.bench import Case, Fastrnn, Reference, call_times, check, ratio

FLOORS = Path(__file__).with_name("floors.json")
SHAPES = ((100, 1, 64, 64), (50, 32, 128, 128), (10, 64, 256, 256))
CASES = tuple(
    Case(cell, shape, operation)
    for cell in ("lstm", "gru", "rnn_tanh")
    for shape in SHAPES
    for operation in ("forward", "backward")
)


def advantage(case: Case, rounds: int = 5, seconds: float = 0.01) -> float:
    """How many times as long as fastrnn the reference takes: the median of the rounds' ratios."""
    contestants = Fastrnn(case), Reference(case)
    check(contestants[0], case)
    calls = [getattr(contestant, case.operation) for contestant in contestants]
    own, other = zip(*([statistics.median(call_times(f, seconds)) for f in calls] for _ in range(rounds)), strict=True)
    return ratio(other, own)


def below(case: Case, floor: float, attempts: int = 3) -> float | None:
    """The best ratio of some attempts, each longer than the one before, if none has reached the floor."""
    best = 0.0
    for attempt in range(attempts):
        if attempt:
            time.sleep(1)  # whatever disturbs it may be over then
        best = max(best, advantage(case, rounds=5 + 4 * attempt))
        if best >= floor:
            return None
    return best


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="measure the floors anew")
    if parser.parse_args().write:
        floors = {str(case): round(advantage(case, rounds=15) / 2, 2) for case in CASES}
        FLOORS.write_text(json.dumps(floors, indent=2) + "\n", encoding="utf-8")
        return 0
    floors, slow = json.loads(FLOORS.read_text(encoding="utf-8")), 0
    begin = time.monotonic()
    for case in CASES:
        found = below(case, floors[str(case)])
        if found is not None:
            slow += 1
            print(f"{case}: NumPy takes {found:.2f} times as long as fastrnn; the floor is {floors[str(case)]}")
    took = f"{time.monotonic() - begin:.0f} s"
    print(
        f"{slow} of {len(CASES)} cases are slower than their floors ({took})" if slow else f"no kernel is slow ({took})"
    )
    return 1 if slow else 0


if __name__ == "__main__":
    raise SystemExit(main())
