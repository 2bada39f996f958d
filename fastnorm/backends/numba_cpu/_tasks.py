"""`for_each`, with which a kernel hands out its tasks, and the one `prange` of this backend.

A kernel reaches that loop through a function pointer. So it is compiled once and not again by Numba's
parallel pipeline (measured: 4.2 s of CPU time for the first kernel against 2.1 s), and running serially or in
parallel executes the same machine code.
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

SLICES = 256
"""Ranges that tasks are handed out in: enough to balance, few enough to cost nothing (a call of a function
with ten arrays takes about 80 ns, as long as a row of 64 elements)."""


@intrinsic
def _call(typing: Any, tasks: Any, data: Any, begin: Any, end: Any) -> Any:
    """Call the function at address `tasks` with the address of its arguments and a range."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = ir.FunctionType(VOID, [WORD, WORD, WORD]).as_pointer()
        builder.call(builder.inttoptr(arguments[0], pointer), arguments[1:])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.int64), generate


def run_serial(tasks: int, data: int, count: int) -> None:
    _call(tasks, data, 0, count)


def run_parallel(tasks: int, data: int, count: int) -> None:
    slices = min(count, SLICES)
    for i in prange(slices):
        _call(tasks, data, i * count // slices, (i + 1) * count // slices)


@intrinsic
def for_each(typing: Any, launcher: Any, function: Any, arguments: Any, count: Any) -> Any:
    """function(*arguments, begin, end) for ranges that make up 0..count, in any order and on any threads.

    The function must not raise: nobody would hear of it.
    """
    types_given = (*arguments, types.int64, types.int64)
    result = function.dispatcher.get_compile_result(function.get_call_type(typing, types_given, {}))

    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        context.active_code_library.add_linking_library(result.library)
        data = cgutils.alloca_once_value(builder, given[2])
        name = f"{builder.function.name}.{result.fndesc.mangled_name}"
        tasks = ir.Function(builder.module, ir.FunctionType(VOID, [WORD, WORD, WORD]), name)
        tasks.linkage = "internal"
        inside = ir.IRBuilder(tasks.append_basic_block())
        unpacked = cgutils.unpack_tuple(inside, inside.load(inside.inttoptr(tasks.args[0], data.type)))
        target = context.declare_function(builder.module, result.fndesc)
        context.call_conv.call_function(inside, target, types.none, types_given, [*unpacked, *tasks.args[1:]])
        inside.ret_void()
        pointer = ir.FunctionType(VOID, [WORD, WORD, WORD]).as_pointer()
        builder.call(
            builder.inttoptr(given[0], pointer),
            [builder.ptrtoint(tasks, WORD), builder.ptrtoint(data, WORD), given[3]],
        )
        return context.get_dummy_value()

    return types.void(types.int64, function, arguments, types.int64), generate
