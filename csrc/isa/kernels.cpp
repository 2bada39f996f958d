// The kernels of one storage type at one instruction set level: compiled once for each pair, with FASTNORM_LEVEL naming
// the namespace and FASTNORM_DTYPE the type.
#include <tuple>

#include "fastnorm/dropout.hpp"
#include "fastnorm/group.hpp"
#include "fastnorm/row.hpp"
#include "fastnorm/weighted.hpp"

namespace fastnorm::FASTNORM_LEVEL {

namespace {

// In the order of DType.
using Storage = std::tuple<Half, BFloat16, float, double>;
using T = std::tuple_element_t<static_cast<size_t>(DType::FASTNORM_DTYPE), Storage>;

const T* in(const void* p) { return static_cast<const T*>(p); }
T* to(void* p) { return static_cast<T*>(p); }

}  // namespace

extern const Kernels FASTNORM_DTYPE;
const Kernels FASTNORM_DTYPE = {
    [](const void* x, ChannelShape s, double* mean, double* var) { Channel<T>::moments(in(x), s, mean, var); },
    [](const void* x, ChannelShape s, const void* weights, bool each, double* count, double* mean, double* var) {
      Weighted<T>::moments(in(x), s, weights, each, count, mean, var);
    },
    [](const void* x, ChannelShape s, const double* mean, const double* var, double eps, const void* gamma,
       const void* beta, void* y) { Channel<T>::apply(in(x), s, mean, var, eps, gamma, beta, to(y)); },
    [](const void* x, ChannelShape s, const void* gamma, const void* beta, double eps, void* y, double* mean,
       double* var) { Channel<T>::forward(in(x), s, gamma, beta, eps, to(y), mean, var); },
    [](const void* dy, const void* x, ChannelShape s, const double* mean, const double* var, double eps, double* sum_dy,
       double* sum_dy_xhat) { Channel<T>::reduce(in(dy), in(x), s, mean, var, eps, sum_dy, sum_dy_xhat); },
    [](const void* dy, const void* x, ChannelShape s, const double* mean, const double* var, double eps,
       const void* gamma, const double* sum_dy, const double* sum_dy_xhat, double count, void* dx) {
      Channel<T>::backward_apply(in(dy), in(x), s, mean, var, eps, gamma, sum_dy, sum_dy_xhat, count, to(dx));
    },
    [](const void* dy, const void* x, ChannelShape s, const double* mean, const double* var, double eps,
       const void* gamma, void* dx, double* sum_dy, double* sum_dy_xhat) {
      Channel<T>::backward(in(dy), in(x), s, mean, var, eps, gamma, to(dx), sum_dy, sum_dy_xhat);
    },
    [](const void* x, GroupShape s, double* mean, double* var) { Group<T>::moments(in(x), s, mean, var); },
    [](const void* x, GroupShape s, const void* gamma, const void* beta, double eps, void* y, double* mean,
       double* var) { Group<T>::forward(in(x), s, gamma, beta, eps, to(y), mean, var); },
    [](const void* dy, const void* x, GroupShape s, const double* mean, const double* var, double eps,
       const void* gamma, void* dx, double* sum_dy, double* sum_dy_xhat) {
      Group<T>::backward(in(dy), in(x), s, mean, var, eps, gamma, to(dx), sum_dy, sum_dy_xhat);
    },
    [](const void* x, RowShape s, const void* gamma, const void* beta, double eps, void* y, double* mean, double* var) {
      Row<T>::forward(in(x), s, gamma, beta, eps, to(y), mean, var);
    },
    [](const void* dy, const void* x, RowShape s, const double* mean, const double* var, double eps, const void* gamma,
       void* dx, double* dgamma,
       double* dbeta) { Row<T>::backward(in(dy), in(x), s, mean, var, eps, gamma, to(dx), dgamma, dbeta); },
    [](const void* x, size_t n, uint64_t first, uint64_t seed, uint64_t threshold, double scale, void* y) {
      Dropout<T>::run(in(x), n, first, seed, threshold, scale, to(y));
    },
};

}  // namespace fastnorm::FASTNORM_LEVEL
