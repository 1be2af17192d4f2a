"""Layers one above the other on a GPU: what lies between them stays there, and both directions of one go together."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from fastrnn.kernels.cuda import layer
from fastrnn.kernels.cuda.products import scaled


class Tape(NamedTuple):
    """What backward needs of forward."""

    tapes: list
    masks: list  # Buffers, of what goes into layers 1, 2, ...; empty without dropout
    to_host: bool


class Stack:
    """The layers, with their parameters as NumPy arrays: one dict for each layer and direction, layer by layer."""

    def __init__(self, backend, cell, parts, directions):
        self.backend, self.cell, self.parts, self.directions = backend, cell, parts, directions
        self._uploaded: dict = {}  # of each device: copies of the parameters as they were, and the layers

    def forward(self, x, state, *, lengths=None, reset=None, training=False, recompute=False, masks=()):
        """Run all layers.

        x (T, B, I) and state, of h and perhaps c (layers * D, B, .), are all NumPy arrays or all Buffers, and so are
        the results: output, state, and a Tape or None. masks: of what goes into layers 1, 2, ...
        """
        to_host = isinstance(x, np.ndarray)
        device = self.backend.device_of(x)

        D, options = self.directions, layer.options_of(device, lengths, reset, 0b10)
        x, state, masks = (device.to_buffer(x), tuple(map(device.to_buffer, state)), list(map(device.to_buffer, masks)))
        last = tuple(device.empty(part.shape, part.dtype) for part in state)
        tapes = []
        for k, given in enumerate(self._layers(device)):
            if k and masks:
                x = scaled(device, x, masks[k - 1])
            initial = tuple(_part(part, k * D, D) for part in state)
            x, final, tape = layer.forward(given, x, initial, options, training=training, recompute=recompute)
            for whole, part in zip(last, final, strict=True):
                device.copy(_part(whole, k * D, D), part)
            tapes.append(tape)
        if to_host:
            x, last = to_numpy(device, (x, last))
        return x, last, Tape(tapes, masks, to_host) if training else None

    def backward(self, tape, d_output, d_state):
        """Gradients: dx, a dict of the parameters' for each layer and direction, and the initial states'.

        d_output (T, B, D W) or None; d_state like the state, with None for those that are 0.
        """
        device, D = tape.tapes[0].layer.device, self.directions
        gradient, d_state = device.to_buffer(d_output), tuple(map(device.to_buffer, d_state))
        dparams: list[Any] = []
        shapes = [part.shape for part in tape.tapes[0].initial]
        whole = [(len(self.parts), *shape[-2:]) for shape in shapes]
        d_initial = tuple(device.empty(shape, tape.tapes[0].x.dtype) for shape in whole)
        for k in reversed(range(len(tape.tapes))):
            d_final = tuple(None if part is None else _part(part, k * D, D) for part in d_state)
            gradient, made, d_own = layer.backward(tape.tapes[k], gradient, d_final)
            dparams = [*made, *dparams]
            for target, part in zip(d_initial, d_own, strict=True):
                device.copy(_part(target, k * D, D), part)
            if k and tape.masks:
                gradient = scaled(device, gradient, tape.masks[k - 1])
        made = gradient, dparams, d_initial
        return to_numpy(device, made) if tape.to_host else made

    def _layers(self, device):
        """The layers with their parameters on the device, where these stay until they change here."""
        arrays = [array for part in self.parts for array in part.values()]
        copies, layers = self._uploaded.get(device, (None, None))
        if copies is None or not all(map(_same_bits, copies, arrays)):
            parts = [{name: device.upload(array) for name, array in part.items()} for part in self.parts]
            D, cell = self.directions, layer.name_of(self.cell, parts[0])
            layers = [
                layer.Layer(device, cell, tuple(parts[k : k + D]), self.backend.mode, self.backend.way, {})
                for k in range(0, len(parts), D)
            ]
            self._uploaded[device] = [array.copy() for array in arrays], layers
        return layers


def _same_bits(a, b):
    """As numbers NaN would differ from itself, and 0 be the same as -0."""
    whole = f"u{a.dtype.itemsize}"
    return np.array_equal(a.view(whole), b.view(whole))


def to_numpy(device, made):
    """Buffers in tuples, lists and dicts as arrays, once they are there and known to be valid."""

    def download(value):
        if isinstance(value, dict):
            return {name: download(part) for name, part in value.items()}
        if isinstance(value, (tuple, list)):
            return type(value)(map(download, value))
        return device.download(value)

    arrays = download(made)
    if device.download(device.status)[0]:
        device.fill(device.status, 0)
        raise RuntimeError("a block of a persistent kernel waited in vain for another: its results are not valid")
    return arrays


def _part(buffer, first, count):
    """Those of a state (layers * D, B, .) that are `count` from `first` on."""
    each = buffer.size // buffer.shape[0]
    return buffer.at(first * each).reshape(count, *buffer.shape[1:])
