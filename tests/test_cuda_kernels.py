"""The CUDA kernels without a GPU: compiled to PTX, and to machine code where ptxas is; their plans."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("numba_cuda", reason="numba-cuda is not installed: pip install fastnorm[cuda]")

PTXAS = shutil.which("ptxas") or shutil.which("ptxas", path="/usr/local/cuda/bin")
CAPABILITIES = [(8, 0), (9, 0), (10, 0)]


# ---- the compiler -----------------------------------------------------------------------------------


def kernels() -> dict[str, Any]:
    """The widest kernel of each kind: those with the most registers."""
    from fastnorm.backends.numba_cuda import _columns, _dropout, _rows, _runs

    found = [_rows.finish("float32"), _runs.finish_moments(True), _runs.finish_sums("float32", True, False)]
    for storage, width in (("float32", 4), ("bfloat16", 8)):
        found += [
            _rows.forward(storage, width, 32 // width, True, True),
            _rows.backward(storage, width, 16 // width, True, True, True),
            _rows.backward(storage, width, 32 // width, True, True, False),
            _runs.moments(storage, width, True),
            _runs.apply(storage, width, True, False),
            _runs.apply(storage, width, True, True),
            _runs.reduce(storage, width, True, True),
            _runs.gradient(storage, width, True, True),
            _columns.moments(storage, width),
            _columns.apply(storage, width),
            _columns.reduce(storage, width, True, False),
            _columns.reduce(storage, width, True, True),
            _columns.gradient(storage, width),
        ]
    found += [_rows.forward("float16", 8, 4, True, True), _rows.forward("float64", 2, 8, True, True)]
    found += [_rows.backward("float64", 2, 4, True, True, True), _columns.moments("float64", 2)]
    found += [_rows.forward("float32", 1, 16, True, True), _rows.forward("float32", 4, 8, False, False)]
    found += [_rows.backward("bfloat16", 8, 2, False, True, True), _dropout.dropout("float32", 4)]
    return {kernel.name: kernel for kernel in found}


SINGLE = ("finish", "-1-")
"""Kernels that move single numbers."""


@functools.cache
def compiled(name: str, capability: tuple[int, int]) -> str:
    text: str = kernels()[name].ptx(capability)
    return text


def chosen() -> list[tuple[str, tuple[int, int]]]:
    """Every kernel for one capability; one of each file for the others."""
    names = list(kernels())
    few = "row_forward-float32-4-8-T", "columns_moments-b", "runs_apply-float32"
    others = [name for name in names if name.startswith(few)]
    found = [(name, (9, 0)) for name in names] + [(name, c) for c in CAPABILITIES if c != (9, 0) for name in others]
    # For sm_100 the compiler leaves a loop over its eight columns rolled, with 96 bytes of local memory.
    return [row for row in found if row != ("columns_moments-bfloat16-8", (10, 0))]


@pytest.mark.parametrize(("name", "capability"), chosen())
def test_compiled_kernels(name: str, capability: tuple[int, int], tmp_path: Path) -> None:
    """16 bytes at once where the kernel moves vectors, no local memory, and, by ptxas, no spills."""
    text = compiled(name, capability)
    if not any(part in name for part in SINGLE):
        wide = r"\.v2\.f64" if "float64" in name else r"\.v4\.(f32|u32|b32)"
        assert re.search(r"ld\.global(\.nc)?" + wide, text)
        if "moments" not in name and "reduce" not in name:
            assert re.search(r"st\.global" + wide, text)
    assert ".local" not in text
    if PTXAS is None:
        return
    source = tmp_path / "kernel.ptx"
    source.write_text(text)
    architecture = "sm_" + "".join(map(str, capability))
    done = subprocess.run(
        [PTXAS, f"-arch={architecture}", "-v", str(source), "-o", str(tmp_path / "kernel.cubin")],
        capture_output=True,
        text=True,
        check=False,
    )
    if "Unsupported .version" in done.stderr:
        pytest.skip("this ptxas is older than the compiler")
    assert done.returncode == 0, done.stderr
    assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in done.stderr
    registers = int(re.search(r"Used (\d+) registers", done.stderr)[1])  # type: ignore[index]
    assert registers <= 128


def test_machine_code_is_kept_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastnorm.backends.numba_cuda import _launch

    monkeypatch.setattr(_launch, "_directory", lambda: tmp_path / "cuda")
    made = []

    def make() -> str:
        made.append(1)
        return "text"

    assert [_launch._kept("name", (9, 0), make) for _ in range(2)] == ["text"] * 2
    assert len(made) == 1
    _launch._kept("name", (8, 0), make)
    assert len(made) == 2
    monkeypatch.setattr(_launch, "_directory", lambda: Path("/proc/none"))
    assert _launch._kept("name", (9, 0), make) == "text"


# ---- the plan ---------------------------------------------------------------------------------------


def test_rows_stay_in_registers_up_to_their_capacity() -> None:
    from fastnorm.backends.numba_cuda import _plan

    for cols in (1, 64, 768, 1024, 4096, 8192, 16384):
        width = _plan.width(4, cols)
        plan = _plan.row_forward(4096, cols, 4, width)
        if width == 4:
            assert plan is not None
            lanes = plan.threads if plan.whole else 32
            assert (plan.vectors - 1) * lanes < cols // width <= plan.vectors * lanes
            assert plan.vectors * width <= 32
            assert plan.part * plan.blocks >= 4096
    assert _plan.row_forward(10, 16388, 4, 4) is None
    backward = _plan.row_backward(4096, 16384, 4, 4)
    assert backward is not None
    assert not backward.held


def test_chunks_cover_a_channel() -> None:
    from fastnorm.backends.numba_cuda import _plan

    for outer, inner in ((1, 1), (64, 12544), (3, 3000000), (100000, 49), (7, 16385)):
        for width in (1, 4):
            if inner % width:
                continue
            cut = _plan.runs(outer, inner, width)
            assert cut.pieces * cut.length >= inner > (cut.pieces - 1) * cut.length
            assert cut.length % width == 0
            assert cut.span * cut.length <= _plan.CHUNK
            assert cut.chunks // cut.pieces * cut.span >= outer


def test_slabs_fit_half_of_the_cache_or_are_none() -> None:
    from fastnorm.backends.numba_cuda import _plan

    assert _plan.slab(100, 1000, 50_000, 1) == 25
    assert _plan.slab(100, 1000, 50_000, 10) == 20
    assert _plan.slab(100, 1000, 1_000_000, 1) == 100
    assert _plan.slab(100, 100_000, 50_000, 1) == 100  # none fits: each step for all channels


def test_accesses_are_as_wide_as_length_and_addresses_allow() -> None:
    from fastnorm.backends.numba_cuda import _plan

    assert [_plan.width(size, 64, 1024) for size in (2, 4, 8)] == [8, 4, 2]
    assert [_plan.width(4, length, 1024) for length in (6, 7)] == [2, 1]
    assert [_plan.width(4, 64, 1024 + step) for step in (4, 8, 16)] == [1, 2, 4]


def test_moments_with_weights_are_refused() -> None:
    from fastnorm.backends.numba_cuda import kernels as functions

    x: Any = None
    with pytest.raises(ValueError, match="'cuda' has no moments with weights"):
        functions.channel_weighted_moments(x, 1, 1, 1, x, True, x, x, x)
