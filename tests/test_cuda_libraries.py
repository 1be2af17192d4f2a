"""Products by libraries, without a GPU: a stand-in for cuBLAS on the host's memory, and PyTorch on the CPU."""

import ctypes
import itertools
import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import test_cuda_simple as plain

from fastrnn.kernels.cells import CELLS
from fastrnn.kernels.cuda import libraries, simple, steps
from fastrnn.kernels.cuda.products import Matrix, multiply
from fastrnn.testing import assert_close
from simulated_device import SimulatedDevice

STREAM = 0x1234

# As in NVIDIA's documentation and cublas_api.h.
PROTOTYPES = {
    "cublasCreate_v2": "cublasHandle_t *handle",
    "cublasSetStream_v2": "cublasHandle_t handle, cudaStream_t streamId",
    "cublasGemmEx_64": """cublasHandle_t handle, cublasOperation_t transa, cublasOperation_t transb,
        int64_t m, int64_t n, int64_t k, const void *alpha, const void *A, cudaDataType Atype, int64_t lda,
        const void *B, cudaDataType Btype, int64_t ldb, const void *beta, void *C, cudaDataType Ctype, int64_t ldc,
        cublasComputeType_t computeType, cublasGemmAlgo_t algo""",
}
KINDS = {"cublasHandle_t": ctypes.c_void_p, "cudaStream_t": ctypes.c_void_p, "int64_t": ctypes.c_int64}
DTYPES = {0: np.dtype("float32"), 1: np.dtype("float64")}
COMPUTES = {0: (68, 77, 75, 74), 1: (70,)}


def arguments_of(prototype):
    """The types in C of a function's arguments, and their names; what has no type of its own here is an enum."""
    words = [argument.replace("*", " * ").split() for argument in prototype.split(",")]
    types = [ctypes.c_void_p if "*" in each else KINDS.get(each[-2], ctypes.c_int) for each in words]
    return types, [each[-1] for each in words]


class FakeCublas:
    """cuBLAS' functions, called by C's rules, on the host's memory."""

    def __init__(self, status=0):
        self.status, self.streams, self.products = status, [], []
        for name, prototype in PROTOTYPES.items():
            types, _ = arguments_of(prototype)
            setattr(self, name, ctypes.CFUNCTYPE(ctypes.c_int, *types)(getattr(self, f"_{name}")))

    def _cublasCreate_v2(self, handle):
        ctypes.c_void_p.from_address(handle).value = 77
        return self.status

    def _cublasSetStream_v2(self, handle, stream):
        self.streams.append(stream)
        return 0 if handle == 77 else 1

    def _cublasGemmEx_64(self, *arguments):
        given = SimpleNamespace(**dict(zip(arguments_of(PROTOTYPES["cublasGemmEx_64"])[1], arguments, strict=True)))
        self.products.append(given)
        dtype = DTYPES[given.Ctype]
        if not (given.Atype == given.Btype == given.Ctype and given.computeType in COMPUTES[given.Ctype]):
            return 15
        a = _columns(given.A, given.m, given.k, given.lda, given.transa, dtype)
        b = _columns(given.B, given.k, given.n, given.ldb, given.transb, dtype)
        c = _columns(given.C, given.m, given.n, given.ldc, 0, dtype)
        if a is None or b is None or c is None or given.handle != 77 or given.algo != -1:
            return 7
        alpha, beta = (_array(pointer, 1, dtype)[0] for pointer in (given.alpha, given.beta))
        c[...] = alpha * (a @ b) + (beta * c if beta else 0)
        return 0


def _array(pointer, count, dtype):
    return np.frombuffer((ctypes.c_char * (count * dtype.itemsize)).from_address(pointer), dtype)


def _columns(pointer, rows, columns, leading, transposed, dtype):
    """op(A), rows by columns, of an A that stands column behind column; None where cuBLAS would refuse."""
    high, wide = (columns, rows) if transposed else (rows, columns)
    if leading < max(1, high) or transposed not in (0, 1):
        return None
    flat = _array(pointer, leading * (wide - 1) + high, dtype)
    stored = np.lib.stride_tricks.as_strided(flat, (high, wide), (dtype.itemsize, leading * dtype.itemsize))
    return stored.T if transposed else stored


@pytest.fixture
def fake():
    return FakeCublas()


def cublas(fake):
    return (libraries.Cublas(libraries.declared(fake)),)


def cpu_torch(current=STREAM):
    """PyTorch, on the CPU instead of a GPU. Notes the streams that it is put on."""
    torch = pytest.importorskip("torch")
    used = []

    @contextmanager
    def stream(which):
        used.append(which)
        yield

    cuda = SimpleNamespace(
        current_stream=lambda ordinal: SimpleNamespace(cuda_stream=current),
        ExternalStream=lambda number, device: (number, device.index),
        stream=stream,
    )
    return SimpleNamespace(
        as_tensor=lambda buffer, device: torch.from_numpy(buffer.flat),
        device=torch.device, mm=torch.mm, backends=torch.backends, cuda=cuda, used=used,
    )  # fmt: skip


def matrices(size, transposed, dtype, seed=0):
    """A, B and C on a device, as parts of larger buffers, and as arrays; `transposed` has a bit for A and for B."""
    (M, N, K), random, device = size, np.random.default_rng(seed), SimulatedDevice()

    def make(rows, columns, turned):
        shape = (columns, rows) if turned else (rows, columns)
        whole = random.standard_normal((shape[0], shape[1] + 3)).astype(dtype)
        buffer = device.upload(np.concatenate([np.full(2, np.nan, dtype), whole.ravel()]))
        part, array = Matrix(buffer, 2, *shape, shape[1] + 3), whole[:, : shape[1]].astype(float)
        return (part.T, array.T) if turned else (part, array)

    return zip(make(M, K, transposed & 1), make(K, N, transposed & 2), make(M, N, False), strict=True)


@pytest.mark.parametrize("kind", ["cublas", "torch"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("transposed", range(4))
def test_products(kind, dtype, add, transposed, fake):
    library = cublas(fake) if kind == "cublas" else (libraries.Torch(cpu_torch(), 0),)
    for size in itertools.product((1, 3, 8), repeat=3):
        (a, b, c), (a_array, b_array, c_array) = matrices(size, transposed, dtype)
        around = c.buffer.flat.copy()
        assert libraries.product(library, STREAM, a, b, c, add) is True
        M, N, K = size
        result, expected = c.buffer.flat[2:].reshape(M, N + 3), a_array @ b_array + (c_array if add else 0)
        assert_close(result[:, :N], expected, terms=K, scale=math.sqrt(K))
        np.testing.assert_array_equal(result[:, N:], around[2:].reshape(M, N + 3)[:, N:])


def test_what_c_holds_is_not_read(fake):
    for library in (cublas(fake), (libraries.Torch(cpu_torch(), 0),)):
        (a, b, c), (a_array, b_array, _) = matrices((3, 4, 5), 0, "float64")
        c.buffer.flat[2:].reshape(3, 7)[:, :4] = np.nan
        libraries.product(library, STREAM, a, b, c, False)
        assert_close(c.buffer.flat[2:].reshape(3, 7)[:, :4], a_array @ b_array)


def test_arguments_have_the_types_of_c():
    for name, prototype in PROTOTYPES.items():
        assert libraries.SIGNATURES[name] == arguments_of(prototype)[0], name


@pytest.mark.parametrize(
    ("dtype", "mode", "compute"),
    [
        ("float32", "float32", 68), ("float32", "tf32", 77), ("float32", "bfloat16", 75), ("float32", "float16", 74),
        ("float64", "float32", 70), ("float64", "tf32", 70),
    ],
)  # fmt: skip
def test_modes_of_cublas(dtype, mode, compute, fake):
    (a, b, c), _ = matrices((2, 3, 4), 0, dtype)
    assert libraries.product(cublas(fake), STREAM, a, b, c, False, mode)
    (given,) = fake.products
    assert given.computeType == compute
    assert fake.streams == [STREAM]


def test_pytorch_is_passed_over_where_its_settings_are_for_another_precision(fake):
    torch = cpu_torch()
    for named in ({"fp32_precision": "none"}, {"allow_tf32": False}, {"fp32_precision": "ieee", "allow_tf32": True}):
        torch.backends = _backends(**named)
        assert not libraries.uses_tf32(torch)
        assert _made_by_torch(torch, fake) == {"float32": True, "tf32": False, "bfloat16": False, "float64": True}
    for named in ({"fp32_precision": "tf32"}, {"allow_tf32": True}):
        torch.backends = _backends(**named)
        assert libraries.uses_tf32(torch)
        assert _made_by_torch(torch, fake) == {"float32": False, "tf32": True, "bfloat16": False, "float64": True}


def _backends(**settings):
    return SimpleNamespace(cuda=SimpleNamespace(matmul=SimpleNamespace(**settings)))


def _made_by_torch(torch, fake):
    """For each mode, whether it was PyTorch that made a product; cuBLAS makes the others."""
    made = {}
    for mode in ("float32", "tf32", "bfloat16", "float64"):
        fake.products.clear()
        (a, b, c), (a_array, b_array, _) = matrices((2, 3, 4), 0, "float64" if mode == "float64" else "float32")
        both = (libraries.Torch(torch, 0), *cublas(fake))
        assert libraries.product(both, STREAM, a, b, c, False, mode)
        assert_close(c.buffer.flat[2:].reshape(2, 6)[:, :3], a_array @ b_array)
        made[mode] = not fake.products
    return made


def test_settings_of_this_pytorch():
    """Set in either way, in a process of its own."""
    pytest.importorskip("torch")
    program = """
import torch
from fastrnn.kernels.cuda.libraries import uses_tf32
assert not uses_tf32(torch)
for setting in ({"high": True}, {"highest": False}, {"medium": True}):
    for name, expected in setting.items():
        torch.set_float32_matmul_precision(name)
        assert uses_tf32(torch) is expected, name
torch.set_float32_matmul_precision("highest")
torch.backends.cuda.matmul.allow_tf32 = True
assert uses_tf32(torch)
torch.backends.cuda.matmul.allow_tf32 = False
assert not uses_tf32(torch)
if hasattr(torch.backends, "fp32_precision"):
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    assert uses_tf32(torch)
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    assert not uses_tf32(torch)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_pytorch_works_on_the_stream_that_is_given():
    for current, stream, used in ((0, 1, []), (0, 0, []), (7, 7, []), (7, 9, [(9, 2)]), (7, 1, [(1, 2)])):
        torch = cpu_torch(current)
        (a, b, c), _ = matrices((2, 3, 4), 0, "float32")
        libraries.product((libraries.Torch(torch, 2),), stream, a, b, c, False)
        assert torch.used == used


def test_nothing_to_multiply_is_not_the_libraries_matter(fake):
    for size in ((0, 3, 2), (3, 0, 2), (3, 2, 0)):
        (a, b, c), _ = matrices(size, 0, "float32")
        assert libraries.product(cublas(fake), STREAM, a, b, c, False) is False
    (a, b, c), _ = matrices((1, 1, 1), 0, "float32")
    assert libraries.product(None, STREAM, a, b, c, False) is False
    assert not fake.products


def test_a_matrix_whose_rows_and_columns_stand_apart_is_refused(fake):
    (a, b, c), _ = matrices((2, 2, 2), 0, "float32")
    with pytest.raises(AssertionError):
        libraries.product(cublas(fake), STREAM, a, b, c.T, False)
    with pytest.raises(AssertionError):
        libraries.product(cublas(fake), STREAM, a._replace(column=2), b, c, False)


def test_an_error_of_cublas_is_raised(fake):
    library = cublas(fake)
    (a, b, c), _ = matrices((2, 2, 2), 0, "float32")
    with pytest.raises(RuntimeError, match="cublasGemmEx_64 failed with status 15"):
        libraries.product(library, STREAM, a, b, c, False, "float64")


@pytest.mark.parametrize("library", ["torch", "cupy", None])
def test_which_libraries_are_asked(library, fake, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", cpu_torch() if library == "torch" else None)
    device = SimpleNamespace(library=library, ordinal=0)
    first = ["Torch"] if library == "torch" else []
    for status, found in ((0, ["Cublas"]), (1, [])):
        functions = libraries.declared(FakeCublas(status))
        monkeypatch.setattr(libraries, "find_cublas", lambda functions=functions: functions)
        assert [type(one).__name__ for one in libraries.library_for(device) or ()] == first + found
    monkeypatch.setattr(libraries, "find_cublas", lambda: None)
    assert [type(one).__name__ for one in libraries.library_for(device) or ()] == first


def test_cublas_is_found_or_not_without_an_error(fake, monkeypatch):
    pathfinder = pytest.importorskip("cuda.pathfinder")
    find = libraries.find_cublas.__wrapped__
    found = find()
    assert found is None or found.cublasGemmEx_64.argtypes == libraries.SIGNATURES["cublasGemmEx_64"]
    monkeypatch.setattr(pathfinder, "load_nvidia_dynamic_lib", lambda name: SimpleNamespace(abs_path=name))
    monkeypatch.setattr(ctypes, "CDLL", lambda path: {"cublas": fake}[path])
    assert find() is fake
    monkeypatch.setattr(ctypes, "CDLL", lambda path: SimpleNamespace(cublasCreate_v2=fake.cublasCreate_v2))
    assert find() is None  # of CUDA 11
    monkeypatch.setitem(sys.modules, "cuda.pathfinder", None)
    assert find() is None


# ---- in use


@pytest.mark.parametrize("kind", ["cublas", "torch"])
@pytest.mark.parametrize("cell", CELLS)
def test_walks_with_a_library(cell, kind, fake, monkeypatch):
    """All products of a step-wise walk, and of the gradients behind it."""
    library = cublas(fake) if kind == "cublas" else (libraries.Torch(cpu_torch(), 0),)
    made = []

    def ask(*matrices_and_add):
        made.append(libraries.product(library, STREAM, *matrices_and_add))
        return made[-1]

    walk = SimpleNamespace(forward=steps.forward, backward=steps.backward, Size=simple.Size)
    walk.transposed = lambda device, cell, size, weights: weights
    monkeypatch.setattr(plain, "simple", walk)
    monkeypatch.setattr(SimulatedDevice, "graph", lambda self, key, record: record(), raising=False)
    for dtype in ("float32", "float64"):
        options = {"directions": (False, True), "lengths": True, "reset": True, "dtype": dtype}
        plain.check(plain.task(cell, 4, 3, 3, 5, **options), library=ask)
    assert made
    assert all(made)


def test_products_of_threads_at_once(fake):
    """A handle has one stream at a time: each product is made on its own."""
    library, streams = cublas(fake), range(1, 65)
    given = {stream: tuple(matrices((5, 6, stream), 0, "float64", seed=stream)) for stream in streams}

    def make(stream):
        (a, b, c), _ = given[stream]
        assert libraries.product(library, stream, a, b, c, False)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(make, streams))
    assert [made.k for made in fake.products] == fake.streams
    assert sorted(fake.streams) == list(streams)
    for (_, _, c), (a_array, b_array, _) in given.values():
        assert_close(c.buffer.flat[2:].reshape(5, 9)[:, :6], a_array @ b_array, scale=8)


def test_the_plain_product_is_what_is_left(fake):
    device = SimulatedDevice()
    device.library_product = lambda *arguments: libraries.product(None, STREAM, *arguments)
    (a, b, c), (a_array, b_array, _) = matrices((2, 3, 4), 0, "float32")
    multiply(device, a, b, c)
    assert len(device.launched) == 1
    assert_close(c.buffer.flat[2:].reshape(2, 6)[:, :3], a_array @ b_array)
