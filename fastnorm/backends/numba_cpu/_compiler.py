"""How Numba compiles kernels and what they call, in a third of the time that its own decorators take.

A kernel is some 25 small functions. `numba.njit` would send each through thirty passes, most of them for features of
Python that are not used here, optimize it by itself and again in whatever it is linked into; with `inline="always"`
it copies their code into the kernel before inferring types, which took longer still. Here a function has its types
inferred and its code lowered once for each combination of types, unoptimized, and LLVM inlines and optimizes all of
them once, in the kernel. BatchNorm (64, 32) forward: 3.4 s inlined by Numba, 2.3 with calls of njit, 1.8, and 1.0 with
a target of its own, that knows only what kernels are made of.

Numba documents pipelines, targets and types for its users to define, but some names here are internal to it: tests
compile and load every kernel, so that a version which changes them shows.
"""

# mypy: ignore-errors
# Numba's stubs know none of this.

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llvmlite import binding
from numba import types
from numba.core import cgutils, compiler, typing
from numba.core.caching import FunctionCache
from numba.core.codegen import JITCodeLibrary, JITCPUCodegen
from numba.core.compiler_lock import global_compiler_lock
from numba.core.cpu import CPUContext
from numba.core.imputils import RefType, builtin_registry, iternext_impl, lower_builtin, lower_constant
from numba.core.registry import CPUDispatcher, CPUTarget
from numba.core.typed_passes import NativeLowering, NoPythonBackend, NopythonTypeInference, PreLowerStripPhis
from numba.core.untyped_passes import GenericRewrites, ReconstructSSA, TranslateByteCode
from numba.extending import models, register_model, typeof_impl

from fastnorm import _collector

# ---- target ----------------------------------------------------------------------------------------


class _Typing(typing.BaseContext):
    """The functions that can be called and their types: Numba's builtins. Its NumPy would be asked about every sum."""

    def init(self) -> None:
        self._resolved: dict[Any, Any] = {}
        self.insert_global(range, steps.type)

    def refresh(self) -> None:
        if not self._functions:
            super().refresh()

    def resolve_function_type(self, function: Any, arguments: Any, keywords: Any) -> Any:
        """The signature of a call. A kernel adds up hundreds of integers; each would be looked for anew."""
        call = function, arguments
        if keywords or call not in self._resolved:
            found = super().resolve_function_type(function, arguments, keywords)
            if keywords or found is None:
                return found
            self._resolved[call] = found
        return self._resolved[call]


class _Library(JITCodeLibrary):
    """The code of a kernel, which LLVM optimizes once: Numba would do so three times, for counts of references."""

    unroll = True

    def _optimize_functions(self, module: Any) -> None:
        module.data_layout = self._codegen._data_layout

    def _optimize_final_module(self) -> None:
        options = binding.create_pipeline_tuning_options(speed_level=3)
        options.loop_vectorization = True
        options.loop_unrolling = self.unroll
        builder = binding.create_pass_builder(self._codegen._tm, options)
        builder.getModulePassManager().run(self._final_module, builder)


class _Unoptimized(_Library):
    """Code that is never run by itself: it is linked into kernels and optimized there."""

    def finalize(self) -> None:
        self._finalized = True


class _Codegen(JITCPUCodegen):
    _library_class = _Library


class _Lowering(CPUContext):
    """How LLVM's code is made of what the functions are made of: loops, tuples, numbers, elements of arrays. All that
    Numba can do, with SciPy where that is installed, takes 0.2 s to load, and its runtime has to be compiled."""

    @global_compiler_lock
    def init(self) -> None:
        self.is32bit = False
        self._internal_codegen = _Codegen("fastnorm")

    def load_additional_registries(self) -> None:
        from numba.core import optional  # noqa: F401
        from numba.cpython import builtins, iterators, numbers, tupleobj  # noqa: F401
        from numba.np import arrayobj  # noqa: F401

    def refresh(self) -> None:
        if not self._registries:
            self.load_additional_registries()
            self.typing_context.refresh()
        self.install_registry(builtin_registry)

    def post_lowering(self, module: Any, library: Any) -> None:
        """Numba's would link its runtime."""


class _Target(CPUTarget):
    @functools.cached_property
    def _toplevel_typing_context(self) -> _Typing:
        return _Typing()

    @functools.cached_property
    def _toplevel_target_context(self) -> _Lowering:
        return _Lowering(self.typing_context, "cpu")


_target = _Target("cpu")


class _Passes:
    """The passes without which nothing compiles. No closures, no `with`, no dead branches, no reference counts."""

    pipeline_name = "fastnorm"
    exec_times = None

    def run(self, state: Any) -> None:
        for each in (
            TranslateByteCode, GenericRewrites, ReconstructSSA, NopythonTypeInference, PreLowerStripPhis,
            NativeLowering, NoPythonBackend,
        ):  # fmt: skip
            each().run_pass(state)


class _Pipeline(compiler.CompilerBase):
    def define_pipelines(self) -> list[_Passes]:
        return [_Passes()]


# ---- functions that kernels call -------------------------------------------------------------------


def _inlining() -> compiler.Flags:
    flags = compiler.Flags()
    flags.forceinline = flags.no_compile = flags.no_cpython_wrapper = flags.no_cfunc_wrapper = True
    flags.error_model = "numpy"
    return flags


class _Callable(types.Callable):
    """The type of a function that kernels call, which to Numba is a constant: `compiled` or `intrinsic`."""

    def __init__(self, function: Any) -> None:
        self._function = function
        super().__init__(f"{function.definition.__qualname__} at {id(function)}")

    def get_call_type(self, context: Any, arguments: tuple[types.Type, ...], keywords: Any) -> Any:
        signatures = self._function.signatures
        arguments = tuple(types.unliteral(argument) for argument in arguments)
        if arguments not in signatures:
            signatures[arguments] = self._function.define(context, arguments)
        return signatures[arguments]

    def augment(self, other: types.Type) -> types.Type:
        """What Numba's registries say of the same function does not count."""
        return self

    def get_call_signatures(self) -> tuple[tuple[Any, ...], bool]:
        return tuple(self._function.signatures.values()), False

    def get_impl_key(self, signature: Any) -> tuple[Any, tuple[types.Type, ...]]:
        return self._function, tuple(signature.args)


register_model(_Callable)(models.OpaqueModel)


class _Function:
    """A function that kernels call."""

    def __init__(self, definition: Callable[..., Any]) -> None:
        self.definition = definition
        self.type = _Callable(self)
        self.signatures: dict[tuple[types.Type, ...], Any] = {}


class compiled(_Function):  # noqa: N801, a decorator
    """One in Python, compiled once for each combination of types. LLVM inlines it."""

    def define(self, context: Any, arguments: tuple[types.Type, ...]) -> Any:
        target = _target.target_context
        library = _Unoptimized(target.codegen(), self.definition.__qualname__)
        result = compiler.compile_extra(
            context, target, self.definition, arguments, None, _inlining(), {},
            library=library, pipeline_class=_Pipeline,
        )  # fmt: skip
        # What calls it links it and what it calls itself.
        target.insert_user_function((self, arguments), result.fndesc, [library, *library._linking_libraries])
        return result.signature


class intrinsic(_Function):  # noqa: N801, a decorator
    """One that, for the types of its arguments, returns the signature and what generates the code, as
    `numba.extending.intrinsic`, which takes three times as long."""

    def define(self, context: Any, arguments: tuple[types.Type, ...]) -> Any:
        signature, generate = self.definition(context, *arguments)
        _target.target_context.insert_func_defn([(generate, (self, arguments), signature.args)])
        return signature


@typeof_impl.register(_Function)
def _typeof(function: _Function, context: Any) -> _Callable:
    return function.type


@lower_constant(_Callable)
def _constant(context: Any, builder: Any, kind: Any, function: _Function) -> Any:
    return context.get_dummy_value()


# ---- loops -----------------------------------------------------------------------------------------


class _Steps(types.SimpleIteratorType):
    """The type of `range` in kernels."""

    def __init__(self) -> None:
        super().__init__("steps", types.int64)


@register_model(_Steps)
class _StepsModel(models.StructModel):
    def __init__(self, manager: Any, steps: _Steps) -> None:
        members = [("next", types.CPointer(types.int64)), ("stop", types.int64), ("step", types.int64)]
        super().__init__(manager, steps, members)


@intrinsic
def steps(typing: Any, *arguments: Any) -> Any:
    """`range` with a positive step. Numba's own checks the step, and the code of its exception is longer than most
    loops here."""

    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        zero, one = context.get_constant(types.int64, 0), context.get_constant(types.int64, 1)
        first, stop, step = {1: [zero, *given, one], 2: [*given, one], 3: given}[len(given)]
        steps = cgutils.create_struct_proxy(signature.return_type)(context, builder)
        steps.next, steps.stop, steps.step = cgutils.alloca_once(builder, first.type), stop, step
        builder.store(first, steps.next)
        return steps._getvalue()

    return _Steps()(*[types.int64] * len(arguments)), generate


@lower_builtin("iternext", _Steps)
@iternext_impl(RefType.UNTRACKED)
def _next(context: Any, builder: Any, signature: Any, given: Any, result: Any) -> None:
    steps = cgutils.create_struct_proxy(signature.args[0])(context, builder, value=given[0])
    value = builder.load(steps.next)
    builder.store(builder.add(value, steps.step, flags=["nsw"]), steps.next)
    result.set_valid(builder.icmp_signed("<", value, steps.stop))
    result.yield_(value)


# ---- kernels ---------------------------------------------------------------------------------------


def _sources_stamp() -> tuple[tuple[float, int], ...]:
    """Modification time and size of every source that kernels are compiled from."""
    here = Path(__file__).parent
    files = (*sorted(here.glob("*.py")), here.parent / "numba_formulas.py")
    return tuple((stat.st_mtime, stat.st_size) for stat in (file.stat() for file in files))


class _Cache(FunctionCache):
    """Machine code of a kernel on disk."""

    def __init__(self, function: Callable[..., None]) -> None:
        super().__init__(function)
        # The cache notices changes of the file that holds a function, not of those it calls.
        self._cache_file._source_stamp = _sources_stamp()

    def load_overload(self, signature: Any, target: Any) -> Any:
        """Load without `target.refresh()`, which only compiling needs: it reads all that Numba can compile, and
        SciPy where that is installed, which takes 0.15 to 0.25 s."""
        with self._guard_against_spurious_io_errors():
            return self._load_overload(signature, target)


class _KernelPipeline(_Pipeline):
    """With `unroll`, LLVM may unroll loops."""

    unroll = True

    def define_pipelines(self) -> list[_Passes]:
        library = self.state.targetctx.codegen().create_library(self.state.func_id.func_qualname)
        library.unroll = self.unroll
        library.enable_object_caching()
        self.state.library = library
        return super().define_pipelines()


class _RolledPipeline(_KernelPipeline):
    unroll = False


class _Dispatcher(CPUDispatcher):
    targetdescr = _target

    def compile(self, signature: Any) -> Any:
        # It would look at what Numba makes again and again, in vain: 0.08 of 1.04 s.
        with _collector.paused():
            return super().compile(signature)


def kernel(function: Callable[..., None], unroll: bool) -> Callable[..., None]:
    """A function that Python calls, compiled at the first call and cached on disk. It runs without the GIL."""
    options = {"nopython": True, "nogil": True, "error_model": "numpy", "no_cfunc_wrapper": True, "_nrt": False}
    pipeline = _KernelPipeline if unroll else _RolledPipeline
    dispatcher = _Dispatcher(function, targetoptions=options, pipeline_class=pipeline)
    dispatcher._cache = _Cache(function)
    return dispatcher
