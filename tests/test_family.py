"""GroupNorm, InstanceNorm and RMSNorm: what they are to one another, to CS231n and to PyTorch; running statistics."""

from __future__ import annotations

import cs231n
import numpy as np
import pytest

import fastnorm
from fastnorm.bench.cases import DTYPES, dtype_of


def _close(got, expected):
    np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-11)


def _all_close(got, expected):
    for one, other in zip(got, expected, strict=True):
        _close(one, other)


@pytest.fixture
def images(rng):
    """x, dout, gamma, beta of (3, 6, 5, 4)."""
    x, dout = rng.standard_normal((2, 3, 6, 5, 4)) + 1.5
    gamma, beta = rng.standard_normal((2, 6))
    return x, dout, gamma, beta


# ---- one another and the functions that people know -----------------------------------------------


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
def test_spatial_groupnorm_is_that_of_cs231n(groups, images, backend):
    x, dout, gamma, beta = images
    gamma, beta = gamma.reshape(1, 6, 1, 1), beta.reshape(1, 6, 1, 1)
    y, cache = fastnorm.spatial_groupnorm_forward(x, gamma, beta, groups, {"eps": 1e-4}, backend=backend)
    expected, their_cache = cs231n.spatial_groupnorm_forward(x, gamma, beta, groups, {"eps": 1e-4})
    _close(y, expected)
    found = fastnorm.spatial_groupnorm_backward(dout, cache, backend=backend)
    _all_close(found, cs231n.spatial_groupnorm_backward(dout, their_cache))
    assert found[1].shape == found[2].shape == (1, 6, 1, 1)


def test_one_group_is_layernorm_of_the_sample_but_for_the_parameters(images, backend):
    x, dout, gamma, beta = images
    y, cache = fastnorm.groupnorm_forward(x, gamma, beta, 1, backend=backend)
    per_element = [np.ascontiguousarray(np.broadcast_to(v[:, None, None], x.shape[1:])) for v in (gamma, beta)]
    expected, theirs = fastnorm.layernorm_forward(x, *per_element, axis=1, backend=backend)
    _close(y, expected)
    dx, dgamma, dbeta = fastnorm.groupnorm_backward(dout, cache, backend=backend)
    their_dx, *sums = fastnorm.layernorm_backward(dout, theirs, backend=backend)
    _all_close((dx, dgamma, dbeta), (their_dx, *(each.sum(axis=(1, 2)) for each in sums)))


def test_one_group_of_a_row_is_layernorm(rng, backend):
    x, dout = rng.standard_normal((2, 300, 43)) + 1.5
    gamma, beta = rng.standard_normal((2, 43))
    y, cache = fastnorm.groupnorm_forward(x, gamma, beta, 1, backend=backend)
    expected, theirs = fastnorm.layernorm_forward(x, gamma, beta, backend=backend)
    _close(y, expected)
    found = fastnorm.groupnorm_backward(dout, cache, backend=backend)
    _all_close(found, fastnorm.layernorm_backward(dout, theirs, backend=backend))


def test_a_group_for_each_channel_is_instancenorm_to_the_bit(images, backend):
    x, dout, gamma, beta = images
    y, cache = fastnorm.groupnorm_forward(x, gamma, beta, 6, backend=backend)
    other, theirs = fastnorm.instancenorm_forward(x, gamma, beta, backend=backend)
    results = (y, *fastnorm.groupnorm_backward(dout, cache, backend=backend))
    for one, two in zip(results, (other, *fastnorm.instancenorm_backward(dout, theirs, backend=backend)), strict=True):
        assert one.tobytes() == two.tobytes()


def test_instancenorm_of_one_sample_is_batchnorm(images, backend):
    x, dout, gamma, beta = (value[:1] if value.ndim == 4 else value for value in images)
    y, cache = fastnorm.instancenorm_forward(x, gamma, beta, backend=backend)
    expected, theirs = fastnorm.batchnorm_forward(x, gamma, beta, backend=backend)
    _close(y, expected)
    _all_close(
        fastnorm.instancenorm_backward(dout, cache, backend=backend),
        fastnorm.batchnorm_backward(dout, theirs, backend=backend),
    )


def test_rmsnorm_of_centred_rows_is_layernorm(rng, backend):
    x = rng.standard_normal((7, 50))
    x -= x.mean(axis=1, keepdims=True)
    gamma = rng.standard_normal(50)
    y, _ = fastnorm.rmsnorm_forward(x, gamma, backend=backend)
    _close(y, fastnorm.layernorm_forward(x, gamma, None, backend=backend)[0])


def test_rmsnorm_of_a_constant_is_its_sign(backend):
    for dtype in DTYPES:
        x = np.array([[3.0] * 9, [-0.25] * 9, [0.0] * 9]).astype(dtype_of(dtype))
        y, cache = fastnorm.rmsnorm_forward(x, None, {"eps": 0.0}, backend=backend)
        np.testing.assert_array_equal(y.astype(float), np.sign(x.astype(float)))
        assert (cache.mean, cache.var.tolist()) == (None, [9.0, 0.0625, 0.0])


# ---- PyTorch --------------------------------------------------------------------------------------


def _through_pytorch(function, dout, *values):
    """(out, gradients of the values) as arrays."""
    torch = pytest.importorskip("torch")
    leaves = [torch.from_numpy(np.ascontiguousarray(value)).requires_grad_() for value in values]
    out = function(torch.nn.functional, *leaves)
    out.backward(torch.from_numpy(dout))
    return out.detach().numpy(), [leaf.grad.numpy() for leaf in leaves]


@pytest.mark.parametrize("shape", [(4, 6), (1, 6, 9), (3, 6, 5, 4), (2, 6, 3, 2, 3)], ids=str)
def test_groupnorm_is_that_of_pytorch(shape, rng, backend):
    x, dout = rng.standard_normal((2, *shape))
    gamma, beta = rng.standard_normal((2, 6))
    expected, theirs = _through_pytorch(lambda f, x, w, b: f.group_norm(x, 3, w, b, 1e-3), dout, x, gamma, beta)
    for axis in (1, -1):
        moved, moved_dout = (np.ascontiguousarray(np.moveaxis(value, 1, axis)) for value in (x, dout))
        y, cache = fastnorm.groupnorm_forward(moved, gamma, beta, 3, {"eps": 1e-3}, axis=axis, backend=backend)
        dx, *sums = fastnorm.groupnorm_backward(moved_dout, cache, backend=backend)
        _all_close((np.moveaxis(y, axis, 1), np.moveaxis(dx, axis, 1), *sums), (expected, *theirs))


def test_rmsnorm_is_that_of_pytorch(rng, backend):
    for shape, axis in (((4, 50), -1), ((2, 3, 4), 1)):
        x, dout = rng.standard_normal((2, *shape)) + 3
        gamma = rng.standard_normal(shape[axis:])
        expected, theirs = _through_pytorch(
            lambda f, x, w, normalized=shape[axis:]: f.rms_norm(x, normalized, w, 1e-5), dout, x, gamma
        )
        y, cache = fastnorm.rmsnorm_forward(x, gamma, axis=axis, backend=backend)
        _all_close((y, *fastnorm.rmsnorm_backward(dout, cache, backend=backend)), (expected, *theirs))


@pytest.mark.parametrize("training", [True, False])
def test_instancenorm_with_running_statistics_is_that_of_pytorch(training, images, backend):
    """PyTorch's momentum is the weight of the new, its running variance the average of unbiased ones."""
    torch = pytest.importorskip("torch")
    x, dout, gamma, beta = images
    mean, var, n = np.linspace(-1, 1, 6), np.linspace(0.5, 2, 6), 5 * 4
    running = torch.from_numpy(mean.copy()), torch.from_numpy(var.copy())
    expected, theirs = _through_pytorch(
        lambda f, x, w, b: f.instance_norm(x, *running, w, b, use_input_stats=training, momentum=1 - 0.7),
        dout, x, gamma, beta,
    )  # fmt: skip
    param = {"mode": "train" if training else "test", "momentum": 0.7, "running_mean": mean, "running_var": var}
    y, cache = fastnorm.instancenorm_forward(x, gamma, beta, param, backend=backend)
    _all_close((y, *fastnorm.instancenorm_backward(dout, cache, backend=backend)), (expected, *theirs))
    _close(param["running_mean"], running[0].numpy())
    ratio = n / (n - 1) if training else 1
    _close((param["running_var"] - 0.7 * var * training) * ratio + 0.7 * var * training, running[1].numpy())
    assert (param["running_mean"] is mean) == (not training)


# ---- running statistics ---------------------------------------------------------------------------


def test_statistics_run_only_where_they_are_given(images, backend):
    x, _, gamma, beta = images
    param = {"mode": "train"}
    y, _ = fastnorm.instancenorm_forward(x, gamma, beta, param, backend=backend)
    assert param == {"mode": "train"}
    without = fastnorm.instancenorm_forward(x, gamma, beta, {"mode": "test"}, backend=backend)[0]
    np.testing.assert_array_equal(without, y)  # PyTorch's track_running_stats=False


def test_staged_instancenorm_stores_what_the_fused_one_does(images):
    x, _, gamma, beta = images
    ours, theirs = ({"running_mean": np.zeros(6), "running_var": np.ones(6)} for _ in range(2))
    fastnorm.instancenorm_forward(x, gamma, beta, ours)
    fastnorm.instancenorm_forward_staged(x, gamma, beta, theirs)
    _all_close(ours.values(), theirs.values())
    _close(ours["running_mean"], 0.1 * x.mean(axis=(0, 2, 3)))
    _close(ours["running_var"], 0.9 + 0.1 * x.var(axis=(2, 3)).mean(axis=0))


def test_instancenorm_in_test_mode_is_batchnorm_in_test_mode(images, backend):
    x, dout, gamma, beta = images
    param = {"mode": "test", "running_mean": np.linspace(-1, 1, 6), "running_var": np.linspace(0.5, 2, 6)}
    y, cache = fastnorm.instancenorm_forward(x, gamma, beta, param, backend=backend)
    expected, theirs = fastnorm.batchnorm_forward(x, gamma, beta, param, backend=backend)
    np.testing.assert_array_equal(y, expected)
    gradients = fastnorm.batchnorm_backward(dout, theirs, backend=backend)
    for found in (
        fastnorm.instancenorm_backward(dout, cache, backend=backend),
        fastnorm.instancenorm_backward_alt(dout, cache),
        fastnorm.instancenorm_backward_staged(dout, fastnorm.instancenorm_forward_staged(x, gamma, beta, param)[1]),
    ):
        _all_close(found, gradients)
    over = x.copy()
    fastnorm.instancenorm_forward(over, gamma, beta, param, out=over, backend=backend)
    np.testing.assert_array_equal(over, y)


def test_out_may_not_be_a_running_statistic(images, backend):
    x = images[0][:1]
    memory = np.zeros(x.shape)
    param = {"running_mean": memory.reshape(-1)[:6], "running_var": np.ones(6)}
    for source in (x, x[..., ::-1]):
        with pytest.raises(ValueError, match=r"^out: overlaps running_mean"):
            fastnorm.instancenorm_forward(source, None, None, param, out=memory, backend=backend)
    assert not memory.any()


# ---- layouts and sizes ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("order", "sizes"),
    [((0, 1, 2, 3), (3, 1, 6, 20)), ((0, 2, 3, 1), (3, 20, 6, 1)), ((0, 3, 1, 2), (3, 4, 6, 5))],
    ids=str,
)
def test_samples_that_are_runs_of_memory_need_no_copy(order, sizes):
    from fastnorm import _layout

    x = np.empty([(3, 6, 5, 4)[axis] for axis in order]).transpose(np.argsort(order))
    assert _layout.group_view(x.shape, x.strides, 8, (1,)).sizes == sizes
    assert _layout.group_view(x.shape, x.transpose(1, 0, 2, 3).copy().transpose(1, 0, 2, 3).strides, 8, (1,)) is None


@pytest.mark.parametrize("variant", ["", "_staged"])
@pytest.mark.parametrize("op", ["groupnorm", "instancenorm"])
@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0), (0, 4, 2), (3, 4, 0), (3, 0, 2, 2)], ids=str)
def test_zero_sizes_of_groups(shape, op, variant, backend):
    x, gamma = np.zeros(shape, np.float32), np.ones(shape[1], np.float32)
    running = np.full(shape[1], 3.0)
    param = {} if op == "groupnorm" else {"running_mean": running, "running_var": running}
    options = {} if variant else {"backend": backend}
    groups = (2,) if op == "groupnorm" else ()
    y, cache = getattr(fastnorm, f"{op}_forward{variant}")(x, gamma, gamma, *groups, param, **options)
    backwards = [f"_backward{variant}"] if variant else ["_backward", "_backward_alt"]
    for name in backwards:
        dx, dgamma, dbeta = getattr(fastnorm, op + name)(x, cache)
        assert (y.shape, y.dtype, dx.shape, dx.dtype) == (shape, x.dtype, shape, x.dtype)
        np.testing.assert_array_equal((dgamma, dbeta), np.zeros((2, shape[1])))
    assert all(value is running for value in param.values())


@pytest.mark.parametrize("shape", [(0, 4), (4, 0)], ids=str)
def test_zero_sizes_of_rows_without_centring(shape, backend):
    x, gamma = np.zeros(shape, np.float32), np.ones(shape[1], np.float32)
    y, cache = fastnorm.rmsnorm_forward(x, gamma, backend=backend)
    for dx, dgamma in (fastnorm.rmsnorm_backward(x, cache, backend=backend), fastnorm.rmsnorm_backward_alt(x, cache)):
        assert (y.shape, dx.shape) == (shape, shape)
        np.testing.assert_array_equal(dgamma, np.zeros(shape[1]))
