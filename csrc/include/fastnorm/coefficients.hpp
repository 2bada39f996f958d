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

// The pointers are restricted so that the loops vectorize: a square root and a division each take 20 cycles alone.
template <class A>
inline void forward_coefficients(const Coefficients<A>& to, size_t n, const double* __restrict mean,
                                 const double* __restrict var, double eps, const A* __restrict gamma,
                                 const A* __restrict beta) {
  A* __restrict centres = to.centre, * __restrict scales = to.scale, * __restrict shifts = to.shift;
  for (size_t c = 0; c < n; ++c) {
    const A centre = static_cast<A>(mean[c]);
    const double scale = rstd_of(var[c], eps) * (gamma ? static_cast<double>(gamma[c]) : 1.0);
    const double rest = mean[c] - static_cast<double>(centre);
    centres[c] = centre;
    scales[c] = static_cast<A>(scale);
    shifts[c] = static_cast<A>((beta ? static_cast<double>(beta[c]) : 0.0) - rest * scale);
  }
}

template <class A>
inline void backward_coefficients(const Coefficients<A>& to, size_t n, const double* __restrict mean,
                                  const double* __restrict var, double eps, const A* __restrict gamma,
                                  const double* __restrict sum_dy, const double* __restrict sum_dy_xhat, double count) {
  A* __restrict centres = to.centre, * __restrict scales = to.scale, * __restrict offsets = to.shift, * __restrict descents = to.descent;
  const double share = 1.0 / count;
  for (size_t c = 0; c < n; ++c) {
    const A centre = static_cast<A>(mean[c]);
    const double rstd = rstd_of(var[c], eps);
    const double descent = -rstd * sum_dy_xhat[c] * share;
    const double rest = mean[c] - static_cast<double>(centre);
    centres[c] = centre;
    scales[c] = static_cast<A>(rstd * (gamma ? static_cast<double>(gamma[c]) : 1.0));
    offsets[c] = static_cast<A>(sum_dy[c] * share + rest * descent);
    descents[c] = static_cast<A>(descent);
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
