// Channels as runs of `inner` elements: vectors along a run, one channel after the other.
#pragma once

#include "fastnorm/coefficients.hpp"

namespace fastnorm::FASTNORM_LEVEL {

template <class T>
struct Runs {
  using A = Acc<T>;
  static constexpr size_t kWorkspace = 0;
  // Runs of at most so many elements have their moments taken four at a time: longer ones leave a first-level cache.
  static constexpr size_t kInFours = kChunk / 4;

  // Runs of at most so many vectors have their products summed without a loop: (2, 512, 7, 7) backward 13.8 to 12.0 us
  // on one core, (16, 256, 100) 49.0 to 47.6 on two.
  static constexpr size_t kNoLoop = 8;

  ChannelShape shape;
  Cut cut;

  // A channel's value serves its runs as it is; n values, each for `span` channels.
  size_t spread_length(size_t n) const { return n; }
  void spread(A* values, size_t n, size_t span = 1) const { repeat_each(values, values, n, span); }
  bool is_row() const { return shape.outer == 1; }
  size_t shift(const T*) const { return 0; }
  Reading reading(bool, size_t) const { return {}; }

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

  // Channel c of rows that lie in one run each, over group g, its blocks merged in order; around 0 unless `centred`.
  Moments group_moments(const T* x, size_t g, size_t c, bool centred) const {
    Moments m{};
    for (size_t i = first_unit(cut, g); i < last_unit(cut, g); ++i) {
      const Unit u = unit_at(shape, cut, i);
      const T* block = x + place(u, c);
      m = merge(m, centred ? block_moments(block, u.rows, stride(), u.length) : block_squares(block, u.length));
    }
    return m;
  }

  // mean and m2 of channels [c0, c1) over group g: `group_moments` of each, block by block, since channels
  // lie next to one another.
  void moments(const T* x, size_t g, size_t c0, size_t c1, double* mean, double* m2, A*, Reading) const {
    double n = 0;
    for (size_t i = first_unit(cut, g); i < last_unit(cut, g); ++i) {
      const Unit u = unit_at(shape, cut, i);
      const auto keep = [&](size_t c, const Moments& block) FASTNORM_INLINE_LAMBDA {
        const Moments merged = merge({n, mean[c - c0], m2[c - c0]}, block);
        mean[c - c0] = merged.mean;
        m2[c - c0] = merged.m2;
      };
      size_t c = c0;
      if (u.rows == 1 && u.length == shape.inner && u.length <= kInFours)
        for (; c + 4 <= c1; c += 4) {
          Moments found[4];
          four_moments(x + place(u, c), u.length, found);
          for (size_t k = 0; k < 4; ++k) keep(c + k, found[k]);
        }
      for (; c < c1; ++c) keep(c, block_moments(x + place(u, c), u.rows, stride(), u.length));
      n += static_cast<double>(u.rows * u.length);
    }
  }

  // What `count` coefficients of a channel are to all lanes of a vector; or to the first `n`, the others being of the
  // next channel.
  template <size_t count>
  struct Line {
    Vector<A> of[count];
    FASTNORM_INLINE Line mixed(const Line& next, size_t n) const {
      const Indices<A> mine = lane_numbers<A>() < static_cast<Index<A>>(n);
      Line line;
      repeat<count>([&](auto k) FASTNORM_INLINE_LAMBDA { line.of[k] = mine ? of[k] : next.of[k]; });
      return line;
    }
  };

  // Writes group g's runs of channels [c0, c1), those of one row after another: line(c) is what channel c needs,
  // value(at, how, line) the vector of offset `at`.
  template <size_t count, class Fetch, class Of, class Value>
  FASTNORM_INLINE void write_runs(size_t g, size_t c0, size_t c1, T* out, bool past_cache, const Fetch& fetch,
                                  const Of& line, const Value& value) const {
    const bool adjacent = !past_cache && cut.pieces == 1 && shape.inner >= kLanes<A>;
    Writer<T> writer(past_cache);
    // `width` runs of `length` from offset `at` on, the first of them of channel c.
    const auto write = [&](size_t at, size_t c, size_t width, size_t length) FASTNORM_INLINE_LAMBDA {
      if (adjacent)
        return write_row<count>(at, width, out, [&](size_t k) FASTNORM_INLINE_LAMBDA { return line(c + k); }, value);
      for (size_t k = 0; k < width; ++k, at += shape.inner) {
        const Line<count> own = line(c + k);
        writer.run(out + at, length, fetch(at),
                   [&](size_t j, auto how) FASTNORM_INLINE_LAMBDA { return value(at + j, how, own); });
      }
    };
    size_t i = first_unit(cut, g);
    const size_t end = last_unit(cut, g);
    if (cut.in_line) {
      for (size_t width; i < end; i += width) {
        const size_t run = i / cut.pieces, piece = i % cut.pieces, c = run % shape.channels, begun = piece * cut.piece;
        width = cut.pieces > 1 ? 1 : std::min(end - i, shape.channels - c);
        write(run * shape.inner + begun, c, width, std::min(cut.piece, shape.inner - begun));
      }
      return;
    }
    for (; i < end; ++i) {
      const Unit u = unit_at(shape, cut, i);
      for (size_t r = 0; r < u.rows; ++r) write(place(u, c0) + r * stride(), 0, c1 - c0, u.length);
    }
  }

  // `width` runs that follow one another from offset `at` on, in whole aligned vectors: one in which a channel ends
  // and the next begins is computed once, with the coefficients of both.
  template <size_t count, class Of, class Value>
  FASTNORM_INLINE void write_row(size_t at, size_t width, T* out, const Of& line, const Value& value) const {
    constexpr size_t lanes = kLanes<A>;
    size_t end = at + shape.inner;  // of the channel's run
    Line<count> own = line(0);
    if (const size_t begun = reinterpret_cast<std::uintptr_t>(out + at) % (lanes * sizeof(T)) / sizeof(T)) {
      store_part(out + at, value(at, Part{lanes - begun}, own), lanes - begun);
      at += lanes - begun;
    }
    for (size_t c = 1;; ++c) {
      for (; at + lanes <= end; at += lanes) store(out + at, value(at, Whole{}, own));
      if (c == width) break;
      const Line<count> next = line(c);
      if (at < end) {
        store(out + at, value(at, Whole{}, own.mixed(next, end - at)));
        at += lanes;
      }
      own = next;
      end += shape.inner;
    }
    if (at < end) store_part(out + at, value(at, Part{end - at}, own), end - at);
  }

  void apply(const T* x, size_t g, size_t c0, size_t c1, const Coefficients<A>& k, T* y, bool past_cache,
             size_t ahead) const {
    write_runs<3>(
        g, c0, c1, y, past_cache, [&](size_t at) FASTNORM_INLINE_LAMBDA { return Ahead<T, 1>{{x + at}, ahead}; },
        [&](size_t c) FASTNORM_INLINE_LAMBDA {
          return Line<3>{{broadcast(k.centre[c]), broadcast(k.scale[c]), broadcast(k.shift[c])}};
        },
        [&](size_t at, auto how, const Line<3>& l)
            FASTNORM_INLINE_LAMBDA { return mul_add(how.load(x + at) - l.of[0], l.of[1], l.of[2]); });
  }

  // sum(dy) and sum(dy*(x - centre)) of a channel's unit, by lane.
  struct Products {
    Vector<A> grad, product;
  };
  FASTNORM_INLINE Products products(const T* dy, const T* x, const Unit& u, size_t c, A centre_of_c) const {
    const Vector<A> centre = broadcast(centre_of_c);
    Vector<A> grads[4] = {}, products[4] = {};
    for (size_t r = 0; r < u.rows; ++r) {
      const size_t at = place(u, c) + r * stride();
      const auto add = [&](size_t j, auto how, int k) FASTNORM_INLINE_LAMBDA {
        const Vector<A> grad = how.load(dy + at + j);
        grads[k] += grad;
        products[k] = mul_add(grad, how.load(x + at + j, centre) - centre, products[k]);
      };
      sum_run<A>(u.length, add, u.rows == 1 ? begun_at(x + at, u.length) : 0);
    }
    return {combined(grads), combined(products)};
  }
  // The same of one run of so many vectors, without a loop, the first ones added to nothing.
  template <size_t vectors>
  FASTNORM_INLINE Products products_of(const T* dy, const T* x, const Unit& u, size_t c, A centre_of_c) const {
    constexpr size_t lanes = kLanes<A>;
    const Vector<A> centre = broadcast(centre_of_c);
    const size_t at = place(u, c), rest = u.length - (vectors - 1) * lanes;
    constexpr size_t sums = std::min<size_t>(vectors, 4);
    Vector<A> grads[sums], products[sums];
    repeat<vectors>([&](auto k) FASTNORM_INLINE_LAMBDA {
      constexpr size_t to = k % sums;
      const auto take = [&](auto how) FASTNORM_INLINE_LAMBDA {
        const Vector<A> grad = how.load(dy + at + k * lanes), centred = how.load(x + at + k * lanes, centre) - centre;
        grads[to] = k < sums ? grad : grads[to] + grad;
        products[to] = k < sums ? grad * centred : mul_add(grad, centred, products[to]);
      };
      if (k + 1 < vectors || rest == lanes)
        take(Whole{});
      else
        take(Part{rest});
    });
    return {combined(grads), combined(products)};
  }

  // The same of channels [c0, c1) over group g.
  void reduce(const T* dy, const T* x, size_t g, size_t c0, size_t c1, const A* centres, double* sum_dy,
              double* sum_dyx, A*, Reading) const {
    std::fill_n(sum_dy, c1 - c0, 0.0);
    std::fill_n(sum_dyx, c1 - c0, 0.0);
    for (size_t i = first_unit(cut, g); i < last_unit(cut, g); ++i) {
      const Unit u = unit_at(shape, cut, i);
      const auto add_all = [&](const auto& products_of_channel) FASTNORM_INLINE_LAMBDA {
        size_t c = 0;
        for (; c + 4 <= c1 - c0; c += 4) {
          Vector<A> grads[4], products[4];
#pragma GCC unroll 4
          for (size_t k = 0; k < 4; ++k) {
            const Products found = products_of_channel(c + k);
            grads[k] = found.grad;
            products[k] = found.product;
          }
          add_four(sum_dy + c, totals<A>(grads));
          add_four(sum_dyx + c, totals<A>(products));
        }
        for (; c < c1 - c0; ++c) {
          const Products found = products_of_channel(c);
          sum_dy[c] += total<A>(found.grad);
          sum_dyx[c] += total<A>(found.product);
        }
      };
      const auto add_runs_of = [&](auto vectors) FASTNORM_INLINE_LAMBDA {
        add_all([&](size_t c) FASTNORM_INLINE_LAMBDA { return products_of<vectors>(dy, x, u, c0 + c, centres[c]); });
      };
      const size_t vectors = u.rows == 1 ? (u.length + kLanes<A> - 1) / kLanes<A> : 0;
      if (vectors == 0 || vectors > kNoLoop)
        add_all([&](size_t c) FASTNORM_INLINE_LAMBDA { return products(dy, x, u, c0 + c, centres[c]); });
      repeat<kNoLoop>([&](auto fewer) FASTNORM_INLINE_LAMBDA {
        if (vectors == fewer + 1) add_runs_of(std::integral_constant<size_t, fewer + 1>{});
      });
    }
  }

  template <class Form>
  void backward_apply(const T* dy, const T* x, size_t g, size_t c0, size_t c1, const Coefficients<A>& k, T* dx,
                      bool past_cache, size_t ahead) const {
    write_runs<4>(
        g, c0, c1, dx, past_cache,
        [&](size_t at) FASTNORM_INLINE_LAMBDA { return Ahead<T, 2>{{dy + at, x + at}, ahead}; },
        [&](size_t c) FASTNORM_INLINE_LAMBDA {
          return Line<4>{{broadcast(k.centre[c]), broadcast(k.scale[c]), broadcast(k.shift[c]), broadcast(k.slope[c])}};
        },
        [&](size_t at, auto how, const Line<4>& l) FASTNORM_INLINE_LAMBDA {
          return Form::dx(how.load(dy + at), how.load(x + at) - l.of[0], l.of[1], l.of[2], l.of[3]);
        });
  }
};

}  // namespace fastnorm::FASTNORM_LEVEL
