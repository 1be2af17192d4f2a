"""The backend on an NVIDIA GPU: what no simulator can tell. Skipped, with the reason, where there is none."""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from test_kernels import CELLS, LARGE, check, sizes, task

from fastrnn import functional
from fastrnn.kernels.cuda.device import get_device
from fastrnn.testing import assert_close, problem, run

try:
    get_device()
    missing = None
except (ImportError, RuntimeError) as error:
    missing = str(error)

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(missing is not None, reason=f"no GPU: {missing}")]

ONE_STAGE = ["rnn_tanh", "rnn_relu", "rnn_sigmoid", "lstm", "gru"]
NAMES = ["cuda", "cuda-simple", "cuda-steps", "cuda-persistent"]
# Rounding of a factor of a product; sums are off by a few such errors.
EPSILON = {"tf32": 2**-11, "bfloat16": 2**-8, "float16": 2**-11}

pairs = [
    pytest.param(name, cell, id=f"{name}-{cell}")
    for name in NAMES
    for cell in (ONE_STAGE if name == "cuda-persistent" else CELLS)
]
each_way = pytest.mark.parametrize(("name", "cell"), pairs)
each_name = pytest.mark.parametrize("name", NAMES)
each_layer = pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh"])


# ---- the checks of all kernels


@each_way
def test_sizes(name, cell):
    """Those of the CPU's kernels; a persistent one is compiled for each H, and takes fewer of them."""
    for number in range(0, 42, 14 if name in ("cuda", "cuda-persistent") else 1):
        options = {"bias": number % 3 > 0, "reverse": number % 4 > 1, "lengths": number % 5 == 0}
        check(name, task(cell, *sizes(number), seed=number, **options))


@each_way
@pytest.mark.parametrize("lengths", [False, True, [0, 7, 3, 0, 5, 7], [0] * 6], ids=str)
@pytest.mark.parametrize("reset", [False, True], ids=["", "reset"])
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_options(name, cell, lengths, reset, reverse):
    check(name, task(cell, 7, 6, 5, 70, lengths=lengths, reset=reset, reverse=reverse))


@each_way
@pytest.mark.parametrize("size", LARGE, ids=lambda s: "T{}-B{}-I{}-H{}".format(*s))
def test_large(name, cell, size):
    check(name, task(cell, *size, lengths=True, reverse=size[1] % 2 == 0))


@each_way
@pytest.mark.parametrize("number", range(3))
def test_anything(name, cell, number):
    """Layers as large as many blocks; for relu smaller ones, since of many sums one always falls on the kink."""
    random = np.random.default_rng([number, CELLS.index(cell)])
    T, B, I, H = random.integers(1, [12, 70, 300, 200 if cell == "rnn_relu" else 1000]).tolist()
    options = {option: bool(random.integers(2)) for option in ("bias", "lengths", "reset", "reverse")}
    check(name, task(cell, T, B, I, H, seed=number, **options))


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("name", NAMES[:3])
def test_float64(name, cell):
    check(name, task(cell, 7, 6, 5, 70, dtype="float64", lengths=True, reset=True))


@each_way
@pytest.mark.parametrize(("T", "B"), [(0, 3), (3, 0), (0, 0)])
def test_nothing_to_do(name, cell, T, B):
    check(name, task(cell, T, B, 4, 5))


@each_layer
@pytest.mark.parametrize("mode", EPSILON)
@pytest.mark.parametrize("H", [150, 512])
def test_modes(mode, cell, H):
    one = task(cell, 6, 20, 30, H, lengths=True, reset=True, seed=3)
    expected, results = run("reference", one.astype(np.float64)), run(f"cuda-{mode}-persistent", one)
    for name, array in expected.items():
        error = np.linalg.norm(results[name] - array) / np.linalg.norm(array)
        assert error < 4 * EPSILON[mode], (name, error)


# ---- again and again, and at once


def same_bits(results, expected):
    for name, array in expected.items():
        assert np.asarray(results[name]).tobytes() == np.asarray(array).tobytes(), name


@each_layer
@each_name
def test_a_thousand_runs_give_the_same_bits(name, cell):
    one = task(cell, 20, 16, 32, 256)
    expected = run(name, one)
    for _ in range(999):
        same_bits(run(name, one), expected)


@each_name
def test_two_threads_at_once(name):
    ones = [task("lstm", 30, 16, 32, 256, seed=seed) for seed in range(2)]
    expected = [run(name, one) for one in ones]

    def again(i):
        for _ in range(50):
            same_bits(run(name, ones[i]), expected[i])

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(again, range(2)))


@each_name
def test_two_streams_at_once(torch, name):
    ones = [task("lstm", 200, 16, 32, 256, seed=seed) for seed in range(2)]
    layers = [on_gpu(up_torch(torch), one, name) for one in ones]
    expected = [layer() for layer in layers]
    streams = [torch.cuda.Stream() for _ in layers]
    torch.cuda.synchronize()
    for _ in range(20):
        results = []
        for stream, layer in zip(streams, layers, strict=True):
            with torch.cuda.stream(stream):
                results.append(layer())
        torch.cuda.synchronize()
        for result, right in zip(results, expected, strict=True):
            for key, tensor in right.items():
                assert torch.equal(result[key], tensor), key


LOST = """
import numpy as np
from fastrnn.kernels.cuda import exchange
exchange.LOOKS = 1 << 14
from fastrnn import functional
from fastrnn.kernels.cuda.device import get_device
from test_kernels import check, task
gpu, one = get_device(), task("gru", 5, 9, 4, 200)
launch = gpu.launch

def lose_a_block(kernel, grid, arguments, **options):
    launch(kernel, (grid[0] - 1, *grid[1:]) if options.get("cooperative") else grid, arguments, **options)

gpu.launch = lose_a_block
try:
    functional.forward(one.cell, one.x, one.params, one.state, backend="cuda-persistent")
except RuntimeError as error:
    print(error)
gpu.launch = launch
check("cuda-persistent", one)  # and the next call is as if nothing had been
"""


def program(text, folder, *before, timeout=120):
    """What a new process prints; its kernels are compiled into a folder of their own."""
    paths = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(folder), "PYTHONPATH": paths}
    command = [*before, sys.executable, "-c", text]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def test_a_lost_block_is_an_error_and_not_a_wait_for_ever(tmp_path):
    assert "waited in vain for another" in program(LOST, tmp_path)


SMALL = """
from test_kernels import check, task
for name in ("cuda-simple", "cuda-steps", "cuda-persistent"):
    for cell in ("lstm", "gru"):
        check(name, task(cell, 3, 9, 5, 20, lengths=True, reset=True))
"""


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_compute_sanitizer(tool, tmp_path):
    found = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if found is None:
        pytest.skip("compute-sanitizer, of the CUDA toolkit, is not on the PATH")
    program(SMALL, tmp_path, found, "--tool", tool, "--error-exitcode", "9", timeout=600)


# ---- arrays of other libraries


def on_gpu(up, one, name=None):
    """A function that runs forward and backward on arrays that are on the GPU, with results as `run` names them."""
    x, d_output = up(one.x), up(one.d_output)
    params = {key: up(array) for key, array in one.params.items()}
    state, d_state = (tuple(map(up, arrays)) for arrays in (one.state, one.d_state))

    def call():
        options = {"lengths": one.lengths, "reset": one.reset, "reverse": one.reverse}
        output, last, tape = functional.forward(
            one.cell, x, params, state, training=True, backend=name, **options
        )  # fmt: skip
        dx, dparams, dstate = functional.backward(tape, d_output, d_state)
        named = dict(zip(("h", "c"), last, strict=False)) | dict(zip(("dh", "dc"), dstate, strict=False))
        return {"output": output, "dx": dx, **named, **{f"d{key}": array for key, array in dparams.items()}}

    return call


def up_torch(torch):
    return lambda array: torch.tensor(array, device="cuda")


@pytest.fixture
def torch():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    if not torch.cuda.is_available():
        pytest.skip("this PyTorch has no CUDA")
    return torch


def library(name):
    """(array of NumPy -> array on the GPU, and back) of a library; the test is skipped where it is not installed."""
    if name == "torch":
        torch = pytest.importorskip("torch", reason="PyTorch is not installed")
        if not torch.cuda.is_available():
            pytest.skip("this PyTorch has no CUDA")
        return up_torch(torch), lambda tensor: tensor.cpu().numpy()
    if name == "cupy":
        cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
        return cupy.asarray, cupy.asnumpy
    if name == "jax":
        jax = pytest.importorskip("jax", reason="JAX is not installed")
        try:
            place = jax.devices("cuda")[0]
        except RuntimeError:
            pytest.skip("this JAX has no CUDA")
        return lambda array: jax.device_put(array, place), np.asarray
    from numba import cuda

    return cuda.to_device, lambda array: array.copy_to_host()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("of", ["torch", "cupy", "jax", "numba"])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_arrays_of_libraries(of, cell, name):
    up, down = library(of)
    one = problem(cell, 9, 10, 12, 70, lengths=True, reset=True, reverse=True)
    expected, results = run("reference", one.astype(np.float64)), on_gpu(up, one, name)()
    assert results.keys() == expected.keys()
    kind = type(up(one.x))
    for key, array in expected.items():
        assert isinstance(results[key], kind)
        assert_close(down(results[key]), array, key, terms=10 * (10 + 12 + 4 * 70), scale=1.0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_as_in_torch(torch, kind, name):
    """The layer of PyTorch with its own parameters, in float64 there."""
    torch.manual_seed(0)
    T, B, I, H = 40, 16, 64, 256
    theirs = getattr(torch.nn, kind)(I, H, device="cuda")
    params = {key.removesuffix("_l0"): value.detach() for key, value in theirs.named_parameters()}
    x, d_output = torch.randn(T, B, I, device="cuda"), torch.randn(T, B, H, device="cuda")
    cell = {"RNN": "rnn_tanh"}.get(kind, kind.lower())
    output, _, tape = functional.forward(cell, x, params, training=True, backend=name)
    dx, dparams, _ = functional.backward(tape, d_output)
    exact = getattr(torch.nn, kind)(I, H, device="cuda", dtype=torch.float64)
    exact.load_state_dict(theirs.state_dict())
    given = x.double().requires_grad_()
    exact(given)[0].backward(d_output.double())
    gradients = {key.removesuffix("_l0"): value.grad for key, value in exact.named_parameters()}
    for key, ours, right in [
        ("output", output, exact(given)[0]),
        ("dx", dx, given.grad),
        *((f"d{key}", dparams[key], gradients[key]) for key in params),
    ]:
        right = right.detach().cpu().numpy()
        scale = max(1.0, float(np.sqrt(np.mean(right**2))))
        assert_close(ours.cpu().numpy(), right, key, terms=T * (B + I + 4 * H), scale=scale)


@pytest.mark.parametrize("name", NAMES)
def test_on_the_current_stream_and_nothing_waits(torch, name):
    one = problem("lstm", 20, 8, 16, 128)
    layer, other = (on_gpu(up_torch(torch), each, name) for each in (one, problem("lstm", 20, 8, 16, 128, seed=1)))
    stream = torch.cuda.Stream()
    for _ in range(3):  # compiles, finds libraries, records
        expected = layer()
        with torch.cuda.stream(stream):
            layer()
            other()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(1_000_000_000)  # cycles: half a second
            results = layer()
            assert not stream.query(), "somebody has waited"
            assert torch.cuda.default_stream().query(), "something went to another stream"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    for key, tensor in expected.items():
        assert torch.equal(results[key], tensor), key


@pytest.mark.parametrize("name", NAMES)
def test_a_call_in_a_cuda_graph(torch, name):
    """Captured once, it computes anew from what its arrays hold at each replay."""
    up = up_torch(torch)
    one, other = (problem("gru", 10, 8, 16, 128, seed=seed) for seed in range(2))
    x, params = up(one.x), {key: up(array) for key, array in one.params.items()}

    def call():
        return functional.forward("gru", x, params, backend=name)[0]

    for _ in range(3):
        expected = call().clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = call()
    for given in (other.x, one.x):
        x.copy_(up(given))
        graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(output, expected)
