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

  ChannelShape shape;
  Cut cut;

  // A channel's value serves its runs as it is.
  size_t spread_length(size_t n) const { return n; }
  void spread(A*, size_t) const {}

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
  void moments(const T* x, size_t g, size_t c0, size_t c1, double* mean, double* m2, A*) const {
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

  // run(offset, n, c) for group g's runs of channels [c0, c1), those of one row after another.
  template <class F>
  FASTNORM_INLINE void over_runs(size_t g, size_t c0, size_t c1, const F& run) const {
    for (size_t i = first_unit(cut, g); i < last_unit(cut, g); ++i) {
      const Unit u = unit_at(shape, cut, i);
      for (size_t r = 0; r < u.rows; ++r)
        for (size_t c = c0; c < c1; ++c) run(place(u, c) + r * stride(), u.length, c - c0);
    }
  }

  void apply(const T* x, size_t g, size_t c0, size_t c1, const Coefficients<A>& k, T* y, bool past_cache,
             size_t ahead) const {
    Writer<T> writer(past_cache);
    over_runs(g, c0, c1, [&](size_t at, size_t n, size_t c) FASTNORM_INLINE_LAMBDA {
      const Vector<A> centre = broadcast(k.centre[c]), scale = broadcast(k.scale[c]), shift = broadcast(k.shift[c]);
      writer.run(y + at, n, Ahead<T, 1>{{x + at + ahead}}, [&](size_t j, auto how) FASTNORM_INLINE_LAMBDA {
        return mul_add(how.load(x + at + j) - centre, scale, shift);
      });
    });
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
      sum_run<A>(u.length, [&](size_t j, auto how, int k) FASTNORM_INLINE_LAMBDA {
        const Vector<A> grad = how.load(dy + at + j);
        grads[k] += grad;
        products[k] = mul_add(grad, how.load(x + at + j, centre) - centre, products[k]);
      });
    }
    return {combined(grads), combined(products)};
  }

  // The same of channels [c0, c1) over group g.
  void reduce(const T* dy, const T* x, size_t g, size_t c0, size_t c1, const A* centres, double* sum_dy,
              double* sum_dyx, A*) const {
    std::fill_n(sum_dy, c1 - c0, 0.0);
    std::fill_n(sum_dyx, c1 - c0, 0.0);
    for (size_t i = first_unit(cut, g); i < last_unit(cut, g); ++i) {
      const Unit u = unit_at(shape, cut, i);
      size_t c = c0;
      for (; c + 4 <= c1; c += 4) {
        Vector<A> grads[4], products_of[4];
#pragma GCC unroll 4
        for (size_t k = 0; k < 4; ++k) {
          const Products found = products(dy, x, u, c + k, centres[c + k - c0]);
          grads[k] = found.grad;
          products_of[k] = found.product;
        }
        double grad[4], product[4];
        totals<A>(grads, grad);
        totals<A>(products_of, product);
#pragma GCC unroll 4
        for (size_t k = 0; k < 4; ++k) {
          sum_dy[c + k - c0] += grad[k];
          sum_dyx[c + k - c0] += product[k];
        }
      }
      for (; c < c1; ++c) {
        const Products found = products(dy, x, u, c, centres[c - c0]);
        sum_dy[c - c0] += total<A>(found.grad);
        sum_dyx[c - c0] += total<A>(found.product);
      }
    }
  }

  template <class Form>
  void backward_apply(const T* dy, const T* x, size_t g, size_t c0, size_t c1, const Coefficients<A>& k, T* dx,
                      bool past_cache, size_t ahead) const {
    Writer<T> writer(past_cache);
    over_runs(g, c0, c1, [&](size_t at, size_t n, size_t c) FASTNORM_INLINE_LAMBDA {
      const Vector<A> centre = broadcast(k.centre[c]), scale = broadcast(k.scale[c]), shift = broadcast(k.shift[c]),
                      slope = broadcast(k.slope[c]);
      writer.run(dx + at, n, Ahead<T, 2>{{dy + at + ahead, x + at + ahead}},
                 [&](size_t j, auto how) FASTNORM_INLINE_LAMBDA {
                   return Form::dx(how.load(dy + at + j), how.load(x + at + j) - centre, scale, shift, slope);
                 });
    });
  }
};

}  // namespace fastnorm::FASTNORM_LEVEL
