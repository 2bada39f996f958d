"""The C++ extension: the kernels of `fastnorm.backends.KernelTable` and facts about the build."""

from collections.abc import Sequence
from typing import Any

import numpy as np

_Array = np.ndarray[Any, Any]

def channel_moments(x: _Array, outer: int, channels: int, inner: int, mean: _Array, var: _Array, /) -> None: ...
def channel_weighted_moments(
    x: _Array, outer: int, channels: int, inner: int, weights: _Array, each: bool,
    count: _Array, mean: _Array, var: _Array, /,
) -> None: ...  # fmt: skip
def channel_apply(
    x: _Array, outer: int, channels: int, inner: int,
    mean: _Array, var: _Array, eps: float, gamma: _Array | None, beta: _Array | None, y: _Array, /,
) -> None: ...  # fmt: skip
def channel_forward(
    x: _Array, outer: int, channels: int, inner: int,
    gamma: _Array | None, beta: _Array | None, eps: float, y: _Array, mean: _Array, var: _Array, /,
) -> None: ...  # fmt: skip
def channel_backward_reduce(
    dy: _Array, x: _Array, outer: int, channels: int, inner: int,
    mean: _Array, var: _Array, eps: float, sum_dy: _Array, sum_dy_xhat: _Array, /,
) -> None: ...  # fmt: skip
def channel_backward_apply(
    dy: _Array, x: _Array, outer: int, channels: int, inner: int,
    mean: _Array, var: _Array, eps: float, gamma: _Array | None,
    sum_dy: _Array, sum_dy_xhat: _Array, count: float, dx: _Array, /,
) -> None: ...  # fmt: skip
def channel_backward(
    dy: _Array, x: _Array, outer: int, channels: int, inner: int,
    mean: _Array, var: _Array, eps: float, gamma: _Array | None,
    dx: _Array, sum_dy: _Array, sum_dy_xhat: _Array, /,
) -> None: ...  # fmt: skip
def group_moments(
    x: _Array, samples: int, outer: int, channels: int, inner: int, groups: int, mean: _Array, var: _Array, /
) -> None: ...
def group_forward(
    x: _Array, samples: int, outer: int, channels: int, inner: int, groups: int,
    gamma: _Array | None, beta: _Array | None, eps: float, y: _Array, mean: _Array, var: _Array, /,
) -> None: ...  # fmt: skip
def group_backward(
    dy: _Array, x: _Array, samples: int, outer: int, channels: int, inner: int, groups: int,
    mean: _Array, var: _Array, eps: float, gamma: _Array | None,
    dx: _Array, sum_dy: _Array, sum_dy_xhat: _Array, /,
) -> None: ...  # fmt: skip
def row_forward(
    x: _Array, rows: int, cols: int,
    gamma: _Array | None, beta: _Array | None, eps: float, y: _Array, mean: _Array | None, var: _Array, /,
) -> None: ...  # fmt: skip
def row_backward(
    dy: _Array, x: _Array, rows: int, cols: int,
    mean: _Array | None, var: _Array, eps: float, gamma: _Array | None,
    dx: _Array, dgamma: _Array | None, dbeta: _Array | None, /,
) -> None: ...  # fmt: skip
def dropout(x: _Array, n: int, first: int, seed: int, threshold: int, scale: float, y: _Array, /) -> None: ...
def plan_channels(
    outer: int, channels: int, inner: int, itemsize: int, arrays: int, threads: int, /
) -> dict[str, Any]: ...
def plan_groups(
    samples: int, outer: int, channels: int, inner: int, groups: int, itemsize: int, arrays: int, threads: int, /
) -> dict[str, Any]: ...
def plan_rows(rows: int, cols: int, itemsize: int, arrays: int, threads: int, /) -> dict[str, Any]: ...
def stream_read(src: _Array, /) -> None: ...
def stream_copy(src: _Array, dst: _Array, /) -> None: ...
def stream_add(a: _Array, b: _Array, dst: _Array, /) -> None: ...
def plain(x: object, gamma: object, beta: object, axis: int, /) -> bool: ...
def plain_out(out: object, x: object, /, *others: object) -> bool: ...
def plain_backward(dout: object, x: object, gamma: object, beta: object, axis: int, /) -> bool: ...
def plain_channels(x: object, gamma: object, beta: object, axis: int, /) -> tuple[int, int, int] | None: ...
def plain_channels_backward(
    dout: object, x: object, gamma: object, beta: object, axis: int, /
) -> tuple[int, int, int] | None: ...
def plain_reduction(
    x: object, axis: object, keepdims: bool, /
) -> tuple[int, int, int, int, tuple[int, ...]] | None: ...
def plain_normalization(
    x: object, mean: object, var: object, gamma: object, beta: object, /
) -> tuple[int, int, int] | None: ...
def running_average(running: object, batch: object, momentum: float, /) -> _Array | None: ...
def empty(shape: Sequence[int], dtype: np.dtype[Any], /) -> _Array: ...
def empty_like(prototype: _Array, dtype: np.dtype[Any] | None = None, /) -> _Array: ...
def output_pool() -> tuple[int, int, int, int, int]: ...
def set_output_pool(limit: int, /) -> None: ...
def clear_output_pool() -> None: ...
def isa() -> str: ...
def isas() -> list[str]: ...
def set_isa(name: str, /) -> None: ...
def set_num_threads(count: int, /) -> None: ...
def build_info() -> dict[str, Any]: ...
