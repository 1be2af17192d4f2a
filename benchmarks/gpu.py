"""Time the backend for GPUs beside cuDNN, which is torch.nn's, in one process and with the GPU's own clock.

    python benchmarks/gpu.py --cells lstm --modes bfloat16 --limit-seconds 500

A figure is the median of some calls after warm-up, in microseconds a step, the input's product included; every answer
is checked before it is timed. In 16 bits torch.nn's layer has all numbers in 16 bits, and ours has the recurrent
products in them. Two directions are measured at the level of :mod:`fastrnn.kernels.cuda.layer`, which makes both in one
launch. The share is that of the plan's modelled seconds for the walk alone in what all took.

Points come in an order that tells most first, and each is written when it is done: --limit-seconds begins no point
after so many seconds, --missing goes on with what is not there. --table prints what the results have, without a GPU.
"""

from __future__ import annotations

import copy
import itertools
import math
import multiprocessing
import os
import re
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor, wait
from typing import NamedTuple

import report
import results
from fastrnn import functional
from fastrnn.bench import CLASSES
from fastrnn.kernels.cuda import layer, persistent, plan
from fastrnn.kernels.cuda.arrays import import_array
from fastrnn.kernels.cuda.compiled import compile_kernel
from fastrnn.kernels.cuda.device import get_device
from fastrnn.kernels.cuda.simple import Size

KEYS = {"gpu": ("cell", "mode", "T", "B", "H", "directions", "operation"), "gpu device": ("device",)}
CELLS = ("lstm", "gru", "rnn_tanh")
MODES = {"float32": "float32", "tf32": "float32", "bfloat16": "bfloat16", "float16": "float16"}  # torch.nn's numbers
HIDDEN, BATCHES, STEPS, DIRECTIONS = (512, 1024, 256, 768, 128), (16, 1, 64, 8, 128), (1024, 64), (1, 2)
OPERATIONS = ("forward", "training")
CHECKED_STEPS = 64
PLACE = "cuda"
# Of the norm of an answer: some roundings of a product's factors.
TOLERANCE = {"float32": 2e-5, "tf32": 8 * 2**-11, "bfloat16": 8 * 2**-8, "float16": 8 * 2**-11}


class Point(NamedTuple):
    """What is timed. The input is as wide as the state."""

    cell: str
    mode: str
    T: int
    B: int
    H: int
    directions: int
    operation: str

    def __str__(self):
        both = " both ways" * (self.directions > 1)
        return f"{CLASSES[self.cell]} {self.operation} {self.mode} T={self.T} B={self.B} H={self.H}{both}"


def points(given):
    """All points of the options, those first that tell most."""
    for T, D, H, B in itertools.product(given.steps, given.directions, given.hidden, given.batches):
        for mode, cell, operation in itertools.product(given.modes, given.cells, given.operations):
            yield Point(cell, mode, T, B, H, D, operation)


def missing(name, some):
    """Those of the points that the results do not have."""
    there = {results.key("gpu", record) for record in results.read(name).get("gpu", [])}
    return [point for point in some if results.key("gpu", point._asdict()) not in there]


# ---- the model


def planned(device, point):
    chosen = layer.Layer(None, point.cell, (), point.mode, None)
    return plan.choose(device, chosen, size_of(point), "float32")


def size_of(point):
    return Size(point.T, point.B, point.H, point.H, point.directions)


def modelled(device, point, chosen):
    """Seconds of a step's walk."""
    size, training = size_of(point), point.operation == "training"
    if chosen.way == "persistent":
        passes = [(chosen.forward, False), (chosen.backward, True)][: 1 + training]
        return sum(plan._seconds(layout, size, back) for layout, back in passes)
    if chosen.way == "simple":
        one = plan.simple_seconds(point.cell, size, device.multiprocessors)
    else:
        one = plan.steps_seconds(point.cell, size, device.has_library)
    return one * (1 + training)


def kernels(device, some):
    """The persistent kernels of the points, each once: they are compiled for their sizes."""
    found = {}
    for point in some:
        chosen = planned(device, point)
        if chosen.way != "persistent":
            continue
        shape = chosen.forward.shape
        if point.operation == "forward":
            found[persistent.forward_kernel(shape._replace(tape=0))] = None
        else:
            found[persistent.forward_kernel(shape)] = None
            found[persistent.backward_kernel(chosen.backward.shape)] = None
    return list(found)


def compile_all(some, capability, processes, deadline):
    """Compile into the cache on disk, on several cores. What is not done by then is compiled when it is needed."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        begun = [pool.submit(_compile, kernel, capability) for kernel in some]
        wait(begun, None if deadline == math.inf else max(0, deadline - time.monotonic()))
        pool.shutdown(cancel_futures=True)


def _compile(kernel, capability):
    compile_kernel(kernel, capability)


# ---- the two that are timed


class Theirs:
    """torch.nn's layer, by cuDNN."""

    def __init__(self, torch, point, module, x, d_output):
        number = getattr(torch, MODES[point.mode])
        self.module = copy.deepcopy(module).to(number)
        self.module.flatten_parameters()
        self.x, self.d_output = x.detach().to(number).requires_grad_(), d_output.to(number)
        self._torch = torch
        self.inputs = [self.x, *self.module.parameters()]

    def forward(self):
        with self._torch.no_grad():
            return self.module(self.x)[0]

    def training(self):
        output = self.module(self.x)[0]
        return output, self._torch.autograd.grad(output, self.inputs, self.d_output)[0]


class Ours:
    """fastrnn's, on the same parameters."""

    def __init__(self, torch, point, module, x, d_output):
        self.cell, self.backend = point.cell, f"cuda-{point.mode}"
        parts = ["", "_reverse"][: point.directions]
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        self.params = [{name: getattr(module, f"{name}_l0{part}").detach() for name in names} for part in parts]
        self.x, self.d_output = x, d_output

    def _forward(self, training):
        return functional.forward(self.cell, self.x, self.params[0], training=training, backend=self.backend)

    def forward(self):
        return self._forward(False)[0]

    def training(self):
        output, _, tape = self._forward(True)
        return output, functional.backward(tape, self.d_output)[0]


class OursBothWays(Ours):
    """Both directions: one launch of the kernels."""

    def __init__(self, torch, point, module, x, d_output):
        super().__init__(torch, point, module, x, d_output)
        self._device = get_device(x)
        params = tuple({name: self._in(array) for name, array in part.items()} for part in self.params)
        self._layer = layer.Layer(self._device, point.cell, params, point.mode, None)
        zeros = [torch.zeros(2, point.B, point.H, device=PLACE) for _ in range(1 + (point.cell == "lstm"))]
        self._state, self._torch = tuple(map(self._in, zeros)), torch
        self._x, self._d_output = self._in(self.x), self._in(self.d_output)

    def _in(self, array):
        return import_array(array)[0]

    def _out(self, buffer):
        return self._torch.as_tensor(buffer, device=PLACE)

    def _run(self, training):
        return layer.forward(self._layer, self._x, self._state, layer.Options(reverse=0b10), training=training)

    def forward(self):
        return self._out(self._run(False)[0])

    def training(self):
        output, _, tape = self._run(True)
        return self._out(output), self._out(layer.backward(tape, self._d_output, None)[0])


def contestants(torch, point):
    """Ours, theirs, and theirs in float64."""
    torch.manual_seed(0)
    options = {"device": PLACE, "bidirectional": point.directions > 1}
    module = getattr(torch.nn, CLASSES[point.cell])(point.H, point.H, **options)
    x = torch.randn(point.T, point.B, point.H, device=PLACE)
    d_output = torch.randn(point.T, point.B, point.directions * point.H, device=PLACE)
    ours = (OursBothWays if point.directions > 1 else Ours)(torch, point, module, x, d_output)
    return ours, Theirs(torch, point, module, x, d_output), module


def check(torch, point):
    """Compare both with float64 over the first steps; ValueError where one is further off than its numbers explain."""
    short = point._replace(T=min(point.T, CHECKED_STEPS))
    ours, theirs, module = contestants(torch, short)
    exact = Theirs(torch, short._replace(mode="float32"), module, ours.x, ours.d_output)
    exact.module, exact.d_output = exact.module.double(), exact.d_output.double()
    exact.module.flatten_parameters()
    exact.x = exact.x.detach().double().requires_grad_()
    exact.inputs = [exact.x, *exact.module.parameters()]
    expected = exact.training()
    for name, found in (("fastrnn", ours.training()), ("fastrnn", (ours.forward(),)), ("cudnn", theirs.training())):
        for what, one, right in zip(("output", "dx"), found, expected, strict=False):
            error = float((one.detach().double() - right.detach()).norm() / right.detach().norm())
            if not error < TOLERANCE[point.mode] * (4 if name == "cudnn" else 1):
                raise ValueError(f"{name}: {what} is off by {error:.1e} of its norm")


def use_tf32(torch, on):
    """Whether torch.nn may round float32 to TF32, in cuDNN and in products."""
    for where in (torch.backends.cuda.matmul, torch.backends.cudnn):
        if hasattr(where, "fp32_precision"):  # from PyTorch 2.9 on
            where = getattr(where, "rnn", where)
            where.fp32_precision = "tf32" if on else "ieee"
        else:
            where.allow_tf32 = on


# ---- time


def times(torch, call, seconds):
    """Median seconds of a call on the GPU, and those after which it has returned to the host."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    repeats = max(5, min(100, int(seconds / (time.perf_counter() - start))))
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    host = []
    for begin, end in events:
        start = time.perf_counter()
        begin.record()
        call()
        end.record()
        host.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) / 1e3 for begin, end in events), statistics.median(host)


def measure(torch, device, point, seconds):
    """The point's record."""
    use_tf32(torch, point.mode == "tf32")
    check(torch, point)
    ours, theirs, _ = contestants(torch, point)
    both = {"fastrnn": ours, "cudnn": theirs}
    found = {name: times(torch, getattr(one, point.operation), seconds) for name, one in both.items()}
    chosen = planned(device, point)
    return figures(point, found, chosen.way, modelled(device, point, chosen))


def figures(point, found, way, model):
    """The record of seconds on the GPU and on the host, by name."""
    steps = {name: results.rounded(1e6 * gpu / point.T) for name, (gpu, _) in found.items()}
    gpu = {name: seconds for name, (seconds, _) in found.items()}
    return {
        **point._asdict(),
        "microseconds": steps,
        "ratio": results.rounded(gpu["cudnn"] / gpu["fastrnn"]),
        "way": way,
        "modelled": results.rounded(1e6 * model),
        "share": results.rounded(model * point.T / gpu["fastrnn"]),
        "host_microseconds": {name: results.rounded(1e6 * host) for name, (_, host) in found.items()},
    }


def run(torch, device, given, some, deadline):
    """Measure the points and merge each into the results; the number of those that were measured, and that failed."""
    done = failed = 0
    for point in some:
        if time.monotonic() > deadline:
            print(f"the time is up after {done} of {len(some)} points; --missing goes on")
            break
        try:
            record = measure(torch, device, point, given.seconds)
        except Exception as error:  # whatever it is, the others are still worth their time
            record = {**point._asdict(), "error": f"{type(error).__name__}: {error}"[:300]}
            failed += 1
        results.merge(given.name, "gpu", [record])
        done += 1
        print(f"{point!s:<60}", record.get("error") or line(record), flush=True)
        torch.cuda.synchronize()  # an error of the GPU itself ends it all here
    return done, failed


def line(record):
    ours, theirs = record["microseconds"]["fastrnn"], record["microseconds"]["cudnn"]
    return f"{ours:8.3f} µs a step, cuDNN {theirs:8.3f}: {record['ratio']:.2f}×, {record['way']}, {record['share']:.0%}"


# ---- tables


def tables(records):
    """Markdown: the means of each kind of layer, and a row for each point."""
    done = [record for record in records if "ratio" in record]
    kinds = sorted({(r["cell"], r["mode"], r["operation"], r["directions"]) for r in done})
    means = []
    for kind in kinds:
        ratios = [r["ratio"] for r in done if (r["cell"], r["mode"], r["operation"], r["directions"]) == kind]
        mean, least = report.times(statistics.geometric_mean(ratios)), report.times(min(ratios))
        means.append([*map(str, kind), str(len(ratios)), mean, least])
    rows = [
        [
            *(str(record[field]) for field in KEYS["gpu"]),
            *(f"{record['microseconds'][name]:.4g}" for name in ("fastrnn", "cudnn")),
            report.times(record["ratio"]), record["way"], f"{record['share']:.0%}",
            f"{record['host_microseconds']['fastrnn']:.0f}",
        ]
        for record in done
    ]  # fmt: skip
    wrong = [record for record in records if "error" in record]
    wrong = [f"* {Point(*(record[field] for field in KEYS['gpu']))}: {record['error']}" for record in wrong]
    head = [*KEYS["gpu"], "fastrnn, µs a step", "cuDNN", "ratio", "way", "share of the model", "host, µs a call"]
    return "\n\n".join(
        filter(None, [
            report.table(["cell", "mode", "operation", "directions", "points", "mean ratio", "least"], means),
            report.table(head, rows), "\n".join(wrong),
        ])
    )  # fmt: skip


# ---- the script


def options(arguments=None):
    parser = results.parser(__doc__)
    parser.set_defaults(name=None)
    for name, choices in (("cells", CELLS), ("modes", MODES), ("operations", OPERATIONS)):
        parser.add_argument(f"--{name}", nargs="+", choices=choices, default=list(choices))
    for name, default in (("hidden", HIDDEN), ("batches", BATCHES), ("steps", STEPS), ("directions", DIRECTIONS)):
        parser.add_argument(f"--{name}", type=int, nargs="+", default=list(default), metavar="N")
    parser.add_argument("--seconds", type=float, default=0.2, help="of calls, for each figure")
    parser.add_argument("--limit-seconds", type=float, default=math.inf, help="begin no point after so many")
    parser.add_argument("--missing", action="store_true", help="only points that the results do not have")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="that compile kernels beforehand")
    parser.add_argument("--table", action="store_true", help="print the results' tables, and measure nothing")
    given = parser.parse_args(arguments)
    if given.quick:
        given.hidden, given.batches, given.steps, given.directions = [512], [16], [64], [1]
        given.seconds = 0.05
    return given


def need_gpu():
    """PyTorch and the GPU; SystemExit with status 2 and a line that says what is missing."""
    try:
        get_device()
        import torch

        if not torch.cuda.is_available():
            raise RuntimeError("this PyTorch has no CUDA, and cuDNN is timed through it")
        return torch, get_device(torch.empty(0, device=PLACE))
    except (ImportError, RuntimeError) as error:
        print(f"nothing is measured without an NVIDIA GPU: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def name_of(device_name):
    """'nvidia-h200': the name of a GPU's results."""
    return "-".join(re.findall(r"[a-z0-9]+", device_name.lower()))


def describe(torch, device):
    """What else decides about time."""
    return {
        "device": torch.cuda.get_device_name(),
        "capability": "{}.{}".format(*device.capability),
        "multiprocessors": device.multiprocessors,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def main():
    given = options()
    deadline = time.monotonic() + given.limit_seconds
    results.KEYS |= KEYS
    if given.table:
        if given.name is None:
            raise SystemExit("--table needs the --name of the results")
        print(tables(results.read(given.name).get("gpu", [])))
        return
    torch, device = need_gpu()
    given.name = given.name or name_of(torch.cuda.get_device_name())
    some = list(points(given))
    some = missing(given.name, some) if given.missing else some
    results.merge(given.name, "gpu device", [describe(torch, device)])
    if given.processes > 1:
        compile_all(kernels(device, some), device.capability, given.processes, deadline)
    done, failed = run(torch, device, given, some, deadline)
    print(f"{done} of {len(some)} points, {failed} failed; results:", results.FOLDER / f"{given.name}.json")


if __name__ == "__main__":
    main()
