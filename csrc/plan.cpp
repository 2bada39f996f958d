#include "fastnorm/plan.hpp"

#include <unistd.h>

#include <algorithm>

namespace fastnorm {

namespace {

std::size_t cache_size(int name, std::size_t otherwise) {
  const long size = sysconf(name);
  return size > 0 ? static_cast<std::size_t>(size) : otherwise;
}

std::size_t ceil_div(std::size_t a, std::size_t b) { return (a + b - 1) / b; }

}  // namespace

Caches caches() {
#ifdef _SC_LEVEL2_CACHE_SIZE
  static const Caches found{cache_size(_SC_LEVEL2_CACHE_SIZE, std::size_t{1} << 20),
                            cache_size(_SC_LEVEL3_CACHE_SIZE, std::size_t{8} << 20)};
#else
  static const Caches found{std::size_t{1} << 20, std::size_t{8} << 20};
#endif
  return found;
}

Cut cut_channels(ChannelShape shape) {
  Cut cut{};
  if (shape.inner == 1) {
    cut.rows = std::min(kChunkRows, shape.outer);
    cut.pieces = 1;
    cut.piece = 1;
  } else if (shape.inner < kChunk) {
    cut.rows = std::min(shape.outer, kChunk / shape.inner);
    cut.pieces = 1;
    cut.piece = shape.inner;
  } else {
    cut.rows = 1;
    cut.pieces = ceil_div(shape.inner, kChunk);
    cut.piece = kChunk;
  }
  cut.units = ceil_div(shape.outer, cut.rows) * cut.pieces;
  cut.per_group = ceil_div(cut.units, kMaxGroups);
  cut.groups = ceil_div(cut.units, cut.per_group);
  return cut;
}

bool streams(std::size_t bytes) { return bytes >= caches().l3 / 4; }

ChannelPlan plan_channels(ChannelShape shape, std::size_t itemsize, std::size_t arrays, int threads) {
  const std::size_t channel_bytes = shape.outer * shape.inner * itemsize * arrays;
  const std::size_t workers = static_cast<std::size_t>(threads);
  ChannelPlan plan{};
  plan.stream = streams(shape.channels * shape.outer * shape.inner * itemsize);

  // A slab a thread, in half of its L2, if its rows are then long enough to read well.
  const std::size_t shortest = shape.inner == 1 ? 1024 / itemsize : 1;
  const std::size_t in_l2 = caches().l2 / 2 / channel_bytes;
  if (in_l2 >= shortest && ceil_div(shape.channels, in_l2) >= workers) {
    plan.slab = std::min(in_l2, ceil_div(shape.channels, workers));
    plan.fits = true;
    return plan;
  }
  if (workers == 1 || shape.inner > 1) {
    const std::size_t share = caches().l3 / 2 / workers / channel_bytes;
    if (share >= shortest && shape.channels >= 4 * workers) {
      plan.slab = 1;
      plan.fits = true;
      return plan;
    }
  }
  // All threads on a slab in half of L3; where not even the narrowest fits, on everything at once.
  plan.team = true;
  const std::size_t narrowest = shape.inner == 1 ? 256 / itemsize : 1;
  const std::size_t in_l3 = caches().l3 / 2 / channel_bytes;
  plan.fits = in_l3 >= std::min(narrowest, shape.channels);
  plan.slab = plan.fits ? std::min(in_l3, shape.channels) : shape.channels;
  if (shape.inner > 1 && !plan.fits) plan.slab = 1;
  return plan;
}

}  // namespace fastnorm
