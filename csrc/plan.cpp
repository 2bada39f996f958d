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

constexpr std::size_t kLine = 64;

// Rows, forward. Bytes of rows that one task takes.
constexpr std::size_t kTaskBytes = std::size_t{1} << 20;
// Rows whose moments are taken before a row is written, as long as they are this many bytes at most and stay in a
// first-level cache. Two, on one core: (65536, 128) 2.28 to 1.74 ms; one, four: the same; eight: 2.1.
constexpr std::size_t kRowsBefore = 2;
constexpr std::size_t kBytesBefore = std::size_t{8} << 10;
// Bytes from a row being written to the one being fetched, at least. On one core: (16384, 1024) 3.8 to 3.2 ms.
constexpr std::size_t kFetchBytes = std::size_t{16} << 10;
// Rows, backward: bytes up to which a row is summed while the one before it is stored past the cache. Two threads,
// float32, against four summed, then stored: rows of 4,096 4.7 to 4.3 ms, of 16,384 4.6 to 4.2, of 32,768 the same, but
// float64 of 16,384, whose column sums are 256 KB, 7.4 to 8.7. From two lines on: the first line of the next row, which
// it may begin within, must lie in the array.
constexpr std::size_t kSummedRow = std::size_t{64} << 10;
// Groups, backward: as many statistics as have so many bytes of dy and x are a slab, found in a first-level cache the
// second time, if each has so many at least. Two threads, us, slabs of L2 and this: (16, 512, 14, 14) 161 and 150, (32,
// 64, 400) in 16 groups 81 and 69, (16, 128, 16, 16) 56 and 51; past the cache, from memory, (64, 512, 14, 14) 1171 and
// 906. But of smaller ones (64, 320, 9, 9) 220 and 237, (16, 128, 64) in 16 groups 16.0 and 17.7, channels with
// statistics of their own, (4, 64, 2048) 50 and 53, and (32, 1280, 8, 8), which is written past the cache though L3
// would hold it, over and over again 352 and 392.
// Of BatchNorm's channels, where the batch is one sample and leaves L2, from half as many bytes on: (1, 512, 28, 28)
// 37.2 and 34.5, (1, 256, 56, 56) 72 and 59, but of smaller ones (1, 3000, 50) 17.2 and 18.6; of several samples, whose
// runs lie apart, (8, 128, 20, 20) 39 and 45, (16, 1024, 14, 14) 379 and 692.
constexpr std::size_t kInL1 = std::size_t{32} << 10;
constexpr std::size_t kFew = std::size_t{8} << 10;
// Bytes of dy and x between the two passes over long rows; it decides the order of summation, so no cache size enters.
constexpr std::size_t kLongBlock = std::size_t{8} << 20;

std::size_t ceil_div(std::size_t a, std::size_t b) { return (a + b - 1) / b; }

// Whether so many tasks keep three quarters of the threads busy to the end, where the busiest one has `most` of them.
bool keeps_busy(std::size_t tasks, std::size_t most, std::size_t workers) { return 4 * tasks > 3 * most * workers; }

// What a call is to be counted as, in elements: runs and columns cost something each.
std::size_t channel_work(ChannelShape shape, const Cut& cut) {
  const std::size_t elements = shape.outer * shape.channels * shape.inner;
  return elements + (cut.side_by_side ? kColumnWork * shape.channels * shape.inner
                                      : kRunWork * shape.outer * shape.channels * cut.pieces);
}

// Whether that is too little to wake threads for, of a call that reads so many arrays. Backward by one thread and by
// two, us: BatchNorm (48, 1024) 8.7 and 5.7, (512, 96) 7.9 and 6.9, NCHW (43, 8, 12, 12) 8.8 and 6.1.
bool is_serial(std::size_t work, std::size_t arrays) { return work * (arrays + 1) / 2 < kSerial; }

// Whether channels are walked side by side.
bool across(ChannelShape shape) {
  const std::size_t fewer = shape.inner < kShortestRun ? 1 : std::min(shape.inner / 2, kManyRows);
  return shape.inner == 1 || (shape.inner <= kShortRun && shape.outer > fewer);
}

// The same of a sample of groups.
std::size_t group_work(GroupShape shape) {
  const std::size_t runs = across(shape.sample()) ? 0 : shape.outer * shape.channels;
  return shape.outer * shape.channels * shape.inner + std::max(kGroupWork * shape.groups, kRunWork * runs);
}

Cut cut_up(ChannelShape shape, bool side_by_side) {
  Cut cut{};
  cut.side_by_side = side_by_side;
  cut.fold = 1;
  if (cut.side_by_side) {
    const std::size_t length = shape.channels * shape.inner;
    const std::size_t whole = shape.outer * length <= (length <= kNarrowRow ? kOneOfNarrow : kOneRow) ? shape.outer : 1;
    const std::size_t most = std::max({whole, kLeastFolded / length, shape.outer / kFoldedRows});
    cut.fold = std::clamp<std::size_t>(std::min(kFoldedRow / length, most), 1, shape.outer);
    // Folded rows of whole vectors.
    const std::size_t whole_vectors = kFoldedUnit / std::gcd(kFoldedUnit, length);
    if (cut.fold > whole_vectors && cut.fold < shape.outer) cut.fold = cut.fold / whole_vectors * whole_vectors;
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

// Samples of several rows that are a slab together, if they have as many: `bytes` are those of an element.
std::size_t samples_together(GroupShape shape, const Cut& cut, std::size_t bytes) {
  if (cut.units > 1) return 1;
  const std::size_t row = shape.channels * shape.inner;
  const std::size_t padding = cut.fold < shape.outer ? kPaddingBytes / sizeof(float) : 0;
  return std::min(kTogether / (row * cut.fold + padding), kInL1 / (shape.outer * row * bytes));
}

}  // namespace

Caches caches() {
  static const Caches found{cache_size(2, std::size_t{1} << 20), cache_size(3, std::size_t{8} << 20)};
  return found;
}

Cut cut_channels(ChannelShape shape) { return cut_up(shape, across(shape)); }

Cut cut_weighted(ChannelShape shape) { return cut_up(shape, shape.inner == 1); }

bool streams(std::size_t bytes, std::size_t arrays) { return bytes >= caches().l3 * 2 / (arrays == 1 ? 5 : 8); }

ChannelPlan plan_channels(ChannelShape shape, std::size_t itemsize, std::size_t arrays, int threads) {
  const std::size_t elements = shape.outer * shape.channels * shape.inner;
  const std::size_t channel_bytes = shape.outer * shape.inner * itemsize * arrays;
  const std::size_t workers = static_cast<std::size_t>(threads);
  ChannelPlan plan{};
  plan.stream = streams(elements * itemsize, arrays);
  plan.passes = 1;
  plan.slab = shape.channels;
  const Cut cut = cut_channels(shape);
  plan.serial = is_serial(channel_work(shape, cut), arrays);
  if (plan.serial) return plan;

  // Channels of one run each that threads' L2 do not hold, as groups: found in a first-level cache the second time.
  const bool one_run = shape.outer == 1 && !cut.side_by_side;
  const bool fills_l1 = channel_bytes >= kFew / 2 && channel_bytes <= kInL1;
  const bool leaves_l2 = shape.channels * channel_bytes > caches().l2 * workers;
  if (arrays == 2 && !plan.stream && one_run && fills_l1 && leaves_l2) {
    plan.slab = std::min(shape.channels, kInL1 / channel_bytes);
    return plan;
  }
  // A slab a thread in half of its L2, if rows of the slab are then long enough to be read well. Folded rows
  // are whole rows: their channels stay together.
  const std::size_t line = kLine / itemsize, whole = line / std::gcd(line, shape.inner);
  const bool past_cache = cut.side_by_side && plan.stream;
  const auto slabs_of = [&](std::size_t most) {
    if (past_cache && most > whole) most = most / whole * whole;
    // As many for each thread: 512 channels of 28x28 in slabs of 167 are three and a rest, 29 us; four alike take 23.
    const std::size_t slabs = ceil_div(ceil_div(shape.channels, most), workers) * workers;
    const std::size_t slab = ceil_div(shape.channels, slabs);
    // Slabs of whole lines, if a slab holds one.
    plan.slab = cut.side_by_side && slab > whole ? ceil_div(slab, whole) * whole : slab;
    return plan;
  };
  // Past the cache the forward fetches the next slab into L2, too: 12 channels of (50, 1024, 14, 14) 1.5 ms, 8 1.3.
  const std::size_t in_l2 = (past_cache && arrays == 1 ? caches().l2 / 5 * 2 : caches().l2 / 2) / channel_bytes;
  const std::size_t narrowest = cut.side_by_side ? ceil_div(kNarrowestSlab, shape.inner * itemsize) : 1;
  const bool alike = shape.inner == 1 && shape.outer % (cut.rows * cut.per_group * workers) == 0;
  const bool by_rows = cut.side_by_side && !plan.stream && (alike || cut.groups >= kGroupsAThread * workers);
  const bool fits_l2 = cut.fold == 1 && in_l2 >= narrowest && !by_rows;
  // A backward whose slabs of L2 would begin and end within lines is better off with wider ones from L3.
  const bool broken = past_cache && arrays == 2 && in_l2 < whole;
  if (fits_l2 && !broken) return slabs_of(in_l2);
  // Columns a thread in its share of L3, where the whole is too large to be found there the second time: as many as
  // make rows long enough, or an array of L2's size.
  const std::size_t row_bytes = shape.channels * shape.inner * itemsize;
  if (cut.side_by_side && cut.fold == 1 && row_bytes % kLine == 0 && shape.outer * row_bytes >= caches().l3 / 4 * 3) {
    const std::size_t one = shape.outer * shape.inner * itemsize, in_l3 = caches().l3 / 8 / workers / one;
    const std::size_t least = shape.inner == 1 ? kNarrowestInL3 : kNarrowestOfRuns;
    if (in_l3 * shape.inner * itemsize >= least) {
      const std::size_t enough = ceil_div(std::max(least, kNarrowestSlab), shape.inner * itemsize);
      return slabs_of(std::min(in_l3, std::max(caches().l2 / one, enough)));
    }
  }
  if (fits_l2) return slabs_of(in_l2);
  // One channel a thread in its share of L3.
  if (!cut.side_by_side && shape.channels >= 4 * workers && channel_bytes <= caches().l3 / 2 / workers) {
    plan.slab = 1;
    return plan;
  }
  // All threads on everything at once, or on one channel of runs: what of it fits L3 need not be read again.
  plan.team = true;
  plan.slab = cut.side_by_side ? shape.channels : 1;
  plan.passes = plan.slab * channel_bytes <= caches().l3 / 2 ? 1 : 2;
  return plan;
}

Walk plan_written(ChannelShape shape, std::size_t itemsize, std::size_t arrays, int threads) {
  Walk written{plan_channels(shape, itemsize, arrays, threads), cut_channels(shape)};
  ChannelPlan& plan = written.plan;
  Cut& cut = written.cut;
  if (cut.side_by_side && !plan.stream && shape.inner > kWrittenRun) cut = cut_up(shape, false);
  const std::size_t elements = shape.outer * shape.channels * shape.inner;
  const bool slabs_in_line = shape.outer == 1 && cut.pieces == 1;
  if (cut.side_by_side || slabs_in_line || elements * itemsize * (arrays + 1) <= caches().l2) return written;
  cut.in_line = true;
  cut.units = shape.outer * shape.channels * cut.pieces;
  cut.per_group = std::max(ceil_div(cut.units, kMaxGroups), ceil_div(kWrittenTask, cut.piece));
  cut.groups = ceil_div(cut.units, cut.per_group);
  plan.slab = shape.channels;
  plan.team = !plan.serial;
  plan.passes = 1;
  return written;
}

Bundles bundles_of(GroupShape shape, bool sums) {
  std::size_t most = shape.samples * group_work(shape) / kBundle;
  if (sums) most = std::min(most, shape.samples * shape.outer * shape.inner / kBundlePositions);
  most = std::clamp<std::size_t>(most, 1, kMaxGroups);
  std::size_t bundles = 1;  // a power of two, which most numbers of threads share equally
  while (2 * bundles <= most) bundles *= 2;
  return {shape.samples, std::min(bundles, shape.samples)};
}

ChannelPlan plan_groups(GroupShape shape, std::size_t itemsize, std::size_t arrays, int threads) {
  const std::size_t span = shape.span(), workers = static_cast<std::size_t>(threads);
  const std::size_t elements = shape.outer * shape.channels * shape.inner;
  const std::size_t statistic_bytes = shape.outer * span * shape.inner * itemsize * arrays;
  ChannelPlan plan{};
  plan.stream = streams(shape.samples * elements * itemsize, arrays);
  plan.passes = 1;
  plan.slab = shape.channels;
  plan.serial = is_serial(shape.samples * group_work(shape), arrays);

  // As for single channels: slabs in half of a core's L2, if rows of a slab are long enough.
  const Cut cut = cut_channels(shape.sample());
  const bool fills_l1 = statistic_bytes >= kFew && statistic_bytes <= kInL1;
  const bool in_l3 = 3 * shape.samples * elements * itemsize <= caches().l3;
  if (!plan.serial && arrays == 2 && !(plan.stream && in_l3) && shape.outer == 1 && span > 1 && !cut.side_by_side &&
      fills_l1) {
    plan.slab = std::min(shape.channels, kInL1 / statistic_bytes * span);
    return plan;
  }
  const std::size_t in_l2 = caches().l2 / 2 / statistic_bytes * span;
  // Whether slabs of so many channels keep threads busy.
  const Bundles bundles = bundles_of(shape, arrays == 2);
  const auto busy = [&](std::size_t slab) {
    const std::size_t slabs = ceil_div(shape.channels, slab);
    return keeps_busy(shape.samples * slabs, ceil_div(bundles.count * slabs, workers) * bundles.largest(), workers);
  };
  if (plan.serial || in_l2 >= shape.channels) {
    // Backward: one block, whose sums need not go through memory as doubles.
    const bool one_block = arrays == 2 && cut.side_by_side && cut.units == 1;
    const std::size_t most = one_block ? kBlockColumns / shape.inner : std::max(in_l2, shape.channels);
    if (shape.channels > most)
      plan.slab = ceil_div(shape.groups, ceil_div(shape.channels, most)) * span;
    else
      plan.slab *= std::clamp<std::size_t>(shape.outer == 1 ? (cut.side_by_side ? kBlockColumns : most) / shape.channels
                                                            : samples_together(shape, cut, itemsize * arrays),
                                           1, bundles.largest());
    // Few samples of runs in parts. Two threads, us, (3, 256, 14, 14) forward 9.1 and 6.7, (1, 600, 100) 4.7 and 3.7.
    // Not of columns, whose parts lie apart: (3, 6, 6, 1008) forward 8.3 and 10.4, backward 13.9 and 18.1.
    if (!plan.serial && !cut.side_by_side && plan.slab == shape.channels && !busy(plan.slab))
      plan.slab = ceil_div(shape.groups, workers) * span;
    // One statistic of runs by all threads: NCHW (1, 300, 300) forward 7.0 and 5.2, backward 14.2 and 7.6; but of
    // columns (1, 64, 1024) 6.4 and 11.5, 10.6 and 15.4.
    plan.team = !plan.serial && !cut.side_by_side && shape.samples * shape.groups == 1;
    return plan;
  }
  const std::size_t narrowest =
      cut.side_by_side && shape.outer > 1 ? ceil_div(kNarrowestSlab, shape.inner * itemsize) : 1;
  const bool in_slabs = cut.fold == 1 && in_l2 >= narrowest;
  const auto slab_of_l2 = [&] { return ceil_div(shape.groups, ceil_div(shape.channels, in_l2)) * span; };
  // Past the cache rows of all channels are one run, those of a slab begin and end within lines of the output: on one
  // core (64,14,14,1024) forward 3.3 to 2.9 ms, backward 5.5 to 5.2.
  const bool rows_are_one = cut.side_by_side && plan.stream;
  if (in_slabs && !rows_are_one) {
    plan.slab = slab_of_l2();
    return plan;
  }
  const std::size_t share = caches().l3 / 2 / workers;
  // A statistic, or a sample where channels lie side by side, for each thread in its share of L3.
  plan.slab = cut.side_by_side ? shape.channels : span;
  const std::size_t slab_bytes = statistic_bytes / span * plan.slab;
  // If that keeps threads busy. (Asking for four tasks a thread, two to four samples of channels last were shared by
  // two threads one after the other, and took up to 1.8 times as long.)
  if (busy(plan.slab) && slab_bytes <= share) return plan;
  if (in_slabs) {
    plan.slab = slab_of_l2();
    return plan;
  }
  plan.team = true;
  plan.passes = slab_bytes <= caches().l3 / 2 ? 1 : 2;
  return plan;
}

RowPlan plan_rows(RowShape shape, std::size_t itemsize, std::size_t arrays, int threads) {
  const std::size_t row_bytes = shape.cols * itemsize, workers = static_cast<std::size_t>(threads);
  RowPlan plan{};
  plan.stream = streams(shape.rows * row_bytes, arrays);
  plan.passes = 1;
  plan.serial = is_serial(shape.rows * (shape.cols + kRowWork), arrays);
  if (arrays == 1) {
    const bool one_block = shape.cols <= kChunk;
    // Rows that keep threads busy are not shared: two threads, us, shared and like this, (4, 16384) 7.8 and 4.4, (6,
    // 16384) 11.3 and 6.2, (7, 50000) 32 and 27; where threads take long to meet (4, 16384) 17.5 and 4.1. Nor are
    // shorter ones than a thread alone goes over.
    const bool alone = shape.cols < kSerial || keeps_busy(shape.rows, ceil_div(shape.rows, workers), workers);
    plan.team = !plan.serial && !one_block && (!alone || row_bytes > caches().l3 / 2 / workers);
    plan.before = !one_block ? 0 : shape.cols <= kFourRows ? 4 : std::min(kRowsBefore, kBytesBefore / row_bytes);
    plan.rows = plan.before + 1;
    plan.task = plan.serial ? shape.rows
                            : std::max<std::size_t>(
                                  1, std::min(kTaskBytes, shape.rows * row_bytes / (4 * workers)) / row_bytes);
    plan.ahead = (one_block ? std::max(plan.rows, kFetchBytes / row_bytes) : 1) * shape.cols;
    if (plan.team && row_bytes > caches().l3 / 2) plan.passes = 2;
    return plan;
  }
  // How the backward sums is decided by the shape alone.
  plan.team = shape.cols > kLongRow;
  if (plan.team) {
    const std::size_t fitting = std::max<std::size_t>(1, kLongBlock / (2 * row_bytes) / kSweep) * kSweep;
    plan.rows = plan.task = std::min(fitting, shape.rows);
    plan.ahead = kReadAhead;
    if (2 * plan.rows * row_bytes > caches().l3 / 2) plan.passes = 2;
  } else {
    plan.before = plan.stream && row_bytes >= 2 * kLine && row_bytes <= kSummedRow ? 1 : 0;
    plan.rows = std::min(plan.before > 0 ? plan.before + 1 : kSweep, shape.rows);
    const std::size_t enough = plan.serial ? kTaskRows : ceil_div(kTaskElements, shape.cols);
    plan.task = std::min(kTaskRows, ceil_div(std::max(ceil_div(shape.rows, 32), enough), kSweep) * kSweep);
    plan.ahead = plan.before > 0 ? kFetchBytes / 2 / itemsize : kSweep * shape.cols;
  }
  return plan;
}

DropoutPlan plan_dropout(std::size_t elements, std::size_t itemsize) {
  DropoutPlan plan{};
  plan.stream = streams(elements * itemsize, 1);
  const std::size_t least = plan.stream ? kDropoutStreamed : kDropoutTask;
  plan.task = ceil_div(ceil_div(elements, std::max<std::size_t>(1, elements / least)), kDrawn) * kDrawn;
  plan.tasks = ceil_div(elements, plan.task);
  plan.ahead = kDropoutAhead;
  return plan;
}

}  // namespace fastnorm
