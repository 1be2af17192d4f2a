"""What an NVIDIA GPU brings to the kernels' texts: its few inline instructions, all in one place.

The functions compile by numba-cuda, inside a kernel; pointers are CPointers. Importing this module needs numba-cuda,
but neither a GPU nor a driver. The instructions: NVIDIA's PTX ISA, https://docs.nvidia.com/cuda/parallel-thread-execution.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from llvmlite import ir
from numba import cuda, types
from numba.cuda.extending import intrinsic

float32, float64, int32, int64, uint32 = types.float32, types.float64, types.int32, types.int64, types.uint32

device = cuda.jit(device=True, forceinline=True)


def activations(dtype):
    """Sigmoid, tanh and relu of the cells, for numbers of `dtype` and no others: nothing becomes a double."""
    number = getattr(types, dtype)
    zero, one = np.dtype(dtype).type(0), np.dtype(dtype).type(1)

    def sigmoid(x):
        e = math.exp(-abs(x))
        return (e if x < zero else one) / (one + e)

    def tanh(x):
        return number(math.tanh(x))

    def relu(x):
        return zero if x < zero else x

    def d_relu(y, dy):
        return dy if y > zero else zero

    return {
        "sigmoid": device(sigmoid),
        "tanh": device(tanh),
        "relu": device(relu),
        "d_relu": device(d_relu),
        "ONE": one,
    }


# ---- pointers


@intrinsic
def at(typingctx, pointer, n):
    """The pointer to pointer[n]."""

    def codegen(context, builder, signature, arguments):
        pointer, n = arguments
        return builder.gep(pointer, [context.cast(builder, n, signature.args[1], types.int64)])

    return pointer(pointer, n), codegen


# ---- instructions


def _asm(text, constraints, result, arguments, *, pure=True):
    """An intrinsic for an instruction on numbers. Several results come as a tuple."""
    several = isinstance(result, types.BaseTuple)

    def codegen(context, builder, signature, values):
        given = [context.cast(builder, v, t, to) for v, t, to in zip(values, signature.args, arguments, strict=True)]
        returned = ir.LiteralStructType([_LLVM[t] for t in result]) if several else _LLVM[result]
        kind = ir.FunctionType(returned, [_LLVM[t] for t in arguments])
        value = builder.call(ir.InlineAsm(kind, text, constraints, side_effect=not pure), given)
        if not several:
            return value
        return context.make_tuple(builder, result, [builder.extract_value(value, i) for i in range(len(result))])

    def typing(*_):
        return result(*arguments), codegen

    return _of_arguments(typing, len(arguments))


def _on_memory(text, constraints, unit, result, values):
    """An intrinsic (pointer, i, values...) for an instruction on memory, i places of `unit` bytes behind a pointer."""

    def codegen(context, builder, signature, given):
        pointer, i, *given = given
        i = builder.mul(context.cast(builder, i, signature.args[1], types.int64), ir.Constant(ir.IntType(64), unit))
        address = builder.add(builder.ptrtoint(pointer, ir.IntType(64)), i)
        returned = ir.LiteralStructType([_LLVM[t] for t in result]) if result else ir.VoidType()
        kind = ir.FunctionType(returned, [ir.IntType(64), *(_LLVM[t] for t in values)])
        asm = ir.InlineAsm(kind, text, constraints + ",~{memory}", side_effect=True)
        value = builder.call(asm, [address, *given])
        if not result:
            return context.get_dummy_value()
        return context.make_tuple(builder, result, [builder.extract_value(value, i) for i in range(len(result))])

    def typing(typingctx, pointer, i, *_):
        return (result or types.void)(pointer, i, *values), codegen

    return _of_arguments(typing, 2 + len(values))


def _of_arguments(typing, count):
    """The intrinsic: Numba reads the number of its arguments off the signature."""
    names = ["typingctx", *(f"a{i}" for i in range(count))]
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    typing.__signature__ = inspect.Signature([inspect.Parameter(name, kind) for name in names])
    return intrinsic(typing)


_F, _U = float32, uint32
_LLVM = {_U: ir.IntType(32), _F: ir.FloatType()}
_FOUR_F, _FOUR_U = types.UniTuple(_F, 4), types.UniTuple(_U, 4)


# ---- words: 32 bits, one float32 or two numbers of 16 bits

word_of = _asm("mov.b32 $0, $1;", "=r,f", _U, [_F])
number_of = _asm("mov.b32 $0, $1;", "=f,r", _F, [_U])
as_tf32 = _asm("cvt.rna.tf32.f32 $0, $1;", "=r,f", _U, [_F])
two_bfloat16 = _asm("cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", _U, [_F, _F])  # the first number in the lower half
two_float16 = _asm("cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", _U, [_F, _F])
# The part of a float32 that tensor cores read. The second is for what stays in a register through a loop: the compiler
# may not move it out of the loop, where both parts would take a register each.
upper = _asm("and.b32 $0, $1, 0xffffe000;", "=r,r", _U, [_U])
upper_again = _asm("and.b32 $0, $1, 0xffffe000;", "=r,r", _U, [_U], pure=False)


@device
def one_float32(first, second):
    return word_of(first)


@device
def one_tf32(first, second):
    return as_tf32(first)


# ---- memory that other blocks write meanwhile

load_words = _on_memory("ld.relaxed.gpu.global.v4.u32 {$0,$1,$2,$3}, [$4];", "=r,=r,=r,=r,l", 4, _FOUR_U, [])
store_word = _on_memory("st.relaxed.gpu.global.u32 [$0], $1;", "l,r", 4, None, [_U])
store_half = _on_memory("{.reg .b16 h; cvt.u16.u32 h, $1; st.relaxed.gpu.global.u16 [$0], h;}", "l,r", 2, None, [_U])


@device
def pause():
    """Between two looks at memory. Nothing: to sleep would take longer than what is waited for."""


@device
def sync_warp():
    cuda.syncwarp(0xFFFFFFFF)


# ---- tensor cores: D = A B + C, with A 16 rows, B 8 columns


def _mma(kind):
    text = f"mma.sync.aligned.{kind} {{$0,$1,$2,$3}}, {{$4,$5,$6,$7}}, {{$8,$9}}, {{$10,$11,$12,$13}};"
    return _asm(text, "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f", _FOUR_F, [_U] * 6 + [_F] * 4)


_tf32 = _mma("m16n8k8.row.col.f32.tf32.tf32.f32")


class Format(NamedTuple):
    """Numbers as tensor cores take them."""

    pack: Callable  # (first, second) -> the word of one number, or of two
    mma: Callable  # (four words of A, two of B, four numbers of C) -> four numbers


FORMATS = {
    "float32": Format(one_float32, _tf32),
    "tf32": Format(one_tf32, _tf32),
    "bfloat16": Format(two_bfloat16, _mma("m16n8k16.row.col.f32.bf16.bf16.f32")),
    "float16": Format(two_float16, _mma("m16n8k16.row.col.f32.f16.f16.f32")),
}
