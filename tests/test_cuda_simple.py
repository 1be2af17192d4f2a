"""The plain GPU kernels in the simulator, against the NumPy reference in float64: every cell with every option."""

import dataclasses
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fastrnn.kernels import reference
from fastrnn.kernels.cells import CELLS
from fastrnn.kernels.cuda import products, simple
from fastrnn.testing import assert_close, problem
from simulated_device import SimulatedDevice

each_cell = pytest.mark.parametrize("cell", CELLS)
each_dtype = pytest.mark.parametrize("dtype", ["float32", "float64"])


def task(cell, T, B, I, H, *, directions=(False,), P=None, seed=0, **options):
    """Problems with the same input, one for each direction: whether it is in reverse."""
    if cell == "lstm_projected":
        cell, options["P"] = "lstm", P or (H + 1) // 2
    tasks = [problem(cell, T, B, I, H, seed=seed + 7 * d, reverse=r, **options) for d, r in enumerate(directions)]
    one = tasks[0]
    return [dataclasses.replace(task, x=one.x, lengths=one.lengths, reset=one.reset) for task in tasks]


def matrix(buffer, rows, columns, start=0, row=None):
    return products.Matrix(buffer, start, rows, columns, row or columns)


def numpy_product(a, b, c, add, mode="float32"):
    """What a library does, with arrays."""

    def array(m):
        flat = m.buffer.flat
        strides = m.row * flat.itemsize, m.column * flat.itemsize
        return np.lib.stride_tricks.as_strided(flat[m.start :], (m.rows, m.columns), strides)

    result = array(a) @ array(b)
    array(c)[:] = array(c) + result if add else result
    return True


class Layer:
    """Problems as a device gets them, and what comes back."""

    def __init__(self, device, tasks, threads=8, row=0, column=0):
        self.device, self.tasks, self.threads, self.column = device, tasks, threads, column
        one = tasks[0]
        self.dtype = one.x.dtype
        self.cell = CELLS["lstm_projected" if "weight_hr" in one.params else one.cell]
        T, B, self.inputs = one.x.shape
        W = one.params["weight_hh"].shape[1]
        self.size = simple.Size(T, B, len(one.params["weight_hh"]) // self.cell.gates, W, len(tasks))
        self.row = row or self.size.D * W
        self.reverse = sum(task.reverse << d for d, task in enumerate(tasks))
        self.options = {
            "lengths": None if one.lengths is None else device.upload(one.lengths.astype(np.int32)),
            "reset": None if one.reset is None else device.upload(one.reset.astype(np.uint8)),
            "reverse": self.reverse,
            "threads": threads,
        }
        self.weights = tuple(
            self.stack([task.params[name] for task in tasks])
            for name in ("weight_hh", "weight_hr")
            if name in one.params
        )
        self.initial = tuple(map(self.stack, zip(*(task.state for task in tasks), strict=True)))

    def stack(self, arrays):
        return self.device.upload(np.stack(arrays))

    def bias(self, params):
        """[S, H]: what is added to each slot of each stage."""
        H, rows = self.size.H, []
        for stage in self.cell.stages:
            rows += [np.zeros(H, self.dtype) for _ in range(stage.gates)]
            if "bias_ih" in params and stage.x_blocks:
                slots = rows[len(rows) - stage.gates :]
                for slot, block in zip(slots, stage.x_blocks, strict=False):
                    slot += params["bias_ih"][block * H : (block + 1) * H]
                for slot, block in zip(slots[stage.gates - len(stage.h_blocks) :], stage.h_blocks, strict=True):
                    slot += params["bias_hh"][block * H : (block + 1) * H]
        return np.stack(rows)

    def forward(self, training=True):
        T, B, H, W, D = self.size
        device, G = self.device, self.cell.gates * H
        x = matrix(device.upload(self.tasks[0].x), T * B, self.inputs)
        sums = device.empty((D, T, B, G), self.dtype)
        for d, task in enumerate(self.tasks):
            w = matrix(device.upload(task.params["weight_ih"]), G, self.inputs)
            products.multiply(device, x, w.T, matrix(sums, T * B, G, start=d * T * B * G))
        self.output = device.empty((T, B, self.row), self.dtype)
        self.states = device.empty((D, T + 1, B, W), self.dtype)
        self.tape = device.empty((D, T, B, self.cell.tape, H), self.dtype) if training else None
        self.final = tuple(device.empty(state.shape, self.dtype) for state in self.initial)
        simple.forward(
            device, self.cell.name, self.size, sums, simple.transposed(device, self.cell.name, self.size, self.weights),
            self.stack([self.bias(task.params) for task in self.tasks]), self.initial, self.final, self.output,
            self.row, self.column, self.states, tape=self.tape, **self.options,
        )  # fmt: skip

    def backward(self):
        T, B, H, W, D = self.size
        device = self.device
        self.d_row = self.cell.slots * H + (W if len(self.weights) > 1 else 0)
        self.d = device.empty((D, T, B, self.d_row), self.dtype)
        self.d_initial = tuple(device.empty(state.shape, self.dtype) for state in self.initial)
        d_output = [task.d_output for task in self.tasks]
        d_final = [task.d_state or (None,) * len(self.initial) for task in self.tasks]
        simple.backward(
            device, self.cell.name, self.size, self.weights,
            None if d_output[0] is None else device.upload(np.concatenate(d_output, axis=2)),
            [None if ds[0] is None else self.stack(ds) for ds in zip(*d_final, strict=True)],
            self.initial[1] if len(self.initial) > 1 else None, self.states, self.tape, self.d, self.d_initial,
            **self.options,
        )  # fmt: skip

    def slots(self):
        """(block of weight_ih, its slot in d), (block of weight_hh, its slot, the place in tape of what it met)."""
        over_x, over_h, begin = [], [], 0
        for stage in self.cell.stages:
            if stage.x_blocks:
                over_x += [(block, begin + i) for i, block in enumerate(stage.x_blocks)]
                shift = begin + stage.gates - len(stage.h_blocks)
                over_h += [(block, shift + i, 2 if stage.operand else None) for i, block in enumerate(stage.h_blocks)]
            begin += stage.gates
        return over_x, over_h

    def gradients(self, d):
        """Of direction d: as fastrnn.testing.run returns them, by products on the device."""
        T, B, H, W, _ = self.size
        device, N, params = self.device, T * B, self.tasks[d].params
        x, w_ih = device.upload(self.tasks[d].x), device.upload(params["weight_ih"])
        befores = products.before(device, self.size, self.states, self.options["reset"], self.reverse)
        out = {
            name: device.empty(shape, self.dtype)
            for name, shape in [
                ("x", (T, B, self.inputs)), *((name, array.shape) for name, array in params.items()),
            ]
        }  # fmt: skip

        def slot(number, width=H):
            return matrix(self.d, N, width, start=d * N * self.d_row + number * H, row=self.d_row)

        def tape(place):
            row = self.cell.tape * H
            return matrix(self.tape, N, H, start=d * N * row + place * H, row=row)

        over_x, over_h = self.slots()
        for i, (block, number) in enumerate(over_x):
            w = matrix(w_ih, H, self.inputs, start=block * H * self.inputs)
            products.multiply(device, slot(number), w, matrix(out["x"], N, self.inputs), add=i > 0)
            dw = matrix(out["weight_ih"], H, self.inputs, start=block * H * self.inputs)
            products.multiply(device, slot(number).T, matrix(x, N, self.inputs), dw)
            if "bias_ih" in out:
                products.column_sums(device, slot(number), out["bias_ih"], block * H)
        for block, number, place in over_h:
            operand = befores[d] if place is None else tape(place)
            products.multiply(device, slot(number).T, operand, matrix(out["weight_hh"], H, W, start=block * H * W))
            if "bias_hh" in out:
                products.column_sums(device, slot(number), out["bias_hh"], block * H)
        if "weight_hr" in out:
            products.multiply(device, slot(self.cell.slots, W).T, tape(5), matrix(out["weight_hr"], W, H))
        return {f"d{name}": device.download(buffer) for name, buffer in out.items()}

    def results(self):
        """Of each direction."""
        download, W = self.device.download, self.size.W
        every = []
        for d in range(self.size.D):
            columns = slice(self.column + d * W, self.column + (d + 1) * W)
            every.append(
                {
                    "output": download(self.output)[:, :, columns],
                    **{name: download(state)[d] for name, state in zip("hc", self.final, strict=False)},
                    **self.gradients(d),
                    **{f"d{name}": download(state)[d] for name, state in zip("hc", self.d_initial, strict=False)},
                }
            )
        return every


def run(tasks, seed=None, library=numpy_product, **options):
    device = SimulatedDevice(seed)
    device.library_product = library
    layer = Layer(device, tasks, **options)
    layer.forward()
    layer.backward()
    return layer.results()


def check(tasks, **options):
    """Compare every result of every direction with the reference's."""
    for task, results in zip(tasks, run(tasks, **options), strict=True):
        compare(task, results)


def compare(task, results):
    exact = task.astype(np.float64)
    T, B, I = task.x.shape
    options = {name: getattr(exact, name) for name in ("lengths", "reset", "reverse")}
    output, state, tape = reference.forward(exact.cell, exact.x, exact.params, exact.state, training=True, **options)
    dx, dparams, dstate = reference.backward(tape, exact.d_output, exact.d_state)
    expected = {"output": output, "dx": dx, **{f"d{name}": array for name, array in dparams.items()}}
    expected |= dict(zip("hc", state, strict=False)) | dict(zip(("dh", "dc"), dstate, strict=False))
    assert results.keys() == expected.keys()
    terms = (T + 1) * (B + I + len(task.params["weight_ih"]))
    for name, array in expected.items():
        assert results[name].dtype == task.x.dtype
        assert_close(results[name], array, name, terms=terms, scale=max(1.0, math.sqrt(np.mean(array**2))))


@each_cell
@each_dtype
@pytest.mark.parametrize("lengths", [False, True, [0, 4, 1]], ids=str)
@pytest.mark.parametrize("reset", [False, True], ids=["", "reset"])
@pytest.mark.parametrize("directions", [(False,), (True,), (False, True)], ids=["forward", "reverse", "both"])
def test_options(cell, dtype, lengths, reset, directions):
    seed = len(directions) + 2 * reset
    tasks = task(
        cell, 4, 3, 3, 5, directions=directions, dtype=dtype, lengths=lengths, reset=reset, bias=not reset, seed=seed
    )
    check(tasks)


@pytest.mark.sampled(14)
@each_cell
@each_dtype
@pytest.mark.parametrize("size", [(1, 1, 1, 1), (2, 1, 2, 9), (5, 2, 17, 3), (3, 5, 1, 16)], ids=str)
def test_sizes(cell, dtype, size):
    check(task(cell, *size, directions=(True, False), dtype=dtype, lengths=True, reset=True), threads=5)


@pytest.mark.sampled(3)
@each_cell
def test_with_the_products_here(cell):
    check(task(cell, 3, 2, 3, 5, directions=(False, True), lengths=[3, 2], reset=True), library=None)


@pytest.mark.parametrize("P", [1, 2, 7, 9])
def test_projection_of_any_width(P):
    check(task("lstm_projected", 3, 2, 3, 7, P=P, directions=(False, True), reset=True, lengths=[2, 3]))


@each_cell
@pytest.mark.parametrize("given", range(8))
def test_gradients_that_are_not_given(cell, given):
    tasks = [
        dataclasses.replace(
            one,
            d_output=one.d_output if given & 1 else None,
            d_state=tuple(d if given & (2 << i) else None for i, d in enumerate(one.d_state)) if given & 6 else None,
        )
        for one in task(cell, 3, 2, 2, 4, directions=(False, True), dtype="float64")
    ]
    check(tasks)


@each_cell
def test_reset_of_every_row_and_of_the_first_step(cell):
    for steps in ([0], [3], [0, 3], [1, 2], range(4)):
        reset = np.zeros((4, 2), bool)
        reset[steps] = True
        check(task(cell, 4, 2, 2, 3, directions=(False, True), dtype="float64", reset=reset))


@each_cell
def test_inference_gives_the_same_bits_and_leaves_other_columns_alone(cell):
    tasks = task(cell, 4, 3, 2, 5, directions=(False, True), lengths=True, reset=True)
    layers = []
    for training in (True, False):
        row = 3 + 2 * tasks[0].params["weight_hh"].shape[1]
        layers.append(Layer(SimulatedDevice(), tasks, row=row, column=2))
        layers[-1].forward(training=training)
    trained, inferred = ([layer.device.download(b) for b in (layer.output, *layer.final)] for layer in layers)
    assert np.isnan(trained[0][:, :, [0, 1, -1]]).all()
    for a, b in zip(trained, inferred, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.sampled(7)
@each_cell
@each_dtype
def test_order_of_threads_and_size_of_blocks_do_not_matter(cell, dtype):
    tasks = task(cell, 3, 2, 3, 5, directions=(False, True), dtype=dtype, lengths=[3, 2], reset=True)
    expected = run(tasks)
    for seed, threads in ((0, 8), (1, 3), (2, 1)):
        for a, b in zip(expected, run(tasks, seed=seed, threads=threads), strict=True):
            for name, array in a.items():
                np.testing.assert_array_equal(array, b[name], err_msg=name)


@each_cell
def test_nothing_beyond_the_lengths_is_missing(cell):
    """What other kernels read of padding: c as it was carried, and zeros; no poison."""
    layer = Layer(SimulatedDevice(), task(cell, 5, 3, 2, 3, directions=(False, True), lengths=[5, 0, 2]))
    layer.forward()
    layer.backward()
    for buffer in (layer.output, layer.states, layer.tape, layer.d):
        assert np.isfinite(layer.device.download(buffer)).all()
    assert not layer.device.download(layer.d)[:, :, 1].any()
    assert not layer.device.download(layer.output)[:, 1].any()
    if layer.cell.states > 1:
        tape, c0 = layer.device.download(layer.tape), layer.device.download(layer.initial[1])
        np.testing.assert_array_equal(tape[:, :, 1, 4], np.stack([c0[:, 1]] * 5, axis=1))
        np.testing.assert_array_equal(tape[0, 2:, 2, 4], np.stack([tape[0, 1, 2, 4]] * 3))


# ---- products


@each_dtype
@pytest.mark.parametrize("size", [(1, 1, 1), (3, 5, 7), (65, 66, 17), (70, 3, 33), (2, 130, 16)], ids=str)
@pytest.mark.parametrize("transposed", range(4))
@pytest.mark.parametrize("add", [False, True])
def test_products(dtype, size, transposed, add):
    M, N, K = size
    random, device = np.random.default_rng(0), SimulatedDevice(seed=1)

    def make(rows, columns, turned):
        shape = (columns, rows) if turned else (rows, columns)
        whole = random.standard_normal((shape[0], shape[1] + 3)).astype(dtype)
        buffer = device.upload(np.concatenate([np.full(2, np.nan, dtype), whole.ravel()]))
        part, array = matrix(buffer, *shape, start=2, row=shape[1] + 3), whole[:, : shape[1]].astype(float)
        return (part.T, array.T) if turned else (part, array)

    a, a_array = make(M, K, transposed & 1)
    b, b_array = make(K, N, transposed & 2)
    c, c_array = make(M, N, False)
    around = device.download(c.buffer)
    products.multiply(device, a, b, c, add=add)
    whole = device.download(c.buffer)
    result = whole[2:].reshape(M, N + 3)
    assert_close(result[:, :N], a_array @ b_array + (c_array if add else 0), terms=K, scale=math.sqrt(K))
    np.testing.assert_array_equal(result[:, N:], around[2:].reshape(M, N + 3)[:, N:])


def test_empty_products():
    device = SimulatedDevice()
    nothing, c = device.empty(0, "float32"), device.empty((2, 3), "float32")
    products.multiply(device, matrix(nothing, 2, 0, row=1), matrix(nothing, 0, 3), matrix(c, 2, 3))
    assert not device.download(c).any()
    launched = len(device.launched)
    products.multiply(device, matrix(nothing, 0, 3), matrix(c, 3, 2), matrix(nothing, 0, 2))
    assert len(device.launched) == launched


def test_a_library_is_asked_first():
    device, asked = SimulatedDevice(), []
    device.library_product = lambda a, b, c, add, mode: asked.append((a, b, c, add)) or len(asked) == 1
    one = matrix(device.upload(np.ones((2, 2), np.float32)), 2, 2)
    c = matrix(device.empty((2, 2), "float32"), 2, 2)
    products.multiply(device, one, one.T, c)
    assert asked == [(one, one.T, c, False)]
    assert not device.launched
    products.multiply(device, one, one, c)
    assert len(device.launched) == 1
    np.testing.assert_array_equal(device.download(c.buffer), 2)


@each_dtype
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (7, 33), (600, 3), (1025, 2), (0, 2)])
def test_column_sums(dtype, rows, columns):
    random, device = np.random.default_rng(0), SimulatedDevice(seed=0)
    array = random.standard_normal((rows, columns + 1)).astype(dtype)
    a = matrix(device.upload(array), rows, columns, row=columns + 1)
    target = device.upload(np.ones(columns + 2, dtype))
    products.column_sums(device, a, target, 1)
    products.column_sums(device, a, target, 1, add=True)
    expected = np.concatenate([[1], 2 * array[:, :columns].astype(float).sum(axis=0), [1]])
    assert_close(device.download(target), expected, terms=max(rows, 1), scale=max(1, math.sqrt(rows)))


@each_dtype
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 33, 31), (3, 2, 65)])
def test_transpose(dtype, shape):
    device, array = SimulatedDevice(seed=0), np.arange(math.prod(shape)).reshape(shape).astype(dtype)
    turned = device.download(products.transpose(device, device.upload(array), *shape))
    np.testing.assert_array_equal(turned, array.transpose(0, 2, 1))


# ---- elsewhere


@pytest.mark.parametrize("target", ["numba-cuda", "built-in"])
def test_in_the_simulator_of_numba(target):
    if target == "numba-cuda":
        pytest.importorskip("numba_cuda", reason="numba-cuda is not installed")
    program = Path(__file__).with_name("numba_simulator.py")
    folders = [str(program.parent), *filter(None, sys.path)]
    environment = {**os.environ, "NUMBA_ENABLE_CUDASIM": "1", "PYTHONPATH": os.pathsep.join(folders)}
    result = subprocess.run(
        [sys.executable, str(program), target], env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    *cells, implementation = result.stdout.split()
    assert "lstm_projected" in cells
    assert (implementation == "Built-in") == (target == "built-in")


def kernels(cell, dtype):
    """Those that a layer launches."""

    class Listening(SimulatedDevice):
        def launch(self, kernel, grid, arguments, **options):
            self.launched.append(kernel)

    device = Listening()
    tasks = task(cell, 1, 1, 1, 1, dtype=dtype, reset=True)
    layer = Layer(device, tasks, threads=simple.THREADS)
    layer.forward()
    layer.backward()
    layer.gradients(0)
    return dict.fromkeys(device.launched)


def architectures():
    """Every cell as float32, some as float64; one of them for other architectures, too: a few seconds each."""
    yield from ((cell, "float32", (9, 0)) for cell in CELLS)
    yield from (("lstm", dtype, capability) for dtype in ("float32", "float64") for capability in ((8, 0), (10, 0)))


@pytest.mark.parametrize(
    ("cell", "dtype", "capability"),
    [pytest.param(*one, id="{}-{}-sm_{}{}".format(*one[:2], *one[2])) for one in architectures()],
)
def test_machine_code(cell, dtype, capability):
    from sass import report

    made = kernels(cell, dtype)
    assert {kernel.make for kernel in made} >= {simple.make_forward, simple.make_backward, products.make_product}
    for kernel in made:
        code = report(kernel, capability)
        assert code.spills == code.local_loads == 0, kernel
        assert code.registers * kernel.threads <= 2**16
        assert dtype == "float64" or code.doubles == 0, kernel
