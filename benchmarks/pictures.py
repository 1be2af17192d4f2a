"""Draw benchmarks/pictures/<machine>-*.svg from benchmarks/results/*.json: `python benchmarks/pictures.py`.

It needs matplotlib: pip install 'fastrnn[bench]'.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import grid
from report import BEST, CELLS, NAMES, PASSES, PICTURES, chosen, machines, name_of, ratio_of, threads_of, times, whole
from results import Record

#: Okabe and Ito's colours, which every kind of eye tells apart; and marks, for paper without colour.
STYLES = {
    "fastrnn": ("#D55E00", "o"),
    "torch": ("#0072B2", "s"),
    "onnxruntime": ("#009E73", "^"),
    "jax": ("#CC79A7", "D"),
    "reference": ("#7F7F7F", "x"),
}
ON_ONE, ON_MORE = "#56B4E9", "#E69F00"

mpl.use("Agg")
mpl.rcParams.update(
    {
        "svg.hashsalt": "fastrnn",
        "svg.fonttype": "none",
        "font.size": 9,
        "axes.grid": True,
        "grid.alpha": 0.3,
        "axes.axisbelow": True,
    }
)


def lines(cases: Sequence[Record], shapes: Sequence[tuple[int, ...]], at: int, label: str) -> Figure | None:
    """Time against one size, a panel for each cell and pass, a line for each library."""
    shown = [case for case in cases if tuple(case["shape"]) in shapes]
    if not shown:
        return None
    figure, axes = plt.subplots(2, 3, figsize=(9, 5.4), sharex=True, sharey="row", layout="constrained")
    for row, operation in zip(axes, grid.PASSES, strict=True):
        for panel, cell in zip(row, CELLS, strict=True):
            _lines(panel, chosen(shown, operation=operation, cell=cell), at)
            panel.set_title(f"{CELLS[cell]} {PASSES[operation]}")
        row[0].set_ylabel("milliseconds")
    sizes = sorted({shape[at] for shape in shapes})
    for panel in axes[1]:
        panel.set_xticks(sizes, map(str, sizes))
        panel.set_xlabel(label)
    axes[0, 0].set_xticks([], minor=True)
    named = {text: line for panel in axes.flat for line, text in zip(*panel.get_legend_handles_labels(), strict=True)}
    figure.legend(named.values(), named.keys(), loc="outside upper center", ncols=len(named), frameon=False)
    return figure


def _lines(panel: Axes, cases: Sequence[Record], at: int) -> None:
    for library, (colour, mark) in STYLES.items():
        points = sorted((c["shape"][at], c["milliseconds"][library]) for c in cases if library in c["milliseconds"])
        if points:
            width = 2.2 if library == "fastrnn" else 1.2
            panel.plot(*zip(*points, strict=True), color=colour, marker=mark, markersize=4, linewidth=width,
                       label=NAMES[library])  # fmt: skip
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.yaxis.set_major_formatter("{x:g}")
    panel.minorticks_off()


def speedup(cases: Sequence[Record]) -> Figure:
    """How many times as long the fastest other library takes: a row for each shape, a column for each cell and pass."""
    shapes = [shape for shape in (*grid.SHAPES, *grid.ODD) if any(tuple(case["shape"]) == shape for case in cases)]
    columns = [(cell, operation) for operation in grid.PASSES for cell in CELLS]
    values = np.full((len(shapes), len(columns)), np.nan)
    for case in cases:
        best = ratio_of(case, BEST)
        if best is not None:
            values[shapes.index(tuple(case["shape"])), columns.index((case["cell"], case["operation"]))] = best
    figure, panel = plt.subplots(figsize=(6.6, 1.3 + 0.26 * len(shapes)), layout="constrained")
    image = panel.imshow(np.log2(values), cmap="PuOr", vmin=-3, vmax=3, aspect="auto")
    for (i, j), value in np.ndenumerate(values):
        if not math.isnan(value):
            dark = abs(math.log2(value)) > 1.9
            panel.text(j, i, times(value), ha="center", va="center", color="white" if dark else "black", fontsize=8)
    panel.set_yticks(range(len(shapes)), [", ".join(map(str, shape)) for shape in shapes])
    panel.set_xticks(range(len(columns)), [f"{CELLS[cell]}\n{PASSES[operation]}" for cell, operation in columns])
    panel.xaxis.tick_top()
    panel.set_ylabel("T, B, I, H")
    panel.grid(visible=False)
    panel.tick_params(length=0)
    bar = figure.colorbar(image, extend="both", shrink=0.6)
    bar.set_ticks(range(-3, 4), labels=["1/8", "1/4", "1/2", "1", "2", "4", "8"])
    bar.set_label("time of the fastest other library / fastrnn's")
    return figure


def limits(records: Sequence[Record]) -> Figure:
    """The share of what a bare loop reaches, a bar for each case."""
    figure, panel = plt.subplots(figsize=(9, 0.8 + 0.3 * len(records)), layout="constrained")
    for i, record in enumerate(records):
        colour = ON_ONE if record["threads"] == 1 else ON_MORE
        unit = "multiply-adds/s" if record["limit"] == "multiply-adds" else "B/s read"
        panel.barh(i, 100 * record["share"], color=colour)
        panel.text(
            101, i, f"{record['share']:.0%} of {record['possible'] / 1e9:.0f}·10⁹ {unit}", va="center", fontsize=8
        )
    panel.set_yticks(range(len(records)), [f"{name_of(record)}, {threads_of(record['threads'])}" for record in records])
    panel.invert_yaxis()
    panel.set_xlim(0, 160)
    panel.set_xticks(range(0, 101, 20))
    panel.set_xlabel("% of what a bare loop reaches on this machine")
    return figure


def start(records: Sequence[Record]) -> Figure:
    """Seconds of the import, and of the first call, for LSTM training and inference."""
    records = chosen(records, cell="lstm")
    operations = [operation for operation in grid.PASSES if chosen(records, operation=operation)]
    figure, axes = plt.subplots(
        1, len(operations), figsize=(8.5, 2.6), sharex=True, squeeze=False, layout="constrained"
    )
    for panel, operation in zip(axes.flat, operations, strict=True):
        bars = []
        for record in chosen(records, operation=operation):
            name = NAMES[record["library"]]
            bars.append((f"{name}, new" if "cached" in record else name, record["import"], record["first"]))
            if "cached" in record:
                bars.append((f"{name}, cached", record["import"], record["cached"]))
        names, imports, firsts = zip(*bars, strict=True)
        panel.barh(names, [value / 1e3 for value in imports], color="#999999", label="import")
        panel.barh(names, [value / 1e3 for value in firsts], left=[value / 1e3 for value in imports], color="#0072B2",
                   label="first call")  # fmt: skip
        for i, (_, first, second) in enumerate(bars):
            panel.text((first + second) / 1e3, i, f" {(first + second) / 1e3:.2f}", va="center", fontsize=8)
        panel.invert_yaxis()
        panel.margins(x=0.15)
        panel.set_title(f"LSTM {PASSES[operation]}")
        panel.set_xlabel("seconds")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False)
    return figure


def draw(results: Record) -> dict[str, Figure | None]:
    """Every picture that the results are enough for."""
    cases = whole(results)
    most = chosen(cases, threads=max(case["threads"] for case in cases))
    streams = [shape for shape in grid.SHAPES if shape[:2] == (100, 1)]
    batches = [shape for shape in grid.SHAPES if shape[0] == 100 and shape[3] == 128]
    return {
        "hidden": lines(most, streams, 3, "hidden units (100 steps, 1 row)"),
        "batch": lines(most, batches, 1, "rows (100 steps, 128 hidden units)"),
        "speedup": speedup(most),
        "limits": limits(results["limits"]) if results.get("limits") else None,
        "start": start(results["start"]) if chosen(results.get("start", []), cell="lstm") else None,
    }


def main() -> None:
    PICTURES.mkdir(exist_ok=True)
    for results in machines():
        for kind, figure in draw(results).items():
            if figure is not None:
                path = PICTURES / f"{results['name']}-{kind}.svg"
                figure.savefig(path, metadata={"Date": None})
                plt.close(figure)
                print("drew", path)


if __name__ == "__main__":
    main()
