// Count, mean and sum of centred squares: the exact two-pass over one block, and Chan's merge.
//
//   scalar:  mean = pivot + sum(x - pivot)/n          pivot: the block's first element
//            m2   = sum((x - mean)^2)
//   merge:   delta = b.mean - a.mean
//            mean  = a.mean + delta*b.n/(a.n + b.n)
//            m2    = a.m2 + b.m2 + delta^2*a.n*b.n/(a.n + b.n)
//
// The pivot makes the mean of a constant exact and keeps a large mean out of the sums. Means are doubles:
// the vector passes use the nearest A (`centre`) and the rest is put right afterwards.
#pragma once

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

FASTNORM_INLINE double variance(const Moments& m) { return m.m2 / m.n; }

// 1/sqrt(var + eps); 0 where that is infinite, so that a constant gives beta for eps 0 as well.
FASTNORM_INLINE double rstd_of(double var, double eps) {
  const double total = var + eps;
  return total == 0.0 ? 0.0 : 1.0 / std::sqrt(total);
}

// The two passes over a block: `runs` runs of `length` elements, `stride` elements apart.
template <class T>
FASTNORM_INLINE double block_mean(const T* x, size_t runs, size_t stride, size_t length) {
  using A = Acc<T>;
  const Vector<A> pivot = broadcast<A>(load_part(x, 1, Vector<A>{})[0]);
  Vector<A> sums[4] = {};
  for (size_t r = 0; r < runs; ++r) {
    const T* run = x + r * stride;
    sum_run<A>(length,
               [&](size_t i, auto how, int k) FASTNORM_INLINE_LAMBDA { sums[k] += how.load(run + i, pivot) - pivot; });
  }
  return static_cast<double>(pivot[0]) + total<A>(combined(sums)) / static_cast<double>(runs * length);
}

template <class T>
FASTNORM_INLINE double block_m2(const T* x, size_t runs, size_t stride, size_t length, double mean) {
  using A = Acc<T>;
  const Vector<A> centre = broadcast(static_cast<A>(mean));
  Vector<A> squares[4] = {};
  for (size_t r = 0; r < runs; ++r) {
    const T* run = x + r * stride;
    sum_run<A>(length, [&](size_t i, auto how, int k) FASTNORM_INLINE_LAMBDA {
      const Vector<A> d = how.load(run + i, centre) - centre;
      squares[k] = mul_add(d, d, squares[k]);
    });
  }
  const double rest = mean - static_cast<double>(centre[0]);
  const double m2 = total<A>(combined(squares)) - static_cast<double>(runs * length) * rest * rest;
  return m2 < 0.0 ? 0.0 : m2;
}

template <class T>
FASTNORM_INLINE Moments block_moments(const T* x, size_t runs, size_t stride, size_t length) {
  const double mean = block_mean(x, runs, stride, length);
  return {static_cast<double>(runs * length), mean, block_m2(x, runs, stride, length, mean)};
}

}  // namespace fastnorm::FASTNORM_LEVEL
