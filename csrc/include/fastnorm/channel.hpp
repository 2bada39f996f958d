// The channel family: statistics per channel of (outer, channels, inner).
//
//   scalar:  y[o][c][i]  = (x[o][c][i] - mean[c])*rstd[c]*gamma[c] + beta[c]
//            dx[o][c][i] = gamma[c]*rstd[c]*(dy - sum_dy[c]/n - xhat*sum_dy_xhat[c]/n)
//
// Two geometries walk the memory: `Columns` where channels lie side by side, vectors across channels; `Runs` where
// each channel is long runs of `inner` elements, vectors along a run. Both cut a channel's elements into the same
// kind of groups; the driver here loops over slabs of channels and groups.
#pragma once

#include <cstdlib>
#include <new>

#include "fastnorm/columns.hpp"
#include "fastnorm/parallel.hpp"
#include "fastnorm/runs.hpp"

namespace fastnorm::FASTNORM_LEVEL {

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
  // Coefficients of a slab: four arrays of a value for each channel, spread as the geometry reads them.
  size_t coefficients() const { return 4 * geometry.spread_length(plan.slab); }

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
    const bool alike = geometry.cut.side_by_side && channels() % line == 0;
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
    const size_t room = geometry.spread_length(plan.slab);
    s.k = {coefficients, coefficients + room, coefficients + 2 * room, coefficients + 3 * room};
    s.ahead = last ? kReadAhead : s.width() * geometry.shape.inner;
    return s;
  }

  template <class Loop>
  void moments(const Slab& s, Loop loop, A* workspace) const {
    const size_t width = s.width();
    loop(groups(), [&](size_t g, int worker) {
      geometry.moments(x, g, s.c0, s.c1, s.first + g * width, s.second + g * width,
                       workspace + static_cast<size_t>(worker) * Geometry::kWorkspace);
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
    for (A* values : {s.k.centre, s.k.scale, s.k.shift}) geometry.spread(values, s.width());
    loop(groups(),
         [&](size_t i, int) { geometry.apply(x, groups() - 1 - i, s.c0, s.c1, s.k, out, plan.stream, s.ahead); });
  }

  template <class Loop>
  void reduce(const Slab& s, Loop loop, A* workspace) const {
    const size_t width = s.width();
    for (size_t c = 0; c < width; ++c) s.k.centre[c] = static_cast<A>(mean[s.c0 + c]);
    geometry.spread(s.k.centre, width);
    loop(groups(), [&](size_t g, int worker) {
      geometry.reduce(dy, x, g, s.c0, s.c1, s.k.centre, s.first + g * width, s.second + g * width,
                      workspace + static_cast<size_t>(worker) * Geometry::kWorkspace);
    });
    for (size_t c = 0; c < width; ++c) {
      double grads = 0, products = 0;
      for (size_t g = 0; g < groups(); ++g) {
        grads += s.first[g * width + c];
        products += s.second[g * width + c];
      }
      const double m = mean[s.c0 + c], rest = m - static_cast<double>(static_cast<A>(m));
      sum_dy[s.c0 + c] = grads;
      sum_dy_xhat[s.c0 + c] = rstd_of(var[s.c0 + c], eps) * (products - rest * grads);
    }
  }

  template <class Loop>
  void backward_apply(const Slab& s, Loop loop) const {
    backward_coefficients(s.k, s.width(), mean + s.c0, var + s.c0, eps, gamma ? gamma + s.c0 : nullptr, sum_dy + s.c0,
                          sum_dy_xhat + s.c0, divisor);
    for (A* values : {s.k.centre, s.k.scale, s.k.shift, s.k.descent}) geometry.spread(values, s.width());
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
    Workspace<A> rest(sets * coefficients() + workers * Geometry::kWorkspace);
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
  if (cut.side_by_side)
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
    const ChannelPlan plan = plan_channels(shape, sizeof(T), arrays, num_threads());
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
