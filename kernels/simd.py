"""The CPU's vector type for Numba, and its exp, sigmoid and tanh.

A :class:`Vector` is a Numba type whose values live in one vector register. Loads, stores and arithmetic are emitted as
LLVM vector instructions, so that the plain Python functions of :mod:`fastrnn.kernels.cells` compile to vectors as they
stand. Width and number of registers are those of the CPU that Numba compiles for.

Nothing here is called from Python: these are the words that the kernels are written in.
"""

from __future__ import annotations

import math
import operator
from fractions import Fraction

from llvmlite import ir
from numba.core import cgutils, types
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, lower_cast, models, overload, register_model
from numba.np.numpy_support import from_dtype

from fastrnn.kernels import cells, lean
from fastrnn.kernels.lean import register_jitable
from fastrnn.kernels.tiles import VECTOR_BITS

INT32, INT64 = ir.IntType(32), ir.IntType(64)

for _formula in cells.FORMULAS:
    register_jitable(_formula)


# ---- the type


class Vector(types.Type):
    """As many numbers of type `dtype` as fit into one vector register."""

    def __init__(self, dtype):
        self.dtype = dtype
        self.lanes = VECTOR_BITS // dtype.bitwidth
        super().__init__(name=f"Vector({dtype} x {self.lanes})")

    @property
    def llvm(self):
        return ir.VectorType(ir.FloatType() if self.dtype == types.float32 else ir.DoubleType(), self.lanes)

    @property
    def llvm_int(self):
        return ir.VectorType(ir.IntType(self.dtype.bitwidth), self.lanes)


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager, vector):
        super().__init__(manager, vector, vector.llvm)


def splat(builder, vector, scalar):
    """The vector whose lanes are all `scalar` (an LLVM value of its element type)."""
    undefined = ir.Constant(vector.llvm, ir.Undefined)
    first = builder.insert_element(undefined, scalar, ir.Constant(INT32, 0))
    return builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(INT32, vector.lanes), [0] * vector.lanes))


def constant(vector, value):
    return ir.Constant(vector.llvm, [float(value)] * vector.lanes)


def constant_int(vector, value):
    return ir.Constant(vector.llvm_int, [int(value)] * vector.lanes)


def call_llvm(builder, name, vector, *values):
    """Call the LLVM intrinsic `name` that takes vectors and returns one."""
    suffix = f"v{vector.lanes}f{vector.dtype.bitwidth}"
    function_type = ir.FunctionType(vector.llvm, [vector.llvm] * len(values))
    return builder.call(cgutils.get_or_insert_function(builder.module, function_type, f"llvm.{name}.{suffix}"), values)


def multiply_add(builder, vector, a, b, c):
    """a * b + c, in one instruction where the CPU has it (libm's fma would take a hundred times as long)."""
    return call_llvm(builder, "fmuladd", vector, a, b, c)


@lower_cast(types.Number, Vector)
def _number_to_vector(context, builder, fromty, toty, value):
    scalar = context.cast(builder, value, types.unliteral(fromty), toty.dtype)
    return splat(builder, toty, scalar)


def _only_vector(args):
    """The vector type among `args`, if the others are numbers that can be cast to it."""
    vectors = {a for a in args if isinstance(a, Vector)}
    if len(vectors) == 1 and all(isinstance(types.unliteral(a), (Vector, types.Number)) for a in args):
        return vectors.pop()
    return None


class _Arithmetic(AbstractTemplate):
    def generic(self, args, kws):
        vector = _only_vector(args)
        if vector is not None:
            return signature(vector, *[vector] * len(args))
        return None


def _define(op, arity, emit):
    infer_global(op)(type(f"_{op.__name__}", (_Arithmetic,), {}))
    lower_builtin(op, *[Vector] * arity)(lambda context, builder, sig, args: emit(builder, *args))


_define(operator.add, 2, lambda builder, a, b: builder.fadd(a, b))
_define(operator.sub, 2, lambda builder, a, b: builder.fsub(a, b))
_define(operator.mul, 2, lambda builder, a, b: builder.fmul(a, b))
_define(operator.truediv, 2, lambda builder, a, b: builder.fdiv(a, b))
_define(operator.neg, 1, lambda builder, a: builder.fneg(a))


# ---- memory


def vector_of(array):
    """The vector type for an array's elements."""
    return Vector(array.dtype)


def address(context, builder, array_type, array, index, vector=None):
    """Pointer to array[index] of a NumPy array or of one known by its address, as one to `vector` where given."""
    if isinstance(array_type, types.CPointer):
        data = array
    else:
        data = context.make_array(array_type)(context, builder, array).data
    pointer = builder.gep(data, [index])
    return pointer if vector is None else builder.bitcast(pointer, vector.llvm.as_pointer())


def _mask(builder, vector, n):
    """Lanes 0 .. n-1."""
    lanes = ir.Constant(ir.VectorType(INT64, vector.lanes), list(range(vector.lanes)))
    count = ir.VectorType(INT64, vector.lanes)
    first = builder.insert_element(ir.Constant(count, ir.Undefined), n, ir.Constant(INT32, 0))
    zeros = ir.Constant(ir.VectorType(INT32, vector.lanes), [0] * vector.lanes)
    return builder.icmp_signed("<", lanes, builder.shuffle_vector(first, ir.Constant(count, ir.Undefined), zeros))


def load_vector(builder, vector, pointer):
    return builder.load(pointer, align=vector.dtype.bitwidth // 8)


def store_vector(builder, vector, value, pointer):
    builder.store(value, pointer, align=vector.dtype.bitwidth // 8)


def _masked(builder, vector, kind, value, pointer, n):
    """llvm.masked.load or llvm.masked.store of the first n lanes."""
    mask_type = ir.VectorType(ir.IntType(1), vector.lanes)
    name = f"llvm.masked.{kind}.v{vector.lanes}f{vector.dtype.bitwidth}.p0"
    align = ir.Constant(INT32, vector.dtype.bitwidth // 8)
    mask = _mask(builder, vector, n)
    if kind == "load":
        signature = ir.FunctionType(vector.llvm, [vector.llvm.as_pointer(), INT32, mask_type, vector.llvm])
        arguments = [pointer, align, mask, constant(vector, 0)]
    else:
        signature = ir.FunctionType(ir.VoidType(), [vector.llvm, vector.llvm.as_pointer(), INT32, mask_type])
        arguments = [value, pointer, align, mask]
    return builder.call(cgutils.get_or_insert_function(builder.module, signature, name), arguments)


def load_first(builder, vector, pointer, n):
    """The first n lanes from memory (all, where n is no less than there are), 0 in the others."""
    whole = builder.icmp_signed(">=", n, ir.Constant(INT64, vector.lanes))
    with builder.if_else(whole, likely=True) as (then, otherwise):
        with then:
            all_lanes, from_then = load_vector(builder, vector, pointer), builder.block
        with otherwise:
            some_lanes, from_else = _masked(builder, vector, "load", None, pointer, n), builder.block
    value = builder.phi(vector.llvm)
    value.add_incoming(all_lanes, from_then)
    value.add_incoming(some_lanes, from_else)
    return value


def store_first(builder, vector, value, pointer, n):
    """Write the first n lanes (all, where n is no less than there are) and nothing beyond."""
    whole = builder.icmp_signed(">=", n, ir.Constant(INT64, vector.lanes))
    with builder.if_else(whole, likely=True) as (then, otherwise):
        with then:
            store_vector(builder, vector, value, pointer)
        with otherwise:
            _masked(builder, vector, "store", value, pointer, n)


@intrinsic
def lanes(typingctx, array):
    """Number of the array's elements that make one vector."""
    return types.intp(array), lambda context, builder, sig, args: ir.Constant(INT64, vector_of(sig.args[0]).lanes)


@intrinsic
def load(typingctx, array, index, n):
    """Vector of array[index : index + n], zeros behind (n may exceed the number of lanes)."""

    def emit(context, builder, sig, args):
        vector = sig.return_type
        return load_first(builder, vector, address(context, builder, sig.args[0], args[0], args[1], vector), args[2])

    return vector_of(array)(array, types.intp, types.intp), emit


@intrinsic
def store(typingctx, array, index, value, n):
    """array[index : index + n] = value (n may exceed the number of lanes)."""

    def emit(context, builder, sig, args):
        vector = vector_of(sig.args[0])
        pointer = address(context, builder, sig.args[0], args[0], args[1], vector)
        store_first(builder, vector, args[2], pointer, args[3])
        return context.get_dummy_value()

    return types.void(array, types.intp, vector_of(array), types.intp), emit


@intrinsic
def spread(typingctx, places, start, step):
    """Tuple of start + place * step, for each of `places` (a tuple of integers)."""

    def emit(context, builder, sig, args):
        places = cgutils.unpack_tuple(builder, args[0])
        values = [builder.add(args[1], builder.mul(place, args[2])) for place in places]
        return context.make_tuple(builder, sig.return_type, values)

    return types.UniTuple(types.intp, len(places))(places, types.intp, types.intp), emit


@intrinsic
def load_each(typingctx, array, index, places, step, n):
    """Tuple of the vectors at array[index + place * step], one for each of `places` (a tuple of integers)."""
    vector = vector_of(array)

    def emit(context, builder, sig, args):
        values = []
        for place in cgutils.unpack_tuple(builder, args[2]) if len(sig.args[2]) else []:
            at = builder.add(args[1], builder.mul(place, args[3]))
            pointer = address(context, builder, sig.args[0], args[0], at, vector)
            values.append(load_first(builder, vector, pointer, args[4]))
        return context.make_tuple(builder, sig.return_type, values)

    result = types.Tuple([vector] * len(places))
    return result(array, types.intp, places, types.intp, types.intp), emit


@intrinsic
def store_each(typingctx, array, index, places, step, values, n):
    """array[index + place * step] = value, for each of `places` and `values` (tuples of one length)."""

    def emit(context, builder, sig, args):
        vector = vector_of(sig.args[0])
        if len(sig.args[2]):
            pairs = zip(cgutils.unpack_tuple(builder, args[2]), cgutils.unpack_tuple(builder, args[4]), strict=True)
            for place, value in pairs:
                at = builder.add(args[1], builder.mul(place, args[3]))
                pointer = address(context, builder, sig.args[0], args[0], at, vector)
                store_first(builder, vector, value, pointer, args[5])
        return context.get_dummy_value()

    return types.void(array, types.intp, places, types.intp, values, types.intp), emit


@intrinsic
def given(typingctx, pointer):
    """Whether there is an array."""

    def emit(context, builder, sig, args):
        return builder.icmp_unsigned("!=", args[0], ir.Constant(args[0].type, None))

    return types.boolean(pointer), emit


# Kernels know arrays by the address of their first number. An array of Numba's is a record of seven words with a count
# of references, which is an atomic operation wherever the array is handed on: a small step would take twice the time.


def _at_address(element):
    def emit(context, builder, sig, args):
        return builder.inttoptr(args[-1], context.get_value_type(sig.return_type))

    return types.CPointer(element), emit


@intrinsic
def numbers_at(typingctx, like, address):
    """The numbers at an address, of the type of `like`: of a stage, or of whatever says for which numbers it is."""
    result, emit = _at_address(like.dtype)
    return result(like, types.int64), emit


@intrinsic
def integers_at(typingctx, address):
    result, emit = _at_address(types.int64)
    return result(types.int64), emit


@intrinsic
def flags_at(typingctx, address):
    """Booleans."""
    result, emit = _at_address(types.uint8)
    return result(types.int64), emit


def record_at(dtype):
    """A function of an address: the record of that type that stands there."""
    kind = from_dtype(dtype)

    @intrinsic
    def record(typingctx, address):
        def emit(context, builder, sig, args):
            return builder.inttoptr(args[0], context.get_value_type(kind))

        return kind(types.int64), emit

    return record


@intrinsic
def first_of(typingctx, like, values):
    """As many of the tuple `values` as `like` has."""

    def emit(context, builder, sig, args):
        items = [builder.extract_value(args[1], i) for i in range(len(sig.return_type))]
        return context.make_tuple(builder, sig.return_type, items)

    return types.UniTuple(values.dtype, len(like))(like, values), emit


@intrinsic
def pick(typingctx, values, i):
    """values[i] of a tuple of one type, where i is known to be one of its places: nothing is raised."""

    def emit(context, builder, sig, args):
        first, *others = cgutils.unpack_tuple(builder, args[0])
        for place, other in enumerate(others, 1):
            first = builder.select(builder.icmp_signed("==", args[1], ir.Constant(INT64, place)), other, first)
        return first

    return values.dtype(values, types.intp), emit


def emit_prefetch(builder, pointer):
    """Ask for the cache line at `pointer`, without waiting for it."""
    byte = ir.IntType(8).as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [byte, INT32, INT32, INT32])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    to_read_near_data = [ir.Constant(INT32, n) for n in (0, 3, 1)]
    builder.call(function, [builder.bitcast(pointer, byte), *to_read_near_data])


@intrinsic
def prefetch(typingctx, pointer, index):
    """Ask for the cache line of pointer[index], without waiting for it."""

    def emit(context, builder, sig, args):
        emit_prefetch(builder, builder.gep(args[0], [args[1]]))
        return context.get_dummy_value()

    return types.void(pointer, types.intp), emit


# ---- functions


def _vector_function(arity):
    """Decorator: `emit(builder, vector, *values)` as an intrinsic of `arity` vectors."""

    def decorate(emit):
        names = ", ".join("abc"[:arity])
        code = f"def {emit.__name__}(typingctx, {names}):\n    return typed({names})\n"

        def typed(*args):
            vector = _only_vector(args)
            if vector is None:
                return None
            return vector(*[vector] * arity), lambda context, builder, sig, values: emit(builder, vector, *values)

        space = {"typed": typed}
        exec(code, space)
        return intrinsic(space[emit.__name__])

    return decorate


@_vector_function(1)
def magnitude(builder, vector, x):
    return call_llvm(builder, "fabs", vector, x)


@_vector_function(2)
def with_sign_of(builder, vector, x, y):
    return call_llvm(builder, "copysign", vector, x, y)


@_vector_function(1)
def nearest(builder, vector, x):
    """x rounded to the nearest integer."""
    # Adding and taking away 1.5 * 2^(mantissa bits) rounds in two additions on every CPU; llvm.rint is a call without
    # SSE4.
    shift = constant(vector, 1.5 * 2.0 ** (23 if vector.dtype == types.float32 else 52))
    return builder.fsub(builder.fadd(x, shift), shift)


@_vector_function(2)
def at_most(builder, vector, x, bound):
    """The lesser of x and bound; NaN where x is NaN."""
    return builder.select(builder.fcmp_ordered(">", x, bound), bound, x)


@_vector_function(2)
def at_least(builder, vector, x, bound):
    """The greater of x and bound; NaN where x is NaN."""
    return builder.select(builder.fcmp_ordered("<", x, bound), bound, x)


@_vector_function(3)
def where_negative(builder, vector, x, yes, no):
    return builder.select(builder.fcmp_ordered("<", x, constant(vector, 0)), yes, no)


@_vector_function(3)
def fused(builder, vector, a, b, c):
    """a * b + c."""
    return multiply_add(builder, vector, a, b, c)


def _mantissa_and_bias(vector):
    return (23, 127) if vector.dtype == types.float32 else (52, 1023)


@_vector_function(1)
def power_of_two(builder, vector, n):
    """2**n for a whole n within the range of normal numbers."""
    mantissa, bias = _mantissa_and_bias(vector)
    # The whole number is read from the low bits of n + 1.5 * 2^mantissa: a conversion to 64-bit integers needs AVX-512.
    shifted = builder.fadd(n, constant(vector, 1.5 * 2.0**mantissa + bias))
    bits = builder.bitcast(shifted, vector.llvm_int)
    return builder.bitcast(builder.shl(bits, constant_int(vector, mantissa)), vector.llvm)


@_vector_function(1)
def exp_series(builder, vector, r):
    """(exp(r) - 1 - r) / r**2 for |r| <= log(2)/2: Taylor's series, with a remainder below a tenth of an ulp."""
    last = 7 if vector.dtype == types.float32 else 13
    total = constant(vector, Fraction(1, math.factorial(last)))
    for n in range(last - 1, 1, -1):
        total = multiply_add(builder, vector, total, r, constant(vector, Fraction(1, math.factorial(n))))
    return total


# log(2) in two parts: the first has few enough bits that its product with a whole number is exact (Cody and Waite
# 1980).
LOG2_HIGH = 355 / 512
LOG2_LOW = -0.00021219444005469058277


@register_jitable
def _reduce(x):
    """n and r with x = n log(2) + r and |r| <= log(2)/2."""
    n = nearest(x * 1.4426950408889634074)
    return n, fused(n, -LOG2_LOW, fused(n, -LOG2_HIGH, x))


@register_jitable
def _exp(x, low, high):
    n, r = _reduce(at_least(at_most(x, high), low))
    half = nearest(n * 0.5)  # the power in two factors, so that subnormal results come out
    return (fused(r * r, exp_series(r), r) + 1) * power_of_two(half) * power_of_two(n - half)


@register_jitable
def _sigmoid(x, low):
    """1 / (1 + exp(-x)), by exp(-|x|) so that nothing overflows and small results keep all their digits."""
    e = _exp(-magnitude(x), low, 0.0)
    return where_negative(x, e, 1.0) / (e + 1)


@register_jitable
def _tanh(x, bound):
    """e / (e + 2) with e = exp(2|x|) - 1, which loses no digits near 0; `bound` is where tanh has become 1."""
    n, r = _reduce(at_most(magnitude(x), bound) * 2)
    scale = power_of_two(n)
    e = fused(scale, fused(r * r, exp_series(r), r), scale - 1)
    return with_sign_of(e / (e + 2), x)


def exp(x):
    """exp of a vector, within 2 ulp; saturates to 0 and infinity."""
    raise NotImplementedError("exp is for vectors, inside kernels")


@overload(exp, jit_options=lean.CALLEE)
def _exp_overload(x):
    if isinstance(x, Vector):
        low, high = (-104.5, 89.5) if x.dtype == types.float32 else (-746.0, 710.5)
        return lambda x: _exp(x, low, high)


@overload(cells.sigmoid, jit_options=lean.CALLEE)
def _sigmoid_overload(x):
    if isinstance(x, Vector):
        low = -104.5 if x.dtype == types.float32 else -746.0
        return lambda x: _sigmoid(x, low)


@overload(cells.tanh, jit_options=lean.CALLEE)
def _tanh_overload(x):
    if isinstance(x, Vector):
        bound = 10.0 if x.dtype == types.float32 else 20.0
        return lambda x: _tanh(x, bound)


@overload(cells.relu, jit_options=lean.CALLEE)
def _relu_overload(x):
    if isinstance(x, Vector):
        return lambda x: at_least(x, 0.0)


@_vector_function(2)
def where_positive(builder, vector, x, yes):
    """yes where x > 0, else 0."""
    return builder.select(builder.fcmp_ordered(">", x, constant(vector, 0)), yes, constant(vector, 0))


@overload(cells.d_relu, jit_options=lean.CALLEE)
def _d_relu_overload(h, dh):
    if isinstance(h, Vector):
        return lambda h, dh: where_positive(h, dh)
