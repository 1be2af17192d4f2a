"""Time training steps of a model in PyTorch, with torch.nn's layer and with fastrnn.torch's in its place.

    python benchmarks/training.py --cells lstm --threads 2

A step is Linear, the layer, Linear, cross-entropy at every time step, all gradients, and Adam. It is one model in one
process: `replace_` and `restore_` put one or the other layer into it, so that all else is the same, parameters too. In
a round each in turn makes steps for some time; a figure is the median of the rounds, a ratio that of their ratios.
Loss and gradients are compared before anything is timed.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

import fastrnn.torch
import grid
import results
from fastrnn import bench
from fastrnn.bench import CLASSES, Shape

SYMBOLS = 50  # classes
TOLERANCE = 1e-3  # of a gradient's norm: some hundred roundings, one after the other
SWAP: dict[str, Callable[..., Any]] = {"torch": fastrnn.torch.restore_, "fastrnn": fastrnn.torch.replace_}


class Model(torch.nn.Module):
    """A classifier of every time step."""

    def __init__(self, cell: str, shape: Shape) -> None:
        super().__init__()
        _, _, I, H = shape
        self.first = torch.nn.Linear(I, I)
        self.layer = getattr(torch.nn, CLASSES[cell])(I, H)
        self.last = torch.nn.Linear(H, SYMBOLS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.layer(torch.relu(self.first(x)))[0])


def step_of(model: Model, shape: Shape) -> Callable[[], torch.Tensor]:
    """A function that makes a training step and returns the loss before it."""
    random = torch.Generator().manual_seed(1)
    x = torch.randn(shape[:3], generator=random)
    target = torch.randint(SYMBOLS, (shape[0] * shape[1],), generator=random)
    optimizer = torch.optim.Adam(model.parameters())

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(x).flatten(0, 1), target)
        loss.backward()
        optimizer.step()
        return loss

    return step


def check(model: Model, shape: Shape) -> None:
    """Raise AssertionError unless both layers lead to the same loss and gradients; the model is left as it was."""
    found = {}
    for name, swap in SWAP.items():
        own = copy.deepcopy(model)
        swap(own)
        found[name] = step_of(own, shape)().detach(), *(parameter.grad for parameter in own.parameters())
    for ours, theirs in zip(found["fastrnn"], found["torch"], strict=True):
        error, size = torch.linalg.vector_norm(ours - theirs), torch.linalg.vector_norm(theirs)
        assert error <= TOLERANCE * size, f"{error} of {size}"


def measure(
    cell: str, shape: Shape, rounds: int, seconds: float, limit: float = float("inf")
) -> dict[str, list[float]]:
    """The seconds of a step in each round, with either layer; after three rounds, none begins after `limit` seconds."""
    torch.manual_seed(0)
    model = Model(cell, shape)
    check(model, shape)
    step = step_of(model, shape)
    medians: dict[str, list[float]] = {name: [] for name in SWAP}
    begin = time.monotonic()
    for i in range(rounds):
        if i >= 3 and time.monotonic() - begin > limit:
            break
        for name, swap in SWAP.items():
            swap(model)
            step()
            medians[name].append(statistics.median(bench.call_times(step, seconds)))
    return medians


def figures(medians: dict[str, list[float]]) -> results.Record:
    """Milliseconds of a step with either layer, and how many times as long as ours torch.nn's take."""
    milliseconds = {name: results.rounded(1e3 * statistics.median(times)) for name, times in medians.items()}
    ratio = results.rounded(bench.ratio(medians["torch"], medians["fastrnn"]))
    return {"milliseconds": milliseconds, "ratio": ratio}


def options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = results.parser(__doc__)
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, os.cpu_count() or 1}), metavar="N")
    parser.add_argument("--cells", nargs="+", choices=grid.CELLS, default=grid.CELLS)
    parser.add_argument("--shapes", nargs="+", choices=("grid", "odd", "quick"), default=["grid", "odd"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=0.1, help="of steps, with each layer in a round")
    parser.add_argument("--limit", type=float, default=6, help="seconds for a case: three rounds, then no more")
    given = parser.parse_args(arguments)
    if given.quick:
        given.shapes, given.rounds, given.seconds = ["quick"], 1, 0.02
    return given


def main() -> None:
    given = options()
    sets = {"grid": grid.SHAPES, "odd": grid.ODD, "quick": grid.QUICK}
    for threads in given.threads:
        torch.set_num_threads(threads)
        if fastrnn.get_num_threads() != threads:
            raise SystemExit("FASTRNN_NUM_THREADS is set, and goes before PyTorch's number: unset it")
        for cell in given.cells:
            for shape in (shape for name in given.shapes for shape in sets[name]):
                found = figures(measure(cell, shape, given.rounds, given.seconds, given.limit))
                record = {"cell": cell, "shape": shape, "threads": threads, **found}
                path = results.merge(given.name, "steps", [record])
                name = f"{threads} {CLASSES[cell]} {grid.shape_name(shape)}"
                print(f"{name:<28}", found["milliseconds"], f"{found['ratio']:.2f}", flush=True)
    print("wrote", path)


if __name__ == "__main__":
    main()
