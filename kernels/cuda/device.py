"""How host code talks to an NVIDIA GPU: buffers, copies and launches, over the driver's API.

Everything goes to one stream, the one on which the caller's library works now, and nothing but
:meth:`Device.download` waits. Memory comes from PyTorch or CuPy where the caller's arrays do, else from the driver's
stream-ordered pool. Importing this module imports nothing of CUDA.

Not yet run on a GPU: the tests drive it with a stand-in for ``cuda.bindings.driver``, and check that the real one takes
arguments of these types. By hand it has run over the real bindings with a stand-in for the driver's library.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import math
import os
import sys
import threading
from collections import OrderedDict
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import numpy as np

from fastrnn.kernels.cuda import libraries
from fastrnn.kernels.cuda.compiled import HINT, compile_kernel
from fastrnn.kernels.cuda.products import swapped
from fastrnn.kernels.cuda.text import Kernel
from fastrnn.kernels.loading import uninterrupted

LEGACY, PER_THREAD = 1, 2  # the driver's handles of the two default streams
ON_GPU = (2, 13)  # DLPack's numbers of CUDA's memory: of a device, managed

GRAPHS = 16  # that a device keeps

_devices: dict[tuple[str | None, int], Device] = {}
_lock = threading.RLock()


class Buffer:
    """An array on a GPU: flat, C-contiguous, from `pointer` on. It keeps alive what owns the memory."""

    __slots__ = ("device", "dtype", "owner", "pointer", "shape")
    is_buffer = True  # which no array of NumPy says

    def __init__(self, device: Device, pointer: int, shape, dtype, owner=None):
        self.device, self.pointer, self.owner = device, pointer, owner
        self.shape, self.dtype = tuple(shape), np.dtype(dtype)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    def at(self, n: int) -> Buffer:
        """What begins n elements later, in one dimension."""
        return Buffer(self.device, self.pointer + n * self.dtype.itemsize, (self.size - n,), self.dtype, self.owner)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def reshape(self, *shape: int) -> Buffer:
        """The first elements in another shape: all of them, or as many as it has."""
        return Buffer(self.device, self.pointer, shape, self.dtype, self.owner)

    def swapaxes(self, first: int, second: int) -> Buffer:
        """A new buffer with the two first of three axes swapped."""
        assert (first, second) == (0, 1)
        return swapped(self.device, self)

    @property
    def __cuda_array_interface__(self) -> dict:
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (self.pointer, False),
            "strides": None,
            "stream": self.device.stream(),
            "version": 3,
        }


class Memory:
    """Memory of the driver's pool. It goes back when the work that the stream has got by then is done."""

    def __init__(self, device: Device, nbytes: int):
        self.device, self.stream = device, device.stream()
        self.pointer = int(device.call("cuMemAllocAsync", nbytes, self.stream))

    def __del__(self):
        with suppress(Exception):  # the allocation has failed, or the interpreter or the driver is on its way out
            self.device.call("cuMemFreeAsync", self.pointer, self.stream)


class Loaded:
    """A kernel that is on the GPU."""

    def __init__(self, module, function, arguments: int):
        self.module, self.function, self.arguments = module, function, arguments
        self.shared = 0  # bytes of dynamic shared memory that it may have
        self._free: list[Slots] = []

    def slots(self) -> Slots:
        """Slots that nobody uses now; give them back to `free`. A list's pop and append need no lock."""
        try:
            return self._free.pop()
        except IndexError:
            return _slots(self.arguments)

    def free(self, slots: Slots) -> None:
        self._free.append(slots)


class Slots(NamedTuple):
    """A launch's arguments as the driver takes them: addresses of values."""

    values: Any  # 8 bytes each: an int32 is the first 4 of them
    address: int  # of an array of their addresses
    addresses: Any  # that array, kept alive


def _slots(n: int) -> Slots:
    values = (ctypes.c_uint64 * n)()
    start = ctypes.addressof(values)
    addresses = (ctypes.c_uint64 * n)(*range(start, start + 8 * n, 8))
    return Slots(values, ctypes.addressof(addresses), addresses)


class Device:
    """A GPU, for callers whose arrays are of one `library`: "torch", "cupy", or None for every other."""

    def __init__(self, driver, ordinal: int, library: str | None = None):
        self._driver, self.ordinal, self.library = driver, ordinal, library
        self._device = self._check(driver.cuDeviceGet(ordinal))
        self._context = self._check(driver.cuDevicePrimaryCtxRetain(self._device))  # everybody's: PyTorch's, CuPy's
        self._context_handle = int(self._context)
        self._loaded: dict[Kernel, Loaded] = {}
        self.multiprocessors = self._attribute("MULTIPROCESSOR_COUNT")
        major, minor = (self._attribute(f"COMPUTE_CAPABILITY_{which}") for which in ("MAJOR", "MINOR"))
        self.capability = (major, minor)
        self.shared_memory = self._attribute("MAX_SHARED_MEMORY_PER_BLOCK_OPTIN")  # bytes that a block can have
        self._callers_stream = _stream(library, ordinal)
        self._recording = threading.local()
        self._graphs: OrderedDict[Any, Any] = OrderedDict()
        self._empty = _allocator(library, ordinal) or self._from_pool
        if self._empty == self._from_pool:
            self._keep_pool()

    @property
    def name(self) -> str:
        """As the driver has it, "NVIDIA H200" for instance."""
        return self._check(self._driver.cuDeviceGetName(100, self._device)).split(b"\0")[0].decode()

    def require(self, capability: tuple[int, int], what: str) -> None:
        """Raise if the GPU is older than `what` needs."""
        if self.capability < capability:
            have, need = ("{}.{}".format(*version) for version in (self.capability, capability))
            raise RuntimeError(f"{what} needs a GPU of compute capability {need} or later, and this one has {have}")

    # ---- memory

    def empty(self, shape, dtype) -> Buffer:
        """A new buffer, whose contents are whatever was there."""
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        pointer, owner = self._empty(shape, np.dtype(dtype))
        return Buffer(self, pointer, shape, dtype, owner)

    def _from_pool(self, shape, dtype):
        nbytes = math.prod(shape) * dtype.itemsize
        if nbytes == 0:
            return 0, None
        memory = Memory(self, nbytes)
        return memory.pointer, memory

    def _keep_pool(self) -> None:
        """Let the pool keep what is freed, where nobody has said how much: else every wait gives it back, slowly."""
        threshold = self._driver.CUmemPool_attribute.CU_MEMPOOL_ATTR_RELEASE_THRESHOLD
        pool = self.call("cuDeviceGetDefaultMemPool", self._device)
        if int(self.call("cuMemPoolGetAttribute", pool, threshold)) == 0:
            self.call("cuMemPoolSetAttribute", pool, threshold, self._driver.cuuint64_t(2**64 - 1))

    def fill(self, buffer: Buffer, byte: int) -> None:
        """Set every byte."""
        if buffer.nbytes:
            self.call("cuMemsetD8Async", buffer.pointer, byte, buffer.nbytes, self.stream())

    def copy(self, target: Buffer, source: Buffer) -> None:
        """Copy all of `source` to where `target` begins."""
        if target.nbytes < source.nbytes:
            raise ValueError(f"a buffer of {source.nbytes} bytes does not fit into one of {target.nbytes}")
        if source.nbytes:
            self.call("cuMemcpyDtoDAsync", target.pointer, source.pointer, source.nbytes, self.stream())

    def upload(self, array: np.ndarray) -> Buffer:
        """A buffer with this array's numbers."""
        array = np.ascontiguousarray(array).reshape(array.shape)
        buffer = self.empty(array.shape, array.dtype)
        if buffer.nbytes:
            self.call("cuMemcpyHtoDAsync", buffer.pointer, array.ctypes.data, buffer.nbytes, self.stream())
            buffer.owner = (buffer.owner, array)  # page-locked memory is read later, and any other now
        return buffer

    def to_buffer(self, array):
        """A NumPy array as a new buffer; a buffer, or None, as it is."""
        return self.upload(array) if isinstance(array, np.ndarray) else array

    def download(self, buffer: Buffer) -> np.ndarray:
        """The buffer's numbers, once they are there."""
        array = np.empty(buffer.shape, buffer.dtype)
        if buffer.nbytes:
            self.call("cuMemcpyDtoHAsync", array.ctypes.data, buffer.pointer, buffer.nbytes, self.stream())
        self.wait()
        return array

    # ---- kernels

    @functools.cached_property
    def status(self) -> Buffer:
        """A number that is 0 until a kernel gives up waiting."""
        status = self.empty((1,), np.int32)
        self.fill(status, 0)
        return status

    def launch(self, kernel: Kernel, grid, arguments, *, shared: int = 0, cooperative: bool = False) -> None:
        """Run a kernel. `arguments` are buffers, None for a null pointer, and integers, as kernel.arguments says."""
        loaded = self._loaded.get(kernel) or self._load(kernel)
        if len(arguments) != loaded.arguments:
            raise TypeError(f"{kernel.make.__name__} takes {loaded.arguments} arguments, not {len(arguments)}")
        if 0 in grid:
            return
        if shared > loaded.shared:  # without asking, what is static and this may be 48 KB together
            name = self._driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            self.call("cuFuncSetAttribute", loaded.function, name, shared)
            loaded.shared = shared
        slots = loaded.slots()
        slots.values[:] = [x.pointer if isinstance(x, Buffer) else 0 if x is None else int(x) for x in arguments]
        launch = loaded.function, *grid, kernel.threads, 1, 1, shared, self.stream(), slots.address
        try:
            if cooperative:
                self.call("cuLaunchCooperativeKernel", *launch)
            else:
                self.call("cuLaunchKernel", *launch, 0)
        finally:
            loaded.free(slots)

    def _load(self, kernel: Kernel) -> Loaded:
        with _lock:
            if kernel not in self._loaded:
                compiled = compile_kernel(kernel, self.capability)
                module = self.call("cuModuleLoadData", compiled.cubin)
                function = self.call("cuModuleGetFunction", module, compiled.entry.encode())
                self._loaded[kernel] = Loaded(module, function, len(kernel.arguments))
            return self._loaded[kernel]

    # ---- libraries, and many launches as one

    def library_product(self, a, b, c, add: bool, mode: str = "float32") -> bool:
        """Make a product with the caller's library or cuBLAS; False if there is none. See `libraries.product`."""
        if not self.has_library:
            return False
        with self._current():
            return libraries.product(self._libraries, int(self.stream()), a, b, c, add, mode)

    @functools.cached_property
    def _libraries(self):
        with self._current():
            return libraries.library_for(self)

    @property
    def has_library(self) -> bool:
        """Whether products can be a library's."""
        return self._libraries is not None

    def graph(self, key, record) -> None:
        """Do what record() launches: at the second call with a key as a graph, which later calls launch as a whole.

        `key` tells all that the launches depend on, the addresses of buffers too. Few graphs are kept.
        """
        with _lock:
            known, graph = key in self._graphs, self._graphs.pop(key, None)
            if known and graph is None:
                graph = self._record(record)
            self._graphs[key] = graph
            while len(self._graphs) > GRAPHS:
                _, old = self._graphs.popitem(last=False)
                if old:
                    self.call("cuGraphExecDestroy", old)
            if graph:
                self.call("cuGraphLaunch", graph, self.stream())
        if not graph:
            record()

    def _record(self, record):
        """A graph of what record() launches on a stream of its own; False if something in it can't be recorded."""
        stream, graph = self._stream_to_record, None
        try:
            self.call("cuStreamBeginCapture", stream, self._driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED)
            self._recording.stream = stream
            try:
                record()
            finally:
                self._recording.stream = None
                graph = self.call("cuStreamEndCapture", stream)
            return self.call("cuGraphInstantiate", graph, 0)
        except RuntimeError:
            return False
        finally:
            if graph is not None:
                self.call("cuGraphDestroy", graph)

    @functools.cached_property
    def _stream_to_record(self):
        """One for all graphs: libraries keep memory for every stream that they have seen."""
        return self.call("cuStreamCreate", 1)  # 1: it does not wait for the default stream, nor the other way round

    # ---- order

    def stream(self):
        """The stream that all work goes to: the caller's, or the one that is recorded."""
        return getattr(self._recording, "stream", None) or self._callers_stream()

    def follow(self, stream: int) -> None:
        """Let what comes next wait for what `stream` has got so far."""
        if stream == self.stream():
            return
        event = self.call("cuEventCreate", 2)  # 2: without a time
        try:
            self.call("cuEventRecord", event, stream)
            self.call("cuStreamWaitEvent", self.stream(), event, 0)
        finally:
            self.call("cuEventDestroy", event)

    def wait(self) -> None:
        """Wait until all work is done."""
        self.call("cuStreamSynchronize", self.stream())

    # ---- the driver

    def call(self, name: str, *arguments):
        """Call a function of the driver's API in this device's context, and leave the caller's as it was."""
        function = getattr(self._driver, name)
        if int(self._check(self._driver.cuCtxGetCurrent())) == self._context_handle:
            return self._check(function(*arguments), name)
        with self._current():
            return self._check(function(*arguments), name)

    @contextmanager
    def _current(self):
        """Within it, this device's context is the thread's."""
        self._check(self._driver.cuCtxPushCurrent(self._context))
        try:
            yield
        finally:
            self._driver.cuCtxPopCurrent()

    def _attribute(self, name: str) -> int:
        which = getattr(self._driver.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
        return self._check(self._driver.cuDeviceGetAttribute(which, self._device))

    def _check(self, result, name=""):
        return _check(self._driver, result, name)


# ---- which device


def get_device(like=None) -> Device:
    """The GPU that `like` is on, an array or None for the current one; an error that says what is missing."""
    driver = _driver()
    library = library_of(like) if like is not None else None
    library = library if library in ("torch", "cupy") else None
    ordinal = _current(driver) if like is None else ordinal_of(like, driver)
    return _devices.get((library, ordinal)) or _new_device(driver, ordinal, library)


def _new_device(driver, ordinal: int, library: str | None) -> Device:
    with _lock:
        if (library, ordinal) not in _devices:
            device = Device(driver, ordinal, library)
            if _major() >= 13:
                device.require((7, 5), "CUDA 13 (pip install 'fastrnn[cuda12]' for CUDA 12)")
            _devices[library, ordinal] = device
        return _devices[library, ordinal]


def available() -> bool:
    """Whether there is a GPU and all that its kernels need."""
    try:
        get_device()
    except (ImportError, RuntimeError):
        return False
    return True


def library_of(x) -> str:
    """The package that an array is of: "torch", "cupy", "jax", "numba", "numpy", ..."""
    name = type(x).__module__.partition(".")[0]
    return "jax" if name == "jaxlib" else name


def is_on_gpu(x) -> bool:
    """Whether x is an array on an NVIDIA GPU. Nothing is imported or copied."""
    if isinstance(x, (np.ndarray, np.generic, int, float, list, tuple, type(None))):
        return False
    try:
        if hasattr(x, "__dlpack_device__"):
            return x.__dlpack_device__()[0] in ON_GPU
        return hasattr(x, "__cuda_array_interface__")
    except Exception:  # whatever a library raises of an array that it does not share
        return False


def ordinal_of(x, driver) -> int:
    """The number of the device that an array is on."""
    if hasattr(x, "__dlpack_device__"):
        return int(x.__dlpack_device__()[1])
    pointer = x.__cuda_array_interface__["data"][0]
    if not pointer:  # an array of no elements is nowhere
        return _current(driver)
    which = driver.CUpointer_attribute.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL
    return int(_check(driver, driver.cuPointerGetAttribute(which, pointer), "cuPointerGetAttribute"))


def _current(driver) -> int:
    """The number of the device that this thread works with, the first where it has used none."""
    if int(_check(driver, driver.cuCtxGetCurrent())) == 0:
        return 0
    return int(_check(driver, driver.cuCtxGetDevice()))


# ---- what the caller's library brings


def _stream(library: str | None, ordinal: int):
    """A function that says on which stream the library works now."""
    if library == "torch":
        torch = sys.modules["torch"]
        raw = getattr(torch._C, "_cuda_getCurrentRawStream", None)  # 0.1 µs; the public way makes an object
        raw = raw or (lambda ordinal: torch.cuda.current_stream(ordinal).cuda_stream)
        return lambda: raw(ordinal) or LEGACY
    if library == "cupy":
        current = sys.modules["cupy"].cuda.get_current_stream
        return lambda: current(ordinal).ptr or LEGACY
    from numba.core import config

    default = PER_THREAD if getattr(config, "CUDA_PER_THREAD_DEFAULT_STREAM", 0) else LEGACY
    return lambda: default


def _allocator(library: str | None, ordinal: int):
    """A function (shape, dtype) -> pointer, owner; None where the library has none."""
    if library == "torch":
        torch = sys.modules["torch"]
        place = torch.device("cuda", ordinal)

        def empty(shape, dtype):
            tensor = torch.empty(shape, dtype=getattr(torch, dtype.name), device=place)
            return tensor.data_ptr(), tensor

        return empty
    if library == "cupy":
        cupy = sys.modules["cupy"]

        def empty(shape, dtype):
            with cupy.cuda.Device(ordinal):
                array = cupy.empty(shape, dtype)
            return array.data.ptr, array

        return empty
    return None


# ---- what may be missing


@functools.cache
@uninterrupted()  # what it imports is large
def _driver():
    """cuda.bindings.driver, initialised; an error that says what is missing and how to get it."""
    _check_packages()
    from cuda.bindings import driver

    try:
        error = driver.cuInit(0)[0]
    except Exception as problem:  # the binding's own, of a library that it can't find
        raise RuntimeError(f"no NVIDIA driver was found on this machine: {problem}") from problem
    if error == driver.CUresult.CUDA_ERROR_NO_DEVICE or (not error and _check(driver, driver.cuDeviceGetCount()) == 0):
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        why = "" if visible is None else f" (CUDA_VISIBLE_DEVICES is {visible!r})"
        raise RuntimeError(f"the NVIDIA driver sees no GPU{why}")
    _check(driver, (error,), "cuInit")
    version = _check(driver, driver.cuDriverGetVersion())
    if version // 1000 < _major():
        supported = f"{version // 1000}.{version % 1000 // 10}"
        raise RuntimeError(
            f"the NVIDIA driver supports CUDA up to {supported}, and what is installed is for CUDA {_major()}: "
            f"install a newer driver, or pip install 'fastrnn[cuda{version // 1000}]'"
        )
    return driver


def _check_packages() -> None:
    """numba-cuda is there, and is what `numba.cuda` means."""
    if importlib.util.find_spec("numba_cuda") is None:
        raise ImportError(f"the GPU's kernels need the package numba-cuda, which is not installed: {HINT}")
    from numba import cuda
    from numba.core import config

    if getattr(config, "ENABLE_CUDASIM", 0):
        raise RuntimeError("Numba simulates CUDA, as NUMBA_ENABLE_CUDASIM asks for: unset it to use a GPU")
    if cuda.implementation == "Built-in":
        raise ImportError(
            "numba.cuda is the deprecated target that came with Numba, not the package numba-cuda, which its .pth file "
            f"in site-packages puts in its place when Python starts: {HINT}"
        )


def _major() -> int:
    """The major version of CUDA that the packages are for."""
    from cuda import bindings

    return int(bindings.__version__.split(".")[0])


def _check(driver, result, name=""):
    """What a function of the driver has returned, without the error code; an exception for an error."""
    error, *values = result
    if error != 0:
        what = [driver.cuGetErrorName(error)[1], driver.cuGetErrorString(error)[1]]
        said, meaning = (text.decode() if isinstance(text, bytes) else str(text) for text in what)
        raise RuntimeError(f"CUDA: {name or 'the driver'} failed with {said}: {meaning}")
    return values[0] if values else None
