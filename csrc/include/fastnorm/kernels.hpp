// The tables of kernels that each instruction set level fills, one a storage type, and the types they speak.
// The contract (formulas, in-place rules, repeatability) stands in fastnorm/backends/__init__.py.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastnorm {

enum class DType { float16, bfloat16, float32, float64 };

// Storage types without arithmetic; loads widen them to float, stores round to nearest even.
struct Half {
  std::uint16_t bits;
};
struct BFloat16 {
  std::uint16_t bits;
};

// A block of memory as (outer, channels, inner), statistics over outer and inner.
struct ChannelShape {
  std::size_t outer, channels, inner;
};

// Samples of such blocks; in each, a statistic for channels/groups adjacent channels.
struct GroupShape {
  std::size_t samples, outer, channels, inner, groups;
  ChannelShape sample() const { return {outer, channels, inner}; }
  std::size_t span() const { return channels / groups; }
  // Whether a sample is one run with a parameter each and one statistic for all: a row.
  bool is_row() const { return outer * inner == 1 && groups == 1; }
};

struct RowShape {
  std::size_t rows, cols;
};

// x, dy, y, dx are of the table's storage dtype; gamma and beta of its accumulation dtype or null.
struct Kernels {
  void (*channel_moments)(const void* x, ChannelShape, double* mean, double* var);
  // one weight an element (`each`), of the accumulation dtype, or one a position (outer, inner)
  void (*channel_weighted_moments)(const void* x, ChannelShape, const void* weights, bool each, double* count,
                                   double* mean, double* var);
  void (*channel_apply)(const void* x, ChannelShape, const double* mean, const double* var, double eps,
                        const void* gamma, const void* beta, void* y);
  void (*channel_forward)(const void* x, ChannelShape, const void* gamma, const void* beta, double eps, void* y,
                          double* mean, double* var);
  void (*channel_backward_reduce)(const void* dy, const void* x, ChannelShape, const double* mean, const double* var,
                                  double eps, double* sum_dy, double* sum_dy_xhat);
  void (*channel_backward_apply)(const void* dy, const void* x, ChannelShape, const double* mean, const double* var,
                                 double eps, const void* gamma, const double* sum_dy, const double* sum_dy_xhat,
                                 double count, void* dx);
  void (*channel_backward)(const void* dy, const void* x, ChannelShape, const double* mean, const double* var,
                           double eps, const void* gamma, void* dx, double* sum_dy, double* sum_dy_xhat);
  void (*group_moments)(const void* x, GroupShape, double* mean, double* var);
  void (*group_forward)(const void* x, GroupShape, const void* gamma, const void* beta, double eps, void* y,
                        double* mean, double* var);
  void (*group_backward)(const void* dy, const void* x, GroupShape, const double* mean, const double* var, double eps,
                         const void* gamma, void* dx, double* sum_dy, double* sum_dy_xhat);
  // mean is null for rows that are not centred
  void (*row_forward)(const void* x, RowShape, const void* gamma, const void* beta, double eps, void* y, double* mean,
                      double* var);
  void (*row_backward)(const void* dy, const void* x, RowShape, const double* mean, const double* var, double eps,
                       const void* gamma, void* dx, double* dgamma, double* dbeta);
  // Random words below `threshold`, at most 2^32, keep an element; `first` is the index of x[0].
  void (*dropout)(const void* x, std::size_t n, std::uint64_t first, std::uint64_t seed, std::uint64_t threshold,
                  double scale, void* y);
};

struct Level {
  const char* name;
  const Kernels* kernels[4];  // by DType
  // The memory roof: a sum that is thrown away; dst = src and dst = a + b, with streaming stores.
  void (*stream_read)(const float* src, std::size_t n);
  void (*stream_copy)(const float* src, float* dst, std::size_t n);
  void (*stream_add)(const float* a, const float* b, float* dst, std::size_t n);
};

}  // namespace fastnorm
