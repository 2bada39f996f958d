"""Bad input: the right exception, a message that names the argument, and nothing written."""

from __future__ import annotations

import copy

import numpy as np
import pytest

import fastnorm
from fastnorm import BackendUnavailableError

X = np.arange(24, dtype=np.float32).reshape(4, 6)
ONES = np.ones(6, np.float32)
IMAGES = np.zeros((2, 6, 3, 3), np.float32)
COMPLEX, OBJECT = np.zeros((4, 6), complex), np.full((4, 6), None)


class Foreign:
    """What another library's array looks like."""

    shape = (4, 6)
    dtype = np.float32

    def __array__(self, *_):
        raise AssertionError("must not be converted silently")

    def __repr__(self):
        return "Foreign()"


# What every forward refuses: (arguments that differ from good ones, exception, what the message names).
INPUTS = [
    ({"x": COMPLEX}, TypeError, "x"),
    ({"x": OBJECT}, TypeError, "x"),
    ({"x": np.zeros((4, 6), "M8[s]")}, TypeError, "x"),
    ({"x": np.full((4, 6), "1")}, TypeError, "x"),
    ({"x": np.zeros((4, 6), [("a", "f4")])}, TypeError, "x"),
    ({"x": np.ma.masked_array(X)}, TypeError, "x"),
    ({"x": Foreign()}, TypeError, "x"),
    ({"x": None}, TypeError, "x"),
    ({"x": np.longdouble(X)}, TypeError, "x"),
    ({"x": np.float32(1)}, ValueError, "x"),
    ({"x": [[1.0, 2.0], [3.0]]}, ValueError, "x"),
    ({"x": [X[0], X[1, :3]]}, ValueError, "x"),
    ({"gamma": np.ones(5)}, ValueError, "gamma"),
    ({"gamma": np.ones(7)}, ValueError, "gamma"),
    ({"gamma": np.ones((6, 1))}, ValueError, "gamma"),
    ({"gamma": np.ones((2, 3))}, ValueError, "gamma"),
    ({"gamma": 1.0}, ValueError, "gamma"),
    ({"gamma": [ONES, [1.0]]}, ValueError, "gamma"),
    ({"gamma": np.ones(6, complex)}, TypeError, "gamma"),
    ({"gamma": np.full(6, None)}, TypeError, "gamma"),
    ({"gamma": "ones"}, TypeError, "gamma"),
    ({"beta": np.ones(5)}, ValueError, "beta"),
    ({"beta": np.ones((4, 6))}, ValueError, "beta"),
    ({"beta": np.ones(6, complex)}, TypeError, "beta"),
    ({"axis": 2}, ValueError, "axis"),
    ({"axis": -3}, ValueError, "axis"),
    ({"axis": 1.0}, TypeError, "axis"),
    ({"axis": True}, TypeError, "axis"),
    ({"axis": None}, TypeError, "axis"),
    ({"param": [("eps", 1e-5)]}, TypeError, "param"),
    ({"param": "train"}, TypeError, "param"),
    ({"param": {"epsilon": 1e-5}}, ValueError, "epsilon"),
    ({"param": {1: 2}}, ValueError, "1"),
    ({"param": {"eps": -1e-5}}, ValueError, "eps"),
    ({"param": {"eps": np.nan}}, ValueError, "eps"),
    ({"param": {"eps": np.inf}}, ValueError, "eps"),
    ({"param": {"eps": "1e-5"}}, TypeError, "eps"),
    ({"param": {"eps": None}}, TypeError, "eps"),
    ({"param": {"eps": 1e-5j}}, TypeError, "eps"),
    ({"param": {"eps": True}}, TypeError, "eps"),
    ({"param": {"eps": np.ones(6)}}, TypeError, "eps"),
]
WITH_CHANNELS = [
    *INPUTS,
    ({"x": np.ones(6, np.float32)}, ValueError, "x"),
]
WITH_RUNNING = [
    *WITH_CHANNELS,
    ({"param": {"mode": "eval"}}, ValueError, "mode"),
    ({"param": {"mode": "Train"}}, ValueError, "mode"),
    ({"param": {"mode": None}}, ValueError, "mode"),
    ({"param": {"mode": np.array(["train"])}}, ValueError, "mode"),
    ({"param": {"running_mean": np.ones(5)}}, ValueError, "running_mean"),
    ({"param": {"running_var": np.ones(7)}}, ValueError, "running_var"),
    ({"param": {"running_mean": np.ones((2, 3))}}, ValueError, "running_mean"),
    ({"param": {"running_mean": np.ones(6, complex)}}, TypeError, "running_mean"),
    ({"param": {"running_mean": "zeros"}}, TypeError, "running_mean"),
    ({"param": {"momentum": -0.1}}, ValueError, "momentum"),
    ({"param": {"momentum": 1.1}}, ValueError, "momentum"),
    ({"param": {"momentum": np.nan}}, ValueError, "momentum"),
    ({"param": {"momentum": "0.9"}}, TypeError, "momentum"),
]
WITHOUT_RUNNING = [
    ({"param": {"momentum": 0.9}}, ValueError, "momentum"),
    ({"param": {"running_mean": ONES}}, ValueError, "running_mean"),
]
REFUSED = {
    "batchnorm": [
        *WITH_RUNNING,
        ({"param": {"mode": "test"}}, ValueError, "running_mean"),
        ({"param": {"mode": "test", "running_mean": ONES}}, ValueError, "running_var"),
        ({"param": {"mode": "test", "running_mean": None, "running_var": ONES}}, ValueError, "running_mean"),
    ],
    "layernorm": [*INPUTS, *WITHOUT_RUNNING],
    "groupnorm": [
        *WITH_CHANNELS,
        *WITHOUT_RUNNING,
        ({"axis": 0}, ValueError, "axis"),
        ({"axis": -2}, ValueError, "axis"),
        ({"groups": 4}, ValueError, "groups"),
        ({"groups": 12}, ValueError, "groups"),
        ({"groups": 0}, ValueError, "groups"),
        ({"groups": -2}, ValueError, "groups"),
        ({"groups": 2.0}, TypeError, "groups"),
        ({"groups": True}, TypeError, "groups"),
        ({"groups": "2"}, TypeError, "groups"),
        ({"groups": None}, TypeError, "groups"),
    ],
    "instancenorm": [
        *WITH_RUNNING,
        ({"axis": 0}, ValueError, "axis"),
        ({"param": {"running_mean": ONES}}, ValueError, "running_var"),
        ({"param": {"mode": "test", "running_var": ONES}}, ValueError, "running_mean"),
    ],
    "rmsnorm": [*(row for row in INPUTS if "beta" not in row[0]), *WITHOUT_RUNNING],
}
PARAM_NAMES = {
    "batchnorm": "bn_param", "layernorm": "ln_param", "groupnorm": "gn_param", "instancenorm": "in_param",
    "rmsnorm": "rms_param",
}  # fmt: skip


def arguments(op, x, gamma=ONES, beta=ONES, groups=2):
    """What the forward of this op takes before its options."""
    if op == "rmsnorm":
        return x, gamma
    return (x, gamma, beta, groups) if op == "groupnorm" else (x, gamma, beta)


def _bad_outs():
    """(name, out, x to use with it or None, exception)"""
    shared = np.zeros(40, np.float32)
    frozen = np.zeros((4, 6), np.float32)
    frozen.flags.writeable = False
    whole = np.zeros((4, 6), np.float32)
    rows = np.zeros((5, 6), np.float32)
    return [
        ("shape", np.zeros((6, 4), np.float32), None, ValueError),
        ("ndim", np.zeros((4, 6, 1), np.float32), None, ValueError),
        ("dtype", np.zeros((4, 6)), None, ValueError),
        ("byte order", np.zeros((4, 6), ">f4"), None, ValueError),
        ("read-only", frozen, None, ValueError),
        ("list", [[0.0] * 6] * 4, None, TypeError),
        ("foreign", Foreign(), None, TypeError),
        ("broadcast", np.lib.stride_tricks.as_strided(shared, (4, 6), (0, 4)), None, ValueError),
        ("overlaps itself", np.lib.stride_tricks.as_strided(shared, (4, 6), (4, 4)), None, ValueError),
        ("is x", whole, whole, ValueError),
        ("shifted x", rows[:4], rows[1:], ValueError),
        ("reversed x", whole[::-1], whole, ValueError),
        ("contains gamma", shared[:24].reshape(4, 6), None, ValueError),
    ]


@pytest.mark.parametrize(
    ("op", "change", "error", "names"),
    [(op, *row) for op, rows in REFUSED.items() for row in rows],
    ids=lambda value: repr(value)[:60],
)
@pytest.mark.parametrize("variant", ["", "_staged"])
def test_forward_refuses(op, variant, change, error, names):
    given = {"x": X, "param": {}, "axis": 1, **change}
    param, axis = given.pop("param"), given.pop("axis")
    before = copy.deepcopy(param)
    out = np.full((4, 6), 7, np.float32)
    options = {"axis": axis} | ({} if variant else {"out": out})
    with pytest.raises(error) as caught:
        getattr(fastnorm, f"{op}_forward{variant}")(*arguments(op, **given), param, **options)
    param_name = PARAM_NAMES[op]
    assert type(caught.value) is error
    message = str(caught.value)
    names = param_name if names == "param" else names
    assert message.startswith(f"{names}: ") or (message.startswith(param_name) and names in message)
    assert (out == 7).all()
    np.testing.assert_equal(param, before)


def test_a_typo_is_answered_with_the_key_it_resembles():
    with pytest.raises(ValueError, match="did you mean 'eps'"):
        fastnorm.batchnorm_forward(X, ONES, ONES, {"epsilon": 1e-5})


@pytest.mark.parametrize("op", ["layernorm", "groupnorm", "rmsnorm"])
def test_mode_is_accepted_and_ignored_without_running_statistics(op):
    for mode in ("train", "test"):
        getattr(fastnorm, f"{op}_forward")(*arguments(op, X), {"mode": mode})


@pytest.mark.parametrize("op", ["batchnorm", "groupnorm", "layernorm"])
@pytest.mark.parametrize("index", range(13))
def test_out_that_cannot_be_written_is_refused(op, index, backend):
    name, out, x, error = _bad_outs()[index]
    x = X if x is None else x
    gamma = out.reshape(-1)[3:9] if name == "contains gamma" else ONES
    forward, backward = (getattr(fastnorm, f"{op}_{direction}") for direction in ("forward", "backward"))
    before = copy.deepcopy(out) if isinstance(out, np.ndarray) else None
    param = {}
    with pytest.raises(error, match=r"^out: "):
        forward(*arguments(op, x, gamma), param, out=out, backend=backend)
    _, cache = forward(*arguments(op, x, gamma), backend=backend)
    with pytest.raises(error, match=r"^out: "):
        backward(X, cache, out=out, backend=backend)
    assert param == {}
    if before is not None:
        np.testing.assert_array_equal(out, before)


def test_out_must_not_overlap_dout_or_the_parameters(backend):
    gamma, dout = np.ones(6, np.float32), X.copy()
    _, cache = fastnorm.batchnorm_forward(X, gamma, gamma, backend=backend)
    with pytest.raises(ValueError, match=r"^out: overlaps dout"):
        fastnorm.batchnorm_backward(dout, cache, out=dout, backend=backend)
    np.testing.assert_array_equal(dout, X)


def test_out_that_interleaves_with_x_is_no_overlap(backend):
    both = np.zeros((4, 12), np.float32)
    both[:, ::2] = X
    fastnorm.batchnorm_forward(both[:, ::2], ONES, ONES, out=both[:, 1::2], backend=backend)
    np.testing.assert_array_equal(both[:, ::2], X)
    np.testing.assert_array_equal(both[:, 1::2], fastnorm.batchnorm_forward(X, ONES, ONES, backend=backend)[0])


# ---- backward -------------------------------------------------------------------------------------

OTHERS = {
    "batchnorm": "instancenorm", "instancenorm": "groupnorm", "groupnorm": "instancenorm", "layernorm": "rmsnorm",
    "rmsnorm": "layernorm",
}  # fmt: skip


@pytest.mark.parametrize("variant", ["", "_alt", "_staged"])
@pytest.mark.parametrize("op", OTHERS)
def test_backward_refuses(op, variant):
    forwards = {
        (name, kind): getattr(fastnorm, f"{name}_forward{kind}")(*arguments(name, X), axis=1)[1]
        for name in OTHERS
        for kind in ("", "_staged")
    }
    backward = getattr(fastnorm, f"{op}_backward{variant}")
    own, foreign = ("_staged", "") if variant == "_staged" else ("", "_staged")
    cache = forwards[op, own]
    for dout, error in (
        (X[:3], ValueError),
        (X.T, ValueError),
        (X[0], ValueError),
        (1.0, ValueError),
        (COMPLEX, TypeError),
        (OBJECT, TypeError),
        (None, TypeError),
        (Foreign(), TypeError),
    ):
        with pytest.raises(error, match=r"^dout: "):
            backward(dout, cache)
    for wrong, error in (
        (forwards[OTHERS[op], own], ValueError),
        (forwards[op, foreign], TypeError),
        (forwards[OTHERS[op], foreign], TypeError),
        (None, TypeError),
        ((X, ONES), TypeError),
        ({}, TypeError),
    ):
        with pytest.raises(error, match=r"^cache: "):
            backward(X, wrong)


@pytest.mark.parametrize("variant", ["", "_alt"])
def test_backward_after_the_output_replaced_x(variant, backend):
    x = X.copy()
    param = {"mode": "test", "running_mean": ONES, "running_var": ONES}
    _, cache = fastnorm.batchnorm_forward(x, ONES, ONES, param, out=x, backend=backend)
    with pytest.raises(ValueError, match=r"^cache: .* over x"):
        getattr(fastnorm, f"batchnorm_backward{variant}")(X, cache)


# ---- the pieces, and the rest ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "names"),
    [
        (lambda: fastnorm.moments(X, 2), ValueError, "axis"),
        (lambda: fastnorm.moments(X, (0, 0)), ValueError, "axis"),
        (lambda: fastnorm.moments(X, (0, -2)), ValueError, "axis"),
        (lambda: fastnorm.moments(X, "0"), TypeError, "axis"),
        (lambda: fastnorm.moments(COMPLEX), TypeError, "x"),
        (lambda: fastnorm.moments(X, 0).merge(fastnorm.moments(X, 1)), ValueError, "other"),
        (lambda: fastnorm.normalize(X, np.ones(5), np.ones(5)), ValueError, "mean"),
        (lambda: fastnorm.normalize(X, np.ones((1, 1, 6)), np.ones(6)), ValueError, "mean"),
        (lambda: fastnorm.normalize(X, ONES, np.ones(5)), ValueError, "var"),
        (lambda: fastnorm.normalize(X, ONES, None), TypeError, "var"),
        (lambda: fastnorm.normalize(X, None, ONES), TypeError, "mean"),
        (lambda: fastnorm.normalize(X, ONES, ONES, np.ones(5)), ValueError, "gamma"),
        (lambda: fastnorm.normalize(X, ONES, ONES, ONES, np.ones(5)), ValueError, "beta"),
        (lambda: fastnorm.normalize(X, ONES, ONES, eps=-1.0), ValueError, "eps"),
        (lambda: fastnorm.normalize(X, ONES, ONES, out=np.zeros((4, 6))), ValueError, "out"),
        (lambda: fastnorm.batchnorm_backward_reduce(X, X, np.ones(5), ONES), ValueError, "mean"),
        (lambda: fastnorm.batchnorm_backward_reduce(X, X, ONES, np.ones(5)), ValueError, "var"),
        (lambda: fastnorm.batchnorm_backward_reduce(X.T, X, ONES, ONES), ValueError, "dout"),
        (lambda: fastnorm.batchnorm_backward_reduce(X, X, ONES, ONES, -1.0), ValueError, "eps"),
        (lambda: fastnorm.batchnorm_backward_reduce(X, X, ONES, ONES, axis=5), ValueError, "axis"),
        (lambda: fastnorm.batchnorm_backward_reduce(X[0], X[0], ONES, ONES), ValueError, "x"),
        (lambda: _apply(sum_dout=np.ones(5)), ValueError, "sum_dout"),
        (lambda: _apply(sum_dout_xhat=np.ones(5)), ValueError, "sum_dout_xhat"),
        (lambda: _apply(count=0), ValueError, "count"),
        (lambda: _apply(count=-4), ValueError, "count"),
        (lambda: _apply(count=np.nan), ValueError, "count"),
        (lambda: _apply(count="4"), TypeError, "count"),
        (lambda: _apply(gamma=np.ones(5)), ValueError, "gamma"),
        (lambda: _apply(out=X), ValueError, "out"),
        (lambda: fastnorm.spatial_batchnorm_forward(X, ONES, ONES), ValueError, "x"),
        (lambda: fastnorm.spatial_groupnorm_forward(X, ONES, ONES, 2), ValueError, "x"),
        (lambda: fastnorm.spatial_batchnorm_forward(IMAGES, np.ones(3), ONES), ValueError, "gamma"),
        (lambda: fastnorm.set_num_threads(0), ValueError, "count"),
        (lambda: fastnorm.set_num_threads(-1), ValueError, "count"),
        (lambda: fastnorm.set_num_threads(100_000), ValueError, "count"),
        (lambda: fastnorm.set_num_threads(2.0), TypeError, "count"),
        (lambda: fastnorm.set_num_threads(True), TypeError, "count"),
        (lambda: fastnorm.set_num_threads(None), TypeError, "count"),
        (lambda: fastnorm.batchnorm_forward(X, ONES, ONES, backend="fortran"), ValueError, "backend"),
        (lambda: fastnorm.batchnorm_forward(X, ONES, ONES, backend=1), TypeError, "backend"),
        (lambda: fastnorm.use_backend("fortran"), ValueError, "fortran"),
        (lambda: fastnorm.use_backend(3), TypeError, "name"),
    ],
)
def test_the_rest_refuses(call, error, names):
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error
    assert names in str(caught.value).split(":")[0] or names == "fortran"
    assert not isinstance(caught.value, BackendUnavailableError)


def _apply(**change):
    given = {"gamma": ONES, "sum_dout": ONES, "sum_dout_xhat": ONES, "count": 4, "out": None, **change}
    out = given.pop("out")
    return fastnorm.batchnorm_backward_apply(X, X, ONES, ONES, **given, out=out)
