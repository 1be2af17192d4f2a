"""The simulator of a GPU: what it runs comes out right, and what is wrong with a kernel is found."""

import numpy as np
import pytest

import simulator
from fastrnn.kernels.cuda.text import Kernel
from simulator import Fault, launch


def run(text, *arrays, grid=(1, 1, 1), threads=8, **options):
    """`text` is a function (ops, cuda, *arrays)."""
    types = tuple(f"{array.dtype.name}*" for array in arrays)
    kernel = Kernel(lambda ops: lambda *pointers: text(ops, ops.cuda, *pointers), (), types, threads)
    launch(kernel, grid, list(arrays), **options)
    return arrays[0]


def reverse_block(ops, cuda, x):
    shared = cuda.shared.array(cuda.blockDim.x, np.float32)
    i, n = cuda.threadIdx.x, cuda.blockDim.x
    shared[i] = x[cuda.blockIdx.x * n + i]
    cuda.syncthreads()
    x[cuda.blockIdx.x * n + i] = shared[n - 1 - i]


@pytest.mark.parametrize("seed", [None, 0, 1, 2])
@pytest.mark.parametrize("threads", [1, 8, 40])
def test_blocks_share_memory_of_their_own(seed, threads):
    x = np.arange(3 * threads, dtype=np.float32)
    expected = x.reshape(3, threads)[:, ::-1].ravel().copy()
    np.testing.assert_array_equal(run(reverse_block, x, grid=(3, 1, 1), threads=threads, seed=seed), expected)


def test_every_thread_of_a_grid_runs_once():
    def text(ops, cuda, x):
        block, size = cuda.blockIdx, cuda.gridDim
        x[((block.z * size.y + block.y) * size.x + block.x) * cuda.blockDim.x + cuda.threadIdx.x] += 1

    assert (run(text, np.zeros(2 * 3 * 4 * 5), grid=(2, 3, 4), threads=5) == 1).all()


def test_seeds_change_the_order_and_the_same_seed_gives_the_same():
    def text(ops, cuda, order, count):
        place = int(count[0])
        count[0] = place + 1
        order[place] = cuda.threadIdx.x

    orders = [tuple(run(text, np.zeros(16), np.zeros(1), threads=16, seed=seed)) for seed in (None, 1, 1, 2)]
    assert orders[0] == tuple(range(16))
    assert orders[1] == orders[2]
    assert len(set(orders)) == 3


def test_an_index_beyond_an_array():
    for index in (8, -1):
        with pytest.raises(Fault, match=f"element {index} of an array of 8"):
            run(lambda ops, cuda, x, index=index: x[index], np.zeros(8))
    with pytest.raises(Fault, match="element 8 of 8 in shared memory"):
        run(lambda ops, cuda, x: cuda.shared.array(8, np.float32)[8], np.zeros(1))


def test_an_array_of_another_type_than_the_kernel_says():
    kernel = Kernel(lambda ops: lambda x: None, (), ("float32*",), 1)
    with pytest.raises(AssertionError):
        launch(kernel, (1, 1, 1), [np.zeros(1)])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", ["read after write", "write after read", "two writes"])
def test_a_race_in_shared_memory(kind, seed):
    def text(ops, cuda, x):
        shared, i = cuda.shared.array(8, np.float32), cuda.threadIdx.x
        shared[i] = i
        if kind == "write after read":
            cuda.syncthreads()
            x[i] = shared[(i + 1) % 8]
            shared[i] = 0
        elif kind == "two writes":
            shared[0] = i
        else:
            x[i] = shared[(i + 1) % 8]

    with pytest.raises(Fault, match="a race"):
        run(text, np.zeros(8), seed=seed)


def test_a_warp_that_has_met_does_not_race_but_two_warps_do():
    def text(ops, cuda, x):
        i = cuda.threadIdx.x
        shared = cuda.shared.array(64, np.float32)
        shared[i] = i
        cuda.in_warp()
        x[i] = shared[i ^ 1 if same else i ^ 32]

    same = True
    np.testing.assert_array_equal(run(text, np.zeros(64), threads=64), np.arange(64) ^ 1)
    same = False
    with pytest.raises(Fault, match="a race"):
        run(text, np.zeros(64), threads=64)


def test_what_a_warp_exchanges():
    def text(ops, cuda, x):
        i = cuda.threadIdx.x
        x[i] = cuda.in_warp(i, lambda values: values[::-1])

    expected = np.concatenate([np.arange(32)[::-1], np.arange(32, 40)[::-1]])
    np.testing.assert_array_equal(run(text, np.zeros(40), threads=40, seed=3), expected)


def test_a_barrier_that_not_all_threads_reach():
    def text(ops, cuda, x):
        if cuda.threadIdx.x > 0:
            cuda.syncthreads()

    with pytest.raises(Fault, match="wait for ever"):
        run(text, np.zeros(1))


def test_threads_that_meet_at_different_barriers():
    def text(ops, cuda, x):
        if cuda.threadIdx.x > 3:
            cuda.syncthreads()
        else:
            cuda.syncthreads()

    with pytest.raises(Fault, match="different barriers"):
        run(text, np.zeros(1))


def wait_for(flag, i, cuda):
    while flag[i] == 0:
        cuda.wait("memory")


def test_blocks_run_at_the_same_time():
    def text(ops, cuda, x):
        block = cuda.blockIdx.x
        if block < 2:
            wait_for(x, block + 1, cuda)
        x[block] = x[2] + 1 if block < 2 else 5

    for seed in (None, 0, 1):
        np.testing.assert_array_equal(run(text, np.zeros(3), grid=(3, 1, 1), threads=1, seed=seed), [6, 6, 5])


def test_memory_that_nobody_writes(monkeypatch):
    monkeypatch.setattr(simulator, "PATIENCE", 20)
    with pytest.raises(Fault, match="wait for ever"):
        run(lambda ops, cuda, x: wait_for(x, 0, cuda), np.zeros(1), grid=(2, 1, 1))


def test_memory_begins_as_what_is_noticed():
    def text(ops, cuda, x, n):
        x[0], n[0] = cuda.shared.array(4, np.float32)[0], cuda.shared.array(4, np.uint32)[0]

    n = np.zeros(1, np.uint32)
    assert np.isnan(run(text, np.zeros(1), n, threads=1))
    assert n == 0xABABABAB
