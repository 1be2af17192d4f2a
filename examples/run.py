"""Run the examples one after the other, and write the table in README.md from what they print.

Usage: python examples/run.py [--quick] [NAME ...]

With --quick, small runs, and nothing is written.
"""

import argparse
import ast
import json
import os
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

from fastrnn import machine

HERE = Path(__file__).parent
OTHERS = {"common", "run"}
RESULTS = HERE / "results.json"
BEGIN, END = "<!-- table:begin -->\n", "<!-- table:end -->\n"


def names() -> list[str]:
    """Return the names of all examples."""
    return sorted(path.stem for path in HERE.glob("*.py") if path.stem not in OTHERS)


def title(name: str) -> str:
    """Return the first line of the example's docstring."""
    text = ast.get_docstring(ast.parse((HERE / f"{name}.py").read_text())) or ""
    return text.partition("\n")[0].rstrip(".")


def run(name: str, quick: bool) -> dict[str, Any] | None:
    """Run an example; return the figures that it printed and the seconds it took, or None if it says it was skipped."""
    print(f"== {name}: {title(name)}", flush=True)
    start = time.perf_counter()
    command = [sys.executable, str(HERE / f"{name}.py"), *["--quick"] * quick]
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL, check=False)
    seconds = time.perf_counter() - start
    print(process.stdout, end="")
    print(f"{seconds:.0f} s", flush=True)
    if process.returncode:
        raise SystemExit(f"{name} ended with {process.returncode}")
    lines = process.stdout.splitlines() or [""]
    if lines[-1].startswith("skipped"):
        return None
    return {"seconds": seconds, "figures": [json.loads(line) for line in lines if line.startswith('{"measure"')]}


def table(results: dict[str, Any]) -> str:
    """Return the table of the README."""
    lines = ["| example | what it shows | seconds | measure | fastrnn | baseline |", "|---|---|---|---|---|---|"]
    for name, result in sorted(results["examples"].items()):
        first = [f"[{name}]({name}.py)", title(name), f"{result['seconds']:.0f}"]
        rows = [
            [figure["measure"], f"{figure['ours']:.4g}", f"{figure['baseline']}: {figure['theirs']:.4g}"]
            for figure in result["figures"]
        ] or [["", "", ""]]
        for row in rows:
            lines.append(f"| {' | '.join([*first, *row])} |")
            first = ["", "", ""]
    return f"{results['machine']}, {results['date']}.\n\n" + "\n".join(lines) + "\n"


def write(new: dict[str, Any]) -> None:
    """Merge the results into those that are there, and write the table anew."""
    old = json.loads(RESULTS.read_text())["examples"] if RESULTS.exists() else {}
    examples = {name: result for name, result in (old | new).items() if name in names()}
    processor = machine.processor()["processor"]
    results = {"machine": f"{processor}, {os.cpu_count()} cores", "date": str(date.today()), "examples": examples}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    readme = HERE / "README.md"
    before, rest = readme.read_text().split(BEGIN)
    readme.write_text(before + BEGIN + table(results) + END + rest.split(END)[1])


def main() -> None:
    """Read the command line, and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(names())}; all by default")
    arguments = parser.parse_args()
    unknown = set(arguments.names) - set(names())
    if unknown:
        parser.error(f"there is no example {', '.join(sorted(unknown))}")
    chosen = arguments.names or names()
    skipped = []
    for name in chosen:
        result = run(name, arguments.quick)
        if result is None:
            skipped.append(name)
        elif not arguments.quick:
            write({name: result})
    print(f"{len(chosen) - len(skipped)} of {len(chosen)} examples ran; skipped: {', '.join(skipped) or 'none'}")


if __name__ == "__main__":
    main()
