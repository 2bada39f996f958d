"""The C++ extension as a table of kernels."""

from __future__ import annotations

from pathlib import Path

try:
    import fastnorm._core as _core
except ModuleNotFoundError:
    _package = Path(__file__).parent.parent
    _reason = "the C++ extension was not built: no working C++ compiler was found at installation"
    if (_package.parent / "CMakeLists.txt").exists():
        _reason = f"the C++ extension is not in the source tree {_package.parent}: import the installed package instead"
    raise ImportError(_reason) from None

channel_moments = _core.channel_moments
channel_weighted_moments = _core.channel_weighted_moments
channel_apply = _core.channel_apply
channel_forward = _core.channel_forward
channel_backward_reduce = _core.channel_backward_reduce
channel_backward_apply = _core.channel_backward_apply
channel_backward = _core.channel_backward
group_moments = _core.group_moments
group_forward = _core.group_forward
group_backward = _core.group_backward
row_forward = _core.row_forward
row_backward = _core.row_backward
dropout = _core.dropout
set_num_threads = _core.set_num_threads
