"""Large products by NVIDIA's cuBLAS: through PyTorch where the caller has it, or else by ctypes.

cuBLAS itself is no requirement. It is found where PyTorch, CuPy or JAX has loaded it, in NVIDIA's wheel
(``pip install nvidia-cublas``), a Conda environment or a CUDA toolkit; where it is not, products are those of
:mod:`fastrnn.kernels.cuda.products`. Nothing global is changed to get the precision that is asked for: PyTorch is
passed over where its settings are for another one. CuPy's arrays go to cuBLAS, too: ``cupy.matmul`` would need new
memory for a product that is added, and copies where rows stand apart.

Not yet run on a GPU: the tests drive this with a stand-in for cuBLAS that reads the arguments as C would, and with
PyTorch on the CPU. Not tried at all are PyTorch's streams, the capture of its products into graphs, cuBLAS' own
settings, and whether results are the same bits from run to run, as NVIDIA says they are on one kind of GPU.
"""

from __future__ import annotations

import ctypes
import functools
import sys
import threading
from contextlib import nullcontext, suppress

LEGACY = 1  # the driver's handle of the stream that PyTorch calls 0

# From NVIDIA's library_types.h and cublas_api.h.
TYPES = {"float32": 0, "float64": 1}  # CUDA_R_32F, CUDA_R_64F
# CUBLAS_COMPUTE_32F and its kinds _FAST_TF32, _FAST_16BF, _FAST_16F; CUBLAS_COMPUTE_64F. Plain 32F uses no TF32.
COMPUTE = {"float32": 68, "tf32": 77, "bfloat16": 75, "float16": 74, "float64": 70}
NUMBERS = {"float32": ctypes.c_float, "float64": ctypes.c_double}
AS_IT_IS, TRANSPOSED = 0, 1  # CUBLAS_OP_N, CUBLAS_OP_T
DEFAULT = -1  # CUBLAS_GEMM_DEFAULT

_int, _long, _pointer = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
# https://docs.nvidia.com/cuda/cublas/: cublasCreate(), cublasSetStream(), cublasGemmEx() with 64-bit sizes.
SIGNATURES = {
    "cublasCreate_v2": [_pointer],
    "cublasSetStream_v2": [_pointer, _pointer],
    "cublasGemmEx_64": [
        _pointer, _int, _int, _long, _long, _long,  # handle, transa, transb, m, n, k
        _pointer, _pointer, _int, _long, _pointer, _int, _long,  # alpha; A, Atype, lda; B, Btype, ldb
        _pointer, _pointer, _int, _long, _int, _int,  # beta; C, Ctype, ldc; computeType, algo
    ],
}  # fmt: skip


def library_for(device):
    """The libraries that make products on a device, those to ask first before; or None.

    Where there is cuBLAS, it gets ready here, which is not allowed while a graph is recorded. The device's context must
    be current, here and in `product`.
    """
    found = []
    if device.library == "torch":
        found.append(Torch(sys.modules["torch"], device.ordinal))
    functions = find_cublas()
    if functions is not None:
        with suppress(RuntimeError):  # it is not for this driver or this GPU
            found.append(Cublas(functions))
    return tuple(found) or None


def product(library, stream, a, b, c, add, mode="float32"):
    """C = A B, or C += A B, on a stream (a number); whether it was made. c's buffer is modified.

    Parameters
    ----------
    library : what `library_for` returns
    stream : int
        The driver's handle.
    a, b, c : products.Matrix
        A and B perhaps transposed, C not.
    add : bool
    mode : str
        How numbers of float32 are multiplied: as "float32", or rounded to "tf32", "bfloat16" or "float16". Sums are
        always of float32. float64 is multiplied as float64.
    """
    if not (c.rows and c.columns and a.columns):
        return False
    assert c.column == 1, "C is transposed"
    mode = "float64" if c.buffer.dtype.name == "float64" else mode
    return any(one.product(stream, a, b, c, add, mode) for one in library or ())


# ---- PyTorch


class Torch:
    """PyTorch's products, with its handles and its workspace."""

    def __init__(self, torch, ordinal):
        self._torch, self._ordinal = torch, ordinal
        self._place = torch.device("cuda", ordinal)

    def product(self, stream, a, b, c, add, mode):
        if mode not in ("float64", "tf32" if uses_tf32(self._torch) else "float32"):
            return False
        with self._on(stream):
            a, b, c = map(self._tensor, (a, b, c))
            if add:
                c.addmm_(a, b)
            else:
                self._torch.mm(a, b, out=c)
        return True

    def _tensor(self, matrix):
        """The matrix as a tensor that shares its memory."""
        whole = self._torch.as_tensor(matrix.buffer, device=self._place)
        return whole.as_strided((matrix.rows, matrix.columns), (matrix.row, matrix.column), matrix.start)

    def _on(self, stream):
        cuda = self._torch.cuda
        if (cuda.current_stream(self._ordinal).cuda_stream or LEGACY) == (stream or LEGACY):
            return nullcontext()
        return cuda.stream(cuda.ExternalStream(stream, device=self._place))


def uses_tf32(torch):
    """Whether PyTorch rounds what it multiplies to TF32, as it is set now."""
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):  # from 2.9 on, and the older setting can't be read once this was used
        return matmul.fp32_precision == "tf32"
    return matmul.allow_tf32


# ---- cuBLAS


@functools.cache
def find_cublas():
    """cuBLAS as ctypes has it, or None."""
    try:
        from cuda.pathfinder import load_nvidia_dynamic_lib

        return declared(ctypes.CDLL(load_nvidia_dynamic_lib("cublas").abs_path))
    # Not installed; not found; not to be loaded; of CUDA 11, which has no such functions; or its place is not known.
    except (ImportError, RuntimeError, OSError, AttributeError, TypeError):
        return None


def declared(functions):
    """The same functions, now with the types of their arguments."""
    for name, arguments in SIGNATURES.items():
        function = getattr(functions, name)
        function.argtypes, function.restype = arguments, _int
    return functions


class Cublas:
    """cuBLAS with a handle of its own, for the device whose context is current."""

    def __init__(self, functions):
        self._functions, self._lock = functions, threading.Lock()
        self._handle = _pointer()
        self._numbers = {name: (number(0), number(1)) for name, number in NUMBERS.items()}
        self._call("cublasCreate_v2", ctypes.byref(self._handle))

    def product(self, stream, a, b, c, add, mode):
        with self._lock:  # a handle has one stream
            self._call("cublasSetStream_v2", self._handle, stream)
            self._call("cublasGemmEx_64", self._handle, *self._arguments(a, b, c, add, mode))
        return True

    def _arguments(self, a, b, c, add, mode):
        """cublasGemmEx' arguments behind the handle.

        Its matrices stand column behind column: what it reads where C stands is C's transpose, which is B^T A^T.
        """
        dtype = c.buffer.dtype.name
        zero, one = map(ctypes.addressof, self._numbers[dtype])
        (op_b, *first), (op_a, *second), (_, *result) = map(operand, (b, a, c))
        sizes = c.columns, c.rows, a.columns
        return op_b, op_a, *sizes, one, *first, *second, one if add else zero, *result, COMPUTE[mode], DEFAULT

    def _call(self, name, *arguments):
        status = getattr(self._functions, name)(*arguments)
        if status != 0:
            raise RuntimeError(f"cuBLAS: {name} failed with status {status}")


def operand(matrix):
    """How cuBLAS gets the transpose of a matrix: the operation, the pointer, the type, the leading dimension."""
    dtype = matrix.buffer.dtype
    pointer = matrix.buffer.pointer + matrix.start * dtype.itemsize
    if matrix.column == 1:
        return AS_IT_IS, pointer, TYPES[dtype.name], max(matrix.row, matrix.columns)
    assert matrix.row == 1, "neither rows nor columns stand together"
    return TRANSPOSED, pointer, TYPES[dtype.name], max(matrix.column, matrix.rows)
