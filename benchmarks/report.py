"""Write the README's figures from benchmarks/results/*.json: `python benchmarks/report.py`."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

HERE = Path(__file__).resolve().parent
README = HERE.parent / "README.md"
BEGIN, END = "<!-- figures:begin -->", "<!-- figures:end -->"
CELLS = {"lstm": "LSTM", "gru": "GRU", "rnn_tanh": "RNN"}
PASSES = {"forward": "Inference", "training": "Training (forward and every gradient)"}
OTHERS = {"torch": "torch.nn", "reference": "NumPy"}


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def times(ratio: float) -> str:
    """'3.4×', and no more digits than mean something."""
    return f"{ratio:.0f}×" if ratio >= 20 else f"{ratio:.1f}×"


def milliseconds(value: float) -> str:
    return f"{value:.3f}" if value < 1 else f"{value:.2f}" if value < 10 else f"{value:.1f}"


def summary(cases: list[dict], others: list[str]) -> str:
    """Geometric mean and smallest of the ratios over all shapes."""
    rows = []
    for operation in PASSES:
        for threads in sorted({case["threads"] for case in cases}):
            row = [PASSES[operation].split(" (")[0], str(threads)]
            for cell in CELLS:
                for other in others:
                    chosen = (operation, threads, cell)
                    ratios = [
                        case["ratio"][other]
                        for case in cases
                        if (case["operation"], case["threads"], case["cell"]) == chosen
                    ]
                    row.append(f"{times(statistics.geometric_mean(ratios))} ({times(min(ratios))})" if ratios else "")
            rows.append(row)
    head = ["pass", "threads"] + [f"{name} / {OTHERS[other]}" for name in CELLS.values() for other in others]
    return table(head, rows)


def grid(cases: list[dict], operation: str, threads: int, others: list[str]) -> str:
    """A row for each shape: milliseconds of fastrnn, and how many times as long the others take."""
    found = {
        (tuple(case["shape"]), case["cell"]): case
        for case in cases
        if (case["operation"], case["threads"]) == (operation, threads)
    }
    rows = []
    for shape in dict.fromkeys(shape for shape, _ in found):
        row = [", ".join(map(str, shape))]
        for cell in CELLS:
            case = found.get((shape, cell))
            figures = [milliseconds(case["milliseconds"]["fastrnn"])] if case else [""]
            figures += [times(case["ratio"][other]) for other in others] if case else []
            row.append(" · ".join(figures))
        rows.append(row)
    note = " · ".join(["ms", *(OTHERS[other] for other in others)])
    return table(["T, B, I, H"] + [f"{name}: {note}" for name in CELLS.values()], rows)


def section(results: dict) -> str:
    """The figures of one machine."""
    cases, machine = results["cases"], results["machine"]
    others = [other for other in OTHERS if other in cases[0]["ratio"]]
    threads = max(case["threads"] for case in cases)
    versions = ", ".join(f"{name} {machine[name]}" for name in ("numba", "numpy", "torch") if name in machine)
    parts = [
        f"{results['name']}: {machine['processor']}. {versions}, float32, {results['date']}. "
        "How many times as long as fastrnn the others take, each in a process of its own, with as many threads: "
        "geometric mean over the shapes below, and the smallest in brackets.",
        summary(cases, others),
    ]
    for operation, title in PASSES.items():
        parts += [
            f"{title}, {threads} thread{'s' * (threads > 1)}: milliseconds of fastrnn, then how many times as long "
            + " and ".join(OTHERS[other] for other in others)
            + " take.",
            grid(cases, operation, threads, others),
        ]
    return "\n\n".join(parts)


def figures() -> str:
    """All that stands between the README's markers."""
    files = sorted((HERE / "results").glob("*.json"))
    return "\n\n".join(section(json.loads(path.read_text(encoding="utf-8"))) for path in files)


def main() -> None:
    before, rest = README.read_text(encoding="utf-8").split(BEGIN)
    _, after = rest.split(END)
    README.write_text(f"{before}{BEGIN}\n{figures()}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
