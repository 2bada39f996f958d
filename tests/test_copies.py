"""Copies between arrays whose elements lie in another order: `_memory.copy_transposed`."""

from __future__ import annotations

import numpy as np
import pytest

import fastnorm
from fastnorm import _arrays, _memory

pytest.importorskip("fastnorm._core", reason="the extension is not built")

DTYPES = ["float16", "float32", "float64"]


def _pair(shape, target_order, source_order, dtype):
    """A target of sevens and a source of noise, their axes in memory in these orders."""
    rng = np.random.default_rng(len(shape))

    def ordered(order, values):
        return np.ascontiguousarray(values.transpose(order)).transpose(np.argsort(order))

    source = ordered(source_order, rng.standard_normal(shape).astype(dtype))
    return ordered(target_order, np.full(shape, 7, dtype)), source


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "target_order", "source_order"),
    [
        ((64, 64), (0, 1), (1, 0)),
        ((300, 129), (1, 0), (0, 1)),
        ((129, 1021), (0, 1), (1, 0)),
        ((3, 33, 17, 65), (0, 1, 2, 3), (0, 2, 3, 1)),
        ((3, 33, 17, 65), (0, 2, 3, 1), (0, 1, 2, 3)),
        ((1, 40, 16, 70), (3, 0, 2, 1), (2, 1, 0, 3)),
    ],
    ids=str,
)
def test_every_element_arrives(shape, target_order, source_order, dtype):
    for threads in (1, 3):
        fastnorm.set_num_threads(threads)
        target, source = _pair(shape, target_order, source_order, dtype)
        assert _memory.copy_transposed(target, source)
        np.testing.assert_array_equal(target, source)


def test_gaps_and_negative_strides():
    memory = np.random.default_rng(0).standard_normal((260, 400)).astype(np.float32)
    for source in (memory[::2, ::1], memory[::-1], memory[3::3]):
        target = np.zeros(source.shape[::-1], np.float32).T
        assert _memory.copy_transposed(target, source)
        np.testing.assert_array_equal(target, source)


@pytest.mark.parametrize(
    "name", ["the same order", "another dtype", "too small", "one memory", "no unit stride", "read-only", "byte order"]
)
def test_what_is_left_to_numpy(name):
    source = np.random.default_rng(0).standard_normal((128, 128)).astype(np.float32)
    target = np.full((128, 128), 7, np.float32).T
    if name == "the same order":
        target = target.T
    elif name == "another dtype":
        target = target.astype(np.float64)
    elif name == "too small":
        target, source = target[:50, :50], source[:50, :50]
    elif name == "one memory":
        target = source.T
    elif name == "no unit stride":
        source = np.repeat(source, 2, axis=1)[:, ::2]
    elif name == "read-only":
        target.flags.writeable = False
    elif name == "byte order":
        source = source.astype(">f4")
    before = target.copy()
    assert not _memory.copy_transposed(target, source)
    np.testing.assert_array_equal(target, before)


def test_the_ops_copy_by_it(monkeypatch):
    asked = []
    monkeypatch.setattr(_memory, "copy_transposed", lambda target, source: asked.append(target.shape))  # never does
    target, source = _pair((100, 90), (0, 1), (1, 0), "float32")
    _arrays.copy(target, source)
    np.testing.assert_array_equal(target, source)
    assert asked == [(100, 90)]
