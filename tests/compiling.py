"""Kernels compiled ahead, on all cores, into the folder where every process of a test run looks for them."""

import concurrent.futures
import contextlib
import functools
import itertools
import multiprocessing
import random

CELLS = ["rnn_tanh", "rnn_relu", "rnn_sigmoid", "lstm", "lstm_projected", "gru", "gru_reset_before"]
DTYPES = ["float32", "float64"]
#: With masks of the recurrent product, one or one for each gate, every kernel is another.
ALL_MASKED = frozenset(itertools.product(CELLS, DTYPES, [False, True]))


@functools.cache
def chosen(seed):
    """Of these, every cell by some kind, every kind by some cells, one cell by all; and what layers call most."""
    chance, kinds = random.Random(seed), list(itertools.product(DTYPES, [False, True]))
    cells = chance.sample(CELLS, len(CELLS))
    found = {(cell, *kinds[i % 4]) for i, cell in enumerate(cells)} | {(cells[0], *kind) for kind in kinds}
    return frozenset(found | set(itertools.product(["lstm", "gru"], ["float32"], [False, True])))


def is_chosen(seed, dtype, cell=None, each=None, backend="cpu", **_):
    """Whether a test with such parameters calls chosen kernels alone: an LSTM's or a GRU's where `cell` is None."""
    called = {(cell, dtype, one) for one in ([False, True] if each is None else [each])}
    return backend != "cpu" or cell is None or called <= chosen(seed)


def ahead(masked, processes):
    """Compile every kernel without masks, and the `masked` ones; what cannot be compiled is left for a test to tell."""
    kernels = ["weight_gradient", "bias_gradient", "pack_stage", "pack_columns", "checksum"]
    jobs = [(name, dtype, cell, 0) for dtype in DTYPES for cell in CELLS for name in ("forward", "backward")]
    jobs += [(name, dtype, cell, 1 + each) for cell, dtype, each in sorted(masked) for name in ("forward", "backward")]
    jobs += [(name, dtype, None, 0) for dtype in DTYPES for name in kernels]
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(processes, context) as pool:
        list(pool.map(compile_one, jobs))


def compile_one(job):
    import numpy as np

    from fastrnn.kernels import compiled

    name, dtype, cell, masks = job
    with contextlib.suppress(Exception):
        compiled.function(name, np.dtype(dtype), cell, masks)
