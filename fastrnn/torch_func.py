"""Behind fastrnn.torch: derivatives of derivatives, forward-mode derivatives, and the transforms of torch.func.

The kernels compute a layer and its gradients. All further derivatives come out of `run`, the layers as a loop over time
in PyTorch's own operations: it is much slower, and entered only where one is asked for. Under torch.func the kernels
are called by `Forward` and `Backward`, which keep no tape: backward runs forward again.

Tensors of a call stand in one order: x, h, c, lengths, reset, masks, params; c, lengths and reset may be None.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch as functorch
from torch.autograd import forward_ad
from torch.nn.functional import linear
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from fastrnn.stack import Spec

# ---- the layers in PyTorch's operations: x and h of a step are the sums W_ih x + b_ih and W_hh h + b_hh


def _rnn(activation: Callable) -> Callable:
    return lambda x, h, states: (activation(x + h),)


def _lstm(x: Tensor, h: Tensor, states: Sequence[Tensor]) -> tuple[Tensor, ...]:
    i, f, g, o = (x + h).chunk(4, -1)
    c = f.sigmoid() * states[1] + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def _gru(x: Tensor, h: Tensor, states: Sequence[Tensor]) -> tuple[Tensor, ...]:
    (r, z, n), (r_h, z_h, n_h) = x.chunk(3, -1), h.chunk(3, -1)
    z, n = (z + z_h).sigmoid(), (n + (r + r_h).sigmoid() * n_h).tanh()
    return (n + z * (states[0] - n),)


_STEPS = {"rnn_tanh": _rnn(torch.tanh), "rnn_relu": _rnn(torch.relu), "lstm": _lstm, "gru": _gru}


def walk(
    cell: str, x: Tensor, states: Sequence[Tensor], params: dict[str, Tensor], lengths: Any, reset: Any, reverse: bool
) -> tuple[Tensor, Sequence[Tensor]]:
    """Return the output and the last states of one layer in one direction."""
    if cell not in _STEPS:
        raise NotImplementedError(f"cell is {cell!r}, expected one of {', '.join(_STEPS)} for these derivatives")
    lengths, reset = (None if rows is None else rows.to(x.device) for rows in (lengths, reset))
    with torch.autocast(x.device.type, enabled=False):
        sums = linear(x, params["weight_ih"], params.get("bias_ih")).unbind()
        outputs: list[Any] = [None] * len(sums)
        for t in reversed(range(len(sums))) if reverse else range(len(sums)):
            now = states if reset is None else [s.masked_fill(reset[t, :, None], 0) for s in states]
            new: Sequence[Tensor] = _STEPS[cell](
                sums[t], linear(now[0], params["weight_hh"], params.get("bias_hh")), now
            )
            if "weight_hr" in params:
                new = linear(new[0], params["weight_hr"]), new[1]
            outputs[t] = new[0]
            if lengths is not None:
                there = (lengths > t)[:, None]
                outputs[t] = new[0].masked_fill(~there, 0)
                new = [torch.where(there, one, before) for one, before in zip(new, states, strict=True)]
            states = new
    return torch.stack(outputs) if outputs else x.new_zeros(0, *states[0].shape), states


def run(
    spec: Spec,
    count: int,
    x: Tensor,
    h: Tensor,
    c: Any,
    lengths: Any,
    reset: Any,
    *others: Tensor,
    reverse: bool = False,
) -> tuple[Tensor, ...]:
    """Return the output and the last states of a stack of layers; `count` masks stand before the parameters."""
    masks, params = others[:count], others[count:]
    initial, last = [h] if c is None else [h, c], []
    outputs: list[Tensor] = []
    for k, part in enumerate(spec.split(params)):
        layer, direction = divmod(k, spec.directions)
        if k and direction == 0:
            x, outputs = torch.cat(outputs, -1), []
            x = x * masks[layer - 1] if masks else x
        output, states = walk(spec.cell, x, [s[k] for s in initial], part, lengths, reset, reverse or direction == 1)
        outputs.append(output)
        last.append(states)
    return (torch.cat(outputs, -1), *(torch.stack(same) for same in zip(*last, strict=True)))


def pull_back(function: Callable, tensors: Sequence[Any], gradients: Sequence[Tensor]) -> list[Any]:
    """Return the gradients of the tensors from those of what the function makes of them; None for no numbers."""
    places = [i for i, tensor in enumerate(tensors) if tensor is not None and tensor.is_floating_point()]

    def of_numbers(*numbers: Tensor) -> Any:
        full = list(tensors)
        for i, number in zip(places, numbers, strict=True):
            full[i] = number
        return tuple(function(*full))

    found: list[Any] = [None] * len(tensors)
    with torch.autocast(tensors[0].device.type, enabled=False):
        _, pull = torch.func.vjp(of_numbers, *[tensors[i] for i in places])
        for i, gradient in zip(places, pull(tuple(gradients)), strict=True):
            found[i] = gradient
    return found


# ---- the kernels under torch.func


def _map(
    function: Callable, size: int, in_dims: Sequence[int | None], tensors: Sequence[Any], rows: int
) -> tuple[tuple[Tensor, ...], Any]:
    """Call a function with a mapped axis; of its arguments and results the first `rows` have an axis of rows.

    That is axis 1, or the only one. If nothing else is mapped, or asked for, the mapped axis becomes a part of it; if
    so, there is one call for each place on the axis.
    """
    if rows == 0 or any(dim is not None for dim in in_dims[rows:]):
        calls = [
            function(*[t if d is None else t.select(d, i) for t, d in zip(tensors, in_dims, strict=True)])
            for i in range(size)
        ]
        results = tuple(torch.stack(same) for same in zip(*calls, strict=True))
        return results, (0,) * len(results)
    joined = []
    for tensor, dim in zip(tensors[:rows], in_dims[:rows], strict=True):
        if tensor is not None:
            axis = min(1, tensor.dim() - 1 - (dim is not None))
            tensor = torch.stack([tensor] * size, axis) if dim is None else tensor.movedim(dim, axis)
            tensor = tensor.flatten(axis, axis + 1)
        joined.append(tensor)
    results = tuple(r.unflatten(1, (size, r.shape[1] // size)) for r in function(*joined, *tensors[rows:]))
    return results, (1,) * len(results)


class Forward(torch.autograd.Function):
    """The output and the last states."""

    @staticmethod
    def forward(spec: Spec, count: int, *tensors: Any) -> tuple[Tensor, ...]:
        output, h_n, c_n, _ = _call(spec, count, tensors, training=False)
        return (output, h_n) if tensors[2] is None else (output, h_n, c_n)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.spec, ctx.count, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], spec: Spec, count: int, *tensors: Any) -> Any:
        return _map(
            lambda *some: Forward.apply(spec, count, *some), info.batch_size, in_dims[2:], tensors, rows=5 + count
        )

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        wanted = any(ctx.needs_input_grad[7 + ctx.count :])
        return None, None, *go_back(ctx.spec, ctx.count, wanted, gradients, ctx.saved_tensors)


class Backward(torch.autograd.Function):
    """The gradients of x, the initial states and, if they are wanted, the parameters, from those of what comes out."""

    @staticmethod
    def forward(spec: Spec, count: int, wanted: bool, d_output: Tensor, d_h: Tensor, d_c: Any, *tensors: Any) -> Any:
        x, h, c, lengths, reset, *others = tensors
        output, _, _, kept = _call(spec, count, tensors, training=True)
        dx, dh, dc, d_params = torch.ops.fastrnn.backward.default(
            d_output, d_h, d_c, x, h, c, output, others[count:], others[:count], kept, lengths, reset, *spec
        )
        return (dx, dh, *[dc] * (c is not None), *(d_params if wanted else ()))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.spec, ctx.count, ctx.wanted, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], spec: Spec, count: int, wanted: bool, *tensors: Any) -> Any:
        rows = 0 if wanted else 8 + count
        return _map(
            lambda *some: Backward.apply(spec, count, wanted, *some), info.batch_size, in_dims[3:], tensors, rows
        )

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        def function(d_output: Tensor, d_h: Tensor, d_c: Any, *tensors: Any) -> list[Any]:
            found = _go_back_by_operations(ctx.spec, ctx.count, (d_output, d_h, d_c), tensors)
            return [*found[: 2 + (d_c is not None)], *(found[5 + ctx.count :] if ctx.wanted else ())]

        return None, None, None, *pull_back(function, ctx.saved_tensors, gradients)


def _call(spec: Spec, count: int, tensors: Sequence[Any], training: bool) -> Any:
    x, h, c, lengths, reset, *others = tensors
    return torch.ops.fastrnn.forward.default(x, h, c, others[count:], others[:count], lengths, reset, *spec, training)


def _go_back_by_operations(spec: Spec, count: int, gradients: Sequence[Any], tensors: Sequence[Any]) -> list[Any]:
    given = [gradient for gradient in gradients if gradient is not None]
    return pull_back(lambda *some: run(spec, count, *some), tensors, given)


def go_back(spec: Spec, count: int, wanted: bool, gradients: Sequence[Tensor], tensors: Sequence[Any]) -> list[Any]:
    """Return the gradients of a call's tensors, None for lengths, reset and masks; they can be differentiated again."""
    if _in_forward_mode((*gradients, *tensors)):
        return _go_back_by_operations(spec, count, gradients, tensors)
    found = Backward.apply(spec, count, wanted, *(*gradients, None)[:3], *tensors)
    states = 3 if tensors[2] is not None else 2
    d_params = found[states:] if wanted else [None] * (len(tensors) - 5 - count)
    return [*(*found[:states], None)[:3], *[None] * (2 + count), *d_params]


def go_back_again(
    spec: Spec, gradients: Sequence[Any], x: Tensor, h: Any, c: Any, lengths: Any, reset: Any, masks: Any, params: Any
) -> tuple[Any, Any, Any, list[Any]]:
    """Return the gradients of x, h, c and params as `go_back` does; what can be None may be."""
    states = with_states(spec, x, h, c, params)
    output = x.new_empty(*x.shape[:2], spec.directions * states[0].shape[-1])
    given = with_zeros(gradients, [one for one in (output, *states) if one is not None])
    dx, dh, dc, *others = go_back(spec, len(masks), True, given, (x, *states, lengths, reset, *masks, *params))
    return dx, None if h is None else dh, None if c is None else dc, others[2 + len(masks) :]


def with_zeros(gradients: Sequence[Any], like: Sequence[Tensor]) -> list[Tensor]:
    """Return the gradients of those tensors, zeros where there are none."""
    return [torch.zeros_like(one) if d is None else d for d, one in zip(gradients, like, strict=False)]


def map_operator(operator: Callable, info: Any, in_dims: Any, *arguments: Any) -> tuple[Any, Any]:
    """Call an operator for each place on a mapped axis: what it keeps of one call is not a part of that of another."""
    flat, structure = tree_flatten(arguments)
    dims = tree_leaves(in_dims, is_leaf=lambda dim: dim is None)
    calls = [
        operator(
            *tree_unflatten([t if d is None else t.select(d, i) for t, d in zip(flat, dims, strict=True)], structure)
        )
        for i in range(info.batch_size)
    ]
    results = tree_map(lambda *same: torch.stack(same), *calls)
    return results, tree_map(lambda _: 0, results)


# ---- which way a call goes


@torch.compiler.assume_constant_result  # while torch.compile looks on
def _transforms() -> tuple[str, ...]:
    return tuple(level.key().name for level in functorch.get_interpreter_stack() or ())


def _has_tangent(tensors: Sequence[Any]) -> bool:
    return forward_ad._current_level >= 0 and any(
        tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors
    )


def _in_forward_mode(tensors: Sequence[Any]) -> bool:
    return "Jvp" in _transforms() or _has_tangent(tensors)


def refuse_forward_mode(tensors: Sequence[Any]) -> None:
    """Raise where an operator would lose a tangent."""
    if _has_tangent(tensors):
        raise NotImplementedError("the operators of fastrnn have no forward-mode derivatives: call the modules")


def transformed(
    spec: Spec, x: Tensor, h: Any, c: Any, params: Sequence[Tensor], masks: Sequence[Tensor], lengths: Any, reset: Any
) -> Any:
    """Return the output and the last states if a transform of torch.func or forward mode is at work, else None."""
    h, c = with_states(spec, x, h, c, params)
    tensors = x, h, c, lengths, reset, *masks, *params
    transforms, compiling = _transforms(), torch.compiler.is_compiling()
    if compiling:  # the operators can be mapped, and no Function can be compiled
        by_operations = any(transform != "Vmap" for transform in transforms)
    else:
        by_operations = _in_forward_mode(tensors) or (bool(transforms) and x.device.type == "cuda")
    if by_operations:
        _check_lengths(lengths, x.shape[0])
        return run(spec, len(masks), *tensors)
    if not compiling and ("Grad" in transforms or "Vmap" in transforms):
        return Forward.apply(spec, len(masks), *tensors)
    return None


def with_states(spec: Spec, x: Tensor, h: Any, c: Any, params: Sequence[Tensor]) -> tuple[Tensor, Any]:
    """Return the initial states, zeros where there are none."""
    K, W, H = spec.sizes(params)
    h = x.new_zeros(K, x.shape[1], W) if h is None else h
    return h, x.new_zeros(K, x.shape[1], H) if c is None and spec.cell == "lstm" else c


def _check_lengths(lengths: Any, T: int) -> None:
    """Check the lengths' values, as the kernels do, whatever is mapped over."""
    if lengths is None:
        return
    while functorch.is_functorch_wrapped_tensor(lengths):
        lengths = functorch.get_unwrapped(lengths)
    for length in lengths.flatten().tolist() if lengths.device.type != "meta" else ():
        if not 0 <= length <= T:
            raise ValueError(f"lengths has {length}, expected 0 to T = {T}")
