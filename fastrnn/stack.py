"""A stack of layers on the CPU as functions of arrays, for the frameworks that keep parameters and tapes themselves.

Arrays are contiguous and checked, (T, B, ...) inside. What forward keeps for backward is a list of arrays, which a
framework can store, free early or compute again.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from fastrnn import backend as backends

Array = np.ndarray
Rows = tuple[Array | None, Array | None]  # lengths and reset, checked

_NAMES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")


class Spec(NamedTuple):
    """What the sizes of the parameters do not tell."""

    cell: str
    each: int  # parameters of a direction of a layer: 2, or 4 with biases; and 1 for a projection
    directions: int

    @property
    def names(self) -> list[str]:
        return [*_NAMES[: self.each // 2 * 2], *_NAMES[4 : 4 + self.each % 2]]

    def split(self, params: Sequence[Any]) -> list[dict[str, Any]]:
        """Return the parameters of each layer and direction by name."""
        names, each = self.names, self.each
        return [dict(zip(names, params[at : at + each], strict=True)) for at in range(0, len(params), each)]

    def sizes(self, params: Sequence[Any]) -> tuple[int, int, int]:
        """Return how many layers and directions there are, the size of h and that of a cell."""
        W = params[1].shape[1]
        return len(params) // self.each, W, params[self.each - 1].shape[1] if self.each % 2 else W

    def kept_shapes(self, T: Any, B: Any, params: Sequence[Any]) -> list[tuple[Any, ...]]:
        """Return the shapes of what `forward` keeps: the outputs of the layers below, and the tapes."""
        from fastrnn.kernels import cells

        K, W, H = self.sizes(params)
        cell = cells.LSTM_PROJECTED if self.each % 2 else cells.CELLS[self.cell]
        outputs = [(T, B, self.directions * W)] * (K // self.directions - 1)
        return [*outputs, *[(T * B * cell.tape * H,)] * K]


def prepare(spec: Spec, params: Sequence[Array]) -> list[Any]:
    """Return each layer's directions in the hands of the backend, which notices when the numbers change."""
    one = backends.load("cpu").prepare
    return [one(spec.cell, part) for part in spec.split(params)]


def initial(spec: Spec, prepared: list[Any], h: Array | None, c: Array | None, B: int) -> tuple[Array, ...]:
    """Return the initial states, each (layers · directions, B, size)."""
    one = prepared[0]
    if h is None:
        h = np.zeros((len(prepared), B, one.h), one.dtype)
    if spec.cell != "lstm":
        return (h,)
    return h, np.zeros((len(prepared), B, one.hidden), one.dtype) if c is None else c


def _join(states: list[Any]) -> list[Array]:
    """Return the states of all layers and directions, each (layers · directions, B, size)."""
    if len(states) == 1:
        return [s.reshape(1, *s.shape[-2:]) for s in states[0]]
    return [np.stack([s.reshape(s.shape[-2:]) for s in same]) for same in zip(*states, strict=True)]


def forward(
    spec: Spec,
    prepared: list[Any],
    x: Array,
    states: tuple[Array, ...],
    masks: Sequence[Array],
    rows: Rows,
    training: bool,
    recurrent_masks: Sequence[Array | None] = (),
) -> tuple[Array, list[Array], list[Array]]:
    """Return the output, the last states, and what `backward` needs: outputs of the layers below, and tapes.

    `masks` are factors of the outputs below the top, one for each; `recurrent_masks` those of h in the recurrent
    product (see `fastrnn.functional.forward`), one for each direction of each layer.
    """
    (lengths, reset), D, W = rows, spec.directions, prepared[0].h
    outputs: list[Array] = []
    tapes, last, output = [], [], x
    for k, one in enumerate(prepared):
        d = k % D
        if d == 0:
            if k:
                outputs.append(output)
                x = output * masks[k // D - 1] if masks else output
            # Both directions write into one buffer, which is the next layer's input as it is.
            output = np.empty((*x.shape[:2], D * W), one.dtype)
        options = {"lengths": lengths, "reset": reset, "reverse": d == 1, "training": training}
        factors = recurrent_masks[k] if len(recurrent_masks) else None
        _, new, tape = one.forward(
            x, tuple([s[k] for s in states]), **options, output=output, column=d * W, recurrent_masks=factors
        )
        last.append(new)
        if training:
            tapes.append(tape.walk.tape)
    return output, _join(last), [*outputs, *tapes] if training else []


def backward(
    spec: Spec,
    prepared: list[Any],
    x: Array,
    states: tuple[Array, ...],
    masks: Sequence[Array],
    tape: tuple[Array, Sequence[Array]],
    rows: Rows,
    d_output: Array | None,
    d_states: Sequence[Array | None],
    recurrent_masks: Sequence[Array | None] = (),
) -> tuple[Array, list[Array], list[Array]]:
    """Return the gradients of x, the initial states and the parameters; `tape` is the output and what was kept."""
    (output, kept), (lengths, reset) = tape, rows
    D, W, K = spec.directions, prepared[0].h, len(prepared)
    backward = backends.load("cpu").backward
    outputs, tapes = [*kept[: K // D - 1], output], kept[K // D - 1 :]
    d_params: list[dict[str, Array]] = [{}] * K
    d_initial: list[Any] = [None] * K
    gradient = d_output
    for layer in reversed(range(K // D)):
        below = outputs[layer - 1] if layer else x
        below = below * masks[layer - 1] if layer and masks else below
        dx = None
        for d in range(D):
            k = layer * D + d
            own = tuple([s[k] for s in states])
            options = {"lengths": lengths, "reset": reset, "reverse": d == 1}
            options["recurrent_masks"] = recurrent_masks[k] if len(recurrent_masks) else None
            one = prepared[k].tape(below, own, outputs[layer], d * W, tapes[k], **options)
            columns = gradient if gradient is None or D == 1 else gradient[..., d * W : (d + 1) * W]
            d_last = tuple([None if s is None else s[k] for s in d_states])
            dx_d, d_params[k], d_initial[k] = backward(
                one,
                None if columns is None else np.ascontiguousarray(columns),
                None if all(s is None for s in d_last) else d_last,
            )
            dx = dx_d if dx is None else np.add(dx, dx_d, out=dx)
        gradient = dx
        if layer and masks:
            gradient *= masks[layer - 1]
    assert gradient is not None
    return gradient, _join(d_initial), [part[name] for part in d_params for name in spec.names]
