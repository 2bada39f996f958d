"""Every op on every backend, dtype, shape and layout against the truth, forward and backward."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from cases import (
    ARRANGEMENTS,
    AXES_OF,
    DTYPES_OF,
    OPS,
    SHAPES_OF,
    WRITABLE,
    Inputs,
    case,
    check_all,
    fused,
    gradients,
    rearranged,
    standard,
    storage,
    truth,
)

import fastnorm
from fastnorm.bench.cases import DTYPES

ops = pytest.mark.parametrize("op", OPS)
ops_and_dtypes = pytest.mark.parametrize(("op", "dtype"), [(op, each) for op in OPS for each in DTYPES_OF[op]])


@pytest.mark.parametrize(("op", "shape"), [(op, shape) for op in OPS for shape in SHAPES_OF[op]], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_shapes(op, dtype, shape, backend):
    this, inputs, expected = standard(op, shape, dtype=dtype)
    check_all(expected, fused(this, inputs, backend))


@pytest.mark.parametrize(("op", "shape", "axis"), [(op, *row) for op in OPS for row in AXES_OF[op]], ids=str)
def test_axes(op, shape, axis, backend):
    this, inputs, expected = standard(op, shape, axis)
    check_all(expected, fused(this, inputs, backend))


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
@ops_and_dtypes
def test_layouts(op, dtype, arrangement, backend):
    for shape in ((19, 37), (3, 5, 7), (2, 5, 4, 3)):
        this = case(op, shape, dtype=dtype)
        for of_dout in ("C", arrangement):
            inputs = rearranged(this.inputs(), arrangement, of_dout)
            before = inputs.x.copy(), inputs.dout.copy()
            results = fused(this, inputs, backend)
            check_all(truth(this, *inputs), results)
            for name in ("y", "dx"):
                assert results[name].dtype == storage(inputs.x)
                assert results[name].flags.writeable
            np.testing.assert_array_equal(before, (inputs.x, inputs.dout))


@ops
def test_layouts_of_x_and_dout_mixed(op, backend):
    this = case(op, (4, 5, 3))
    for of_x, of_dout in itertools.product(ARRANGEMENTS, ARRANGEMENTS):
        inputs = rearranged(this.inputs(), of_x, of_dout)
        check_all(truth(this, *inputs), fused(this, inputs, backend))


@ops
def test_the_result_has_the_layout_of_x(op, backend):
    this = case(op, (4, 6, 5, 3))
    for name, arrange in ARRANGEMENTS.items():
        inputs = rearranged(this.inputs(), name)
        expected = np.empty_like(arrange(inputs.x), subok=False).strides
        results = fused(this, inputs, backend)
        assert (results["y"].strides, results["dx"].strides) == (expected, expected), name


@pytest.mark.parametrize("kind", ["int8", "uint8", "int32", "int64", "uint64", "bool"])
@ops
def test_integers_and_bools_become_float64(op, kind, backend, rng):
    this = case(op, (9, 10), dtype="float64")
    x, dout = rng.integers(0, 2 if kind == "bool" else 100, (2, 9, 10)).astype(kind)
    inputs = this.inputs()._replace(x=x, dout=dout)
    results = fused(this, inputs, backend)
    assert {value.dtype for value in results.values()} == {np.dtype(np.float64)}
    check_all(truth(this, *inputs), results)


@pytest.mark.parametrize(("of_x", "of_dout"), list(itertools.permutations(DTYPES, 2)))
@ops
def test_dtypes_of_x_and_dout_mixed(op, of_x, of_dout, backend):
    this = case(op, (7, 11), dtype=of_x)
    inputs = this.inputs()._replace(dout=case(op, (7, 11), dtype=of_dout).inputs().dout)
    results = fused(this, inputs, backend)
    assert results["dx"].dtype == inputs.x.dtype
    check_all(truth(this, *inputs), results)


@pytest.mark.parametrize("arrangement", ["C", "F", "gaps", "foreign byte order"])
@pytest.mark.parametrize("with_beta", [True, False])
@pytest.mark.parametrize("with_gamma", [True, False])
@ops
def test_gamma_and_beta_may_be_none(op, with_gamma, with_beta, arrangement, backend):
    this = case(op, (5, 12, 3))
    x, gamma, beta, dout = rearranged(this.inputs(), arrangement, arrangement)
    inputs = Inputs(x, gamma if with_gamma else None, beta if with_beta else None, dout)
    results = fused(this, inputs, backend)
    assert ("dgamma" in results, "dbeta" in results) == (with_gamma, with_beta and this.op.centred)
    check_all(truth(this, *inputs), results)


@pytest.mark.parametrize("kind", ["float16", "bfloat16", "float32", "float64", "int32", ">f4", "gaps"])
@pytest.mark.parametrize(
    ("op", "shape", "parameter"),
    [
        ("batchnorm", (3, 6, 2, 4), (6,)),
        ("batchnorm", (3, 6, 2, 4), (6, 1, 1)),
        ("batchnorm", (3, 6, 2, 4), (1, 6, 1, 1)),
        ("batchnorm", (3, 6), (1, 6)),
        ("batchnorm", (3, 1), (1,)),
        ("groupnorm", (3, 6, 2, 4), (1, 6, 1, 1)),
        ("layernorm", (3, 6), (1, 6)),
        ("layernorm", (3, 6, 4), (6, 4)),
        ("layernorm", (3, 6, 4), (1, 6, 4)),
    ],
)
def test_parameters_of_any_fitting_shape_and_dtype(op, shape, parameter, kind, backend):
    from fastnorm.bench.cases import dtype_of

    this = case(op, shape)
    inputs = this.inputs()
    # Multiples of 1/4 in every dtype, so that one truth serves all of them; whole numbers for integers.
    step = 1 if kind == "int32" else 4
    gamma, beta = (np.round(value.reshape(parameter) * step) / step for value in inputs[1:3])
    gamma, beta = (ARRANGEMENTS["gaps"](v) if kind == "gaps" else v.astype(dtype_of(kind)) for v in (gamma, beta))
    inputs = inputs._replace(gamma=gamma, beta=beta)
    results = fused(this, inputs, backend)
    expected = np.dtype(np.float64) if kind == "int32" else gamma.dtype
    for name in ("dgamma", "dbeta"):
        assert (results[name].shape, results[name].dtype) == (parameter, expected)
    check_all(truth(this, *inputs), results)


@pytest.mark.parametrize("of_out", WRITABLE)
@ops_and_dtypes
def test_out(op, dtype, of_out, backend):
    this = case(op, (6, 9, 4), dtype=dtype)
    for of_x in ("C", "channels-last", "gaps"):
        inputs = rearranged(this.inputs(), of_x)
        y, dx = (ARRANGEMENTS[of_out](np.full(inputs.x.shape, 7, inputs.x.dtype)) for _ in range(2))
        arguments = this.arguments(*inputs[:3])
        result, cache = this.op.forward(*arguments, {}, axis=1, out=y, backend=backend)
        found = gradients(this.op.backward(inputs.dout, cache, out=dx, backend=backend))
        assert result is y
        assert found["dx"] is dx
        check_all(truth(this, *inputs), {"y": y, **found})
        without = fused(this, inputs, backend)
        if y.strides == without["y"].strides:
            np.testing.assert_array_equal(y, without["y"])
            np.testing.assert_array_equal(dx, without["dx"])


def test_out_writes_nothing_beside_its_elements(backend):
    this = case("batchnorm", (6, 9))
    x, gamma, beta, dout = this.inputs()
    for arrangement in ("padded", "gaps", "offset"):
        out = ARRANGEMENTS[arrangement](x)
        whole = out.base
        while whole.base is not None:
            whole = whole.base
        whole[...] = 7
        inside = np.zeros(whole.shape, bool)
        np.lib.stride_tricks.as_strided(  # the same elements of a mask
            inside.reshape(-1)[(out.ctypes.data - whole.ctypes.data) // 4 :], out.shape, [s // 4 for s in out.strides]
        )[...] = True
        _, cache = fastnorm.batchnorm_forward(x, gamma, beta, out=out, backend=backend)
        fastnorm.batchnorm_backward(dout, cache, out=out, backend=backend)
        assert inside.sum() == x.size
        assert (whole[~inside] == 7).all(), arrangement


def test_lists_and_numbers_are_arrays(backend):
    out, cache = fastnorm.batchnorm_forward([[1.0, 2.0], [3.0, 6.0]], [1.0, 1.0], [0.0, 0.0], backend=backend)
    np.testing.assert_allclose(out, [[-1, -1], [1, 1]], atol=1e-4)
    dx, _, dbeta = fastnorm.batchnorm_backward([[1, 0], [1, 0]], cache, backend=backend)
    np.testing.assert_array_equal(dx, np.zeros((2, 2)))
    np.testing.assert_array_equal(dbeta, [2.0, 0.0])
