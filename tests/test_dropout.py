"""Dropout: the random words, the mask and its statistics, equal bits everywhere, edges, errors."""

from __future__ import annotations

import os
from itertools import pairwise

import numpy as np
import pytest
from cases import ARRANGEMENTS, WIDTHS, WRITABLE, storage
from conftest import BACKENDS
from processes import run

import fastnorm
from fastnorm import _dispatch, _layout
from fastnorm.bench.cases import DTYPES, dtype_of
from fastnorm.reference.kernels import numbers, philox
from fastnorm.reference.kernels import words as reference_words

SEED = 0x0123_4567_89AB_CDEF
ALL = 1 << 32


def scalar_philox(counter, key, rounds=7):
    """The paper's algorithm, one step at a time."""
    c, k = list(counter), list(key)
    for _ in range(rounds):
        (high_0, low_0), (high_1, low_1) = divmod(0xD2511F53 * c[0], ALL), divmod(0xCD9E8D57 * c[2], ALL)
        c = [high_1 ^ c[1] ^ k[0], low_1, high_0 ^ c[3] ^ k[1], low_0]
        k = [(k[0] + 0x9E3779B9) % ALL, (k[1] + 0xBB67AE85) % ALL]
    return tuple(c)


def number(index, seed, stream):
    """The random number of 16 bits of an element: half of a word of Philox."""
    high, low = divmod(index // 8, ALL)
    whole = scalar_philox((low, high, stream, 0), (seed % ALL, seed // ALL))[index % 8 // 2]
    return whole >> 16 if index % 2 else whole & 0xFFFF


def word(index, seed):
    """The random word of an element."""
    return number(index, seed, 0) << 16 | number(index, seed, 1)


def expected_mask(shape, p, seed=SEED):
    """Which elements are kept."""
    n = int(np.prod(shape))
    words = np.array([word(index, seed) for index in range(n)])
    return (words < round(p * ALL)).reshape(shape)


def mask(shape, param, backend=None):
    """Which elements of ones are kept."""
    out, _ = fastnorm.dropout_forward(np.ones(shape, np.float32), param, backend=backend)
    return out != 0


def kernel_mask(table, n, first, seed, threshold, dtype="float32"):
    x = np.ones(n, dtype_of(dtype))
    y = np.full_like(x, 9)
    table.dropout(x, n, first, seed, threshold, 1.0, y)
    return y.astype(float)


# ---- random words ---------------------------------------------------------------------------------

PI = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)
# Random123, tests/kat_vectors: philox4x32 7 and 10.
KNOWN = [
    (7, (0, 0, 0, 0), (0, 0), (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
    (7, (ALL - 1,) * 4, (ALL - 1,) * 2, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
    (7, *PI, (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A)),
    (10, (0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (10, (ALL - 1,) * 4, (ALL - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (10, *PI, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
]


@pytest.mark.parametrize(("rounds", "counter", "key", "words"), KNOWN)
def test_philox_gives_the_published_answers(rounds, counter, key, words):
    assert scalar_philox(counter, key, rounds) == words
    columns = tuple(np.array([c], np.uint64) for c in counter)
    assert tuple(int(c[0]) for c in philox(columns, key, rounds)) == words


@pytest.mark.parametrize("first", [0, 1, 62, 8 * ALL - 6, 8 * ALL, (1 << 60) + 3])
@pytest.mark.parametrize("seed", [0, 1, SEED, ALL, (1 << 63) - 1, 1 << 63, (1 << 64) - 1])
def test_a_kernel_keeps_what_is_below_the_threshold(first, seed, backend):
    table = _dispatch.kernels(backend)
    words = [word(first + i, seed) for i in range(12)]
    for i, exact in enumerate(words):  # so a threshold finds out each word to its last bit
        below = kernel_mask(table, 12, first, seed, exact)
        above = kernel_mask(table, 12, first, seed, exact + 1)
        assert (below[i], above[i]) == (0, 1)
        np.testing.assert_array_equal(below, np.array(words) < exact)
        # Thresholds without a lower half: a tie with it is no reason to keep.
        np.testing.assert_array_equal(kernel_mask(table, 12, first, seed, exact >> 16 << 16)[i], 0)
    np.testing.assert_array_equal(kernel_mask(table, 12, first, seed, 0), 0)
    np.testing.assert_array_equal(kernel_mask(table, 12, first, seed, ALL), 1)


@pytest.mark.parametrize("shift", [0, 3])
def test_ties_are_settled_by_the_second_stream(shift, backend):
    # 2^20 elements have 16 with the upper half of a threshold; at p = 1/2^16 * 3/4 those are all that may be kept.
    n, threshold = 1 << 20, 0xC000
    expected = np.flatnonzero(reference_words(5 + shift, n, SEED) < threshold)
    assert 3 < expected.size < 30
    found = np.flatnonzero(kernel_mask(_dispatch.kernels(backend), n, 5 + shift, SEED, threshold))
    np.testing.assert_array_equal(found, expected)
    assert [word(5 + shift + int(i), SEED) < threshold for i in expected] == [True] * expected.size


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [*WIDTHS, 16383, 16384, 16385, 100_003])
def test_kernels_agree_bit_by_bit(n, dtype, rng, backend):
    table, reference = _dispatch.kernels(backend), _dispatch.kernels("numpy")
    values = rng.standard_normal(n + 7).astype(dtype_of(dtype))
    for offset, first in ((0, 0), (1, 0), (3, 5), (7, 8 * ALL - 64), (1, 70)):  # where memory starts, where words do
        x = values[offset : offset + n]
        expected, found = np.empty_like(x), np.full(n + 9, 9, x.dtype)
        reference.dropout(x, n, first, SEED, ALL // 3, 3.0, expected)
        table.dropout(x, n, first, SEED, ALL // 3, 3.0, found[offset : offset + n])
        assert found[offset : offset + n].tobytes() == expected.tobytes()
        assert (found[:offset] == 9).all()
        assert (found[offset + n :] == 9).all()


@pytest.mark.parametrize("offset", [0, 4, 1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_agree_on_arrays_beyond_the_cache(dtype, offset, rng, backend):
    n = (16 << 20) // dtype_of(dtype).itemsize + 5  # x and y exceed what fits the cache
    table, reference = _dispatch.kernels(backend), _dispatch.kernels("numpy")
    x = rng.standard_normal(n + offset, np.float32).astype(dtype_of(dtype))[offset:]
    expected, found = np.empty_like(x), np.empty(n + offset, x.dtype)[offset:]
    reference.dropout(x, n, 1, SEED, ALL // 2, 2.0, expected)
    table.dropout(x, n, 1, SEED, ALL // 2, 2.0, found)
    assert found.tobytes() == expected.tobytes()
    table.dropout(x, n, 1, SEED, ALL // 2, 2.0, x)
    assert x.tobytes() == expected.tobytes()


# ---- the mask of the op ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_and_backward_are_mask_times_scale(dtype, rng, backend):
    shape, p = (5, 7, 11), 0.3
    x, dout = (rng.standard_normal(shape).astype(dtype_of(dtype)) for _ in range(2))
    accumulation = np.float64 if dtype == "float64" else np.float32
    kept = expected_mask(shape, p)
    for scale, factor in (("inverted", 1 / p), ("none", 1.0)):
        out, cache = fastnorm.dropout_forward(x, {"p": p, "seed": SEED, "scale": scale}, backend=backend)
        dx = fastnorm.dropout_backward(dout, cache, backend=backend)
        for source, result in ((x, out), (dout, dx)):
            product = (source.astype(accumulation) * accumulation(factor)).astype(x.dtype)
            assert result.tobytes() == np.where(kept, product, x.dtype.type(0)).tobytes()
            assert (result.dtype, result.shape) == (x.dtype, x.shape)


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
@pytest.mark.parametrize("shape", [(60, 70), (3, 5, 7, 9), (3, 70_001), (2, 3, 40_000), (70_000, 3)], ids=str)
def test_a_mask_does_not_depend_on_the_layout(shape, arrangement, rng, backend):
    values = rng.standard_normal(shape, np.float32)
    x = ARRANGEMENTS[arrangement](values)
    param = {"p": 0.6, "seed": SEED}
    out, cache = fastnorm.dropout_forward(x, param, backend=backend)
    plain, _ = fastnorm.dropout_forward(np.ascontiguousarray(x, np.float32), param, backend="numpy")
    np.testing.assert_array_equal(out, plain)
    assert out.dtype == np.float32
    if arrangement in ("F", "channels-last", "swapped", "samples innermost"):
        assert out.strides == x.strides
    np.testing.assert_array_equal(fastnorm.dropout_backward(x, cache, backend=backend), plain)


@pytest.mark.parametrize("arrangement", WRITABLE)
def test_out_has_any_layout(arrangement, rng, backend):
    values = rng.standard_normal((60, 70), np.float32)
    param = {"p": 0.6, "seed": SEED}
    expected, _ = fastnorm.dropout_forward(values, param, backend="numpy")
    out = ARRANGEMENTS[arrangement](np.full_like(values, 9))
    found, cache = fastnorm.dropout_forward(values, param, out=out, backend=backend)
    assert found is out
    np.testing.assert_array_equal(out, expected)
    out[...] = values
    assert fastnorm.dropout_forward(out, param, out=out, backend=backend)[0] is out  # in place
    np.testing.assert_array_equal(out, expected)
    out[...] = values
    assert fastnorm.dropout_backward(out, cache, out=out, backend=backend) is out
    np.testing.assert_array_equal(out, expected)
    assert fastnorm.dropout_backward(values, cache, out=out, backend=backend) is out
    np.testing.assert_array_equal(out, expected)


def test_a_mask_does_not_depend_on_dtype_threads_or_shape(backend):
    expected = mask((7, 20_011), {"p": 0.4, "seed": SEED}, "numpy")
    for dtype in (*DTYPES, "int8", "bool"):
        for threads in (1, 2, 3, 7):
            fastnorm.set_num_threads(threads)
            x = np.ones((20_011, 7), dtype_of(dtype) if dtype in DTYPES else dtype)
            out, _ = fastnorm.dropout_forward(x, {"p": 0.4, "seed": SEED}, backend=backend)
            np.testing.assert_array_equal(out.reshape(expected.shape) != 0, expected)


def test_dtypes_of_results(backend):
    for dtype in (*map(dtype_of, DTYPES), np.dtype(np.int32), np.dtype(bool)):
        x = np.ones((4, 6), dtype)
        out, cache = fastnorm.dropout_forward(x, {"p": 0.5, "seed": 3}, backend=backend)
        assert out.dtype == storage(x)
        for other in (*map(dtype_of, DTYPES), np.dtype(np.int32)):
            dx = fastnorm.dropout_backward(np.ones((4, 6), other), cache, backend=backend)
            assert dx.dtype == out.dtype
            np.testing.assert_array_equal(dx.astype(float), out.astype(float))


def test_another_backend_may_do_the_backward(rng):
    x = rng.standard_normal((30, 40))
    out, cache = fastnorm.dropout_forward(x, {"p": 0.5}, backend="numpy")
    for name in sorted({target.partition("/")[0] for target in BACKENDS}):
        np.testing.assert_array_equal(fastnorm.dropout_backward(x, cache, backend=name), out)


# ---- seeds ----------------------------------------------------------------------------------------


def test_a_seed_repeats_the_mask_and_no_other_does(backend):
    shape = (40, 50)
    seeds = [0, 1, 2, 1 << 32, 1 << 63, (1 << 64) - 1]
    masks = [mask(shape, {"p": 0.5, "seed": seed}, backend) for seed in seeds]
    for seed, first in zip(seeds, masks, strict=True):
        np.testing.assert_array_equal(mask(shape, {"p": 0.5, "seed": seed}, backend), first)
    assert len({first.tobytes() for first in masks}) == len(seeds)
    np.testing.assert_array_equal(mask(shape, {"p": 0.5, "seed": np.uint64(1 << 63)}, backend), masks[4])


def test_without_a_seed_every_call_draws_one(backend):
    for param in ({"p": 0.5}, {"p": 0.5, "seed": None}):
        before = dict(param)
        x = np.ones((40, 50))
        results = [fastnorm.dropout_forward(x, param, backend=backend) for _ in range(3)]
        assert len({out.tobytes() for out, _ in results}) == 3
        assert param == before
        for out, cache in results:
            np.testing.assert_array_equal(fastnorm.dropout_backward(x, cache, backend=backend), out)
            again, _ = fastnorm.dropout_forward(x, {"p": 0.5, "seed": cache.draw.seed}, backend=backend)
            np.testing.assert_array_equal(again, out)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_forked_children_draw_seeds_of_their_own():
    seeds = run(
        "import os, fastnorm, numpy, random\n"
        "random.seed(1); numpy.random.seed(1)\n"
        "children = []\n"
        "for _ in range(3):\n"
        "    if os.fork() == 0:\n"
        "        os.write(1, b'%d\\n' % fastnorm.dropout_forward(numpy.ones(3), {'p': 0.5})[1].draw.seed)\n"
        "        os._exit(0)\n"
        "    os.wait()\n"
    ).split()
    assert len(set(seeds)) == len(seeds) == 3


# ---- statistics -----------------------------------------------------------------------------------

# Six standard deviations: 2e-9 for a sum of many draws, were it not the same for every run anyway.
SIGMAS = 6


@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 0.8, 0.999])
@pytest.mark.parametrize("seed", [0, 1, SEED])
def test_the_share_of_kept_elements(p, seed):
    n = 1 << 20  # the number kept is binomial: mean n*p, variance n*p*(1-p)
    kept = mask(n, {"p": p, "seed": seed})
    assert abs(kept.sum() - n * p) < SIGMAS * np.sqrt(n * p * (1 - p))
    for remainder in range(64):  # each of the eight numbers of a counter, and each bit that kernels work with
        part = kept[remainder::64]
        assert abs(part.sum() - part.size * p) < SIGMAS * np.sqrt(part.size * p * (1 - p)) + 1


@pytest.mark.parametrize("p", [0.1, 0.5, 0.8])
def test_elements_and_seeds_are_uncorrelated(p):
    # (m - p)(m' - p)/(p(1-p)) of two independent elements has mean 0 and variance 1.
    n = 1 << 20
    scores = [(mask(n, {"p": p, "seed": seed}) - p) / np.sqrt(p * (1 - p)) for seed in (0, 1, 2, 1 << 32)]
    for lag in (1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 64, 1024):
        assert abs(np.dot(scores[0][lag:], scores[0][:-lag])) < SIGMAS * np.sqrt(n - lag), lag
    for one, other in pairwise(scores):
        assert abs(np.dot(one, other)) < SIGMAS * np.sqrt(n)


@pytest.mark.parametrize("stream", [0, 1])
@pytest.mark.parametrize("place", range(8))
def test_numbers_are_uniform(place, stream):
    # Pearson's statistic of the values' upper and of their lower 8 bits has mean 255 and variance 2*255 or less.
    values = numbers(0, 1 << 21, SEED, stream)[place::8]
    for part in (values >> 8, values & 0xFF):
        counts = np.bincount(part.astype(int), minlength=256)
        statistic = ((counts - values.size / 256) ** 2).sum() / (values.size / 256)
        assert abs(statistic - 255) < SIGMAS * np.sqrt(2 * 255)


def test_the_bits_of_numbers_are_uncorrelated():
    # The 128 bits of a counter, of the next one and of the other stream, as +-1: a product has mean 0 and variance 1.
    n = 1 << 17
    found = numbers(0, 8 * n, SEED, 0).reshape(n, 8)
    signs = 2.0 * (found[:, :, None] >> np.arange(16, dtype=np.uint64) & 1).astype(float).reshape(n, 128) - 1
    bound = SIGMAS * np.sqrt(n)
    assert np.abs(signs.sum(axis=0)).max() < bound
    assert np.abs(signs.T @ signs - n * np.eye(128)).max() < bound
    assert np.abs(signs[1:].T @ signs[:-1]).max() < bound
    lower = numbers(0, 8 * n, SEED, 1).reshape(n, 8)
    others = 2.0 * (lower[:, :, None] >> np.arange(16, dtype=np.uint64) & 1).astype(float).reshape(n, 128) - 1
    assert np.abs(signs.T @ others).max() < bound


def test_the_mean_is_kept():
    x = np.random.default_rng(1).standard_normal(1 << 20) + 3
    for p in (0.1, 0.5, 0.9):
        out, _ = fastnorm.dropout_forward(x, {"p": p, "seed": 4})  # variance of an element: x^2*(1-p)/p
        assert abs(out.sum() - x.sum()) < SIGMAS * np.sqrt((x**2).sum() * (1 - p) / p)


# ---- edges ----------------------------------------------------------------------------------------


def test_p_is_rounded_to_32_bits(backend):
    words = [word(i, SEED) for i in range(64)]
    for i in (0, 1, 2, 3, 17, 63):
        assert not mask(64, {"p": words[i] / ALL, "seed": SEED}, backend)[i]
        assert mask(64, {"p": (words[i] + 1) / ALL, "seed": SEED}, backend)[i]
        assert mask(64, {"p": (words[i] + 0.51) / ALL, "seed": SEED}, backend)[i]


@pytest.mark.parametrize("dtype", DTYPES)
def test_p_of_one_and_next_to_it_keeps_all(dtype, rng, backend):
    x = rng.standard_normal((30, 50)).astype(dtype_of(dtype))
    for p in (1, 1.0, np.float32(1), 1 - 2.0**-40):
        for scale in ("inverted", "none"):
            out, cache = fastnorm.dropout_forward(x, {"p": p, "scale": scale}, backend=backend)
            np.testing.assert_allclose(out.astype(float), x.astype(float), rtol=2.0**-39)
            dx = fastnorm.dropout_backward(x, cache, backend=backend)
            assert dx.tobytes() == out.tobytes()
            if p == 1:
                assert out.tobytes() == x.tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_p_too_small_drops_all(dtype, backend):
    x = np.full((30, 50), -np.inf, dtype_of(dtype))
    for p in (2.0**-34, 1e-40, 5e-324):
        out, cache = fastnorm.dropout_forward(x, {"p": p, "seed": SEED}, backend=backend)
        assert out.tobytes() == np.zeros_like(x).tobytes()
        assert fastnorm.dropout_backward(x, cache, backend=backend).tobytes() == out.tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -0.0, -1.0, 3e4])
def test_what_is_dropped_is_zero_whatever_it_was(value, dtype, backend):
    x = np.full((7, 33), value, dtype_of(dtype))
    kept = expected_mask(x.shape, 0.25)
    for param in ({"p": 0.25, "seed": SEED}, {"p": 0.25, "seed": SEED, "scale": "none"}):
        out, _ = fastnorm.dropout_forward(x, param, backend=backend)
        assert out[~kept].tobytes() == np.zeros_like(out[~kept]).tobytes()  # +0, not -0
        factor = 1 if "scale" in param else 4
        with np.errstate(over="ignore"):
            product = (x[kept].astype(np.float64) * factor).astype(x.dtype)  # float16: 12e4 is infinite
        np.testing.assert_array_equal(out[kept].astype(float), product.astype(float))
        np.testing.assert_array_equal(np.signbit(out[kept]), np.signbit(product))


@pytest.mark.parametrize("dtype", DTYPES)
def test_test_mode_drops_nothing(dtype, rng, backend):
    x = rng.standard_normal((30, 50)).astype(dtype_of(dtype))
    x[0, :3] = np.nan, np.inf, -0.0
    accumulation = np.float64 if dtype == "float64" else np.float32
    times_p = (x.astype(accumulation) * accumulation(0.3)).astype(x.dtype)
    for scale, expected in (("inverted", x), ("none", times_p)):
        param = {"p": 0.3, "mode": "test", "seed": 1, "scale": scale}
        out, cache = fastnorm.dropout_forward(x, param, backend=backend)
        assert out.tobytes() == expected.tobytes()
        assert not np.shares_memory(out, x)
        assert fastnorm.dropout_backward(x, cache, backend=backend).tobytes() == expected.tobytes()
        again = x.copy()
        assert fastnorm.dropout_forward(again, param, out=again, backend=backend)[0] is again
        assert again.tobytes() == expected.tobytes()


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (2, 0, 4)])
@pytest.mark.parametrize("order", ["C", "F"])
def test_empty_arrays(shape, order, backend):
    x = np.zeros(shape, np.float32, order)
    for mode in ("train", "test"):
        out, cache = fastnorm.dropout_forward(x, {"p": 0.5, "mode": mode}, backend=backend)
        dx = fastnorm.dropout_backward(x, cache, backend=backend)
        for result in (out, dx):
            assert (result.shape, result.dtype) == (shape, x.dtype)
        given = np.zeros(shape, np.float32)
        assert fastnorm.dropout_forward(x, {"p": 0.5}, out=given, backend=backend)[0] is given


def test_numbers_lists_and_arrays_without_axes(backend):
    for x in (3.0, np.float64(3.0), np.array(3.0), [1, 2, 3], np.array(3, ">f8")):
        out, cache = fastnorm.dropout_forward(x, {"p": 1}, backend=backend)
        np.testing.assert_array_equal(out, x)
        np.testing.assert_array_equal(fastnorm.dropout_backward(x, cache, backend=backend), x)
        assert isinstance(out, np.ndarray)


@pytest.mark.parametrize(
    "shape",
    [(), (1,), (_layout.PIECE,), (_layout.PIECE + 1,), (3, _layout.PIECE), (3, _layout.PIECE - 1),
     (2, 3, _layout.PIECE // 2 + 1), (_layout.PIECE + 7, 3), (5, 7), (2, 1, 3 * _layout.PIECE), (0, 5)],
    ids=str,
)  # fmt: skip
def test_pieces_make_up_an_array_in_order(shape):
    indices = np.arange(np.prod(shape, dtype=int)).reshape(shape)
    seen = 0
    for first, index in _layout.pieces(shape):
        piece = indices[index]
        np.testing.assert_array_equal(piece.ravel(), np.arange(first, first + piece.size))
        assert first == seen
        assert 0 < piece.size <= _layout.PIECE
        assert np.shares_memory(piece, indices)
        seen += piece.size
    assert seen == indices.size


@pytest.mark.slow
def test_more_than_2_to_the_32_elements(backend):
    n = (1 << 32) + 100
    x = np.ones(n, np.float16)
    fastnorm.dropout_forward(x, {"p": 0.5, "seed": SEED}, out=x, backend=backend)
    for first in (0, (1 << 31) - 50, n - 100):
        kept = np.array([word(first + i, SEED) < ALL // 2 for i in range(100)])
        np.testing.assert_array_equal(x[first : first + 100], 2.0 * kept)


# ---- backward, cache ------------------------------------------------------------------------------


@pytest.mark.parametrize("param", [{"p": 0.7}, {"p": 0.7, "scale": "none"}, {"p": 0.7, "mode": "test"}], ids=str)
def test_backward_is_the_derivative(param, rng, backend):
    x, dout = rng.standard_normal((2, 5, 6))
    param = {**param, "seed": SEED}
    _, cache = fastnorm.dropout_forward(x, param, backend=backend)
    dx = fastnorm.dropout_backward(dout, cache, backend=backend)

    def loss(values):
        return (fastnorm.dropout_forward(values, param, backend=backend)[0] * dout).sum()

    numeric = np.empty_like(x)
    for index in np.ndindex(x.shape):
        step = np.zeros_like(x)
        step[index] = 0.5
        numeric[index] = loss(x + step) - loss(x - step)  # exact up to roundoff: the function is linear
    np.testing.assert_allclose(dx, numeric, rtol=1e-12, atol=1e-13)


def test_the_cache_holds_numbers_only():
    x = np.ones((100, 100))
    _, cache = fastnorm.dropout_forward(x, {"p": 0.5})
    assert not any(isinstance(value, np.ndarray) for value in (*cache, *cache.draw))


# ---- errors ---------------------------------------------------------------------------------------

X = np.arange(24, dtype=np.float32).reshape(4, 6)


@pytest.mark.parametrize(
    ("param", "error", "message"),
    [
        (None, ValueError, r"dropout_param\['p'\]: .* got none"),
        ({}, ValueError, r"dropout_param\['p'\]: .* got none"),
        ({"p": None}, ValueError, r"dropout_param\['p'\]: .* got none"),
        ({"p": 0}, ValueError, r"dropout_param\['p'\]: .* got 0.0"),
        ({"p": -0.1}, ValueError, r"dropout_param\['p'\]: .* got -0.1"),
        ({"p": 1.0001}, ValueError, r"dropout_param\['p'\]: .* got 1.0001"),
        ({"p": np.nan}, ValueError, r"dropout_param\['p'\]: .* got nan"),
        ({"p": "0.5"}, TypeError, r"dropout_param\['p'\]: expected a number"),
        ({"p": True}, TypeError, r"dropout_param\['p'\]: expected a number"),
        ({"p": [0.5, 0.5]}, TypeError, r"dropout_param\['p'\]: expected a number"),
        ({"p": 0.5, "mode": "eval"}, ValueError, r"dropout_param\['mode'\]: expected 'train' or 'test', got 'eval'"),
        ({"p": 0.5, "mode": None}, ValueError, r"dropout_param\['mode'\]"),
        ({"p": 0.5, "scale": "plain"}, ValueError, r"dropout_param\['scale'\]: expected 'inverted' or 'none'"),
        ({"p": 0.5, "scale": None}, ValueError, r"dropout_param\['scale'\]"),
        ({"p": 0.5, "seed": -1}, ValueError, r"dropout_param\['seed'\]: .* got -1"),
        ({"p": 0.5, "seed": 1 << 64}, ValueError, r"dropout_param\['seed'\]"),
        ({"p": 0.5, "seed": 1.0}, TypeError, r"dropout_param\['seed'\]: expected a whole number, got 1.0"),
        ({"p": 0.5, "seed": True}, TypeError, r"dropout_param\['seed'\]"),
        ({"p": 0.5, "seed": -1, "mode": "test"}, ValueError, r"dropout_param\['seed'\]"),
        ({"p": 0.5, "rate": 0.5}, ValueError, "unknown key 'rate'"),
        ({"p": 0.5, "sede": 1}, ValueError, "did you mean 'seed'"),
        ("train", TypeError, "dropout_param: expected a dict"),
        ([("p", 0.5)], TypeError, "dropout_param: expected a dict"),
    ],
)
def test_a_bad_option_is_named(param, error, message, backend):
    out = np.full_like(X, 9)
    with pytest.raises(error, match=message):
        fastnorm.dropout_forward(X, param, out=out, backend=backend)
    assert (out == 9).all()


@pytest.mark.parametrize(
    ("x", "error"),
    [
        (np.zeros((4, 6), complex), TypeError),
        (np.full((4, 6), None), TypeError),
        (np.full((4, 6), "1"), TypeError),
        (np.ma.masked_array(X), TypeError),
        (np.longdouble(X), TypeError),
        (None, TypeError),
        ("text", TypeError),
    ],
)
def test_a_bad_array_is_named(x, error):
    with pytest.raises(error, match=r"^x: "):
        fastnorm.dropout_forward(x, {"p": 0.5})
    _, cache = fastnorm.dropout_forward(X, {"p": 0.5})
    with pytest.raises(error, match=r"^dout: "):
        fastnorm.dropout_backward(x, cache)


def test_a_bad_out_is_named(backend):
    whole = np.zeros((5, 6), np.float32)
    read_only = np.zeros_like(X)
    read_only.flags.writeable = False
    x = whole[:4]
    _, cache = fastnorm.dropout_forward(x, {"p": 0.5})
    for out, error, message in (
        ([1.0], TypeError, "expected a NumPy array"),
        (np.zeros((6, 4), np.float32), ValueError, "expected shape"),
        (np.zeros((4, 6)), ValueError, "expected dtype float32"),
        (read_only, ValueError, "read-only"),
        (np.broadcast_to(np.zeros(6, np.float32), (4, 6)), ValueError, "out: "),
        (whole[1:], ValueError, "overlaps"),
    ):
        with pytest.raises(error, match=message) as raised:
            fastnorm.dropout_forward(x, {"p": 0.5}, out=out, backend=backend)
        assert str(raised.value).startswith("out: ")
        with pytest.raises(error, match=message):
            fastnorm.dropout_backward(x, cache, out=out, backend=backend)
    with pytest.raises(ValueError, match="read-only"):
        fastnorm.dropout_forward(read_only, {"p": 0.5}, out=read_only, backend=backend)
    assert (whole == 0).all()


def test_a_bad_cache_or_dout_is_named(backend):
    _, cache = fastnorm.dropout_forward(X, {"p": 0.5}, backend=backend)
    _, others = fastnorm.layernorm_forward(X, None, None, backend=backend)
    for bad in (None, (1, 2), X, others):
        with pytest.raises(TypeError, match="cache: expected what dropout_forward returned"):
            fastnorm.dropout_backward(X, bad, backend=backend)
    with pytest.raises(TypeError, match="cache: expected what layernorm_forward returned"):
        fastnorm.layernorm_backward(X, cache, backend=backend)
    with pytest.raises(ValueError, match="dout: expected the shape of x"):
        fastnorm.dropout_backward(X.T, cache, backend=backend)
