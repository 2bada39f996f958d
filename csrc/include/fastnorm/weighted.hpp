// Moments with weights, each channel's own sums of them.
//
//   scalar:  pivot = mean of the block's first elements of a weight other than 0
//            d = x - pivot, and 0 where the weight is 0: what is left out may be NaN
//            count = sum(w);  mean = pivot + sum(w*d)/count
//            m2 = sum(w*d^2) - sum(w*d)^2/count; where that would cancel, the same again with this mean as the pivot
//   merge:   as without weights, count for n
//
// One weight an element, in the layout of x, or one a position (outer, inner), which all channels share. What is no
// weight, negative or not finite, leaves its channel a count that is not finite, so nobody has to look for it first.
#pragma once

#include "fastnorm/channel.hpp"

namespace fastnorm::FASTNORM_LEVEL {

template <class T>
struct Weighted {
  using A = Acc<T>;
  using V = Vector<A>;
  static constexpr size_t kWidth = kBlockColumns, kPitch = Columns<T>::kPitch;
  // Eight arrays by channel, and the weights of a block of folded rows.
  static constexpr size_t kSpread = kChunkRows / 2 * kFoldedRow, kWorkspace = 8 * kPitch + kSpread;
  // Elements of a task where channels are runs, about.
  static constexpr size_t kTask = size_t{1} << 16;

  // Count, mean and m2 by channel.
  struct Table {
    double *count, *mean, *m2;
    Table from(size_t c) const { return {count + c, mean + c, m2 + c}; }
    void clear(size_t n) const {
      for (double* values : {count, mean, m2}) std::fill_n(values, n, 0.0);
    }
  };
  template <class S>
  struct Sums {
    S weight, first, square;
  };

  const T* x;
  const A* weights;
  bool each;  // one an element, else one a position
  ChannelShape shape;
  Cut cut;

  FASTNORM_INLINE static V none() { return V{}; }
  FASTNORM_INLINE static V deviation(V weight, V value, V pivot) { return weight != none() ? value - pivot : none(); }
  FASTNORM_INLINE static void add(Sums<V&> to, V weight, V d) {
    const V product = weight * d;
    to.weight += weight >= none() ? weight : broadcast(std::numeric_limits<A>::quiet_NaN());
    to.first += product;
    to.square = mul_add(product, d, to.square);
  }

  // Merges more(c) into the moments of channel c. Either may have no weight at all.
  template <class F>
  FASTNORM_INLINE static void merge_each(const Table& to, size_t n, const F& more) {
    double* __restrict counts = to.count, * __restrict means = to.mean, * __restrict squares = to.m2;
    for (size_t c = 0; c < n; ++c) {
      const Moments b = more(c);
      const double before = counts[c], count = before + b.n, share = count > 0.0 ? b.n / count : 0.0;
      const double delta = b.mean - means[c], between = before * share;
      means[c] += delta * share;
      squares[c] += b.m2 + (between > 0.0 ? delta * delta * between : 0.0);
      counts[c] = count;
    }
  }

  // ---- channels that are runs ----

  // `runs` runs of `length` elements, `stride` elements apart, `weight_stride` weights.
  struct Block {
    const T* x;
    const A* w;
    size_t runs, stride, weight_stride, length;
  };

  // Runs that lanes sum before they are added up in float64, so that short ones do not make many terms of a lane. Equal
  // weights round all to one side: summed whole, those of 6,000 runs of two elements were off by 450 u, of which the
  // tolerances allow 119.
  static constexpr size_t kTogether = 32;

  FASTNORM_INLINE static Sums<double> sums_around(V pivot, const Block& b) {
    Sums<double> sums{};
    for (size_t first = 0; first < b.runs; first += kTogether) {
      V weights[4] = {}, firsts[4] = {}, squares[4] = {};
      for (size_t r = first; r < std::min(b.runs, first + kTogether); ++r) {
        const T* x = b.x + r * b.stride;
        const A* w = b.w + r * b.weight_stride;
        sum_run<A>(b.length, [&](size_t i, auto how, int k) FASTNORM_INLINE_LAMBDA {
          const V weight = how.load(w + i);
          add({weights[k], firsts[k], squares[k]}, weight, deviation(weight, how.load(x + i), pivot));
        });
      }
      sums.weight += total<A>(combined(weights));
      sums.first += total<A>(combined(firsts));
      sums.square += total<A>(combined(squares));
    }
    return sums;
  }

  // The mean of those that are not left out among a few elements, the first of which is not.
  FASTNORM_INLINE static V pivot_of(const T* x, const A* w, size_t length) {
    const V first = broadcast<A>(load_part(x, 1, none())[0]);
    V sums[4] = {}, kept[4] = {};
    sum_run<A>(std::min(length, kPivotElements), [&](size_t i, auto how, int k) FASTNORM_INLINE_LAMBDA {
      const V weight = how.load(w + i);
      sums[k] += deviation(weight, how.load(x + i), first);
      kept[k] += weight != none() ? broadcast(A(1)) : none();
    });
    return first + broadcast(static_cast<A>(total<A>(combined(sums)) / total<A>(combined(kept))));
  }

  FASTNORM_INLINE static Moments block_moments(const Block& b) {
    size_t r = 0, i = 0;
    while (r < b.runs && b.w[r * b.weight_stride + i] == A{})
      if (++i == b.length) {
        i = 0;
        ++r;
      }
    if (r == b.runs) return {};
    V pivot = pivot_of(b.x + r * b.stride + i, b.w + r * b.weight_stride + i, b.length - i);
    Sums<double> d = sums_around(pivot, b);
    double share = 1.0 / d.weight;
    if (cancels(d.first * (d.first * share), d.square)) {
      pivot = broadcast(static_cast<A>(static_cast<double>(pivot[0]) + d.first * share));
      d = sums_around(pivot, b);
    }
    const double m2 = d.square - d.first * (d.first * share);
    return {d.weight, static_cast<double>(pivot[0]) + d.first * share, m2 < 0.0 ? 0.0 : m2};
  }

  void runs(size_t g, size_t c0, size_t c1, const Table& to) const {
    const Runs<T> walk{shape, cut};
    for (size_t i = first_unit(cut, g); i < last_unit(cut, g); ++i) {
      const Unit u = unit_at(shape, cut, i);
      const size_t weight_stride = each ? walk.stride() : shape.inner;
      for (size_t c = c0; c < c1; ++c) {
        const size_t place = walk.place(u, c);
        const A* w = weights + (each ? place : u.row * shape.inner + u.at);
        const Moments more = block_moments({x + place, w, u.rows, walk.stride(), weight_stride, u.length});
        merge_each(to.from(c - c0), 1, [&](size_t) { return more; });
      }
    }
  }

  // ---- channels side by side ----

  // Weights of the vector of columns at (row, offset) of a block.
  template <bool by_element, class How>
  FASTNORM_INLINE static V weight_at(const A* w, size_t row, size_t at, How how, V fill = V{}) {
    if constexpr (by_element)
      return how.load(w + at, fill);
    else
      return broadcast(w[row]);
  }

  // For each channel its first value that is not left out, then the mean of those among the first rows.
  template <bool by_element>
  void first_pivots(const T* block, const A* w, size_t rows, size_t n, A* pivots) const {
    const size_t stride = shape.channels, some = std::min(rows, Columns<T>::kPivotRows);
    for_columns<A>(n, [&](size_t c, auto how) FASTNORM_INLINE_LAMBDA {
      V pivot{}, sum{}, kept{};
      Indices<A> sought = none() == none();
      for (size_t r = 0, at = c; r < rows && any<A>(sought); ++r, at += stride) {
        const Indices<A> here = sought & (weight_at<by_element>(w, r, at, how, broadcast(A(1))) != none());
        pivot = here ? how.load(block + at) : pivot;
        sought &= ~here;
      }
      for (size_t r = 0, at = c; r < some; ++r, at += stride) {
        const V weight = weight_at<by_element>(w, r, at, how);
        sum += deviation(weight, how.load(block + at), pivot);
        kept += weight != none() ? broadcast(A(1)) : none();
      }
      put(pivots + c, pivot + sum / (kept != none() ? kept : broadcast(A(1))), how);
    });
  }

  template <bool by_element>
  FASTNORM_INLINE void sum_around(const T* block, const A* w, const Unit& u, size_t n, const A* pivots,
                                  const Sums<A*>& sums) const {
    Columns<T>{shape, cut}.template sum_block<Columns<T>::kAddedUp>(
        block, u, n, 0, /*by_rows=*/false, {sums.weight, sums.first, sums.square},
        [&](size_t row, size_t at, size_t c, V value, auto how, auto& sum) FASTNORM_INLINE_LAMBDA {
          const V weight = weight_at<by_element>(w, row, at, how);
          add({sum[0], sum[1], sum[2]}, weight, deviation(weight, value, how.load(pivots + c)));
        });
  }

  // From the sums to the mean of d and m2, in place; m2 is -1 where it cancels. Returns whether one does.
  static bool settle(const Sums<A*>& sums, size_t n) {
    Indices<A> cancelled{};
    for_columns<A>(n, [&](size_t c, auto how) FASTNORM_INLINE_LAMBDA {
      const V weight = how.load(sums.weight + c), first = how.load(sums.first + c), square = how.load(sums.square + c),
              mean = weight != none() ? first / weight : none(), off_pivot = first * mean;
      const Indices<A> kept =
          (off_pivot <= broadcast(A(0.5)) * square) & (off_pivot <= broadcast(std::numeric_limits<A>::max()));
      cancelled |= ~kept;
      put(sums.first + c, mean, how);
      put(sums.square + c, kept ? square - off_pivot : broadcast(A(-1)), how);
    });
    return any<A>(cancelled);
  }

  // Once more around the means just found, taken over by the channels that need it.
  template <bool by_element>
  void settle_again(const T* block, const A* w, const Unit& u, size_t n, A* near, const Sums<A*>& sums,
                    A* workspace) const {
    A* pivots = workspace;
    const Sums<A*> again{workspace + kPitch, workspace + 2 * kPitch, workspace + 3 * kPitch};
    for (size_t c = 0; c < n; ++c) pivots[c] = near[c] + sums.first[c];
    Columns<T>{shape, cut}.spread(pivots, n);
    sum_around<by_element>(block, w, u, n, pivots, again);
    for (size_t c = 0; c < n; ++c) {
      if (sums.square[c] >= 0) continue;
      const double first = again.first[c], mean = first / static_cast<double>(again.weight[c]),
                   m2 = static_cast<double>(again.square[c]) - first * mean;
      near[c] += sums.first[c];
      sums.first[c] = static_cast<A>(mean);
      sums.square[c] = static_cast<A>(m2 < 0.0 ? 0.0 : m2);  // NaN stays
    }
  }

  template <bool by_element>
  void columns(size_t g, size_t c0, size_t c1, const Table& to, A* workspace) const {
    const size_t n = c1 - c0, piece = cut.fold > 1 ? n : Columns<T>::kSettled;
    A *near = workspace, *pivots = workspace + 4 * kPitch, *spread = workspace + 8 * kPitch;
    const Sums<A*> sums{workspace + kPitch, workspace + 2 * kPitch, workspace + 3 * kPitch};
    for (size_t i = first_unit(cut, g); i < last_unit(cut, g); ++i) {
      const Unit u = unit_at(shape, cut, i);
      const T* block = x + u.row * shape.channels + c0;
      const A* w = weights + (each ? u.row * shape.channels + c0 : u.row);
      if (by_element && !each) {
        for (size_t r = 0; r < u.rows; ++r) std::fill_n(spread + r * shape.channels, shape.channels, w[r]);
        w = spread;
      }
      if (std::all_of(to.count, to.count + n, [](double count) { return count > 0.0; }))
        for (size_t c = 0; c < n; ++c) near[c] = static_cast<A>(to.mean[c]);
      else
        first_pivots<by_element>(block, w, u.rows, n, near);
      std::copy_n(near, n, pivots);
      Columns<T>{shape, cut}.spread(pivots, n);
      sum_around<by_element>(block, w, u, n, pivots, sums);
      for (size_t p = 0; p < n; p += piece) {
        const size_t some = std::min(piece, n - p);
        const Sums<A*> part{sums.weight + p, sums.first + p, sums.square + p};
        if (settle(part, some))
          settle_again<by_element>(block + p, by_element ? w + p : w, u, some, near + p, part, pivots);
      }
      merge_each(to, n, [&](size_t c) FASTNORM_INLINE_LAMBDA {
        return Moments{static_cast<double>(sums.weight[c]),
                       static_cast<double>(near[c]) + static_cast<double>(sums.first[c]),
                       static_cast<double>(sums.square[c])};
      });
    }
  }

  // ---- the call ----

  // A task is a group of some channels. The first group's moments, and then all groups', are in `found`.
  void run(const Table& found) const {
    const size_t groups = cut.groups, channels = shape.channels;
    const size_t step =
        cut.side_by_side ? kWidth : std::clamp<size_t>(kTask / (cut.per_group * cut.rows * cut.piece), 1, channels);
    const size_t blocks = (channels + step - 1) / step;
    const Workspace<double> partial(3 * (groups - 1) * channels);
    const Workspace<A> rest(static_cast<size_t>(num_threads()) * kWorkspace);
    const auto table = [&](size_t g) {
      double* first = partial.data() + 3 * (g - 1) * channels;
      return g == 0 ? found : Table{first, first + channels, first + 2 * channels};
    };
    const auto measure = [&](size_t task, int worker) {
      const size_t g = task / blocks, c0 = task % blocks * step, c1 = std::min(channels, c0 + step);
      const Table to = table(g).from(c0);
      A* workspace = rest.data() + static_cast<size_t>(worker) * kWorkspace;
      to.clear(c1 - c0);
      if (!cut.side_by_side)
        runs(g, c0, c1, to);
      else if (each || cut.fold > 1)
        columns<true>(g, c0, c1, to, workspace);
      else
        columns<false>(g, c0, c1, to, workspace);
    };
    const auto merge_groups = [&](size_t task, int) {
      const size_t c0 = task * kWidth, n = std::min(kWidth, channels - c0);
      const Table to = found.from(c0);
      for (size_t g = 1; g < groups; ++g) {
        const Table more = table(g).from(c0);
        merge_each(to, n,
                   [&](size_t c) FASTNORM_INLINE_LAMBDA { return Moments{more.count[c], more.mean[c], more.m2[c]}; });
      }
      for (size_t c = 0; c < n; ++c) to.m2[c] = to.count[c] > 0.0 ? to.m2[c] / to.count[c] : 0.0;
    };
    const auto loop = [&](bool serial, size_t count, auto task) {
      if (serial)
        SerialLoop{0}(count, task);
      else
        parallel_for(count, task);
    };
    loop(shape.outer * channels * shape.inner < kSerial, groups * blocks, measure);
    loop(groups * channels < kSerial, (channels + kWidth - 1) / kWidth, merge_groups);
  }

  static void moments(const T* x, ChannelShape shape, const void* weights, bool each, double* count, double* mean,
                      double* var) {
    Weighted{x, static_cast<const A*>(weights), each, shape, cut_weighted(shape)}.run({count, mean, var});
  }
};

}  // namespace fastnorm::FASTNORM_LEVEL
