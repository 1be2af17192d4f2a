"""Keras: SimpleRNN, LSTM and GRU in place of those of keras.layers, with their arguments, weights and results.

>>> import keras
>>> from fastrnn.keras import LSTM
>>> model = keras.Sequential([keras.layers.Embedding(1000, 64), LSTM(128), keras.layers.Dense(10)])
>>> model.compile("adam", "sparse_categorical_crossentropy")

`convert` puts them into a model that is there already, and `restore` takes them out again. They are subclasses of
Keras's, and only the loop over time is another: it runs in this library's kernels on the CPU, with the backends
PyTorch, JAX, TensorFlow and NumPy (which cannot train). They are saved under the package "fastrnn": import this module
before loading a model that has them.

Where they differ from Keras's own: in half precision they compute in float32 and round the results. ``use_cudnn`` and
``unroll`` mean nothing, only with JAX and NumPy an unrolled loop treats masked steps as Keras's does there. With
TensorFlow they are not compiled by XLA, and there are no second derivatives, but an error. A model that leaves Python,
by ``model.export``, has to be restored before. What the kernels do not have, other activations for example, and all on
a GPU is left to Keras's own loop, and a warning says so, once a layer.
"""

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

try:
    import keras
except ImportError as error:
    message = "fastrnn.keras needs Keras 3, and it cannot be imported: pip install 'fastrnn[keras]' and a backend of it"
    raise ImportError(message) from error

from keras import ops

from fastrnn import functional, stack
from fastrnn.stack import Spec

__all__ = ["GRU", "LSTM", "SimpleRNN", "convert", "restore"]

Array = np.ndarray
Tensor = Any  # of Keras's backend

_BACKEND = keras.backend.backend()

_SIGMOID = (keras.activations.sigmoid, ops.sigmoid)
_TANH = (keras.activations.tanh, ops.tanh)
_RELU = (keras.activations.relu, ops.relu)


# ---- one layer in one direction, as each backend calls it


class _Call(NamedTuple):
    """What a flat list of arrays is: x (T, B, I), the states, the parameters, and perhaps lengths and masks."""

    cell: str
    states: int
    params: int
    lengths: bool
    masks: bool  # of recurrent dropout, (G, B, H)

    @property
    def spec(self) -> Spec:
        return Spec(self.cell, self.params, 1)

    def split(self, tensors: Sequence[Any]) -> tuple[Any, list[Any], list[Any], Any, Any]:
        """Return x, states, parameters, lengths and masks."""
        x, *rest = tensors
        states, rest = rest[: self.states], rest[self.states :]
        params, rest = rest[: self.params], rest[self.params :]
        return x, states, params, rest[0] if self.lengths else None, rest[-1] if self.masks else None

    def forward(self, arrays: Sequence[Array], training: bool) -> list[Array]:
        """Return the output, the last states and, in training, the tape."""
        prepared, x, states, options = self._ready(arrays)
        output, last, kept = stack.forward(self.spec, prepared, x, states, (), **options, training=training)
        return [output, *[state[0] for state in last], *kept]

    def backward(
        self, arrays: Sequence[Array], output: Array, tape: Array, d_output: Any, d_last: Sequence[Any]
    ) -> list[Array]:
        """Return the gradients of x, the states and the parameters."""
        prepared, x, states, options = self._ready(arrays)
        d_states = [None if d is None else functional.contiguous(d)[None] for d in d_last]
        d_output = None if d_output is None else functional.contiguous(d_output)
        kept = functional.contiguous(output), [functional.contiguous(tape)]
        dx, d_start, d_params = stack.backward(
            self.spec, prepared, x, states, (), kept, d_output=d_output, d_states=d_states, **options
        )
        return [dx, *[d[0] for d in d_start], *d_params]

    def _ready(self, arrays: Sequence[Array]) -> tuple[list[Any], Array, tuple[Array, ...], dict[str, Any]]:
        """Return what the functions of `fastrnn.stack` take."""
        x, states, params, lengths, masks = self.split([functional.contiguous(array) for array in arrays])
        T, B, _ = x.shape
        options: dict[str, Any] = {"rows": (functional.check_lengths(lengths, T, B), None)}
        if masks is not None:
            options["recurrent_masks"] = [masks]
        return stack.prepare(self.spec, params), x, tuple(state[None] for state in states), options


_SECOND = (
    "the layers of fastrnn.keras have no second derivatives: take Keras's own where they are needed, "
    "fastrnn.keras.restore(model)"
)


def _with_numpy(call: _Call, tensors: list[Tensor], training: bool) -> list[Tensor]:
    return call.forward([np.asarray(tensor) for tensor in tensors], training=False)


def _with_torch() -> Callable[[_Call, list[Tensor], bool], list[Tensor]]:
    import torch

    import fastrnn.torch  # it defines the operators  # noqa: F401

    class Masked(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, call: _Call, *tensors: Tensor) -> tuple[Tensor, ...]:
            results = call.forward([tensor.detach().numpy() for tensor in tensors], training=True)
            output, *last, tape = map(torch.from_numpy, results)
            ctx.call = call
            ctx.save_for_backward(*tensors, output, tape)
            ctx.set_materialize_grads(False)
            return output, *last

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, *d: Tensor | None) -> tuple[Any, ...]:
            *given, output, tape = [tensor.detach().numpy() for tensor in ctx.saved_tensors]
            d_output, *d_last = [None if one is None else one.numpy() for one in d]
            gradients = ctx.call.backward(given, output, tape, d_output, d_last)
            rest = len(given) - len(gradients)
            return None, *map(torch.from_numpy, gradients), *[None] * rest

    masked = torch.compiler.disable(Masked.apply)

    def run(call: _Call, tensors: list[Tensor], training: bool) -> list[Tensor]:
        if call.masks:  # which the operators do not take
            return list(masked(call, *tensors))
        x, states, params, lengths, _ = call.split(tensors)
        h, c = (*[state[None] for state in states], None)[:2]
        taped = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *states, *params))
        output, *last, _ = torch.ops.fastrnn.forward.default(x, h, c, params, [], lengths, None, *call.spec, taped)
        return [output, *[state[0] for state in last[: call.states]]]

    return run


def _with_jax() -> Callable[[_Call, list[Tensor], bool], list[Tensor]]:
    import jax

    import fastrnn.jax

    def call_back(function: Callable[..., list[Array]], shapes: list[Any], tensors: Sequence[Tensor]) -> list[Tensor]:
        def compute(*arrays: Tensor) -> list[Array]:
            return function([np.asarray(array) for array in arrays])

        like = [jax.ShapeDtypeStruct(shape, tensors[0].dtype) for shape in shapes]
        return jax.pure_callback(compute, like, *tensors, vmap_method="sequential")

    def forward(call: _Call, tensors: Sequence[Tensor]) -> list[Tensor]:
        x, states, params, *_ = call.split(tensors)
        (T, B, _), H = x.shape, states[0].shape[-1]
        shapes = [(T, B, H), *[state.shape for state in states], *call.spec.kept_shapes(T, B, params)]
        return call_back(functools.partial(call.forward, training=True), shapes, tensors)

    @functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
    def masked(call: _Call, *tensors: Tensor) -> list[Tensor]:
        return forward(call, tensors)[:-1]

    def keep(call: _Call, *tensors: Tensor) -> Any:
        output, *last, tape = forward(call, tensors)
        return [output, *last], (tensors, output, tape)

    def go_back(call: _Call, kept: Any, d: list[Tensor]) -> Any:
        tensors, output, tape = kept
        number = len(tensors)
        differentiable = 1 + call.states + call.params

        def compute(arrays: list[Array]) -> list[Array]:
            output, tape, d_output, *d_last = arrays[number:]
            return call.backward(arrays[:number], output, tape, d_output, d_last)

        shapes = [tensor.shape for tensor in tensors[:differentiable]]
        return *call_back(compute, shapes, [*tensors, output, tape, *d]), *[None] * (number - differentiable)

    masked.defvjp(keep, go_back)

    def run(call: _Call, tensors: list[Tensor], training: bool) -> list[Tensor]:
        if call.masks:  # which fastrnn.jax does not take
            return masked(call, *tensors)
        x, states, params, lengths, _ = call.split(tensors)
        named = {f"{name}_l0": param for name, param in zip(call.spec.names, params, strict=True)}
        kind, _, variant = call.cell.partition("_")
        known: dict[str, dict[str, Any]] = {"rnn": {"nonlinearity": variant}, "gru": {"reset_after": not variant}}
        given = tuple(state[None] for state in states)
        function = getattr(fastrnn.jax, kind)
        output, last = function(x, given if kind == "lstm" else given[0], named, lengths=lengths, **known.get(kind, {}))
        return [output, *[state[0] for state in (last if kind == "lstm" else [last])]]

    return run


def _with_tensorflow() -> Callable[[_Call, list[Tensor], bool], list[Tensor]]:
    import tensorflow as tf

    def no_second(*gradients: Tensor) -> Any:
        raise NotImplementedError(_SECOND)

    def run(call: _Call, tensors: list[Tensor], training: bool) -> list[Tensor]:
        differentiable, dtype = 1 + call.states + call.params, tensors[0].dtype

        def forward(*arrays: Array) -> list[Array]:
            output, *last = call.forward(arrays, training)
            return [output, *last] if training else [output, *last, np.empty(0, output.dtype)]

        def backward(*arrays: Array) -> list[Array]:
            given, (output, tape, d_output, *d_last) = arrays[: len(tensors)], arrays[len(tensors) :]
            if not training:  # nothing was kept: gradients are rarely wanted then
                tape = call.forward(given, training=True)[-1]
            return call.backward(given, output, tape, d_output, d_last)

        @tf.custom_gradient
        def first(*inputs: Tensor) -> Any:
            def gradient(*d: Tensor) -> Any:
                @tf.custom_gradient
                def back(*known: Tensor) -> Any:
                    parts = tf.numpy_function(backward, known, [dtype] * differentiable)
                    for part, like in zip(parts, inputs, strict=False):
                        part.set_shape(like.shape)
                    return parts, no_second

                return [*back(*inputs, results[0], results[-1], *d), *[None] * (len(inputs) - differentiable)]

            results = tf.numpy_function(forward, inputs, [dtype] * (2 + call.states))
            x, states, *_ = call.split(inputs)
            shapes = [[*x.shape[:2], states[0].shape[-1]], *[state.shape for state in states]]
            for result, shape in zip(results[:-1], shapes, strict=True):
                result.set_shape(shape)
            return results[:-1], gradient

        return list(first(*tensors))

    return run


@functools.cache
def _runner() -> Callable[[_Call, list[Tensor], bool], list[Tensor]]:
    """Return how Keras's backend runs a layer, or raise ImportError."""
    ways = {"torch": _with_torch, "jax": _with_jax, "tensorflow": _with_tensorflow, "numpy": lambda: _with_numpy}
    if _BACKEND not in ways:
        raise ImportError(f"Keras's backend is {_BACKEND}, and fastrnn.keras works with {', '.join(ways)}")
    return ways[_BACKEND]()


@functools.cache
def _has_gpu() -> bool:
    """Whether Keras computes on a GPU, or another device, unless it is told not to."""
    if _BACKEND == "torch":
        import torch

        return torch.cuda.is_available()
    if _BACKEND == "jax":
        import jax

        return jax.default_backend() != "cpu"
    if _BACKEND == "tensorflow":
        import tensorflow as tf

        return len(tf.config.list_physical_devices()) > len(tf.config.list_physical_devices("CPU"))
    return False


# ---- masks: a masked step changes nothing, and so the other steps are computed alone, side by side


class _Steps:
    """Which steps of a batch count, of a mask (B, T)."""

    def __init__(self, mask: Tensor) -> None:
        valid = ops.cast(mask, "int32")
        self.mask = mask
        self.seen = ops.cumsum(valid, axis=1)
        self.lengths = ops.sum(valid, axis=1)
        # Padding on the right, which is the usual, needs no copy.
        self.in_front = ops.all(ops.logical_or(mask[:, :-1], ops.logical_not(mask[:, 1:])))
        self._valid = valid

    def gather(self, x: Tensor) -> Tensor:
        """Return x (B, T, I) with each row's valid steps in front, in their order."""
        steps = ops.cumsum(ops.ones_like(self._valid), axis=1)
        order = ops.argsort(steps + (1 - self._valid) * steps[:, -1:], axis=1)
        return ops.cond(self.in_front, lambda: x, lambda: ops.take_along_axis(x, order[:, :, None], axis=1))

    def spread(self, output: Tensor, before: Tensor | None) -> Tensor:
        """Return the output (B, T, H) of gathered steps where they were.

        A masked step repeats what stands before it, and `before` (B, H) where there is none; None: it is 0.
        """

        def back() -> Tensor:
            return ops.take_along_axis(output, ops.maximum(self.seen - 1, 0)[:, :, None], axis=1)

        if before is None:
            # Beyond a row's length the output is 0 as it is.
            return ops.cond(
                self.in_front,
                lambda: output,
                lambda: ops.where(self.mask[:, :, None], back(), ops.zeros_like(output)),
            )
        return ops.where(self.seen[:, :, None] > 0, back(), before[:, None, :])


# ---- the layers


class _Recurrent(keras.layers.RNN):
    """What SimpleRNN, LSTM and GRU put in the place of Keras's loop."""

    _order: tuple[int, ...]  # Keras's gates in PyTorch's order

    def inner_loop(self, sequences: Tensor, initial_state: Any, mask: Any, training: bool = False) -> Any:
        """Return the last output, the outputs and the last states; Keras calls it."""
        reason = self._why_not(sequences, training)
        if reason is not None:
            self._tell(reason)
            return super().inner_loop(sequences, initial_state, mask, training)
        params = self._params()
        dtype = params[0].dtype
        x = ops.cast(sequences, dtype)
        states = [ops.cast(state, dtype) for state in keras.tree.flatten(initial_state)]
        if self.stateful and _BACKEND == "torch":  # Keras writes the new states there, before a gradient is wanted
            states = [ops.copy(state) for state in states]
        x, params[0] = self._dropped(x, params[0], training)
        steps = None
        mask = keras.tree.flatten(mask)
        if mask and mask[0] is not None:
            mask = ops.reshape(ops.cast(mask[0], "bool"), ops.shape(x)[:2])
            steps = _Steps(ops.flip(mask, axis=1) if self.go_backwards else mask)
        x = ops.flip(x, axis=1) if self.go_backwards else x
        return self._results(self._run(x, states, params, steps, training), states[0], steps)

    def _run(self, x: Tensor, states: list[Tensor], params: list[Tensor], steps: _Steps | None, training: bool) -> Any:
        """Return the output (B, T, H) of valid steps, and the last states."""
        masks = []
        if training and self._drops(self.cell.recurrent_dropout):
            own = self.cell.get_recurrent_dropout_mask(states[0])
            masks = [ops.stack([own[gate] for gate in self._order] if isinstance(own, list) else [own])]
        tensors = [ops.transpose(x if steps is None else steps.gather(x), (1, 0, 2)), *states, *params]
        if steps is not None:
            tensors.append(steps.lengths)
        cell = self._kind()
        assert cell is not None  # or Keras's loop would run
        call = _Call(cell, len(states), len(params), steps is not None, bool(masks))
        output, *last = _runner()(call, [*tensors, *masks], bool(training))
        return ops.transpose(output, (1, 0, 2)), last

    def _results(self, computed: Any, h: Tensor, steps: _Steps | None) -> Any:
        """Return what Keras's loop would, at masked steps, too."""
        output, last = computed
        # Keras's backends are of two minds about the output before the first step that counts; and these two forget
        # to make masked steps zero in an unrolled loop.
        scans = _BACKEND in ("jax", "numpy")
        before = h if scans and not self.unroll else ops.zeros_like(h)
        if self.zero_output_for_mask and not (scans and self.unroll):
            before = None
        if self.return_sequences:
            output = output if steps is None else steps.spread(output, before)
            return output[:, -1], output, last
        end = last[0]
        if steps is not None:
            counts = steps.mask[:, -1:] if before is None else steps.lengths[:, None] > 0
            end = ops.where(counts, end, ops.zeros_like(end) if before is None else before)
        return end, end[:, None], last

    def _params(self) -> list[Tensor]:
        """Return the weights under PyTorch's conventions, in float32 or float64."""
        cell = self.cell
        dtype = "float64" if cell.compute_dtype == "float64" else "float32"
        weights = [w for w in (cell.kernel, cell.recurrent_kernel, cell.bias) if w is not None]
        kernel, recurrent, *bias = [self._reordered(ops.cast(ops.convert_to_tensor(w), dtype)) for w in weights]
        if bias:
            bias = [bias[0][0], bias[0][1]] if len(bias[0].shape) == 2 else [bias[0], ops.zeros_like(bias[0])]
        return [ops.transpose(kernel), ops.transpose(recurrent), *bias]

    def _reordered(self, weight: Tensor) -> Tensor:
        """Return a weight (..., G · H) with its gates in PyTorch's order."""
        if self._order == tuple(range(len(self._order))):
            return weight
        parts = ops.split(weight, len(self._order), axis=-1)
        return ops.concatenate([parts[gate] for gate in self._order], axis=-1)

    def _dropped(self, x: Tensor, weight: Tensor, training: bool) -> tuple[Tensor, Tensor]:
        """Return x (B, T, I) after dropout, and weight_ih for it. The mask is the cell's, with its random numbers."""
        if not (training and self._drops(self.cell.dropout)):
            return x, weight
        masks = self.cell.get_dropout_mask(x[:, 0, :])
        if not isinstance(masks, list):
            return x * masks[:, None, :], weight
        # A mask a gate: each gate has an input of its own then, side by side, and 0 for a weight of the others'.
        G, (rows, I) = len(self._order), weight.shape
        x = ops.concatenate([x * masks[gate][:, None, :] for gate in self._order], axis=-1)
        own = ops.reshape(ops.eye(G, dtype=weight.dtype), (G, 1, G, 1))
        return x, ops.reshape(ops.reshape(weight, (G, rows // G, 1, I)) * own, (rows, G * I))

    def _drops(self, rate: float) -> bool:
        """Whether Keras's cell drops at that rate."""
        return 0.0 < rate < 1.0

    def _kind(self) -> str | None:
        """Return the kernels' name of the cell, or None if they do not have it."""
        raise NotImplementedError

    def _why_not(self, sequences: Tensor, training: bool) -> str | None:
        """Return why the kernels cannot take a call, or None."""
        if self._kind() is None:
            names = [keras.activations.serialize(self.activation)]
            if hasattr(self, "recurrent_activation"):
                names.append(keras.activations.serialize(self.recurrent_activation))
            return f"they do not have the activation {' with '.join(map(str, names))}"
        if _has_gpu() and getattr(getattr(sequences, "device", None), "type", "gpu") not in ("cpu", "meta"):
            return "they are not called on a GPU"
        return None

    def _is_left_to_keras(self) -> bool:
        return self._kind() is None or _has_gpu()

    def _tell(self, reason: str) -> None:
        if not getattr(self, "_has_told", False):
            self._has_told = True
            name = f"{self.name} ({type(self).__name__} of fastrnn.keras)"
            warnings.warn(f"{name} runs in Keras's own loop and not in fastrnn's kernels: {reason}", stacklevel=3)

    # Keras sets these at any time, and finds again what it has set once the layer is its own again: see `restore`.

    @property
    def use_cudnn(self) -> Any:
        """False, for Keras would go past `inner_loop` otherwise; where Keras computes, what was asked for."""
        return self.__dict__.get("use_cudnn", "auto") if self._is_left_to_keras() else False

    @use_cudnn.setter
    def use_cudnn(self, value: Any) -> None:
        self.__dict__["use_cudnn"] = value

    @property
    def supports_jit(self) -> bool:
        return self.__dict__.get("supports_jit", True) and (_BACKEND != "tensorflow" or self._is_left_to_keras())

    @supports_jit.setter
    def supports_jit(self, value: bool) -> None:
        self.__dict__["supports_jit"] = value


@keras.saving.register_keras_serializable(package="fastrnn")
class SimpleRNN(_Recurrent, keras.layers.SimpleRNN):
    """Elman layer, in place of ``keras.layers.SimpleRNN``, with its arguments.

    The kernels have the activations "tanh", "relu" and "sigmoid".

    Examples
    --------
    >>> tuple(SimpleRNN(5)(np.zeros((4, 7, 3))).shape)
    (4, 5)
    """

    _order = (0,)

    def _kind(self) -> str | None:
        names = {"rnn_tanh": _TANH, "rnn_relu": _RELU, "rnn_sigmoid": _SIGMOID}
        return next((name for name, known in names.items() if self.activation in known), None)

    def _drops(self, rate: float) -> bool:
        return rate > 0.0


@keras.saving.register_keras_serializable(package="fastrnn")
class LSTM(_Recurrent, keras.layers.LSTM):
    """Long short-term memory, in place of ``keras.layers.LSTM``, with its arguments.

    The kernels have the activation "tanh" with the recurrent activation "sigmoid".

    Examples
    --------
    >>> tuple(LSTM(5, return_sequences=True)(np.zeros((4, 7, 3))).shape)
    (4, 7, 5)
    """

    _order = (0, 1, 2, 3)

    def _kind(self) -> str | None:
        return "lstm" if self.activation in _TANH and self.recurrent_activation in _SIGMOID else None


@keras.saving.register_keras_serializable(package="fastrnn")
class GRU(_Recurrent, keras.layers.GRU):
    """Gated recurrent unit, in place of ``keras.layers.GRU``, with its arguments, ``reset_after`` either way.

    The kernels have the activation "tanh" with the recurrent activation "sigmoid".

    Examples
    --------
    >>> tuple(GRU(5)(np.zeros((4, 7, 3))).shape)
    (4, 5)
    """

    _order = (1, 0, 2)

    def _kind(self) -> str | None:
        if self.activation not in _TANH or self.recurrent_activation not in _SIGMOID:
            return None
        return "gru" if self.reset_after else "gru_reset_before"


# ---- layers of Keras, and back

_KINDS: dict[type, type] = {
    keras.layers.SimpleRNN: SimpleRNN,
    keras.layers.LSTM: LSTM,
    keras.layers.GRU: GRU,
}
_CELLS: dict[type, type] = {
    keras.layers.SimpleRNNCell: SimpleRNN,
    keras.layers.LSTMCell: LSTM,
    keras.layers.GRUCell: GRU,
}
_BACK = {ours: theirs for theirs, ours in _KINDS.items()}

Filter = Callable[[Any], bool]


def convert(model: Any, filter: Filter | None = None) -> Any:
    """Put these layers in the place of each SimpleRNN, LSTM and GRU of Keras in a model, which is modified.

    The layers stay the same objects and become of another class: weights, names, states, the optimizer and what else
    the model was compiled with go on as they were. It looks into wrappers (Bidirectional, TimeDistributed), models in
    models and attributes of subclassed ones; a ``keras.layers.RNN`` of one of their cells is such a layer, too.

    Parameters
    ----------
    model : keras.Model or keras.layers.Layer
        Built or not. Layers of this library in it stay.
    filter : function of a layer to bool, optional
        Which of them to replace; by default all.

    Returns
    -------
    keras.Model or keras.layers.Layer
        The model itself.

    Raises
    ------
    TypeError
        If it is no model, or there is a layer that cannot be replaced: one of a subclass, which may compute something
        else, or an RNN of several such cells. The model is as it was then: leave that layer out with `filter`.
    ValueError
        If there is no such layer in it.

    Examples
    --------
    >>> model = keras.Sequential([keras.layers.LSTM(5), keras.layers.Dense(2)])
    >>> type(convert(model).layers[0])
    <class 'fastrnn.keras.LSTM'>
    >>> type(restore(model).layers[0]) is keras.layers.LSTM  # for who does not have fastrnn, before it is saved
    True
    """
    return _swap(model, filter, _class_of_ours, "SimpleRNN, LSTM or GRU of Keras")


def restore(model: Any, filter: Filter | None = None) -> Any:
    """Put Keras's layers in the place of each of these in a model: the inverse of `convert`, and just like it.

    What was an RNN of a cell becomes the layer of that cell.
    """
    return _swap(model, filter, _class_of_keras, "SimpleRNN, LSTM or GRU of fastrnn.keras")


def _class_of_ours(layer: Any) -> type | None:
    """Return what class takes the place of a layer's, None where it is no such layer, or raise TypeError."""
    if type(layer) in _BACK:
        return type(layer)
    if type(layer) is keras.layers.RNN:
        cell = layer.cell
        cells = cell.cells if isinstance(cell, keras.layers.StackedRNNCells) else []
        if any(type(one) in _CELLS for one in cells):
            raise TypeError("it is an RNN of several cells: give each a layer of its own")
        return _CELLS.get(type(cell))
    if isinstance(layer, tuple(_KINDS)) and type(layer) not in _KINDS:
        raise TypeError(f"it is of the subclass {_path(type(layer))}, which may compute something else")
    return _KINDS.get(type(layer))


def _class_of_keras(layer: Any) -> type | None:
    if isinstance(layer, _Recurrent) and type(layer) not in _BACK:
        raise TypeError(f"it is of the subclass {_path(type(layer))}, which Keras does not have")
    return _BACK.get(type(layer))


def _path(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _swap(model: Any, filter: Filter | None, choose: Callable[[Any], type | None], what: str) -> Any:
    if not isinstance(model, keras.layers.Layer):
        raise TypeError(f"model is a {type(model).__name__}, expected a keras.Model or a layer")
    layers = list(model._flatten_layers())
    new = []
    for layer in layers:
        try:
            kind = None if filter is not None and not filter(layer) else choose(layer)
        except TypeError as error:
            raise TypeError(f"{layer.name} cannot be replaced: {error}, or leave it out with filter") from None
        if kind is not None:
            new.append((layer, kind))
    if not new:
        raise ValueError(f"model {model.name} has no {what}" + " that filter lets through" * (filter is not None))
    for layer, kind in new:
        # Another class for the same object is all: ours add methods to Keras's, and no attributes. Whoever holds the
        # layer, the graph of a functional model, an optimizer or a wrapper, need not be told.
        object.__setattr__(layer, "__class__", kind)
        if layer.input_spec is None:  # it was a plain RNN, which has less
            layer.input_spec = keras.layers.InputSpec(ndim=3)
            layer.__dict__.setdefault("use_cudnn", "auto")
    for layer in layers:
        if isinstance(layer, keras.Model):
            _forget_programs(layer)
    return model


def _forget_programs(model: Any) -> None:
    """Let a model make its programs anew, which hold the loops that its layers had."""
    model.train_function = model.test_function = model.predict_function = None
    if _BACKEND == "tensorflow" and model.compiled and model.jit_compile:
        model.jit_compile = model._resolve_auto_jit_compile()
