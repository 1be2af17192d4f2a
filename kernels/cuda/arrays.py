"""Arrays on a GPU, of whichever library: what comes in becomes buffers, and buffers go out as what came in.

PyTorch's tensors are taken as they are, arrays of CuPy, JAX and Numba by the CUDA array interface, others by DLPack.
Nothing is copied, but an array that does not begin where the kernels' wide loads may.

Not yet run on a GPU: the tests bring stand-ins for the arrays.
"""

from __future__ import annotations

import sys
from typing import NamedTuple

import numpy as np

from fastrnn.kernels.cuda.device import Buffer, Device, get_device, is_on_gpu, library_of

__all__ = ["export", "import_array", "is_on_gpu"]

ALIGNMENT = 16  # bytes of a wide load


class View(NamedTuple):
    """What a library says of an array."""

    pointer: int
    shape: tuple[int, ...]
    dtype: np.dtype
    strides: tuple[int, ...] | None  # in elements; None where it is C-contiguous
    stream: int | None  # whose work on it must be waited for


def import_array(x, name: str = "x", dtypes=("float32", "float64"), device: Device | None = None):
    """An array on a GPU as a buffer that shares its memory.

    Parameters
    ----------
    x : an array on a GPU
        A tensor of PyTorch, an array of CuPy, JAX or Numba, or any with the CUDA array interface or DLPack. It may be
        read-only.
    name : str
        What an error calls it.
    dtypes : of str
        Those that are allowed.
    device : Device, optional
        Where it must be; otherwise where it is.

    Returns
    -------
    Buffer, numpy.dtype, tuple of int
        The shape is as it came.

    Raises
    ------
    TypeError
        If x has another dtype.
    ValueError
        If x is not C-contiguous, or on another GPU.
    """
    here = get_device(x)
    device = device or here
    if here.ordinal != device.ordinal:
        raise ValueError(f"{name} is on GPU {here.ordinal}, expected on GPU {device.ordinal} as the other arrays")
    view = _view(x, name, device)
    if view.dtype.name not in dtypes:
        raise TypeError(f"{name} has dtype {view.dtype.name}, expected {' or '.join(dtypes)}")
    if not _contiguous(view):
        raise ValueError(
            f"{name} is not C-contiguous: its shape is {view.shape}, its strides are {view.strides} elements. "
            f"Make it contiguous first: {_remedy(x, name)}"
        )
    if view.stream is not None:
        device.follow(view.stream)
    buffer = Buffer(device, view.pointer, view.shape, view.dtype, x)
    return _aligned(buffer), view.dtype, view.shape


def export(buffer: Buffer, like):
    """The buffer's array in the kind of `like`: a tensor of PyTorch, an array of CuPy or JAX, else one of Numba.

    It shares the buffer's memory. Where `like` is not on a GPU, the numbers come back to a NumPy array.
    """
    if not is_on_gpu(like):
        return buffer.device.download(buffer)
    library = library_of(like)
    if library == "torch":
        return _torch(buffer)
    if library == "cupy":
        return _cupy(buffer)
    if library == "jax":
        return _jax(buffer)
    from numba import cuda

    return cuda.as_cuda_array(buffer, sync=False)  # used on the stream that it was made on


# ---- in


def _view(x, name: str, device: Device) -> View:
    library = library_of(x)
    if library == "torch":
        return _view_of_tensor(x, name)
    if library == "jax":
        x.block_until_ready()  # it names no stream to wait for
    if hasattr(x, "__cuda_array_interface__"):
        return _view_of_interface(x.__cuda_array_interface__, name)
    return _view_of_dlpack(x, device)


def _view_of_tensor(x, name: str) -> View:
    """Of one of PyTorch, which works on the stream that we work on."""
    dtype = str(x.dtype).removeprefix("torch.")
    if dtype not in np.sctypeDict:  # bfloat16
        raise TypeError(f"{name} has dtype {dtype}, expected one that NumPy has")
    strides = None if x.is_contiguous() else tuple(x.stride())
    return View(x.data_ptr(), tuple(x.shape), np.dtype(dtype), strides, None)


def _view_of_interface(interface: dict, name: str) -> View:
    if interface.get("mask") is not None:
        raise ValueError(f"{name} is a masked array, expected one without a mask")
    dtype = np.dtype(interface["typestr"])
    strides = interface.get("strides")
    if strides is not None:
        strides = tuple(stride // dtype.itemsize for stride in strides)
    return View(interface["data"][0] or 0, tuple(interface["shape"]), dtype, strides, interface.get("stream"))


def _view_of_dlpack(x, device: Device) -> View:
    """Of what has no other way. Its library lets our stream wait for it."""
    from cuda.core.utils import StridedMemoryView

    view = StridedMemoryView.from_dlpack(x, stream_ptr=device.stream())
    return View(int(view.ptr), tuple(view.shape), np.dtype(view.dtype), view.strides, None)


def _contiguous(view: View) -> bool:
    """Whether elements lie as in C; the strides of lengths 0 and 1 say nothing."""
    if view.strides is None or 0 in view.shape:
        return True
    expected = 1
    for length, stride in zip(reversed(view.shape), reversed(view.strides), strict=True):
        if length != 1 and stride != expected:
            return False
        expected *= length
    return True


def _remedy(x, name: str) -> str:
    library = library_of(x)
    return {"torch": f"{name}.contiguous()", "cupy": f"cupy.ascontiguousarray({name})"}.get(library, f"copy {name}")


def _aligned(buffer: Buffer) -> Buffer:
    if buffer.pointer % ALIGNMENT == 0:
        return buffer
    copy = buffer.device.empty(buffer.shape, buffer.dtype)
    buffer.device.copy(copy, buffer)
    return copy


# ---- out


def _torch(buffer: Buffer):
    torch = sys.modules["torch"]
    own = buffer.owner
    if isinstance(own, torch.Tensor) and tuple(own.shape) == buffer.shape and own.data_ptr() == buffer.pointer:
        return own
    return torch.as_tensor(buffer, device=torch.device("cuda", buffer.device.ordinal))


def _cupy(buffer: Buffer):
    cupy = sys.modules["cupy"]
    own = buffer.owner
    if isinstance(own, cupy.ndarray) and own.shape == buffer.shape and own.data.ptr == buffer.pointer:
        return own
    with cupy.cuda.Device(buffer.device.ordinal):
        return cupy.asarray(buffer)


def _jax(buffer: Buffer):
    """By DLPack. JAX does not know the stream that we work on: the work on the array is waited for."""
    from cuda.core import Buffer as Bytes
    from cuda.core.utils import StridedMemoryView
    from jax import dlpack

    buffer.device.wait()
    whole = Bytes.from_handle(buffer.pointer, buffer.nbytes, owner=buffer)
    return dlpack.from_dlpack(StridedMemoryView.from_buffer(whole, buffer.shape, dtype=buffer.dtype))
