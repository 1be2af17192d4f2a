"""What a GPU allows a persistent kernel: the constants of :mod:`fastrnn.kernels.cuda.plan`, measured.

    python benchmarks/gpu_limits.py

* answer: from a store in one block until another block has seen it, alone and while others look at the same words.
* exchange: a step of all blocks in which each publishes some words and waits for all of the others', as a walk does
  besides its products. With four words of each it is a barrier of the whole grid.
* launch: of an empty kernel, alone, cooperatively and in a graph; and a whole call of one step.
* cudnn: torch.nn's layers by their kinds of numbers.
* clocks: of the GPU when it rests and at work.
"""

from __future__ import annotations

import math
import shutil
import statistics
import subprocess
import time

import gpu
import numpy as np

import results
from fastrnn.kernels.cuda.text import Kernel

KEYS = {"gpu limits": ("limit", "of")}
MISSING = 0xFFFFFFFF
LOOKS = 1 << 20  # at a missing word: then something is wrong
WORDS = 4  # of a load
CLOCKS = ("clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "temperature.gpu", "power.draw", "power.limit")


# ---- kernels


def waiter(ops):
    """A function (words, at, status): look at four words until they are there."""
    load_words, pause = ops.load_words, ops.pause

    def wait(words, at, status):
        looks, missing = 0, True
        while missing:
            a, b, c, d = load_words(words, at)
            missing = (a == MISSING) | (b == MISSING) | (c == MISSING) | (d == MISSING)
            if missing:
                looks += 1
                if looks == LOOKS:
                    status[0] = 1
                    missing = False
                pause()

    return ops.device(wait)


def make_answers(ops):
    """Blocks 0 and 1 answer each other, by one thread each; all threads of further blocks look at block 0's words."""
    cuda, word, store_word, wait = ops.cuda, ops.uint32, ops.store_word, waiter(ops)

    def kernel(words, status, rounds):
        block, thread = cuda.blockIdx.x, cuda.threadIdx.x
        if block > 1 or thread == 0:
            for r in range(rounds):
                if block == 0:
                    for k in range(WORDS):
                        store_word(words, 2 * WORDS * r + k, word(r))
                wait(words, 2 * WORDS * r + (WORDS if block == 0 else 0), status)
                if block == 1:
                    for k in range(WORDS):
                        store_word(words, 2 * WORDS * r + WORDS + k, word(r))

    return kernel


def make_exchange(ops, each, threads):
    """In each step every block publishes `each` words, and waits until it has those of all blocks."""
    cuda, word, store_word, wait = ops.cuda, ops.uint32, ops.store_word, waiter(ops)

    def kernel(words, status, steps):
        block, thread = cuda.blockIdx.x, cuda.threadIdx.x
        row = cuda.gridDim.x * each
        for s in range(steps):
            for k in range(thread, each, threads):
                store_word(words, s * row + block * each + k, word(s))
            for k in range(WORDS * thread, row, WORDS * threads):
                wait(words, s * row + k, status)
            cuda.syncthreads()

    return kernel


def make_nothing(ops):
    def kernel(n):
        pass

    return kernel


WALK = ("uint32*", "int32*", "int32")


def answers_kernel(threads):
    return Kernel(make_answers, (), WALK, threads)


def exchange_kernel(each, threads):
    return Kernel(make_exchange, (each, threads), WALK, threads)


NOTHING = Kernel(make_nothing, (), ("int32",), 32)


# ---- time


def gpu_seconds(device, prepare, call, repeats=7):
    """Median seconds of call() on the GPU, by its clock, after prepare()."""
    begin, end = (device.call("cuEventCreate", 0) for _ in range(2))
    found = []
    for i in range(repeats + 2):
        prepare()
        device.call("cuEventRecord", begin, device.stream())
        call()
        device.call("cuEventRecord", end, device.stream())
        device.call("cuEventSynchronize", end)
        if i >= 2:  # the others warm up
            found.append(device.call("cuEventElapsedTime", begin, end) / 1e3)
    for event in (begin, end):
        device.call("cuEventDestroy", event)
    return statistics.median(found)


def step_seconds(device, kernel, blocks, words_of_step, steps, seconds=gpu_seconds):
    """Of a step of a kernel, from runs of two lengths: what a launch takes is in neither. RuntimeError if it waits."""
    words, status = device.empty((steps, words_of_step), "uint32"), device.upload(np.zeros(1, np.int32))

    def of(count):
        def launch():
            device.launch(kernel, (blocks, 1, 1), [words, status, count], cooperative=True)

        return seconds(device, lambda: device.fill(words, 0xFF), launch)

    found = (of(steps) - of(steps // 2)) / (steps - steps // 2)
    if device.download(status)[0]:
        raise RuntimeError(f"{kernel.make.__name__} waited in vain for a word")
    return found


# ---- what is measured: each a generator of (of, figures)


def answers(device, steps):
    """Microseconds one way."""
    for watchers in (0, 16, 64, device.multiprocessors - 2):
        for threads in (32, 256) if watchers else (32,):
            found = step_seconds(device, answers_kernel(threads), 2 + watchers, 2 * WORDS, steps)
            yield f"{watchers} watching blocks of {threads} threads", {"microseconds": 1e6 * found / 2}


def exchanges(device, steps):
    every = device.multiprocessors
    for blocks in sorted({8, 32, 64, every}):
        for each in (4, 8, 16, 64):
            found = step_seconds(device, exchange_kernel(each, 256), blocks, blocks * each, steps)
            yield f"{blocks} blocks of {each} words", {"microseconds": 1e6 * found, "words": blocks * each}


def launches(device, count):
    """Microseconds on the host until a launch has returned, and between launches on the GPU."""

    def many(**options):
        for _ in range(count):
            device.launch(NOTHING, (1, 1, 1), [0], **options)

    def in_graph():
        device.graph(("benchmark of launches", count), many)

    for name, call, options in (
        ("alone", many, {}),
        ("cooperative", many, {"cooperative": True}),
        ("graph", in_graph, {}),
    ):
        for _ in range(3):
            call(**options)
        device.wait()
        start = time.perf_counter()
        call(**options)
        host = (time.perf_counter() - start) / count
        on_gpu = gpu_seconds(device, device.wait, lambda call=call, options=options: call(**options)) / count
        yield f"empty kernel, {name}", {"host_microseconds": 1e6 * host, "microseconds": 1e6 * on_gpu}


def calls(torch, count):
    """Host microseconds of a call of one step, whose kernels take next to nothing."""
    for cell, training in (("lstm", False), ("lstm", True)):
        point = gpu.Point(cell, "float32", 1, 1, 64, 1, "training" if training else "forward")
        ours, theirs, _ = gpu.contestants(torch, point)
        found = {}
        for name, one in (("fastrnn", ours), ("cudnn", theirs)):
            on_gpu, host = gpu.times(torch, getattr(one, point.operation), count * 1e-4)
            found |= {f"{name}_host_microseconds": 1e6 * host, f"{name}_microseconds": 1e6 * on_gpu}
        yield f"{cell} {point.operation} of one step", found


def cudnn(torch, seconds, batches=(1, 8, 16, 64), T=256, H=512):
    """Microseconds a step of torch.nn, with the products of its input."""
    for cell in ("lstm", "gru"):
        for mode in gpu.MODES:
            gpu.use_tf32(torch, mode == "tf32")
            for B in batches:
                found = {}
                for operation in gpu.OPERATIONS:
                    point = gpu.Point(cell, mode, T, B, H, 1, operation)
                    _, theirs, _ = gpu.contestants(torch, point)
                    found[operation] = 1e6 * gpu.times(torch, getattr(theirs, operation), seconds)[0] / T
                yield f"{cell} {mode} T={T} B={B} H={H}", found


def read_clocks():
    """What nvidia-smi says, by name; nothing where it is not there."""
    if shutil.which("nvidia-smi") is None:
        return {}
    command = ["nvidia-smi", f"--query-gpu={','.join(CLOCKS)}", "--format=csv,noheader,nounits"]
    said = subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines()
    return parsed_clocks(said[0]) if said else {}


def parsed_clocks(line):
    found = {}
    for name, text in zip(CLOCKS, line.split(","), strict=True):
        try:
            found[name] = float(text)
        except ValueError:  # "[N/A]"
            continue
    return found


def clocks(device, seconds):
    """At rest, and when a walk has gone on for so long."""
    time.sleep(seconds)
    yield "at rest", read_clocks()
    blocks, steps = device.multiprocessors, 20_000
    words, status = device.empty((steps, blocks * WORDS), "uint32"), device.upload(np.zeros(1, np.int32))
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for _ in range(10):
            device.fill(words, 0xFF)
            device.launch(exchange_kernel(WORDS, 256), (blocks, 1, 1), [words, status, steps], cooperative=True)
        found = read_clocks()  # while they run
        device.wait()
    yield "exchanging", found


# ---- the script


def records(limit, found):
    """Records of what a generator gives, as it gives it."""
    for of, figures in found:
        shown = {name: results.rounded(value) for name, value in figures.items()}
        print(f"{limit}: {of}:", ", ".join(f"{name} {value:g}" for name, value in shown.items()), flush=True)
        yield {"limit": limit, "of": of, **shown}


def parser():
    made = results.parser(__doc__)
    made.set_defaults(name=None)
    made.add_argument("--limit-seconds", type=float, default=math.inf, help="begin nothing after so many")
    return made


def main():
    given = parser().parse_args()
    deadline = time.monotonic() + given.limit_seconds
    results.KEYS |= gpu.KEYS | KEYS
    torch, device = gpu.need_gpu()
    name = given.name or gpu.name_of(torch.cuda.get_device_name())
    few = 10 if given.quick else 1
    results.merge(name, "gpu device", [gpu.describe(torch, device)])
    every = {
        "answer": answers(device, 2000 // few),
        "exchange": exchanges(device, 2000 // few),
        "launch": launches(device, 1000 // few),
        "call": calls(torch, 1000 // few),
        "clocks": clocks(device, 2 / few),
        "cudnn": cudnn(torch, 0.2 / few),
    }
    for limit, found in every.items():
        for record in records(limit, found):
            results.merge(name, "gpu limits", [record])
            if time.monotonic() > deadline:
                print("the time is up")
                return
    print("results:", results.FOLDER / f"{name}.json")


if __name__ == "__main__":
    main()
