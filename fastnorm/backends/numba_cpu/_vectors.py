"""Vectors of elements: a type for Numba, its arithmetic, and how it gets from and to memory.

A vector is a line of 64 bytes of numbers to compute with, 16 float32 or 8 float64, or, where a name ends in 4,
four lines: what sums need to hide the latency of additions. Coefficients are computed as `WIDE` float64, what a line of
float32 becomes. LLVM splits a vector into what the machine has, so the order
of additions is the same everywhere, written down in the kernels and not up to the compiler. (Additions that LLVM
might reorder gave other bits from Numba's disk cache than freshly compiled.) Vectors also compile faster than loops
that LLVM must find them in, and allow what those cannot say: stores past the cache, which need whole aligned lines.

Storage is told apart by the element type of the array: float32 and float64 as they are, float16 as uint16,
bfloat16 as int16. Halves and float32 are computed with in float32, float64 in float64.
"""

# mypy: ignore-errors
# Numba's stubs do not know that an intrinsic is called without its typing context.

from __future__ import annotations

import math
import operator
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import lower_builtin, models, register_model, type_callable

from fastnorm.backends import numba_formulas as formulas
from fastnorm.backends.numba_cpu._compiler import intrinsic

FLOAT16 = types.uint16
BFLOAT16 = types.int16
LINE_BYTES = 64
WIDE = 16

I32 = ir.IntType(32)
WORD = ir.IntType(64)


class Vector(types.Type):
    """Numbers of one type, side by side in registers."""

    def __init__(self, element: types.Float, lines: int) -> None:
        self.element = element
        self.lanes = lines * LINE_BYTES * 8 // element.bitwidth
        super().__init__(name=f"vector({element}, {self.lanes})")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, vector: Vector) -> None:
        element = ir.FloatType() if vector.element == types.float32 else ir.DoubleType()
        super().__init__(manager, vector, ir.VectorType(element, vector.lanes))


def _define(symbol: Any, instruction: str) -> None:
    """An operator between vectors, or a vector and a number, which then stands in every lane."""

    @type_callable(symbol)
    def typed(context: Any) -> Any:
        def result(a: Any, b: Any) -> Any:
            vectors = [operand for operand in (a, b) if isinstance(operand, Vector)]
            others = [operand for operand in (a, b) if operand not in vectors[:1]]
            return vectors[0] if vectors and all(isinstance(other, types.Number) for other in others) else None

        return result

    @lower_builtin(symbol, Vector, Vector)
    @lower_builtin(symbol, Vector, types.Number)
    @lower_builtin(symbol, types.Number, Vector)
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        vector = signature.return_type
        operands = (
            value
            if kind == vector
            else _spread(builder, context.cast(builder, value, kind, vector.element), vector.lanes)
            for kind, value in zip(signature.args, arguments, strict=True)
        )
        return getattr(builder, instruction)(*operands)


_define(operator.add, "fadd")
_define(operator.iadd, "fadd")
_define(operator.sub, "fsub")
_define(operator.mul, "fmul")
_define(operator.truediv, "fdiv")


def accumulation(array: types.Array) -> types.Float:
    """The type in which elements of this storage are computed with."""
    return types.float64 if array.dtype == types.float64 else types.float32


def _line(array: types.Array) -> Vector:
    return Vector(accumulation(array), 1)


# ---- what intrinsics are made of -------------------------------------------------------------------


def _address(context: Any, builder: Any, array_type: Any, array: Any, index: Any) -> Any:
    """Address of an element, without the wrap-around of negative indices."""
    data = cgutils.create_struct_proxy(array_type)(context, builder, array).data
    return builder.gep(data, [index])


def _place(context: Any, builder: Any, array_type: Any, array: Any, index: Any, vector: Vector) -> Any:
    """(address, bytes of an element) of as many elements of storage as a vector has lanes."""
    stored = ir.VectorType(context.get_data_type(array_type.dtype), vector.lanes)
    address = builder.bitcast(_address(context, builder, array_type, array, index), stored.as_pointer())
    return address, context.get_abi_sizeof(stored.element)


def _spread(builder: Any, value: Any, lanes: int) -> Any:
    """A value in every lane."""
    vector = ir.VectorType(value.type, lanes)
    first = builder.insert_element(ir.Constant(vector, ir.Undefined), value, I32(0))
    return builder.shuffle_vector(first, first, ir.Constant(ir.VectorType(I32, lanes), [0] * lanes))


def _between(builder: Any, first: Any, last: Any, lanes: int) -> Any:
    """The mask of lanes first..last."""
    numbers = ir.Constant(ir.VectorType(I32, lanes), list(range(lanes)))
    first, last = (_spread(builder, builder.trunc(lane, I32), lanes) for lane in (first, last))
    return builder.and_(builder.icmp_signed(">=", numbers, first), builder.icmp_signed("<", numbers, last))


def _widened(builder: Any, array: types.Array, elements: Any) -> Any:
    lanes = elements.type.count
    if array.dtype == FLOAT16:
        return builder.fpext(
            builder.bitcast(elements, ir.VectorType(ir.HalfType(), lanes)), ir.VectorType(ir.FloatType(), lanes)
        )
    if array.dtype == BFLOAT16:
        wide = ir.VectorType(I32, lanes)
        bits = builder.shl(builder.zext(elements, wide), ir.Constant(wide, [16] * lanes))
        return builder.bitcast(bits, ir.VectorType(ir.FloatType(), lanes))
    return elements


def _narrowed(builder: Any, array: types.Array, vector: Any) -> Any:
    """Rounded to the storage: nearest, ties to even; NaN stays NaN."""
    lanes = vector.type.count
    storage = ir.VectorType(ir.IntType(16), lanes)
    if array.dtype == FLOAT16:
        return builder.bitcast(builder.fptrunc(vector, ir.VectorType(ir.HalfType(), lanes)), storage)
    if array.dtype == BFLOAT16:
        wide = ir.VectorType(I32, lanes)

        def all_lanes(value: int) -> Any:
            return ir.Constant(wide, [value] * lanes)

        bits = builder.bitcast(vector, wide)
        high = builder.lshr(bits, all_lanes(16))
        to_even = builder.add(all_lanes(0x7FFF), builder.and_(high, all_lanes(1)))
        rounded = builder.lshr(builder.add(bits, to_even), all_lanes(16))
        quiet = builder.or_(high, all_lanes(0x40))
        is_nan = builder.fcmp_unordered("uno", vector, vector)
        return builder.trunc(builder.select(is_nan, quiet, rounded), storage)
    return vector


def _intrinsic_name(name: str, elements: ir.VectorType) -> str:
    return f"llvm.{name}.v{elements.count}{elements.element.intrinsic_name}.p0"


# ---- intrinsics ------------------------------------------------------------------------------------


@intrinsic
def lanes(typing: Any, array: Any) -> Any:
    """Elements of a line."""
    count = _line(array).lanes
    return types.intp(array), lambda context, builder, signature, arguments: WORD(count)


@intrinsic
def begun(typing: Any, array: Any) -> Any:
    """Elements by which the array's first one is past the start of an aligned line."""
    count = _line(array).lanes

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        first = builder.ptrtoint(_address(context, builder, array, arguments[0], WORD(0)), WORD)
        size = context.get_abi_sizeof(context.get_data_type(array.dtype))
        return builder.urem(builder.udiv(first, WORD(size)), WORD(count))

    return types.intp(array), generate


@intrinsic
def itemsize(typing: Any, array: Any) -> Any:
    """Bytes of an element."""
    size = array.dtype.bitwidth // 8
    return types.intp(array), lambda context, builder, signature, arguments: WORD(size)


def _defined_spread(lines: int) -> Any:
    @intrinsic
    def spread(typing: Any, array: Any, value: Any) -> Any:
        """A float64 in every lane, rounded to the type in which the array's elements are computed with."""
        result = Vector(accumulation(array), lines)

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            value = context.cast(builder, arguments[1], types.float64, result.element)
            return _spread(builder, value, result.lanes)

        return result(array, types.float64), generate

    return spread


def _loaded(builder: Any, address: Any, size: int) -> Any:
    elements = builder.load(address)
    elements.align = size
    return elements


def _masked_load(builder: Any, address: Any, size: int, mask: Any) -> Any:
    stored = address.type.pointee
    function = cgutils.get_or_insert_function(
        builder.module,
        ir.FunctionType(stored, [address.type, I32, mask.type, stored]),
        _intrinsic_name("masked.load", stored),
    )
    return builder.call(function, [address, I32(size), mask, ir.Constant(stored, None)])


def _masked_store(builder: Any, elements: Any, address: Any, size: int, mask: Any) -> None:
    function = cgutils.get_or_insert_function(
        builder.module,
        ir.FunctionType(ir.VoidType(), [elements.type, address.type, I32, mask.type]),
        _intrinsic_name("masked.store", elements.type),
    )
    builder.call(function, [elements, address, I32(size), mask])


spread, spread4 = _defined_spread(1), _defined_spread(4)


@intrinsic
def load(typing: Any, array: Any, index: Any) -> Any:
    """The line of elements from this one on, as numbers to compute with."""
    result = Vector(accumulation(array), 1)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address, size = _place(context, builder, array, *arguments, result)
        return _widened(builder, array, _loaded(builder, address, size))

    return result(array, types.intp), generate


def _at_least(count: Any, lanes: int) -> bool:
    """Whether a count is a constant of so many."""
    return isinstance(count, ir.Constant) and count.constant >= lanes


def _load_some(builder: Any, array: types.Array, address: Any, size: int, count: Any, otherwise: Any) -> Any:
    """A vector of elements, but only `count` of them where these are fewer, the other lanes being those of `otherwise`.
    One place in a loop for whole vectors and its end, which thus compile once."""
    lanes = address.type.pointee.count
    if _at_least(count, lanes):
        return _widened(builder, array, _loaded(builder, address, size))
    with builder.if_else(builder.icmp_signed(">=", count, WORD(lanes)), likely=True) as (whole, part):
        with whole:
            all_lanes = _widened(builder, array, _loaded(builder, address, size))
            from_whole = builder.block
        with part:
            mask = _between(builder, WORD(0), count, lanes)
            some = builder.select(mask, _widened(builder, array, _masked_load(builder, address, size, mask)), otherwise)
            from_part = builder.block
    vector = builder.phi(all_lanes.type)
    vector.add_incoming(all_lanes, from_whole)
    vector.add_incoming(some, from_part)
    return vector


def _store_some(builder: Any, elements: Any, address: Any, size: int, count: Any) -> None:
    lanes = elements.type.count
    if _at_least(count, lanes):
        builder.store(elements, address, align=size)
        return
    with builder.if_else(builder.icmp_signed(">=", count, WORD(lanes)), likely=True) as (whole, part):
        with whole:
            builder.store(elements, address, align=size)
        with part:
            _masked_store(builder, elements, address, size, _between(builder, WORD(0), count, lanes))


@intrinsic
def load4(typing: Any, array: Any, index: Any, count: Any, otherwise: Any) -> Any:
    """Four lines of elements from this one on, but only `count` of them where these are fewer, the other lanes
    being those of `otherwise`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array_value, index, count, otherwise_value = arguments
        address, size = _place(context, builder, array, array_value, index, otherwise)
        return _load_some(builder, array, address, size, count, otherwise_value)

    return otherwise(array, types.intp, types.intp, otherwise), generate


@intrinsic
def store4(typing: Any, array: Any, index: Any, vector: Any, count: Any) -> Any:
    """Write four lines, but only `count` elements where these are fewer."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array_value, index, elements, count = arguments
        address, size = _place(context, builder, array, array_value, index, vector)
        _store_some(builder, _narrowed(builder, array, elements), address, size, count)
        return context.get_dummy_value()

    return types.void(array, types.intp, vector, types.intp), generate


@intrinsic
def load_part(typing: Any, array: Any, index: Any, first: Any, last: Any, otherwise: Any) -> Any:
    """`load`, but only lanes first..last are read, the others are those of `otherwise`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address, size = _place(context, builder, array, *arguments[:2], otherwise)
        mask = _between(builder, arguments[2], arguments[3], otherwise.lanes)
        elements = _widened(builder, array, _masked_load(builder, address, size, mask))
        return builder.select(mask, elements, arguments[4])

    return otherwise(array, types.intp, types.intp, types.intp, otherwise), generate


@intrinsic
def store(typing: Any, array: Any, index: Any, vector: Any, past_cache: Any) -> Any:
    """Round a vector to the storage and write it; past the cache only to where an aligned line starts."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address, size = _place(context, builder, array, *arguments[:2], vector)
        elements = _narrowed(builder, array, arguments[2])
        with builder.if_else(arguments[3]) as (streamed, plain):
            with streamed:
                write = builder.store(elements, address, align=size * _line(array).lanes)
                write.set_metadata("nontemporal", builder.module.add_metadata([I32(1)]))
            with plain:
                builder.store(elements, address, align=size)
        return context.get_dummy_value()

    return types.void(array, types.intp, vector, types.boolean), generate


@intrinsic
def store_part(typing: Any, array: Any, index: Any, vector: Any, first: Any, last: Any) -> Any:
    """Round a vector to the storage and write its lanes first..last."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address, size = _place(context, builder, array, *arguments[:2], vector)
        mask = _between(builder, *arguments[3:], vector.lanes)
        _masked_store(builder, _narrowed(builder, array, arguments[2]), address, size, mask)
        return context.get_dummy_value()

    return types.void(array, types.intp, vector, types.intp, types.intp), generate


def _defined_prefetch(lines: int) -> Any:
    @intrinsic
    def prefetch(typing: Any, array: Any, index: Any) -> Any:
        """Fetch the line of an element, or that and the next, into L2; they need not lie in the array."""

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            pointer = ir.IntType(8).as_pointer()
            function = cgutils.get_or_insert_function(
                builder.module, ir.FunctionType(ir.VoidType(), [pointer, I32, I32, I32]), "llvm.prefetch.p0"
            )
            address = builder.bitcast(_address(context, builder, array, *arguments), pointer)
            for line in range(lines):
                place = builder.gep(address, [WORD(line * LINE_BYTES)])
                builder.call(function, [place, I32(0), I32(2), I32(1)])
            return context.get_dummy_value()

        return types.void(array, types.intp), generate

    return prefetch


prefetch, prefetch4 = _defined_prefetch(1), _defined_prefetch(4)


@intrinsic
def fence(typing: Any) -> Any:
    """Wait for stores past the cache. Where stores are not x86's, what ends a parallel region orders them too."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if builder.module.triple.startswith(("x86_64", "i686")):
            function = cgutils.get_or_insert_function(
                builder.module, ir.FunctionType(ir.VoidType(), []), "llvm.x86.sse.sfence"
            )
            builder.call(function, [])
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def choose(typing: Any, first: Any, last: Any, inside: Any, outside: Any) -> Any:
    """Lanes first..last of one vector, the others of another."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.select(_between(builder, *arguments[:2], inside.lanes), *arguments[2:])

    return inside(types.intp, types.intp, inside, outside), generate


@intrinsic
def checked_weights(typing: Any, weights: Any) -> Any:
    """The weights, NaN in place of a negative one."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        numbers = arguments[0]
        nan = ir.Constant(numbers.type, [math.nan] * numbers.type.count)
        return builder.select(builder.fcmp_ordered(">=", numbers, ir.Constant(numbers.type, None)), numbers, nan)

    return weights(weights), generate


# ---- coefficients: float64, and intrinsics of one number or a vector of them -----------------------

_WIDE = Vector(types.float64, WIDE * 8 // LINE_BYTES)


def _wide_place(context: Any, builder: Any, array: types.Array, value: Any, index: Any) -> Any:
    return _place(context, builder, array, value, index, Vector(array.dtype, WIDE * array.dtype.bitwidth // 512))


@intrinsic
def load_wide(typing: Any, array: Any, index: Any, count: Any) -> Any:
    """WIDE numbers of an array of float32 or float64, or `count` where these are fewer, the other lanes being 0."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array_value, index, count = arguments
        address, size = _wide_place(context, builder, array, array_value, index)
        zeros = ir.Constant(address.type.pointee, None)
        vector = _load_some(builder, array, address, size, count, zeros)
        return vector if array.dtype == types.float64 else builder.fpext(vector, context.get_value_type(_WIDE))

    return _WIDE(array, types.intp, types.intp), generate


@intrinsic
def store_wide(typing: Any, array: Any, index: Any, vector: Any, count: Any) -> Any:
    """Write them, or `count` where these are fewer."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array_value, index, elements, count = arguments
        address, size = _wide_place(context, builder, array, array_value, index)
        if array.dtype == types.float32:
            elements = builder.fptrunc(elements, address.type.pointee)
        _store_some(builder, elements, address, size, count)
        return context.get_dummy_value()

    return types.void(array, types.intp, _WIDE, types.intp), generate


@intrinsic
def spread_wide(typing: Any, value: Any) -> Any:
    """A number in every lane."""
    return _WIDE(types.float64), lambda context, builder, signature, values: _spread(builder, values[0], WIDE)


def _like(value: Any, element: Any) -> Any:
    """The type of a number, or of a vector of as many as the value has."""
    return ir.VectorType(element, value.type.count) if isinstance(value.type, ir.VectorType) else element


def _constant(value: Any, number: float) -> Any:
    """A number as a constant of the value's type."""
    vector = isinstance(value.type, ir.VectorType)
    return ir.Constant(value.type, [number] * value.type.count if vector else number)


@intrinsic
def rounded(typing: Any, array: Any, value: Any) -> Any:
    """A float64 rounded to the type in which the array's elements are computed with."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        wide = arguments[1]
        if accumulation(array) == types.float64:
            return wide
        return builder.fpext(builder.fptrunc(wide, _like(wide, ir.FloatType())), wide.type)

    return value(array, value), generate


@intrinsic
def bounded(typing: Any, array: Any, value: Any) -> Any:
    """`formulas.bounded` for that type."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        wide = arguments[1]
        if accumulation(array) == types.float64:
            return wide
        for sign, greater, less in ((1.0, ">", "<"), (-1.0, "<", ">")):
            largest, infinite = (_constant(wide, sign * number) for number in (formulas.LARGEST_FLOAT32, math.inf))
            beyond = builder.and_(
                builder.fcmp_ordered(greater, wide, largest), builder.fcmp_ordered(less, wide, infinite)
            )
            wide = builder.select(beyond, largest, wide)
        return wide

    return value(array, value), generate


@intrinsic
def root(typing: Any, value: Any) -> Any:
    """The square root."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = arguments[0].type
        name = f"v{kind.count}f64" if isinstance(kind, ir.VectorType) else "f64"
        function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(kind, [kind]), f"llvm.sqrt.{name}")
        return builder.call(function, arguments)

    return value(value), generate


@intrinsic
def where_nonzero(typing: Any, condition: Any, value: Any) -> Any:
    """The value, 0 where the condition is 0."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        zero = ir.Constant(arguments[1].type, None)
        return builder.select(builder.fcmp_unordered("!=", arguments[0], zero), arguments[1], zero)

    return value(condition, value), generate


@intrinsic
def not_negative(typing: Any, value: Any) -> Any:
    """The value, 0 where it is negative."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        zero = ir.Constant(arguments[0].type, None)
        return builder.select(builder.fcmp_ordered("<", arguments[0], zero), zero, arguments[0])

    return value(value), generate


# ---- single elements --------------------------------------------------------------------------------


@intrinsic
def element(typing: Any, array: Any, index: Any) -> Any:
    """One element as a float64."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        stored = ir.VectorType(context.get_data_type(array.dtype), 1)
        value = builder.load(_address(context, builder, array, *arguments))
        one = builder.insert_element(ir.Constant(stored, ir.Undefined), value, I32(0))
        value = builder.extract_element(_widened(builder, array, one), I32(0))
        return context.cast(builder, value, accumulation(array), types.float64)

    return types.float64(array, types.intp), generate


@intrinsic
def total(typing: Any, vector: Any) -> Any:
    """The sum of all lanes, halves onto halves, in float64."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        sums, half = arguments[0], vector.lanes // 2
        while half > 0:
            low, high = (ir.Constant(ir.VectorType(I32, half), list(range(at, at + half))) for at in (0, half))
            sums = builder.fadd(builder.shuffle_vector(sums, sums, low), builder.shuffle_vector(sums, sums, high))
            half //= 2
        return context.cast(builder, builder.extract_element(sums, I32(0)), vector.element, types.float64)

    return types.float64(vector), generate


@intrinsic
def put(typing: Any, array: Any, index: Any, value: Any) -> Any:
    """array[index] = value for floating arrays, without the wrap-around of negative indices, which would keep loops
    from vectorising."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        number = context.cast(builder, arguments[2], types.float64, array.dtype)
        builder.store(number, _address(context, builder, array, *arguments[:2]))
        return context.get_dummy_value()

    return types.void(array, types.intp, types.float64), generate


SCRATCH = 512 + 64


@intrinsic
def scratch(typing: Any, array: Any) -> Any:
    """SCRATCH uninitialized numbers to compute with, on the stack: an array valid until the function returns."""
    dtype = accumulation(array)
    result = types.Array(dtype, 1, "C")

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        size = WORD(dtype.bitwidth // 8)
        data = cgutils.alloca_once(builder, context.get_value_type(dtype), size=WORD(SCRATCH))
        data.align = 64  # a cache line: the stack's own alignment is 16, and each load would reach into two
        made = context.make_array(result)(context, builder)
        context.populate_array(made, data=data, shape=[WORD(SCRATCH)], strides=[size], itemsize=size, meminfo=None)
        return made._getvalue()

    return result(array), generate
