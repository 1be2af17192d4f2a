"""Host code of the GPU, driven with a stand-in for the driver: which calls it makes, and with what."""

import ctypes
import gc
import importlib.util
import re
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from fastrnn.kernels.cuda import arrays, device, text
from fastrnn.kernels.cuda.compiled import Compiled
from fastrnn.kernels.cuda.device import LEGACY, Buffer, Device


class Names:
    """An enumeration's stand-in: a name is its own value."""

    def __getattr__(self, name):
        return name


class Driver:
    """cuda.bindings.driver with the computer's own memory for a GPU's: it notes calls, and copies and fills at once."""

    CUdevice_attribute = CUfunction_attribute = CUpointer_attribute = CUmemPool_attribute = CUstreamCaptureMode = (
        Names()
    )
    CUresult = types.SimpleNamespace(CUDA_ERROR_NO_DEVICE=100)
    cuuint64_t = int

    def __init__(self):
        self.calls, self.memory, self.fails, self.version = [], {}, {}, 13000
        self.contexts, self.ordinals, self.count, self.threshold = [], {}, 2, 0
        self.attributes = {
            "CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT": 132,
            "CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR": 9,
            "CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR": 0,
            "CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN": 227 << 10,
        }

    def __getattr__(self, name):
        def function(*arguments):
            context = self.contexts[-1] if self.contexts else 0
            self.calls.append((name, *arguments))
            if name in self.fails:
                return self.fails[name], None
            result = getattr(self, f"_{name}", lambda *arguments: None)(*arguments)
            assert context or name in CONTEXT_FREE, f"{name} without a context"
            return (0,) if result is None else (0, result)

        if not name.startswith("cu"):
            raise AttributeError(name)
        return function

    def named(self, *names):
        return [call for call in self.calls if call[0] in names]

    def _cuInit(self, flags):
        pass

    def _cuDriverGetVersion(self):
        return self.version

    def _cuDeviceGetCount(self):
        return self.count

    def _cuDeviceGet(self, ordinal):
        return ordinal

    def _cuDevicePrimaryCtxRetain(self, ordinal):
        return 1000 + ordinal

    def _cuDeviceGetAttribute(self, name, ordinal):
        return self.attributes[name]

    def _cuCtxGetCurrent(self):
        return self.contexts[-1] if self.contexts else 0

    def _cuCtxGetDevice(self):
        return self.contexts[-1] - 1000

    def _cuCtxPushCurrent(self, context):
        self.contexts.append(context)

    def _cuCtxPopCurrent(self):
        return self.contexts.pop()

    def _cuGetErrorName(self, error):
        return f"CUDA_ERROR_{error}".encode()

    def _cuGetErrorString(self, error):
        return b"what it means"

    def _cuMemAllocAsync(self, nbytes, stream):
        memory = np.full(nbytes + 256, 0xAB, np.uint8)
        pointer = -(-memory.ctypes.data // 256) * 256
        self.memory[pointer] = memory
        return pointer

    def _cuMemFreeAsync(self, pointer, stream):
        del self.memory[pointer]

    def _cuMemsetD8Async(self, pointer, byte, n, stream):
        ctypes.memset(pointer, byte, n)

    def _cuMemcpyDtoDAsync(self, target, source, n, stream):
        ctypes.memmove(target, source, n)

    _cuMemcpyHtoDAsync = _cuMemcpyDtoHAsync = _cuMemcpyDtoDAsync

    def _cuDeviceGetDefaultMemPool(self, ordinal):
        return "pool"

    def _cuMemPoolGetAttribute(self, pool, name):
        return self.threshold

    def _cuModuleLoadData(self, cubin):
        return ("module", cubin)

    def _cuModuleGetFunction(self, module, name):
        return ("function", *module[1:], name)

    def _cuPointerGetAttribute(self, name, pointer):
        return self.ordinals.get(pointer, 0)

    def _cuEventCreate(self, flags):
        return "event"

    def _cuDeviceGetName(self, size, ordinal):
        return b"NVIDIA H200".ljust(size, b"\0")

    def _cuStreamCreate(self, flags):
        return 77

    def _cuStreamEndCapture(self, stream):
        return "recorded"

    def _cuGraphInstantiate(self, graph, flags):
        return ("graph", graph)

    def _cuLaunchKernel(self, function, *rest):
        self.arguments = values(rest[-2])

    def _cuLaunchCooperativeKernel(self, function, *rest):
        self.arguments = values(rest[-1])


CONTEXT_FREE = """cuInit cuDriverGetVersion cuDeviceGetCount cuDeviceGet cuDevicePrimaryCtxRetain cuDeviceGetAttribute
    cuCtxGetCurrent cuCtxPushCurrent cuCtxPopCurrent cuGetErrorName cuGetErrorString cuPointerGetAttribute
    cuDeviceGetName""".split()
ARGUMENTS = ("float32*", "float64*", "int32", "uint8*", "int32")


def values(address):
    """The arguments as a kernel gets them: from addresses, each of as many bytes as it has."""
    sizes = [8 if "*" in argument else 4 for argument in ARGUMENTS]
    places = (ctypes.c_void_p * len(sizes)).from_address(address)
    return [int.from_bytes(ctypes.string_at(place, n), "little") for place, n in zip(places, sizes, strict=True)]


def make(ops, constant):
    """Not compiled here."""


KERNEL = text.Kernel(make, ("float32",), ARGUMENTS, 256)


@pytest.fixture
def driver():
    return Driver()


@pytest.fixture
def gpu(driver, monkeypatch):
    compilations = []

    def compile_kernel(kernel, capability):
        compilations.append((kernel, capability))
        return Compiled(repr(kernel.constants).encode(), "entry", "")

    monkeypatch.setattr(device, "compile_kernel", compile_kernel)
    gpu = Device(driver, 0)
    gpu.compilations = compilations
    driver.calls.clear()
    return gpu


# ---- memory


def test_what_a_device_says_of_itself(gpu):
    assert (gpu.multiprocessors, gpu.capability, gpu.shared_memory) == (132, (9, 0), 227 << 10)
    gpu.require((8, 0), "it")
    with pytest.raises(RuntimeError, match=r"it needs a GPU of compute capability 10.0 or later, and this one has 9.0"):
        gpu.require((10, 0), "it")


@pytest.mark.parametrize("shape", [(3, 5), (7,), (), (0, 4)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int32, np.uint8])
def test_up_and_down(gpu, shape, dtype):
    array = np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(dtype)
    buffer = gpu.upload(array)
    assert (buffer.shape, buffer.dtype, buffer.size, buffer.nbytes) == (shape, dtype, array.size, array.nbytes)
    back = gpu.download(buffer)
    np.testing.assert_array_equal(back, array)
    assert back.dtype == dtype
    assert back.shape == shape


def test_an_array_with_strides_goes_up_in_order(gpu):
    array = np.arange(24, dtype=np.float32).reshape(2, 3, 4).transpose(2, 0, 1)
    np.testing.assert_array_equal(gpu.download(gpu.upload(array)), array)


def test_filling_copying_and_parts(gpu, driver):
    buffer = gpu.empty((4, 3), np.float32)
    gpu.fill(buffer, 0)
    gpu.fill(buffer.at(9), 0xFF)
    numbers = gpu.download(buffer)
    assert (numbers[:3] == 0).all()
    assert np.isnan(numbers[3]).all()
    other = gpu.empty(12, np.float32)
    gpu.copy(other, buffer)
    np.testing.assert_array_equal(gpu.download(other), numbers.ravel())
    assert buffer.at(9).shape == (3,)
    gpu.copy(other.at(3), buffer.at(9))
    np.testing.assert_array_equal(
        gpu.download(other), np.concatenate([numbers.ravel()[:3], numbers[3], numbers.ravel()[6:]])
    )
    with pytest.raises(ValueError, match="a buffer of 48 bytes does not fit into one of 12"):
        gpu.copy(buffer.at(9), other)
    assert len(driver.named("cuStreamSynchronize")) == 3  # of the downloads alone


def test_memory_goes_back_with_the_last_buffer_that_uses_it(gpu, driver):
    buffer = gpu.empty((4, 3), np.float32)
    part = buffer.at(3)
    del buffer
    gc.collect()
    assert len(driver.memory) == 1
    del part
    gc.collect()
    assert not driver.memory
    assert driver.named("cuMemFreeAsync")[0][2] == LEGACY


@pytest.mark.parametrize("threshold", [0, 5])
def test_the_pool_keeps_memory_unless_somebody_said_how_much(driver, threshold):
    driver.threshold = threshold
    Device(driver, 0)
    name = "CU_MEMPOOL_ATTR_RELEASE_THRESHOLD"
    expected = [] if threshold else [("cuMemPoolSetAttribute", "pool", name, 2**64 - 1)]
    assert driver.named("cuMemPoolSetAttribute") == expected


def test_a_failed_allocation(gpu, driver):
    driver.fails["cuMemAllocAsync"] = 2
    with pytest.raises(RuntimeError, match=r"CUDA: cuMemAllocAsync failed with CUDA_ERROR_2: what it means"):
        gpu.empty((4,), np.float32)


# ---- contexts and streams


def test_the_callers_context_is_left_as_it_was(gpu, driver):
    buffer = gpu.empty(4, np.float32)
    assert driver.contexts == []
    driver.contexts.append(1001)  # of another device
    gpu.fill(buffer, 0)
    assert driver.contexts == [1001]
    assert driver.named("cuCtxPushCurrent")[-1] == ("cuCtxPushCurrent", 1000)
    driver.fails["cuMemsetD8Async"] = 700
    with pytest.raises(RuntimeError, match="CUDA_ERROR_700"):
        gpu.fill(buffer, 0)
    assert driver.contexts == [1001]


def test_in_its_own_context_nothing_is_pushed(gpu, driver):
    driver.contexts.append(1000)
    gpu.fill(gpu.empty(4, np.float32), 0)
    assert not driver.named("cuCtxPushCurrent")


@pytest.fixture
def torch(monkeypatch):
    """PyTorch as far as it is used: tensors on "GPU 1" in the computer's memory, and a current stream."""
    real = pytest.importorskip("torch")
    state = types.SimpleNamespace(stream=0, asked=[])

    def raw(ordinal):
        state.asked.append(ordinal)
        return state.stream

    monkeypatch.setattr(real._C, "_cuda_getCurrentRawStream", raw, raising=False)
    empty = real.empty
    monkeypatch.setattr(real, "empty", lambda shape, dtype, device: empty(shape, dtype=dtype))
    return state


def test_pytorch_brings_stream_and_memory(driver, torch):
    import torch as library

    gpu = Device(driver, 1, "torch")
    buffer = gpu.empty((2, 3), np.float32)
    assert isinstance(buffer.owner, library.Tensor)
    assert buffer.owner.dtype == library.float32
    assert buffer.pointer == buffer.owner.data_ptr()
    for torch.stream, expected in ((0, LEGACY), (4711, 4711)):
        gpu.fill(buffer, 0)
        assert driver.calls[-2][-1] == expected  # the last is the context's
    assert set(torch.asked) == {1}
    assert not driver.named("cuMemAllocAsync", "cuMemPoolSetAttribute")


class CupyArray:
    def __init__(self, shape, dtype):
        self.array = np.zeros(shape, dtype)
        self.shape, self.dtype = self.array.shape, self.array.dtype
        self.data = types.SimpleNamespace(ptr=self.array.ctypes.data)

    def __dlpack_device__(self):
        return (2, 1)

    @property
    def __cuda_array_interface__(self):
        strides = None if self.array.flags.c_contiguous else self.array.strides
        data = (self.array.ctypes.data, True)
        shape, typestr = self.array.shape, self.array.dtype.str
        return {"shape": shape, "typestr": typestr, "data": data, "strides": strides, "stream": 7, "version": 3}


CupyArray.__module__ = "cupy._core.core"


@pytest.fixture
def cupy(monkeypatch):
    import contextlib

    cupy = types.ModuleType("cupy")
    stream = types.SimpleNamespace(ptr=7)
    cupy.ndarray, cupy.empty = CupyArray, CupyArray
    cupy.asarray = lambda x: ("cupy.asarray", x)
    cupy.cuda = types.SimpleNamespace(
        get_current_stream=lambda ordinal: stream, Device=lambda ordinal: contextlib.nullcontext()
    )
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    return cupy


def test_cupy_brings_stream_and_memory(driver, cupy):
    gpu = Device(driver, 1, "cupy")
    buffer = gpu.empty((2, 3), np.float64)
    assert isinstance(buffer.owner, CupyArray)
    gpu.fill(buffer, 0)
    assert driver.named("cuMemsetD8Async") == [("cuMemsetD8Async", buffer.pointer, 0, 48, 7)]


def test_another_stream_is_waited_for_on_the_gpu(gpu, driver):
    gpu.follow(LEGACY)
    assert not driver.named("cuEventCreate")
    gpu.follow(9)
    names = ("cuEventRecord", "cuStreamWaitEvent", "cuEventDestroy", "cuStreamSynchronize")
    assert driver.named(*names) == [
        ("cuEventRecord", "event", 9),
        ("cuStreamWaitEvent", LEGACY, "event", 0),
        ("cuEventDestroy", "event"),
    ]


# ---- launches


def test_a_launch(gpu, driver):
    x, y = gpu.empty(4, np.float32), gpu.empty(4, np.float64)
    gpu.launch(KERNEL, (3, 2, 1), [x.at(1), y, -5, None, np.int64(70000)])
    (call,) = driver.named("cuLaunchKernel")
    assert call[1] == ("function", b"('float32',)", b"entry")
    assert call[2:10] == (3, 2, 1, 256, 1, 1, 0, LEGACY)
    assert call[-1] == 0
    assert driver.arguments == [x.pointer + 4, y.pointer, 2**32 - 5, 0, 70000]
    assert not driver.named("cuFuncSetAttribute", "cuStreamSynchronize")
    assert gpu.compilations == [(KERNEL, (9, 0))]


def test_a_cooperative_launch(gpu, driver):
    x = gpu.empty(4, np.float32)
    gpu.launch(KERNEL, (3, 2, 1), (x, x, 1, x, 2), cooperative=True)
    (call,) = driver.named("cuLaunchCooperativeKernel")
    assert call[2:10] == (3, 2, 1, 256, 1, 1, 0, LEGACY)
    assert len(call) == 11
    assert driver.arguments == [x.pointer, x.pointer, 1, x.pointer, 2]
    assert not driver.named("cuLaunchKernel")


def test_shared_memory_is_asked_for_once(gpu, driver):
    name = "CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES"
    for shared in (0, 100_000, 100_000, 50_000, 200_000):
        gpu.launch(KERNEL, (1, 1, 1), [None] * 5, shared=shared)
    assert [call[8] for call in driver.named("cuLaunchKernel")] == [0, 100_000, 100_000, 50_000, 200_000]
    assert [call[2:] for call in driver.named("cuFuncSetAttribute")] == [(name, 100_000), (name, 200_000)]


def test_a_kernel_is_loaded_once_for_each_device(gpu, driver):
    again = text.Kernel(make, ("float32",), ARGUMENTS, 256)
    other = KERNEL._replace(constants=("float64",))
    for kernel in (KERNEL, again, other, KERNEL):
        gpu.launch(kernel, (1, 1, 1), [None] * 5)
    assert len(driver.named("cuModuleLoadData")) == len(gpu.compilations) == 2
    Device(driver, 1).launch(KERNEL, (1, 1, 1), [None] * 5)
    assert len(driver.named("cuModuleLoadData")) == 3


def test_launches_within_launches_have_their_own_arguments(gpu, driver):
    """As another thread's, which comes while the driver has not yet read those of the first."""
    seen, read = [], driver._cuLaunchKernel

    def launch(function, *rest):
        if len(seen) < 2:
            seen.append(None)
            gpu.launch(KERNEL, (1, 1, 1), [None, None, len(seen), None, 0])
        read(function, *rest)
        seen.append(driver.arguments[2])

    driver._cuLaunchKernel = launch
    gpu.launch(KERNEL, (1, 1, 1), [None, None, 9, None, 0])
    assert seen[2:] == [2, 1, 9]


def test_launches_of_nothing_and_of_wrong_arguments(gpu, driver):
    gpu.launch(KERNEL, (0, 1, 1), [None] * 5)
    assert not driver.named("cuLaunchKernel")
    with pytest.raises(TypeError, match="make takes 5 arguments, not 4"):
        gpu.launch(KERNEL, (1, 1, 1), [None] * 4)
    driver.fails["cuLaunchKernel"] = 719
    with pytest.raises(RuntimeError, match="cuLaunchKernel failed with CUDA_ERROR_719"):
        gpu.launch(KERNEL, (1, 1, 1), [None] * 5)


def test_the_real_driver_takes_arguments_of_these_types():
    """Without a driver: a wrong type is noticed before the missing library is."""
    driver = pytest.importorskip("cuda.bindings.driver")
    try:
        driver.cuInit(0)
    except Exception as problem:
        missing = type(problem)
    else:
        pytest.skip("there is a driver, which would be called")
    array, event, context = np.zeros(4), driver.CUevent(3), driver.CUcontext(7)
    address, function = array.ctypes.data, driver.CUfunction(5)
    shared = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    ordinal = driver.CUpointer_attribute.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL
    threshold = driver.CUmemPool_attribute.CU_MEMPOOL_ATTR_RELEASE_THRESHOLD
    pool, gpu, stream = driver.CUmemoryPool(3), driver.CUdevice(0), driver.CUstream(9)
    graph, executable = driver.CUgraph(8), driver.CUgraphExec(6)
    calls = [("cuDeviceGetAttribute", getattr(driver.CUdevice_attribute, name), gpu) for name in Driver().attributes]
    calls += [
        ("cuLaunchKernel", function, 1, 1, 1, 256, 1, 1, 0, LEGACY, address, 0),
        ("cuLaunchCooperativeKernel", function, 1, 1, 1, 256, 1, 1, 0, LEGACY, address),
        ("cuModuleLoadData", b"cubin"),
        ("cuModuleGetFunction", driver.CUmodule(4), b"entry"),
        ("cuFuncSetAttribute", function, shared, 100_000),
        ("cuMemAllocAsync", 100, LEGACY),
        ("cuMemFreeAsync", 256, LEGACY),
        ("cuMemsetD8Async", 256, 0xFF, 100, LEGACY),
        ("cuMemcpyHtoDAsync", 256, address, 32, LEGACY),
        ("cuMemcpyDtoHAsync", address, 256, 32, LEGACY),
        ("cuMemcpyDtoDAsync", 256, 512, 32, LEGACY),
        ("cuDeviceGetName", 100, gpu),
        ("cuStreamCreate", 1),
        ("cuStreamBeginCapture", stream, driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED),
        ("cuStreamEndCapture", stream),
        ("cuGraphInstantiate", graph, 0),
        ("cuGraphDestroy", graph),
        ("cuGraphLaunch", executable, LEGACY),
        ("cuGraphExecDestroy", executable),
        ("cuStreamSynchronize", LEGACY),
        ("cuStreamWaitEvent", LEGACY, event, 0),
        ("cuEventCreate", 2),
        ("cuEventRecord", event, LEGACY),
        ("cuEventDestroy", event),
        ("cuCtxGetCurrent",),
        ("cuCtxGetDevice",),
        ("cuCtxPushCurrent", context),
        ("cuCtxPopCurrent",),
        ("cuDriverGetVersion",),
        ("cuDeviceGetCount",),
        ("cuDeviceGet", 0),
        ("cuDevicePrimaryCtxRetain", gpu),
        ("cuPointerGetAttribute", ordinal, 256),
        ("cuDeviceGetDefaultMemPool", gpu),
        ("cuMemPoolGetAttribute", pool, threshold),
        ("cuMemPoolSetAttribute", pool, threshold, driver.cuuint64_t(2**64 - 1)),
        ("cuGetErrorName", driver.CUresult.CUDA_ERROR_NO_DEVICE),
        ("cuGetErrorString", driver.CUresult.CUDA_ERROR_NO_DEVICE),
    ]
    for name, *arguments in calls:
        with pytest.raises(missing):
            getattr(driver, name)(*arguments)
    used = set(re.findall(r"\bcu[A-Z][a-z]\w+", Path(device.__file__).read_text()))
    assert used - {name for name, *_ in calls} == {"cuInit"}


# ---- what is missing


@pytest.fixture
def installed(driver, monkeypatch):
    """A machine on which all is there, to take things from."""
    cuda = types.SimpleNamespace(implementation="NVIDIA")
    bindings = types.SimpleNamespace(__version__="13.0.1", driver=driver)
    monkeypatch.setattr(device.importlib.util, "find_spec", lambda name: object())
    for name, module in (
        ("numba.cuda", cuda),
        ("cuda", types.SimpleNamespace(bindings=bindings)),
        ("cuda.bindings", bindings),
        ("cuda.bindings.driver", driver),
    ):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr("numba.cuda", cuda, raising=False)
    monkeypatch.setattr(device, "_devices", {})
    device._driver.cache_clear()
    yield cuda
    device._driver.cache_clear()


def test_all_is_there(installed, driver):
    assert device.available()
    assert device.get_device() is device.get_device()
    assert device.get_device().ordinal == 0
    driver.contexts.append(1001)
    assert device.get_device().ordinal == 1
    assert len(driver.named("cuInit")) == 1


def test_no_package(installed, monkeypatch):
    monkeypatch.setattr(device.importlib.util, "find_spec", lambda name: None)
    message = (
        r"needs? the package numba-cuda, which is not installed: pip install 'fastrnn\[cuda13\]'.* 'fastrnn\[cuda12\]'"
    )
    with pytest.raises(ImportError, match=message):
        device.get_device()
    assert not device.available()


def test_the_target_that_came_with_numba(installed):
    installed.implementation = "Built-in"
    with pytest.raises(ImportError, match=r"deprecated target .* not the package numba-cuda.*fastrnn\[cuda13\]"):
        device.get_device()


def test_the_simulator(installed, monkeypatch):
    from numba.core import config

    monkeypatch.setattr(config, "ENABLE_CUDASIM", 1, raising=False)
    with pytest.raises(RuntimeError, match="NUMBA_ENABLE_CUDASIM"):
        device.get_device()


def test_no_gpu(installed, driver, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    driver.fails["cuInit"] = 100
    with pytest.raises(RuntimeError, match=r"the NVIDIA driver sees no GPU$"):
        device.get_device()
    driver.fails, driver.count = {}, 0
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(RuntimeError, match=r"sees no GPU \(CUDA_VISIBLE_DEVICES is ''\)"):
        device.get_device()
    assert not device.available()


def test_a_driver_that_is_broken_or_too_old(installed, driver):
    driver.fails["cuInit"] = 803
    with pytest.raises(RuntimeError, match="cuInit failed with CUDA_ERROR_803: what it means"):
        device.get_device()
    driver.fails, driver.version = {}, 12040
    message = r"supports CUDA up to 12.4, and what is installed is for CUDA 13: .* pip install 'fastrnn\[cuda12\]'"
    with pytest.raises(RuntimeError, match=message):
        device.get_device()


def test_a_gpu_that_is_too_old_for_the_packages(installed, driver):
    driver.attributes["CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR"] = 6
    with pytest.raises(RuntimeError, match=r"CUDA 13 .*cuda12.* needs .* 7.5 or later, and this one has 6.0"):
        device.get_device()
    assert not device._devices


def test_no_driver_on_this_machine():
    """Nothing is replaced: what a machine without a GPU says."""
    device._driver.cache_clear()
    try:
        device.get_device()
    except (ImportError, RuntimeError) as error:
        if "no NVIDIA driver was found" not in str(error):
            pytest.skip(f"this machine says: {error}")
    else:
        pytest.skip("this machine has a GPU")
    assert not device.available()


@pytest.mark.parametrize("name", ["fastrnn", "fastrnn.kernels.cuda.device", "fastrnn.kernels.cuda.arrays"])
def test_an_import_brings_nothing_of_cuda(name):
    program = f"import sys, {name}; print(*sys.modules, sep='\\n')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    modules = done.stdout.split()
    assert name in modules
    brought = [module for module in modules if module.startswith(("numba.cuda", "numba_cuda", "cuda", "torch", "cupy"))]
    assert [module for module in brought if module not in SITE] == []


#: what numba-cuda's .pth file brings whenever Python starts
SITE = subprocess.run(
    [sys.executable, "-c", "import sys; print(*sys.modules)"], capture_output=True, text=True, check=True
).stdout.split()


# ---- arrays


class Shared:
    """An array with the CUDA array interface alone, in the computer's memory."""

    def __init__(self, array, **changes):
        self.array = array
        interface = {
            "shape": array.shape,
            "typestr": array.dtype.str,
            "data": (array.ctypes.data, True),
            "strides": None if array.flags.c_contiguous else array.strides,
            "version": 3,
        }
        self.__cuda_array_interface__ = {**interface, **changes}


def aligned(shape, dtype=np.float32, offset=0):
    """Numbers that begin `offset` bytes after a place where wide loads may."""
    n = int(np.prod(shape)) * np.dtype(dtype).itemsize
    memory = np.zeros(n + 64, np.uint8)
    start = -memory.ctypes.data % 16 + offset
    array = memory[start : start + n].view(dtype).reshape(shape)
    array[...] = np.arange(array.size).reshape(shape)
    return array


def test_what_is_on_a_gpu():
    on_cpu = types.SimpleNamespace(__dlpack_device__=lambda: (1, 0), __cuda_array_interface__={})
    assert arrays.is_on_gpu(Shared(aligned((2, 3))))
    assert arrays.is_on_gpu(CupyArray((2, 3), "f4"))
    assert not any(map(arrays.is_on_gpu, (np.zeros(3), [1.0], 1.0, None, "x", on_cpu)))


def test_arrays_of_frameworks_on_the_cpu_are_not_on_a_gpu():
    torch = pytest.importorskip("torch")
    assert not arrays.is_on_gpu(torch.zeros(3, requires_grad=True))


def test_an_array_of_jax_on_the_cpu_is_not_on_a_gpu():
    """In a process of its own: JAX's threads forbid the fork that another test makes."""
    if importlib.util.find_spec("jax") is None:
        pytest.skip("JAX is not installed")
    lines = (
        "import jax.numpy",
        "from fastrnn.kernels.cuda import arrays",
        "assert not arrays.is_on_gpu(jax.numpy.zeros(3))",
    )
    subprocess.run([sys.executable, "-c", "; ".join(lines)], check=True)


def test_an_array_comes_in_without_a_copy(installed):
    array = aligned((2, 3))
    x = Shared(array)
    buffer, dtype, shape = arrays.import_array(x)
    assert (buffer.pointer, buffer.owner, dtype, shape) == (array.ctypes.data, x, np.float32, (2, 3))
    assert buffer.device is device.get_device()


@pytest.mark.parametrize("shape", [(1, 3), (3, 1, 2), (0, 5), (1, 1, 1)])
def test_strides_of_lengths_zero_and_one_say_nothing(installed, shape):
    array = aligned(shape)
    strides = tuple(stride if length > 1 else 12345 * 4 for stride, length in zip(array.strides, shape, strict=True))
    pointer = 0 if array.size == 0 else array.ctypes.data
    buffer, _, _ = arrays.import_array(Shared(array, strides=strides, data=(pointer or None, False)))
    assert buffer.pointer == pointer


def test_what_begins_between_is_copied(installed, driver):
    array = aligned((2, 3), offset=4)
    buffer, _, _ = arrays.import_array(Shared(array))
    assert buffer.pointer % 16 == 0
    np.testing.assert_array_equal(buffer.device.download(buffer), array)
    assert len(driver.named("cuMemcpyDtoDAsync")) == 1


def test_the_arrays_stream_is_waited_for(installed, driver):
    arrays.import_array(Shared(aligned((2, 3)), stream=33))
    assert driver.named("cuEventRecord") == [("cuEventRecord", "event", 33)]
    arrays.import_array(Shared(aligned((2, 3)), stream=LEGACY))
    assert len(driver.named("cuEventRecord")) == 1
    assert not driver.named("cuStreamSynchronize")


def test_errors_name_the_argument(installed, driver):
    with pytest.raises(TypeError, match="weight has dtype int32, expected float32 or float64"):
        arrays.import_array(Shared(aligned((2, 3), np.int32)), "weight")
    with pytest.raises(
        ValueError, match=r"h is not C-contiguous: .*\(3, 2\).*\(1, 3\) elements.*contiguous first: copy h"
    ):
        arrays.import_array(Shared(aligned((2, 3)).T), "h")
    with pytest.raises(ValueError, match="x is a masked array"):
        arrays.import_array(Shared(aligned((2, 3)), mask=Shared(aligned((2, 3)))))
    array = aligned((2, 3))
    driver.ordinals[array.ctypes.data] = 1
    with pytest.raises(ValueError, match="c is on GPU 1, expected on GPU 0 as the other arrays"):
        arrays.import_array(Shared(array), "c", device=device.get_device())
    assert arrays.import_array(Shared(array))[0].device.ordinal == 1


def test_lengths_may_be_integers(installed):
    array = aligned((3,), np.int32)
    buffer, dtype, _ = arrays.import_array(Shared(array), "lengths", dtypes=("int32", "int64"))
    assert buffer.dtype == dtype == np.int32


def test_cupy_in_and_out(installed, cupy):
    x = CupyArray((2, 4), np.float32)
    buffer, _, _ = arrays.import_array(x, dtypes=("float32",))
    gpu = buffer.device
    assert (gpu.library, gpu.ordinal) == ("cupy", 1)
    made = gpu.empty((2, 4), np.float32)
    assert arrays.export(made, x) is made.owner
    part = made.at(4)
    assert arrays.export(part, x) == ("cupy.asarray", part)
    turned = CupyArray((2, 4), np.float32)
    turned.array = turned.array.T
    with pytest.raises(ValueError, match=r"cupy\.ascontiguousarray\(x\)"):
        arrays.import_array(turned)


def test_pytorch_in_and_out(installed, driver, torch, monkeypatch):
    import torch as library

    class Tensor(library.Tensor):
        __dlpack_device__ = lambda self: (2, 1)  # noqa: E731

    Tensor.__module__ = "torch"
    x = library.zeros(4, 6).as_subclass(Tensor)
    buffer, dtype, shape = arrays.import_array(x)
    assert (buffer.pointer, dtype, shape) == (x.data_ptr(), np.float32, (4, 6))
    assert buffer.device.library == "torch"
    assert buffer.device.ordinal == 1
    made = buffer.device.empty((4, 6), np.float32)
    assert arrays.export(made, x) is made.owner
    monkeypatch.setattr(library, "as_tensor", lambda x, device: (x.pointer, str(device)))
    assert arrays.export(made.at(6), x) == (made.pointer + 24, "cuda:1")
    with pytest.raises(ValueError, match=r"x is not C-contiguous.*x\.contiguous\(\)"):
        arrays.import_array(x.T)
    with pytest.raises(TypeError, match="x has dtype bfloat16"):
        arrays.import_array(x.to(library.bfloat16))


def test_out_to_numba_and_numpy(installed, gpu):
    installed.as_cuda_array = lambda x, sync: (x.__cuda_array_interface__, sync)
    buffer = gpu.upload(aligned((2, 3)))
    interface, sync = arrays.export(buffer, Shared(aligned((2, 3))))
    assert not sync
    assert interface == {
        "shape": (2, 3),
        "typestr": "<f4",
        "data": (buffer.pointer, False),
        "strides": None,
        "stream": LEGACY,
        "version": 3,
    }
    np.testing.assert_array_equal(arrays.export(buffer, np.zeros(1)), aligned((2, 3)))


def test_a_buffer_without_elements(gpu):
    empty = gpu.empty((0, 3), np.float32)
    assert isinstance(empty, Buffer)
    assert (empty.pointer, empty.nbytes) == (0, 0)
    gpu.fill(empty, 1)
    gpu.copy(empty, empty)


# ---- graphs


def recorder(gpu, log):
    def record():
        log.append(gpu.stream())
        gpu.fill(gpu.empty(4, "float32"), 0)

    return record


def test_a_graph_is_recorded_at_the_second_call_and_launched_from_then_on(gpu, driver):
    log = []
    for _ in range(4):
        gpu.graph("key", recorder(gpu, log))
    assert log == [LEGACY, 77]  # once as it is, once recorded
    assert len(driver.named("cuStreamBeginCapture")) == 1
    assert driver.named("cuGraphLaunch") == [("cuGraphLaunch", ("graph", "recorded"), LEGACY)] * 3
    assert gpu.stream() == LEGACY


def test_what_cannot_be_recorded_is_launched_each_time(gpu, driver):
    driver.fails["cuStreamEndCapture"] = 900
    log = []
    for _ in range(4):
        gpu.graph("key", recorder(gpu, log))
    assert log == [LEGACY, 77, LEGACY, LEGACY, LEGACY]
    assert driver.named("cuGraphLaunch") == []


def test_few_graphs_are_kept(gpu, driver):
    for key in range(device.GRAPHS + 2):
        for _ in range(2):
            gpu.graph(key, recorder(gpu, []))
    assert len(driver.named("cuGraphExecDestroy")) == 2


def test_its_name(gpu):
    assert gpu.name == "NVIDIA H200"
