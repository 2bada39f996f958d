#include "fastnorm/plan.hpp"

#include <algorithm>
#include <cstdio>
#include <numeric>

namespace fastnorm {

namespace {

// The kernel's word on the cache of this level that the first CPU uses, 0 where there is none. Not sysconf:
// glibc gives 384 MB for the 32 MB that two cores of an EPYC 9005 share.
std::size_t cache_in_sysfs(int wanted) {
  std::size_t found = 0;
  for (int index = 0; index < 8; ++index) {
    char path[96];
    int level = 0;
    unsigned long kilobytes = 0;
    std::snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu0/cache/index%d/level", index);
    if (std::FILE* file = std::fopen(path, "r")) {
      if (std::fscanf(file, "%d", &level) != 1) level = 0;
      std::fclose(file);
    }
    std::snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu0/cache/index%d/size", index);
    if (std::FILE* file = std::fopen(path, "r")) {
      if (std::fscanf(file, "%lu", &kilobytes) != 1) kilobytes = 0;
      std::fclose(file);
    }
    if (level == wanted) found = std::max(found, static_cast<std::size_t>(kilobytes) << 10);
  }
  return found;
}

std::size_t cache_size(int level, std::size_t otherwise) {
  const std::size_t found = cache_in_sysfs(level);
  return found > 0 ? found : otherwise;
}

std::size_t ceil_div(std::size_t a, std::size_t b) { return (a + b - 1) / b; }

}  // namespace

Caches caches() {
  static const Caches found{cache_size(2, std::size_t{1} << 20), cache_size(3, std::size_t{8} << 20)};
  return found;
}

Cut cut_channels(ChannelShape shape) {
  Cut cut{};
  cut.side_by_side = shape.inner == 1 || (shape.inner <= kShortRun && shape.outer >= kRowsOfShortRuns);
  cut.fold = 1;
  if (cut.side_by_side) {
    cut.fold = std::clamp<std::size_t>(kFoldedRow / (shape.channels * shape.inner), 1, shape.outer);
    cut.rows = std::min(cut.fold > 1 ? kChunkRows / 2 * cut.fold : kChunkRows, shape.outer);
    cut.pieces = 1;
    cut.piece = shape.inner;
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

  // A slab a thread in half of its L2, if rows of the slab are then long enough to be read well. Folded rows
  // are whole rows: their channels stay together.
  const Cut cut = cut_channels(shape);
  const std::size_t line = 64 / itemsize;
  const std::size_t in_l2 = caches().l2 / 2 / channel_bytes;
  const std::size_t narrowest = cut.side_by_side ? ceil_div(kNarrowestSlab, shape.inner * itemsize) : 1;
  if (cut.fold == 1 && in_l2 >= narrowest) {
    plan.slab = std::min(in_l2, ceil_div(shape.channels, workers));
    // Slabs of whole lines, if a slab holds one.
    const std::size_t lines = line / std::gcd(line, shape.inner);
    if (cut.side_by_side && plan.slab > lines) plan.slab -= plan.slab % lines;
    return plan;
  }
  // One channel a thread in its share of L3.
  if (!cut.side_by_side && shape.channels >= 4 * workers && channel_bytes <= caches().l3 / 2 / workers) {
    plan.slab = 1;
    return plan;
  }
  // All threads on everything at once, or on one channel of runs. What of it fits L3 need not be read again.
  plan.team = true;
  plan.slab = cut.side_by_side ? shape.channels : 1;
  return plan;
}

}  // namespace fastnorm
