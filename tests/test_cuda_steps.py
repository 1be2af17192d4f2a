"""The step-wise GPU walk in the simulator, against the NumPy reference in float64: every cell with every option."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import test_cuda_simple as plain

from fastrnn.kernels.cells import CELLS
from fastrnn.kernels.cuda import simple, steps
from fastrnn.kernels.cuda.text import Kernel
from sass import report
from simulated_device import SimulatedDevice

each_cell = pytest.mark.parametrize("cell", CELLS)
each_dtype = pytest.mark.parametrize("dtype", ["float32", "float64"])
stages = [(name, number) for name, cell in CELLS.items() for number in range(len(cell.stages))]


class Device(SimulatedDevice):
    """Keeps the keys and the recordings of graphs. Its library notes which products are added to what is there."""

    def __init__(self, seed=None):
        super().__init__(seed)
        self.recordings, self.asked = [], []

    def graph(self, key, record):
        hash(key)
        self.recordings.append((key, record))
        record()

    def library_product(self, a, b, c, add, mode="float32"):
        self.asked.append(add)
        return plain.numpy_product(a, b, c, add)


@pytest.fixture(autouse=True)
def _walk(monkeypatch):
    """The plain walk's checks, with this one: it takes the weights as they are."""
    names = {"Size": simple.Size, "transposed": lambda device, cell, size, weights: weights}
    walk = SimpleNamespace(forward=steps.forward, backward=steps.backward, **names)
    monkeypatch.setattr(plain, "simple", walk)
    monkeypatch.setattr(plain, "SimulatedDevice", Device)


def layer(*arguments, seed=None, **options):
    return plain.Layer(Device(seed), plain.task(*arguments, **options))


@each_cell
@each_dtype
@pytest.mark.parametrize("lengths", [False, True, [0, 4, 1]], ids=str)
@pytest.mark.parametrize("reset", [False, True], ids=["", "reset"])
@pytest.mark.parametrize("directions", [(False,), (True,), (False, True)], ids=["forward", "reverse", "both"])
def test_options(cell, dtype, lengths, reset, directions):
    options = {"dtype": dtype, "lengths": lengths, "reset": reset, "bias": not reset}
    plain.check(plain.task(cell, 4, 3, 3, 5, directions=directions, seed=len(directions) + 2 * reset, **options))


@each_cell
@each_dtype
@pytest.mark.parametrize("size", [(1, 1, 1, 1), (2, 1, 2, 9), (5, 2, 17, 3), (3, 5, 1, 16)], ids=str)
def test_sizes(cell, dtype, size):
    plain.check(plain.task(cell, *size, directions=(True, False), dtype=dtype, lengths=True, reset=True), threads=5)


@pytest.mark.parametrize("P", [1, 2, 7, 9])
def test_projection_of_any_width(P):
    plain.check(plain.task("lstm_projected", 3, 2, 3, 7, P=P, directions=(False, True), reset=True, lengths=[2, 3]))


@each_cell
@pytest.mark.parametrize("given", range(8))
def test_gradients_that_are_not_given(cell, given):
    tasks = [
        dataclasses.replace(
            one,
            d_output=one.d_output if given & 1 else None,
            d_state=tuple(d if given & (2 << i) else None for i, d in enumerate(one.d_state)) if given & 6 else None,
        )
        for one in plain.task(cell, 3, 2, 2, 4, directions=(False, True), dtype="float64")
    ]
    plain.check(tasks)


@each_cell
@pytest.mark.parametrize("lengths", [None, [4, 1, 0]], ids=str)
def test_reset_of_every_row_and_of_the_first_step(cell, lengths):
    for at in ([0], [3], [0, 3], [1, 2], range(4)):
        reset = np.zeros((4, 3), bool)
        reset[at] = True
        options = {"directions": (False, True), "dtype": "float64", "reset": reset, "lengths": lengths}
        plain.check(plain.task(cell, 4, 3, 2, 3, **options))


@each_cell
def test_no_steps_leave_the_states_and_their_gradients(cell):
    one = layer(cell, 1, 2, 3, 5, directions=(False, True), reset=True, lengths=True)
    one.size = one.size._replace(T=0)
    device, W = one.device, one.size.W
    nothing, states = device.empty(0, "float32"), device.empty((2, 1, 2, W), "float32")
    final = [device.empty(state.shape, "float32") for state in one.initial]
    options = {name: one.options[name] for name in ("lengths", "reset", "reverse")}
    steps.forward(
        device, one.cell.name, one.size, nothing, one.weights, nothing, one.initial, final, nothing, 2 * W, 0, states,
        tape=nothing, **options,
    )  # fmt: skip
    gradients = [device.empty(state.shape, "float32") for state in one.initial]
    d, c0 = device.empty((2, 0, 2, 1), "float32"), one.initial[-1]
    steps.backward(
        device, one.cell.name, one.size, one.weights, None, one.initial, c0, states, nothing, d, gradients, **options
    )
    for after, gradient, before in zip(final, gradients, one.initial, strict=True):
        np.testing.assert_array_equal(device.download(after), device.download(before))
        np.testing.assert_array_equal(device.download(gradient), device.download(before))


@each_cell
def test_inference_gives_the_same_bits_and_leaves_other_columns_alone(cell):
    plain.test_inference_gives_the_same_bits_and_leaves_other_columns_alone(cell)


@each_cell
@each_dtype
def test_order_of_threads_and_size_of_blocks_do_not_matter(cell, dtype):
    plain.test_order_of_threads_and_size_of_blocks_do_not_matter(cell, dtype)


@each_cell
def test_nothing_beyond_the_lengths_is_missing(cell):
    plain.test_nothing_beyond_the_lengths_is_missing(cell)


@each_cell
@each_dtype
def test_tape_and_gates_are_those_of_the_simple_walk(cell, dtype, monkeypatch):
    """What one walk leaves, another's way back may read, and whoever makes the gradients of the parameters."""
    options = {"directions": (False, True), "dtype": dtype, "lengths": [3, 5, 0], "reset": True, "P": 3}
    one = layer(cell, 5, 3, 2, 4, **options)
    one.forward()
    one.backward()
    monkeypatch.setattr(plain, "simple", simple)
    other = layer(cell, 5, 3, 2, 4, **options)
    other.forward()
    other.backward()
    for name in ("states", "tape", "output", "d"):
        ours, theirs = one.device.download(getattr(one, name)), other.device.download(getattr(other, name))
        plain.assert_close(ours, theirs.astype(float), name, terms=200, scale=1.0)


# ---- graphs and libraries


@each_cell
def test_recordings_run_again(cell):
    """A recording refers to the buffers that it was made with, and to nothing that has changed since."""
    one = layer(cell, 3, 2, 2, 3, directions=(False, True), lengths=[3, 1], reset=True)
    one.forward()
    one.backward()
    kept = [one.output, one.states, one.tape, one.d, *one.final, *one.d_initial]
    results = [one.device.download(buffer) for buffer in kept]
    for buffer in kept:
        one.device.fill(buffer, 0xFF)
    (key, forward), (key_back, backward) = one.device.recordings
    assert key != key_back
    forward()
    backward()
    for buffer, result in zip(kept, results, strict=True):
        np.testing.assert_array_equal(one.device.download(buffer), result)


class Listening(Device):
    """Keeps the pointers of all that is used while a graph is recorded."""

    def graph(self, key, record):
        self.used = set()
        super().graph(key, record)
        assert len(self.used) > 5
        assert self.used <= {part for part in key if isinstance(part, int)}, key

    def launch(self, kernel, grid, arguments, **options):
        self.use(*(argument for argument in arguments if not isinstance(argument, int)))
        super().launch(kernel, grid, arguments, **options)

    def library_product(self, a, b, c, add, mode="float32"):
        self.use(a.buffer, b.buffer, c.buffer)
        return super().library_product(a, b, c, add)

    def copy(self, target, source):
        self.use(target, source)
        super().copy(target, source)

    def fill(self, target, byte):
        self.use(target)
        super().fill(target, byte)

    def use(self, *buffers):
        self.used |= {buffer.pointer for buffer in buffers if buffer is not None and buffer.size}

    used = frozenset()


@each_cell
@pytest.mark.parametrize("reset", [False, True])
def test_a_key_names_every_buffer(cell, reset):
    """A recording with other buffers has another key."""
    one = plain.Layer(Listening(), plain.task(cell, 3, 2, 2, 3, directions=(False, True), lengths=True, reset=reset))
    one.forward()
    one.backward()
    assert len(one.device.recordings) == 2


@each_cell
def test_products_are_asked_of_the_library(cell):
    one = layer(cell, 3, 2, 2, 3, directions=(False, True))
    one.forward()
    one.device.asked.clear()
    one.backward()
    count = len(CELLS[cell].stages)
    assert len(one.device.asked) == 3 * 2 * count
    assert one.device.asked[: 2 * count] == [False, False] * (count - 1) + [True, True]


@each_cell
def test_launches_of_a_step(cell):
    """A kernel for each stage and a product for each of its directions; no more with resets and lengths."""
    counts = {}
    for T in (2, 6):
        one = layer(cell, T, 2, 2, 3, directions=(False, True), lengths=True, reset=True)
        one.forward()
        counts[T] = len(one.device.launched), len(one.device.asked)
    stages_of_cell = len(CELLS[cell].stages)
    grown = [after - before for before, after in zip(counts[2], counts[6], strict=True)]
    assert grown == [4 * stages_of_cell, 8 * stages_of_cell]


@pytest.mark.sampled(3)
@each_cell
def test_without_a_library(cell):
    tasks = plain.task(cell, 2, 2, 2, 3, directions=(False, True), lengths=[2, 1], reset=True)
    plain.check(tasks, library=None)


# ---- machine code


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0)], ids=lambda which: "sm_{}{}".format(*which))
@pytest.mark.parametrize(("cell", "number"), stages)
@pytest.mark.parametrize("walk", ["forward", "backward"])
def test_machine_code(walk, cell, number, capability):
    """Numbers stay float32, and in registers."""
    one = layer(cell, 1, 1, 1, 1)
    one.forward()
    one.backward()
    make = getattr(steps, f"make_{walk}")
    (kernel,) = {kernel for kernel in one.device.launched if kernel.make is make and kernel.constants[1] == number}
    found = report(Kernel(make, kernel.constants, kernel.arguments, steps.THREADS), capability)
    assert found.spills == found.local_loads == found.doubles == 0, found
    assert found.registers <= 96, found


@pytest.mark.parametrize("make", [steps.make_copy, steps.make_first_reset])
def test_machine_code_of_small_kernels(make):
    one = layer("gru", 1, 1, 1, 1, reset=True)
    one.forward()
    one.backward()
    for kernel in {kernel for kernel in one.device.launched if kernel.make is make}:
        found = report(kernel._replace(threads=steps.THREADS))
        assert found.spills == found.local_loads == found.doubles == 0, found
