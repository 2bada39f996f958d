"""Hypothesis over shapes, axes, strides, dtypes and values: every backend against the truth."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
from cases import OPS, Inputs, case, check_all, check_moments, fused, truth
from hypothesis import HealthCheck, given, settings

import fastnorm
from fastnorm.bench.cases import DTYPES, dtype_of

SPREADS = {"float16": 1, "bfloat16": 1, "float32": 6, "float64": 6}
"""The largest power of ten of mean/spread: beyond it a dtype has no digits left for the spread."""


@st.composite
def arrays(draw, shape, dtype, offset=0.0):
    """Normal values in an array of drawn axis order, steps and broadcast axes over a larger block."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    steps = [draw(st.sampled_from([1, 1, 1, -1, 2, -3])) for _ in shape]
    order = draw(st.permutations(range(len(shape))))
    flat = [draw(st.integers(0, 9)) == 0 for _ in shape]  # one axis in ten is broadcast
    lengths = [1 if broadcast else n * abs(step) for n, step, broadcast in zip(shape, steps, flat, strict=True)]
    scale = 10.0 ** draw(st.integers(-2, 2))
    block = ((rng.standard_normal([lengths[axis] for axis in order]) + offset) * scale).astype(dtype_of(dtype))
    values = block.transpose(np.argsort(order))
    values = values[tuple(slice(None, None, step) for step in steps)]
    return np.broadcast_to(values, shape) if any(flat) else values


@st.composite
def calls(draw):
    """(case, inputs) of any op."""
    op = draw(st.sampled_from(sorted(OPS)))
    ndim = draw(st.integers(2, 5))
    lengths = st.one_of(st.integers(1, 9), st.sampled_from([16, 17, 31, 33, 65]))
    shape = tuple(draw(lengths) if n < 3 else draw(st.integers(1, 3)) for n in range(ndim))
    axis = draw(st.integers(-ndim, ndim - 1).filter(lambda axis: OPS[op].family != "group" or axis % ndim))
    dtype = draw(st.sampled_from(DTYPES))
    offset = draw(st.sampled_from([0.0, *(10.0**k for k in range(SPREADS[dtype] + 1))]))
    this = case(op, shape, axis, dtype)
    x = draw(arrays(shape, dtype, offset))
    dout = draw(arrays(shape, draw(st.sampled_from([dtype, dtype, *DTYPES]))))
    gamma, beta = (
        draw(st.none() | arrays(this.parameter_shape, "float64" if dtype == "float64" else "float32")) for _ in range(2)
    )
    return this, Inputs(x, gamma, beta, dout)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(call=calls())
def test_forward_and_backward(backend, call):
    this, inputs = call
    with np.errstate(over="ignore"):
        check_all(truth(this, *inputs), fused(this, inputs, backend))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), dtype=st.sampled_from(DTYPES))
def test_moments(backend, data, dtype):
    shape = tuple(data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=4)))
    x = data.draw(arrays(shape, dtype, data.draw(st.sampled_from([0.0, 10.0]))))
    axes = tuple(sorted(data.draw(st.sets(st.integers(0, len(shape) - 1)))))
    check_moments(fastnorm.moments(x, axes, backend=backend), x, axes)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    values=st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=40),
    cuts=st.lists(st.integers(0, 40), max_size=4),
)
def test_moments_of_parts_merge_to_those_of_the_whole(backend, values, cuts):
    x = np.array(values)
    whole = fastnorm.moments(x, backend=backend)
    merged = fastnorm.moments(x[:0], backend=backend)
    for part in np.split(x, sorted(min(cut, len(x)) for cut in cuts)):
        merged = merged.merge(fastnorm.moments(part, backend=backend))
    assert merged.count == whole.count == len(values)
    check_moments(merged, x, (0,))
