"""`hand_out`, with which a kernel shares out the tasks of its steps to the threads of Numba's threading layer.

The layer's loop, the one that Numba's own parallel functions end in, calls the kernel. So a kernel is compiled once
and not again by Numba's parallel pipeline, which took as long again, and running serially or in parallel executes the
same machine code.
"""

# mypy: ignore-errors
# Numba's stubs do not know that an intrinsic is called without its typing context.

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from llvmlite import binding, ir
from numba import types
from numba.core import cgutils

from fastnorm.backends import Array
from fastnorm.backends.numba_cpu._compiler import intrinsic

RANGES = 8
"""Ranges that a thread's share of the tasks is cut into: enough to balance, and slabs within one share lines of the
output. With a range a slab, 14x14 forward took 2.7 ms instead of 2.2."""

WORD = ir.IntType(64)
VOID = ir.VoidType()
ADDRESS = ir.IntType(8).as_pointer()
WORDS = WORD.as_pointer()
LINE = ir.ArrayType(WORD, 8)
"""A cache line, the first word of which counts."""
PARALLEL_FOR = ir.FunctionType(VOID, [ADDRESS] * 5 + [WORD] * 3)
"""(function, arrays, sizes, steps, data, dimensions of an element, number of arrays, threads): it calls
function(arrays, sizes, steps, data) sizes[0] times in all, a part of them on each thread, with arrays[j] advanced
by steps[j] for each before. Under omp the same thread gets the same part in each call."""
BODY = ir.FunctionType(VOID, [ADDRESS.as_pointer(), WORDS, WORDS, ADDRESS])


@functools.cache
def parallel_for() -> int:
    """Address of the threading layer's loop, once the layer has been started."""
    return binding.address_of_symbol("numba_parallel_for")


TASKS, STEPS, GROUP, AHEAD, FIRST, LAST, BACKWARDS = range(7)
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
    backwards: bool = False
    """Whether its first task is the last in memory. Threads then have the same memory as in other steps."""


def plan_of(*steps: Step) -> Array:
    return np.array(steps, np.int64)


SPINS = 1000
"""Looks at what the others have done before a thread lets others run: some 10 us."""


@intrinsic
def hand_out(typing: Any, launcher: Any, threads: Any, plan: Any) -> Any:
    """Call the kernel in which this stands again, for ranges that make up the tasks of each row of the plan, a step:
    kernel(0, 0, step, begin, end, plan, *its other arguments), in any order and on so many threads. A step begins
    when all of the one before are done: so a call is one parallel region. It cost 2 to 5 us and a call from Python
    more for each step.

    Each thread has the same share of a step's tasks call after call and takes others' only when its own are done, so
    that what it read and wrote before is still in its own caches.

    `launcher` is `parallel_for`, or 0 with one thread. The kernel must not raise: nobody would hear of it.
    """

    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        launcher, threads, plan_value = given
        table = cgutils.create_struct_proxy(plan)(context, builder, plan_value)
        arguments = [launcher, threads, table.data, *cgutils.unpack_tuple(builder, table.shape), *builder.function.args]
        builder.call(_launch(builder.function, [argument.type for argument in arguments]), arguments)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, plan), generate


def _launch(kernel: Any, arguments: list[Any]) -> Any:
    """A function that calls `_work` on each thread. What threads share lies on its stack, not the kernel's."""
    function = ir.Function(kernel.module, ir.FunctionType(VOID, arguments), f"{kernel.name}.launch")
    function.linkage = "internal"
    function.attributes.add("noinline")
    builder = ir.IRBuilder(function.append_basic_block())
    launcher, threads, *_ = function.args
    count = builder.add(threads, WORD(1))
    lines = builder.alloca(LINE, count)
    lines.align = LINE.count * WORD.width // 8
    cgutils.memset(builder, lines, builder.mul(count, WORD(lines.align)), 0)
    data = cgutils.alloca_once_value(builder, cgutils.pack_struct(builder, [lines, *function.args[1:]]))
    # A part's number, from 1 on, as an address: null would stay null.
    number = cgutils.alloca_once_value(builder, builder.inttoptr(WORD(1), ADDRESS))
    sizes = cgutils.alloca_once_value(builder, threads)
    steps = cgutils.alloca_once_value(builder, WORD(1))
    work = _work(kernel, data.type)
    given = [number, sizes, steps, builder.bitcast(data, ADDRESS)]
    with builder.if_else(builder.icmp_signed("==", threads, WORD(1))) as (alone, together):
        with alone:
            builder.call(work, given)
        with together:
            addresses = [builder.bitcast(pointer, ADDRESS) for pointer in (work, *given)]
            loop = builder.inttoptr(launcher, PARALLEL_FOR.as_pointer())
            builder.call(loop, [*addresses, WORD(0), WORD(1), threads])
    builder.ret_void()
    return function


def _work(kernel: Any, shared: Any) -> Any:
    """What each thread does.

        for each step:
            wait until all ranges of the steps before are done
            for each share of its ranges, the thread's own first:
                while a range can be taken:
                    the tasks of the range; done++

    Whoever waits, waits for ranges that others have begun, and those wait for earlier ones only. A thread that is
    alone, or comes before the others, does everything.
    """
    function = ir.Function(kernel.module, BODY, f"{kernel.name}.work")
    function.linkage = "internal"
    builder = ir.IRBuilder(function.append_basic_block())
    own = builder.ptrtoint(builder.load(function.args[0]), WORD)
    data = builder.load(builder.bitcast(function.args[3], shared))
    lines, threads, table, steps, width, *arguments = cgutils.unpack_tuple(builder, data)
    # Numba's convention: where the result goes, where an exception goes, then the arguments.
    result, exception = (builder.alloca(pointer.type.pointee) for pointer in kernel.args[:2])
    serial = builder.icmp_signed("==", threads, WORD(1))
    most = builder.select(serial, threads, builder.mul(threads, WORD(RANGES)))
    finished = cgutils.gep_inbounds(builder, lines, 0, 0)
    before = cgutils.alloca_once_value(builder, WORD(0))
    with cgutils.for_range(builder, steps) as (step, _):
        _wait(builder, finished, builder.load(before))
        row = builder.gep(table, [builder.mul(step, width)])
        tasks, backwards = (builder.load(builder.gep(row, [WORD(column)])) for column in (TASKS, BACKWARDS))
        ranges = builder.select(builder.icmp_signed("<", tasks, most), tasks, most)
        with cgutils.for_range(builder, threads) as (turn, _):
            share = builder.urem(builder.add(own, turn), threads)
            mirrored = builder.sub(builder.sub(threads, WORD(1)), share)
            share = builder.select(builder.trunc(backwards, cgutils.bool_t), mirrored, share)
            first, last = _part(builder, ranges, share, threads)
            taken = builder.gep(lines, [builder.add(share, WORD(1)), WORD(0)])
            with _each_taken(builder, taken, step, builder.sub(last, first)) as number:
                begin, end = _part(builder, tasks, builder.add(first, number), ranges)
                given = [result, exception, WORD(0), WORD(0), step, begin, end, *arguments[7:]]
                builder.call(kernel, given, attrs=("noinline",))
                builder.atomic_rmw("add", finished, WORD(1), "release")
        builder.store(builder.add(builder.load(before), ranges), before)
    builder.ret_void()
    return function


def _part(builder: Any, count: Any, part: Any, parts: Any) -> tuple[Any, Any]:
    """Where one of so many parts of a count begins and ends."""
    begin, end = (builder.sdiv(builder.mul(at, count), parts) for at in (part, builder.add(part, WORD(1))))
    return begin, end


@contextlib.contextmanager
def _each_taken(builder: Any, taken: Any, step: Any, count: Any) -> Iterator[Any]:
    """A loop over those ranges of a share, `count` in this step, that nobody else takes.

    `taken` is step * RANGES + the ranges taken of it. It never decreases, and may still be of an earlier step, or,
    where others have come so far, of a later one.
    """
    look, take, run, none = (builder.append_basic_block(name) for name in ("look", "take", "run", "none"))
    begun = builder.mul(step, WORD(RANGES))
    builder.branch(look)

    builder.position_at_end(look)
    seen = builder.load_atomic(taken, "monotonic", WORD.width // 8)
    earlier = builder.icmp_signed("<", seen, begun)
    number = builder.sub(builder.select(earlier, begun, seen), begun)
    builder.cbranch(builder.icmp_signed("<", number, count), take, none)

    builder.position_at_end(take)
    following = builder.add(builder.add(begun, number), WORD(1))
    exchanged = builder.cmpxchg(taken, seen, following, "monotonic", "monotonic")
    builder.cbranch(builder.extract_value(exchanged, 1), run, look)

    builder.position_at_end(run)
    yield number
    builder.branch(look)
    builder.position_at_end(none)


def _wait(builder: Any, finished: Any, count: Any) -> None:
    """Until so many ranges are done."""
    looks = cgutils.alloca_once(builder, WORD)
    look, spin, rest, done = (builder.append_basic_block(name) for name in ("wait", "spin", "rest", "done"))
    builder.store(WORD(0), looks)
    builder.branch(look)

    builder.position_at_end(look)
    reached = builder.load_atomic(finished, "acquire", WORD.width // 8)
    builder.cbranch(builder.icmp_signed(">=", reached, count), done, spin)

    builder.position_at_end(spin)
    if builder.module.triple.startswith(("x86_64", "i686")):
        _call(builder, "llvm.x86.sse2.pause", VOID)
    builder.store(builder.add(builder.load(looks), WORD(1)), looks)
    builder.cbranch(builder.icmp_signed("<", builder.load(looks), WORD(SPINS)), look, rest)

    builder.position_at_end(rest)  # whom it waits for may need its core
    if os.name == "posix":
        _call(builder, "sched_yield", ir.IntType(32))
    builder.branch(look)

    builder.position_at_end(done)


def _call(builder: Any, name: str, result: Any) -> None:
    builder.call(cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, []), name), [])
