"""`hand_out`, with which a kernel shares out its tasks, and the one `prange` of this backend.

A kernel reaches that loop through a function pointer, and the loop the kernel. So a kernel is compiled once and not
again by Numba's parallel pipeline, which took as long again, and running serially or in parallel executes the same
machine code.
"""

# mypy: ignore-errors
# Numba's stubs do not know that an intrinsic is called without its typing context.

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import prange, types
from numba.core import cgutils
from numba.extending import intrinsic

WORD = ir.IntType(64)
VOID = ir.VoidType()


@intrinsic
def _call(typing: Any, tasks: Any, data: Any, begin: Any, end: Any) -> Any:
    """Call the function at address `tasks` with the address of its arguments and a range."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = ir.FunctionType(VOID, [WORD, WORD, WORD]).as_pointer()
        builder.call(builder.inttoptr(arguments[0], pointer), arguments[1:])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.int64), generate


def run_parallel(tasks: int, data: int, ranges: int, count: int) -> None:
    for i in prange(ranges):
        _call(tasks, data, i * count // ranges, (i + 1) * count // ranges)


@intrinsic
def hand_out(typing: Any, launcher: Any, ranges: Any, count: Any) -> Any:
    """Call the kernel in which this stands again, for so many ranges that make up tasks 0..count, in any order and on
    any threads: kernel(0, begin, end, *its other arguments). So a kernel is one function and compiled once.

    It must not raise: nobody would hear of it.
    """

    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        kernel = builder.function
        arguments = cgutils.pack_struct(builder, kernel.args)
        data = cgutils.alloca_once_value(builder, arguments)
        name = f"{kernel.name}.tasks"
        tasks = ir.Function(builder.module, ir.FunctionType(VOID, [WORD, WORD, WORD]), name)
        tasks.linkage = "internal"
        inside = ir.IRBuilder(tasks.append_basic_block())
        unpacked = cgutils.unpack_tuple(inside, inside.load(inside.inttoptr(tasks.args[0], data.type)))
        # Numba's convention: where the result goes, where an exception goes, then the arguments.
        result, exception = (inside.alloca(pointer.type.pointee) for pointer in kernel.args[:2])
        inside.call(kernel, [result, exception, WORD(0), *tasks.args[1:], *unpacked[5:]])
        inside.ret_void()
        pointer = ir.FunctionType(VOID, [WORD] * 4).as_pointer()
        builder.call(
            builder.inttoptr(given[0], pointer),
            [builder.ptrtoint(tasks, WORD), builder.ptrtoint(data, WORD), *given[1:]],
        )
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate
