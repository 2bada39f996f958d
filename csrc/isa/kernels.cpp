// One instruction set level: compiled once per level with FASTNORM_LEVEL naming its namespace.
#include "fastnorm/dropout.hpp"
#include "fastnorm/group.hpp"
#include "fastnorm/row.hpp"

namespace fastnorm::FASTNORM_LEVEL {

namespace {

// Calls f(T{}) with the storage type of `dtype`.
template <class F>
void with_type(DType dtype, F f) {
  switch (dtype) {
    case DType::float16:
      return f(Half{});
    case DType::bfloat16:
      return f(BFloat16{});
    case DType::float32:
      return f(float{});
    case DType::float64:
      return f(double{});
  }
}

template <class T>
const T* in(const void* p, T) {
  return static_cast<const T*>(p);
}
template <class T>
T* to(void* p, T) {
  return static_cast<T*>(p);
}

constexpr size_t kRoofPiece = 1 << 16;

struct Nothing {
  void line(size_t) const {}
};

template <class F>
void stream_pieces(float* dst, size_t n, F f) {
  parallel_for((n + kRoofPiece - 1) / kRoofPiece, [&](size_t piece, int) {
    const size_t at = piece * kRoofPiece;
    Writer<float>(true).run(dst + at, std::min(kRoofPiece, n - at), Nothing{},
                            [&](size_t i, auto how) FASTNORM_INLINE_LAMBDA { return f(at + i, how); });
  });
}

}  // namespace

extern const Kernels table;
const Kernels table = {
    FASTNORM_LEVEL_NAME,
    [](DType d, const void* x, ChannelShape s, double* mean, double* var) {
      with_type(d, [&](auto t) { Channel<decltype(t)>::moments(in(x, t), s, mean, var); });
    },
    [](DType d, const void* x, ChannelShape s, const double* mean, const double* var, double eps, const void* gamma,
       const void* beta, void* y) {
      with_type(d, [&](auto t) { Channel<decltype(t)>::apply(in(x, t), s, mean, var, eps, gamma, beta, to(y, t)); });
    },
    [](DType d, const void* x, ChannelShape s, const void* gamma, const void* beta, double eps, void* y, double* mean,
       double* var) {
      with_type(d, [&](auto t) { Channel<decltype(t)>::forward(in(x, t), s, gamma, beta, eps, to(y, t), mean, var); });
    },
    [](DType d, const void* dy, const void* x, ChannelShape s, const double* mean, const double* var, double eps,
       double* sum_dy, double* sum_dy_xhat) {
      with_type(d, [&](auto t) {
        Channel<decltype(t)>::reduce(in(dy, t), in(x, t), s, mean, var, eps, sum_dy, sum_dy_xhat);
      });
    },
    [](DType d, const void* dy, const void* x, ChannelShape s, const double* mean, const double* var, double eps,
       const void* gamma, const double* sum_dy, const double* sum_dy_xhat, double count, void* dx) {
      with_type(d, [&](auto t) {
        Channel<decltype(t)>::backward_apply(in(dy, t), in(x, t), s, mean, var, eps, gamma, sum_dy, sum_dy_xhat, count,
                                             to(dx, t));
      });
    },
    [](DType d, const void* dy, const void* x, ChannelShape s, const double* mean, const double* var, double eps,
       const void* gamma, void* dx, double* sum_dy, double* sum_dy_xhat) {
      with_type(d, [&](auto t) {
        Channel<decltype(t)>::backward(in(dy, t), in(x, t), s, mean, var, eps, gamma, to(dx, t), sum_dy, sum_dy_xhat);
      });
    },
    [](DType d, const void* x, GroupShape s, const void* gamma, const void* beta, double eps, void* y, double* mean,
       double* var) {
      with_type(d, [&](auto t) { Group<decltype(t)>::forward(in(x, t), s, gamma, beta, eps, to(y, t), mean, var); });
    },
    [](DType d, const void* dy, const void* x, GroupShape s, const double* mean, const double* var, double eps,
       const void* gamma, void* dx, double* sum_dy, double* sum_dy_xhat) {
      with_type(d, [&](auto t) {
        Group<decltype(t)>::backward(in(dy, t), in(x, t), s, mean, var, eps, gamma, to(dx, t), sum_dy, sum_dy_xhat);
      });
    },
    [](DType d, const void* x, RowShape s, const void* gamma, const void* beta, double eps, void* y, double* mean,
       double* var) {
      with_type(d, [&](auto t) { Row<decltype(t)>::forward(in(x, t), s, gamma, beta, eps, to(y, t), mean, var); });
    },
    [](DType d, const void* dy, const void* x, RowShape s, const double* mean, const double* var, double eps,
       const void* gamma, void* dx, double* dgamma, double* dbeta) {
      with_type(d, [&](auto t) {
        Row<decltype(t)>::backward(in(dy, t), in(x, t), s, mean, var, eps, gamma, to(dx, t), dgamma, dbeta);
      });
    },
    [](DType d, const void* x, size_t n, uint64_t first, uint64_t seed, uint64_t threshold, double scale, void* y) {
      with_type(d, [&](auto t) { Dropout<decltype(t)>::run(in(x, t), n, first, seed, threshold, scale, to(y, t)); });
    },
    [](const float* src, size_t n) {
      parallel_for((n + kRoofPiece - 1) / kRoofPiece, [&](size_t piece, int) {
        const float* from = src + piece * kRoofPiece;
        Vector<float> sums[4] = {};
        sum_run<float>(std::min(kRoofPiece, n - piece * kRoofPiece),
                       [&](size_t i, auto how, int k) FASTNORM_INLINE_LAMBDA { sums[k] += how.load(from + i); });
        const volatile double keep = total<float>(combined(sums));
        static_cast<void>(keep);
      });
    },
    [](const float* src, float* dst, size_t n) {
      stream_pieces(dst, n, [&](size_t i, auto how) FASTNORM_INLINE_LAMBDA { return how.load(src + i); });
    },
    [](const float* a, const float* b, float* dst, size_t n) {
      stream_pieces(dst, n,
                    [&](size_t i, auto how) FASTNORM_INLINE_LAMBDA { return how.load(a + i) + how.load(b + i); });
    },
};

}  // namespace fastnorm::FASTNORM_LEVEL
