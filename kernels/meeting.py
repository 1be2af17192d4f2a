"""How threads that share a walk meet after every step, compiled; the rules stand in :mod:`fastrnn.kernels.barrier`."""

from __future__ import annotations

from llvmlite import binding, ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from fastrnn.kernels import simd
from fastrnn.kernels.barrier import ALONE, CLOSED, COME, LEAVE, LINE, MODE, OPEN, PATIENCE, TOGETHER
from fastrnn.kernels.lean import register_jitable
from fastrnn.kernels.simd import INT32, INT64


def _pointer(context, builder, array_type, array, index):
    return simd.address(context, builder, array_type, array, index)


@intrinsic
def _look(typingctx, sync, place):
    """sync[place], and all that its writer had written before."""

    def emit(context, builder, sig, args):
        return builder.load_atomic(_pointer(context, builder, sig.args[0], *args), "acquire", 8)

    return types.int64(sync, types.intp), emit


@intrinsic
def _tell(typingctx, sync, place, value):
    """sync[place] = value, after everything that was written before."""

    def emit(context, builder, sig, args):
        builder.store_atomic(args[2], _pointer(context, builder, sig.args[0], *args[:2]), "release", 8)
        return context.get_dummy_value()

    return types.void(sync, types.intp, types.int64), emit


@intrinsic
def _count(typingctx, sync, place):
    """sync[place] += 1."""

    def emit(context, builder, sig, args):
        place = _pointer(context, builder, sig.args[0], *args)
        builder.atomic_rmw("add", place, ir.Constant(INT64, 1), "acq_rel")
        return context.get_dummy_value()

    return types.void(sync, types.intp), emit


@intrinsic
def _change(typingctx, sync, place, old, new):
    """sync[place] = new if it was old; whether it was. One thread alone can succeed."""

    def emit(context, builder, sig, args):
        place = _pointer(context, builder, sig.args[0], *args[:2])
        return builder.extract_value(builder.cmpxchg(place, args[2], args[3], "acq_rel", "acquire"), 1)

    return types.boolean(sync, types.intp, types.int64, types.int64), emit


@intrinsic
def _pause(typingctx):
    """Let the core rest for some ten nanoseconds."""

    def emit(context, builder, sig, args):
        triple = binding.get_process_triple()
        if triple.startswith(("x86_64", "i686")):
            name, arguments = "llvm.x86.sse2.pause", []
        elif triple.startswith(("aarch64", "arm64")):
            name, arguments = "llvm.aarch64.hint", [ir.Constant(INT32, 1)]
        else:
            return context.get_dummy_value()
        hint = ir.FunctionType(ir.VoidType(), [argument.type for argument in arguments])
        builder.call(cgutils.get_or_insert_function(builder.module, hint, name), arguments)
        return context.get_dummy_value()

    return types.void(), emit


@register_jitable
def invite(sync, parts, s):
    """For the first thread, alone so far: share the steps from s on, if all others have come."""
    return _look(sync, COME) == parts - 1 and _change(sync, MODE, OPEN, s + 1)


@register_jitable
def join(sync):
    """For the other threads: the first step to share, or -1 if there is none."""
    _count(sync, COME)
    for _ in range(sync[PATIENCE]):
        mode = _look(sync, MODE)
        if mode != OPEN:
            return mode - 1 if mode > OPEN else -1
        _pause()
    # The first thread has no core, or a long step: it shall not count on this one. It may have done so just now.
    return -1 if _change(sync, MODE, OPEN, CLOSED) else max(-1, _look(sync, MODE) - 1)


@register_jitable
def close(sync):
    """For the first thread, at its end: nobody may come any more."""
    _change(sync, MODE, OPEN, CLOSED)


@register_jitable
def meet(sync, part, parts, n):
    """Meeting number n of all parts, which ends TOGETHER; or with one part ALONE, and the others shall LEAVE."""
    _tell(sync, LINE * (part + 1), n + 1)
    for other in range(parts):
        waited = 0
        while _look(sync, LINE * (other + 1)) <= n:
            mode = _look(sync, MODE)
            if mode < CLOSED:
                return LEAVE
            waited += 1
            if waited > sync[PATIENCE] and _change(sync, MODE, mode, -2 - part):
                return ALONE
            _pause()
    return TOGETHER
