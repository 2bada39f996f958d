"""How a batch enters the running statistics where a dictionary asks for another rule than CS231n's.

    CS231n       running = momentum * running + (1 - momentum) * batch    biased variance; both start from 0
    PyTorch      running = (1 - momentum) * running + momentum * batch    unbiased, n/(n-1) times; var starts from 1
    cumulative   running = running + (batch - running) / k                momentum None; this is batch number k
    average      what an ExponentialMovingAverage makes of it

A batch stays out, and is not counted, where PyTorch's rule needs the unbiased variance of a single value, which is
undefined; and with skip_nonfinite where a statistic of it is NaN or Inf, or becomes Inf in the dtype that the running
statistics are kept in. One such channel keeps out the whole batch: its other channels come from the same overflowed
step, which mixed-precision training drops as a whole, and one count of batches holds for all channels.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from fastnorm import _arrays
from fastnorm._device import BFLOAT16, on_device
from fastnorm._layout import FLOAT32, Array
from fastnorm.ops import _numbers
from fastnorm.ops.averages import ExponentialMovingAverage

STATISTICS = ("running_mean", "running_var")
KEYS = frozenset({"convention", "num_batches_tracked", "average", "skip_nonfinite"})
"""The keys of a `bn_param` that only these rules have."""
Pair = tuple[Array, Array]
Running = tuple[Array | None, Array | None]


class Rule(NamedTuple):
    """How batches enter the running statistics, read and checked."""

    momentum: float | None
    """The weight of the *old* statistics; None: the cumulative average."""
    unbiased: bool
    """PyTorch's variance and its first value, 1."""
    tracked: int | None
    """Batches so far; None where they are not counted."""
    average: ExponentialMovingAverage | None
    """What keeps the statistics, instead of a momentum."""
    skip_nonfinite: bool


class Step(NamedTuple):
    """What a batch does to the running statistics: momentum * running + (1 - momentum) * batch."""

    momentum: float
    correction: float
    """How many times the batch's variance counts, n/(n-1) or 1."""
    running: Running


def checked_rule(name: str, param: dict[str, Any]) -> Rule:
    """The rule that a dictionary of this name asks for."""
    convention = param.get("convention", "cs231n")
    if not isinstance(convention, str) or convention not in ("cs231n", "pytorch"):
        raise ValueError(f"{name}['convention']: expected 'cs231n' or 'pytorch', got {convention!r}")
    unbiased = convention == "pytorch"
    average = param.get("average")
    if average is not None and not isinstance(average, ExponentialMovingAverage):
        raise TypeError(f"{name}['average']: expected an ExponentialMovingAverage, got {type(average).__name__}")
    if average is not None and "momentum" in param:
        raise ValueError(f"{name}['momentum']: expected none beside 'average', which has its decay")
    momentum = param.get("momentum", 0.1 if unbiased else 0.9)
    if momentum is not None:
        momentum = _numbers.share("momentum", momentum)
        momentum = 1.0 - momentum if unbiased else momentum
    tracked = param.get("num_batches_tracked")
    if tracked is not None or unbiased or momentum is None:
        tracked = _numbers.count(f"{name}['num_batches_tracked']", 0 if tracked is None else tracked)
    skip = param.get("skip_nonfinite", False)
    if skip is not False:
        skip = _numbers.flag(f"{name}['skip_nonfinite']", skip)
    return Rule(momentum, unbiased, tracked, average, skip)


def checked_source(name: str, rule: Rule, x: Array, running: Running) -> None:
    """Raise where this rule's average cannot take a batch in.

    On a device, since it keeps NumPy arrays; or because it keeps something else than these running statistics, those
    of another layer, say.
    """
    if rule.average is None:
        return
    if on_device(x):
        raise ValueError(f"{name}['average']: expected none for arrays on a device, since it keeps NumPy arrays")
    for key, stored in zip(STATISTICS, running, strict=True):
        kept = rule.average.average(key)
        if kept is not None and (stored is None or not np.array_equal(kept, stored, equal_nan=True)):
            raise ValueError(
                f"{name}['average']: keeps another {key} than {name}['{key}']; expected an average of this layer's own"
            )


def step(rule: Rule, running: Running, batch: Pair, dtype: np.dtype[Any], count: int) -> Step | None:
    """What this batch, of `count` values a channel, does; None where it stays out.

    dtype : that of running statistics where there are none yet
    """
    if rule.unbiased and count < 2:
        return None
    correction = count / (count - 1) if rule.unbiased else 1.0
    if rule.skip_nonfinite and not _stay_finite(running, batch, correction, dtype):
        return None
    momentum = rule.momentum
    if momentum is None:
        assert rule.tracked is not None
        momentum = rule.tracked / (rule.tracked + 1)
    old_mean, old_var = running
    if old_var is None and rule.unbiased and rule.average is None:
        old_var = _arrays.full(batch[1].size, 1.0, dtype, batch[1])
    return Step(momentum, correction, (old_mean, old_var))


@np.errstate(over="ignore", invalid="ignore")
def _stay_finite(running: Running, batch: Pair, correction: float, dtype: np.dtype[Any]) -> bool:
    """Whether a batch's statistics are finite in the dtypes that the running ones are kept in.

    On a device this waits for them. (bfloat16 there, which NumPy lacks, counts as float32, whose range it has.)
    """
    found = (_arrays.on_host(values) for values in (batch[0], corrected(batch[1], correction)))
    kept = (dtype if old is None else kept_dtype(old, dtype) for old in running)
    kept = (FLOAT32 if to is BFLOAT16 else to for to in kept)
    return all(bool(np.isfinite(values.astype(to)).all()) for values, to in zip(found, kept, strict=True))


def kept_dtype(running: Array, dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The dtype that running statistics are kept in: their own, or this one for integers."""
    return dtype if running.dtype.kind in "biu" else running.dtype


@np.errstate(over="ignore")
def corrected(var: Array, correction: float) -> Array:
    """A variance so many times."""
    return var if correction == 1.0 else _arrays.scaled(var, correction)


def averaged(average: ExponentialMovingAverage, running: Running, batch: Pair, dtype: np.dtype[Any]) -> Pair:
    """The running statistics after this batch has entered the average that keeps them.

    Where it keeps none yet, it starts from `running`, or from zeros of `dtype`.
    """
    values = {}
    for key, old, new in zip(STATISTICS, running, batch, strict=True):
        if old is None:
            values[key] = new.astype(dtype)
            continue
        if average.average(key) is None:
            average.initialize({key: old})
        values[key] = new.reshape(old.shape)
    average.apply(values)
    mean, var = (average.average(key) for key in STATISTICS)
    assert mean is not None
    assert var is not None
    return mean, var
