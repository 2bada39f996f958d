"""The mathematics: against the functions of CS231n and d2l, finite differences, 50 digits, PyTorch, one another."""

from __future__ import annotations

import itertools

import cs231n
import mpmath
import numpy as np
import pytest
from cases import ARRANGEMENTS, OPS, case, check_all, fused, gradients, rearranged, standard, truth

import fastnorm
from fastnorm.bench.cases import DTYPES
from fastnorm.bench.tolerances import tolerance
from fastnorm.bench.variants import variants

ops = pytest.mark.parametrize("op", OPS)
AVAILABLE = [info.name for info in fastnorm.backends() if info.available]


# ---- the functions that people know ---------------------------------------------------------------


def _close(got, expected):
    np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("mode", ["train", "test"])
def test_batchnorm_is_that_of_cs231n(mode, backend, rng):
    gamma, beta = rng.standard_normal((2, 5))
    ours = {"mode": "train", "eps": 1e-4, "momentum": 0.8}
    theirs = dict(ours)
    for _ in range(3):
        x = 12 + 4 * rng.standard_normal((50, 5))
        fastnorm.batchnorm_forward(x, gamma, beta, ours, backend=backend)
        cs231n.batchnorm_forward(x, gamma, beta, theirs)
    ours["mode"] = theirs["mode"] = mode
    dout = rng.standard_normal(x.shape)
    y, cache = fastnorm.batchnorm_forward(x, gamma, beta, ours, backend=backend)
    expected, their_cache = cs231n.batchnorm_forward(x, gamma, beta, theirs)
    _close(y, expected)
    for key in ("running_mean", "running_var"):
        _close(ours[key], theirs[key])
    if mode == "train":
        for backward in (cs231n.batchnorm_backward, cs231n.batchnorm_backward_alt):
            for got, want in zip(
                fastnorm.batchnorm_backward(dout, cache, backend=backend), backward(dout, their_cache), strict=True
            ):
                _close(got, want)


def test_layernorm_is_that_of_cs231n(backend, rng):
    x, dout = rng.standard_normal((2, 4, 50))
    gamma, beta = rng.standard_normal((2, 50))
    y, cache = fastnorm.layernorm_forward(x, gamma, beta, {"eps": 1e-3}, backend=backend)
    expected, their_cache = cs231n.layernorm_forward(x, gamma, beta, {"eps": 1e-3})
    _close(y, expected)
    for got, want in zip(
        fastnorm.layernorm_backward(dout, cache, backend=backend),
        cs231n.layernorm_backward(dout, their_cache),
        strict=True,
    ):
        _close(got, want)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(8, 6), (3, 6, 5, 4)], ids=str)
def test_batch_norm_is_that_of_d2l(shape, training, backend, rng):
    parameter = (1, 6) if len(shape) == 2 else (1, 6, 1, 1)
    x = rng.standard_normal(shape)
    gamma, beta, mean = rng.standard_normal((3, *parameter))
    var = rng.random(parameter) + 0.5
    expected, moving_mean, moving_var = cs231n.batch_norm(x, gamma, beta, mean, var, 1e-5, 0.9, training=training)
    param = {"mode": "train" if training else "test", "running_mean": mean, "running_var": var}
    y, _ = fastnorm.batchnorm_forward(x, gamma, beta, param, backend=backend)
    _close(y, expected)
    _close(param["running_mean"], moving_mean)
    _close(param["running_var"], moving_var)


def test_spatial_batchnorm_is_batchnorm_of_the_pixels(backend, rng):
    x, dout = rng.standard_normal((2, 3, 5, 4, 6))
    gamma, beta = rng.standard_normal((2, 5))
    y, cache = fastnorm.spatial_batchnorm_forward(x, gamma, beta, {"mode": "train"}, backend=backend)
    dx, dgamma, dbeta = fastnorm.spatial_batchnorm_backward(dout, cache, backend=backend)

    def pixels(images):
        return images.transpose(0, 2, 3, 1).reshape(-1, 5)

    expected, their_cache = cs231n.batchnorm_forward(pixels(x), gamma, beta, {"mode": "train"})
    _close(pixels(y), expected)
    for got, want in zip(
        (pixels(dx), dgamma, dbeta), cs231n.batchnorm_backward(pixels(dout), their_cache), strict=True
    ):
        _close(got, want)


def test_conventions_against_pytorch(backend, rng):
    """PyTorch's momentum is the weight of the new value and its running variance is unbiased."""
    torch = pytest.importorskip("torch")
    x, dout = rng.standard_normal((2, 4, 6, 5, 5))
    gamma, beta = rng.standard_normal((2, 6))
    param = {"running_mean": np.zeros(6), "running_var": np.ones(6), "momentum": 0.9}
    y, cache = fastnorm.batchnorm_forward(x, gamma, beta, param, backend=backend)
    inputs = [torch.from_numpy(value).requires_grad_() for value in (x, gamma, beta)]
    mean, var = torch.zeros(6, dtype=torch.float64), torch.ones(6, dtype=torch.float64)
    theirs = torch.nn.functional.batch_norm(inputs[0], mean, var, *inputs[1:], training=True, momentum=1 - 0.9)
    theirs.backward(torch.from_numpy(dout))
    _close(y, theirs.detach().numpy())
    for got, want in zip(fastnorm.batchnorm_backward(dout, cache, backend=backend), inputs, strict=True):
        _close(got, want.grad.numpy())
    _close(param["running_mean"], mean.numpy())
    n = 4 * 5 * 5
    _close((param["running_var"] - 0.9) * n / (n - 1) + 0.9, var.numpy())


# ---- first principles -----------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("shape", [(5, 4), (3, 4, 2, 2)], ids=str)
@ops
def test_backward_is_the_derivative_of_forward(op, shape, frozen, backend, rng):
    """Central differences of sum(out * dout) for every element of x, gamma and beta, in float64."""
    if frozen and op not in ("batchnorm", "instancenorm"):
        pytest.skip(f"{op} has no test mode")
    this = case(op, shape, dtype="float64")
    *inputs, dout = (np.array(value) for value in this.inputs())
    param = {}
    if frozen:
        param = {"mode": "test", "running_mean": rng.standard_normal(4), "running_var": rng.random(4) + 0.5}

    def forward():
        return this.op.forward(*this.arguments(*inputs), dict(param), axis=1, backend=backend)

    results = this.op.backward(dout, forward()[1], backend=backend)
    step = 1e-5
    for value, gradient in zip(inputs, results, strict=this.op.centred):
        for index in np.ndindex(value.shape):
            before = value[index]
            losses = []
            for value[index] in (before + step, before - step):
                losses.append((forward()[0] * dout).sum())
            value[index] = before
            assert gradient[index] == pytest.approx((losses[0] - losses[1]) / (2 * step), rel=1e-6, abs=1e-8)


def _elements_of_each_statistic(this):
    """The indices of (N, D) that are normalized together."""
    rows, cols = map(range, this.shape)
    if this.op.family == "channel":
        return [[(i, j) for i in rows] for j in cols]
    width = len(cols) // (this.groups if this.op.family == "group" else 1)
    return [[(i, j) for j in cols[start : start + width]] for i in rows for start in cols[::width]]


@ops
def test_the_truth_is_true_to_fifty_digits(op):
    """The tests' own reference against mpmath, on data that NumPy finds hard."""
    shape = (4, 6) if OPS[op].family == "group" else (4, 3)
    this = case(op, shape, dtype="float64")
    x, gamma, beta, dout = this.inputs()
    x = x + 1e6
    expected = truth(this, x, gamma, beta, dout)
    with mpmath.workdps(50):
        values, grads = (mpmath.matrix(value.tolist()) for value in (x, dout))
        for group in _elements_of_each_statistic(this):
            n = len(group)
            mean = mpmath.fsum(values[at] for at in group) / n if this.op.centred else mpmath.mpf(0)
            var = mpmath.fsum((values[at] - mean) ** 2 for at in group) / n
            rstd = 1 / mpmath.sqrt(var + mpmath.mpf(1e-5))
            g = {at: grads[at] * mpmath.mpf(gamma[at[1]]) for at in group}
            xhat = {at: (values[at] - mean) * rstd for at in group}
            mean_g = mpmath.fsum(g.values()) / n if this.op.centred else 0
            mean_gx = mpmath.fsum(g[at] * xhat[at] for at in group) / n
            for at in group:
                y = xhat[at] * mpmath.mpf(gamma[at[1]]) + (mpmath.mpf(beta[at[1]]) if this.op.centred else 0)
                dx = rstd * (g[at] - mean_g - xhat[at] * mean_gx)
                for name, value in (("y", y), ("dx", dx)):
                    got = getattr(expected, name).value.reshape(shape)[at]
                    error = abs(value - (mpmath.mpf(float(got)) + mpmath.mpf(float(got - float(got)))))
                    assert error < 16 * 1e6 * float(np.finfo(np.longdouble).eps), name


# ---- one another ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(64, 33), (2000, 6), (7, 2000), (3, 6, 8, 9), (2, 3)], ids=str)
@ops
def test_every_variant_of_the_case_table(op, shape, dtype):
    """staged, alt and fused on each backend, called as the benchmarks call them."""
    this, inputs, _ = standard(op, shape, dtype=dtype)
    for variant in variants():
        expected = truth(this, *inputs, naive=variant.name == "staged")
        forward, backward = (variant.bind(this, inputs, direction) for direction in ("forward", "backward"))
        if forward is not None:
            check_all(expected, {"y": forward.arrays(forward.run())[0]})
        assert backward is not None
        check_all(expected, gradients(backward.arrays(backward.run())))


def test_the_table_names_every_op_that_is_exported():
    forwards = {name.removesuffix("_forward") for name in fastnorm.__all__ if name.endswith("_forward")}
    assert forwards - {"spatial_batchnorm", "spatial_groupnorm", "dropout"} == set(OPS)


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
@ops
def test_staged_and_alt_in_every_layout(op, arrangement):
    for shape in ((7, 9), (3, 4, 5)):
        this = case(op, shape)
        inputs = rearranged(this.inputs(), arrangement, arrangement)
        x, gamma, beta, dout = inputs
        for parameters in ((gamma, beta), (None, None)):
            arguments = this.arguments(x, *parameters)
            y, cache = this.op.forward_staged(*arguments, axis=1)
            staged = this.op.backward_staged(dout, cache)
            alt = this.op.backward_alt(dout, this.op.forward(*arguments, axis=1, backend="numpy")[1])
            expected = truth(this, x, *parameters, dout, naive=True)
            check_all(expected, {"y": y})
            for dx, *sums in (staged, alt):
                assert dx.dtype == y.dtype == np.float32
                if parameters[0] is None:
                    assert sums == [None] * len(sums)
                    sums = []
                check_all(expected, gradients((dx, *sums)))


@ops
def test_alt_keeps_its_accuracy_far_from_zero(op, rng):
    this = case(op, (300, 200))
    inputs = this.inputs()._replace(x=(1e6 + rng.standard_normal((300, 200))).astype(np.float32))
    _, cache = this.op.forward(*this.arguments(*inputs[:3]), axis=1)
    check_all(truth(this, *inputs), {"dx": this.op.backward_alt(inputs.dout, cache)[0]})


def test_staged_and_alt_in_test_mode(rng):
    this = case("batchnorm", (6, 5, 4))
    x, gamma, beta, dout = this.inputs()
    constants = rng.standard_normal(5), rng.random(5) + 0.5
    param = {"mode": "test", "running_mean": constants[0], "running_var": constants[1]}
    y, cache = fastnorm.batchnorm_forward_staged(x, gamma, beta, param)
    staged = fastnorm.batchnorm_backward_staged(dout, cache)
    alt = fastnorm.batchnorm_backward_alt(dout, fastnorm.batchnorm_forward(x, gamma, beta, param)[1])
    expected = truth(this, x, gamma, beta, dout, constants=constants, naive=True)
    for dx, dgamma, dbeta in (staged, alt):
        check_all(expected, {"y": y, "dx": dx, "dgamma": dgamma, "dbeta": dbeta})
    assert param["running_mean"] is constants[0]


def test_staged_stores_the_running_statistics_as_the_fused_forward_does(rng):
    ours, theirs = {"momentum": 0.7}, {"momentum": 0.7}
    largest = 1.0
    for _ in range(3):
        x = rng.standard_normal((40, 6)).astype(np.float32)
        fastnorm.batchnorm_forward(x, None, None, ours)
        fastnorm.batchnorm_forward_staged(x, None, None, theirs)
        largest = max(largest, float(np.abs(x).max()))
    for key in ("running_mean", "running_var"):
        assert ours[key].dtype == theirs[key].dtype == np.float32
        allowed = tolerance(ours[key], np.full(6, largest**2), np.float32, np.float32, terms=40)
        assert (np.abs(ours[key] - theirs[key]) <= allowed).all()


@pytest.mark.parametrize(("of_forward", "of_backward"), list(itertools.permutations(AVAILABLE, 2)))
@pytest.mark.parametrize("arrangement", ["C", "F", "channels-last", "gaps"])
@ops
def test_caches_pass_between_backends(op, arrangement, of_forward, of_backward):
    for dtype in DTYPES:
        this = case(op, (4, 6, 5), dtype=dtype)
        inputs = rearranged(this.inputs(), arrangement, "C")
        y, cache = this.op.forward(*this.arguments(*inputs[:3]), axis=1, backend=of_forward)
        results = gradients(this.op.backward(inputs.dout, cache, backend=of_backward))
        check_all(truth(this, *inputs), {"y": y, **results})


@ops
def test_a_cache_serves_more_than_once(op, backend):
    this, inputs, _ = standard(op, (6, 9))
    _, cache = this.op.forward(*this.arguments(*inputs[:3]), axis=1, backend=backend)
    first, second = (this.op.backward(inputs.dout, cache, backend=backend) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(first[0], fused(this, inputs, backend)["dx"])
