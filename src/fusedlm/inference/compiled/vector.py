"""Sixteen float32 as one value inside numba functions, with memory addressed by integers.

Numba leaves it to the compiler to find vectors in loops, and in a product of a few rows it finds them badly. Here the
vectors are written down: each function below becomes a few LLVM instructions on <16 x float>, which LLVM turns into one
register of AVX-512, two of AVX2 or four of NEON. Addresses are int64, as of `Tensor.data_ptr()`: nothing is checked,
and nothing needs to be aligned beyond its element.
"""

import operator
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic, models, overload, register_model

LANES = 16

_I8, _I16, _I32 = ir.IntType(8), ir.IntType(16), ir.IntType(32)
_F32 = ir.FloatType()
_VECTOR = ir.VectorType(_F32, LANES)
_INTS = ir.VectorType(_I32, LANES)
_FAST = ("contract", "reassoc", "nsz")  # a product and a sum may become one instruction; sums may be reordered


class _Vector(types.Type):
    def __init__(self) -> None:
        super().__init__(name="f32x16")


f32x16 = _Vector()


@register_model(_Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, type_: Any) -> None:
        super().__init__(manager, type_, _VECTOR)


Emit = Callable[..., Any]  # (builder, the arguments' LLVM values ...) -> the result's LLVM value


def instruction(result: Any, *arguments: Any) -> Callable[[Emit], Any]:
    """Make of a function that emits LLVM instructions one that numba code calls with these types."""

    def decorate(emit: Emit) -> Any:
        def typed(*given: Any) -> Any:
            def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
                pairs = zip(values, given, arguments, strict=True)
                made = emit(builder, *[context.cast(builder, value, have, want) for value, have, want in pairs])
                return context.get_dummy_value() if result is types.void else made

            return result(*given), generate

        by_count: dict[int, Any] = {  # numba counts the arguments of what it is given
            0: lambda typing: typed(),
            1: lambda typing, a: typed(a),
            2: lambda typing, a, b: typed(a, b),
            3: lambda typing, a, b, c: typed(a, b, c),
        }
        wrapper = by_count[len(arguments)]
        wrapper.__name__, wrapper.__doc__ = emit.__name__, emit.__doc__
        return intrinsic(wrapper)

    return decorate


def inline(function: Any) -> Any:
    """Compile a function for use inside others; it never becomes a call."""
    return njit(nogil=True, error_model="numpy", forceinline=True)(function)


def pointer(builder: Any, address: Any, type_: Any) -> Any:
    return builder.inttoptr(address, type_.as_pointer())


def call(builder: Any, name: str, result: Any, *values: Any) -> Any:
    """Call a function of LLVM or of the C library by its name."""
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, [v.type for v in values]), name)
    return builder.call(function, values, fastmath=_FAST if result in (_F32, _VECTOR) else ())


def _repeat(builder: Any, value: Any, vector: Any) -> Any:
    undefined = ir.Constant(vector, ir.Undefined)
    one = builder.insert_element(undefined, value, _I32(0))
    return builder.shuffle_vector(one, undefined, ir.Constant(_INTS, [0] * LANES))


def _mask(builder: Any, count: Any) -> Any:
    """Which of the lanes are among the first count."""
    lanes = ir.Constant(_INTS, list(range(LANES)))
    return builder.icmp_signed("<", lanes, _repeat(builder, builder.trunc(count, _I32), _INTS))


def _load(builder: Any, address: Any, element: Any, count: Any = None) -> Any:
    """16 elements of memory, or the first count of them and zeros; the others are not touched."""
    vector, align = ir.VectorType(element, LANES), 4 if element == _F32 else element.width // 8
    source = pointer(builder, address, vector)
    if count is None:
        return builder.load(source, align=align)
    name = f"llvm.masked.load.v16{'f32' if element == _F32 else element}.p0"
    zeros = ir.Constant(vector, None)
    return call(builder, name, vector, source, _I32(align), _mask(builder, count), zeros)


def _widen_bf16(builder: Any, halves: Any) -> Any:
    """bfloat16 are the upper halves of float32."""
    wide = builder.zext(halves, _INTS)
    return builder.bitcast(builder.shl(wide, ir.Constant(_INTS, [16] * LANES)), _VECTOR)


@instruction(f32x16, types.int64)
def load_f32(builder: Any, address: Any) -> Any:
    """16 float32."""
    return _load(builder, address, _F32)


@instruction(f32x16, types.int64, types.int64)
def load_f32_part(builder: Any, address: Any, count: Any) -> Any:
    """count float32, then zeros."""
    return _load(builder, address, _F32, count)


@instruction(f32x16, types.int64)
def load_bf16(builder: Any, address: Any) -> Any:
    """16 bfloat16."""
    return _widen_bf16(builder, _load(builder, address, _I16))


@instruction(f32x16, types.int64, types.int64)
def load_bf16_part(builder: Any, address: Any, count: Any) -> Any:
    """count bfloat16, then zeros."""
    return _widen_bf16(builder, _load(builder, address, _I16, count))


@instruction(f32x16, types.int64)
def load_int8(builder: Any, address: Any) -> Any:
    """16 int8."""
    return builder.sitofp(builder.sext(_load(builder, address, _I8), _INTS), _VECTOR)


@instruction(types.void, types.int64, f32x16)
def store_f32(builder: Any, address: Any, value: Any) -> Any:
    """16 float32."""
    return builder.store(value, pointer(builder, address, _VECTOR), align=4)


@instruction(types.float32, types.int64)
def one_f32(builder: Any, address: Any) -> Any:
    """One float32 of memory."""
    return builder.load(pointer(builder, address, _F32), align=4)


@instruction(types.int64, types.int64)
def one_i64(builder: Any, address: Any) -> Any:
    """One int64 of memory."""
    return builder.load(pointer(builder, address, ir.IntType(64)), align=8)


@instruction(types.float64, types.int64)
def one_f64(builder: Any, address: Any) -> Any:
    """One float64 of memory."""
    return builder.load(pointer(builder, address, ir.DoubleType()), align=8)


@instruction(types.float32, types.int64)
def one_bf16(builder: Any, address: Any) -> Any:
    """One bfloat16 of memory."""
    half = builder.load(pointer(builder, address, _I16), align=2)
    return builder.bitcast(builder.shl(builder.zext(half, _I32), _I32(16)), _F32)


@instruction(types.float32, types.int64)
def one_f16(builder: Any, address: Any) -> Any:
    """One float16 of memory."""
    return builder.fpext(builder.load(pointer(builder, address, ir.HalfType()), align=2), _F32)


@instruction(types.int64, types.float32)
def half_bits(builder: Any, value: Any) -> Any:
    """The bits of a number as float16, from 0 to 65,535."""
    return builder.zext(builder.bitcast(builder.fptrunc(value, ir.HalfType()), _I16), ir.IntType(64))


@instruction(types.void, types.int64, types.float32)
def put_f32(builder: Any, address: Any, value: Any) -> Any:
    """Store one float32."""
    return builder.store(value, pointer(builder, address, _F32), align=4)


@instruction(types.void, types.int64, types.float32)
def put_bf16(builder: Any, address: Any, value: Any) -> Any:
    """Store one float32 as the nearest bfloat16, ties to even."""
    bits = builder.bitcast(value, _I32)
    odd = builder.and_(builder.lshr(bits, _I32(16)), _I32(1))
    rounded = builder.lshr(builder.add(bits, builder.add(odd, _I32(0x7FFF))), _I32(16))
    return builder.store(builder.trunc(rounded, _I16), pointer(builder, address, _I16), align=2)


@instruction(f32x16, types.float32)
def splat(builder: Any, value: Any) -> Any:
    """One number 16 times."""
    return _repeat(builder, value, _VECTOR)


@instruction(f32x16, f32x16, f32x16, f32x16)
def fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c."""
    return call(builder, "llvm.fmuladd.v16f32", _VECTOR, a, b, c)


@instruction(f32x16, f32x16, f32x16)
def _add(builder: Any, a: Any, b: Any) -> Any:
    return builder.fadd(a, b)


@instruction(f32x16, f32x16, f32x16)
def _subtract(builder: Any, a: Any, b: Any) -> Any:
    return builder.fsub(a, b)


@instruction(f32x16, f32x16, f32x16)
def _multiply(builder: Any, a: Any, b: Any) -> Any:
    return builder.fmul(a, b)


@instruction(f32x16, f32x16, f32x16)
def _divide(builder: Any, a: Any, b: Any) -> Any:
    return builder.fdiv(a, b)


def _operator(symbol: Any, function: Any) -> None:
    @overload(symbol)
    def typed(a, b):
        return (lambda a, b: function(a, b)) if a is f32x16 and b is f32x16 else None


for _symbol, _function in {
    operator.add: _add,
    operator.sub: _subtract,
    operator.mul: _multiply,
    operator.truediv: _divide,
}.items():
    _operator(_symbol, _function)


@instruction(f32x16, f32x16, f32x16)
def highest(builder: Any, a: Any, b: Any) -> Any:
    """The higher of a and b, lane by lane."""
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


@instruction(f32x16, f32x16)
def _nearest(builder: Any, a: Any) -> Any:
    return call(builder, "llvm.rint.v16f32", _VECTOR, a)


@instruction(f32x16, f32x16)
def _power_of_two(builder: Any, n: Any) -> Any:
    """2^n for whole n from -126 to 127, made of its exponent's bits."""
    biased = builder.add(builder.fptosi(n, _INTS), ir.Constant(_INTS, [127] * LANES))
    return builder.bitcast(builder.shl(biased, ir.Constant(_INTS, [23] * LANES)), _VECTOR)


@instruction(types.float32, f32x16)
def total(builder: Any, a: Any) -> Any:
    """The sum of the 16."""
    return call(builder, "llvm.vector.reduce.fadd.v16f32", _F32, ir.Constant(_F32, 0.0), a)


def _halves(size: int) -> tuple[list[int], list[int]]:
    """Of two vectors of blocks of `size` lanes: where the first halves of all blocks are, and the second ones."""
    lanes, half = range(2 * LANES), size // 2
    if size <= 4:  # within 128 bits, which is cheap, those of both vectors side by side
        lanes = [v * LANES + q * 4 + i for q in range(4) for v in range(2) for i in range(4)]  # type: ignore[assignment]
    return [i for i in lanes if i % size < half], [i for i in lanes if i % size >= half]


def _sum_each(vectors: list[Any], combine: Callable[[Any, Any, int], Any]) -> Any:
    """The tree that sums 16 vectors at once, one a lane: pairs add half of their lanes to the other half."""
    size = LANES
    while len(vectors) > 1:
        vectors = [combine(a, b, size) for a, b in zip(vectors[::2], vectors[1::2], strict=True)]
        size //= 2
    return vectors[0]


# Which vector's sum comes out in each lane.
_NAMES = [[i] * LANES for i in range(LANES)]
_SUMMED: list[int] = _sum_each(_NAMES, lambda a, b, size: [(a + b)[i] for i in _halves(size)[0]])


@instruction(types.void, types.int64, types.int64, types.UniTuple(f32x16, 16))
def add_sums(builder: Any, address: Any, stride: Any, vectors: Any) -> Any:
    """Add the sums of 4 * 4 vectors to float32 in memory: four side by side, and four such rows stride bytes apart."""

    def combine(a: Any, b: Any, size: int) -> Any:
        return builder.fadd(*[builder.shuffle_vector(a, b, ir.Constant(_INTS, lanes)) for lanes in _halves(size)])

    sums = _sum_each([builder.extract_value(vectors, _SUMMED.index(i)) for i in range(16)], combine)
    four = ir.VectorType(_F32, 4)
    for i in range(4):
        mask = ir.Constant(ir.VectorType(_I32, 4), [4 * i + j for j in range(4)])
        there = pointer(builder, builder.add(address, builder.mul(stride, stride.type(i))), four)
        part = builder.shuffle_vector(sums, sums, mask)
        builder.store(builder.fadd(builder.load(there, align=4), part), there, align=4)


@instruction(types.float32, f32x16)
def peak(builder: Any, a: Any) -> Any:
    """The highest of the 16."""
    return call(builder, "llvm.vector.reduce.fmax.v16f32", _F32, a)


@inline
def exp(x):
    """e^x within 2 units of the last place; below -87 and above 88 what it is there, not 0 and infinity.

    e^x = 2^n * e^r, where n is whole and |r| <= ln(2)/2; e^r is its series to r^7, whose next term is below 6e-9.
    """
    x = highest(x, splat(-87.0))
    x = splat(0.0) - highest(splat(0.0) - x, splat(-88.0))
    n = _nearest(x * splat(1.4426950408889634))
    r = fma(n, splat(-0.693359375), x)  # ln(2) in two parts: the first has so few digits that n times it is exact
    r = fma(n, splat(2.12194440e-4), r)
    y = fma(r, splat(1 / 5040), splat(1 / 720))
    y = fma(y, r, splat(1 / 120))
    y = fma(y, r, splat(1 / 24))
    y = fma(y, r, splat(1 / 6))
    y = fma(y, r, splat(1 / 2))
    y = fma(y, r, splat(1.0))
    y = fma(y, r, splat(1.0))
    return y * _power_of_two(n)


@instruction(types.void, types.int64)
def prefetch(builder: Any, address: Any) -> Any:
    """Ask for the cache line of an address, into the second-level cache. The address need not exist."""
    line = pointer(builder, address, _I8)
    return call(builder, "llvm.prefetch.p0", ir.VoidType(), line, _I32(0), _I32(2), _I32(1))
