"""PyTorch: RNN, LSTM, GRU and their cells in place of those of torch.nn, with their arguments, parameters and results.

>>> import torch
>>> from fastrnn.torch import LSTM
>>> lstm = LSTM(8, 16, num_layers=2)
>>> output, (h, c) = lstm(torch.zeros(20, 4, 8))  # time, batch, input
>>> output.sum().backward()
>>> lstm.weight_hh_l0.grad.shape
torch.Size([64, 16])

`replace_` puts them into a model that is there already. They compute in float32 and float64, on the CPU on PyTorch's
threads (Linux; elsewhere on their own), as many as ``torch.get_num_threads()`` says unless FASTRNN_NUM_THREADS or
`fastrnn.set_num_threads` says another number; tensors on an NVIDIA GPU take the backend "cuda".

Second and forward-mode derivatives (``create_graph=True``, dual tensors, jvp, jacfwd, hessian) come out of a loop over
time in PyTorch's operations, and take as long as such loops do. torch.func's vmap and grad call the kernels: once if x,
states, lengths or resets are mapped over, once for each place on the mapped axis if parameters are, or have gradients.

Where they differ from torch.nn's: ``lengths=`` and ``reset=`` may be given; a sequence of no steps is one, too; vmap
works; under autocast they compute, and return, what their parameters are of. Half precision and torch.jit.script raise.
"""

import functools
import math
import numbers
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

try:
    import torch
except ImportError as error:
    message = "fastrnn.torch needs PyTorch, and it cannot be imported: pip install 'fastrnn[torch]', or see pytorch.org"
    raise ImportError(message) from error

from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.nn.utils.rnn import PackedSequence

from fastrnn import functional, stack, torch_func
from fastrnn.kernels import threads
from fastrnn.stack import Rows, Spec
from fastrnn.weights import GATES, Architecture

__all__ = ["GRU", "LSTM", "RNN", "GRUCell", "LSTMCell", "RNNCell", "from_torch", "replace_", "restore_", "to_torch"]

Array = np.ndarray

threads.follow(torch.get_num_threads, f"{torch.__path__[0]}/lib/libtorch_cpu.so")

_DTYPES = (torch.float32, torch.float64)


def _array(tensor: Tensor) -> Array:
    """Return an array that shares the tensor's memory, where this is in order."""
    try:
        array = (tensor.detach() if tensor.requires_grad else tensor).numpy()
    except RuntimeError:  # a lazy negative, or zeros without memory
        array = tensor.numpy(force=True)
    return functional.contiguous(array)


_tensor = torch.from_numpy


def _prepare(spec: Spec, params: Sequence[Tensor]) -> list[Any]:
    return stack.prepare(spec, [_array(param) for param in params])


# ---- the operators, for torch.compile, torch.export and all who look into a program

_SCHEMAS = (
    "forward(Tensor x, Tensor? h, Tensor? c, Tensor[] params, Tensor[] masks, Tensor? lengths, Tensor? reset, "
    "str cell, int each, int directions, bool training) -> (Tensor, Tensor, Tensor, Tensor[])",
    "backward(Tensor? d_output, Tensor? d_h, Tensor? d_c, Tensor x, Tensor? h, Tensor? c, Tensor output, "
    "Tensor[] params, Tensor[] masks, Tensor[] kept, Tensor? lengths, Tensor? reset, str cell, int each, "
    "int directions) -> (Tensor, Tensor, Tensor, Tensor[])",
)


def _optional(tensor: Tensor | None) -> Array | None:
    return None if tensor is None else _array(tensor)


def _rows(lengths: Any, reset: Any, T: int, B: int) -> Rows:
    return functional.check_lengths(lengths, T, B), functional.check_reset(reset, (T, B), "(T, B)")


def _check_operands(
    spec: Spec, x: Tensor, h: Tensor | None, c: Tensor | None, params: list[Tensor], masks: list[Tensor]
) -> None:
    """Check what an operator is given, for whoever calls it need not be one of the modules."""
    (cell, each, D), count = spec, len(params)
    projected = each in (3, 5) and cell == "lstm"
    known = cell in GATES and (each in (2, 4) or projected) and D in (1, 2) and count and count % (each * D) == 0
    if not known or any(tensor.dim() != n for tensor, n in zip((x, *params[:2]), (3, 2, 2), strict=True)):
        raise ValueError(f"x of shape {tuple(x.shape)} and {count} parameters, expected (T, B, I) and those of {spec}")
    (T, B, I), W, H, K = x.shape, params[1].shape[1], params[0].shape[0] // GATES[cell], count // each
    shapes = Architecture(cell, I, H, K // D, each > 3, D == 2, W if projected else 0).shapes()
    _check_shapes(x, shapes, params)
    if projected and W >= H:
        raise ValueError(f"the projection is to {W} numbers, expected less than {H}")
    if len(masks) not in (0, K // D - 1):
        raise ValueError(f"there are {len(masks)} masks, expected none or {K // D - 1}")
    _check_shapes(x, {"h": (K, B, W), "c": (K, B, H)}, (h, c if cell == "lstm" else None))
    _check_shapes(x, {f"mask {k}": (T, B, D * W) for k in range(len(masks))}, masks)


def _check_shapes(x: Tensor, shapes: Mapping[str, tuple[int, ...]], tensors: Sequence[Tensor | None]) -> None:
    for (name, shape), tensor in zip(shapes.items(), tensors, strict=True):
        if tensor is not None and (tensor.shape != shape or tensor.dtype != x.dtype):
            got = f"is {tensor.dtype} of shape {tuple(tensor.shape)}"
            raise ValueError(f"{name} {got}, expected {x.dtype}, that of x, of shape {shape}")


def _forward_op(
    x: Tensor,
    h: Tensor | None,
    c: Tensor | None,
    params: list[Tensor],
    masks: list[Tensor],
    lengths: Tensor | None,
    reset: Tensor | None,
    cell: str,
    each: int,
    directions: int,
    training: bool,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    torch_func.refuse_forward_mode((x, h, c, *params))
    spec = Spec(cell, each, directions)
    _check_operands(spec, x, h, c, params, masks)
    T, B, _ = x.shape
    prepared = _prepare(spec, params)
    states = stack.initial(spec, prepared, _optional(h), _optional(c), B)
    rows = _rows(lengths, reset, T, B)
    output, last, kept = stack.forward(
        spec, prepared, _array(x), states, [_array(mask) for mask in masks], rows, training
    )
    c_n = _tensor(last[1]) if len(last) == 2 else x.new_empty(0)
    return _tensor(output), _tensor(last[0]), c_n, [_tensor(array) for array in kept]


def _backward_op(
    d_output: Tensor | None,
    d_h: Tensor | None,
    d_c: Tensor | None,
    x: Tensor,
    h: Tensor | None,
    c: Tensor | None,
    output: Tensor,
    params: list[Tensor],
    masks: list[Tensor],
    kept: list[Tensor],
    lengths: Tensor | None,
    reset: Tensor | None,
    cell: str,
    each: int,
    directions: int,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    torch_func.refuse_forward_mode((d_output, d_h, d_c, x, h, c, *params))
    spec = Spec(cell, each, directions)
    _check_operands(spec, x, h, c, params, masks)
    (T, B, _), (K, W, H) = x.shape, spec.sizes(params)
    shapes = {"output": (T, B, directions * W), "d_output": (T, B, directions * W), "d_h": (K, B, W), "d_c": (K, B, H)}
    _check_shapes(x, shapes, (output, d_output, d_h, d_c if cell == "lstm" else None))
    _check_shapes(x, {f"kept[{k}]": shape for k, shape in enumerate(spec.kept_shapes(T, B, params))}, kept)
    prepared = _prepare(spec, params)
    states = stack.initial(spec, prepared, _optional(h), _optional(c), B)
    rows = _rows(lengths, reset, T, B)
    d_states = [_optional(d_h), _optional(d_c)][: len(states)]
    tape = _array(output), [_array(part) for part in kept]
    dx, d_start, d_params = stack.backward(
        spec, prepared, _array(x), states, [_array(mask) for mask in masks], tape, rows, _optional(d_output), d_states
    )
    dc = _tensor(d_start[1]) if len(d_start) == 2 else x.new_empty(0)
    return _tensor(dx), _tensor(d_start[0]), dc, [_tensor(array) for array in d_params]


def _forward_shapes(
    x: Tensor,
    h: Tensor | None,
    c: Tensor | None,
    params: list[Tensor],
    masks: list[Tensor],
    lengths: Tensor | None,
    reset: Tensor | None,
    cell: str,
    each: int,
    directions: int,
    training: bool,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    spec, (T, B, _) = Spec(cell, each, directions), x.shape
    K, W, H = spec.sizes(params)
    kept = [x.new_empty(shape) for shape in spec.kept_shapes(T, B, params)] if training else []
    c_n = x.new_empty(K, B, H) if cell == "lstm" else x.new_empty(0)
    return x.new_empty(T, B, directions * W), x.new_empty(K, B, W), c_n, kept


def _backward_shapes(
    d_output: Tensor | None,
    d_h: Tensor | None,
    d_c: Tensor | None,
    x: Tensor,
    h: Tensor | None,
    c: Tensor | None,
    output: Tensor,
    params: list[Tensor],
    masks: list[Tensor],
    kept: list[Tensor],
    lengths: Tensor | None,
    reset: Tensor | None,
    cell: str,
    each: int,
    directions: int,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    B, (K, W, H) = x.shape[1], Spec(cell, each, directions).sizes(params)
    dc = x.new_empty(K, B, H) if cell == "lstm" else x.new_empty(0)
    return x.new_empty(x.shape), x.new_empty(K, B, W), dc, [param.new_empty(param.shape) for param in params]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    x, h, c, params, masks, lengths, reset, *ctx.options, ctx.training = inputs
    result, _, _, kept = output
    ctx.counts = len(params), len(masks)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, h, c, result, lengths, reset, *params, *masks, *kept)


def _go_back(ctx: Any, d_output: Any, d_h: Any, d_c: Any, d_kept: Any) -> tuple[Any, ...]:
    if not ctx.training:
        raise RuntimeError("fastrnn::forward was called with training=False: call it with True to go back through it")
    x, h, c, output, lengths, reset, *others = ctx.saved_tensors
    P, M = ctx.counts
    params, masks, kept = others[:P], others[P : P + M], others[P + M :]
    if d_output is None and d_h is None and d_c is None:
        return (None, None, None, [None] * P, [None] * M, *[None] * 6)
    if torch.is_grad_enabled():
        rows = lengths, reset, masks, params
        *given, d_params = torch_func.go_back_again(Spec(*ctx.options), (d_output, d_h, d_c), x, h, c, *rows)
        return (*given, d_params, [None] * M, *[None] * 6)
    dx, dh, dc, d_params = torch.ops.fastrnn.backward.default(
        d_output, d_h, d_c, x, h, c, output, params, masks, kept, lengths, reset, *ctx.options
    )
    return (dx, None if h is None else dh, None if c is None else dc, d_params, [None] * M, *[None] * 6)


def _no_second_derivatives(ctx: Any, *gradients: Any) -> None:
    raise RuntimeError(
        "fastrnn::backward has no derivatives: go back through fastrnn::forward with create_graph=True, not compiled"
    )


def _register() -> Any:
    """Make the operators known to PyTorch, and return what has to live as long as they."""
    library = torch.library.Library("fastrnn", "FRAGMENT")
    for schema in _SCHEMAS:
        library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    library.impl("forward", _forward_op, "CPU")
    library.impl("backward", _backward_op, "CPU")
    torch.library.register_fake("fastrnn::forward", _forward_shapes, lib=library)
    torch.library.register_fake("fastrnn::backward", _backward_shapes, lib=library)
    torch.library.register_autograd("fastrnn::forward", _go_back, setup_context=_save, lib=library)
    torch.library.register_autograd("fastrnn::backward", _no_second_derivatives, lib=library)
    for name in ("forward", "backward"):
        operator = getattr(torch.ops.fastrnn, name).default
        torch.library.register_vmap(
            f"fastrnn::{name}", functools.partial(torch_func.map_operator, operator), lib=library
        )
        torch.library.register_autocast(f"fastrnn::{name}", "cpu", torch.float32, lib=library)
    return library


if "_library" not in globals():  # they can be defined once only, and importlib.reload() comes here again
    _library = _register()


# ---- the short way past the dispatcher, for plain tensors


class _OnCPU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: tuple[Any, ...], x: Tensor, h: Any, c: Any, *params: Tensor) -> tuple[Tensor, ...]:
        spec, prepared, masks, rows = call
        states = stack.initial(spec, prepared, _optional(h), _optional(c), x.shape[1])
        output, last, kept = stack.forward(
            spec, prepared, _array(x), states, [_array(mask) for mask in masks], rows, training=True
        )
        result = _tensor(output)
        # All that is large goes through PyTorch's hands, which free it early, or compute it again for a checkpoint.
        ctx.save_for_backward(x, h, c, result, *params, *masks, *map(_tensor, kept))
        ctx.call, ctx.counts = (spec, prepared, rows), (len(params), len(masks))
        ctx.set_materialize_grads(False)
        return (result, *map(_tensor, last))

    @staticmethod
    def backward(ctx: Any, d_output: Any, *d_last: Any) -> tuple[Any, ...]:
        if d_output is None and all(d is None for d in d_last):
            return (None,) * (4 + ctx.counts[0])
        x, h, c, output, *others = ctx.saved_tensors
        (P, M), (spec, prepared, rows) = ctx.counts, ctx.call
        params, masks, kept = others[:P], others[P : P + M], others[P + M :]
        if torch.is_grad_enabled() or forward_ad._current_level >= 0:
            lengths, reset = (None if array is None else _tensor(array) for array in rows)
            *given, d_params = torch_func.go_back_again(
                spec, (d_output, *d_last), x, h, c, lengths, reset, masks, params
            )
            return (None, *given, *d_params)
        states = stack.initial(spec, prepared, _optional(h), _optional(c), x.shape[1])
        tape, d_states = (_array(output), [_array(part) for part in kept]), [_optional(d) for d in d_last]
        drawn = [_array(mask) for mask in masks]
        dx, d_start, d_array = stack.backward(
            spec, prepared, _array(x), states, drawn, tape, rows, _optional(d_output), d_states
        )
        starts = (*map(_tensor, d_start), None)[:2]
        wanted = [None if start is None else d for start, d in zip((h, c), starts, strict=True)]
        return (None, _tensor(dx), *wanted, *map(_tensor, d_array))


class _OnGPU(torch.autograd.Function):
    """One layer in one direction, on tensors on an NVIDIA GPU."""

    @staticmethod
    def forward(ctx: Any, call: tuple[Any, ...], x: Tensor, h: Any, c: Any, *params: Tensor) -> tuple[Tensor, ...]:
        spec, options = call
        named = dict(zip(spec.names, [param.detach().contiguous() for param in params], strict=True))
        state = [s.detach().contiguous() for s in (h, c) if s is not None] or None
        x_now = x.detach().contiguous()
        output, last, ctx.tape = functional.forward(spec.cell, x_now, named, state, backend="cuda", **options)
        ctx.spec, ctx.options = spec, options
        # What the tape refers to, so that PyTorch notices where it has been changed.
        ctx.save_for_backward(x, h, c, output, *params)
        ctx.set_materialize_grads(False)
        return (output, *last)

    @staticmethod
    def backward(ctx: Any, d_output: Any, *d_last: Any) -> tuple[Any, ...]:
        if d_output is None and all(d is None for d in d_last):
            return (None,) * (4 + ctx.spec.each)
        x, h, c, output, *params = ctx.saved_tensors
        if torch.is_grad_enabled() or forward_ad._current_level >= 0:
            return (None, *_OnGPU.go_back_again(ctx, (d_output, *d_last), x, h, c, output, params))
        given = [None if d is None else d.contiguous() for d in (d_output, *d_last)]
        dx, d_params, d_start = functional.backward(ctx.tape, given[0], tuple(given[1:]))
        d_states = [None if s is None else d for s, d in zip((h, c), (*d_start, None)[:2], strict=True)]
        return (None, dx, *d_states, *(d_params[name] for name in ctx.spec.names))

    @staticmethod
    def go_back_again(ctx: Any, gradients: Any, x: Tensor, h: Any, c: Any, output: Tensor, params: Any) -> list[Any]:
        """Return gradients that can be differentiated again."""
        spec, (lengths, reset, reverse) = ctx.spec, (ctx.options[name] for name in ("lengths", "reset", "reverse"))
        rows = [None if array is None else _tensor(array) for array in (lengths, reset)]
        start = [None if state is None else state[None] for state in (h, c)]
        states = torch_func.with_states(spec, x, start[0], start[1], params)
        last = [state for state in states if state is not None]
        given = [gradients[0], *(None if d is None else d[None] for d in gradients[1:])]
        dx, dh, dc, _, _, *d_params = torch_func.pull_back(
            lambda *tensors: torch_func.run(spec, 0, *tensors, reverse=reverse),
            (x, *states, *rows, *params),
            torch_func.with_zeros(given, (output, *last)),
        )
        return [dx, None if h is None else dh[0], None if c is None else dc[0], *d_params]


def _run_on_gpu(
    spec: Spec, x: Tensor, h: Any, c: Any, params: Sequence[Tensor], masks: Sequence[Tensor], rows: Any, training: bool
) -> tuple[Tensor, ...]:
    lengths, reset = rows
    D, parts = spec.directions, []
    outputs: list[Tensor] = []
    for k in range(len(params) // spec.each):
        if k % D == 0 and k:
            x = torch.cat(outputs, -1) if D > 1 else outputs[0]
            x, outputs = x * masks[k // D - 1] if masks else x, []
        options = {"lengths": lengths, "reset": reset, "reverse": k % D == 1, "training": training}
        own = [None if s is None else s[k] for s in (h, c)]
        output, *last = _OnGPU.apply((spec, options), x, *own, *params[k * spec.each : (k + 1) * spec.each])
        outputs.append(output)
        parts.append(last)
    result = torch.cat(outputs, -1) if D > 1 else outputs[0]
    return (result, *(torch.stack(same) for same in zip(*parts, strict=True)))


# ---- the modules


_PLAIN = frozenset([Tensor, Parameter])


class _Module(torch.nn.Module):
    """What layers and cells share: their parameters on the way to the backend."""

    mode: str
    input_size: int
    hidden_size: int
    bias: bool
    training: bool
    _spec: Spec
    _kept: Any  # the parameters in the backend's hands, and where they stand in memory
    _flat_weights_names: list[str]
    _shapes: list[tuple[int, ...]]

    def _make(self, named: Iterable[tuple[str, tuple[int, ...]]], device: Any, dtype: Any) -> None:
        """Make the parameters."""
        names_and_shapes = list(named)
        self._flat_weights_names = [name for name, _ in names_and_shapes]
        self._shapes = [shape for _, shape in names_and_shapes]
        for name, shape in names_and_shapes:
            setattr(self, name, Parameter(torch.empty(shape, device=device, dtype=dtype)))
        self._kept = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the parameters from the uniform distribution in ±1/sqrt(hidden_size), as torch.nn does."""
        bound = 1.0 / math.sqrt(self.hidden_size)
        for parameter in self.parameters():
            torch.nn.init.uniform_(parameter, -bound, bound)

    @property
    def _flat_weights(self) -> list[Any]:
        own = self._parameters
        # As attributes where they are not the module's own: parametrizations and others compute them at each call.
        return [getattr(self, name) if own.get(name) is None else own[name] for name in self._flat_weights_names]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}

    def _replicate_for_data_parallel(self) -> Any:
        replica = super()._replicate_for_data_parallel()
        replica._kept = None
        return replica

    def _apply(self, *arguments: Any, **options: Any) -> Any:
        self._kept = None  # or the memory that the parameters leave would stay
        return super()._apply(*arguments, **options)

    def _compute(
        self, x: Tensor, h: Any, c: Any, params: list[Tensor], masks: list[Tensor], lengths: Any, reset: Any
    ) -> Sequence[Tensor]:
        """Choose the way, and return the output and the last states."""
        spec = self._spec
        given = [x, *params] if h is None else [tensor for tensor in (x, h, c, *params) if tensor is not None]
        training = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given)
        compiling = torch.compiler.is_compiling()
        transforms = torch._C._are_functorch_transforms_active()
        if transforms or (not compiling and forward_ad._current_level >= 0):
            results = torch_func.transformed(spec, x, h, c, params, masks, lengths, reset)
            if results is not None:
                return results
        plain = (
            not (compiling or transforms)
            and torch._C._len_torch_dispatch_stack() == 0
            and torch._C._get_tracing_state() is None
        )
        if plain and _PLAIN.issuperset(map(type, given)):
            if x.is_cpu:
                rows = (None, None) if lengths is None and reset is None else _rows(lengths, reset, *x.shape[:2])
                prepared = self._prepare(params)
                if training:
                    return _OnCPU.apply((spec, prepared, masks, rows), x, h, c, *params)
                return self._infer(prepared, x, h, c, masks, rows)
            if x.is_cuda:
                rows = _rows(lengths, reset, *x.shape[:2])
                return _run_on_gpu(spec, x, h, c, params, masks, rows, training)
        if x.is_cuda:
            raise NotImplementedError(
                "fastrnn's layers are not compiled, traced or exported on a GPU: mark what calls them with "
                "torch.compiler.disable, or move the model and its input to the CPU"
            )
        output, h_n, c_n, _ = torch.ops.fastrnn.forward.default(x, h, c, params, masks, lengths, reset, *spec, training)
        return (output, h_n, c_n) if spec.cell == "lstm" else (output, h_n)

    def _infer(
        self, prepared: list[Any], x: Tensor, h: Any, c: Any, masks: list[Tensor], rows: Rows
    ) -> Sequence[Tensor]:
        x_now, h_now, c_now = _array(x), _optional(h), _optional(c)
        T, B, I = x_now.shape
        if len(prepared) == 1 and rows[0] is None and rows[1] is None:
            given = None if h_now is None else (h_now,) if c_now is None else (h_now, c_now)
            result = prepared[0].again(x_now.reshape(T * B, I), T, given)
            if result is not None:
                return (_tensor(result[0].reshape(T, B, prepared[0].h)), *map(_tensor, result[1]))
        states = stack.initial(self._spec, prepared, h_now, c_now, B)
        output, last, _ = stack.forward(
            self._spec, prepared, x_now, states, [_array(mask) for mask in masks], rows, training=False
        )
        return (_tensor(output), *map(_tensor, last))

    def _prepare(self, params: list[Tensor]) -> list[Any]:
        """Return the parameters in the hands of the backend: those of the last call where they stand there still."""
        place = [param.data_ptr() for param in params]
        kept = self._kept
        if kept is not None and kept[0] == place and kept[1] is params[0].dtype:
            for param in params:
                if not param.is_contiguous():  # another view of what stands there
                    break
            else:
                return kept[2]
        prepared = _prepare(self._spec, params)
        # What is computed for one call, or was copied, is not what the next call will see.
        if all(type(param) is Parameter for param in params):
            arrays = [part.params[name] for part in prepared for name in self._spec.names]
            if [array.ctypes.data for array in arrays] == place:
                self.__dict__["_kept"] = place, params[0].dtype, prepared
        return prepared

    def _name(self) -> str:
        return self.mode.partition("_")[0]

    def _check_input(self, input: Tensor, params: list[Tensor]) -> Tensor:
        """Return the input in the parameters' dtype."""
        dtype, on_cpu = params[0].dtype, input.is_cpu
        for param, shape in zip(params, self._shapes, strict=True):
            if param.shape != shape or param.dtype is not dtype or not (on_cpu and param.is_cpu):
                self._check_parameters(input, params)
                break
        if dtype not in _DTYPES:
            raise TypeError(_dtype_message("the parameters are", dtype, "the model and its input"))
        if input.dtype != dtype:
            if input.is_floating_point() and torch.is_autocast_enabled(input.device.type):
                input = input.to(dtype)
            elif input.dtype not in _DTYPES:
                raise TypeError(_dtype_message("input is", input.dtype, "it"))
            else:
                raise ValueError(
                    f"RNN input dtype ({input.dtype}) does not match weight dtype ({dtype}). "
                    f"Convert input: input.to({dtype}), or convert model: model.to({input.dtype})"
                )
        if input.shape[-1] != self.input_size:
            raise RuntimeError(
                f"input.size(-1) must be equal to input_size. Expected {self.input_size}, got {input.shape[-1]}"
            )
        return input

    def _check_parameters(self, input: Tensor, params: list[Tensor]) -> None:
        """Check that all are of the right shape, of one dtype and on one device that is known here."""
        dtype, device = params[0].dtype, params[0].device
        if device.type not in ("cpu", "cuda", "meta"):
            raise TypeError(f"the parameters are on {device}, expected the CPU or an NVIDIA GPU: move them, to('cpu')")
        for param, shape, name in zip(params, self._shapes, self._flat_weights_names, strict=True):
            if param.shape != shape:
                raise RuntimeError(f"{name} has shape {tuple(param.shape)}, expected {shape}")
            if param.dtype != dtype or param.device != device:
                first = self._flat_weights_names[0]
                raise ValueError(f"{name} is {param.dtype} on {param.device}, and {first} is {dtype} on {device}")
        if input.device != device:
            raise RuntimeError(
                "Input and parameter tensors are not at the same device, "
                f"found input tensor at {input.device} and parameter tensor at {device}"
            )


class _Recurrent(_Module):
    """What RNN, LSTM and GRU share: all but their arguments and formulas."""

    num_layers: int
    batch_first: bool
    dropout: float
    bidirectional: bool
    proj_size: int
    _all_weights: list[list[str]]

    __constants__ = "mode input_size hidden_size num_layers bias batch_first dropout bidirectional proj_size".split()

    def __init__(
        self,
        mode: str,
        input_size: int,
        hidden_size: int,
        num_layers: int,
        bias: bool,
        batch_first: bool,
        dropout: float,
        bidirectional: bool,
        proj_size: int = 0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        # These are torch.nn's exceptions.
        if not isinstance(dropout, numbers.Real) or not 0 <= dropout <= 1 or isinstance(dropout, bool):
            raise ValueError(f"dropout should be a number in range [0, 1], and is {dropout!r}")
        for name, flag in (("bias", bias), ("batch_first", batch_first)):
            if not isinstance(flag, bool):
                raise TypeError(f"{name} should be of type bool, got: {type(flag).__name__}")
        for name, size in (("input_size", input_size), ("hidden_size", hidden_size), ("num_layers", num_layers)):
            if not isinstance(size, int):
                raise TypeError(f"{name} should be of type int, got: {type(size).__name__}")
            if size <= 0:
                raise ValueError(f"{name} must be greater than zero")
        if proj_size < 0:
            raise ValueError("proj_size should be a positive integer or zero to disable projections")
        if proj_size >= hidden_size:
            raise ValueError("proj_size has to be smaller than hidden_size")
        if dropout > 0 and num_layers == 1:
            message = f"dropout is {dropout}, which does nothing with num_layers=1: it acts between layers"
            warnings.warn(message, stacklevel=3)
        self.mode = mode
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self.bias, self.batch_first, self.dropout = bias, batch_first, float(dropout)
        self.bidirectional, self.proj_size = bool(bidirectional), proj_size

        D, W, rows = 1 + self.bidirectional, proj_size or hidden_size, _GATES[mode] * hidden_size
        self._spec = Spec(mode.lower(), 2 + 2 * bias + (proj_size > 0), D)
        self._all_weights = []
        named: list[tuple[str, tuple[int, ...]]] = []
        for layer in range(num_layers):
            shapes = {
                "weight_ih": (rows, input_size if layer == 0 else W * D),
                "weight_hh": (rows, W),
                "bias_ih": (rows,),
                "bias_hh": (rows,),
                "weight_hr": (proj_size, hidden_size),
            }
            for ending in ("", "_reverse")[:D]:
                full = [(f"{name}_l{layer}{ending}", shapes[name]) for name in self._spec.names]
                self._all_weights.append([name for name, _ in full])
                named += full
        self._make(named, device, dtype)

    def flatten_parameters(self) -> None:
        """Do nothing: parameters need not stand in one piece of memory here."""

    @property
    def all_weights(self) -> list[list[Any]]:
        """The parameters of each layer and direction."""
        return [[getattr(self, name) for name in names] for names in self._all_weights]

    def extra_repr(self) -> str:
        options = {
            "proj_size": 0, "num_layers": 1, "bias": True, "batch_first": False, "dropout": 0, "bidirectional": False,
        }  # fmt: skip
        shown = [f"{name}={getattr(self, name)}" for name, usual in options.items() if getattr(self, name) != usual]
        return ", ".join([str(self.input_size), str(self.hidden_size), *shown])

    def _run(self, input: Any, hx: Any, lengths: Any, reset: Any) -> tuple[Any, tuple[Tensor, ...]]:
        """Return the output, and the last states as a tuple."""
        if isinstance(input, PackedSequence):
            return self._run_packed(input, hx, lengths, reset)
        if not isinstance(input, Tensor):
            raise TypeError(f"input is a {type(input).__name__}, expected a tensor or a PackedSequence")
        _check_layout(input)
        if input.dim() not in (2, 3):
            raise ValueError(f"{self._name()}: Expected input to be 2D or 3D, got {input.dim()}D tensor instead")
        params = self._flat_weights
        input = self._check_input(input, params)
        batched = input.dim() == 3
        if not batched:
            x = input.unsqueeze(1)
        else:
            x = input.transpose(0, 1) if self.batch_first else input
        T, B, _ = x.shape
        h, c = (None, None) if hx is None else self._check_states(hx, x, B, batched)
        lengths = None if lengths is None else _check_lengths(lengths, B, batched)
        reset = None if reset is None else self._check_reset(reset, T, B, batched)
        masks = self._masks((T, B), x) if self.training and self.dropout else []
        output, *last = self._compute(x, h, c, params, masks, lengths, reset)
        if not batched:
            return output.squeeze(1), tuple([s.squeeze(1) for s in last])
        return output.transpose(0, 1) if self.batch_first else output, tuple(last)

    def _run_packed(self, input: PackedSequence, hx: Any, lengths: Any, reset: Any) -> tuple[Any, tuple[Tensor, ...]]:
        """Run over sequences by decreasing length, which is how they stand in it."""
        if lengths is not None or reset is not None:
            which = "reset" if lengths is None else "lengths"
            raise ValueError(f"{which} is given with a PackedSequence, expected padded input with lengths")
        data, batch_sizes, order, back = input
        if data.dim() != 2:
            raise RuntimeError(f"input must have 2 dimensions, got {data.dim()}")
        _check_layout(data)
        params = self._flat_weights
        data = self._check_input(data, params)
        T, B = len(batch_sizes), int(batch_sizes[0])

        def pad(packed: Tensor) -> tuple[Tensor, Tensor]:
            return torch._VF._pad_packed_sequence(packed, batch_sizes, False, 0.0, T)

        x, lengths = pad(data)
        h, c = self._check_states(hx, x, B, batched=True)
        if order is not None:
            h, c = (None if s is None else s.index_select(1, order) for s in (h, c))
        # In torch.nn's layout, and so with its random numbers.
        masks = self._masks(data.shape[:1], x) if self.training and self.dropout else []
        masks = [pad(mask)[0] for mask in masks]
        output, *last = self._compute(x, h, c, params, masks, lengths, None)
        output, _ = torch._VF._pack_padded_sequence(output, lengths, False)
        if back is not None:
            last = [s.index_select(1, back) for s in last]
        return PackedSequence(output, batch_sizes, order, back), tuple(last)

    def _masks(self, shape: Sequence[int], x: Tensor) -> list[Tensor]:
        """Draw what dropout multiplies by between layers, of torch.nn's random numbers."""
        p, width = self.dropout, self._spec.directions * (self.proj_size or self.hidden_size)
        masks = [torch.empty((*shape, width), dtype=x.dtype, device=x.device) for _ in range(1, self.num_layers)]
        return [mask.zero_() if p == 1 else torch.bernoulli(mask, 1 - p).div_(1 - p) for mask in masks]

    # Checks: their exceptions are those of torch.nn, where there are such.

    def _check_states(self, hx: Any, x: Tensor, B: int, batched: bool) -> tuple[Any, Any]:
        """Return h and c as (layers · directions, B, size), or None."""
        if hx is None:
            return None, None
        lstm = self.mode == "LSTM"
        if lstm and not (isinstance(hx, (tuple, list)) and len(hx) == 2):
            raise TypeError(f"hx is a {type(hx).__name__}, expected a tuple (h_0, c_0)")
        states = list(hx) if lstm else [hx]
        sizes = [self.proj_size or self.hidden_size, self.hidden_size]
        for i, state in enumerate(states):
            name = f"hidden[{i}]" if lstm else "hidden"
            if not isinstance(state, Tensor):
                raise TypeError(f"{name} is a {type(state).__name__}, expected a tensor")
            _check_layout(state)
            if state.dim() != 2 + batched:
                kind, hidden = ("batched 3", "hx and cx") if batched else ("unbatched 2", "hx and cx")
                hidden = hidden if lstm else "hx"
                raise RuntimeError(
                    f"For {kind}-D input, {hidden} should also be {2 + batched}-D but got {state.dim()}-D tensor"
                )
            state = state if batched else state.unsqueeze(1)
            expected = (len(self._all_weights), B, sizes[i])
            if state.shape != expected:
                raise RuntimeError(f"Expected {name} size {expected}, got {list(state.shape)}")
            states[i] = _check_kind(name, state, x)
        return (states[0], states[1]) if lstm else (states[0], None)

    def _check_reset(self, reset: Any, T: int, B: int, batched: bool) -> Tensor:
        """Return `reset` as (T, B) on the CPU."""
        reset = _as_tensor("reset", reset)
        if reset.dtype != torch.bool:
            raise TypeError(f"reset is {reset.dtype}, expected torch.bool: reset.bool()")
        first = batched and self.batch_first
        shape, letters = ((B, T) if first else (T, B), "(B, T)" if first else "(T, B)") if batched else ((T,), "(T,)")
        if reset.shape != shape:
            raise ValueError(f"reset has shape {tuple(reset.shape)}, expected {letters} = {shape}")
        if not batched:
            return reset.unsqueeze(1)
        return reset.transpose(0, 1) if first else reset


def _check_kind(name: str, state: Tensor, x: Tensor) -> Tensor:
    """Return a state in the dtype of x, on whose device it is."""
    if state.device != x.device:
        raise RuntimeError(
            "Input and hidden tensors are not at the same device, "
            f"found input tensor at {x.device} and hidden tensor at {state.device}"
        )
    if state.dtype != x.dtype:
        if not (state.is_floating_point() and torch.is_autocast_enabled(x.device.type)):
            raise ValueError(f"{name} is {state.dtype}, expected the input's {x.dtype}: {name}.to({x.dtype})")
        state = state.to(x.dtype)
    return state


def _check_lengths(lengths: Any, B: int, batched: bool) -> Tensor:
    """Return `lengths` as a tensor (B,) of integers; their values are looked at where the work is done."""
    lengths = _as_tensor("lengths", lengths)
    if (lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool) and lengths.numel():
        raise TypeError(f"lengths is {lengths.dtype}, expected integers")
    shape = (B,) if batched else ()
    if lengths.shape != shape:
        wanted = f"({B},): an integer for each row" if batched else "(): an integer"
        raise ValueError(f"lengths has shape {tuple(lengths.shape)}, expected {wanted}")
    return lengths.reshape(-1).to(torch.int64)


def _as_tensor(name: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        try:
            value = torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"{name} cannot be read as a tensor: {error}") from error
    if value.device.type not in ("cpu", "meta"):
        raise TypeError(f"{name} is on {value.device}, expected the CPU: {name}.cpu()")
    return value


def _check_layout(tensor: Tensor) -> None:
    if tensor.layout is not torch.strided or tensor.is_nested:
        raise TypeError(f"a tensor is nested or of layout {tensor.layout}, expected a dense one: to_dense(), or pad it")


def _dtype_message(what: str, dtype: torch.dtype, cast: str) -> str:
    if dtype.is_complex:
        return f"{what} {dtype}, expected torch.float32 or torch.float64: complex numbers are not supported"
    return f"{what} {dtype}, expected torch.float32 or torch.float64: cast {cast} with .float()"


_GATES = {"RNN_TANH": 1, "RNN_RELU": 1, "LSTM": 4, "GRU": 3}


class RNN(_Recurrent):
    """Elman's recurrent layer, in place of ``torch.nn.RNN``; the formula is that of `fastrnn.RNN`.

    Parameters
    ----------
    input_size, hidden_size : int
        Sizes of the input and of h.
    num_layers : int
        How many layers are stacked, each on the output of the one before.
    nonlinearity : str
        "tanh" or "relu".
    bias : bool
        Whether there are biases.
    batch_first : bool
        Whether the input and the output are (B, T, size) in place of (T, B, size). The states are as they are.
    dropout : float
        With what probability each element is set to zero that goes from one layer to the next, while training.
    bidirectional : bool
        Whether a second direction runs backward in time; the output is [forward, reverse].
    device, dtype
        Of the parameters.

    Raises
    ------
    TypeError, ValueError
        As torch.nn's.

    Examples
    --------
    >>> rnn = RNN(3, 5, nonlinearity="relu", bidirectional=True)
    >>> output, h = rnn(torch.zeros(7, 4, 3), lengths=[7, 2, 0, 5])
    >>> output.shape, h.shape
    (torch.Size([7, 4, 10]), torch.Size([2, 4, 5]))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        if nonlinearity not in ("tanh", "relu"):
            raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'.")
        sizes = input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional
        super().__init__(f"RNN_{nonlinearity.upper()}", *sizes, device=device, dtype=dtype)
        self.nonlinearity = nonlinearity

    def forward(
        self, input: Any, hx: Tensor | None = None, *, lengths: Any = None, reset: Any = None
    ) -> tuple[Any, Tensor]:
        """Run the layer over a batch of sequences.

        Parameters
        ----------
        input : Tensor or PackedSequence
            (T, B, input_size); (B, T, input_size) with batch_first; (T, input_size) for one sequence without a batch.
        hx : Tensor, optional
            The initial h, (layers · directions, B, hidden_size), without B if the input is without; zeros by default.
        lengths : (B,) integers, optional
            How many steps each row has, 0 to T, in any order; an integer if the input is without B. On the CPU. The
            output is 0 beyond them, and the last state that of the row's last step.
        reset : booleans, optional
            (T, B); (B, T) with batch_first; (T,) without B. Where true, the row's state is zero before that step. On
            the CPU.

        Returns
        -------
        output : Tensor or PackedSequence
            As the input, the last layer's h of every step.
        h_n : Tensor
            The last state, as hx.

        Raises
        ------
        TypeError
            If an argument is of a wrong kind, dtype or device.
        RuntimeError, ValueError
            If a shape or a value is wrong, as torch.nn's.
        NotImplementedError
            For what is not supported; see `fastrnn.torch`.
        """
        output, (h_n,) = self._run(input, hx, lengths, reset)
        return output, h_n


class LSTM(_Recurrent):
    """Long short-term memory, in place of ``torch.nn.LSTM``; the formula is that of `fastrnn.LSTM`.

    Parameters
    ----------
    input_size, hidden_size : int
        Sizes of the input and of c.
    num_layers, bias, batch_first, dropout, bidirectional
        As for `RNN`.
    proj_size : int
        The size of h if it is projected, less than hidden_size; 0 for no projection.
    device, dtype
        Of the parameters.

    Raises
    ------
    TypeError, ValueError
        As torch.nn's.

    Examples
    --------
    >>> lstm = LSTM(3, 5, num_layers=2, proj_size=2, batch_first=True)
    >>> output, (h, c) = lstm(torch.zeros(4, 7, 3))
    >>> output.shape, h.shape, c.shape
    (torch.Size([4, 7, 2]), torch.Size([2, 4, 2]), torch.Size([2, 4, 5]))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        sizes = input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size
        super().__init__("LSTM", *sizes, device=device, dtype=dtype)

    def forward(
        self, input: Any, hx: tuple[Tensor, Tensor] | None = None, *, lengths: Any = None, reset: Any = None
    ) -> tuple[Any, tuple[Tensor, Tensor]]:
        """Run the layer over a batch of sequences; hx and the last state are (h, c). Else as `RNN.forward`."""
        output, (h_n, c_n) = self._run(input, hx, lengths, reset)
        return output, (h_n, c_n)


class GRU(_Recurrent):
    """Gated recurrent unit, in place of ``torch.nn.GRU``; the formula is the first of `fastrnn.GRU`.

    Parameters
    ----------
    input_size, hidden_size : int
        Sizes of the input and of h.
    num_layers, bias, batch_first, dropout, bidirectional, device, dtype
        As for `RNN`.

    Raises
    ------
    TypeError, ValueError
        As torch.nn's.

    Examples
    --------
    >>> gru = GRU(3, 5)
    >>> output, h = gru(torch.zeros(7, 3))  # one sequence without a batch
    >>> output.shape, h.shape
    (torch.Size([7, 5]), torch.Size([1, 5]))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        sizes = input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional
        super().__init__("GRU", *sizes, device=device, dtype=dtype)

    def forward(
        self, input: Any, hx: Tensor | None = None, *, lengths: Any = None, reset: Any = None
    ) -> tuple[Any, Tensor]:
        """Run the layer over a batch of sequences. As `RNN.forward`."""
        output, (h_n,) = self._run(input, hx, lengths, reset)
        return output, h_n


class _Cell(_Module):
    """What RNNCell, LSTMCell and GRUCell share."""

    __constants__ = ("input_size", "hidden_size", "bias")

    def __init__(self, mode: str, input_size: int, hidden_size: int, bias: bool, device: Any, dtype: Any) -> None:
        super().__init__()
        for name, size in (("input_size", input_size), ("hidden_size", hidden_size)):
            functional.check_integer(name, size, 1)
        self.mode, self.input_size, self.hidden_size = mode, input_size, hidden_size
        self.bias = functional.check_flag("bias", bias)
        self._spec = Spec(mode.lower(), 2 + 2 * self.bias, 1)
        rows = _GATES[mode] * hidden_size
        shapes = [(rows, input_size), (rows, hidden_size), (rows,), (rows,)]
        self._make(zip(self._spec.names, shapes, strict=False), device, dtype)

    def extra_repr(self) -> str:
        sizes = f"{self.input_size}, {self.hidden_size}"
        return sizes + (f", bias={self.bias}" if self.bias is not True else "")

    def _step(self, input: Any, hx: Any) -> tuple[Tensor, ...]:
        """Return the states after a step."""
        kind, lstm = type(self).__name__, self.mode == "LSTM"
        if not isinstance(input, Tensor):
            raise TypeError(f"input is a {type(input).__name__}, expected a tensor")
        if lstm and not (hx is None or (isinstance(hx, (tuple, list)) and len(hx) == 2)):
            raise TypeError(f"hx is a {type(hx).__name__}, expected a tuple (h_0, c_0)")
        states = [] if hx is None else list(hx) if lstm else [hx]
        for i, tensor in enumerate((input, *states)):
            name = f"hx[{i - 1}]" if i and lstm else "hidden" if i else "input"
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{name} is a {type(tensor).__name__}, expected a tensor")
            _check_layout(tensor)
            if tensor.dim() not in (1, 2):
                raise ValueError(f"{kind}: Expected {name} to be 1D or 2D, got {tensor.dim()}D instead")
            if tensor.dim() != input.dim():
                raise RuntimeError(f"{name} is {tensor.dim()}D and input {input.dim()}D, expected the same")
        if input.shape[-1] != self.input_size:
            raise RuntimeError(f"input has inconsistent input_size: got {input.shape[-1]} expected {self.input_size}")
        params = self._flat_weights
        x = self._check_input(input, params)
        batched = x.dim() == 2
        x = x.unsqueeze(0) if batched else x[None, None]
        for i, state in enumerate(states):
            if state.shape[-1] != self.hidden_size:
                got = f"got {state.shape[-1]}, expected {self.hidden_size}"
                raise RuntimeError(f"hidden{i} has inconsistent hidden_size: {got}")
            state = state.unsqueeze(0) if batched else state[None, None]
            if state.shape[1] != x.shape[1]:
                got = f"{x.shape[1]} doesn't match hidden{i} batch size {state.shape[1]}"
                raise RuntimeError(f"Input batch size {got}")
            states[i] = _check_kind(f"hidden{i}", state, x)
        h, c = (*states, None, None)[:2]
        _, *last = self._compute(x, h, c, params, [], None, None)
        return tuple([state[0] if batched else state[0, 0] for state in last])


class RNNCell(_Cell):
    """One step of an `RNN`, in place of ``torch.nn.RNNCell``.

    Parameters
    ----------
    input_size, hidden_size : int
    bias : bool
    nonlinearity : str
        "tanh" or "relu".
    device, dtype
        Of the parameters weight_ih, weight_hh, bias_ih and bias_hh.

    Examples
    --------
    >>> cell, h = RNNCell(3, 5), None
    >>> for x_t in torch.zeros(7, 4, 3):
    ...     h = cell(x_t, h)
    >>> h.shape
    torch.Size([4, 5])
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        if nonlinearity not in ("tanh", "relu"):
            raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'.")
        super().__init__(f"RNN_{nonlinearity.upper()}", input_size, hidden_size, bias, device, dtype)
        self.nonlinearity = nonlinearity

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self.nonlinearity == "tanh" else f", nonlinearity={self.nonlinearity}")

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """Return the next h, (B, hidden_size), of input (B, input_size) and h; both may be without B."""
        return self._step(input, hx)[0]


class LSTMCell(_Cell):
    """One step of an `LSTM`, in place of ``torch.nn.LSTMCell``. Parameters are those of `RNNCell`.

    Examples
    --------
    >>> h, c = LSTMCell(3, 5)(torch.zeros(4, 3))
    >>> h.shape, c.shape
    (torch.Size([4, 5]), torch.Size([4, 5]))
    """

    def __init__(
        self, input_size: int, hidden_size: int, bias: bool = True, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__("LSTM", input_size, hidden_size, bias, device, dtype)

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Return the next (h, c), of input and (h, c)."""
        h, c = self._step(input, hx)
        return h, c


class GRUCell(_Cell):
    """One step of a `GRU`, in place of ``torch.nn.GRUCell``. Parameters are those of `RNNCell`.

    Examples
    --------
    >>> GRUCell(3, 5)(torch.zeros(3)).shape
    torch.Size([5])
    """

    def __init__(
        self, input_size: int, hidden_size: int, bias: bool = True, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__("GRU", input_size, hidden_size, bias, device, dtype)

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """Return the next h, of input and h."""
        return self._step(input, hx)[0]


# ---- layers of torch.nn, and back

_KINDS: dict[type, type] = {torch.nn.RNN: RNN, torch.nn.LSTM: LSTM, torch.nn.GRU: GRU}
_BACK = {ours: theirs for theirs, ours in _KINDS.items()}
_HOOKS = """
    _backward_pre_hooks _backward_hooks _is_full_backward_hook _forward_hooks _forward_hooks_with_kwargs
    _forward_hooks_always_called _forward_pre_hooks _forward_pre_hooks_with_kwargs _state_dict_hooks
    _state_dict_pre_hooks _load_state_dict_pre_hooks _load_state_dict_post_hooks
""".split()


def from_torch(layer: torch.nn.Module) -> Any:
    """Return the layer that takes the place of one of torch.nn, with the same Parameter objects and hooks.

    Parameters
    ----------
    layer : torch.nn.RNN, torch.nn.LSTM or torch.nn.GRU

    Returns
    -------
    RNN, LSTM or GRU

    Raises
    ------
    TypeError
        If it is no such layer, or of a subclass, or its parameters are neither float32 nor float64.
    ValueError
        If something was done to it that does not go over: a parameter of another name, a forward of its own.

    Examples
    --------
    >>> theirs = torch.nn.GRU(3, 5)
    >>> ours = from_torch(theirs)
    >>> ours.weight_hh_l0 is theirs.weight_hh_l0
    True
    """
    return _convert(layer, _KINDS)


def to_torch(layer: torch.nn.Module) -> Any:
    """Return the layer of torch.nn that takes the place of one of these, as `from_torch` does the other way.

    Examples
    --------
    >>> to_torch(GRU(3, 5))
    GRU(3, 5)
    """
    return _convert(layer, _BACK)


def _convert(layer: torch.nn.Module, kinds: dict[type, type]) -> Any:
    kind = kinds.get(type(layer))
    if kind is None:
        raise TypeError(_not_one_of("layer", layer, kinds))
    options = {name: getattr(layer, name) for name in "bias batch_first dropout bidirectional".split()}
    own_option = {"RNN": "nonlinearity", "LSTM": "proj_size"}.get(kind.__name__)
    if own_option:
        options[own_option] = getattr(layer, own_option)
    with warnings.catch_warnings():  # about dropout: the layer has told it
        warnings.simplefilter("ignore")
        new = kind(layer.input_size, layer.hidden_size, layer.num_layers, **options, device="meta")
    own, expected = layer._parameters, new._parameters
    if list(own) != list(expected) or layer._buffers or any(own[name] is None for name in own):
        odd = sorted({*own, *layer._buffers} ^ {*expected}) or list(own)
        raise ValueError(f"layer's parameters are not as torch.nn made them: {', '.join(odd)}")
    for name, parameter in own.items():
        if parameter.shape != expected[name].shape:
            raise ValueError(f"{name} has shape {tuple(parameter.shape)}, expected {tuple(expected[name].shape)}")
        if parameter.dtype not in _DTYPES and kinds is _KINDS:
            raise TypeError(_dtype_message(f"{name} is", parameter.dtype, "the model"))
    hooks = {name: layer.__dict__[name] for name in _HOOKS if name in layer.__dict__}
    if any(getattr(hook, "with_module", False) for group in hooks.values() for hook in _values(group)):
        raise ValueError("layer has a load_state_dict hook that is bound to it: remove the hook first")
    usual = type(layer)(1, 1, device="meta").__dict__
    others = {name: value for name, value in layer.__dict__.items() if name not in usual and name not in hooks}
    if "forward" in others:
        raise ValueError("layer has a forward of its own, which the other could not follow: delete it first")
    new._parameters.update(own)
    new._modules.update(layer._modules)
    new.__dict__.update({**others, **hooks, "training": layer.training})
    if kinds is _BACK:
        new._init_flat_weights()
    return new


def _values(group: Any) -> Iterable[Any]:
    return group.values() if hasattr(group, "values") else ()


def _not_one_of(name: str, layer: Any, kinds: Iterable[type]) -> str:
    wanted = " or ".join(f"{kind.__module__.removesuffix('.modules.rnn')}.{kind.__name__}" for kind in kinds)
    kind = type(layer)
    text = f"{name} is a {kind.__module__}.{kind.__qualname__}, expected {wanted}"
    return text + " and no subclass, which may compute something else" * isinstance(layer, tuple(kinds))


Filter = Callable[[torch.nn.Module, str], bool]


def replace_(model: torch.nn.Module, filter: Filter | None = None) -> list[str]:
    """Put these layers in the place of each torch.nn.RNN, LSTM and GRU in a model, which is modified.

    Parameters, hooks and whether they train stay the same objects and flags, and so an optimizer goes on as it was.
    Cells are left as they are: where they are small, training takes longer with ours.

    Parameters
    ----------
    model : torch.nn.Module
        It must not be such a layer itself: see `from_torch`.
    filter : function of a module and its name to bool, optional
        Which of them to replace; by default all.

    Returns
    -------
    list of str
        The names of the layers that were replaced, as in ``model.named_modules()``.

    Raises
    ------
    TypeError, ValueError
        As `from_torch`, with the layer's name, if there is one that cannot be replaced, a subclass for example. The
        model is as it was then: leave that layer out with `filter`.

    Examples
    --------
    >>> model = torch.nn.ModuleDict({"encoder": torch.nn.GRU(3, 5), "head": torch.nn.Linear(5, 2)})
    >>> replace_(model)
    ['encoder']
    >>> restore_(model)
    ['encoder']
    """
    return _swap(model, filter, _KINDS)


def restore_(model: torch.nn.Module, filter: Filter | None = None) -> list[str]:
    """Put torch.nn's layers in the place of each of these in a model: the inverse of `replace_`, and just like it."""
    return _swap(model, filter, _BACK)


def _swap(model: torch.nn.Module, filter: Filter | None, kinds: dict[type, type]) -> list[str]:
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, expected a torch.nn.Module")
    found = [
        (name, module)
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, tuple(kinds)) and (filter is None or filter(module, name))
    ]
    new: dict[torch.nn.Module, Any] = {}  # a layer in two places stays one
    for name, module in found:
        if not name:
            function = "from_torch" if kinds is _KINDS else "to_torch"
            raise ValueError(f"model is itself such a layer, {model}: take what {function}(model) returns")
        if module not in new:
            try:
                new[module] = _convert(module, kinds)
            except (TypeError, ValueError) as error:
                raise type(error)(f"{name} cannot be replaced: {error}") from error
    for name, module in found:
        path, _, last = name.rpartition(".")
        setattr(model.get_submodule(path), last, new[module])
    return [name for name, _ in found]
