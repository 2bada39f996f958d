"""`hand_out`, with which a kernel shares out the tasks of its steps to the threads of Numba's threading layer.

The layer's loop, the one that Numba's own parallel functions end in, calls the kernel. So a kernel is compiled once
and not again by Numba's parallel pipeline, which took as long again, and running serially or in parallel executes the
same machine code.
"""

# mypy: ignore-errors
# Numba's stubs do not know that an intrinsic is called without its typing context.

from __future__ import annotations

import functools
import os
from typing import Any, NamedTuple

import numpy as np
from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from fastnorm.backends import Array

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


TASKS, STEPS, GROUP, AHEAD, FIRST, LAST = range(6)
"""The columns of a plan."""


class Step(NamedTuple):
    """A step of a call: a row of its plan, which is an array, so that kernels can read it."""

    tasks: int
    steps: int = 0
    """What it does, as bits: a step may be several in one."""
    group: int = 1
    """Channels or rows of a task."""
    ahead: int = 0
    """Elements that are fetched ahead while runs are written."""
    first: int = 0
    """The first sample or row that it works on."""
    last: int = 0
    """The last row."""


def plan_of(*steps: Step) -> Array:
    return np.array(steps, np.int64)


SPINS = 1000
"""Looks at what the others have done before a thread lets others run: some 10 us."""


@intrinsic
def hand_out(typing: Any, launcher: Any, threads: Any, plan: Any) -> Any:
    """Call the kernel in which this stands again, for ranges that make up the tasks of each row of the plan, a step:
    kernel(0, 0, step, begin, end, plan, *its other arguments), in any order and on so many threads. A thread that is
    done takes the next range, of the next step where none is left, which begins when all of this step are done: so a
    call is one parallel region. It cost 2 to 5 us and a call from Python more for each step.

    `launcher` is `parallel_for`, or 0 with one thread. The kernel must not raise: nobody would hear of it.
    """

    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        launcher, threads, plan_value = given
        kernel = builder.function
        table = cgutils.create_struct_proxy(plan)(context, builder, plan_value)
        steps, width = cgutils.unpack_tuple(builder, table.shape)
        serial = builder.icmp_signed("==", threads, WORD(1))
        ranges = builder.select(serial, threads, builder.mul(threads, WORD(RANGES)))
        shared = cgutils.pack_struct(builder, [WORD(0), WORD(0), table.data, steps, width, ranges, *kernel.args])
        data = cgutils.alloca_once_value(builder, shared)
        sizes = cgutils.alloca_once_value(builder, threads)
        none = ir.Constant(ADDRESS, None)
        work = _work(kernel, data.type, builder.module)
        address = builder.bitcast(data, ADDRESS)
        with builder.if_else(serial) as (alone, together):
            with alone:
                builder.call(work, [ir.Constant(kind, None) for kind in work.type.pointee.args[:3]] + [address])
            with together:
                arguments = [builder.bitcast(work, ADDRESS), none, builder.bitcast(sizes, ADDRESS), none, address]
                function = builder.inttoptr(launcher, PARALLEL_FOR.as_pointer())
                builder.call(function, [*arguments, WORD(0), WORD(0), threads])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, plan), generate


def _work(kernel: Any, shared: Any, module: Any) -> Any:
    """What each thread does: take the next range until none is left.

        for number = next++:            the ranges of all steps are numbered through
            step = that of the number, `before` the ranges of those before it
            wait until so many are done
            the tasks of the range; done++

    Whoever waits, waits for ranges that others have begun, and those wait for earlier ones only.
    """
    function = ir.Function(module, BODY, f"{kernel.name}.work")
    function.linkage = "internal"
    builder = ir.IRBuilder(function.append_basic_block())
    data = builder.bitcast(function.args[3], shared)
    _, _, table, steps, width, most, *arguments = cgutils.unpack_tuple(builder, builder.load(data))
    # Numba's convention: where the result goes, where an exception goes, then the arguments.
    result, exception = (builder.alloca(pointer.type.pointee) for pointer in kernel.args[:2])
    following, finished = (cgutils.gep_inbounds(builder, data, 0, field) for field in (0, 1))
    step, before, looks = (cgutils.alloca_once_value(builder, WORD(0)) for _ in range(3))
    take, seek, look, skip, wait, spin, rest, run, done = (function.append_basic_block() for _ in range(9))
    builder.branch(take)

    builder.position_at_end(take)
    builder.store(WORD(0), looks)
    number = builder.atomic_rmw("add", following, WORD(1), "monotonic")
    builder.branch(seek)

    builder.position_at_end(seek)
    builder.cbranch(builder.icmp_signed("<", builder.load(step), steps), look, done)

    builder.position_at_end(look)
    tasks = builder.load(builder.gep(table, [builder.add(builder.mul(builder.load(step), width), WORD(TASKS))]))
    ranges = builder.select(builder.icmp_signed("<", tasks, most), tasks, most)
    first = builder.load(before)
    upto = builder.add(first, ranges)
    builder.cbranch(builder.icmp_signed("<", number, upto), wait, skip)

    builder.position_at_end(skip)
    builder.store(builder.add(builder.load(step), WORD(1)), step)
    builder.store(upto, before)
    builder.branch(seek)

    builder.position_at_end(wait)
    reached = builder.load_atomic(finished, "acquire", WORD.width // 8)
    builder.cbranch(builder.icmp_signed(">=", reached, first), run, spin)

    builder.position_at_end(spin)
    if module.triple.startswith(("x86_64", "i686")):
        _call(builder, "llvm.x86.sse2.pause", VOID)
    builder.store(builder.add(builder.load(looks), WORD(1)), looks)
    builder.cbranch(builder.icmp_signed("<", builder.load(looks), WORD(SPINS)), wait, rest)

    builder.position_at_end(rest)  # whom it waits for may need its core
    if os.name == "posix":
        _call(builder, "sched_yield", ir.IntType(32))
    builder.branch(wait)

    builder.position_at_end(run)
    edge = builder.sub(number, first)
    begin, end = (builder.sdiv(builder.mul(at, tasks), ranges) for at in (edge, builder.add(edge, WORD(1))))
    builder.call(kernel, [result, exception, WORD(0), WORD(0), builder.load(step), begin, end, *arguments[7:]])
    builder.atomic_rmw("add", finished, WORD(1), "release")
    builder.branch(take)

    builder.position_at_end(done)
    builder.ret_void()
    return function


def _call(builder: Any, name: str, result: Any) -> None:
    builder.call(cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, []), name), [])
