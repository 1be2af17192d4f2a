"""Write the README's figures and benchmarks/RESULTS.md from benchmarks/results/*.json.

python benchmarks/report.py
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import grid
from fastrnn.bench import PEERS
from results import Record

HERE = Path(__file__).resolve().parent
README, PAGE, PICTURES = HERE.parent / "README.md", HERE / "RESULTS.md", HERE / "pictures"
BEGIN, END = "<!-- figures:begin -->", "<!-- figures:end -->"
CELLS = {"lstm": "LSTM", "gru": "GRU", "rnn_tanh": "RNN"}
PASSES = {"forward": "inference", "training": "training", "backward": "backward", "step": "one step"}
NAMES = {
    "fastrnn": "fastrnn",
    "fastrnn recompute": "fastrnn, recompute",
    "torch": "torch.nn",
    "onnxruntime": "ONNX Runtime",
    "jax": "JAX",
    "reference": "NumPy",
}
BEST = "best of them"


# ---- words and tables


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def times(ratio: float) -> str:
    """'3.4×', and no more digits than mean something."""
    return f"{ratio:.0f}×" if ratio >= 20 else f"{ratio:.1f}×" if ratio >= 0.95 else f"{ratio:.2f}×"


def milliseconds(value: float) -> str:
    return f"{value:.3f}" if value < 1 else f"{value:.2f}" if value < 10 else f"{value:.1f}"


def threads_of(n: int) -> str:
    return f"{n} thread{'s' * (n > 1)}"


def shape_of(record: Record) -> str:
    return ", ".join(map(str, record["shape"]))


def name_of(record: Record) -> str:
    """'LSTM inference 100, 32, 128, 128'."""
    return f"{CELLS[record['cell']]} {PASSES[record['operation']]} {shape_of(record)}"


def chosen(records: Iterable[Record], **fields: Any) -> list[Record]:
    """The records with these values, in their order."""
    return [record for record in records if all(record.get(name) == value for name, value in fields.items())]


def libraries(records: Iterable[Record], field: str) -> list[str]:
    """The other libraries that any of the records has, in the order of NAMES."""
    found = {name for record in records for name in record[field]}
    return [name for name in NAMES if name in found and name != "fastrnn"]


# ---- the grid


def whole(results: Record) -> list[Record]:
    """The cases with a shape of the grid, or an odd one, and rows of one length."""
    shapes = {*grid.SHAPES, *grid.ODD}
    return [
        case
        for case in results.get("cases", [])
        if tuple(case["shape"]) in shapes and case["operation"] in grid.PASSES and not case["lengths"]
    ]


def ratio_of(case: Record, other: str) -> float | None:
    """How many times as long as fastrnn another library takes, or the fastest of the peers."""
    return case["ratio"].get(case["best_peer"] if other == BEST else other)


def summary(cases: Sequence[Record]) -> str:
    """Geometric mean and smallest of the ratios over all shapes."""
    others = libraries(cases, "ratio")
    columns = [name for name in others if name in PEERS] + [BEST] + [name for name in others if name not in PEERS]
    rows = []
    for operation in grid.PASSES:
        for threads in sorted({case["threads"] for case in cases}):
            for cell in CELLS:
                some = chosen(cases, operation=operation, threads=threads, cell=cell)
                row = []
                for other in columns:
                    ratios = [ratio for case in some if (ratio := ratio_of(case, other)) is not None]
                    row.append(f"{times(statistics.geometric_mean(ratios))} ({times(min(ratios))})" if ratios else "")
                rows.append([f"{CELLS[cell]} {PASSES[operation]}", str(threads), *row])
    return table(["", "threads", *(NAMES.get(name, name) for name in columns)], rows)


def by_shape(cases: Sequence[Record], threads: int) -> str:
    """A row for each shape of the grid: milliseconds of fastrnn, and how many times as long the best peer takes."""
    found = {(tuple(c["shape"]), c["cell"], c["operation"]): c for c in chosen(cases, threads=threads)}
    columns = [(cell, operation) for cell in CELLS for operation in grid.PASSES]
    rows = []
    for shape in grid.SHAPES:
        row = [", ".join(map(str, shape))]
        for column in columns:
            case = found.get((shape, *column))
            row.append(" · ".join(_own_and_best(case)) if case else "")
        rows.append(row)
    return table(["T, B, I, H", *(f"{CELLS[cell]} {PASSES[operation]}" for cell, operation in columns)], rows)


def _own_and_best(case: Record) -> list[str]:
    best = ratio_of(case, BEST)
    return [milliseconds(case["milliseconds"]["fastrnn"]), *([times(best)] if best else [])]


def each(cases: Sequence[Record], label: Any = name_of) -> str:
    """A row for each case: milliseconds of fastrnn, and how many times as long every other library takes."""
    others = libraries(cases, "ratio")
    rows = [
        [
            label(case),
            str(case["threads"]),
            milliseconds(case["milliseconds"]["fastrnn"]),
            *(times(case["ratio"][name]) if name in case["ratio"] else "" for name in others),
        ]
        for case in cases
    ]
    return table(["", "threads", "fastrnn, ms", *(NAMES[name] for name in others)], rows)


def special(results: Record) -> str:
    """Rows of many lengths, and single steps."""

    def label(case: Record) -> str:
        if case["lengths"]:
            return (
                f"{CELLS[case['cell']]} {PASSES[case['operation']]}, {case['shape'][1]} rows of 1 to {case['shape'][0]}"
            )
        return f"{CELLS[case['cell']]}, one step, H = {case['shape'][3]}"

    cases = [case for case in results.get("cases", []) if case["lengths"] or case["operation"] == "step"]
    return each(cases, label) if cases else ""


# ---- the other sections: each a table, or nothing where it was not measured


def memory(records: Sequence[Record]) -> str:
    """MiB of each library, a column for each case."""
    columns = list(dict.fromkeys(map(name_of, records)))
    found = {(record["library"], name_of(record)): record["bytes"] for record in records}
    rows = [
        [title, *(f"{found[name, column] / 2**20:.0f}" if (name, column) in found else "" for column in columns)]
        for name, title in NAMES.items()
        if any(record["library"] == name for record in records)
    ]
    return table(["MiB", *columns], rows)


def start(records: Sequence[Record]) -> str:
    """Seconds of the import and of the first calls."""

    def seconds(value: float | None) -> str:
        return "" if value is None else f"{value / 1e3:.2f} s" if value >= 100 else f"{milliseconds(value)} ms"

    rows = [
        [
            f"{CELLS[record['cell']]} {PASSES[record['operation']]}",
            NAMES[record["library"]],
            *(seconds(record.get(name)) for name in ("import", "first", "cached", "second")),
        ]
        for record in records
    ]
    return table(["", "library", "import", "first call", "first call, cached", "second call"], rows)


def disturbed(records: Sequence[Record]) -> str:
    """Median (and 90th percentile), by the library's time alone on one thread; a column for each condition."""
    conditions = list(dict.fromkeys((record["threads"], record["disturbance"]) for record in records))
    labels = list(dict.fromkeys((name_of(record), record["library"]) for record in records))
    found = {(name_of(r), r["library"], r["threads"], r["disturbance"]): r for r in records}
    rows = []
    for label, library in labels:
        row = [label, NAMES[library]]
        for condition in conditions:
            one = found.get((label, library, *condition))
            row.append(f"{one['median']:.2f} ({one['slow']:.2f})" if one else "")
        rows.append(row)
    return table(["", "library", *(f"{threads_of(n)}, {what}" for n, what in conditions)], rows)


def limits(records: Sequence[Record]) -> str:
    rows = []
    for record in records:
        bound = "multiply-adds a second" if record["limit"] == "multiply-adds" else "bytes of weights a second"
        figures = [
            f"{record['reached'] / 1e9:.0f}·10⁹",
            f"{record['possible'] / 1e9:.0f}·10⁹",
            f"{record['share']:.0%}",
        ]
        rows.append([name_of(record), str(record["threads"]), bound, *figures])
    return table(["", "threads", "bound by", "reached", "a bare loop", "share"], rows)


def growth(records: Sequence[Record]) -> str:
    rows = [
        [
            f"{CELLS[record['cell']]} {PASSES[record['operation']]}",
            f"{record['size']} {record['sizes'][0]} to {record['sizes'][-1]}",
            " · ".join(map(milliseconds, record["milliseconds"])),
            f"{record['slope']:.2f}",
        ]
        for record in records
    ]
    return table(["", "doubled", "ms", "slope"], rows)


def speed_up(records: Sequence[Record]) -> str:
    rows = [[name_of(record), str(record["threads"]), times(record["speed_up"])] for record in records]
    return table(["", "threads", "as fast as one"], rows)


def steps(records: Sequence[Record]) -> str:
    """A row for each shape: milliseconds of a training step, and how many times as long it takes with torch.nn."""
    columns = [(cell, n) for cell in CELLS for n in sorted({record["threads"] for record in records})]
    columns = [column for column in columns if chosen(records, cell=column[0], threads=column[1])]
    rows = []
    for shape in dict.fromkeys(map(shape_of, records)):
        some = {(record["cell"], record["threads"]): record for record in records if shape_of(record) == shape}
        found = [some.get(column) for column in columns]
        rows.append(
            [
                shape,
                *(f"{milliseconds(r['milliseconds']['fastrnn'])} · {times(r['ratio'])}" if r else "" for r in found),
            ]
        )
    return table(["T, B, I, H", *(f"{CELLS[cell]}, {threads_of(n)}" for cell, n in columns)], rows)


def steps_summary(records: Sequence[Record]) -> str:
    """Geometric mean and smallest of the ratios over all shapes."""
    counts = sorted({record["threads"] for record in records})
    rows = []
    for cell in CELLS:
        ratios = [[record["ratio"] for record in chosen(records, cell=cell, threads=n)] for n in counts]
        row = [f"{times(statistics.geometric_mean(some))} ({times(min(some))})" if some else "" for some in ratios]
        rows += [[CELLS[cell], *row]] if any(row) else []
    return table(["", *map(threads_of, counts)], rows)


# ---- the pages


def head(results: Record) -> str:
    """Whose figures these are, and what the others' are."""
    machine = results["machine"]
    known = ", ".join(f"{name} {machine[name]}" for name in ("numba", "numpy", *PEERS) if name in machine)
    return f"{results['name']}: {machine['processor']}. {known}; float32; {results['date']}."


def picture(results: Record, kind: str, text: str, folder: str) -> str:
    """Markdown that shows a picture, where it has been drawn."""
    path = PICTURES / f"{results['name']}-{kind}.svg"
    return f"![{text}]({folder}pictures/{path.name})" if path.exists() else ""


def titled(title: str, *parts: str) -> list[str]:
    """A title and what follows it, if anything does."""
    return [title, *filter(None, parts)] if any(parts) else []


def section(results: Record) -> str:
    """The README's figures of one machine."""
    cases = whole(results)
    threads = max(case["threads"] for case in cases)
    calls = chosen(results.get("memory", []), cell="lstm", shape=[200, 32, 256, 256])
    starts = chosen(results.get("start", []), cell="lstm", operation="training")
    troubles = chosen(results.get("disturbed", []), operation="forward", shape=[100, 32, 128, 128])
    shapes = len({tuple(case["shape"]) for case in cases})
    parts = [
        f"{head(results)} How many times as long as fastrnn the others take, each in a process of its own, with as "
        f"many threads: geometric mean over {shapes} shapes, and the smallest in brackets. {results.get('remark', '')}"
        f"*{BEST.capitalize()}* is, "
        "shape by shape, the fastest of the libraries before it. "
        "[All tables and pictures](benchmarks/RESULTS.md).",
        summary(cases),
        picture(results, "speedup", "How many times as long as fastrnn the fastest other library takes", "benchmarks/"),
        f"{threads_of(threads).capitalize()}: milliseconds of fastrnn, and how many times as long the fastest other "
        "library takes.",
        by_shape(cases, threads),
        *titled("Rows of different length, and single steps: how many times as long as fastrnn.", special(results)),
        *titled("Memory of a call at its peak, above arguments and results.", calls and memory(calls)),
        *titled("From the start of a program.", starts and start(starts)),
        *titled(_DISTURBED, troubles and disturbed(troubles)),
        *titled(_STEPS, results.get("steps") and steps_summary(results["steps"])),
    ]
    return "\n\n".join(filter(None, parts))


_DISTURBED = (
    "On a machine that is not its own: median time of a call (90th percentile in brackets) by the library's own on "
    "one thread of an idle machine. *Spinning*: another process on every core; *product*: NumPy multiplies before "
    "each call."
)

_STEPS = (
    "A training step in PyTorch, of Linear, the layer, Linear, loss, gradients and Adam: how many times as long it "
    "takes with torch.nn's layer, geometric mean over the shapes, and the smallest in brackets."
)


def page(results: Record) -> str:
    """All figures of one machine, for RESULTS.md."""
    cases = whole(results)
    parts = [f"## {results['name']}", head(results), "### Summary", summary(cases)]
    for kind, text in (
        ("speedup", "How many times as long as fastrnn the fastest other library takes"),
        ("hidden", "Time against hidden units"),
        ("batch", "Time against rows"),
    ):
        parts.append(picture(results, kind, text, ""))
    for operation in grid.PASSES:
        for threads in sorted({case["threads"] for case in cases}):
            some = chosen(cases, operation=operation, threads=threads)
            if some:
                ordered = [case for cell in CELLS for case in chosen(some, cell=cell)]
                parts += [f"### {PASSES[operation].capitalize()}, {threads_of(threads)}", each(ordered)]
    tables = {name: make(results[name]) if results.get(name) else "" for name, make in SECTIONS.items()}
    parts += titled("### Rows of different length, single steps", special(results))
    parts += titled("### Limits", tables["limits"], picture(results, "limits", "Share of what the machine can do", ""))
    parts += titled("### Growth, one thread", tables["growth"])
    parts += titled("### Threads", tables["threads"])
    parts += titled("### Memory at the peak of a call, above arguments and results", tables["memory"])
    parts += titled("### Start", tables["start"], picture(results, "start", "Time until the first result", ""))
    parts += titled("### Disturbed", _DISTURBED if tables["disturbed"] else "", tables["disturbed"])
    if tables["steps"]:
        parts += titled("### Training steps in PyTorch", _STEPS, steps_summary(results["steps"]), tables["steps"])
    return "\n\n".join(filter(None, parts))


SECTIONS = {
    "limits": limits,
    "growth": growth,
    "threads": speed_up,
    "memory": memory,
    "start": start,
    "disturbed": disturbed,
    "steps": steps,
}


def machines() -> list[Record]:
    """The results of every machine that has timed the grid."""
    files = sorted((HERE / "results").glob("*.json"))
    read = [json.loads(path.read_text(encoding="utf-8")) for path in files]
    return [results for results in read if whole(results)]


def figures() -> str:
    """All that stands between the README's markers."""
    return "\n\n".join(map(section, machines()))


def results_page() -> str:
    """All of RESULTS.md."""
    intro = (
        "# Results\n\nWritten by `make bench-report` from benchmarks/results/. A shape is T, B, I, H: steps, rows, "
        "sizes of the input and of the state. Under fastrnn stand milliseconds, under the others how many times as "
        "long they take: above 1 fastrnn is faster."
    )
    return "\n\n".join([intro, *map(page, machines())]) + "\n"


def main() -> None:
    before, rest = README.read_text(encoding="utf-8").split(BEGIN)
    _, after = rest.split(END)
    README.write_text(f"{before}{BEGIN}\n{figures()}\n{END}{after}", encoding="utf-8")
    PAGE.write_text(results_page(), encoding="utf-8")


if __name__ == "__main__":
    main()
