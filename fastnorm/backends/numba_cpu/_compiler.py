"""How Numba compiles kernels and what they call, in a third of the time that its own decorators take.

A kernel is some 25 small functions. `numba.njit` would send each through thirty passes, most of them for features of
Python that are not used here, optimize it by itself and again in whatever it is linked into; with `inline="always"`
it copies their code into the kernel before inferring types, which took longer still. Here a function has its types
inferred and its code lowered once for each combination of types, unoptimized, and LLVM inlines and optimizes all of
them once, in the kernel. BatchNorm (64, 32) forward: 3.4 s inlined by Numba, 2.3 with calls of njit, 1.5.

Numba documents pipelines and types for its users to define, but a few names here are internal to it: tests compile
and load every kernel, so that a version which changes them shows.
"""

# mypy: ignore-errors
# Numba's stubs know none of this.

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
from numba import types
from numba.core import compiler
from numba.core.caching import FunctionCache
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler_machinery import PassManager
from numba.core.imputils import lower_constant
from numba.core.registry import cpu_target
from numba.core.typed_passes import NativeLowering, NoPythonBackend, NopythonTypeInference, PreLowerStripPhis
from numba.core.untyped_passes import FixupArgs, GenericRewrites, IRProcessing, ReconstructSSA, TranslateByteCode
from numba.extending import models, register_model, typeof_impl


class _Pipeline(compiler.CompilerBase):
    """The passes without which nothing compiles. No closures, no `with`, no dead branches, no reference counts."""

    def define_pipelines(self) -> list[PassManager]:
        passes = PassManager("fastnorm")
        for each in (
            TranslateByteCode, FixupArgs, IRProcessing, GenericRewrites, ReconstructSSA,
            NopythonTypeInference, PreLowerStripPhis, NativeLowering, NoPythonBackend,
        ):  # fmt: skip
            passes.add_pass(each, each.__name__)
        passes.finalize()
        return [passes]


# ---- functions that kernels call -------------------------------------------------------------------


class _Unoptimized(JITCodeLibrary):
    """Code that is never run by itself: it is linked into kernels and optimized there."""

    def _optimize_functions(self, module: Any) -> None:
        pass

    def finalize(self) -> None:
        self._finalized = True


def _inlining() -> compiler.Flags:
    flags = compiler.Flags()
    flags.forceinline = flags.no_compile = flags.no_cpython_wrapper = flags.no_cfunc_wrapper = True
    flags.error_model = "numpy"
    return flags


class compiled:  # noqa: N801, a decorator
    """A function that kernels call: to Numba, a callable constant. LLVM inlines it."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.type = _Compiled(self)
        self._signatures: dict[tuple[types.Type, ...], Any] = {}

    def signature(self, typing: Any, arguments: tuple[types.Type, ...]) -> Any:
        """The signature for arguments of these types, for which the function is compiled if it has not been."""
        arguments = tuple(types.unliteral(argument) for argument in arguments)
        if arguments not in self._signatures:
            target = cpu_target.target_context
            library = _Unoptimized(target.codegen(), self.function.__qualname__)
            result = compiler.compile_extra(
                typing, target, self.function, arguments, None, _inlining(), {},
                library=library, pipeline_class=_Pipeline,
            )  # fmt: skip
            # What calls it links it and what it calls itself.
            target.insert_user_function((self, arguments), result.fndesc, [library, *library._linking_libraries])
            self._signatures[arguments] = result.signature
        return self._signatures[arguments]


class _Compiled(types.Callable):
    """The type of one compiled function."""

    def __init__(self, function: compiled) -> None:
        self._compiled = function
        super().__init__(f"compiled({function.function.__qualname__} at {id(function)})")

    def get_call_type(self, context: Any, arguments: tuple[types.Type, ...], keywords: Any) -> Any:
        return self._compiled.signature(context, arguments)

    def get_call_signatures(self) -> tuple[tuple[Any, ...], bool]:
        return tuple(self._compiled._signatures.values()), False

    def get_impl_key(self, signature: Any) -> tuple[compiled, tuple[types.Type, ...]]:
        return self._compiled, tuple(signature.args)


register_model(_Compiled)(models.OpaqueModel)


@typeof_impl.register(compiled)
def _typeof(function: compiled, context: Any) -> _Compiled:
    return function.type


@lower_constant(_Compiled)
def _constant(context: Any, builder: Any, kind: Any, function: compiled) -> Any:
    return context.get_dummy_value()


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


def kernel(function: Callable[..., None]) -> Callable[..., None]:
    """A function that Python calls, compiled at the first call and cached on disk. It runs without the GIL."""
    dispatcher = numba.njit(
        pipeline_class=_Pipeline, nogil=True, error_model="numpy", no_cfunc_wrapper=True, _nrt=False
    )(function)
    dispatcher._cache = _Cache(function)
    return dispatcher
