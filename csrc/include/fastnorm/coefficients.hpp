// What a pass over one slab of channels works with: coefficients, and the units that a channel is cut into.
#pragma once

#include <algorithm>

#include "fastnorm/moments.hpp"
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

}  // namespace fastnorm::FASTNORM_LEVEL
