"""Many threads at once, other processes, and fork: the same bits, whoever calls and from wherever."""

import concurrent.futures
import multiprocessing
import os
import subprocess
import sys
import warnings

import numpy as np
import pytest

from fastrnn import GRU, LSTM, RNN

T, B, I, H = 12, 6, 4, 8


def uniform(*shape, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


def train(layer):
    """Everything that one forward and backward gives, as bytes."""
    output, last, tape = layer.forward(uniform(T, B, I))
    gradients = layer.backward(tape, output, last)
    last = last if isinstance(last, tuple) else (last,)
    return b"".join(array.tobytes() for array in (output, *last, gradients.x, *gradients.params.values()))


def train_after(layer, results):
    results.put(train(layer))


# The fewest kernels among which some threads want the same ones, and others want others.
COLD_LAYERS = [RNN(I, H, 2, bidirectional=True, seed=0), RNN(I, H, nonlinearity="relu", seed=0)]
LAYERS = [RNN(I, H, seed=0), LSTM(I, H, 2, bidirectional=True, seed=0), GRU(I, H, 2, seed=0)]


@pytest.mark.parametrize("layer", LAYERS, ids=repr)
def test_threads_that_share_a_layer(layer):
    expected = train(layer)
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        assert set(pool.map(train, [layer] * 64)) == {expected}


COLD = """
import sys, threading, warnings
sys.path.insert(0, {folder!r})
warnings.simplefilter("error")
import test_processes as here

layers, results, errors = here.COLD_LAYERS, [], []
barrier = threading.Barrier(16)


def call(i):
    try:
        barrier.wait()
        results.append((i % 2, here.train(layers[i % 2])))
    except BaseException as error:
        errors.append(error)


threads = [threading.Thread(target=call, args=(i,)) for i in range(16)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
assert errors == [], errors
assert len(set(results)) == 2, "not the same bits"
for index, bits in set(results):
    assert here.train(layers[index]) == bits
print("done")
"""


def test_threads_that_call_at_once_from_cold(tmp_path):
    """A new process and an empty cache: the first sixteen calls are concurrent, and so is the compiling."""
    program = COLD.format(folder=os.path.dirname(__file__))
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, timeout=600)
    assert done.stdout == "done\n", done.stderr


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_pickling_into_workers(method):
    context = multiprocessing.get_context(method)
    results = context.SimpleQueue()
    expected = [train(layer) for layer in LAYERS[:2]]  # layers that have been used
    workers = [context.Process(target=train_after, args=(layer, results)) for layer in LAYERS[:2]]
    for worker in workers:
        worker.start()
    received = {results.get() for _ in workers}
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert received == set(expected)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_fork_after_use():
    layer = LAYERS[1]
    expected = train(layer)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(train, [layer] * 8))
        for _ in range(3):
            read, write = os.pipe()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # Python's, about any fork with threads
                child = os.fork()
            if child == 0:
                try:
                    os.write(write, b"same" if train(layer) == expected else b"other")
                finally:
                    os._exit(0)
            os.close(write)
            with open(read, "rb") as stream:
                assert stream.read() == b"same"
            os.waitpid(child, 0)
    assert train(layer) == expected
