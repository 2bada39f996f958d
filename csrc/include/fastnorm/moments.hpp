// Count, mean and sum of centred squares: one pass over a block around a pivot near its mean, and Chan's merge.
//
//   scalar:  pivot = mean of the block's first elements
//            d = x - pivot;  mean = pivot + sum(d)/n
//            m2 = sum(d^2) - sum(d)^2/n; where that would cancel, the same again with this mean as the pivot
//   merge:   delta = b.mean - a.mean
//            mean  = a.mean + delta*b.n/(a.n + b.n)
//            m2    = a.m2 + b.m2 + delta^2*a.n*b.n/(a.n + b.n)
//
// sum(d)^2/n is what a pivot off the mean adds to the sum of squares. Up to half of it costs one bit; beyond that
// (a first few elements far from the rest) the second pass is run. What decides is the data alone, so bits repeat.
// The pivot of a constant is that constant, and everything is exact. Means are doubles: the vector passes use the
// nearest A (`centre`) and the rest is put right afterwards.
#pragma once

#include <algorithm>
#include <cmath>

#include "fastnorm/simd.hpp"

namespace fastnorm::FASTNORM_LEVEL {

struct Moments {
  double n, mean, m2;
};

FASTNORM_INLINE Moments merge(const Moments& a, const Moments& b) {
  if (a.n == 0) return b;
  const double n = a.n + b.n;
  const double delta = b.mean - a.mean;
  const double share = b.n / n;
  return {n, a.mean + delta * share, a.m2 + b.m2 + delta * delta * (a.n * share)};
}

// Several at once that have `each` elements each: the same rule without a division a part.
FASTNORM_INLINE Moments merge_equal(double each, const double* mean, const double* m2, size_t parts) {
  const double n = static_cast<double>(parts);
  const Vector<double> first = broadcast(mean[0]);
  Vector<double> sums[4] = {}, squares[4] = {};
  sum_run<double>(
      parts, [&](size_t i, auto how, int k) FASTNORM_INLINE_LAMBDA { sums[k] += how.load(mean + i, first) - first; });
  const double merged = mean[0] + total<double>(combined(sums)) / n;
  const Vector<double> centre = broadcast(merged), weight = broadcast(each);
  sum_run<double>(parts, [&](size_t i, auto how, int k) FASTNORM_INLINE_LAMBDA {
    const Vector<double> delta = how.load(mean + i, centre) - centre;
    squares[k] += mul_add(delta * delta, weight, how.load(m2 + i));
  });
  return {each * n, merged, total<double>(combined(squares))};
}

// Statistics of `span` adjacent doubles, of which a vector holds `each` whole ones.
struct Packing {
  size_t span, each;
  Indices<double> statistic, first;  // of a lane: its statistic, and the first lane of that

  explicit Packing(size_t of_span) : span(of_span), each(kLanes<double> / of_span) {
    statistic = over(lane_numbers<double>(), span);
    first = statistic * static_cast<Index<double>>(span);
  }

  // f(i, c, how) for vectors of n statistics: those from i on, whose doubles begin at c.
  template <class F>
  FASTNORM_INLINE void for_vectors(size_t n, const F& f) const {
    size_t i = 0, c = 0;
    const size_t step = each * span;
    if (step == kLanes<double>)
      for (; i + each <= n; i += each, c += step) f(i, c, Whole{});
    for (; i < n; i += each, c += step) f(i, c, Part{std::min(step, n * span - c)});
  }

  // A value of each statistic, one after the other from p on, in all of its lanes, and the inverse.
  template <class How>
  FASTNORM_INLINE Vector<double> load(const double* p, How how) const {
    return __builtin_shuffle(load_part(p, count(how), Vector<double>{}), statistic);
  }
  template <class How>
  FASTNORM_INLINE void put(double* p, Vector<double> v, How how) const {
    store_part(p, __builtin_shuffle(v, lane_numbers<double>() * static_cast<Index<double>>(span)), count(how));
  }
  size_t count(Whole) const { return each; }
  size_t count(Part part) const { return part.n < each * span ? part.n / span : each; }

  // The sum over each statistic's lanes, in all of them; lanes of none are 0.
  FASTNORM_INLINE Vector<double> sums(Vector<double> v) const {
    const Indices<double> lane = lane_numbers<double>();
    const auto halves = [&](size_t lanes) FASTNORM_INLINE_LAMBDA {
      for (auto half = static_cast<Index<double>>(lanes / 2); half > 0; half /= 2)
        v += __builtin_shuffle(v, lane ^ half);
      return v;
    };
    if ((span & (span - 1)) == 0) return halves(span);
    if (each == 1) return halves(kLanes<double>);
    Vector<double> next = v;
    for (size_t k = 1; k < span; ++k) {
      next = __builtin_shuffle(next, lane + 1);
      v += next;
    }
    return __builtin_shuffle(v, first);
  }
};

// The mean and variance of n statistics, each of `parts` such parts after one another, several at once where a vector
// holds more than one.
inline void merge_equal(double each, const double* part_means, const double* part_m2s, size_t parts, size_t n,
                        double* mean, double* var) {
  if (2 * parts > kLanes<double>) {
    for (size_t i = 0; i < n; ++i) {
      const Moments all = merge_equal(each, part_means + i * parts, part_m2s + i * parts, parts);
      mean[i] = all.mean;
      var[i] = all.m2 / all.n;
    }
    return;
  }
  const Packing packing(parts);
  const Vector<double> count = broadcast(static_cast<double>(parts)), weight = broadcast(each);
  packing.for_vectors(n, [&](size_t i, size_t c, auto how) FASTNORM_INLINE_LAMBDA {
    const Vector<double> means = how.load(part_means + c), one = __builtin_shuffle(means, packing.first),
                         merged = one + packing.sums(means - one) / count, delta = means - merged,
                         squares = packing.sums(mul_add(delta * delta, weight, how.load(part_m2s + c)));
    packing.put(mean + i, merged, how);
    packing.put(var + i, squares / (count * weight), how);
  });
}

FASTNORM_INLINE double variance(const Moments& m) { return m.m2 * (1.0 / m.n); }

// 1/sqrt(var + eps); 0 where that is infinite, so that a constant gives beta for eps 0 as well.
FASTNORM_INLINE double rstd_of(double var, double eps) {
  const double total = var + eps;
  return total == 0.0 ? 0.0 : 1.0 / std::sqrt(total);
}

// A block is `runs` runs of `length` elements, `stride` elements apart.

// A value near the block's mean: the mean of its first elements.
constexpr size_t kPivotElements = 16;

template <class T>
FASTNORM_INLINE Vector<Acc<T>> pivot_of(const T* x, size_t length) {
  using A = Acc<T>;
  const size_t n = std::min(length, kPivotElements);
  const Vector<A> first = broadcast<A>(load_part(x, 1, Vector<A>{})[0]);
  Vector<A> sums[4] = {};
  sum_run<A>(n, [&](size_t i, auto how, int k) FASTNORM_INLINE_LAMBDA { sums[k] += how.load(x + i, first) - first; });
  return first + broadcast(static_cast<A>(total<A>(combined(sums)) * (1.0 / static_cast<double>(n))));
}

// Whether sum(d)^2/n is too large a part of sum(d^2) to be subtracted from it; of NaN as well.
FASTNORM_INLINE bool cancels(double off_pivot, double squares) { return !(off_pivot <= 0.5 * squares); }

// sum(d) and sum(d^2), d = x - pivot: V is a vector of them by lane, or a double.
template <class V>
struct AroundPivot {
  V sum, square;
};

template <class T>
FASTNORM_INLINE AroundPivot<Vector<Acc<T>>> lanes_around(Vector<Acc<T>> pivot, const T* x, size_t runs, size_t stride,
                                                         size_t length) {
  using A = Acc<T>;
  Vector<A> sums[4] = {}, squares[4] = {};
  for (size_t r = 0; r < runs; ++r) {
    const T* run = x + r * stride;
    const auto add = [&](size_t i, auto how, int k) FASTNORM_INLINE_LAMBDA {
      const Vector<A> d = how.load(run + i, pivot) - pivot;
      sums[k] += d;
      squares[k] = mul_add(d, d, squares[k]);
    };
    sum_run<A>(length, add, runs == 1 ? begun_at(run, length) : 0);
  }
  return {combined(sums), combined(squares)};
}

template <class T>
FASTNORM_INLINE AroundPivot<double> sums_around(Vector<Acc<T>> pivot, const T* x, size_t runs, size_t stride,
                                                size_t length) {
  const auto lanes = lanes_around(pivot, x, runs, stride, length);
  return {total<Acc<T>>(lanes.sum), total<Acc<T>>(lanes.square)};
}

template <class T>
FASTNORM_INLINE Moments block_moments(const T* x, size_t runs, size_t stride, size_t length) {
  using A = Acc<T>;
  const double n = static_cast<double>(runs * length),
               share = 1.0 / n;  // hoisted out of loops, where a division is not
  Vector<A> pivot = pivot_of(x, length);
  AroundPivot<double> d = sums_around(pivot, x, runs, stride, length);
  if (cancels(d.sum * (d.sum * share), d.square)) {
    pivot = broadcast(static_cast<A>(static_cast<double>(pivot[0]) + d.sum * share));
    d = sums_around(pivot, x, runs, stride, length);
  }
  const double m2 = d.square - d.sum * (d.sum * share);
  return {n, static_cast<double>(pivot[0]) + d.sum * share, m2 < 0.0 ? 0.0 : m2};
}

// Those of four runs, one after the other in memory, the same bits: the sums of four are brought together at once.
template <class T>
FASTNORM_INLINE void four_moments(const T* x, size_t length, Moments (&found)[4]) {
  using A = Acc<T>;
  const size_t some = std::min(length, kPivotElements);
  const double n = static_cast<double>(length), share = 1.0 / n, pivot_share = 1.0 / static_cast<double>(some);
  Vector<A> pivots[4], lanes[4], squares[4];
#pragma GCC unroll 4
  for (size_t k = 0; k < 4; ++k) {
    pivots[k] = broadcast<A>(load_part(x + k * length, 1, Vector<A>{})[0]);
    lanes[k] = lanes_around(pivots[k], x + k * length, 1, 0, some).sum;
  }
  double sum[4], square[4];
  store_four(sum, totals<A>(lanes));
#pragma GCC unroll 4
  for (size_t k = 0; k < 4; ++k) {
    pivots[k] += broadcast(static_cast<A>(sum[k] * pivot_share));
    const auto around = lanes_around(pivots[k], x + k * length, 1, 0, length);
    lanes[k] = around.sum;
    squares[k] = around.square;
  }
  store_four(sum, totals<A>(lanes));
  store_four(square, totals<A>(squares));
#pragma GCC unroll 4
  for (size_t k = 0; k < 4; ++k) {
    const double off = sum[k] * (sum[k] * share), m2 = square[k] - off;
    found[k] = {n, static_cast<double>(pivots[k][0]) + sum[k] * share, m2 < 0.0 ? 0.0 : m2};
    if (cancels(off, square[k])) found[k] = block_moments(x + k * length, 1, 0, length);
  }
}

// The same around 0, of one run: the mean of squares for a variance.
template <class T>
FASTNORM_INLINE Moments block_squares(const T* x, size_t length) {
  using A = Acc<T>;
  Vector<A> squares[4] = {};
  const auto add = [&](size_t i, auto how, int k) FASTNORM_INLINE_LAMBDA {
    const Vector<A> value = how.load(x + i);
    squares[k] = mul_add(value, value, squares[k]);
  };
  sum_run<A>(length, add, begun_at(x, length));
  return {static_cast<double>(length), 0.0, total<A>(combined(squares))};
}

}  // namespace fastnorm::FASTNORM_LEVEL
