"""`hand_out`, with which a kernel shares out its tasks to the threads of Numba's threading layer.

The layer's loop, the one that Numba's own parallel functions end in, calls the kernel. So a kernel is compiled once
and not again by Numba's parallel pipeline, which took as long again, and running serially or in parallel executes the
same machine code.
"""

# mypy: ignore-errors
# Numba's stubs do not know that an intrinsic is called without its typing context.

from __future__ import annotations

import functools
from typing import Any

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

RANGES = 8
"""Ranges a thread that tasks are handed out in: enough to balance, and slabs within one share lines of the output.
With a range a slab, 14x14 forward took 2.7 ms instead of 2.2."""

WORD = ir.IntType(64)
VOID = ir.VoidType()
ADDRESS = ir.IntType(8).as_pointer()
WORDS = WORD.as_pointer()
PARALLEL_FOR = ir.FunctionType(VOID, [ADDRESS] * 5 + [WORD] * 3)
"""(function, arrays, sizes, steps, data, dimensions of an element, number of arrays, threads): it calls
function(arrays, sizes, steps, data) sizes[0] times in all, a part of them on each thread."""
BODY = ir.FunctionType(VOID, [ADDRESS.as_pointer(), WORDS, WORDS, ADDRESS])


@functools.cache
def parallel_for() -> int:
    """Address of the threading layer's loop, once the layer has been started."""
    return binding.address_of_symbol("numba_parallel_for")


@intrinsic
def hand_out(typing: Any, launcher: Any, threads: Any, count: Any) -> Any:
    """Call the kernel in which this stands again, for ranges that make up tasks 0..count, in any order and on so many
    threads: kernel(0, begin, end, *its other arguments). A thread that is done takes the next range.

    `launcher` is `parallel_for`. The kernel must not raise: nobody would hear of it.
    """

    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        launcher, threads, count = given
        kernel = builder.function
        most = builder.mul(threads, WORD(RANGES))
        ranges = builder.select(builder.icmp_signed("<", count, most), count, most)
        shared = cgutils.pack_struct(builder, [WORD(0), ranges, count, *kernel.args])
        data = cgutils.alloca_once_value(builder, shared)
        sizes = cgutils.alloca_once_value(builder, threads)
        none = ir.Constant(ADDRESS, None)
        arguments = [_work(kernel, data.type, builder.module), none, sizes, none, data]
        builder.call(
            builder.inttoptr(launcher, PARALLEL_FOR.as_pointer()),
            [*(builder.bitcast(argument, ADDRESS) for argument in arguments), WORD(0), WORD(0), threads],
        )
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


def _work(kernel: Any, shared: Any, module: Any) -> Any:
    """What each thread does: take the next range until none is left."""
    function = ir.Function(module, BODY, f"{kernel.name}.work")
    function.linkage = "internal"
    builder = ir.IRBuilder(function.append_basic_block())
    data = builder.bitcast(function.args[3], shared)
    _, ranges, count, *arguments = cgutils.unpack_tuple(builder, builder.load(data))
    # Numba's convention: where the result goes, where an exception goes, then the arguments.
    result, exception = (builder.alloca(pointer.type.pointee) for pointer in kernel.args[:2])
    following = cgutils.gep_inbounds(builder, data, 0, 0)
    take, run, done = (function.append_basic_block() for _ in range(3))
    builder.branch(take)
    builder.position_at_end(take)
    number = builder.atomic_rmw("add", following, WORD(1), "monotonic")
    builder.cbranch(builder.icmp_signed("<", number, ranges), run, done)
    builder.position_at_end(run)
    begin, end = (builder.sdiv(builder.mul(edge, count), ranges) for edge in (number, builder.add(number, WORD(1))))
    builder.call(kernel, [result, exception, WORD(0), begin, end, *arguments[5:]])
    builder.branch(take)
    builder.position_at_end(done)
    builder.ret_void()
    return function
