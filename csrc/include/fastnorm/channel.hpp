// The channel family: statistics per channel of (outer, channels, inner).
//
//   scalar:  y[o][c][i]  = (x[o][c][i] - mean[c])*rstd[c]*gamma[c] + beta[c]
//            dx[o][c][i] = gamma[c]*rstd[c]*(dy - sum_dy[c]/n - xhat*sum_dy_xhat[c]/n)
//
// Two geometries walk the memory: `Columns` where channels lie side by side (inner is 1), vectors across
// channels; `Runs` where each channel is runs of `inner` elements, vectors along a run. Both cut a channel's
// elements into the same kind of groups; the driver below them loops over slabs of channels and groups.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>

#include "fastnorm/moments.hpp"
#include "fastnorm/parallel.hpp"
#include "fastnorm/plan.hpp"

namespace fastnorm::FASTNORM_LEVEL {

// What the elementwise passes need of each channel, in the accumulation dtype. With mean = centre + rest
// exactly, forward:  y = (x - centre)*scale + shift,    scale = gamma*rstd, shift = beta - rest*scale;
// backward: dx = scale*((dy - offset) + (x - centre)*descent).
template <class A>
struct Coefficients {
  A *centre, *scale, *shift, *descent;  // `shift` doubles as `offset`
};

template <class A>
inline void forward_coefficients(const Coefficients<A>& to, size_t n, const double* mean, const double* var, double eps,
                                 const A* gamma, const A* beta) {
  for (size_t c = 0; c < n; ++c) {
    const A centre = static_cast<A>(mean[c]);
    const double scale = rstd_of(var[c], eps) * (gamma ? static_cast<double>(gamma[c]) : 1.0);
    const double rest = mean[c] - static_cast<double>(centre);
    to.centre[c] = centre;
    to.scale[c] = static_cast<A>(scale);
    to.shift[c] = static_cast<A>((beta ? static_cast<double>(beta[c]) : 0.0) - rest * scale);
  }
}

template <class A>
inline void backward_coefficients(const Coefficients<A>& to, size_t n, const double* mean, const double* var,
                                  double eps, const A* gamma, const double* sum_dy, const double* sum_dy_xhat,
                                  double count) {
  for (size_t c = 0; c < n; ++c) {
    const A centre = static_cast<A>(mean[c]);
    const double rstd = rstd_of(var[c], eps);
    const double descent = -rstd * sum_dy_xhat[c] / count;
    const double rest = mean[c] - static_cast<double>(centre);
    to.centre[c] = centre;
    to.scale[c] = static_cast<A>(rstd * (gamma ? static_cast<double>(gamma[c]) : 1.0));
    to.shift[c] = static_cast<A>(sum_dy[c] / count + rest * descent);
    to.descent[c] = static_cast<A>(descent);
  }
}

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

// ---- channels as runs along inner -------------------------------------------------------------------

template <class T>
struct Runs {
  using A = Acc<T>;
  ChannelShape shape;
  Cut cut;

  size_t place(const Unit& u, size_t c) const { return (u.row * shape.channels + c) * shape.inner + u.at; }
  size_t stride() const { return shape.channels * shape.inner; }

  double count(size_t g) const {
    size_t n = 0;
    for (size_t i = first_unit(cut, g); i < last_unit(cut, g); ++i) {
      const Unit u = unit_at(shape, cut, i);
      n += u.rows * u.length;
    }
    return static_cast<double>(n);
  }

  // Channel c over group g, its blocks merged in order.
  Moments group_moments(const T* x, size_t g, size_t c) const {
    if (cut.units == 1) return block_moments(x + c * shape.inner, shape.outer, stride(), shape.inner);
    Moments m{};
    for (size_t i = first_unit(cut, g); i < last_unit(cut, g); ++i) {
      const Unit u = unit_at(shape, cut, i);
      m = merge(m, block_moments(x + place(u, c), u.rows, stride(), u.length));
    }
    return m;
  }

  // mean and m2 of channels [c0, c1) over group g: `group_moments` of each, block by block, since channels
  // lie next to one another.
  void moments(const T* x, size_t g, size_t c0, size_t c1, double* mean, double* m2, A*) const {
    double n = 0;
    for (size_t i = first_unit(cut, g); i < last_unit(cut, g); ++i) {
      const Unit u = unit_at(shape, cut, i);
      for (size_t c = c0; c < c1; ++c) {
        const Moments block = block_moments(x + place(u, c), u.rows, stride(), u.length);
        const Moments merged = merge({n, mean[c - c0], m2[c - c0]}, block);
        mean[c - c0] = merged.mean;
        m2[c - c0] = merged.m2;
      }
      n += static_cast<double>(u.rows * u.length);
    }
  }

  void apply(const T* x, size_t g, size_t c0, size_t c1, const Coefficients<A>& k, T* y, bool past_cache,
             size_t ahead) const {
    Writer<T> writer(past_cache);
    for (size_t i = first_unit(cut, g); i < last_unit(cut, g); ++i) {
      const Unit u = unit_at(shape, cut, i);
      for (size_t r = 0; r < u.rows; ++r)
        for (size_t c = c0; c < c1; ++c) {
          const size_t at = place(u, c) + r * stride();
          const Vector<A> centre = broadcast(k.centre[c - c0]), scale = broadcast(k.scale[c - c0]),
                          shift = broadcast(k.shift[c - c0]);
          const T* from = x + at;
          writer.run(y + at, u.length, Ahead<T, 1>{{from + ahead}}, [&](size_t j, auto how) FASTNORM_INLINE_LAMBDA {
            return mul_add(how.load(from + j) - centre, scale, shift);
          });
        }
    }
  }

  // sum(dy) and sum(dy*(x - centre)) of channels [c0, c1) over group g.
  void reduce(const T* dy, const T* x, size_t g, size_t c0, size_t c1, const A* centres, double* sum_dy,
              double* sum_dyx, A*) const {
    std::fill_n(sum_dy, c1 - c0, 0.0);
    std::fill_n(sum_dyx, c1 - c0, 0.0);
    for (size_t i = first_unit(cut, g); i < last_unit(cut, g); ++i) {
      const Unit u = unit_at(shape, cut, i);
      for (size_t c = c0; c < c1; ++c) {
        const Vector<A> centre = broadcast(centres[c - c0]);
        Vector<A> grads[4] = {}, products[4] = {};
        for (size_t r = 0; r < u.rows; ++r) {
          const size_t at = place(u, c) + r * stride();
          sum_run<A>(u.length, [&](size_t j, auto how, int k) FASTNORM_INLINE_LAMBDA {
            const Vector<A> grad = how.load(dy + at + j);
            grads[k] += grad;
            products[k] = mul_add(grad, how.load(x + at + j, centre) - centre, products[k]);
          });
        }
        sum_dy[c - c0] += total<A>(combined(grads));
        sum_dyx[c - c0] += total<A>(combined(products));
      }
    }
  }

  void backward_apply(const T* dy, const T* x, size_t g, size_t c0, size_t c1, const Coefficients<A>& k, T* dx,
                      bool past_cache, size_t ahead) const {
    Writer<T> writer(past_cache);
    for (size_t i = first_unit(cut, g); i < last_unit(cut, g); ++i) {
      const Unit u = unit_at(shape, cut, i);
      for (size_t r = 0; r < u.rows; ++r)
        for (size_t c = c0; c < c1; ++c) {
          const size_t at = place(u, c) + r * stride();
          const Vector<A> centre = broadcast(k.centre[c - c0]), scale = broadcast(k.scale[c - c0]),
                          offset = broadcast(k.shift[c - c0]), descent = broadcast(k.descent[c - c0]);
          const T *grad = dy + at, *from = x + at;
          writer.run(dx + at, u.length, Ahead<T, 2>{{grad + ahead, from + ahead}},
                     [&](size_t j, auto how) FASTNORM_INLINE_LAMBDA {
                       return scale * mul_add(how.load(from + j) - centre, descent, how.load(grad + j) - offset);
                     });
        }
    }
  }
};

// ---- channels side by side --------------------------------------------------------------------------

// Calls f(c, how) for the vectors of columns [0, n).
template <class A, class F>
FASTNORM_INLINE void for_columns(size_t n, const F& f) {
  size_t c = 0;
  for (; c + kLanes<A> <= n; c += kLanes<A>) f(c, Whole{});
  if (c < n) f(c, Part{n - c});
}

template <class A, class How>
FASTNORM_INLINE void put(A* p, Vector<A> v, How how) {
  if constexpr (std::is_same_v<How, Part>)
    store_part(p, v, how.n);
  else
    store(p, v);
}

// Few channels make short rows; `fold` rows together are then treated as one (Cut::fold), with the sums of a
// channel's `fold` columns added up at the end of a block.
template <class T>
struct Columns {
  using A = Acc<T>;
  // Columns of a block whose rows are summed together: a block is then 256 KB of float32 at most, and its second
  // pass reads L2.
  static constexpr size_t kWidth = 1024;
  static constexpr size_t kWorkspace = 4 * kWidth;

  ChannelShape shape;
  Cut cut;

  double count(size_t g) const { return static_cast<double>(last_row(g) - first_row(g)); }
  size_t first_row(size_t g) const { return first_unit(cut, g) * cut.rows; }
  size_t last_row(size_t g) const { return std::min(shape.outer, last_unit(cut, g) * cut.rows); }

  // values[0, n) again and again, `fold` times.
  static void repeat(A* values, size_t n, size_t fold) {
    for (size_t j = 1; j < fold; ++j) std::copy_n(values, n, values + j * n);
  }

  // Rows [0, rows) of a block, eight at a time: eight streams for the prefetcher, and the sums are read and
  // written once for all eight. add(offset, c, how, sum): the sum with the element at offset in column c added.
  template <class F>
  FASTNORM_INLINE static void sum_rows(size_t rows, size_t stride, size_t n, A* sums, const F& add) {
    size_t r = 0;
    for (; r + 8 <= rows; r += 8)
      for_columns<A>(n, [&](size_t c, auto how) FASTNORM_INLINE_LAMBDA {
        const size_t at = r * stride + c;
        Vector<A> even = how.load(sums + c), odd{};
        for (size_t j = 0; j < 8; j += 2) {
          even = add(at + j * stride, c, how, even);
          odd = add(at + (j + 1) * stride, c, how, odd);
        }
        put(sums + c, even + odd, how);
      });
    for (; r < rows; ++r)
      for_columns<A>(n, [&](size_t c, auto how) FASTNORM_INLINE_LAMBDA {
        put(sums + c, add(r * stride + c, c, how, how.load(sums + c)), how);
      });
  }

  // All rows of a block of n channels: folded rows, then those left over, then the sum over a channel's columns.
  template <class F>
  FASTNORM_INLINE void sum_block(const Unit& u, size_t n, A* sums, const F& add) const {
    const size_t wide = n * cut.fold, folded = u.rows / cut.fold, done = folded * cut.fold * shape.channels;
    std::fill_n(sums, wide, A{});
    sum_rows(folded, shape.channels * cut.fold, wide, sums, add);
    sum_rows(u.rows % cut.fold, shape.channels, n, sums,
             [&](size_t at, size_t c, auto how, Vector<A> sum)
                 FASTNORM_INLINE_LAMBDA { return add(done + at, c, how, sum); });
    for (size_t j = 1; j < cut.fold; ++j)
      for (size_t c = 0; c < n; ++c) sums[c] += sums[j * n + c];
  }

  void moments(const T* x, size_t g, size_t c0, size_t c1, double* mean, double* m2, A* workspace) const {
    A *sums = workspace, *pivot = workspace + kWidth, *centre = workspace + 2 * kWidth, *rest = workspace + 3 * kWidth;
    double before = 0;
    for (size_t i = first_unit(cut, g); i < last_unit(cut, g); ++i) {
      const Unit u = unit_at(shape, cut, i);
      const double rows = static_cast<double>(u.rows);
      const double share = rows / (before + rows);
      for (size_t w = c0; w < c1; w += kWidth) {
        const size_t n = std::min(kWidth, c1 - w);
        const T* block = x + u.row * shape.channels + w;
        for_columns<A>(n, [&](size_t c, auto how) FASTNORM_INLINE_LAMBDA { put(pivot + c, how.load(block + c), how); });
        repeat(pivot, n, cut.fold);
        sum_block(u, n, sums, [&](size_t at, size_t c, auto how, Vector<A> sum) FASTNORM_INLINE_LAMBDA {
          return sum + (how.load(block + at) - how.load(pivot + c));
        });
        const Vector<A> divisor = broadcast(static_cast<A>(rows));
        for_columns<A>(n, [&](size_t c, auto how) FASTNORM_INLINE_LAMBDA {
          // mean = pivot + d as centre + rest, exactly (Knuth's two-sum)
          const Vector<A> first = how.load(pivot + c), d = how.load(sums + c) / divisor;
          const Vector<A> sum = first + d, virtual_d = sum - first;
          put(centre + c, sum, how);
          put(rest + c, (first - (sum - virtual_d)) + (d - virtual_d), how);
        });
        repeat(centre, n, cut.fold);
        sum_block(u, n, sums, [&](size_t at, size_t c, auto how, Vector<A> sum) FASTNORM_INLINE_LAMBDA {
          const Vector<A> d = how.load(block + at) - how.load(centre + c);
          return mul_add(d, d, sum);
        });
        double *to_mean = mean + (w - c0), *to_m2 = m2 + (w - c0);
        for (size_t c = 0; c < n; ++c) {
          const double low = rest[c], squares = static_cast<double>(sums[c]) - rows * low * low;
          const double block_mean = static_cast<double>(centre[c]) + low;
          const double block_m2 = squares < 0.0 ? 0.0 : squares;
          const double delta = before == 0 ? 0.0 : block_mean - to_mean[c];
          const double base_mean = before == 0 ? block_mean : to_mean[c];
          const double base_m2 = before == 0 ? 0.0 : to_m2[c];
          to_mean[c] = base_mean + delta * share;
          to_m2[c] = base_m2 + block_m2 + delta * delta * (before * share);
        }
      }
      before += rows;
    }
  }

  // sum(dy) and sum(dy*(x - centre)) of channels [c0, c1) over group g; `centres` is repeated for the fold.
  void reduce(const T* dy, const T* x, size_t g, size_t c0, size_t c1, const A* centres, double* sum_dy,
              double* sum_dyx, A* workspace) const {
    A *grads = workspace, *products = workspace + kWidth;
    std::fill_n(sum_dy, c1 - c0, 0.0);
    std::fill_n(sum_dyx, c1 - c0, 0.0);
    for (size_t i = first_unit(cut, g); i < last_unit(cut, g); ++i) {
      const Unit u = unit_at(shape, cut, i);
      for (size_t w = c0; w < c1; w += kWidth) {
        const size_t n = std::min(kWidth, c1 - w), wide = n * cut.fold;
        const A* centre = centres + (w - c0);
        const size_t block = u.row * shape.channels + w;
        std::fill_n(grads, wide, A{});
        std::fill_n(products, wide, A{});
        const auto add = [&](auto rows, size_t width, size_t start, size_t stride) FASTNORM_INLINE_LAMBDA {
          for_columns<A>(width, [&](size_t c, auto how) FASTNORM_INLINE_LAMBDA {
            Vector<A> grad_sum = how.load(grads + c), product_sum = how.load(products + c);
            const Vector<A> middle = how.load(centre + c);
            for (size_t j = 0; j < rows; ++j) {
              const size_t at = start + j * stride + c;
              const Vector<A> grad = how.load(dy + at);
              grad_sum += grad;
              product_sum = mul_add(grad, how.load(x + at) - middle, product_sum);
            }
            put(grads + c, grad_sum, how);
            put(products + c, product_sum, how);
          });
        };
        constexpr std::integral_constant<size_t, 4> four;
        constexpr std::integral_constant<size_t, 1> one;
        const size_t folded = u.rows / cut.fold, stride = shape.channels * cut.fold;
        size_t r = 0;
        for (; r + 4 <= folded; r += 4) add(four, wide, block + r * stride, stride);
        for (; r < folded; ++r) add(one, wide, block + r * stride, stride);
        for (r = folded * cut.fold; r < u.rows; ++r) add(one, n, block + r * shape.channels, shape.channels);
        for (size_t j = 0; j < cut.fold; ++j)
          for (size_t c = 0; c < n; ++c) {
            sum_dy[w - c0 + c] += static_cast<double>(grads[j * n + c]);
            sum_dyx[w - c0 + c] += static_cast<double>(products[j * n + c]);
          }
      }
    }
  }

  // run(offset, n) for group g's rows of channels [c0, c1), `fold` rows at a time.
  template <class F>
  FASTNORM_INLINE void over_rows(size_t g, size_t c0, size_t c1, const F& run) const {
    const size_t last = last_row(g);
    for (size_t r = first_row(g); r < last; r += cut.fold)
      run(r * shape.channels + c0, (c1 - c0) * std::min(cut.fold, last - r));
  }

  void apply(const T* x, size_t g, size_t c0, size_t c1, const Coefficients<A>& k, T* y, bool past_cache,
             size_t ahead) const {
    Writer<T> writer(past_cache);
    over_rows(g, c0, c1, [&](size_t at, size_t n) FASTNORM_INLINE_LAMBDA {
      writer.run(y + at, n, Ahead<T, 1>{{x + at + ahead}}, [&](size_t c, auto how) FASTNORM_INLINE_LAMBDA {
        return mul_add(how.load(x + at + c) - how.load(k.centre + c), how.load(k.scale + c), how.load(k.shift + c));
      });
    });
  }

  void backward_apply(const T* dy, const T* x, size_t g, size_t c0, size_t c1, const Coefficients<A>& k, T* dx,
                      bool past_cache, size_t ahead) const {
    Writer<T> writer(past_cache);
    over_rows(g, c0, c1, [&](size_t at, size_t n) FASTNORM_INLINE_LAMBDA {
      writer.run(dx + at, n, Ahead<T, 2>{{dy + at + ahead, x + at + ahead}},
                 [&](size_t c, auto how) FASTNORM_INLINE_LAMBDA {
                   const Vector<A> centred = how.load(x + at + c) - how.load(k.centre + c);
                   return how.load(k.scale + c) *
                          mul_add(centred, how.load(k.descent + c), how.load(dy + at + c) - how.load(k.shift + c));
                 });
    });
  }
};

// ---- the driver: slabs, groups, threads -------------------------------------------------------------

// Memory for a call's partial results; the only allocation kernels make, never of the arrays' size.
template <class A>
class Workspace {
 public:
  explicit Workspace(size_t n)
      : memory_(std::aligned_alloc(kLineBytes, (n * sizeof(A) / kLineBytes + 1) * kLineBytes)) {
    if (memory_ == nullptr) throw std::bad_alloc();
  }
  ~Workspace() { std::free(memory_); }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  A* data() const { return static_cast<A*>(memory_); }

 private:
  void* memory_;
};

// A fence ends every task: streamed stores must be visible before the threads meet. One a task, not one a row: it
// waits for the stores, and made LayerNorm on rows of 128 twice as slow.
template <class F>
inline void parallel_for(size_t count, F task) {
  run_tasks(
      count,
      [](void* f, size_t i, int worker) {
        (*static_cast<F*>(f))(i, worker);
        fence();
      },
      &task);
}

struct SerialLoop {
  int worker;
  template <class F>
  void operator()(size_t count, F f) const {
    for (size_t i = 0; i < count; ++i) f(i, worker);
  }
};
struct ParallelLoop {
  template <class F>
  void operator()(size_t count, F f) const {
    parallel_for(count, f);
  }
};

// Elements below which waking threads costs more than it saves: a parallel region takes 3 us, a core goes over
// this many float32 in 10.
constexpr size_t kSerial = 1 << 16;

// One channel-family call: which of the four passes run, on what.
template <class Geometry, class T>
struct ChannelCall {
  using A = Acc<T>;

  Geometry geometry;
  ChannelPlan plan;
  const T *dy, *x;
  double *mean, *var;  // written by the moments pass, else read
  double eps;
  const A *gamma, *beta;
  double *sum_dy, *sum_dy_xhat;  // written by the reduce pass, else read
  double divisor;                // of the sums
  T* out;

  size_t channels() const { return geometry.shape.channels; }
  size_t groups() const { return geometry.cut.groups; }

  // Partial results of all groups, two doubles a channel, then four coefficients a channel, then what the
  // geometry needs for itself: per worker.
  size_t partial_doubles() const { return 2 * groups() * plan.slab; }
  // Coefficients of a slab: four arrays of a value for each channel, repeated for the fold.
  size_t coefficients() const { return 4 * plan.slab * geometry.cut.fold; }
  void repeat(A* values, size_t n) const { Columns<T>::repeat(values, n, geometry.cut.fold); }
  static constexpr size_t geometry_workspace() {
    if constexpr (std::is_same_v<Geometry, Columns<T>>) return Geometry::kWorkspace;
    return 0;
  }

  struct Slab {
    size_t c0, c1;
    double *first, *second;  // [groups][width]
    Coefficients<A> k;
    size_t ahead;  // elements to the next slab of the same worker
    size_t width() const { return c1 - c0; }
  };

  // Slabs start where lines of the output start, if all rows are aligned alike: the first one is narrower.
  size_t first_slab() const {
    const size_t line = kLineBytes / sizeof(T);
    const bool alike = geometry.shape.inner == 1 && channels() % line == 0;
    if (out == nullptr || !alike || plan.slab >= channels() || plan.slab < 2 * line) return plan.slab;
    return plan.slab - reinterpret_cast<std::uintptr_t>(out) % kLineBytes / sizeof(T);
  }
  size_t slabs() const {
    const size_t first = first_slab();
    return channels() <= first ? 1 : 1 + (channels() - first + plan.slab - 1) / plan.slab;
  }

  Slab slab_at(size_t index, bool last, double* partials, A* coefficients) const {
    Slab s{};
    s.c0 = index == 0 ? 0 : first_slab() + (index - 1) * plan.slab;
    s.c1 = std::min(channels(), first_slab() + index * plan.slab);
    s.first = partials;
    s.second = partials + groups() * plan.slab;
    const size_t room = plan.slab * geometry.cut.fold;
    s.k = {coefficients, coefficients + room, coefficients + 2 * room, coefficients + 3 * room};
    s.ahead = last ? kReadAhead : s.width() * geometry.shape.inner;
    return s;
  }

  template <class Loop>
  void moments(const Slab& s, Loop loop, A* workspace) const {
    const size_t width = s.width();
    loop(groups(), [&](size_t g, int worker) {
      geometry.moments(x, g, s.c0, s.c1, s.first + g * width, s.second + g * width,
                       workspace + static_cast<size_t>(worker) * geometry_workspace());
    });
    double *to_mean = mean + s.c0, *to_var = var + s.c0;
    std::copy_n(s.first, width, to_mean);
    std::copy_n(s.second, width, to_var);
    double n = geometry.count(0);
    for (size_t g = 1; g < groups(); ++g) {
      const double more = geometry.count(g), share = more / (n + more);
      for (size_t c = 0; c < width; ++c) {
        const double delta = s.first[g * width + c] - to_mean[c];
        to_mean[c] += delta * share;
        to_var[c] += s.second[g * width + c] + delta * delta * (n * share);
      }
      n += more;
    }
    for (size_t c = 0; c < width; ++c) to_var[c] /= n;
  }

  // Last group first: what the pass before has just read is still in cache.
  template <class Loop>
  void apply(const Slab& s, Loop loop) const {
    forward_coefficients(s.k, s.width(), mean + s.c0, var + s.c0, eps, gamma ? gamma + s.c0 : nullptr,
                         beta ? beta + s.c0 : nullptr);
    for (A* values : {s.k.centre, s.k.scale, s.k.shift}) repeat(values, s.width());
    loop(groups(),
         [&](size_t i, int) { geometry.apply(x, groups() - 1 - i, s.c0, s.c1, s.k, out, plan.stream, s.ahead); });
  }

  template <class Loop>
  void reduce(const Slab& s, Loop loop, A* workspace) const {
    const size_t width = s.width();
    for (size_t c = 0; c < width; ++c) s.k.centre[c] = static_cast<A>(mean[s.c0 + c]);
    repeat(s.k.centre, width);
    loop(groups(), [&](size_t g, int worker) {
      geometry.reduce(dy, x, g, s.c0, s.c1, s.k.centre, s.first + g * width, s.second + g * width,
                      workspace + static_cast<size_t>(worker) * geometry_workspace());
    });
    for (size_t c = 0; c < width; ++c) {
      double grads = 0, products = 0;
      for (size_t g = 0; g < groups(); ++g) {
        grads += s.first[g * width + c];
        products += s.second[g * width + c];
      }
      const double m = mean[s.c0 + c], rest = m - static_cast<double>(s.k.centre[c]);
      sum_dy[s.c0 + c] = grads;
      sum_dy_xhat[s.c0 + c] = rstd_of(var[s.c0 + c], eps) * (products - rest * grads);
    }
  }

  template <class Loop>
  void backward_apply(const Slab& s, Loop loop) const {
    backward_coefficients(s.k, s.width(), mean + s.c0, var + s.c0, eps, gamma ? gamma + s.c0 : nullptr, sum_dy + s.c0,
                          sum_dy_xhat + s.c0, divisor);
    for (A* values : {s.k.centre, s.k.scale, s.k.shift, s.k.descent}) repeat(values, s.width());
    loop(groups(), [&](size_t i, int) {
      geometry.backward_apply(dy, x, groups() - 1 - i, s.c0, s.c1, s.k, out, plan.stream, s.ahead);
    });
  }

  // passes(slab, loop, workspace) runs the passes of this call on one slab.
  template <class Passes>
  void run(Passes passes) const {
    const size_t slabs = this->slabs();
    const size_t workers = static_cast<size_t>(num_threads());
    const size_t sets = plan.team ? 1 : workers;
    Workspace<double> partials(sets * partial_doubles());
    Workspace<A> rest(sets * coefficients() + workers * geometry_workspace());
    A* workspace = rest.data() + sets * coefficients();
    if (plan.team) {
      for (size_t i = 0; i < slabs; ++i)
        passes(slab_at(i, i + 1 == slabs, partials.data(), rest.data()), ParallelLoop{}, workspace);
      return;
    }
    const size_t per_task = std::clamp<size_t>(slabs / (4 * workers), 1, 16);
    const auto some = [&](size_t task, int worker) {
      const size_t w = static_cast<size_t>(worker), end = std::min(slabs, (task + 1) * per_task);
      for (size_t i = task * per_task; i < end; ++i)
        passes(slab_at(i, i + 1 == end, partials.data() + w * partial_doubles(), rest.data() + w * coefficients()),
               SerialLoop{worker}, workspace);
    };
    const size_t tasks = (slabs + per_task - 1) / per_task;
    if (geometry.shape.outer * channels() * geometry.shape.inner < kSerial)
      SerialLoop{0}(tasks, some);
    else
      parallel_for(tasks, some);
  }
};

// Calls f(geometry) with the one that fits the shape.
template <class T, class F>
inline void with_geometry(const ChannelShape& shape, F f) {
  const Cut cut = cut_channels(shape);
  if (shape.inner == 1)
    f(Columns<T>{shape, cut});
  else
    f(Runs<T>{shape, cut});
}

template <class T>
struct Channel {
  using A = Acc<T>;

  template <class Passes>
  static void call(ChannelShape shape, size_t arrays, const T* dy, const T* x, double* mean, double* var, double eps,
                   const void* gamma, const void* beta, double* sum_dy, double* sum_dy_xhat, double divisor, T* out,
                   Passes passes) {
    const bool small = shape.outer * shape.channels * shape.inner < kSerial;
    const ChannelPlan plan =
        small ? ChannelPlan{shape.channels, false, false} : plan_channels(shape, sizeof(T), arrays, num_threads());
    with_geometry<T>(shape, [&](auto geometry) {
      const ChannelCall<decltype(geometry), T> call{
          geometry, plan,        dy,      x,  mean, var, eps, static_cast<const A*>(gamma), static_cast<const A*>(beta),
          sum_dy,   sum_dy_xhat, divisor, out};
      call.run([&](const auto& slab, auto loop, A* workspace) { passes(call, slab, loop, workspace); });
    });
  }

  static void moments(const T* x, ChannelShape shape, double* mean, double* var) {
    call(shape, 1, nullptr, x, mean, var, 0, nullptr, nullptr, nullptr, nullptr, 0, nullptr,
         [](const auto& c, const auto& s, auto loop, A* w) { c.moments(s, loop, w); });
  }
  static void apply(const T* x, ChannelShape shape, const double* mean, const double* var, double eps,
                    const void* gamma, const void* beta, T* y) {
    call(shape, 1, nullptr, x, const_cast<double*>(mean), const_cast<double*>(var), eps, gamma, beta, nullptr, nullptr,
         0, y, [](const auto& c, const auto& s, auto loop, A*) { c.apply(s, loop); });
  }
  static void forward(const T* x, ChannelShape shape, const void* gamma, const void* beta, double eps, T* y,
                      double* mean, double* var) {
    call(shape, 1, nullptr, x, mean, var, eps, gamma, beta, nullptr, nullptr, 0, y,
         [](const auto& c, const auto& s, auto loop, A* w) {
           c.moments(s, loop, w);
           c.apply(s, loop);
         });
  }
  static void reduce(const T* dy, const T* x, ChannelShape shape, const double* mean, const double* var, double eps,
                     double* sum_dy, double* sum_dy_xhat) {
    call(shape, 2, dy, x, const_cast<double*>(mean), const_cast<double*>(var), eps, nullptr, nullptr, sum_dy,
         sum_dy_xhat, 0, nullptr, [](const auto& c, const auto& s, auto loop, A* w) { c.reduce(s, loop, w); });
  }
  static void backward_apply(const T* dy, const T* x, ChannelShape shape, const double* mean, const double* var,
                             double eps, const void* gamma, const double* sum_dy, const double* sum_dy_xhat,
                             double count, T* dx) {
    call(shape, 2, dy, x, const_cast<double*>(mean), const_cast<double*>(var), eps, gamma, nullptr,
         const_cast<double*>(sum_dy), const_cast<double*>(sum_dy_xhat), count, dx,
         [](const auto& c, const auto& s, auto loop, A*) { c.backward_apply(s, loop); });
  }
  static void backward(const T* dy, const T* x, ChannelShape shape, const double* mean, const double* var, double eps,
                       const void* gamma, T* dx, double* sum_dy, double* sum_dy_xhat) {
    call(shape, 2, dy, x, const_cast<double*>(mean), const_cast<double*>(var), eps, gamma, nullptr, sum_dy, sum_dy_xhat,
         static_cast<double>(shape.outer * shape.inner), dx, [](const auto& c, const auto& s, auto loop, A* w) {
           c.reduce(s, loop, w);
           c.backward_apply(s, loop);
         });
  }
};

}  // namespace fastnorm::FASTNORM_LEVEL
