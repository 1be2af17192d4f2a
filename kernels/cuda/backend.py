"""The backend's three functions, for NumPy arrays and for arrays that are on a GPU."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from fastrnn.kernels.cuda import layer
from fastrnn.kernels.cuda.arrays import export, import_array, is_on_gpu
from fastrnn.kernels.cuda.device import get_device
from fastrnn.kernels.cuda.exchange import MODES
from fastrnn.kernels.cuda.plan import WAYS
from fastrnn.kernels.cuda.stack import Stack, to_numpy


class Tape(NamedTuple):
    """What backward needs of forward, and whether its results are to come back as NumPy arrays."""

    tape: Any
    to_host: bool


class Prepared:
    """One layer in one direction, for calls again and again."""

    def __init__(self, backend, cell, params):
        self.backend, self.cell, self.params = backend, cell, params

    def forward(self, x, state, **options):
        """As the backend's."""
        return self.backend.forward(self.cell, x, self.params, state, **options)

    def again(self, x, steps, state):
        """Nothing is kept that would make the last call shorter."""
        return None


class Backend:
    """Forward and backward of one layer in one direction, as :mod:`fastrnn.kernels` describes them.

    `mode` is how recurrent products are made where tensor cores make them: "float32" (three products of tf32 numbers,
    as accurate as float32), "tf32", "bfloat16" or "float16", with sums in float32 in any case. `way` is "simple",
    "steps", "persistent", or None for what is fastest by the model of :mod:`fastrnn.kernels.cuda.plan`.

    Arrays are NumPy's, which are copied to the GPU and back, or all of them Buffers. Nothing waits for the GPU but what
    copies back.
    """

    def __init__(self, mode="float32", way=None, device=None):
        self.mode, self.way, self._device = mode, way, device

    def prepare(self, cell, params):
        """The layer for many calls."""
        return Prepared(self, cell, params)

    def prepare_stack(self, cell, parts, directions):
        """Layers one above the other, with parameters for each layer and direction."""
        return Stack(self, cell, parts, directions)

    # ---- arrays on a GPU

    def take(self, name, array, like=None):
        """The array as a Buffer that shares its memory, on the GPU of the Buffer `like`; `name` is for errors."""
        if not is_on_gpu(array):
            kind = type(array).__name__
            raise TypeError(f"{name} is a {kind} that is not on a GPU, and x is: expected all arrays on one GPU")
        buffer, _, _ = import_array(array, name, device=self._device or (like.device if like is not None else None))
        return buffer

    def give(self, buffers, like):
        """The Buffers as arrays of the kind of `like`."""
        return [export(buffer, like) for buffer in buffers]

    def to_numpy(self, buffers):
        """A dict of Buffers as NumPy arrays, once they are there."""
        return to_numpy(next(iter(buffers.values())).device, buffers)

    def zeros(self, like, shapes):
        """New Buffers of zeros, with the dtype and on the GPU of the Buffer `like`."""
        device = self._device or like.device
        buffers = [device.empty(shape, like.dtype) for shape in shapes]
        for buffer in buffers:
            device.fill(buffer, 0)
        return buffers

    # ---- the backend's functions

    def forward(
        self, cell, x, params, state, *, lengths=None, reset=None, reverse=False, training=False, recompute=False,
        output=None, column=0,
    ):  # fmt: skip
        """As :func:`fastrnn.kernels.reference.forward`; Buffers in, Buffers out, and no output given."""
        to_host, device = isinstance(x, np.ndarray), self.device_of(x)
        given = {name: device.to_buffer(array) for name, array in params.items()}
        given = layer.Layer(device, layer.name_of(cell, params), (given,), self.mode, self.way)
        options = layer.options_of(device, lengths, reset, int(reverse))
        x, state = device.to_buffer(x), tuple(map(device.to_buffer, state))
        result, final, tape = layer.forward(given, x, state, options, training=training, recompute=recompute)
        tape = Tape(tape, to_host) if training else None
        if not to_host:
            return result, final, tape
        result, final = to_numpy(device, (result, final))
        if output is not None:
            output[:, :, column : column + result.shape[2]] = result
            result = output
        return result, final, tape

    def backward(self, tape, d_output, d_state):
        """As :func:`fastrnn.kernels.reference.backward`."""
        tape, to_host = tape
        device = tape.layer.device
        d_final = None if d_state is None else tuple(map(device.to_buffer, d_state))
        dx, (dparams,), d_initial = layer.backward(tape, device.to_buffer(d_output), d_final)
        made = dx, dparams, d_initial
        return to_numpy(device, made) if to_host else made

    def device_of(self, x):
        """The GPU that works with x."""
        return self._device or (get_device() if isinstance(x, np.ndarray) else x.device)


def backend(name, device=None):
    """The backend of a name that :func:`fastrnn.backend.check` has seen: "cuda", with a mode and a way behind it."""
    options = name.split("-")[1:]
    mode = next((option for option in options if option in MODES), "float32")
    return Backend(mode, next((option for option in options if option in WAYS), None), device)
