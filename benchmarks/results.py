"""benchmarks/results/<name>.json: what every script here reads and merges its section into.

A section is a list of records. A record that is measured again replaces the one with the same key, so that a run can
be made in pieces, and a script alone renews what it measures.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from fastrnn import bench, machine

FOLDER = Path(__file__).resolve().parent / "results"
Record = dict[str, Any]

#: Each section's key: the fields that say what was measured. The others are figures.
KEYS = {
    "cases": ("cell", "shape", "operation", "lengths", "threads"),
    "limits": ("limit", "cell", "shape", "operation", "threads"),
    "growth": ("cell", "operation", "size"),
    "threads": ("cell", "shape", "operation", "threads"),
    "memory": ("library", "cell", "shape", "operation"),
    "start": ("library", "cell", "operation"),
    "disturbed": ("library", "cell", "shape", "operation", "threads", "disturbance"),
    "steps": ("cell", "shape", "threads"),
}


def machine_name() -> str:
    """'amd-epyc-znver5-2-cores': the name of this machine's results, if no other is given."""
    return name_of(machine.processor()["processor"], os.cpu_count() or 1)


def name_of(processor: str, cores: int) -> str:
    """Letters and digits of the processor's name, without what is said of it after an @, and its cores."""
    plain = re.sub(r"\((r|tm)\)|@.*?(?=\(|$)|\b(cpu|processor|\d+-core)\b", " ", processor.lower())
    return "-".join([*re.findall(r"[a-z0-9]+", plain), str(cores), "core" + "s" * (cores > 1)])


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that all scripts have."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--name", type=file_name, default=machine_name(), help="of the results, by default %(default)s")
    made.add_argument("--quick", action="store_true", help="little of it: to see that everything works")
    return made


def file_name(text: str) -> str:
    if not re.fullmatch(r"[\w.-]+", text):
        raise argparse.ArgumentTypeError(f"{text!r} has other characters than letters, digits, dots, - and _")
    return text


def key(section: str, record: Mapping[str, Any]) -> tuple[Any, ...]:
    """What a record is about, as something to compare."""
    values = (record.get(field) for field in KEYS[section])
    return tuple(tuple(value) if isinstance(value, list) else value for value in values)


def merged(old: Sequence[Record], new: Iterable[Record], section: str) -> list[Record]:
    """The old records with the new ones in the places of those with their keys, or behind them."""
    found = {key(section, record): record for record in [*old, *new]}
    return list(found.values())


def read(name: str) -> dict[str, Any]:
    """All results of a machine; without any, its name alone."""
    path = FOLDER / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"name": name}


def merge(name: str, section: str, records: Iterable[Record]) -> Path:
    """Merge records into the results of the machine that this is, and return their file."""
    results = read(name)
    results |= {"date": str(date.today()), "machine": machine.versions() | machine.processor() | bench.versions()}
    results[section] = merged(results.get(section, []), json.loads(json.dumps(list(records))), section)
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / f"{name}.json"
    written = path.with_suffix(".new")  # and then renamed: an interrupted run leaves the old results
    written.write_text(dumped(results), encoding="utf-8")
    written.replace(path)
    return path


def dumped(results: Mapping[str, Any]) -> str:
    """JSON with one record a line."""
    parts = []
    for name, value in results.items():
        if isinstance(value, list):
            text = "[\n" + ",\n".join("    " + json.dumps(record) for record in value) + "\n  ]"
        else:
            text = json.dumps(value, indent=2).replace("\n", "\n  ")
        parts.append(f"  {json.dumps(name)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def rounded(value: float) -> float:
    """Four digits: more mean nothing."""
    return float(f"{value:.4g}")


def fresh(script: str, *arguments: str, variables: Mapping[str, str] | None = None) -> Any:
    """Run a script in a new process and return what it prints last, as JSON."""
    command = [sys.executable, script, *arguments]
    done = subprocess.run(command, env={**os.environ, **(variables or {})}, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} has failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])
