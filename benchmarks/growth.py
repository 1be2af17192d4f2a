"""How the time of a call grows with steps, rows, hidden units and layers, and shrinks with threads.

    python benchmarks/growth.py

Each size is doubled four times, on one thread. The slope is that of a line through the logarithms: 1 is in proportion,
and hidden units, whose products grow with their square, tend to 2.
"""

from __future__ import annotations

import statistics

import numpy as np

import fastrnn
import results
from fastrnn.bench import CLASSES, call_times

#: What is doubled, and (T, B, H, layers) to begin with; the input is as wide as the state.
STARTS = {"T": (25, 8, 128, 1), "B": (50, 4, 128, 1), "H": (50, 16, 32, 1), "layers": (50, 8, 64, 1)}
SHAPES = ((100, 1, 256, 256), (100, 32, 128, 128), (50, 64, 512, 512))
OPERATIONS = ("forward", "training")


def call(cell, T, B, H, layers, operation):
    """The call that is timed."""
    layer = getattr(fastrnn, CLASSES[cell])(H, H, num_layers=layers, seed=0)
    x = np.random.default_rng(0).standard_normal((T, B, H), np.float32)
    if operation == "forward":
        return lambda: layer(x)
    return lambda: layer.backward(layer.forward(x)[2], x)


def slope(sizes, times):
    """Of the line through the logarithms: 1 where time is in proportion to size."""
    return float(np.polyfit(np.log2(sizes), np.log2(times), 1)[0])


def growth(cell, name, operation, doublings, seconds):
    """The times of one size, doubled again and again, in rounds over all of them."""
    at = tuple(STARTS).index(name)
    sizes = [STARTS[name][at] * 2**i for i in range(doublings + 1)]
    calls = [call(cell, *(size if i == at else s for i, s in enumerate(STARTS[name])), operation) for size in sizes]
    fastrnn.set_num_threads(1)
    calls[0]()  # compiles
    rounds = [[statistics.median(call_times(each, seconds)) for each in calls] for _ in range(3)]
    times = [statistics.median(column) for column in zip(*rounds, strict=True)]
    steepness = slope(sizes, times)
    print(f"{cell} {operation}, {name} {sizes[0]} to {sizes[-1]}: slope {steepness:.2f}", flush=True)
    milliseconds = [results.rounded(1e3 * time) for time in times]
    figures = {"sizes": sizes, "milliseconds": milliseconds, "slope": results.rounded(steepness)}
    return {"cell": cell, "operation": operation, "size": name, **figures}


def speed_up(cell, shape, operation, threads, seconds):
    """How many times as fast as one thread so many are, in rounds of both."""
    T, B, _, H = shape
    function, ratios = call(cell, T, B, H, 1, operation), []
    for _ in range(5):
        times = []
        for n in (1, threads):
            fastrnn.set_num_threads(n)
            times.append(statistics.median(call_times(function, seconds)))
        ratios.append(times[0] / times[1])
    value = results.rounded(statistics.median(ratios))
    print(f"{cell} {operation} {T},{B},{H},{H}: {threads} threads {value:.2f} times as fast as one", flush=True)
    return {"cell": cell, "shape": shape, "operation": operation, "threads": threads, "speed_up": value}


def main():
    options = results.parser(__doc__).parse_args()
    threads = fastrnn.get_num_threads()
    cells, doublings, seconds = (("lstm",), 2, 0.02) if options.quick else (("lstm", "gru"), 4, 0.2)
    for cell in cells:
        grown = [growth(cell, name, operation, doublings, seconds) for name in STARTS for operation in OPERATIONS]
        path = results.merge(options.name, "growth", grown)
        if threads > 1:
            shapes = SHAPES[:1] if options.quick else SHAPES
            faster = [speed_up(cell, shape, each, threads, seconds) for shape in shapes for each in OPERATIONS]
            path = results.merge(options.name, "threads", faster)
    print("wrote", path)


if __name__ == "__main__":
    main()
