"""Validation shared by the ops, and the cache that carries a forward's values to its backward."""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import numpy as np

from fastnorm import _arrays
from fastnorm._layout import (
    FLOAT32,
    FLOAT64,
    Array,
    Axes,
    accumulation_dtype,
    as_array,
    beside,
    checked_axis,
    deliver,
    storage_dtype,
)
from fastnorm.ops import _numbers, _running

# Steps of small calls for dictionaries and vectors of the common kind, and None for all else, which takes the long way:
# what `running_options` finds in 0.2 us instead of 1.2, `constants` in 0.2 instead of 0.8, and both statistics of
# `store_running` in 0.25 instead of 4; the same bits.
_plain_options: Callable[[Any, int, Any], Any]
_plain_constants: Callable[[Any, Any, int], tuple[Array, Array] | None]
_running_averages: Callable[[Any, Any, Any, Any, float, float], tuple[Array, Array] | None]
try:
    from fastnorm._core import constants as _plain_constants
    from fastnorm._core import plain_options as _plain_options
    from fastnorm._core import running_averages as _running_averages
except ImportError:

    def _plain_options(param: object, channels: int, defaults: object, /) -> None:
        return None

    def _plain_constants(mean: object, var: object, length: int, /) -> tuple[Array, Array] | None:
        return None

    def _running_averages(
        running_mean: object, running_var: object, mean: object, var: object, momentum: float, correction: float, /
    ) -> tuple[Array, Array] | None:
        return None


RUNNING = (FLOAT32, FLOAT64)
"""The dtypes of running statistics that fastnorm makes itself."""
CS231N_KEYS = frozenset({"mode", "eps", "momentum", "running_mean", "running_var"})
BN_KEYS = CS231N_KEYS | _running.KEYS
DROPOUT_KEYS = frozenset({"p", "mode", "seed", "scale"})
WORDS = 1 << 32
"""How many values a random word of dropout can have."""
EPS_ALONE = frozenset({"mode", "eps"})
"""Of layernorm, rmsnorm and groupnorm; mode is accepted and ignored."""


class Cache(NamedTuple):
    """What backward needs of forward. Opaque to callers; the same on every backend.

    It refers to x and copies nothing of its size: x must not change between forward and backward.
    """

    op: str
    x: Array | None
    """None where test mode wrote the output over x."""
    gamma: Array | None
    beta: Array | None
    mean: Any
    """float64, one per channel, row or group of a sample in index order; None for rows that are not centred."""
    var: Array
    """Like mean, biased; the mean of squares where there is no mean."""
    eps: float
    axes: Axes
    """Of gamma and beta: the channel axis, or of layernorm and rmsnorm the normalized ones."""
    frozen: bool
    """Whether mean and var are constants (batchnorm's test mode) rather than functions of x."""


def checked_cache(cache: Any, op: str) -> Cache:
    """The cache, if it is one that this op's forward returned."""
    if not isinstance(cache, Cache):
        raise TypeError(f"cache: expected what {op}_forward returned, got {described(cache)}")
    if cache.op != op:
        raise ValueError(f"cache: expected one of {op}_forward, got one of {cache.op}_forward")
    return cache


def cached_x(cache: Cache) -> Array:
    """The x that a backward needs."""
    if cache.x is None:
        raise ValueError("cache: test mode wrote its output over x, which this backward needs")
    return cache.x


def delivered(work: Array, out: Array, cache: Cache) -> tuple[Array, Cache]:
    """What a forward returns: `out` with the result that is in `work`, and the cache.

    Arrays on a device are those of the caller's library, in the cache too: by the time of the backward the caller
    may have given one other memory.
    """
    if work is out and type(out) is np.ndarray:
        return out, cache
    x, gamma, beta, mean, var = (_arrays.handed(array) for array in cache[1:6])
    return deliver(work, out), cache._replace(x=x, gamma=gamma, beta=beta, mean=mean, var=var)


def described(value: Any) -> str:
    """What a message says of a value of the wrong type."""
    return "None" if value is None else f"an object of type {type(value).__name__}"


def checked_param(name: str, param: Any, keys: frozenset[str]) -> dict[str, Any]:
    """The options dictionary, if it has no keys but these; an empty one for None."""
    if param is None:
        return {}
    if not isinstance(param, dict):
        raise TypeError(f"{name}: expected a dict or None, got {type(param).__name__}")
    if not param.keys() <= keys:
        unknown = sorted(map(repr, param.keys() - keys))
        near = difflib.get_close_matches(unknown[0].strip("'"), keys, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{name}: unknown key {', '.join(unknown)}, expected some of {sorted(keys)}{hint}")
    return param


def checked_eps(eps: Any) -> float:
    """eps as a finite float, at least 0."""
    return _numbers.at_least_zero("eps", eps)


def checked_dout(dout: Any, x: Array) -> Array:
    """dout as an array of x's shape and a real dtype."""
    array = beside("dout", dout, x)
    storage_dtype("dout", array)
    if array.shape != x.shape:
        raise ValueError(f"dout: expected the shape of x, {x.shape}, got {array.shape}")
    return array


def _one_per_channel(name: str, value: Any, x: Array, channels: int) -> Array:
    array = beside(name, value, x)
    storage_dtype(name, array)
    if array.size != channels or max(array.shape, default=1) != channels:
        raise ValueError(f"{name}: expected {channels} elements, one per channel of x, got shape {array.shape}")
    return array


def per_channel(name: str, value: Any, x: Array, channels: int) -> Array:
    """Statistics or sums handed in by the caller, as 1-D float64 of one element a channel."""
    return _arrays.flat(_one_per_channel(name, value, x, channels), FLOAT64)


def checked_count(count: Any) -> float:
    """A number of values, above 0."""
    number = _numbers.number("count", count)
    if not 0.0 < number < math.inf:
        raise ValueError(f"count: expected a finite number above 0, got {number}")
    return number


# ---- batchnorm ------------------------------------------------------------------------------------


def batchnorm_x(x: Any, axis: int) -> tuple[Array, tuple[int], int]:
    """(x, (channel axis,), channels)"""
    array = as_array("x", x)
    if array.ndim < 2:
        raise ValueError(f"x: expected at least 2 dimensions, (N, D) or (N, C, ...), got shape {array.shape}")
    channel_axis = checked_axis(axis, array.ndim)
    return array, (channel_axis,), array.shape[channel_axis]


class BatchnormOptions(NamedTuple):
    """A `bn_param`, read and checked."""

    frozen: bool
    """Test mode: mean and var are the running statistics."""
    eps: float
    momentum: float
    """The weight of the old running statistics, where `rule` is None."""
    running_mean: Array | None
    """As the caller stored it; running_var likewise. Never None in batchnorm's test mode."""
    running_var: Array | None
    rule: _running.Rule | None
    """How batches enter the running statistics where it is not CS231n's rule."""


DEFAULTS = BatchnormOptions(False, 1e-5, 0.9, None, None, None)
"""Those of an empty dictionary."""


def batchnorm_options(bn_param: Any, x: Array, channels: int) -> BatchnormOptions:
    """The options of a batchnorm of x over this many channels."""
    options = running_options("bn_param", bn_param, x, channels)
    if options.frozen and (options.running_mean is None or options.running_var is None):
        missing = "running_mean" if options.running_mean is None else "running_var"
        raise ValueError(f"bn_param['{missing}']: test mode needs running statistics, got none")
    return options


def running_options(name: str, param: Any, x: Array, channels: int) -> BatchnormOptions:
    """The options in a dictionary of this name; the running statistics may be absent, in test mode too."""
    if param is None:
        return DEFAULTS
    if type(x) is np.ndarray and (found := _plain_options(param, channels, DEFAULTS)) is not None:
        return cast(BatchnormOptions, found)
    param = checked_param(name, param, BN_KEYS)
    mode = param.get("mode", "train")
    if not isinstance(mode, str) or mode not in ("train", "test"):
        raise ValueError(f"{name}['mode']: expected 'train' or 'test', got {mode!r}")
    momentum = param.get("momentum", DEFAULTS.momentum)
    cs231n = param.keys() <= CS231N_KEYS and momentum is not None
    rule = None if cs231n else _running.checked_rule(name, param)
    options = BatchnormOptions(
        mode == "test",
        checked_eps(param.get("eps", DEFAULTS.eps)),
        _numbers.share("momentum", momentum) if rule is None else 0.0,
        _stored(param, "running_mean", x, channels),
        _stored(param, "running_var", x, channels),
        rule,
    )
    if rule is not None and rule.average is not None and not options.frozen:
        _running.checked_source(name, rule, x, (options.running_mean, options.running_var))
    return options


def _stored(param: dict[str, Any], key: str, x: Array, channels: int) -> Array | None:
    """A running statistic as the caller stored it, if its length fits."""
    value = param.get(key)
    if value is None or (type(value) is type(x) and value.dtype in RUNNING and value.shape == (channels,)):
        return value  # the usual ones, without the steps that find an error
    return _one_per_channel(key, value, x, channels)


def constants(options: BatchnormOptions) -> tuple[Array, Array]:
    """Test mode's mean and var: copies of the running statistics as 1-D float64."""
    mean, var = options.running_mean, options.running_var
    assert mean is not None
    assert var is not None
    if (copies := _plain_constants(mean, var, mean.size)) is not None:
        return copies
    return mean.astype(np.float64).reshape(-1), var.astype(np.float64).reshape(-1)


def store_running(
    bn_param: dict[str, Any], options: BatchnormOptions, mean: Array, var: Array, storage: np.dtype[Any], count: int
) -> None:
    """Let a batch of `count` values a channel into the running statistics of bn_param, by the rule that it asks for.

    CS231n's is running = momentum * running + (1 - momentum) * batch. New arrays, in the shape and dtype that the
    caller's have; where there are none yet, from zeros, in the accumulation dtype of values so stored.
    """
    rule, running = options.rule, (options.running_mean, options.running_var)
    if rule is None:
        averages = _averages(running, mean, var, options.momentum, 1.0, storage)
    else:
        dtype = accumulation_dtype(storage)
        step = _running.step(rule, running, (mean, var), dtype, count)
        if step is None:
            return
        if rule.average is None:
            averages = _averages(step.running, mean, var, step.momentum, step.correction, storage)
        else:
            batch = mean.reshape(-1), _running.corrected(var, step.correction).reshape(-1)
            averages = _running.averaged(rule.average, step.running, batch, dtype)
        if rule.tracked is not None:
            bn_param["num_batches_tracked"] = rule.tracked + 1
    bn_param["running_mean"], bn_param["running_var"] = averages


def _averages(
    running: _running.Running, mean: Array, var: Array, momentum: float, correction: float, storage: np.dtype[Any]
) -> _running.Pair:
    """momentum * running + (1 - momentum) * batch, whose variance counts `correction` times."""
    running_mean, running_var = running
    averages = _running_averages(running_mean, running_var, mean, var, momentum, correction)
    if averages is None:
        dtype, var = accumulation_dtype(storage), _running.corrected(var, correction)
        averages = _updated(running_mean, mean, momentum, dtype), _updated(running_var, var, momentum, dtype)
    return averages


def _updated(running: Array | None, batch: Array, momentum: float, dtype: np.dtype[Any]) -> Array:
    kept = dtype if running is None else _running.kept_dtype(running, dtype)
    return _arrays.handed(_arrays.mixed(running, batch.reshape(-1), momentum, kept))


# ---- rows and groups ------------------------------------------------------------------------------


def rows_x(x: Any, axis: int) -> tuple[Array, Axes]:
    """(x, the normalized axes)"""
    array = as_array("x", x)
    if array.ndim < 1:
        raise ValueError("x: expected at least 1 dimension, got a scalar")
    return array, tuple(range(checked_axis(axis, array.ndim), array.ndim))


def groups_x(x: Any, axis: int) -> tuple[Array, tuple[int], int]:
    """(x, (channel axis,), channels), the samples along axis 0"""
    array, axes, channels = batchnorm_x(x, axis)
    if axes == (0,):
        raise ValueError(f"axis: expected a channel axis after axis 0, the samples, got {axis}")
    return array, axes, channels


def checked_groups(groups: Any, channels: int) -> int:
    """The number of groups that these channels fall into."""
    if isinstance(groups, bool) or not hasattr(groups, "__index__"):
        raise TypeError(f"groups: expected a whole number, got {groups!r}")
    number = int(groups.__index__())
    if number < 1 or channels % number:
        raise ValueError(f"groups: expected a divisor of the {channels} channels of x, got {number}")
    return number


def instancenorm_options(in_param: Any, x: Array, channels: int) -> BatchnormOptions:
    """The options of an instancenorm; frozen only where there are running statistics."""
    options = running_options("in_param", in_param, x, channels)
    no_mean, no_var = options.running_mean is None, options.running_var is None
    if no_mean != no_var:
        missing = "running_mean" if no_mean else "running_var"
        raise ValueError(f"in_param['{missing}']: expected both running statistics or none, got one")
    return options._replace(frozen=False) if options.frozen and no_mean else options


def eps_alone(name: str, param: Any) -> float:
    """The one option of a normalization without running statistics."""
    return checked_eps(checked_param(name, param, EPS_ALONE).get("eps", 1e-5))


# ---- dropout --------------------------------------------------------------------------------------


class Draw(NamedTuple):
    """A `dropout_param`, read and checked: how the mask is drawn, as the kernels want it."""

    seed: int
    threshold: int
    """Elements whose 32-bit word is below it are kept, from 0, none, to 2**32, all."""
    scale: float
    """The factor of those."""


def dropout_draw(dropout_param: Any) -> Draw:
    """The options of dropout; the seed is drawn here where none is given."""
    param = checked_param("dropout_param", dropout_param, DROPOUT_KEYS)
    p, mode, scale, seed = param.get("p"), param.get("mode", "train"), param.get("scale", "inverted"), param.get("seed")
    if p is None:
        raise ValueError("dropout_param['p']: expected the probability of keeping an element, got none")
    p = p if type(p) is float else _numbers.number("dropout_param['p']", p)
    if not 0.0 < p <= 1.0:
        raise ValueError(f"dropout_param['p']: expected a probability of keeping, above 0 and at most 1, got {p}")
    if not isinstance(mode, str) or mode not in ("train", "test"):
        raise ValueError(f"dropout_param['mode']: expected 'train' or 'test', got {mode!r}")
    if not isinstance(scale, str) or scale not in ("inverted", "none"):
        raise ValueError(f"dropout_param['scale']: expected 'inverted' or 'none', got {scale!r}")
    seed = None if seed is None else _checked_seed(seed)
    if mode == "test":
        return Draw(0, WORDS, 1.0 if scale == "inverted" else p)
    if seed is None:
        seed = int.from_bytes(os.urandom(8), "little")  # not from a generator that a fork or its user repeats
    return Draw(seed, round(p * WORDS), 1.0 / p if scale == "inverted" else 1.0)


def _checked_seed(seed: Any) -> int:
    if isinstance(seed, bool) or not hasattr(seed, "__index__"):
        raise TypeError(f"dropout_param['seed']: expected a whole number, got {seed!r}")
    number = int(seed.__index__())
    if not 0 <= number < 1 << 64:
        raise ValueError(f"dropout_param['seed']: expected from 0 to 2**64 - 1, got {number}")
    return number
