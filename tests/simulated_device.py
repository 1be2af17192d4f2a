"""A device whose memory is NumPy's and whose kernels run in the simulator."""

import math

import numpy as np

import simulator
from fastrnn.kernels.cuda import products


class Buffer:
    """An array, or what of it follows some element, as kernels see it: flat."""

    def __init__(self, flat, shape, device=None):
        self.flat, self.shape, self.device = flat, shape, device

    is_buffer = True
    dtype = property(lambda self: self.flat.dtype)
    size = property(lambda self: self.flat.size)
    nbytes = property(lambda self: self.flat.nbytes)
    pointer = property(lambda self: self.flat.ctypes.data)

    ndim = property(lambda self: len(self.shape))

    def reshape(self, *shape):
        count = math.prod(shape)
        assert count <= self.size
        return Buffer(self.flat[:count], shape, self.device)

    def swapaxes(self, first, second):
        assert (first, second) == (0, 1)
        return products.swapped(self.device, self)

    def at(self, n):
        assert 0 <= n <= self.size
        return Buffer(self.flat[n:], (self.size - n,), self.device)


class SimulatedDevice:
    """`seed` shuffles the order in which threads run. `launched` has the kernels, in order."""

    multiprocessors = 132
    capability = (9, 0)
    shared_memory = 227 << 10
    library_product = None

    def __init__(self, seed=None):
        self.seed = seed
        self.launched = []
        self.status = self.upload(np.zeros(1, np.int32))

    @property
    def has_library(self):
        return self.library_product is not None

    def empty(self, shape, dtype):
        """Memory that holds NaN, or bytes that are none's value."""
        array = np.empty(shape, dtype)
        array.reshape(-1).view(np.uint8)[:] = 0xAB
        if array.dtype.kind == "f":
            array[...] = np.nan
        return Buffer(array.reshape(-1), array.shape, self)

    def fill(self, buffer, byte):
        assert byte in (0, 0xFF)
        buffer.flat.view(np.uint8)[:] = byte

    def upload(self, array):
        return Buffer(np.array(array).reshape(-1), np.shape(array), self)

    def to_buffer(self, array):
        return self.upload(array) if isinstance(array, np.ndarray) else array

    def download(self, buffer):
        return buffer.flat.reshape(buffer.shape).copy()

    def copy(self, target, source):
        assert target.nbytes >= source.nbytes
        target.flat.view(np.uint8)[: source.nbytes] = source.flat.view(np.uint8)

    def graph(self, key, record):
        """Nothing is kept: what would be launched again is recorded again."""
        hash(key)
        record()

    def launch(self, kernel, grid, arguments, *, shared=0, cooperative=False):
        """As a GPU's: a null pointer may be given, but not followed; a number may be read as another of its size."""
        assert all(size > 0 for size in grid), grid
        assert max(grid[1:]) < 2**16, grid
        hash(kernel)
        self.launched.append(kernel)
        given = [argument(*pair) for pair in zip(arguments, kernel.arguments, strict=True)]
        simulator.launch(kernel, grid, given, shared=shared, seed=self.seed)


def argument(value, kind):
    if not kind.endswith("*"):
        return int(value)
    dtype = np.dtype(kind[:-1])
    if value is None:
        return np.empty(0, dtype)
    assert value.dtype.itemsize == dtype.itemsize, (value.dtype, kind)
    return value.flat.view(dtype)
