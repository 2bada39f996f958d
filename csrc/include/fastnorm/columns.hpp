// Channels side by side: vectors across channels, sums down the rows.
#pragma once

#include <array>
#include <limits>
#include <utility>

#include "fastnorm/coefficients.hpp"

namespace fastnorm::FASTNORM_LEVEL {

// A row is all channels of one outer index, each `inner` elements (1, or a few: 7x7 images). What a channel needs is
// spread over its elements, so that a row is one run of vectors whatever `inner` is. Few channels make short rows;
// `fold` rows together are then treated as one (Cut::fold). Sums are kept by column and collapsed, a channel's
// columns into one, at the end of a block.
template <class T>
struct Columns {
  using A = Acc<T>;
  // Columns that are written together: coefficients of a backward, 24 KB, and a line of each array in a first-level
  // cache. With kBlockColumns, a row of 1,280 was two strips: (1024, 1280) backward 171 us instead of 155.
  static constexpr size_t kStripWidth = (size_t{6} << 10) / sizeof(A);
  // From one array of the workspace to the next: not a whole number of pages, which would put a column of all of them,
  // and of the rows of a matrix of 1,024 columns, into the same set of a cache.
  static constexpr size_t kPitch = kBlockColumns + kPadding<A>;
  static constexpr size_t kWorkspace = 6 * kPitch;
  // Channels that are summed again together where one has to be.
  static constexpr size_t kSettled = 64;
  // Rows whose mean is the first pivot.
  static constexpr size_t kPivotRows = 8;
  // Vectors of a row whose sums, and what is subtracted from them, are in registers while rows go by. One core, us,
  // with two, whose sums were loaded and stored for each two rows, and with eight: GroupNorm NHWC (96, 7, 7, 282)
  // backward 355 and 290, (64, 4, 4, 64) 19.1 and 16.4, forward (96, 7, 7, 282) 200 and 167.
  static constexpr size_t kInRegisters = kVectorBytes == kLineBytes ? 8 : 4;
  // Rows that are added up before they are added to sums of deviations and their squares, whose errors are a quarter
  // then: var of 480 chunks was 1.2 times as far off as it may be where each row was added to them.
  static constexpr size_t kAddedUp = 4;
  // Rows that go by where they come from memory, of one array and of two;
  static constexpr size_t kSummedRows = 8, kSummedTogether = 2;
  static_assert(kSummedRows % kAddedUp == 0);
  // else as many as have so many bytes, whose pages a first-level TLB holds;
  static constexpr size_t kSummedBytes = size_t{128} << 10;
  // but four of two arrays whose rows are whole pages, and their columns in one set of a cache: BatchNorm (256, 1024)
  // backward 46 us before, 52 with 32 rows, 47 with four.
  static constexpr size_t kPage = 4096, kSummedOfPages = 4;

  ChannelShape shape;
  Cut cut;

  size_t row_length() const { return shape.channels * shape.inner; }
  // Whether a sample is one row, folded or single: several samples after one another are then one longer row, and n
  // channels may be those of all of them.
  bool is_row() const { return cut.fold == shape.outer; }
  size_t samples_of(size_t n) const { return cut.fold > 1 && n > shape.channels ? n / shape.channels : 1; }
  bool aligned_alike() const { return is_row() || cut.fold * row_length() * sizeof(T) % kLineBytes == 0; }
  // Of `arrays` past the cache. Rows of all channels are one run, and go by in their order, but two arrays of rows too
  // long to be fetched ahead: float16 (10000, 1024) backward 1.6 to 1.4 ms. With each row of a slab the processor's own
  // fetching begins anew: of one array the rows after the next ones are fetched, of two most fetches would be dropped,
  // and strips of 64 rows are faster than rows: (512, 512, 7, 7) backward 3.19 to 2.91 ms.
  Reading reading(bool all_channels, size_t arrays) const {
    if (!all_channels) return arrays == 1 ? Reading{true, 2 * kSummedRows * row_length()} : Reading{};
    const size_t ahead = kSummedRows * row_length() <= kSummedAhead ? kSummedAhead / arrays : 0;
    return {arrays == 1 || ahead != 0, ahead};
  }
  double count(size_t g) const { return static_cast<double>((last_row(g) - first_row(g)) * shape.inner); }
  size_t first_row(size_t g) const { return first_unit(cut, g) * cut.rows; }
  size_t last_row(size_t g) const { return std::min(shape.outer, last_unit(cut, g) * cut.rows); }

  // Values that `n` channels are spread over.
  size_t spread_length(size_t n) const { return n * shape.inner * cut.fold; }

  // n values, each for `span` channels, to one a column of `fold` rows, in place, of each sample; then those of the
  // columns from the first one on again, for a vector in which the last rows end and the next begin.
  void spread(A* values, size_t n, size_t span = 1) const {
    const size_t samples = samples_of(n * span), times = span * shape.inner;
    if (samples == 1)
      spread_samples(values, values, 1, n, times);
    else
      spread_copy(values, samples, n / samples, times);
  }
  // By way of a copy, since samples are spread over the values of those after them.
  __attribute__((noinline)) void spread_copy(A* values, size_t samples, size_t n, size_t times) const {
    A given[kBlockColumns + kLanes<A>];
    std::copy_n(values, samples * n, given);
    spread_samples(given, values, samples, n, times);
  }

  FASTNORM_INLINE void spread_samples(const A* from, A* to, size_t samples, size_t n, size_t times) const {
    constexpr size_t lanes = kLanes<A>;
    static_assert(kPadding<A> >= 3 * lanes);
    const size_t wide = n * times, all = wide * cut.fold, end = samples > 1 ? all : all + lanes;
    if (wide <= lanes) {  // as many rows by one permutation as fit a vector
      const Indices<A> lane = lane_numbers<A>(), column = lane - over(lane, wide) * static_cast<Index<A>>(wide),
                       value = over(column, times);
      const size_t step = lanes / wide * wide;
      for (; samples > 0; --samples, from += n, to += all) {
        const Vector<A> rows = __builtin_shuffle(load_part(from, n, Vector<A>{}), value);
        for (size_t done = 0; done < end; done += step) store(to + done, rows);
      }
      return;
    }
    const size_t last = (wide - 1) / lanes * lanes;  // of a row's vectors, which reaches into the next row
    for (; samples > 0; --samples, from += n, to += all) {
      repeat_each(from, to, n, times);
      if (cut.fold > 1) {  // else the load would wait for the two stores that its vector was made by
        const Vector<A> end = load(to + last);
        for (A* row = to + wide; row < to + all; row += wide) {
          for (size_t c = 0; c < last; c += lanes) store(row + c, load(to + c));
          store(row + last, end);
        }
      }
      store(to + all, load(to));
    }
  }

  // The inverse for sums: a channel's columns added up, in place.
  void collapse(A* sums, size_t n) const {
    const size_t samples = samples_of(n), wide = (samples > 1 ? shape.channels : n) * shape.inner;
    if (cut.fold > 1)
      for (size_t k = 0; k < samples; ++k) {
        A *const rows = sums + k * wide * cut.fold, *const to = sums + k * wide;
        if (wide <= kLanes<A>)
          add_narrow_rows(rows, to, wide);
        else
          add_wide_rows(rows, to, wide);
      }
    if (shape.inner == 1) return;
    for (size_t c = 0; c < n; ++c) {
      Vector<A> partial[4] = {};
      sum_run<A>(shape.inner, [&](size_t i, auto how, int k)
                                  FASTNORM_INLINE_LAMBDA { partial[k] += how.load(sums + c * shape.inner + i); });
      sums[c] = static_cast<A>(total<A>(combined(partial)));
    }
  }

  // Adds up `fold` rows: as many at a time as fit a vector, then those of it;
  FASTNORM_INLINE void add_narrow_rows(const A* rows, A* to, size_t wide) const {
    const size_t step = kLanes<A> / wide * wide, all = wide * cut.fold;
    Vector<A> partial[4] = {};
    size_t at = 0;
    for (; at + 4 * step <= all; at += 4 * step)
      repeat<4>([&](auto k) FASTNORM_INLINE_LAMBDA { partial[k] += load(rows + at + k * step); });
    for (; at + step <= all; at += step) partial[0] += load(rows + at);
    if (at < all) partial[1] += load_part(rows + at, all - at, Vector<A>{});
    const Vector<A> sum = combined(partial);
    Vector<A> total = sum;
    for (size_t row = wide; row < std::min(step, all); row += wide)
      total += __builtin_shuffle(sum, lane_numbers<A>() + static_cast<Index<A>>(row));
    store_part(to, total, wide);
  }
  // or half of them to the other half, again and again.
  FASTNORM_INLINE void add_wide_rows(A* from, A* to, size_t wide) const {
    for (size_t rows = cut.fold, half; rows > 1; rows = half) {
      half = (rows + 1) / 2;
      A* const sums = half > 1 ? from : to;
      for_columns<A>((rows - half) * wide, [&](size_t c, auto how) FASTNORM_INLINE_LAMBDA {
        put(sums + c, how.load(from + c) + how.load(from + half * wide + c), how);
      });
    }
  }

  // A block's channels [w, w + n) of those that fit kBlockColumns.
  size_t block_channels() const { return kBlockColumns / shape.inner; }

  // Elements from where an aligned vector begins to this block's rows, if they are aligned alike. Arrays by column are
  // shifted by as many, so that whole vectors are aligned in them, too. With arrays of NumPy's, which begin 16 bytes
  // after a line, on one core: (262144, 64) apply 3.1 to 2.6 ms, (6272, 256) backward in a cache 477 to 337 us.
  size_t shift(const T* block) const {
    static_assert(kPadding<A> >= kLanes<A>);
    if (!aligned_alike()) return 0;
    return reinterpret_cast<std::uintptr_t>(block) % (kLanes<A> * sizeof(T)) / sizeof(T);
  }
  // Columns before their first whole aligned vector.
  size_t lead(const T* block) const { return (kLanes<A> - shift(block)) % kLanes<A>; }

  // Rows that go by at once in `sum_rows`: multiples of kAddedUp, where rows are added up, so that bits do not depend
  // on caches. Then they are of one array, else of two.
  template <size_t together>
  size_t rows_at_once(size_t rows) const {
    const size_t row_bytes = row_length() * cut.fold * sizeof(T);
    if (together == 1 && row_bytes % kPage == 0) return kSummedOfPages;
    if (rows * row_bytes <= kSummedBytes) return kChunkRows;  // all, and no division
    return std::max(kSummedBytes / row_bytes, kAddedUp) / kAddedUp * kAddedUp;
  }

  template <class Of, size_t count>
  FASTNORM_INLINE static void load_sums(const Of& strip, Vector<A> (&sum)[Of::width][count], A* const (&sums)[count],
                                        bool begins) {
    strip.each([&](auto v, size_t c, auto how) FASTNORM_INLINE_LAMBDA {
      repeat<count>([&](auto k) FASTNORM_INLINE_LAMBDA { sum[v][k] = begins ? Vector<A>{} : how.load(sums[k] + c); });
    });
  }
  template <class Of, size_t count>
  FASTNORM_INLINE static void store_sums(const Of& strip, const Vector<A> (&sum)[Of::width][count],
                                         A* const (&sums)[count]) {
    strip.each([&](auto v, size_t c, auto how) FASTNORM_INLINE_LAMBDA {
      repeat<count>([&](auto k) FASTNORM_INLINE_LAMBDA { put(sums[k] + c, sum[v][k], how); });
    });
  }

  // Adds rows [0, rows) to `count` sums by column, or begins these: `together` rows are added up before they are added
  // to the sums, and `at_once`, a multiple of that, go by while sums of a strip of columns are in registers; the bits
  // are the same however many. add(row, at, c, value, how, sums): the vector at offset `at`, of this row and column c,
  // which in `from` is `value`.
  template <size_t wide, size_t together, size_t count, class F>
  FASTNORM_INLINE static void sum_rows(const T* from, size_t rows, size_t at_once, size_t stride, size_t n, size_t lead,
                                       A* const (&sums)[count], const F& add, bool begins) {
    for (size_t first = 0; first < rows; first += at_once) {
      const size_t end = std::min(rows, first + at_once);
      for_strips<A, wide>(n, lead, [&](const auto& strip) FASTNORM_INLINE_LAMBDA {
        Vector<A> sum[strip.width][count];
        load_sums(strip, sum, sums, begins && first == 0);
        size_t r = first, row = first * stride;
        for (; together > 1 && r + together <= end; r += together, row += together * stride)
          strip.each([&](auto v, size_t c, auto how) FASTNORM_INLINE_LAMBDA {
            Vector<A> own[count] = {};
            repeat<together>([&](auto j) FASTNORM_INLINE_LAMBDA {
              const size_t at = row + j * stride + c;
              add(r + j, at, c, how.load(from + at), how, own);
            });
            repeat<count>([&](auto k) FASTNORM_INLINE_LAMBDA { sum[v][k] += own[k]; });
          });
        for (; r < end; ++r, row += stride)
          strip.each([&](auto v, size_t c, auto how)
                         FASTNORM_INLINE_LAMBDA { add(r, row + c, c, how.load(from + row + c), how, sum[v]); });
        store_sums(strip, sum, sums);
      });
    }
  }

  // The same to the bit for the first of the rows, which come from memory: a few at a time, each by an instruction of
  // its own, which the processor's fetching goes by. In a loop over four of eight, moments of float16 (20000, 1024)
  // took 1.6 ms instead of 0.86. With `by_lines`, where vectors of `from` lie in two lines each, by AlignedReader,
  // which reaches into the rows before and after. Returns how many.
  template <size_t together, bool by_lines, size_t count, class F>
  FASTNORM_INLINE static size_t sum_by_rows(const T* from, size_t rows, size_t stride, size_t n, size_t lead,
                                            A* const (&sums)[count], const F& add) {
    constexpr size_t at_once = together > 1 ? kSummedRows : kSummedTogether, wide = together > 1 ? 1 : 2;
    size_t first = 0;
    for (; first + at_once + (by_lines ? 1 : 0) <= rows; first += at_once) {
      auto readers =
          readers_of(from + first * stride + lead, stride, std::make_index_sequence<by_lines ? at_once : 0>());
      for_strips<A, wide>(n, lead, [&](const auto& strip) FASTNORM_INLINE_LAMBDA {
        Vector<A> sum[strip.width][count];
        load_sums(strip, sum, sums, first == 0);
        repeat<at_once / together>([&](auto i) FASTNORM_INLINE_LAMBDA {
          strip.each([&](auto v, size_t c, auto how) FASTNORM_INLINE_LAMBDA {
            Vector<A> own[count] = {};
            repeat<together>([&](auto j) FASTNORM_INLINE_LAMBDA {
              constexpr size_t k = i * together + j;
              const size_t at = (first + k) * stride + c;
              Vector<A> value;
              if constexpr (by_lines && std::is_same_v<decltype(how), Whole>)
                value = readers[k].next();
              else
                value = how.load(from + at);
              add(first + k, at, c, value, how, together > 1 ? own : sum[v]);
            });
            if constexpr (together > 1) repeat<count>([&](auto k) FASTNORM_INLINE_LAMBDA { sum[v][k] += own[k]; });
          });
        });
        store_sums(strip, sum, sums);
      });
    }
    return first;
  }

  template <size_t... k>
  FASTNORM_INLINE static std::array<AlignedReader<T>, sizeof...(k)> readers_of([[maybe_unused]] const T* from,
                                                                               [[maybe_unused]] size_t stride,
                                                                               std::index_sequence<k...>) {
    return {AlignedReader<T>(from + k * stride)...};
  }

  // Sums of all rows of a block of n channels: folded rows, then those left over, then the sum over a channel's
  // columns.
  template <size_t together, size_t count, class F>
  FASTNORM_INLINE void sum_block(const T* block, const Unit& u, size_t n, size_t lead, bool by_rows,
                                 A* const (&sums)[count], const F& add) const {
    const size_t folded = u.rows / cut.fold, stride = row_length() * cut.fold, width = spread_length(n);
    if (folded == 0)
      for (size_t k = 0; k < count; ++k) std::fill_n(sums[k], width, A{});
    constexpr bool by_lines = together == 1 && AlignedReader<T>::kAligned;
    size_t r = 0;
    if (by_rows && by_lines && u.row > 0 && stride >= kLanes<A> && splits_lines(block + lead))
      r = sum_by_rows<together, by_lines>(block, folded, stride, width, lead, sums, add);
    else if (by_rows)
      r = sum_by_rows<together, false>(block, folded, stride, width, lead, sums, add);
    const auto sum_from = [&](auto wide, auto some, size_t rows, size_t length) FASTNORM_INLINE_LAMBDA {
      const size_t done = r * stride;
      sum_rows<wide, some>(
          block + done, rows, rows_at_once<together>(rows), stride, length, lead, sums,
          [&](size_t row, size_t at, size_t c, Vector<A> value, auto how, auto& sum)
              FASTNORM_INLINE_LAMBDA { add(r + row, done + at, c, value, how, sum); },
          r == 0 && folded > 0);
    };
    constexpr std::integral_constant<size_t, 1> one{};
    // With more than two sums of each vector strips are half as wide, for as many registers.
    sum_from(std::integral_constant<size_t, count == 2 ? kInRegisters : kInRegisters / 2>{},
             std::integral_constant<size_t, together>{}, folded - r, width);
    r = folded;  // fewer rows than are folded are the beginning of a folded row
    if (u.rows % cut.fold > 0) sum_from(one, one, 1, u.rows % cut.fold * row_length());
    for (size_t k = 0; k < count; ++k) collapse(sums[k], n);
  }

  // Whether whole vectors of this block's rows, from here on, lie in two lines each, mostly where rows are not aligned
  // alike.
  bool splits_lines(const T* first) const { return !aligned_alike() || shift(first) != 0; }

  // A value near each channel's mean, for a channel's first block: the mean of its first run, or of its first rows.
  void first_pivots(const T* block, size_t rows, size_t n, A* pivots) const {
    const size_t samples = samples_of(n);
    if (samples == 1) return first_pivots_of_sample(block, rows, n, pivots);
    const size_t some = shape.channels;
    for (size_t k = 0; k < samples; ++k)
      first_pivots_of_sample(block + k * spread_length(some), rows, some, pivots + k * some);
  }
  void first_pivots_of_sample(const T* block, size_t rows, size_t n, A* pivots) const {
    if (shape.inner > 1) {
      for (size_t c = 0; c < n; ++c) pivots[c] = pivot_of(block + c * shape.inner, shape.inner)[0];
      return;
    }
    const size_t some = std::min(rows, kPivotRows);
    const Vector<A> share = broadcast(A{1} / static_cast<A>(some));
    for_columns<A>(n, [&](size_t c, auto how) FASTNORM_INLINE_LAMBDA {
      const Vector<A> first = how.load(block + c);
      Vector<A> off{};
      for (size_t r = 1; r < some; ++r) off += how.load(block + r * row_length() + c) - first;
      put(pivots + c, mul_add(off, share, first), how);
    });
  }

  // From sums of d and d^2 to the mean of d and m2, in place; m2 is -1 where it cancels. Returns whether one does. That
  // a pivot is more than the root of three standard deviations off, so that m2 is less than a quarter of the squares,
  // happens to one of 5 million channels of 64 normal values; more than one, to three of 1,024, of which two in three
  // blocks of 256 have one: forward of (16, 3136, 256) on one core 3.3 to 3.1 ms.
  static bool settle(A* sums, A* squares, size_t n, double count) {
    const Vector<A> share = broadcast(static_cast<A>(1.0 / count)), most = broadcast(A(0.75)),
                    largest = broadcast(std::numeric_limits<A>::max());
    Indices<A> cancelled{};
    for_columns<A>(n, [&](size_t c, auto how) FASTNORM_INLINE_LAMBDA {
      const Vector<A> sum = how.load(sums + c), square = how.load(squares + c), mean = sum * share,
                      off_pivot = sum * mean;
      const Indices<A> kept = (off_pivot <= most * square) & (off_pivot <= largest);
      cancelled |= ~kept;
      put(sums + c, mean, how);
      put(squares + c, kept ? square - off_pivot : broadcast(A(-1)), how);
    });
    return any<A>(cancelled);
  }

  // Once more around the means just found, taken over by the channels that need it: n of a block, whose pivots were
  // `near`.
  void settle_again(const T* block, const Unit& u, size_t n, A* near, A* sums, A* squares, double count,
                    A* workspace) const {
    A *pivots = workspace, *sums_again = workspace + kPitch, *squares_again = workspace + 2 * kPitch;
    for (size_t c = 0; c < n; ++c) pivots[c] = near[c] + sums[c];
    spread(pivots, n);
    sum_around(block, u, n, pivots, sums_again, squares_again, {});
    for (size_t c = 0; c < n; ++c) {
      if (squares[c] >= 0) continue;
      const double sum = sums_again[c], m2_again = squares_again[c] - sum * (sum / count);
      near[c] += sums[c];
      sums[c] = static_cast<A>(sum / count);
      squares[c] = static_cast<A>(m2_again < 0.0 ? 0.0 : m2_again);  // NaN stays
    }
  }

  // Sums of d and d^2 over a block, d = x - pivot; `pivots` are spread.
  FASTNORM_INLINE void sum_around(const T* block, const Unit& u, size_t n, const A* pivots, A* sums, A* squares,
                                  Reading reading) const {
    sum_block<kAddedUp>(block, u, n, lead(block), reading.by_rows, {sums, squares},
                        [&](size_t, size_t at, size_t c, Vector<A> value, auto how, auto& sum) FASTNORM_INLINE_LAMBDA {
                          if (reading.ahead != 0) __builtin_prefetch(block + at + reading.ahead);
                          const Vector<A> d = value - how.load(pivots + c);
                          sum[0] += d;
                          sum[1] = mul_add(d, d, sum[1]);
                        });
  }

  // As `block_moments`, for all channels of a slab at once.
  void moments(const T* x, size_t g, size_t c0, size_t c1, double* mean, double* m2, A* workspace,
               Reading reading) const {
    workspace += shift(x + c0 * shape.inner);
    A *sums = workspace, *squares = workspace + kPitch, *near = workspace + 2 * kPitch,
      *pivots = workspace + 3 * kPitch;
    double before = 0;
    for (size_t i = first_unit(cut, g); i < last_unit(cut, g); ++i) {
      const Unit u = unit_at(shape, cut, i);
      const double more = static_cast<double>(u.rows * shape.inner);
      for (size_t w = c0; w < c1; w += block_channels()) {
        const size_t n = std::min(block_channels(), c1 - w);
        const T* block = x + u.row * row_length() + w * shape.inner;
        double *to_mean = mean + (w - c0), *to_m2 = m2 + (w - c0);
        if (before == 0)
          first_pivots(block, u.rows, n, near);
        else
          for (size_t c = 0; c < n; ++c) near[c] = static_cast<A>(to_mean[c]);
        std::copy_n(near, n, pivots);
        spread(pivots, n);
        sum_around(block, u, n, pivots, sums, squares, reading);
        const size_t piece = cut.fold > 1 ? n : kSettled;
        for (size_t p = 0; p < n; p += piece) {
          const size_t some = std::min(piece, n - p);
          if (settle(sums + p, squares + p, some, more))
            settle_again(block + p * shape.inner, u, some, near + p, sums + p, squares + p, more, pivots);
        }
        if (before == 0)
          first_means<A>(to_mean, to_m2, near, sums, squares, n);
        else
          merge_means<A>(to_mean, to_m2, near, sums, squares, n, before, more);
      }
      before += more;
    }
  }

  // Whether the sums of n channels are those of one block, and fit the workspace with those of `all` channels, n at a
  // time.
  bool is_block(size_t n, size_t all) const { return cut.units == 1 && all - n + spread_length(n) <= kBlockColumns; }

  // sum(dy) and sum(dy*(x - centre)) of channels [c0, c1) over a unit, in the workspace; `centres` is spread.
  BlockSums<A> block_sums(const T* dy, const T* x, const Unit& u, size_t c0, size_t c1, const A* centres, A* workspace,
                          Reading reading) const {
    const size_t block = u.row * row_length() + c0 * shape.inner;
    A *grads = workspace, *products = workspace + kPitch;
    sum_block<1>(dy + block, u, c1 - c0, lead(x + block), reading.by_rows, {grads, products},
                 [&](size_t, size_t at, size_t c, Vector<A> grad, auto how, auto& sum) FASTNORM_INLINE_LAMBDA {
                   if (reading.ahead != 0) {
                     __builtin_prefetch(dy + block + at + reading.ahead);
                     __builtin_prefetch(x + block + at + reading.ahead);
                   }
                   sum[0] += grad;
                   sum[1] = mul_add(grad, how.load(x + block + at) - how.load(centres + c), sum[1]);
                 });
    return {grads, products};
  }
  // Those of channels [c0, c1) of a slab that is one block, from the beginning of `workspace` on.
  BlockSums<A> block_sums(const T* dy, const T* x, size_t c0, size_t c1, const A* centres, A* workspace,
                          Reading reading) const {
    return block_sums(dy, x, unit_at(shape, cut, 0), c0, c1, centres, workspace, reading);
  }

  // The same over group g, in doubles.
  void reduce(const T* dy, const T* x, size_t g, size_t c0, size_t c1, const A* centres, double* sum_dy,
              double* sum_dyx, A* workspace, Reading reading) const {
    workspace += shift(x + c0 * shape.inner);
    for (size_t i = first_unit(cut, g); i < last_unit(cut, g); ++i) {
      const Unit u = unit_at(shape, cut, i);
      for (size_t w = c0; w < c1; w += block_channels()) {
        const size_t n = std::min(block_channels(), c1 - w);
        const BlockSums<A> block = block_sums(dy, x, u, w, w + n, centres + (w - c0) * shape.inner, workspace, reading);
        for_columns<double>(n, [&](size_t c, auto how) FASTNORM_INLINE_LAMBDA {
          Vector<double> grad = load_doubles(block.dy + c, how), product = load_doubles(block.products + c, how);
          if (i > first_unit(cut, g)) {
            grad += how.load(sum_dy + (w - c0) + c);
            product += how.load(sum_dyx + (w - c0) + c);
          }
          put(sum_dy + (w - c0) + c, grad, how);
          put(sum_dyx + (w - c0) + c, product, how);
        });
      }
    }
  }

  // What is fetched of the next slab while a line is written past the cache: of two arrays one, since of two most
  // fetches are dropped. Into the caches that `Ahead` has them in.
  template <int count>
  struct NextSlab {
    const T* from;
    size_t elements;  // to it; 0: there is none
    FASTNORM_INLINE void line(size_t i) const {
      if (elements != 0) __builtin_prefetch(from + elements + i, 0, count == 1 ? 3 : 2);
    }
  };

  // The same, and of all arrays the next row of the slab, from the last-level cache: the processor's own fetching
  // begins anew with each row.
  template <int count>
  struct NextRowAndSlab {
    Ahead<T, count> row;
    NextSlab<count> slab;
    FASTNORM_INLINE void line(size_t i) const {
      row.line(i);
      slab.line(i);
    }
  };

  // Writes group g's rows of channels [c0, c1) from those of the same offsets in `from`, `fold` rows at a time: line(c,
  // how) loads what the vector of columns from c on needs of its channels, value(at, how, line) makes the one of offset
  // `at`. Through the cache, a strip of columns at a time, whose coefficients stay in a first-level cache from row to
  // row; not several rows together: their parts of x and out are often whole pages apart.
  template <int count, class Line, class Value>
  FASTNORM_INLINE void write_rows(size_t g, size_t c0, size_t c1, const T* const (&from)[count], T* out,
                                  bool past_cache, size_t ahead, const Line& line, const Value& value) const {
    const size_t last = last_row(g), fold = cut.fold, n = (c1 - c0) * shape.inner, length = row_length(),
                 step = fold * length;
    const size_t first = first_row(g), start = first * length + c0 * shape.inner;
    const auto next_slab = [&](size_t at) { return NextSlab<count>{from[count - 1] + at, ahead}; };
    Writer<T> writer(past_cache);
    if (past_cache && n == length) {  // rows follow one another in memory: one run, whole vectors across their ends
      size_t begun = 0;
      writer.run(out + start, (last - first) * length, next_slab(start),
                 [&](size_t i, auto how) FASTNORM_INLINE_LAMBDA {
                   while (i >= begun + step) begun += step;
                   return value(start + i, how, line(i - begun, how));
                 });
      return;
    }
    const size_t wide = n * fold;
    if (!past_cache && n == length && wide <= kStripWidth)
      return write_all((last - first) * length, step, start, out, line, value);
    for (size_t c = 0, end; c < wide; c = end) {
      end = past_cache ? wide : std::min(wide, (c == 0 ? lead(out + start) : c) + kStripWidth);
      for (size_t r = first, at = start + c; r < last; r += fold, at += step) {
        NextRowAndSlab<count> next{{{}, step}, next_slab(at)};
        for (int k = 0; k < count; ++k) next.row.from[k] = from[k] + at;
        const size_t width = std::min(end, n * (last - r)) - c;
        const auto of = [&](size_t i, auto how) FASTNORM_INLINE_LAMBDA { return value(at + i, how, line(c + i, how)); };
        if (past_cache || aligned_alike())  // else aligned as the coefficients, as in `write_all`
          writer.run(out + at, width, next, of);
        else
          for_columns<A>(width, [&](size_t i, auto how) FASTNORM_INLINE_LAMBDA { put(out + at + i, of(i, how), how); });
      }
    }
  }

  // Rows of all channels, `all` elements from offset `at` on, coefficients being the same every `step` of them. Aligned
  // as the output where that aligns all: one run of whole vectors across the ends of rows, whose coefficients follow
  // one another. Else row by row, so that coefficients, which are more than x, dy and dx, are aligned: one core, us, as
  // one run and so, backward of GroupNorm NHWC (1, 7, 7, 282) 2.0 and 1.3, (18, 5, 5, 1109) 116 and 108.
  template <class Line, class Value>
  FASTNORM_INLINE void write_all(size_t all, size_t step, size_t at, T* out, const Line& line,
                                 const Value& value) const {
    constexpr size_t lanes = kLanes<A>;
    const auto write = [&](size_t i, size_t c, auto how)
                           FASTNORM_INLINE_LAMBDA { put(out + at + i, value(at + i, how, line(c, how)), how); };
    const size_t skip = aligned_alike() ? begun_at(out + at, all) : 0;
    if (skip == 0) {
      for (size_t row = 0; row < all; row += step)
        for_columns<A>(std::min(step, all - row),
                       [&](size_t c, auto how) FASTNORM_INLINE_LAMBDA { write(row + c, c, how); });
      return;
    }
    size_t i = lanes - skip, row = 0;
    write(0, 0, Part{i});
    for (; i + lanes <= all; row += step)
      for (const size_t end = std::min(row + step, all - lanes + 1); i < end; i += lanes) write(i, i - row, Whole{});
    if (i < all) write(i, i % step, Part{all - i});
  }

  void apply(const T* x, size_t g, size_t c0, size_t c1, Coefficients<A> k, T* y, bool past_cache, size_t ahead) const {
    struct Line {
      Vector<A> centre, scale, shift;
    };
    write_rows(
        g, c0, c1, {x}, y, past_cache, ahead,
        [&](size_t c, auto how) FASTNORM_INLINE_LAMBDA {
          return Line{how.load(k.centre + c), how.load(k.scale + c), how.load(k.shift + c)};
        },
        [&](size_t at, auto how, const Line& l)
            FASTNORM_INLINE_LAMBDA { return mul_add(how.load(x + at) - l.centre, l.scale, l.shift); });
  }

  template <class Form>
  void backward_apply(const T* dy, const T* x, size_t g, size_t c0, size_t c1, Coefficients<A> k, T* dx,
                      bool past_cache, size_t ahead) const {
    struct Line {
      Vector<A> centre, scale, shift, slope;
    };
    write_rows(
        g, c0, c1, {dy, x}, dx, past_cache, ahead,
        [&](size_t c, auto how) FASTNORM_INLINE_LAMBDA {
          return Line{how.load(k.centre + c), how.load(k.scale + c), how.load(k.shift + c), how.load(k.slope + c)};
        },
        [&](size_t at, auto how, const Line& l) FASTNORM_INLINE_LAMBDA {
          return Form::dx(how.load(dy + at), how.load(x + at) - l.centre, l.scale, l.shift, l.slope);
        });
  }
};

}  // namespace fastnorm::FASTNORM_LEVEL
