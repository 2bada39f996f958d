// What a pass over one slab of channels works with: coefficients, and the units that a channel is cut into.
#pragma once

#include <algorithm>
#include <type_traits>

#include "fastnorm/moments.hpp"
#include "fastnorm/plan.hpp"

namespace fastnorm::FASTNORM_LEVEL {

template <class A>
constexpr size_t kPadding = kPaddingBytes / sizeof(A);
static_assert(kPaddingBytes % kLineBytes == 0);

// What the elementwise passes need of each channel, in the accumulation dtype. With mean = centre + rest
// exactly, forward:  y = (x - centre)*scale + shift,    scale = gamma*rstd, shift = beta - rest*scale;
// backward: one of the forms below, with a slope as well.
template <class A>
struct Coefficients {
  A *centre, *scale, *shift, *slope;
  Coefficients from(size_t c) const { return {centre + c, scale + c, shift + c, slope + c}; }
};

// dx where a channel has statistics of its own: gamma is a factor of all. One value a channel gives exactly 0.
struct ScaledDescent {
  template <class V>
  FASTNORM_INLINE static V dx(V dy, V centred, V scale, V shift, V slope) {
    return scale * mul_add(centred, slope, dy - shift);
  }
};

// dx where channels share them: gamma, which may be 0, is a factor of dy alone.
struct SharedDescent {
  template <class V>
  FASTNORM_INLINE static V dx(V dy, V centred, V scale, V shift, V slope) {
    return mul_add(scale, dy, mul_add(centred, slope, shift));
  }
};

// In these loops pointers are restricted, so that they vectorize: a square root and a division each take 20 cycles
// alone.
inline void rstds(double* __restrict to, const double* __restrict var, size_t n, double eps) {
  for (size_t i = 0; i < n; ++i) to[i] = rstd_of(var[i], eps);
}

// Each of n values `times` times, to the same place or another: from the last ones on, whole vectors by one permutation
// each, the last of them beyond the end.
template <class A>
inline void repeat_each(const A* from, A* to, size_t n, size_t times) {
  constexpr size_t lanes = kLanes<A>;
  if (times > lanes) {
    for (size_t i = n; i-- > 0;) {
      const Vector<A> value = broadcast(from[i]);
      for (size_t k = 0; k + lanes < times; k += lanes) store(to + i * times + k, value);
      store(to + (i + 1) * times - lanes, value);
    }
  } else if (times > 1) {
    size_t c = (n * times - 1) / lanes * lanes, first = c / times, begun = c - first * times;
    const size_t values = lanes / times, rest = lanes - values * times;
    Indices<A> of = over(lane_numbers<A>() + static_cast<Index<A>>(begun), times);
    for (;; c -= lanes) {
      store(to + c, __builtin_shuffle(load(from + first), of));
      if (c == 0) return;
      first -= values;
      if (rest == 0) continue;
      if (begun < rest) {
        begun += times;
        --first;
      }
      begun -= rest;
      of = over(lane_numbers<A>() + static_cast<Index<A>>(begun), times);
    }
  } else if (from != to) {
    for (size_t c = 0; c < n; c += lanes) store(to + c, load(from + c));
  }
}

// Channels, each `span` adjacent ones of n statistics: f(c, how, of) for a vector of channels from c on, where
// of(values) has for each of them the value of its statistic.
template <class F>
FASTNORM_INLINE void by_statistic(size_t n, size_t span, const F& f) {
  if (span == 1)
    return for_columns<double>(n, [&](size_t c, auto how) FASTNORM_INLINE_LAMBDA {
      f(c, how, [&](const double* values) FASTNORM_INLINE_LAMBDA { return how.load(values + c); });
    });
  if (span < kLanes<double>) {
    const Packing packing(span);
    return packing.for_vectors(n, [&](size_t i, size_t c, auto how) FASTNORM_INLINE_LAMBDA {
      f(c, how, [&](const double* values) FASTNORM_INLINE_LAMBDA { return packing.load(values + i, how); });
    });
  }
  for (size_t i = 0; i < n; ++i)
    for_columns<double>(span, [&](size_t k, auto how) FASTNORM_INLINE_LAMBDA {
      f(i * span + k, how, [&](const double* values) FASTNORM_INLINE_LAMBDA { return broadcast(values[i]); });
    });
}

struct TwoSums {
  Vector<double> a, b;
};

// The same with sums over each statistic of what f returns, one after the other in `to_a` and `to_b`: those of several
// that a vector holds, or of two by half of the shuffles of each.
template <class F>
FASTNORM_INLINE void sum_by_statistic(size_t n, size_t span, double* to_a, double* to_b, const F& f) {
  if (span < kLanes<double>) {
    const Packing packing(span);
    return packing.for_vectors(n, [&](size_t i, size_t c, auto how) FASTNORM_INLINE_LAMBDA {
      const TwoSums own =
          f(c, how, [&](const double* values) FASTNORM_INLINE_LAMBDA { return packing.load(values + i, how); });
      packing.put(to_a + i, packing.sums(own.a), how);
      packing.put(to_b + i, packing.sums(own.b), how);
    });
  }
  for (size_t i = 0; i < n; i += 2) {
    Vector<double> sums[4] = {};
    repeat<2>([&](auto j) FASTNORM_INLINE_LAMBDA {
      if (i + j == n) return;
      const auto of = [&](const double* values) FASTNORM_INLINE_LAMBDA { return broadcast(values[i + j]); };
      Vector<double> a[4] = {}, b[4] = {};
      sum_run<double>(span, [&](size_t k, auto how, int to) FASTNORM_INLINE_LAMBDA {
        const TwoSums own = f((i + j) * span + k, how, of);
        a[to] += how.pick(own.a, Vector<double>{});
        b[to] += how.pick(own.b, Vector<double>{});
      });
      sums[j] = combined(a);
      sums[2 + j] = combined(b);
    });
    const FourDoubles all = totals<double>(sums);
    to_a[i] = all[0];
    to_b[i] = all[2];
    if (i + 1 == n) return;
    to_a[i + 1] = all[1];
    to_b[i + 1] = all[3];
  }
}

template <class A, class S>
inline void add(A* __restrict to, const S* __restrict more, size_t n) {
  for (size_t i = 0; i < n; ++i) to[i] += static_cast<A>(more[i]);
}

// Adds rows of n values to `to`, or begins it with the first of them.
template <class S>
inline void add_rows(double* to, const S* rows, size_t count, size_t n, bool begins) {
  if (count == 1 && begins) {
    std::copy_n(rows, n, to);
    return;
  }
  if (count == 1) return add(to, rows, n);
  for_columns<double>(n, [&](size_t c, auto how) FASTNORM_INLINE_LAMBDA {
    Vector<double> sum = load_doubles(rows + c, how);
    if (!begins) sum += how.load(to + c);
    for (size_t i = 1; i < count; ++i) sum += load_doubles(rows + i * n + c, how);
    put(to + c, sum, how);
  });
}

// Mean and m2 of each channel's first block, whose values are off a pivot by `off` in the mean.
template <class A>
inline void first_means(double* __restrict mean, double* __restrict m2, const A* __restrict pivot,
                        const A* __restrict off, const A* __restrict squares, size_t n) {
  for (size_t c = 0; c < n; ++c) {
    mean[c] = static_cast<double>(pivot[c]) + static_cast<double>(off[c]);
    m2[c] = static_cast<double>(squares[c]);
  }
}

// Merges those of a block of `more` elements into those of the `before` ones.
template <class A>
inline void merge_means(double* __restrict mean, double* __restrict m2, const A* __restrict pivot,
                        const A* __restrict off, const A* __restrict squares, size_t n, double before, double more) {
  const double share = more / (before + more), weight = before * share;
  for (size_t c = 0; c < n; ++c) {
    const double delta = static_cast<double>(pivot[c]) + static_cast<double>(off[c]) - mean[c];
    mean[c] += delta * share;
    m2[c] += static_cast<double>(squares[c]) + delta * delta * weight;
  }
}

// Those of a group of `more` elements into those of the groups before, of `before`.
inline void merge_each(double* __restrict mean, double* __restrict m2, const double* __restrict more_mean,
                       const double* __restrict more_m2, size_t n, double before, double more) {
  const double share = more / (before + more), weight = before * share;
  for (size_t c = 0; c < n; ++c) {
    const double delta = more_mean[c] - mean[c];
    mean[c] += delta * share;
    m2[c] += more_m2[c] + delta * delta * weight;
  }
}

// The part of a mean that its centre, the nearest A, leaves out.
template <class A>
FASTNORM_INLINE double rest_of(double mean) {
  return mean - static_cast<double>(static_cast<A>(mean));
}
template <class A>
FASTNORM_INLINE Vector<double> rest_of(Vector<double> mean) {
  return mean - doubles_of<A>(few_of<A>(mean));
}

// sum(dy) and sum(dy*(x - centre)) of channels: doubles, or of one block as it was added up.
template <class S>
struct BlockSums {
  const S *dy, *products;
};

// sum(dy*(x - centre)) to sum(dy*xhat).
template <class A, class S>
inline void products_with_xhat(double* __restrict to, BlockSums<S> sums, const double* __restrict mean,
                               const double* __restrict rstd, size_t n) {
  const S* __restrict dy = sums.dy, * __restrict products = sums.products;
  for (size_t c = 0; c < n; ++c) {
    const double rest = rest_of<A>(mean[c]);
    to[c] = rstd[c] * (static_cast<double>(products[c]) - rest * static_cast<double>(dy[c]));
  }
}

// f(std::true_type) or f(std::false_type): whether a parameter is there is decided outside of the loops below. In them
// gcc makes it the mask of a load, and one of nothing from address 0 takes 100 cycles: `apply` of (32, 1024) without
// gamma and beta 7.3 us instead of 2.0.
template <class F>
inline void decided(bool flag, F f) {
  if (flag)
    f(std::true_type{});
  else
    f(std::false_type{});
}

template <bool has_gamma, bool has_beta, class A>
inline void forward_coefficients(const Coefficients<A>& to, size_t n, size_t span, const double* mean,
                                 const double* rstd, const A* gamma, const A* beta) {
  by_statistic(n, span, [&](size_t c, auto how, const auto& of) FASTNORM_INLINE_LAMBDA {
    const Vector<double> means = of(mean), scale = has_gamma ? of(rstd) * load_doubles(gamma + c, how) : of(rstd),
                         off = rest_of<A>(means) * scale;
    put_doubles(to.centre + c, means, how);
    put_doubles(to.scale + c, scale, how);
    put_doubles(to.shift + c, has_beta ? load_doubles(beta + c, how) - off : -off, how);
  });
}

// Of n statistics, each of `span` channels.
template <class A>
inline void forward_coefficients(const Coefficients<A>& to, size_t n, size_t span, const double* mean,
                                 const double* rstd, const A* gamma, const A* beta) {
  decided(gamma != nullptr, [&](auto has_gamma) {
    decided(beta != nullptr, [&](auto has_beta) {
      forward_coefficients<has_gamma.value, has_beta.value>(to, n, span, mean, rstd, gamma, beta);
    });
  });
}

template <bool has_gamma, class A, class S>
inline void backward_coefficients(const Coefficients<A>& to, size_t n, const double* __restrict mean,
                                  const double* __restrict rstd, const A* __restrict gamma, const S* __restrict sum_dy,
                                  const double* __restrict sum_dy_xhat, double count) {
  A* __restrict scales = to.scale, * __restrict shifts = to.shift, * __restrict slopes = to.slope;
  const double share = 1.0 / count;
  for (size_t c = 0; c < n; ++c) {
    const double slope = -rstd[c] * sum_dy_xhat[c] * share;
    const double rest = rest_of<A>(mean[c]);
    scales[c] = static_cast<A>(rstd[c] * (has_gamma ? static_cast<double>(gamma[c]) : 1.0));
    shifts[c] = static_cast<A>(static_cast<double>(sum_dy[c]) * share + rest * slope);
    slopes[c] = static_cast<A>(slope);
  }
}

template <class A, class S>
inline void backward_coefficients(const Coefficients<A>& to, size_t n, const double* mean, const double* rstd,
                                  const A* gamma, const S* sum_dy, const double* sum_dy_xhat, double count) {
  decided(gamma != nullptr, [&](auto has_gamma) {
    backward_coefficients<has_gamma.value>(to, n, mean, rstd, gamma, sum_dy, sum_dy_xhat, count);
  });
}

// Of channels that share statistics, n of `span` channels: their scale; the sums of dy*xhat; and those over each
// statistic of dy*gamma and dy*xhat*gamma. The sums of dy*xhat not in place: a masked load waits for a masked store
// before it, in whose lanes it lies but not in the mask (in place, and added to the sums over samples there, (64, 4, 4,
// 96) backward took 46 us instead of 40 on one core). What follows from the sums over a statistic not here, where each
// would wait for its last addition: (28, 2, 2, 1280) backward 38 to 32 us on two threads.
template <bool has_gamma, class A, class S>
inline void shared_sums(A* scale, size_t n, size_t span, const double* mean, const double* rstd, const A* gamma,
                        BlockSums<S> sums, double* sum_dy_xhat, double* sum_g, double* sum_g_xhat) {
  sum_by_statistic(n, span, sum_g, sum_g_xhat, [&](size_t c, auto how, const auto& of) FASTNORM_INLINE_LAMBDA {
    const Vector<double> rstds = of(rstd), dy = load_doubles(sums.dy + c, how),
                         dy_xhat = rstds * (load_doubles(sums.products + c, how) - rest_of<A>(of(mean)) * dy);
    put(sum_dy_xhat + c, dy_xhat, how);
    if constexpr (!has_gamma) {
      put_doubles(scale + c, rstds, how);
      return TwoSums{dy, dy_xhat};
    }
    const Vector<double> gain = load_doubles(gamma + c, how);
    put_doubles(scale + c, rstds * gain, how);
    return TwoSums{dy * gain, dy_xhat * gain};
  });
}

template <class A, class S>
inline void shared_sums(A* scale, size_t n, size_t span, const double* mean, const double* rstd, const A* gamma,
                        BlockSums<S> sums, double* sum_dy_xhat, double* sum_g, double* sum_g_xhat) {
  decided(gamma != nullptr, [&](auto has_gamma) {
    shared_sums<has_gamma.value>(scale, n, span, mean, rstd, gamma, sums, sum_dy_xhat, sum_g, sum_g_xhat);
  });
}

// From these the shift and slope of n statistics of `count` elements, two or more.
template <class A>
inline void shared_coefficients(A* shift, A* slope, size_t n, const double* mean, const double* rstd,
                                const double* sum_g, const double* sum_g_xhat, double count) {
  const Vector<double> share = broadcast(1.0 / count);
  for_columns<double>(n, [&](size_t i, auto how) FASTNORM_INLINE_LAMBDA {
    const Vector<double> rstds = how.load(rstd + i), part = rstds * share,
                         slopes = -rstds * part * how.load(sum_g_xhat + i);
    put_doubles(slope + i, slopes, how);
    put_doubles(shift + i, -part * how.load(sum_g + i) - rest_of<A>(how.load(mean + i)) * slopes, how);
  });
}

// How a pass of sums reads columns: row by row, as they come from memory, or a strip of columns of all rows at once;
// and the elements from those being summed to those being fetched, of each array, 0 where none are.
struct Reading {
  bool by_rows;
  size_t ahead;
};

// The first unit of group g and the number of units in it.
inline size_t first_unit(const Cut& cut, size_t g) { return g * cut.per_group; }
inline size_t last_unit(const Cut& cut, size_t g) { return std::min(cut.units, (g + 1) * cut.per_group); }

// A unit's elements: rows [row, row + rows) by inner [at, at + length).
struct Unit {
  size_t row, rows, at, length;
};

inline Unit unit_at(const ChannelShape& shape, const Cut& cut, size_t u) {
  const size_t row = u / cut.pieces * cut.rows;
  const size_t at = u % cut.pieces * cut.piece;
  return {row, std::min(cut.rows, shape.outer - row), at, std::min(cut.piece, shape.inner - at)};
}

}  // namespace fastnorm::FASTNORM_LEVEL
