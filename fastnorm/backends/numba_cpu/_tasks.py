"""`for_each`, with which a kernel hands out its tasks, and the one `prange` of this backend.

A kernel reaches that loop through a function pointer. So it is compiled once and not again by Numba's
parallel pipeline (measured: 4.2 s of CPU time for the first kernel against 2.1 s), and running serially or in
parallel executes the same machine code, which gives the same bits.
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
def _call(typing: Any, task: Any, data: Any, index: Any) -> Any:
    """Call the function at address `task` with the address `data` and a number."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = ir.FunctionType(VOID, [WORD, WORD]).as_pointer()
        builder.call(builder.inttoptr(arguments[0], pointer), arguments[1:])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


def run_serial(task: int, data: int, count: int) -> None:
    for index in range(count):
        _call(task, data, index)


def run_parallel(task: int, data: int, count: int) -> None:
    for index in prange(count):
        _call(task, data, index)


@intrinsic
def for_each(typing: Any, launcher: Any, function: Any, arguments: Any, count: Any) -> Any:
    """function(*arguments, index) for each index below count, in any order and on any threads."""
    types_given = (*arguments, types.int64)
    result = function.dispatcher.get_compile_result(function.get_call_type(typing, types_given, {}))

    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        context.active_code_library.add_linking_library(result.library)
        data = cgutils.alloca_once_value(builder, given[2])
        name = f"{builder.function.name}.{result.fndesc.mangled_name}"
        task = ir.Function(builder.module, ir.FunctionType(VOID, [WORD, WORD]), name)
        task.linkage = "internal"
        inside = ir.IRBuilder(task.append_basic_block())
        unpacked = cgutils.unpack_tuple(inside, inside.load(inside.inttoptr(task.args[0], data.type)))
        target = context.declare_function(builder.module, result.fndesc)
        context.call_conv.call_function(inside, target, types.none, types_given, [*unpacked, task.args[1]])
        inside.ret_void()
        pointer = ir.FunctionType(VOID, [WORD, WORD, WORD]).as_pointer()
        builder.call(
            builder.inttoptr(given[0], pointer),
            [builder.ptrtoint(task, WORD), builder.ptrtoint(data, WORD), given[3]],
        )
        return context.get_dummy_value()

    return types.void(types.int64, function, arguments, types.int64), generate
