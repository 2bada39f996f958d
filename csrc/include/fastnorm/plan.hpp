// How a call is cut up: data, computed from the shape, the caches and the number of threads.
// What decides bits (groups, chunks) depends on the shape alone; the rest only on speed.
#pragma once

#include <cstddef>

#include "fastnorm/kernels.hpp"

namespace fastnorm {

// Elements below which waking threads costs more than it saves: a parallel region takes 0.4 to 2 us
// (bench/two_speeds.cpp) and what threads hand one another as much again, a core goes over this many float32 in 10.
constexpr std::size_t kSerial = 1 << 16;
// Elements that a run, or a column of channels side by side, counts as besides its own: (2, 8192) takes 12 us, (6,
// 8059) 20, (7, 512, 4, 4) as runs 13.
constexpr std::size_t kRunWork = 32;
constexpr std::size_t kColumnWork = 12;
// The same of a row: one of 16 takes 12 ns forward, 9 backward.
constexpr std::size_t kRowWork = 48;
// Elements from a line being written to the one being fetched, in the same stream, where no next slab or row is
// known.
constexpr std::size_t kReadAhead = 256;
// Elements from those being summed to those being fetched, half as many of two arrays, where channels lie side by side
// and short rows of all of them come from memory: several rows at a time are no sequence that the processor would go on
// with by itself. On one core, moments of (50176, 256) 1.8 to 1.5 ms, with half of the distance as without; of (12544,
// 1024), twice as far, 1.5 to 1.9.
constexpr std::size_t kSummedAhead = 4096;

// Rows, forward: up to so many columns, the moments of four are taken together. On one core in a cache, (4096, 64)
// takes 60 us instead of 67, (1000, 50) 14 instead of 16, but (1024, 1024) 95 instead of 88.
constexpr std::size_t kFourRows = 128;
// Rows, backward: swept together, so that column sums are read and written once for all of them;
constexpr std::size_t kSweep = 4;
// whose column sums are accumulated in the accumulation dtype before they go to double;
constexpr std::size_t kTaskRows = 128;
// elements that a task has at least, if there are rows enough: adding up a task's column sums costs as much as a row;
constexpr std::size_t kTaskElements = 1 << 14;
// columns whose sums are added up over all tasks in a first-level cache;
constexpr std::size_t kStrip = 512;
// columns beyond which threads share rows.
constexpr std::size_t kLongRow = 32768;

// Dropout: elements of a task at least, 1.5 us of a core, and of one that stores past the cache: with 16 Ki there, 256
// MB of float32 took 12.2 ms instead of 11.3;
constexpr std::size_t kDropoutTask = std::size_t{1} << 14, kDropoutStreamed = std::size_t{1} << 16;
// a multiple of what any instruction set level draws together;
constexpr std::size_t kDrawn = 384;
// and elements from those being written to those being fetched: with kReadAhead 64 MB of float16 took 5.6 ms, not 5.1.
constexpr std::size_t kDropoutAhead = 1024;

struct Caches {
  std::size_t l2;  // bytes of one core
  std::size_t l3;  // bytes shared by all
};

Caches caches();

// Elements of one exact two-pass block: 16 KB of float32, so its second pass reads L1.
constexpr std::size_t kChunk = 4096;
// Runs of at most this many elements are short: channels are then treated as lying side by side, if there are rows
// enough to pay for the coefficients of every element of a row: more than half as many as a run has elements, or than
// 32 for the longest, any two for runs of less than a vector. Time as runs of that as columns, 256 channels on two
// threads, forward and backward: 7x7 of 8 rows 0.74 and 0.60, of 24 0.84 and 0.88, of 64 0.94 and 1.07; 14x14 of 8 0.69
// and 0.74, of 32 0.98 and 0.91; past the cache, (64, 2048, 7, 7), 1.36 and 1.83. On one core, 512 channels: 2x2 of 2
// rows 2.0 and 1.3, 3x3 of 2 1.5 and 0.96, of 4 1.6 and 1.5; runs of 15 of 2 1.3 and 0.78, of 7 1.3 and 1.15; 4x4 of
// 2 1.15 and 0.57, of 7 1.13 and 0.85.
constexpr std::size_t kShortRun = 256;
constexpr std::size_t kShortestRun = 16;
constexpr std::size_t kManyRows = 32;
// Shorter ones than this are also where a pass only writes.
constexpr std::size_t kWrittenRun = 24;
// Elements that a task of a pass that only writes has at least.
constexpr std::size_t kWrittenTask = 1 << 14;
// Rows of a block where channels lie side by side.
constexpr std::size_t kChunkRows = 64;
// Columns of a block whose rows are summed together: a block is then 320 KB of float32 at most, and stays in L2. Images
// of 1,280 channels are common: GroupNorm (11, 3, 3, 1280) backward, two threads, 19.9 us with 1,024 and 18.4.
constexpr std::size_t kBlockColumns = 1280;
// Elements that a row should have there: rows of fewer are folded, several treated as one; as few as leave so many
// folded rows, since coefficients are spread over each column of one and sums collapsed from them, but to so many
// elements at least. On one core, us, folded to 512 elements whatever is left, and like this: GroupNorm (6, 5, 5, 24)
// backward 4.7 and 2.0, (20, 6, 6, 32) 11.6 and 7.7, BatchNorm (100, 10) forward 1.2 and 0.7.
constexpr std::size_t kFoldedRow = 512;
constexpr std::size_t kFoldedRows = 8;
constexpr std::size_t kLeastFolded = 64;
// Of a multiple of so many elements, whole vectors, where that is possible. On one core, us, as many rows as fit and
// these: GroupNorm (143, 900, 5) backward 161 and 142, (40, 28, 28, 6) 48 and 39, BatchNorm (20000, 5) 20.5 and 18.1.
constexpr std::size_t kFoldedUnit = 16;
// All rows are folded to one where that has so many elements at most, more where rows are so narrow that a vector holds
// their coefficients: several samples are then one longer row. GroupNorm on one core, us, several rows and one: (64, 4,
// 24) forward 9.2 and 6.9, (64, 25, 8) 8.6 and 6.4, (64, 16, 16) 11.4 and 7.5, (64, 36, 8) 10.4 and 8.3; but (64, 9,
// 24) 9.4 and 10.4, backward 9.2 and 11.4, (64, 49, 8) 9.8 and 10.4, backward 9.5 and 11.4.
constexpr std::size_t kOneRow = 128;
constexpr std::size_t kNarrowRow = 16;
constexpr std::size_t kOneOfNarrow = 320;
// Bytes of a row of a slab of columns: shorter ones make more page and line changes than the cache saves.
constexpr std::size_t kNarrowestSlab = 1024;
// The same of a slab in a thread's share of L3, 2 MB an array for two threads with 32. Two threads, everything read
// twice and slabs, ms: (2048, 8192) forward 3.9 and 2.9, backward 6.1 and 5.2, (4096, 4096) 3.8 and 3.1, 6.2 and 5.9,
// but (8192, 2048) 3.7 and 4.0, 6.4 and 6.9. Rows of short runs begin anywhere in a page: (512, 512, 7, 7) backward 4.5
// and 4.1, (2048, 256, 7, 7) 9.4 and 10.3.
constexpr std::size_t kNarrowestInL3 = 512;
constexpr std::size_t kNarrowestOfRuns = 3072;
// Groups a thread from which, all in cache, threads share the rows of channels that lie side by side, not the channels:
// what a core fetches ahead at the end of a row of a slab is what the other one is writing. Two threads, channels and
// rows, us: (512, 1024) forward 60 and 51, (1024, 2048) backward 389 and 337, (256, 1024) 49 and 45. With fewer only if
// each thread has as many rows: (128, 1024) forward 12.8 and 10.3, backward 18.4 and 15.2, but (100, 1000) 9.9
// and 11.2.
constexpr std::size_t kGroupsAThread = 2;
// Samples are taken in bundles of so many elements at least, some 5 us of work, and a group counts as so many more: one
// of two channels of 16 elements takes 20 to 40 ns. Of long groups of short runs these count.
constexpr std::size_t kBundle = 1 << 15;
constexpr std::size_t kGroupWork = 256;
// Positions that a bundle with sums has at least: adding these up costs as much as one or two. Backward of (28, 2, 2,
// 1280) in eight bundles takes 32.4 us on two threads, in four 31.0.
constexpr std::size_t kBundlePositions = 16;
// Values of one coefficient of the samples that are a slab together, of several positions each: what is done once a
// slab is done for all of them, and they wait for one another's sums and square roots no more. On one core, us, a
// sample a slab and like this: (132, 2, 2, 8) forward 17.5 and 11.3, backward 12.7 and 8.9, (32, 7, 7, 32) forward 16.9
// and 13.9. Where each is one row, all of them also go through every loop as one: 5.7 and 5.8, (256, 5, 5, 3) forward
// 59 and 12.5, backward 58 and 10.4.
constexpr std::size_t kTogether = 1024;
// Bytes between arrays that are read side by side, so that they are not whole pages apart.
constexpr std::size_t kPaddingBytes = 320;
// A channel's elements are cut into at most this many groups: the units of parallel work.
constexpr std::size_t kMaxGroups = 64;

// The elements of every channel, cut the same way: `groups` runs of `per_group` units, where a unit is
// `rows` rows (outer indices) or, for long inner runs, one of `pieces` pieces of `piece` elements of one row.
struct Cut {
  bool side_by_side;      // channels side by side (vectors across them), else each as runs of its own
  std::size_t rows;       // outer indices a unit
  std::size_t pieces;     // units a row is cut into (1 unless inner is long)
  std::size_t piece;      // inner elements a unit
  std::size_t fold;       // rows treated as one where channels lie side by side and are few, else 1
  std::size_t units;      // in all
  std::size_t per_group;  // units a group
  std::size_t groups;
  bool in_line;  // units are runs, or pieces of them, of all rows and channels in the order of memory
};

Cut cut_channels(ChannelShape shape);
// The same for moments with weights: short runs stay runs, since weights of positions repeat with them.
Cut cut_weighted(ChannelShape shape);

struct ChannelPlan {
  std::size_t slab;    // channels whose second pass should find their data in cache
  bool team;           // all threads on one slab, split by groups; else a slab a thread
  bool stream;         // stores bypass the cache
  bool serial;         // too little work to wake threads for
  std::size_t passes;  // times that each input comes from memory: 2 where no slab fits a cache
};

// How a call walks its channels.
struct Walk {
  ChannelPlan plan;
  Cut cut;
};

// `arrays` is the number of arrays read: 1 forward, 2 backward.
ChannelPlan plan_channels(ChannelShape shape, std::size_t itemsize, std::size_t arrays, int threads);

// The same for passes that only write, whose bits their cut does not change. Runs that leave L2 are written in the
// order of memory, all channels, by all threads. Two threads, us, slabs of channels and this: apply of (8, 32, 112,
// 112) 224 and 146, of (64, 256, 14, 14) 251 and 159, backward apply of it 742 and 568, past the cache (64, 64, 112,
// 112) 8030 and 7030; but in L2 (2, 256, 14, 14) 4.3 and 4.9. Channels side by side take as long either way. Through
// the cache runs of more than kWrittenRun stay runs: apply of (16, 512, 7, 7) 21 and 16, of (64, 64, 5, 5) 6.2 and 4.0;
// but (16, 512, 4, 4) 11 and 15, and past the cache (64, 1024, 14, 14) 1900 and 2090.
Walk plan_written(ChannelShape shape, std::size_t itemsize, std::size_t arrays, int threads);

// The same for samples of channels that share statistics: `slab` channels of one sample, or all of several that lie one
// after the other.
ChannelPlan plan_groups(GroupShape shape, std::size_t itemsize, std::size_t arrays, int threads);

// Samples that one task takes one after the other, and whose sums are added up in that order, are a bundle. All have as
// many, or one more or less: as bundles of 4, 4, 4 and 1, two threads took 18.9 us for (13, 2, 2, 840) backward, as 3,
// 3, 3 and 4 17.0.
struct Bundles {
  std::size_t samples, count;
  std::size_t first(std::size_t bundle) const { return samples * bundle / count; }
  std::size_t largest() const { return (samples + count - 1) / count; }
};

// `sums`: each bundle has some, by channel.
Bundles bundles_of(GroupShape shape, bool sums);

struct RowPlan {
  bool serial;         // too little work to wake threads for
  bool team;           // all threads on the same rows, split by columns; else rows of its own for each thread
  std::size_t rows;    // that go through all passes before the next ones
  std::size_t task;    // rows a task
  std::size_t before;  // rows whose moments or sums are taken before a row is written; 0 where rows are long or swept
  std::size_t ahead;   // elements from those being written to those being fetched
  bool stream;
  std::size_t passes;
};

RowPlan plan_rows(RowShape shape, std::size_t itemsize, std::size_t arrays, int threads);

struct DropoutPlan {
  std::size_t task;  // elements of a task, a multiple of what any level draws together
  std::size_t tasks;
  std::size_t ahead;  // elements from those being written to those being fetched
  bool stream;
};

DropoutPlan plan_dropout(std::size_t elements, std::size_t itemsize);

// Whether an output of this many bytes, of a call that reads so many arrays of the size, is better stored past the
// cache: from two fifths of L3 on where one is read, a quarter where two are. Below that inputs are found there again,
// and the output by whoever reads it. Past it and through it, two threads, all in cache, us: LayerNorm forward 8 MB 194
// and 104, 12 MB 289 and 268, 16 MB 384 and 464; backward 4 MB 127 and 115, 8 MB 268 and 315.
bool streams(std::size_t bytes, std::size_t arrays);

}  // namespace fastnorm
