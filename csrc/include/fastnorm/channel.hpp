// The channel family: statistics per channel of (outer, channels, inner).
//
//   scalar:  y[o][c][i]  = (x[o][c][i] - mean[c])*rstd[c]*gamma[c] + beta[c]
//            dx[o][c][i] = gamma[c]*rstd[c]*(dy - sum_dy[c]/n - xhat*sum_dy_xhat[c]/n)
//
// Two geometries walk the memory: `Columns` where channels lie side by side, vectors across channels; `Runs` where
// each channel is long runs of `inner` elements, vectors along a run. Both cut a channel's elements into the same
// kind of groups; the driver here loops over samples, slabs of channels, and groups.
//
// A statistic belongs to `span` adjacent channels of one sample: BatchNorm is one sample and span 1, GroupNorm
// (group.hpp) is what else there is. Parameters belong to channels.
#pragma once

#include <cstdlib>
#include <initializer_list>
#include <new>

#include "fastnorm/columns.hpp"
#include "fastnorm/parallel.hpp"
#include "fastnorm/runs.hpp"

namespace fastnorm::FASTNORM_LEVEL {

// Memory for a call's partial results; the only allocation kernels make, never of the arrays' size. What small calls
// need lies on the stack, kHere elements: malloc and free of 60 KB took a quarter of the 0.57 us of BatchNorm on 4x8.
template <class A, size_t kHere = (size_t{8} << 10) / sizeof(A)>
class Workspace {
 public:
  explicit Workspace(size_t n) : memory_(n <= kHere ? here_ : allocate(n)) {}
  ~Workspace() {
    if (memory_ != here_) std::free(memory_);
  }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  A* data() const { return static_cast<A*>(memory_); }

 private:
  static void* allocate(size_t n) {
    void* const memory = std::aligned_alloc(kLineBytes, (n * sizeof(A) / kLineBytes + 1) * kLineBytes);
    if (memory == nullptr) throw std::bad_alloc();
    return memory;
  }

  alignas(kLineBytes) unsigned char here_[kHere * sizeof(A)];
  void* memory_;
};

// Where threads share what is done once a channel, a part of it is a multiple of so many channels.
constexpr size_t kPart = 128;

// Parts of channels for each thread, where groups are fewer.
constexpr size_t kSharedParts = 4;

// Channels of a slab in one group whose partial results lie on the stack.
constexpr size_t kFewChannels = 1024;

// A fence ends every task that threads share: streamed stores must be visible before they meet. One a task, not one a
// row: it waits for the stores, and made LayerNorm on rows of 128 twice as slow.
template <class F>
inline void fenced(void* task, size_t i, int worker) {
  (*static_cast<F*>(task))(i, worker);
  fence();
}

template <class F>
inline void parallel_for(size_t count, F task, Order order = Order::ascending) {
  run_tasks(count, fenced<F>, &task, order);
}

// What goes through a call's loops: one worker, or one of those that share each of them.
struct SerialLoop {
  int worker;
  size_t sharers() const { return 1; }
  template <class F>
  void operator()(size_t count, F f, Order order = Order::ascending) const {
    for (size_t i = 0; i < count; ++i) f(ordered(i, count, order), worker);
  }
};
struct SharedLoop {
  Member* member;
  size_t sharers() const { return member->members(); }
  template <class F>
  void operator()(size_t count, F f, Order order = Order::ascending) const {
    member->share(count, fenced<F>, &f, order);
  }
};

// body(loop) on every thread, whose loops they share, in one parallel region.
template <class F>
inline void together(F body) {
  run_together([](void* f, Member& member) { (*static_cast<F*>(f))(SharedLoop{&member}); }, &body);
}

// One call of the channel family: which of the passes run, on what.
template <class Geometry, class T>
struct ChannelCall {
  using A = Acc<T>;

  Geometry geometry;  // of a sample
  ChannelPlan plan;
  size_t samples, span;
  const T *dy, *x;
  double *mean, *var;  // one a statistic; written by the moments pass, else read
  double eps;
  const A *gamma, *beta;
  double *sum_dy, *sum_dy_xhat;  // written by the reduce pass, else read
  double divisor;                // of the sums
  T* out;

  // What slabs have in common, worked out once a call, by `run`: where groups are slabs of their own it took a
  // twentieth of the time of (16, 512, 14, 14) backward.
  struct Layout {
    size_t first, widest;  // channels of the first slab and of the widest
    size_t groups;         // whose partial results are kept
    size_t apart;          // values of one coefficient from one sample of a slab to the next
    size_t room;           // and of all its samples
    Cut joined;            // of channels that share a statistic and lie in one run
  };
  Layout layout{};
  bool begins = true;  // whether sums over samples begin with the first one, else are added to

  size_t channels() const { return geometry.shape.channels; }
  size_t groups() const { return geometry.cut.groups; }

  // The same call from this sample on, the first of its bundle or not; sums go to row `bundle` of theirs.
  ChannelCall from_sample(size_t sample, size_t bundle, bool first) const {
    ChannelCall one = *this;
    one.begins = first;
    const size_t elements = sample * size(), statistics = sample * (channels() / span);
    if (dy != nullptr) one.dy += elements;
    one.x += elements;
    if (out != nullptr) one.out += elements;
    one.mean += statistics;
    one.var += statistics;
    if (sum_dy != nullptr) {
      one.sum_dy += bundle * channels();
      one.sum_dy_xhat += bundle * channels();
    }
    return one;
  }
  size_t size() const { return geometry.shape.outer * channels() * geometry.shape.inner; }

  // Channels that share a statistic and lie in one run, as a single channel.
  bool joins() const { return span > 1 && geometry.shape.outer == 1; }
  Runs<T> joined() const { return {joined_shape(), layout.joined}; }
  ChannelShape joined_shape() const { return {1, channels() / span, span * geometry.shape.inner}; }

  void lay_out() {
    layout.first = first_slab();
    layout.widest = std::max(plan.slab, layout.first);
    const size_t walked = walked_at_once(layout.widest);
    // Whole lines, so that all coefficients are aligned: GroupNorm NHWC (18, 5, 5, 1109) forward 82 to 72 us.
    layout.apart = (geometry.spread_length(walked) + kLanes<A> - 1) / kLanes<A> * kLanes<A> + kPadding<A>;
    layout.room = layout.widest / walked * layout.apart;
    layout.groups = geometry.cut.in_line ? 0 : groups();  // none where it only writes
    if (joins()) {
      layout.joined = cut_channels(joined_shape());
      layout.groups = std::max(layout.groups, layout.joined.groups);
    }
  }
  // Doubles of a slab: what it has by statistic and by channel, and partial results of groups.
  size_t partials() const { return (2 * layout.groups + 3) * layout.widest; }
  // Four coefficients a channel, each spread as the geometry reads them.
  size_t coefficients() const { return 4 * layout.room; }

  // Channels [c0, c1) of a sample, or all of several samples.
  struct Slab {
    size_t c0, c1;
    double *first, *second;  // [groups][width]; the first row ends up as the sums of all groups
    double *mean, *rstd;     // by statistic
    double* dy_xhat;         // sum(dy*xhat) by channel
    double *g, *g_xhat;      // sum(dy*gamma) and sum(dy*xhat*gamma) of statistics that channels share
    Coefficients<A> k;
    size_t ahead;  // elements to the next slab of the same worker; 0 where none will be found in cache
    size_t width() const { return c1 - c0; }
  };

  // Slabs start where lines of the output start, if all rows are aligned alike: through the cache the first one is
  // wider (narrower it left one slab more, of a few columns: BatchNorm (256, 1024) forward took 30.9 us instead
  // of 29.2), past it narrower (wider (4096, 4096) backward took 6.3 ms instead of 5.8).
  size_t first_slab() const {
    const size_t line = kLineBytes / sizeof(T);
    const bool alike = geometry.cut.side_by_side && channels() % line == 0;
    if (out == nullptr || !alike || span > 1 || plan.slab >= channels() || plan.slab < 2 * line) return plan.slab;
    const size_t begun = reinterpret_cast<std::uintptr_t>(out) % kLineBytes / sizeof(T);
    return plan.stream ? plan.slab - begun : plan.slab + (line - begun) % line;
  }
  size_t slabs() const {
    return channels() <= layout.first ? 1 : 1 + (channels() - layout.first + plan.slab - 1) / plan.slab;
  }

  size_t first_channel(size_t slab) const { return slab == 0 ? 0 : layout.first + (slab - 1) * plan.slab; }

  Slab slab_at(size_t index, size_t samples_left, size_t ahead, double* partials, A* coefficients) const {
    Slab s{};
    s.c0 = first_channel(index);
    const size_t end = plan.slab > channels() ? samples_left * channels() : channels();
    s.c1 = std::min(end, layout.first + index * plan.slab);
    s.rstd = partials;
    s.mean = mean + s.c0 / span;
    s.g = partials + layout.widest;
    s.g_xhat = s.g + layout.widest / 2;
    s.dy_xhat = partials + 2 * layout.widest;
    s.first = partials + 3 * layout.widest;
    s.second = s.first + layout.groups * layout.widest;
    const size_t room = layout.room;
    const Coefficients<A> k{coefficients, coefficients + room, coefficients + 2 * room, coefficients + 3 * room};
    s.k = out == nullptr ? k : k.from(geometry.shift(out + s.c0 * geometry.shape.inner));
    s.ahead = ahead;
    return s;
  }

  // Of a slab of so many channels.
  Reading reading(size_t width, size_t arrays) const {
    return plan.stream ? geometry.reading(width >= channels(), arrays) : Reading{};
  }

  // f(at, n) for channels [at, at + n) of the slab, all of them in parts that threads share: what is done once a
  // channel between two loops over groups. In one part where channels are spread over columns or share statistics.
  template <class Loop, class F>
  void by_channel(const Slab& s, Loop loop, F f) const {
    const size_t width = s.width(), sharers = span == 1 && geometry.spread_length(1) == 1 ? loop.sharers() : 1;
    if (sharers == 1) return loop(1, [&](size_t, int) { f(0, width); });
    const size_t part = (width + sharers * kPart - 1) / (sharers * kPart) * kPart;
    loop((width + part - 1) / part, [&](size_t i, int) { f(i * part, std::min(part, width - i * part)); });
  }

  // What a geometry walks at once of a slab of so many channels: all of them where samples are one row each, folded or
  // single, since several are one row of more channels; else those of one sample.
  size_t walked_at_once(size_t n) const { return geometry.is_row() ? n : std::min(n, channels()); }
  struct Walked {
    size_t at, n;     // channels of the slab
    size_t c;         // the first of them, of its sample
    size_t elements;  // to its sample from that of the slab
    size_t place;     // of its first coefficient, before these are spread
  };
  // f(walked) for what is walked at once of the slab, or of its channels [at, at + n).
  template <class F>
  void by_walk(const Slab& s, F f) const {
    by_walk(s, 0, s.width(), f);
  }
  template <class F>
  void by_walk(const Slab& s, size_t at, size_t n, F f) const {
    const size_t each = walked_at_once(n);
    Walked w{at, each, s.c0 + at, 0, at};
    for (;; w.at += each, w.elements += size(), w.place += layout.apart, w.c = 0) {
      f(w);
      if (w.at + each >= at + n) return;
    }
  }

  // f(g, walked, worker) for each group and what is walked of it at once. Where threads share fewer groups than keep
  // them busy, as those of a few large statistics of short runs, channels go by in parts: GroupNorm NCL (3, 547, 1026)
  // in one group, two threads, backward 300 to 155 us.
  template <class Loop, class F>
  void by_group(const Slab& s, Loop loop, Order order, F f) const {
    const bool whole = loop.sharers() == 1 || geometry.cut.side_by_side || geometry.cut.in_line;
    const size_t width = s.width(), most = whole ? 1 : kSharedParts * loop.sharers() / groups(),
                 parts = std::clamp<size_t>(most, 1, width), part = (width + parts - 1) / parts;
    loop(
        groups() * parts,
        [&](size_t i, int worker) {
          const size_t at = i % parts * part;
          if (at < width) by_walk(s, at, std::min(part, width - at), [&](const Walked& w) { f(i / parts, w, worker); });
        },
        order);
  }

  // Moments of each channel, or of each statistic where its channels lie in one run, by group.
  template <class Loop>
  void group_moments(const Slab& s, Loop loop, A* workspace) const {
    if (joins())
      group_moments(joined(), span, s, loop, workspace);
    else
      group_moments(geometry, 1, s, loop, workspace);
  }
  template <class Of, class Loop>
  void group_moments(const Of& of, size_t each, const Slab& s, Loop loop, A* workspace) const {
    const size_t width = s.width() / each;
    const Reading how = reading(s.width(), 1);
    loop(of.cut.groups, [&](size_t g, int worker) {
      by_walk(s, [&](const Walked& w) {
        const size_t c = w.c / each, to = g * width + w.at / each;
        of.moments(x + w.elements, g, c, c + w.n / each, s.first + to, s.second + to,
                   workspace + static_cast<size_t>(worker) * Geometry::kWorkspace, how);
      });
    });
  }

  // From those of groups to mean and var of the statistics of channels [at, at + n) of the slab.
  void merge_groups(const Slab& s, size_t at, size_t n) const {
    const size_t statistic = (s.c0 + at) / span, statistics = n / span;
    if (span > 1 && !joins()) {
      const double count = merge_groups(geometry, s, s.width(), at, n);
      return merge_equal(count, s.first, s.second, span, statistics, mean + statistic, var + statistic);
    }
    const double count = joins() ? merge_groups(joined(), s, s.width() / span, at, statistics)
                                 : merge_groups(geometry, s, s.width(), at, n);
    std::copy_n(s.first + at, statistics, mean + statistic);
    for (size_t i = 0; i < statistics; ++i) var[statistic + i] = s.second[at + i] / count;
  }

  // Into the first of `groups` rows of `width`, columns [at, at + n); returns the count of elements of each.
  template <class Of>
  double merge_groups(const Of& of, const Slab& s, size_t width, size_t at, size_t n) const {
    double count = of.count(0);
    for (size_t g = 1; g < of.cut.groups; ++g) {
      const double more = of.count(g);
      merge_each(s.first + at, s.second + at, s.first + g * width + at, s.second + g * width + at, n, count, more);
      count += more;
    }
    return count;
  }

  // The rstd of the statistics of channels [at, at + n), for all passes but moments.
  void find_rstds(const Slab& s, size_t at, size_t n) const {
    rstds(s.rstd + at / span, var + (s.c0 + at) / span, n / span, eps);
  }

  static const A* from(const A* parameter, size_t c) { return parameter ? parameter + c : nullptr; }

  // Coefficients of channels [at, at + n) as the geometry reads them. A part of a slab has one a column, and they are
  // in place; the first ones follow the last ones, too.
  void spread(std::initializer_list<A*> of, const Slab& s, size_t at, size_t n, size_t each = 1) const {
    for (A* values : of)
      if (n == s.width())
        by_walk(s, at, n, [&](const Walked& w) { geometry.spread(values + w.place, w.n / each, each); });
      else if (at == 0)
        std::copy_n(values, kLanes<A>, values + s.width());
  }

  // For `apply`.
  void prepare(const Slab& s, size_t at, size_t n) const {
    by_walk(s, at, n, [&](const Walked& w) {
      const size_t of = w.at / span;
      forward_coefficients(s.k.from(w.place), w.n / span, span, s.mean + of, s.rstd + of, from(gamma, w.c),
                           from(beta, w.c));
    });
    spread({s.k.centre, s.k.scale, s.k.shift}, s, at, n);
  }

  template <class Loop>
  void apply(const Slab& s, Loop loop) const {
    by_group(s, loop, Order::descending, [&](size_t g, const Walked& w, int) {
      geometry.apply(x + w.elements, g, w.c, w.c + w.n, s.k.from(w.place), out + w.elements, plan.stream, s.ahead);
    });
  }

  // For `group_sums` and `write_dx`.
  void centre(const Slab& s, size_t at, size_t n) const {
    by_walk(s, at, n, [&](const Walked& w) {
      const double* const mean = s.mean + w.at / span;
      for (size_t i = 0; i < w.n / span; ++i) s.k.centre[w.place + i] = static_cast<A>(mean[i]);
    });
    spread({s.k.centre}, s, at, n, span);
  }

  // sum(dy) and sum(dy*(x - centre)) of each channel, by group.
  template <class Loop>
  void group_sums(const Slab& s, Loop loop, A* workspace) const {
    const size_t width = s.width();
    const Reading how = reading(width, 2);
    by_group(s, loop, Order::ascending, [&](size_t g, const Walked& w, int worker) {
      const size_t to = g * width + w.at;
      geometry.reduce(dy + w.elements, x + w.elements, g, w.c, w.c + w.n, s.k.centre + w.place, s.first + to,
                      s.second + to, workspace + static_cast<size_t>(worker) * Geometry::kWorkspace, how);
    });
  }

  // Those of all groups, of channels [at, at + n), in the slab's first row.
  void add_groups(const Slab& s, size_t at, size_t n) const {
    for (size_t g = 1; g < groups(); ++g) {
      add(s.first + at, s.first + g * s.width() + at, n);
      add(s.second + at, s.second + g * s.width() + at, n);
    }
  }

  // sum(dy*xhat) of channels with statistics of their own, and both sums added to those over samples.
  template <class S>
  void add_sums(const Slab& s, size_t at, size_t n, BlockSums<S> sums) const {
    products_with_xhat<A>(s.dy_xhat + at, sums, s.mean + at, s.rstd + at, n);
    add_to_samples(s, at, n, sums.dy);
  }
  template <class S>
  void add_to_samples(const Slab& s, size_t at, size_t n, const S* dy) const {
    const size_t count = n > channels() ? n / channels() : 1, each = std::min(n, channels()), c = s.c0 + at;
    add_rows(sum_dy + c, dy, count, each, begins);
    add_rows(sum_dy_xhat + c, s.dy_xhat + at, count, each, begins);
  }

  // For `write_dx`, as well as `centre`: from the sums over samples.
  void prepare_dx(const Slab& s, size_t at, size_t n) const {
    const size_t c = s.c0 + at;
    backward_coefficients(s.k.from(at), n, s.mean + at, s.rstd + at, from(gamma, c), sum_dy + c, sum_dy_xhat + c,
                          divisor);
    spread({s.k.scale, s.k.shift, s.k.slope}, s, at, n);
  }

  // With the statistics of each sample: from the sums of the slab, which are added to those over samples.
  template <class S>
  void prepare_dx_of_samples(const Slab& s, size_t at, size_t n, BlockSums<S> sums) const {
    if (span > 1) return prepare_shared_dx(s, sums);
    add_sums(s, at, n, sums);
    by_walk(s, at, n, [&](const Walked& w) {
      backward_coefficients(s.k.from(w.place), w.n, s.mean + w.at, s.rstd + w.at, from(gamma, w.c),
                            sums.dy + (w.at - at), s.dy_xhat + w.at, divisor);
    });
    spread({s.k.scale, s.k.shift, s.k.slope}, s, at, n);
  }
  template <class S>
  void prepare_shared_dx(const Slab& s, BlockSums<S> sums) const {
    const size_t n = s.width();
    by_walk(s, [&](const Walked& w) {
      const size_t of = w.at / span;
      shared_sums(s.k.scale + w.place, w.n / span, span, s.mean + of, s.rstd + of, from(gamma, w.c),
                  BlockSums<S>{sums.dy + w.at, sums.products + w.at}, s.dy_xhat + w.at, s.g + of, s.g_xhat + of);
    });
    by_walk(s, [&](const Walked& w) {
      const size_t of = w.at / span;
      shared_coefficients(s.k.shift + w.place, s.k.slope + w.place, w.n / span, s.mean + of, s.rstd + of, s.g + of,
                          s.g_xhat + of, divisor);
    });
    add_to_samples(s, 0, n, sums.dy);
    spread({s.k.scale}, s, 0, n);
    spread({s.k.shift, s.k.slope}, s, 0, n, span);
  }

  template <class Form, class Loop>
  void write_dx(const Slab& s, Loop loop) const {
    by_group(s, loop, Order::descending, [&](size_t g, const Walked& w, int) {
      geometry.template backward_apply<Form>(dy + w.elements, x + w.elements, g, w.c, w.c + w.n, s.k.from(w.place),
                                             out + w.elements, plan.stream, s.ahead);
    });
  }

  // What calls are made of, on one slab: its statistics; these and y; its sums, and then(at, n, sums) where those of
  // channels [at, at + n) are known.
  template <class Loop>
  void moments(const Slab& s, Loop loop, A* workspace) const {
    group_moments(s, loop, workspace);
    by_channel(s, loop, [&](size_t at, size_t n) { merge_groups(s, at, n); });
  }
  template <class Loop>
  void forward(const Slab& s, Loop loop, A* workspace) const {
    group_moments(s, loop, workspace);
    by_channel(s, loop, [&](size_t at, size_t n) {
      merge_groups(s, at, n);
      find_rstds(s, at, n);
      prepare(s, at, n);
    });
    apply(s, loop);
  }
  template <class Loop, class Then>
  void reduce(const Slab& s, Loop loop, A* workspace, Then then) const {
    by_channel(s, loop, [&](size_t at, size_t n) {
      find_rstds(s, at, n);
      centre(s, at, n);
    });
    if constexpr (std::is_same_v<Loop, SerialLoop> && Geometry::kWorkspace > 0)
      if (geometry.is_block(walked_at_once(s.width()), s.width())) {
        // As far into a vector as the first sample begins in memory.
        A* const own = workspace + static_cast<size_t>(loop.worker) * Geometry::kWorkspace +
                       geometry.shift(x + s.c0 * geometry.shape.inner);
        const Reading how = reading(s.width(), 2);
        BlockSums<A> all{};  // those of a sample follow those of the one before
        by_walk(s, [&](const Walked& w) {
          const BlockSums<A> sums = geometry.block_sums(dy + w.elements, x + w.elements, w.c, w.c + w.n,
                                                        s.k.centre + w.place, own + w.at, how);
          if (w.at == 0) all = sums;
        });
        return then(0, s.width(), all);
      }
    group_sums(s, loop, workspace);
    by_channel(s, loop, [&](size_t at, size_t n) {
      add_groups(s, at, n);
      then(at, n, BlockSums<double>{s.first + at, s.second + at});
    });
  }

  // With the sums of bundle b known for channels [c0, c1), adds up those of bundles that are neighbours, and of such
  // pairs and so on, in a tree that depends on their number alone: who comes second to a pair adds, mostly what is
  // still in its own cache. `met` counts who came. Two threads, us, by one thread when all tasks were done and like
  // this: (32, 512, 4, 4) backward 47.6 and 46.0, (32, 1280, 8, 8) 385 and 374.
  void gather(size_t b, size_t bundles, size_t c0, size_t c1, unsigned* met) const {
    for (size_t step = 1; step < bundles; step *= 2) {
      const size_t left = b / (2 * step) * (2 * step), right = left + step;
      b = left;
      if (right >= bundles) continue;
      if (__atomic_fetch_add(met + right, 1, __ATOMIC_ACQ_REL) == 0) return;
      add(sum_dy + left * channels() + c0, sum_dy + right * channels() + c0, c1 - c0);
      add(sum_dy_xhat + left * channels() + c0, sum_dy_xhat + right * channels() + c0, c1 - c0);
    }
  }

  // passes(call, slab, loop, workspace) runs the passes of this call on one slab. A task takes some slabs of a bundle
  // of samples, in the order of memory.
  template <class Passes>
  void run(Passes passes) {
    lay_out();
    const ChannelShape& one = geometry.shape;
    const Bundles all =
        bundles_of({samples, one.outer, one.channels, one.inner, one.channels / span}, sum_dy != nullptr);
    const size_t slabs = this->slabs(), bundles = all.count;
    const size_t workers = plan.serial ? 1 : static_cast<size_t>(num_threads());
    const size_t sets = plan.team ? 1 : workers;
    const Workspace<double, 5 * kFewChannels> doubles(sets * partials());
    const Workspace<A, Geometry::kWorkspace + 4 * (kFewChannels + kPadding<A>)> rest(sets * coefficients() +
                                                                                     workers * Geometry::kWorkspace);
    A* workspace = rest.data() + sets * coefficients();
    const size_t per_task = plan.team ? slabs : std::clamp<size_t>(bundles * slabs / (4 * workers), 1, 16);
    const size_t tasks_a_bundle = (slabs + per_task - 1) / per_task, tasks = bundles * tasks_a_bundle;
    const size_t at_once = std::max<size_t>(1, plan.slab / channels());
    // Parameters of the samples that are walked at once follow one another as their channels do.
    const size_t repeated = walked_at_once(layout.widest) > channels() ? layout.widest : 0;
    const Workspace<A> parameters(2 * repeated);
    if (repeated > 0)
      for (const A** parameter : {&gamma, &beta})
        if (*parameter != nullptr) {
          A* const to = parameters.data() + (parameter == &gamma ? 0 : repeated);
          for (size_t i = 0; i < repeated; i += channels()) std::copy_n(*parameter, channels(), to + i);
          *parameter = to;
        }
    // Bundles have sums of their own, the first of which end up as those of all.
    const bool gathers = sum_dy != nullptr && bundles > 1;
    const Workspace<unsigned> met(gathers ? tasks : 0);
    if (gathers) std::fill_n(met.data(), tasks, 0u);
    // Where a slab, and a task, starts in memory.
    const auto slab_start = [&](size_t sample, size_t slab) {
      return sample * size() + first_channel(slab) * geometry.shape.inner;
    };
    const auto task_start = [&](size_t task) {
      return slab_start(all.first(task / tasks_a_bundle), task % tasks_a_bundle * per_task);
    };
    const auto some = [&](size_t task, int worker, auto loop) {
      const size_t b = task / tasks_a_bundle, first = task % tasks_a_bundle * per_task;
      const size_t w = static_cast<size_t>(worker), end = std::min(slabs, first + per_task), last = all.first(b + 1),
                   next_task = task + 1;
      double* partial = doubles.data() + w * partials();
      A* lines = rest.data() + w * coefficients();
      for (size_t n = all.first(b); n < last; n += at_once) {
        const ChannelCall call = from_sample(n, b, n == all.first(b));
        for (size_t i = first; i < end; ++i) {
          const size_t here = slab_start(n, i);
          const size_t next = plan.passes > 1      ? here
                              : i + 1 < end        ? slab_start(n, i + 1)
                              : n + at_once < last ? slab_start(n + at_once, first)
                              : next_task < tasks  ? task_start(next_task)
                                                   : here;
          const size_t ahead = geometry.cut.in_line ? kReadAhead : next - here;
          passes(call, call.slab_at(i, last - n, ahead, partial, lines), loop, workspace);
        }
      }
    };
    const auto alone = [&](size_t task, int worker) {
      const size_t b = task / tasks_a_bundle, column = task % tasks_a_bundle, c0 = first_channel(column * per_task),
                   c1 = std::min(channels(), first_channel((column + 1) * per_task));
      some(task, worker, SerialLoop{worker});
      if (gathers) gather(b, bundles, c0, c1, met.data() + column * bundles);
    };
    if (plan.team)
      together([&](auto loop) {
        for (size_t task = 0; task < tasks; ++task) some(task, 0, loop);
        if (gathers)
          loop(1, [&](size_t, int) {
            for (size_t b = 0; b < bundles; ++b) gather(b, bundles, 0, channels(), met.data());
          });
      });
    else if (plan.serial)
      SerialLoop{0}(tasks, alone);
    else
      parallel_for(tasks, alone);
  }
};

// Calls f(geometry) with the one that walks a shape cut like this.
template <class T, class F>
inline void with_geometry(const ChannelShape& shape, const Cut& cut, F f) {
  if (cut.side_by_side)
    f(Columns<T>{shape, cut});
  else
    f(Runs<T>{shape, cut});
}

// Runs a call on samples whose statistics are of `span` channels each, with the geometry that walks them.
template <class T, class Passes>
inline void run_call(const ChannelShape& sample, size_t samples, size_t span, const Walk& walk, const T* dy, const T* x,
                     double* mean, double* var, double eps, const void* gamma, const void* beta, double* sum_dy,
                     double* sum_dy_xhat, double divisor, T* out, Passes passes) {
  using A = Acc<T>;
  with_geometry<T>(sample, walk.cut, [&](auto geometry) {
    ChannelCall<decltype(geometry), T> call{geometry,
                                            walk.plan,
                                            samples,
                                            span,
                                            dy,
                                            x,
                                            mean,
                                            var,
                                            eps,
                                            static_cast<const A*>(gamma),
                                            static_cast<const A*>(beta),
                                            sum_dy,
                                            sum_dy_xhat,
                                            divisor,
                                            out};
    call.run(passes);
  });
}

template <class T>
struct Channel {
  using A = Acc<T>;

  template <class Passes>
  static void call(ChannelShape shape, size_t arrays, const T* dy, const T* x, double* mean, double* var, double eps,
                   const void* gamma, const void* beta, double* sum_dy, double* sum_dy_xhat, double divisor, T* out,
                   Passes passes, bool only_writes = false) {
    const Walk walk = only_writes ? plan_written(shape, sizeof(T), arrays, num_threads())
                                  : Walk{plan_channels(shape, sizeof(T), arrays, num_threads()), cut_channels(shape)};
    run_call(shape, 1, 1, walk, dy, x, mean, var, eps, gamma, beta, sum_dy, sum_dy_xhat, divisor, out, passes);
  }

  static void moments(const T* x, ChannelShape shape, double* mean, double* var) {
    call(shape, 1, nullptr, x, mean, var, 0, nullptr, nullptr, nullptr, nullptr, 0, nullptr,
         [](const auto& c, const auto& s, auto loop, A* w) { c.moments(s, loop, w); });
  }
  static void apply(const T* x, ChannelShape shape, const double* mean, const double* var, double eps,
                    const void* gamma, const void* beta, T* y) {
    call(
        shape, 1, nullptr, x, const_cast<double*>(mean), const_cast<double*>(var), eps, gamma, beta, nullptr, nullptr,
        0, y,
        [](const auto& c, const auto& s, auto loop, A*) {
          c.by_channel(s, loop, [&](size_t at, size_t n) {
            c.find_rstds(s, at, n);
            c.prepare(s, at, n);
          });
          c.apply(s, loop);
        },
        /*only_writes=*/true);
  }
  static void forward(const T* x, ChannelShape shape, const void* gamma, const void* beta, double eps, T* y,
                      double* mean, double* var) {
    call(shape, 1, nullptr, x, mean, var, eps, gamma, beta, nullptr, nullptr, 0, y,
         [](const auto& c, const auto& s, auto loop, A* w) { c.forward(s, loop, w); });
  }
  static void reduce(const T* dy, const T* x, ChannelShape shape, const double* mean, const double* var, double eps,
                     double* sum_dy, double* sum_dy_xhat) {
    call(shape, 2, dy, x, const_cast<double*>(mean), const_cast<double*>(var), eps, nullptr, nullptr, sum_dy,
         sum_dy_xhat, 0, nullptr, [](const auto& c, const auto& s, auto loop, A* w) {
           c.reduce(s, loop, w, [&](size_t at, size_t n, const auto& sums) { c.add_sums(s, at, n, sums); });
         });
  }
  static void backward_apply(const T* dy, const T* x, ChannelShape shape, const double* mean, const double* var,
                             double eps, const void* gamma, const double* sum_dy, const double* sum_dy_xhat,
                             double count, T* dx) {
    call(
        shape, 2, dy, x, const_cast<double*>(mean), const_cast<double*>(var), eps, gamma, nullptr,
        const_cast<double*>(sum_dy), const_cast<double*>(sum_dy_xhat), count, dx,
        [](const auto& c, const auto& s, auto loop, A*) {
          c.by_channel(s, loop, [&](size_t at, size_t n) {
            c.find_rstds(s, at, n);
            c.centre(s, at, n);
            c.prepare_dx(s, at, n);
          });
          c.template write_dx<ScaledDescent>(s, loop);
        },
        /*only_writes=*/true);
  }
  static void backward(const T* dy, const T* x, ChannelShape shape, const double* mean, const double* var, double eps,
                       const void* gamma, T* dx, double* sum_dy, double* sum_dy_xhat) {
    call(shape, 2, dy, x, const_cast<double*>(mean), const_cast<double*>(var), eps, gamma, nullptr, sum_dy, sum_dy_xhat,
         static_cast<double>(shape.outer * shape.inner), dx, [](const auto& c, const auto& s, auto loop, A* w) {
           c.reduce(s, loop, w, [&](size_t at, size_t n, const auto& sums) {
             c.add_sums(s, at, n, sums);
             c.prepare_dx(s, at, n);
           });
           c.template write_dx<ScaledDescent>(s, loop);
         });
  }
};

}  // namespace fastnorm::FASTNORM_LEVEL
