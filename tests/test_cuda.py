"""The backend for GPUs as a whole, on a simulated one: what comes in, what goes out, and every way of the walk."""

import dataclasses
import re

import numpy as np
import pytest

pytest.importorskip("greenlet", reason="the simulated GPU needs greenlet")

from test_cuda_simple import numpy_product
from test_kernels import CELLS, check, task

import fastrnn
from fastrnn import backend as backends
from fastrnn import functional
from fastrnn.kernels.cuda import exchange, persistent, plan
from fastrnn.kernels.cuda.backend import Backend, backend
from fastrnn.testing import run
from simulated_device import SimulatedDevice

ONE_STAGE = ["rnn_tanh", "rnn_relu", "rnn_sigmoid", "lstm", "gru"]
NAMES = ["cuda", "cuda-simple", "cuda-steps", "cuda-persistent"]
# Rounding of a factor of a product; sums of some dozens of them, as here, are off by a few such errors.
EPSILON = {"tf32": 2**-11, "bfloat16": 2**-8, "float16": 2**-11}


def simulated_device(seed=None):
    """One with NumPy's product as its library's: that of the kernel, which takes long here, has tests of its own."""
    device = SimulatedDevice(seed)
    device.library_product = numpy_product
    return device


@pytest.fixture(autouse=True)
def simulated(monkeypatch):
    """The backend of every name that begins with "cuda", on one simulated GPU."""
    monkeypatch.setattr(plan, "WARPS", 2)  # fewer threads to simulate
    plan._choose.cache_clear()
    device = simulated_device()
    names = [*NAMES, *(f"cuda-{mode}-persistent" for mode in EPSILON)]
    for name in names:
        monkeypatch.setitem(backends._loaded, name, backend(name, device))
    yield device
    plan._choose.cache_clear()


def pairs():
    """Every way with every cell that goes it."""
    for name in NAMES[1:]:
        for cell in ONE_STAGE if name == "cuda-persistent" else CELLS:
            yield pytest.param(name, cell, id=f"{name}-{cell}")


WAYS = list(pairs())
each_way = pytest.mark.parametrize(("name", "cell"), WAYS)


@each_way
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
def test_plain(name, cell, bias):
    check(name, task(cell, 3, 2, 4, 5, bias=bias))


@each_way
@pytest.mark.parametrize("lengths", [False, True, [0, 3, 1, 4, 0]], ids=str)
@pytest.mark.parametrize("reset", [False, True], ids=["", "reset"])
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_options(name, cell, lengths, reset, reverse):
    check(name, task(cell, 4, 5, 3, 6, lengths=lengths, reset=reset, reverse=reverse))


@pytest.mark.sampled(len(WAYS))
@each_way
@pytest.mark.parametrize("number", range(4))
def test_anything(name, cell, number):
    random = np.random.default_rng([number, CELLS.index(cell)])
    T, B, I, H = random.integers(1, [5, 19, 20, 35]).tolist()
    options = {option: bool(random.integers(2)) for option in ("bias", "lengths", "reset", "reverse")}
    check(name, task(cell, T, B, I, H, seed=number, **options))


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("name", ["cuda", "cuda-simple", "cuda-steps"])
def test_float64(name, cell):
    check(name, task(cell, 3, 3, 4, 5, dtype="float64", lengths=True, reset=True))


@each_way
def test_gradients_that_are_not_given(name, cell):
    one = task(cell, 3, 2, 4, 5)
    for d_output in (one.d_output, None):
        check(
            name, dataclasses.replace(one, d_output=d_output, d_state=(one.d_state[0], *[None] * len(one.d_state[1:])))
        )
    check(name, dataclasses.replace(one, d_state=None))


@each_way
@pytest.mark.parametrize(("T", "B"), [(0, 3), (3, 0), (0, 0)])
def test_nothing_to_do(name, cell, T, B):
    check(name, task(cell, T, B, 4, 5))


@pytest.mark.parametrize("cell", CELLS)
def test_recompute_gives_the_same_bits(cell):
    one = task(cell, 4, 3, 2, 5)
    results = []
    for recompute in (False, True):
        *_, tape = functional.forward(
            one.cell, one.x, one.params, one.state, training=True, recompute=recompute, backend="cuda"
        )
        results.append(functional.backward(tape, one.d_output, one.d_state))
    np.testing.assert_array_equal(results[0][0], results[1][0])
    for name in results[0][1]:
        np.testing.assert_array_equal(results[0][1][name], results[1][1][name])


def test_backward_leaves_the_tape_as_it_was():
    one = task("gru", 3, 2, 4, 5)
    *_, tape = functional.forward(one.cell, one.x, one.params, one.state, training=True, backend="cuda")
    first, second = (functional.backward(tape, one.d_output, one.d_state) for _ in range(2))
    np.testing.assert_array_equal(first[0], second[0])


LAYERS = {
    "RNN": {"nonlinearity": "relu"},
    "LSTM": {"num_layers": 2, "bidirectional": True},
    "LSTM-projected": {"proj_size": 2, "bidirectional": True},
    "GRU": {"num_layers": 3, "dropout": 0.4, "batch_first": True, "bidirectional": True},
    "GRU-reset-before": {"reset_after": False, "bias": False},
}


def layers(name, backend, **options):
    return getattr(fastrnn, name.split("-")[0])(5, 6, seed=1, backend=backend, **{**LAYERS[name], **options})


def inputs(layer, *, batched=True, seed=0):
    """x, state, gradients of output and state."""
    random = np.random.default_rng(seed)
    T, B, D, K = 4, 3, 1 + layer.bidirectional, layer.num_layers * (1 + layer.bidirectional)
    P = getattr(layer, "proj_size", 0) or 6
    lead = ((B, T) if layer.batch_first else (T, B)) if batched else (T,)
    middle = (B,) if batched else ()
    x, d_output = (random.standard_normal((*lead, n)).astype(np.float32) for n in (5, D * P))
    sizes = (P, 6) if layer.cell == "lstm" else (P,)
    states = [tuple(random.standard_normal((K, *middle, n)).astype(np.float32) for n in sizes) for _ in range(2)]
    return x, *(state if len(state) == 2 else state[0] for state in states), d_output


def flat(*values):
    """All arrays in tuples and dicts."""
    for value in values:
        if isinstance(value, dict):
            yield from flat(*value.values())
        elif isinstance(value, tuple):
            yield from flat(*value)
        else:
            yield value


@pytest.mark.sampled(len(LAYERS))
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("batched", [True, False], ids=["", "unbatched"])
def test_layers(name, batched):
    """Stacks, both directions, dropout, batch_first, one sequence without a batch; nothing of a GPU is seen outside."""
    results = []
    for kind in ("cuda", "reference"):
        layer = layers(name, kind)
        x, state, d_state, d_output = inputs(layer, batched=batched)
        options = {"lengths": [4, 0, 2], "reset": x[..., 0] > 0.5} if batched else {"lengths": 3}
        called = layer(x, state, **options)
        output, last, tape = layer.forward(x, state, **options)
        made = layer.backward(tape, d_output, d_state)
        results.append([*flat(called, output, last, made.x, made.state, made.params), *flat(layer.forward(x)[:2])])
    for ours, expected in zip(*results, strict=True):
        assert isinstance(ours, np.ndarray)
        assert ours.shape == expected.shape
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(("T", "B"), [(0, 3), (4, 0)])
def test_layers_with_nothing_to_do(T, B):
    results = []
    for kind in ("cuda", "reference"):
        layer = layers("GRU", kind)
        x, state = np.zeros((B, T, 5), np.float32), np.ones((6, B, 6), np.float32)
        output, last, tape = layer.forward(x, state)
        made = layer.backward(tape, np.ones_like(output), np.ones_like(last))
        results.append([*flat(output, last, made.x, made.state, made.params)])
    for ours, expected in zip(*results, strict=True):
        np.testing.assert_array_equal(ours, expected)


def test_both_directions_are_one_launch(simulated):
    layer = fastrnn.GRU(5, 6, bidirectional=True, backend="cuda-persistent")
    x = np.zeros((3, 2, 5), np.float32)
    simulated.launched.clear()
    layer(x)
    assert [kernel.make.__name__ for kernel in simulated.launched].count("make_forward") == 1


def test_parameters_go_to_the_gpu_when_they_have_changed(simulated, monkeypatch):
    layer, x = fastrnn.GRU(5, 6, seed=0, backend="cuda"), np.ones((2, 1, 5), np.float32)
    before, _ = layer(x)
    uploads, upload = [], simulated.upload
    monkeypatch.setattr(simulated, "upload", lambda array: uploads.append(array.shape) or upload(array))
    np.testing.assert_array_equal(layer(x)[0], before)
    assert (18, 6) not in uploads
    layer.parameters["weight_hh_l0"][3, 2] += 1
    assert (layer(x)[0] != before).any()
    assert (18, 6) in uploads


def test_steps_are_those_of_a_sequence():
    layer, x = fastrnn.LSTM(5, 6, seed=0, backend="cuda"), np.random.default_rng(0).standard_normal((3, 5))
    x, state = x.astype(np.float32), None
    output, _ = layer(x)
    for x_t, expected in zip(x, output, strict=True):
        y, state = layer.step(x_t, state)
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)


# ---- the persistent walk


@pytest.mark.parametrize("cell", ONE_STAGE)
@pytest.mark.parametrize("mode", EPSILON)
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_modes(mode, cell, reverse):
    if cell == "rnn_relu" and mode == "bfloat16":
        pytest.skip("a sum on relu's kink falls to either side in bfloat16: gradients need not agree")
    one = task(cell, 4, 5, 6, 19, lengths=True, reset=True, reverse=reverse, seed=3)
    expected, results = run("reference", one.astype(np.float64)), run(f"cuda-{mode}-persistent", one)
    for name, array in expected.items():
        error = np.linalg.norm(results[name] - array) / np.linalg.norm(array)
        assert error < 4 * EPSILON[mode], (name, error)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", ["cuda-persistent", "cuda-bfloat16-persistent"])
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh"])
def test_any_order_of_threads_gives_the_same_bits(cell, name):
    """Also where a reader comes between the two halves of a word."""
    one = task(cell, 3, 9, 4, 17, lengths=True, reset=True)
    expected = run(name, one)
    for seed in range(3):
        results = run(backend(name, simulated_device(seed)), one)
        for what, array in expected.items():
            np.testing.assert_array_equal(results[what], array, err_msg=what)


def test_eight_warps(monkeypatch):
    monkeypatch.setattr(plan, "WARPS", 8)
    plan._choose.cache_clear()
    check("cuda-persistent", task("lstm", 3, 3, 4, 9, lengths=True))


@pytest.mark.parametrize("processors", [1, 2, 3, 5])
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh"])
def test_any_number_of_multiprocessors(cell, processors):
    """Few of them have several tiles of rows, or several units to a thread; many have groups of rows."""
    device = simulated_device()
    device.multiprocessors = processors
    one = task(cell, 2, 37, 3, 8, lengths=True)
    check(backend("cuda-persistent", device), one)


@pytest.mark.parametrize("mode", exchange.MODES)
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_the_pattern_of_what_is_missing_is_no_number(cell, mode):
    """NaN of every pattern goes in, and NaN comes out: nobody waits for it."""
    one = task(cell, 3, 2, 4, 5)
    one.state[0].view(np.uint32)[0] = 0xFFFFFFFF
    one.d_state[0].view(np.uint32)[0] = 0xFFFFFFFF
    results = run("cuda-persistent" if mode == "float32" else f"cuda-{mode}-persistent", one)
    assert np.isnan(results["output"][:, 0]).all()
    assert np.isfinite(results["output"][:, 1]).all()
    assert np.isnan(results["dx"][:, 0]).all()
    assert np.isfinite(results["dx"][:, 1]).all()


@pytest.mark.parametrize("mode", ["", "-tf32", "-bfloat16", "-float16"])
def test_infinity_stays_infinity(mode):
    one = task("rnn_relu", 3, 2, 4, 5)
    one.state[0][0, 1] = np.inf
    params = {**one.params, "weight_hh": np.abs(one.params["weight_hh"]) + np.float32(0.1)}
    output, (h,), _ = backend(f"cuda{mode}-persistent", simulated_device()).forward(
        "rnn_relu", one.x, params, one.state
    )
    assert np.isposinf(output[:, 0]).all()
    assert np.isposinf(h[0]).all()
    assert np.isfinite(output[:, 1]).all()


def test_a_lost_block_is_an_error_and_not_a_wait_for_ever(monkeypatch):
    monkeypatch.setattr(persistent, "LOOKS", 50)
    one = task("gru", 3, 2, 4, 20)
    device = simulated_device()
    launch = device.launch

    def lose_a_block(kernel, grid, arguments, **options):
        launch(kernel, (1, *grid[1:]) if options.get("cooperative") else grid, arguments, **options)

    monkeypatch.setattr(device, "launch", lose_a_block)
    lossy = backend("cuda-persistent", device)
    with pytest.raises(RuntimeError, match="waited in vain for another"):
        lossy.forward(one.cell, one.x, one.params, one.state)
    monkeypatch.setattr(device, "launch", launch)
    check(lossy, one)  # and the next call is as if nothing had been


# ---- arrays on a GPU


class OnGPU:
    """Stands for an array of a library on a GPU."""

    def __init__(self, buffer):
        self.buffer = buffer

    shape = property(lambda self: self.buffer.shape)
    __cuda_array_interface__ = property(lambda self: {"data": (self.buffer.pointer, False)})


class TakesOnGPU(Backend):
    """With such arrays."""

    def take(self, name, array, like=None):
        if not isinstance(array, OnGPU):
            return super().take(name, array, like)
        return array.buffer

    def give(self, buffers, like):
        assert isinstance(like, OnGPU)
        return [OnGPU(buffer) for buffer in buffers]


@pytest.fixture
def up(simulated, monkeypatch):
    """A function that takes arrays to the simulated GPU."""
    monkeypatch.setitem(backends._loaded, "cuda", TakesOnGPU(device=simulated))
    return lambda array: OnGPU(simulated.upload(array))


@pytest.mark.parametrize("state", [False, True], ids=["", "state"])
def test_arrays_on_a_gpu_come_back_as_such(up, simulated, state):
    one = task("lstm", 3, 2, 4, 5, lengths=True, reset=True)
    if not state:
        one = dataclasses.replace(one, state=tuple(np.zeros_like(part) for part in one.state))
    expected = run("reference", one.astype(np.float64))
    given = tuple(map(up, one.state)) if state else None
    params = {name: up(array) for name, array in one.params.items()}
    output, last, tape = functional.forward(
        "lstm", up(one.x), params, given, lengths=one.lengths, reset=one.reset, training=True
    )
    dx, dparams, dstate = functional.backward(tape, up(one.d_output), tuple(map(up, one.d_state)))
    results = {"output": output, "h": last[0], "c": last[1], "dx": dx, "dh": dstate[0], "dc": dstate[1]}
    results |= {f"d{name}": array for name, array in dparams.items()}
    assert results.keys() == expected.keys()
    for name, array in expected.items():
        assert isinstance(results[name], OnGPU)
        np.testing.assert_allclose(simulated.download(results[name].buffer), array, rtol=1e-5, atol=2e-5)


def test_arrays_in_different_places(up):
    one = task("gru", 3, 2, 4, 5)
    x, params = up(one.x), {name: up(array) for name, array in one.params.items()}

    def fails(error, message, *arguments, **options):
        with pytest.raises(error, match=re.escape(message)):
            functional.forward("gru", *arguments, **options)

    fails(ValueError, "backend is 'cpu' and x is on a GPU, expected 'cuda'", x, params, backend="cpu")
    fails(TypeError, "params['weight_ih'] is a ndarray that is not on a GPU, and x is", x, one.params)
    fails(TypeError, "state[0] is a ndarray that is not on a GPU, and x is", x, params, one.state)
    fails(TypeError, "output is given and x is on a GPU, expected None", x, params, output=np.empty(3))
    fails(TypeError, "params['weight_hh'] is an OnGPU, expected a NumPy array", one.x, params)
    wrong = {**params, "bias_hh": up(np.zeros(14, np.float32))}
    fails(ValueError, "params['bias_hh'] has shape (14,), expected", x, wrong)
    fails(TypeError, "params['weight_hh'] has dtype float32, expected float64", up(one.x.astype(np.float64)), params)


@pytest.mark.sampled(len(LAYERS))
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("batched", [True, False], ids=["", "unbatched"])
def test_layers_with_arrays_on_a_gpu(up, simulated, name, batched):
    def down(value):
        return simulated.download(value.buffer) if isinstance(value, OnGPU) else value

    def lift(value):
        return tuple(map(up, value)) if isinstance(value, tuple) else up(value)

    layer, plain = layers(name, "cuda"), layers(name, "cuda")
    x, state, d_state, d_output = inputs(layer, batched=batched)
    output, last, tape = layer.forward(up(x), lift(state))
    made = layer.backward(tape, up(d_output), lift(d_state))
    expected_output, expected_last, tape = plain.forward(x, state)
    expected = plain.backward(tape, d_output, d_state)
    assert all(isinstance(array, OnGPU) for array in flat(output, last, made.x, made.state))
    for ours, array in zip(
        flat(output, last, made.x, made.state, made.params),
        flat(expected_output, expected_last, expected.x, expected.state, expected.params),
        strict=True,
    ):
        np.testing.assert_array_equal(down(ours), array)
    np.testing.assert_array_equal(down(layer(up(x))[0]), plain(x)[0])


def test_a_layer_of_the_cpu_does_not_take_an_array_on_a_gpu(up):
    x = up(np.zeros((2, 1, 5), np.float32))
    with pytest.raises(
        TypeError, match=re.escape("x is a OnGPU on a GPU and backend is 'cpu', expected a NumPy array")
    ):
        fastrnn.GRU(5, 6)(x)
    with pytest.raises(TypeError, match=re.escape("state is a ndarray that is not on a GPU, and x is")):
        fastrnn.GRU(5, 6, backend="cuda")(x, np.zeros((1, 1, 6), np.float32))
