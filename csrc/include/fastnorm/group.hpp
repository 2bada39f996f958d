// GroupNorm and InstanceNorm: the channel family with statistics of each sample, shared by adjacent channels.
//
//   scalar:  y  = (x - mean[n][c/span])*rstd[n][c/span]*gamma[c] + beta[c]
//            dx = rstd*(g - mean(g) - xhat*mean(g*xhat)),  g = dy*gamma, means over a statistic's elements
//            sum_dy[c] = sum over samples of dy,  sum_dy_xhat[c] = sum over samples of dy*xhat
#pragma once

#include "fastnorm/channel.hpp"
#include "fastnorm/row.hpp"

namespace fastnorm::FASTNORM_LEVEL {

template <class T>
struct Group {
  using A = Acc<T>;

  template <class Passes>
  static void call(const GroupShape& shape, size_t arrays, const T* dy, const T* x, double* mean, double* var,
                   double eps, const void* gamma, const void* beta, double* sum_dy, double* sum_dy_xhat, T* out,
                   Passes passes) {
    const Walk walk{plan_groups(shape, sizeof(T), arrays, num_threads()), cut_channels(shape.sample())};
    const double count = static_cast<double>(shape.span() * shape.outer * shape.inner);
    run_call(shape.sample(), shape.samples, shape.span(), walk, dy, x, mean, var, eps, gamma, beta, sum_dy, sum_dy_xhat,
             count, out, passes);
  }

  static void moments(const T* x, const GroupShape& shape, double* mean, double* var) {
    call(shape, 1, nullptr, x, mean, var, 0, nullptr, nullptr, nullptr, nullptr, nullptr,
         [](const auto& c, const auto& s, auto loop, A* w) { c.moments(s, loop, w); });
  }

  static void forward(const T* x, const GroupShape& shape, const void* gamma, const void* beta, double eps, T* y,
                      double* mean, double* var) {
    if (shape.is_row()) return Row<T>::forward(x, {shape.samples, shape.channels}, gamma, beta, eps, y, mean, var);
    call(shape, 1, nullptr, x, mean, var, eps, gamma, beta, nullptr, nullptr, y,
         [](const auto& c, const auto& s, auto loop, A* w) { c.forward(s, loop, w); });
  }

  static void backward(const T* dy, const T* x, const GroupShape& shape, const double* mean, const double* var,
                       double eps, const void* gamma, T* dx, double* sum_dy, double* sum_dy_xhat) {
    if (shape.is_row())
      return Row<T>::backward(dy, x, {shape.samples, shape.channels}, mean, var, eps, gamma, dx, sum_dy_xhat, sum_dy);
    const size_t channels = shape.channels, bundles = bundles_of(shape, /*sums=*/true).count;
    // Sums of each bundle of samples, where there are several.
    const Workspace<double> partial(bundles > 1 ? 2 * bundles * channels : 0);
    double *by_bundle = sum_dy, *by_bundle_xhat = sum_dy_xhat;
    if (bundles > 1) {
      by_bundle = partial.data();
      by_bundle_xhat = by_bundle + bundles * channels;
    }
    call(shape, 2, dy, x, const_cast<double*>(mean), const_cast<double*>(var), eps, gamma, nullptr, by_bundle,
         by_bundle_xhat, dx, [](const auto& c, const auto& s, auto loop, A* w) {
           c.reduce(s, loop, w,
                    [&](size_t at, size_t n, const auto& sums) { c.prepare_dx_of_samples(s, at, n, sums); });
           if (c.span == 1)
             c.template write_dx<ScaledDescent>(s, loop);
           else
             c.template write_dx<SharedDescent>(s, loop);
         });
    if (bundles == 1) return;
    std::copy_n(by_bundle, channels, sum_dy);
    std::copy_n(by_bundle_xhat, channels, sum_dy_xhat);
  }
};

}  // namespace fastnorm::FASTNORM_LEVEL
