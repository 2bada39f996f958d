"""The kernel contract: what every backend implements, written down once.

A backend is any object (in practice a module) with the functions of `KernelTable`. The ops above have
already validated everything and chosen the layout; a kernel only computes.

What a kernel receives
    x, dy, y, dx    dense arrays of one storage dtype: float16, bfloat16, float32 or float64, native byte
                    order, aligned. Dense: the elements fill one block of memory, which the sizes describe.
                    Shape and strides of the array object carry no meaning (`flat` gives the 1-D view).
    sizes           the canonical view of that block, never zero:
                    channel family  (outer, channels, inner), statistics over outer and inner;
                    group calls     (samples, outer, channels, inner) and `groups`, a divisor of channels: in each
                                    sample, statistics over outer, inner and the channels/groups channels of a group;
                    row family      (rows, cols), statistics over each row.
    gamma, beta     1-D contiguous arrays in the accumulation dtype (float32; float64 for float64 storage),
                    `channels` or `cols` elements, or None where absent.
    mean, var       1-D contiguous float64, one element per channel, row, or group of a sample (sample by sample);
                    var is biased (divided by count). Always float64: for values of 1e6 +- 1 a float32 mean is off
                    by 3% of the spread. A mean of None, in the row family alone, means rows that are not centred:
                    the mean counts as 0, and var is the mean of squares.
    eps             float; the factor is rstd = 1/sqrt(var + eps), and 0 where var + eps is 0.

What a kernel promises
    - Outputs are overwritten, never added to. Nothing is returned, printed or validated.
    - y may be x, and dx may be dy or x: the same block, in place. No other overlap.
    - Statistics are as accurate as an exact two-pass (sum, centred squares) within a block, blocks merged by
      Chan's rule in an order that the sizes alone decide. So results are bitwise the same for any number of
      threads, and a row's result does not depend on how many other rows there are.
    - A constant channel or row has var exactly 0 and a mean exactly equal to the constant.
    - NaN and Inf stay within their channel or row.
    - No memory of the arrays' size is allocated; only per-channel, per-row and per-chunk workspace.
    - Many Python threads may call at once.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import numpy as np

Array = np.ndarray[Any, Any]


def flat(array: Array) -> Array:
    """The 1-D view of a dense array in the order of its memory; never a copy."""
    return array.ravel(order="K")


@runtime_checkable
class KernelTable(Protocol):
    """The functions of a backend. Formulas are per channel or row, n the number of elements in it."""

    def channel_moments(self, x: Array, outer: int, channels: int, inner: int, mean: Array, var: Array) -> None:
        """mean = sum(x)/n; var = sum((x - mean)^2)/n."""

    def channel_weighted_moments(
        self, x: Array, outer: int, channels: int, inner: int, weights: Array, each: bool,
        count: Array, mean: Array, var: Array,
    ) -> None:  # fmt: skip
        """count = sum(w); mean = sum(w*x)/count; var = sum(w*(x - mean)^2)/count; where count is 0, all three are 0.

        weights: 1-D contiguous, in the accumulation dtype; with `each` one an element, in the order of x's memory, else
        one a position, outer*inner of them, which all channels share. Where w is 0, x is left out whatever it is. Of a
        channel with a w that is negative, NaN or Inf the count is not finite, and mean and var are anything.
        """

    def channel_apply(
        self, x: Array, outer: int, channels: int, inner: int,
        mean: Array, var: Array, eps: float, gamma: Array | None, beta: Array | None, y: Array,
    ) -> None:  # fmt: skip
        """y = (x - mean)*rstd*gamma + beta."""

    def channel_forward(
        self, x: Array, outer: int, channels: int, inner: int,
        gamma: Array | None, beta: Array | None, eps: float, y: Array, mean: Array, var: Array,
    ) -> None:  # fmt: skip
        """channel_moments into mean and var, then channel_apply into y, fused."""

    def channel_backward_reduce(
        self, dy: Array, x: Array, outer: int, channels: int, inner: int,
        mean: Array, var: Array, eps: float, sum_dy: Array, sum_dy_xhat: Array,
    ) -> None:  # fmt: skip
        """sum_dy = sum(dy); sum_dy_xhat = sum(dy*xhat), xhat = (x - mean)*rstd; both float64."""

    def channel_backward_apply(
        self, dy: Array, x: Array, outer: int, channels: int, inner: int,
        mean: Array, var: Array, eps: float, gamma: Array | None,
        sum_dy: Array, sum_dy_xhat: Array, count: float, dx: Array,
    ) -> None:  # fmt: skip
        """dx = gamma*rstd*(dy - sum_dy/count - xhat*sum_dy_xhat/count).

        count is the number of elements the sums ran over: n, or more where they were summed over workers.
        """

    def channel_backward(
        self, dy: Array, x: Array, outer: int, channels: int, inner: int,
        mean: Array, var: Array, eps: float, gamma: Array | None,
        dx: Array, sum_dy: Array, sum_dy_xhat: Array,
    ) -> None:  # fmt: skip
        """channel_backward_reduce, then channel_backward_apply with count n, fused."""

    def group_moments(
        self, x: Array, samples: int, outer: int, channels: int, inner: int, groups: int, mean: Array, var: Array
    ) -> None:
        """mean and var of each group of each sample, as `group_forward` has them."""

    def group_forward(
        self, x: Array, samples: int, outer: int, channels: int, inner: int, groups: int,
        gamma: Array | None, beta: Array | None, eps: float, y: Array, mean: Array, var: Array,
    ) -> None:  # fmt: skip
        """group_moments into mean and var; y = (x - mean)*rstd*gamma + beta, gamma and beta by channel."""

    def group_backward(
        self, dy: Array, x: Array, samples: int, outer: int, channels: int, inner: int, groups: int,
        mean: Array, var: Array, eps: float, gamma: Array | None,
        dx: Array, sum_dy: Array, sum_dy_xhat: Array,
    ) -> None:  # fmt: skip
        """dx = rstd*(g - mean(g) - xhat*mean(g*xhat)), g = dy*gamma, means over the group of the sample;
        sum_dy = sum(dy) and sum_dy_xhat = sum(dy*xhat) by channel, over all samples: float64 of `channels` elements.
        """

    def row_forward(
        self, x: Array, rows: int, cols: int,
        gamma: Array | None, beta: Array | None, eps: float, y: Array, mean: Array | None, var: Array,
    ) -> None:  # fmt: skip
        """mean, var of each row; y = (x - mean)*rstd*gamma + beta, gamma and beta by column.

        Where mean is None: var = sum(x^2)/cols, y = x*rstd*gamma + beta.
        """

    def row_backward(
        self, dy: Array, x: Array, rows: int, cols: int,
        mean: Array | None, var: Array, eps: float, gamma: Array | None,
        dx: Array, dgamma: Array | None, dbeta: Array | None,
    ) -> None:  # fmt: skip
        """dx = rstd*(g - mean(g) - xhat*mean(g*xhat)), g = dy*gamma, means along the row, mean(g) left out where
        mean is None: then xhat = x*rstd;
        dgamma = sum over rows of dy*xhat, dbeta = sum over rows of dy: float64 of `cols` elements,
        both None where neither is wanted.
        """

    def dropout(self, x: Array, n: int, first: int, seed: int, threshold: int, scale: float, y: Array) -> None:
        """y[i] = x[i]*scale where word < threshold, else +0, whatever x[i] is; word is that of index = first + i:
        its upper and its lower 16 bits are number index % 8 of what Philox-4x32-7 with the key `seed` makes of the
        counters {index // 8, 0, 0} and {index // 8, 1, 0}, index // 8 being 64 bits. The numbers are the lower half of
        the first word, its upper half, the lower half of the second, and so on.

        0 <= seed < 2^64; 0 <= threshold <= 2^32. scale is rounded to the accumulation dtype, in which the product is
        computed, so that the bits are the same on every backend. n elements, the first of which is number `first`.
        """

    def set_num_threads(self, count: int) -> None:
        """Use at most this many threads from now on."""
