"""The case table: every op, the layouts it takes, and how inputs for it are made. One row an op.

Tests and benchmarks both build their cases from here, so a new op is measured and tested by adding its
row to `OPS` (its functions follow from its name: `<op>_forward`, `<op>_backward`, and where they exist
`<op>_forward_staged`, `<op>_backward_staged`, `<op>_backward_alt`).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

import fastnorm
from fastnorm.backends import Array

Shape = tuple[int, ...]
Direction = Literal["forward", "backward"]

Gradients = tuple[Array, Array | None] | tuple[Array, Array | None, Array | None]
"""(dx, dgamma) where there is no beta, else (dx, dgamma, dbeta)."""

DIRECTIONS: tuple[Direction, ...] = ("forward", "backward")
DTYPES = ("float16", "bfloat16", "float32", "float64")

# The traffic that no implementation can avoid, in arrays of x's size. Parameters and statistics are left
# out: they are one element for each channel, row or column.
#
#   forward    read x, write y                2
#   backward   read dout, read x, write dx    3
#
# Dropout reads dout alone.
#
# GB/s and shares of the floor are these bytes over the time, whatever an implementation really moves.
ARRAYS_MOVED: dict[Direction, int] = {"forward": 2, "backward": 3}


@dataclass(frozen=True)
class Layout:
    """How the axes of an array are meant, and how they lie in memory."""

    label: str
    ndim: int
    axis: int
    """The `axis` argument of the op."""
    memory: tuple[int, ...] | None = None
    """The axes from the outermost in memory to the innermost; None for C order."""


CHANNEL_LAYOUTS = (
    Layout("ND", 2, 1),
    Layout("ND fortran", 2, 1, (1, 0)),
    Layout("NCL", 3, 1),
    Layout("NCHW", 4, 1),
    Layout("NHWC", 4, 1, (0, 2, 3, 1)),  # an NCHW shape over channels-last memory, PyTorch's memory_format
    Layout("channels-last", 4, -1),  # the shape says (N, H, W, C) too
    Layout("NCDHW", 5, 1),
)
ROW_LAYOUTS = (
    Layout("ND", 2, -1),
    Layout("ND fortran", 2, -1, (1, 0)),
    Layout("NLD", 3, -1),
    Layout("N(CHW)", 4, 1),  # each sample over all of its axes
)
GROUP_LAYOUTS = tuple(layout for layout in CHANNEL_LAYOUTS if layout.label != "ND fortran")  # which is packed


@dataclass(frozen=True)
class Op:
    """An operation of the library. Its functions follow from its name."""

    name: str
    title: str
    family: Literal["channel", "group", "row", "elementwise"]
    """channel: statistics over every axis but one; group: the same in each sample, for groups of channels; row: over
    the axes from one on; elementwise: none."""
    layouts: tuple[Layout, ...]
    centred: bool = True
    """Whether it subtracts a mean and adds a beta."""
    takes_groups: bool = False
    """Whether it has an argument `groups`."""

    @property
    def forward(self) -> Callable[..., tuple[Array, Any]]:
        function: Callable[..., tuple[Array, Any]] = getattr(fastnorm, f"{self.name}_forward")
        return function

    @property
    def backward(self) -> Callable[..., Gradients]:
        function: Callable[..., Gradients] = getattr(fastnorm, f"{self.name}_backward")
        return function

    @property
    def forward_staged(self) -> Callable[..., tuple[Array, Any]] | None:
        return getattr(fastnorm, f"{self.name}_forward_staged", None)

    @property
    def backward_staged(self) -> Callable[..., Gradients] | None:
        return getattr(fastnorm, f"{self.name}_backward_staged", None)

    @property
    def backward_alt(self) -> Callable[..., Gradients] | None:
        return getattr(fastnorm, f"{self.name}_backward_alt", None)

    def layout(self, label: str) -> Layout:
        return next(layout for layout in self.layouts if layout.label == label)


OPS = {
    op.name: op
    for op in (
        Op("batchnorm", "BatchNorm", "channel", CHANNEL_LAYOUTS),
        Op("layernorm", "LayerNorm", "row", ROW_LAYOUTS),
        Op("groupnorm", "GroupNorm", "group", GROUP_LAYOUTS, takes_groups=True),
        Op("instancenorm", "InstanceNorm", "group", GROUP_LAYOUTS),
        Op("rmsnorm", "RMSNorm", "row", ROW_LAYOUTS, centred=False),
    )
}


DROPOUT = Op("dropout", "Dropout", "elementwise", (Layout("ND", 2, -1),))
"""Beside the others: it has neither statistics nor parameters, and a check of its own (fastnorm/bench/dropout.py)."""


class Inputs(NamedTuple):
    x: Array
    gamma: Array
    beta: Array
    dout: Array


@dataclass(frozen=True)
class Case:
    """One op on one shape, layout and dtype."""

    op: Op
    layout: Layout
    shape: Shape
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if len(self.shape) != self.layout.ndim:
            raise ValueError(f"shape: expected {self.layout.ndim} axes for {self.layout.label}, got {self.shape}")

    def __str__(self) -> str:
        return f"{self.op.name} {self.label} {self.dtype}"

    @property
    def label(self) -> str:
        return f"{self.layout.label} {'x'.join(map(str, self.shape))}"

    @property
    def axis(self) -> int:
        return self.layout.axis

    @property
    def groups(self) -> int:
        """Into how many groups the channels fall, where the op has groups: up to 32, of two channels or more."""
        channels = self.shape[self.axis]
        if not self.op.takes_groups:
            return channels
        return next(count for count in range(min(32, max(1, channels // 2)), 0, -1) if channels % count == 0)

    def arguments(self, x: Array, gamma: Array | None, beta: Array | None) -> tuple[Any, ...]:
        """What the op's forward takes before its options."""
        if not self.op.centred:
            return x, gamma
        return (x, gamma, beta, self.groups) if self.op.takes_groups else (x, gamma, beta)

    @property
    def kept_axes(self) -> tuple[int, ...]:
        """The axes that index the statistics; of groups, those of the channels."""
        axis = self.axis % len(self.shape)
        return {"channel": (axis,), "group": (0, axis), "row": tuple(range(axis)), "elementwise": ()}[self.op.family]

    @property
    def reduced_axes(self) -> tuple[int, ...]:
        return tuple(axis for axis in range(len(self.shape)) if axis not in self.kept_axes)

    @property
    def parameter_axes(self) -> tuple[int, ...]:
        """The axes that index gamma and beta."""
        return self.reduced_axes if self.op.family == "row" else self.kept_axes[-1:]

    @property
    def reduction(self) -> int:
        """The number of values behind each statistic."""
        channels = self.shape[self.axis] // self.groups if self.op.family == "group" else 1
        return channels * math.prod(self.shape[axis] for axis in self.reduced_axes)

    @property
    def parameter_shape(self) -> Shape:
        return tuple(self.shape[axis] for axis in self.parameter_axes)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * dtype_of(self.dtype).itemsize

    def bytes_moved(self, direction: Direction) -> int:
        return (2 if self.op is DROPOUT else ARRAYS_MOVED[direction]) * self.nbytes

    def inputs(self, seed: int = 0, *, offset: float = 2.0) -> Inputs:
        """Inputs that depend on the case's shape and the seed alone.

        x is normal with a mean and a spread of its own for each channel or row, of each sample where those have
        statistics of their own (means normal with deviation
        `offset`, spreads from 0.5 to 2): never zeros, and a wrong mean shows. dout is standard normal,
        gamma and beta lie around 1 and 0. Parameters are float32, float64 for float64 x.
        """
        dtype = dtype_of(self.dtype)
        wide = np.dtype(np.float64 if self.dtype == "float64" else np.float32)  # float64 with all of its digits
        rng = np.random.default_rng([seed, *self.shape])
        statistic_shape = [n if axis in self.kept_axes else 1 for axis, n in enumerate(self.shape)]
        means = (offset * rng.standard_normal(statistic_shape)).astype(wide)
        spreads = rng.uniform(0.5, 2.0, statistic_shape).astype(wide)
        x = self._in_layout(rng, wide)
        x *= spreads
        x += means
        gamma = (1.0 + 0.25 * rng.standard_normal(self.parameter_shape)).astype(wide)
        beta = (0.5 * rng.standard_normal(self.parameter_shape)).astype(wide)
        return Inputs(x.astype(dtype, copy=False), gamma, beta, self._in_layout(rng, wide).astype(dtype, copy=False))

    def empty(self, dtype: np.dtype[Any] | None = None) -> Array:
        """An output for this case, in x's layout, its pages already there; of x's dtype unless one is given."""
        array = self._arranged(np.empty(self.size, dtype_of(self.dtype) if dtype is None else dtype))
        array.fill(0)
        return array

    def _in_layout(self, rng: np.random.Generator, dtype: np.dtype[Any]) -> Array:
        return self._arranged(_normal(rng, self.size, dtype))

    def _arranged(self, values: Array) -> Array:
        """1-D values as an array of this shape and layout over the same memory."""
        order = self.layout.memory or tuple(range(len(self.shape)))
        return values.reshape([self.shape[axis] for axis in order]).transpose(np.argsort(order))


def dtype_of(name: str) -> np.dtype[Any]:
    """The dtype of this name; bfloat16 comes from ml_dtypes."""
    if name == "bfloat16":
        import ml_dtypes

        name = ml_dtypes.bfloat16
    dtype: np.dtype[Any] = np.dtype(name)
    return dtype


_CHUNK = 1 << 20


def _normal(rng: np.random.Generator, size: int, dtype: np.dtype[Any]) -> Array:
    """Standard normal values, drawn in chunks with streams of their own so that threads can share it."""
    values = np.empty(size, dtype)
    chunks = [values[start : start + _CHUNK] for start in range(0, size, _CHUNK)]
    if len(chunks) == 1:
        return rng.standard_normal(out=values, dtype=dtype)
    with ThreadPoolExecutor(min(len(chunks), os.cpu_count() or 1)) as pool:
        list(pool.map(lambda pair: pair[0].standard_normal(out=pair[1], dtype=dtype),
                      zip(rng.spawn(len(chunks)), chunks, strict=True)))  # fmt: skip
    return values


# ---- the sets of cases ----------------------------------------------------------------------------

MEGABYTE = 1 << 20


def report_cases(size: int = 256, ops: Sequence[str] = tuple(OPS), dtype: str = "float32") -> list[Case]:
    """The cases of `python -m fastnorm bench`: x of about `size` megabytes as (N, D), 3/8 of it elsewhere.

    At 256 MB: a (65536, 1024) batch; a ResNet-50 activation of 56x56 with 256 channels at batch 32, as
    NCHW and as NHWC; 32768 tokens of a transformer 768 wide. Images in groups are half of that.
    """
    budget = size * MEGABYTE // dtype_of(dtype).itemsize

    def samples(share: float, per_sample: int, multiple: int = 1) -> int:
        return max(1, math.ceil(share * budget / (per_sample * multiple))) * multiple

    images = (samples(3 / 8, 256 * 56 * 56), 256, 56, 56)
    in_groups = (samples(3 / 16, 256 * 56 * 56), 256, 56, 56)
    shapes: dict[str, tuple[tuple[str, Shape], ...]] = {
        "channel": (("ND", (samples(1, 1024, 64), 1024)), ("NCHW", images), ("NHWC", images)),
        "group": (("NCHW", in_groups),),
        "row": (("ND", (samples(3 / 8, 768, 64), 768)),),
    }
    return [
        Case(op, op.layout(layout), shape, dtype)
        for op in OPS.values()
        if op.name in ops
        for layout, shape in shapes[op.family]
    ]


# The shapes of the pytest-benchmark suites: (family, layout, shape, whether in the default set). Images are
# ResNet-50's, rows those of transformers; the smallest show the cost of a call.
_SUITE: tuple[tuple[str, str, Shape, bool], ...] = (
    ("channel", "ND", (4, 8), True),
    ("channel", "ND", (100, 50), False),
    ("channel", "ND", (256, 1024), True),
    ("channel", "ND", (2048, 2048), False),
    ("channel", "ND", (256, 8192), False),
    ("channel", "ND", (16384, 1024), True),
    ("channel", "ND", (65536, 64), False),
    ("channel", "ND", (40000, 512), False),
    ("channel", "NCHW", (8, 64, 112, 112), False),
    ("channel", "NCHW", (16, 256, 56, 56), True),
    ("channel", "NCHW", (16, 512, 28, 28), False),
    ("channel", "NCHW", (50, 1024, 14, 14), False),
    ("channel", "NCHW", (50, 2048, 7, 7), False),
    ("channel", "NHWC", (8, 64, 112, 112), False),
    ("channel", "NHWC", (16, 256, 56, 56), True),
    ("channel", "NHWC", (50, 1024, 14, 14), False),
    ("group", "NCHW", (2, 8, 4, 4), True),
    ("group", "NCHW", (16, 256, 56, 56), True),
    ("group", "NCHW", (16, 512, 28, 28), False),
    ("group", "NHWC", (16, 256, 56, 56), False),
    ("row", "ND", (4, 8), True),
    ("row", "ND", (65536, 128), False),
    ("row", "ND", (4096, 768), True),
    ("row", "ND", (16384, 1024), True),
    ("row", "ND", (4096, 4096), False),
    ("row", "ND", (64, 262144), False),
)


def suite_cases(*, full: bool = False, dtypes: Sequence[str] = ("float32",)) -> list[Case]:
    """The cases of the suites in bench/: a few sizes and kinds, or with `full` every shape."""
    return [
        Case(op, op.layout(layout), shape, dtype)
        for dtype in dtypes
        for op in OPS.values()
        for family, layout, shape, default in _SUITE
        if op.family == family and (full or default)
    ]


# ---- the cases of `python -m fastnorm bench --targets` ---------------------------------------------

Group = Literal[
    "large", "cache", "small", "dtypes", "threads", "networks", "family", "family cached", "dropout", "dropout cached"
]  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """A case of the targets run, and what it stands for there."""

    group: Group
    case: Case
    contest: bool = False
    """Whether further peers take part, and not PyTorch alone: they compile for seconds."""
    network: str = ""
    count: int = 1
    """How many layers of the network have this shape."""


# Float32 beyond a cache of 32 MB, mostly 40 to 100 MB: tall and narrow, ragged, square, wide and flat; images
# of ResNet-50, the small ones in larger batches; the last of a layout is the 256 MB point of the plot.
_LARGE_IMAGES: tuple[Shape, ...] = (
    (16, 256, 56, 56), (16, 64, 112, 112), (50, 64, 56, 56), (32, 512, 28, 28), (128, 128, 28, 28),
    (50, 1024, 14, 14), (256, 256, 14, 14), (128, 2048, 7, 7), (512, 512, 7, 7), (64, 256, 56, 56),
)  # fmt: skip
_LARGE: dict[tuple[str, str], tuple[Shape, ...]] = {
    ("batchnorm", "ND"): (
        (16384, 1024), (262144, 64), (65536, 256), (40000, 512), (30001, 500), (4096, 4096), (2048, 8192),
        (256, 65536), (65536, 1024),
    ),
    ("batchnorm", "NCHW"): _LARGE_IMAGES,
    ("batchnorm", "NHWC"): _LARGE_IMAGES,
    ("layernorm", "ND"): (
        (16384, 1024), (131072, 128), (32768, 500), (21000, 768), (4096, 4096), (1024, 16384), (64, 262144),
        (65536, 1024),
    ),
}  # fmt: skip

# 64 KB to 16 MB: the same width, and images of ResNet-50 (the smallest of CIFAR-10).
_CACHED_BATCHES: tuple[Shape, ...] = ((256, 1024), (16, 1024), (64, 1024), (1024, 1024), (4096, 1024))
_CACHED_IMAGES: tuple[Shape, ...] = (
    (1, 512, 28, 28), (4, 64, 8, 8), (2, 256, 14, 14), (8, 256, 28, 28), (5, 256, 56, 56),
)  # fmt: skip
_CACHED: dict[tuple[str, str], tuple[Shape, ...]] = {
    ("batchnorm", "ND"): _CACHED_BATCHES,
    ("batchnorm", "NCHW"): _CACHED_IMAGES,
    ("batchnorm", "NHWC"): _CACHED_IMAGES,
    ("layernorm", "ND"): _CACHED_BATCHES,
}

_SMALL: dict[str, tuple[str, tuple[Shape, ...]]] = {
    "channel": ("ND", ((4, 8), (100, 50), (64, 256), (32, 1024))),
    "group": ("NCHW", ((4, 8, 2, 2), (2, 32, 4, 4), (4, 64, 8, 8))),
    "row": ("ND", ((4, 8), (100, 50), (64, 256), (32, 1024))),
}

# The rest of the family: images of ResNet-50, of a diffusion model's U-Net and of style transfer, rows of transformers.
_FAMILY: dict[tuple[str, str], tuple[Shape, ...]] = {
    ("groupnorm", "NCHW"): ((16, 256, 56, 56), (8, 320, 64, 64), (64, 1024, 14, 14)),
    ("groupnorm", "NHWC"): ((16, 256, 56, 56), (8, 320, 64, 64), (64, 1024, 14, 14)),
    ("instancenorm", "NCHW"): ((16, 64, 112, 112), (8, 32, 256, 256), (64, 1024, 14, 14)),
    ("instancenorm", "NHWC"): ((16, 64, 112, 112), (8, 32, 256, 256)),
    ("rmsnorm", "ND"): ((16384, 1024), (131072, 128), (4096, 4096)),
}
_FAMILY_CACHED: dict[tuple[str, str], tuple[Shape, ...]] = {
    ("groupnorm", "NCHW"): ((2, 256, 14, 14), (2, 320, 32, 32)),
    ("groupnorm", "NHWC"): ((2, 256, 14, 14), (2, 320, 32, 32)),
    ("instancenorm", "NCHW"): ((2, 256, 14, 14), (4, 64, 56, 56)),
    ("instancenorm", "NHWC"): ((2, 256, 14, 14), (4, 64, 56, 56)),
    ("rmsnorm", "ND"): ((256, 1024), (1024, 1024)),
}

# By dtype; the cached ones from small calls on.
_DROPOUT: dict[str, tuple[Shape, ...]] = {"float32": ((16384, 1024), (131072, 128)), "float16": ((32768, 1024),)}
_DROPOUT_CACHED: dict[str, tuple[Shape, ...]] = {
    "float32": ((4, 8), (64, 256), (256, 1024), (1024, 1024)),
    "float16": ((256, 1024), (1024, 1024), (4096, 1024)),
}

# 20 million elements: beyond the cache in every dtype.
_EACH_DTYPE: dict[tuple[str, str], Shape] = {
    ("batchnorm", "ND"): (20000, 1024),
    ("batchnorm", "NCHW"): (25, 256, 56, 56),
    ("batchnorm", "NHWC"): (25, 256, 56, 56),
    ("layernorm", "ND"): (27000, 768),
}

# Layers by output (channels, height, width): torchvision's resnet50, the stride in the 3x3 convolution.
_RESNET50: dict[Shape, int] = {
    (64, 112, 112): 1,
    (64, 56, 56): 6, (256, 56, 56): 4, (128, 56, 56): 1,
    (128, 28, 28): 7, (512, 28, 28): 5, (256, 28, 28): 1,
    (256, 14, 14): 11, (1024, 14, 14): 7, (512, 14, 14): 1,
    (512, 7, 7): 5, (2048, 7, 7): 4,
}  # fmt: skip
_BERT_LARGE = (4096, 1024), 48  # tokens by width; two LayerNorms in each of 24 blocks


def target_entries() -> list[Entry]:
    """What the targets are judged on.

    The first case of each layout in `large` and `cache` meets every peer, that of the rest of the family JAX as well.
    """

    def case(op: str, layout: str, shape: Shape, dtype: str = "float32") -> Case:
        return Case(OPS[op], OPS[op].layout(layout), shape, dtype)

    tables: tuple[tuple[Group, dict[tuple[str, str], tuple[Shape, ...]]], ...] = (
        ("large", _LARGE), ("cache", _CACHED), ("family", _FAMILY), ("family cached", _FAMILY_CACHED),
    )  # fmt: skip
    entries = [
        Entry(group, case(op, layout, shape), contest=shape == shapes[0])
        for group, table in tables
        for (op, layout), shapes in table.items()
        for shape in shapes
    ]
    entries += [
        Entry("small", case(op.name, layout, shape))
        for op in OPS.values()
        for layout, shapes in (_SMALL[op.family],)
        for shape in shapes
    ]
    entries += [
        Entry("dtypes", case(op, layout, shape, dtype))
        for (op, layout), shape in _EACH_DTYPE.items()
        for dtype in DTYPES
    ]
    entries += [
        Entry("threads", case(op, layout, shape))
        for (op, layout), shapes in _CACHED.items()
        for shape in (shapes[0], shapes[3])
    ]
    entries += [
        Entry("networks", case("batchnorm", "NCHW", (8, *shape)), network="ResNet-50", count=count)
        for shape, count in _RESNET50.items()
    ]
    both: tuple[tuple[Group, dict[str, tuple[Shape, ...]]], ...]
    both = ("dropout", _DROPOUT), ("dropout cached", _DROPOUT_CACHED)
    entries += [
        Entry(group, Case(DROPOUT, DROPOUT.layout("ND"), shape, dtype))
        for group, table in both
        for dtype, shapes in table.items()
        for shape in shapes
    ]
    shape, count = _BERT_LARGE
    return [*entries, Entry("networks", case("layernorm", "ND", shape), network="BERT-large", count=count)]
