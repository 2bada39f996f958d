"""Dropout: y[i] = x[i]*scale where the random word of element first + i is below the threshold, else 0.

    word = number(stream 0) << 16 | number(stream 1), number index % 8 of a counter: the words cut in halves
    counter = {index // 8 low half, high half, stream, 0}, key = {seed low half, seed high half}
    seven times:  c = {hi(M1*c[2]) ^ c[1] ^ k[0], lo(M1*c[2]), hi(M0*c[0]) ^ c[3] ^ k[1], lo(M0*c[0])}
                  k = {k[0] + W0, k[1] + W1}

Numbers are drawn for 64 elements at a time, whose fates are then the bits of one word: drawing is work for the
processor and writing is work for the memory, and small steps let the two overlap. Stream 1 is looked at only for the
element in 65,536 whose number of stream 0 is that of the threshold.
"""

# mypy: ignore-errors
# Numba infers and checks the types of kernels; its stubs do not know that an intrinsic is called without its context.

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils

from fastnorm.backends import numba_formulas as formulas
from fastnorm.backends.numba_cpu._compiler import compiled, intrinsic
from fastnorm.backends.numba_cpu._launch import Kernel
from fastnorm.backends.numba_cpu._scalars import least
from fastnorm.backends.numba_cpu._tasks import hand_out
from fastnorm.backends.numba_cpu._vectors import (
    begun,
    fence,
    lanes,
    load,
    load_part,
    prefetch,
    spread,
    store,
    store_part,
)

PIECE = 1 << 14
"""Elements of a task."""
DRAWN = 64
"""Elements whose numbers are drawn together."""

I16, I32, WORD = ir.IntType(16), ir.IntType(32), ir.IntType(64)
NUMBERS = 8
"""Of a counter."""
COUNTERS = ir.VectorType(WORD, DRAWN // NUMBERS)
"""A counter in each 64-bit lane: a word is the lower half, so that a product of words needs no shuffling."""


def _all(value: Any) -> ir.Constant:
    return ir.Constant(COUNTERS, [int(value)] * COUNTERS.count)


def _spread(builder: Any, value: Any) -> Any:
    first = builder.insert_element(ir.Constant(COUNTERS, ir.Undefined), value, I32(0))
    return builder.shuffle_vector(first, first, ir.Constant(ir.VectorType(I32, COUNTERS.count), None))


@intrinsic
def _drawn(typing: Any, group: Any, seed: Any, limit: Any) -> Any:
    """Which numbers of elements group*DRAWN + (0, 1, ...) are below a limit of 16 bits, and which equal it, as bits."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        group, seed, limit = arguments
        low, half = _all(0xFFFFFFFF), _all(32)
        first = builder.mul(group, WORD(COUNTERS.count))
        c0 = builder.add(_spread(builder, first), ir.Constant(COUNTERS, list(range(COUNTERS.count))))
        c1, c2, c3 = builder.lshr(c0, half), _all(0), _all(0)
        k0, k1 = builder.trunc(seed, I32), builder.trunc(builder.lshr(seed, WORD(32)), I32)
        for _ in range(formulas.PHILOX_ROUNDS):
            even, odd = (
                builder.mul(builder.and_(c0, low), _all(formulas.M0)),
                builder.mul(builder.and_(c2, low), _all(formulas.M1)),
            )
            c0 = builder.xor(builder.xor(builder.lshr(odd, half), c1), _spread(builder, builder.zext(k0, WORD)))
            c2 = builder.xor(builder.xor(builder.lshr(even, half), c3), _spread(builder, builder.zext(k1, WORD)))
            c1, c3 = builder.and_(odd, low), builder.and_(even, low)
            k0, k1 = builder.add(k0, I32(int(formulas.W0))), builder.add(k1, I32(int(formulas.W1)))
        # Two words in a lane, then the lanes of both in turns: the words in order, and so their halves.
        pairs = builder.or_(c0, builder.shl(c1, half)), builder.or_(c2, builder.shl(c3, half))
        turns = [lane for counter in range(COUNTERS.count) for lane in (counter, COUNTERS.count + counter)]
        in_order = builder.shuffle_vector(*pairs, ir.Constant(ir.VectorType(I32, len(turns)), turns))
        numbers = builder.bitcast(in_order, ir.VectorType(I16, DRAWN))
        same = builder.insert_element(ir.Constant(numbers.type, ir.Undefined), builder.trunc(limit, I16), I32(0))
        same = builder.shuffle_vector(same, same, ir.Constant(ir.VectorType(I32, DRAWN), None))
        bits = [builder.bitcast(builder.icmp_unsigned(how, numbers, same), WORD) for how in ("<", "==")]
        return context.make_tuple(builder, signature.return_type, bits)

    return types.UniTuple(types.int64, 2)(types.int64, types.int64, types.int64), generate


@intrinsic
def _bits_from(typing: Any, bits: Any, following: Any, skip: Any) -> Any:
    """64 bits from bit `skip` of `bits` on, the last of them from `following`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        bits, following, skip = arguments
        function = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(WORD, [WORD, WORD, WORD]), "llvm.fshr.i64"
        )
        return builder.call(function, [following, bits, skip])

    return types.int64(types.int64, types.int64, types.int64), generate


@intrinsic
def _kept(typing: Any, bits: Any, first: Any, vector: Any) -> Any:
    """The lanes of a vector whose bits, from bit `first` on, are set; 0 in the others."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        bits, first, numbers = arguments
        some = builder.trunc(builder.lshr(bits, first), ir.IntType(vector.lanes))
        mask = builder.bitcast(some, ir.VectorType(ir.IntType(1), vector.lanes))
        return builder.select(mask, numbers, ir.Constant(numbers.type, None))

    return vector(types.int64, types.int64, vector), generate


philox = compiled(formulas.philox)
numbers_below = compiled(formulas.numbers_below)


@compiled
def _settled(group, seed, threshold, kept, ties):
    """`kept` and those of the ties that are below the threshold by their numbers of stream 1."""
    for at in range(0, DRAWN, NUMBERS):
        if ties >> at & 0xFF != 0:
            counter = np.uint64(group * (DRAWN // NUMBERS) + at // NUMBERS)
            below = numbers_below(philox(counter, 1, seed), np.uint64(threshold & 0xFFFF))
            kept |= ties & below << at
    return kept


@compiled
def _fates(index, seed, threshold):
    """Which elements of the index's group are kept, as bits."""
    if threshold >> 32 != 0:
        return -1
    group = index // DRAWN
    kept, ties = _drawn(group, seed, threshold >> 16)
    return kept if ties == 0 else _settled(group, seed, threshold, kept, ties)


@compiled
def _write(x, y, at, end, first, seed, threshold, scale, past_cache, ahead):
    """Elements at..end of the output: whole lines, and what comes before and after."""
    step, factor, zero = lanes(y), spread(y, scale), spread(y, 0.0)
    broken = (begun(y) + at) % step if past_cache else 0
    bits = _fates(first + at, seed, threshold)
    while at < end:
        count = least(DRAWN if broken == 0 else step - broken, end - at)
        skip = (first + at) % DRAWN
        following = bits
        if skip + count >= DRAWN:
            following = _fates(first + at + DRAWN, seed, threshold)
        here = _bits_from(bits, following, skip)
        whole = count // step * step
        for i in range(0, whole, step):
            prefetch(x, at + i + ahead)
            store(y, at + i, _kept(here, i, load(x, at + i) * factor), past_cache)
        if whole < count:
            some = load_part(x, at + whole, 0, count - whole, zero) * factor
            store_part(y, at + whole, _kept(here, whole, some), 0, count - whole)
        bits, at, broken = following, at + count, 0


@Kernel
def dropout(launcher, threads, step, begin, end, plan, x, y, first, seed, threshold, scale, past_cache, ahead):
    if threads:
        hand_out(launcher, threads, plan)
        return
    for task in range(begin, end):
        upto = least((task + 1) * PIECE, x.size)
        _write(x, y, task * PIECE, upto, first, seed, threshold, scale, past_cache, ahead)
    fence()
