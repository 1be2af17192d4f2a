"""What an NVIDIA GPU brings to the kernels' texts: its few inline instructions, all in one place.

The functions compile by numba-cuda, inside a kernel; pointers are CPointers. Importing this module needs numba-cuda,
but neither a GPU nor a driver. The instructions: NVIDIA's PTX ISA, https://docs.nvidia.com/cuda/parallel-thread-execution.
"""

from __future__ import annotations

import math

import numpy as np
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
