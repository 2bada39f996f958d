// Dropout, forward and backward alike.
//
//   scalar:  word = philox(counter (first + i)/4, key seed)[(first + i) % 4]
//            y[i] = word < threshold ? x[i]*scale : 0
#pragma once

#include <algorithm>

#include "fastnorm/channel.hpp"
#include "fastnorm/philox.hpp"

namespace fastnorm::FASTNORM_LEVEL {

template <class T>
struct Dropout {
  using A = Acc<T>;

  // Elements of a task, which take a core 4 us, and of one that stores past the cache: with the smaller ones 256 MB of
  // float32 took 12.2 ms instead of 11.3.
  static constexpr size_t kPiece = size_t{1} << 14, kStreamedPiece = size_t{1} << 16;
  // Elements from those being written to those being fetched: with kReadAhead 64 MB of float16 took 5.6 ms, not 5.1.
  static constexpr size_t kFetch = 1024;
  // Elements whose words are drawn at a time: their bits are one number. Drawing them is work for the processor and
  // writing them is work for the memory, and small steps let the two overlap.
  static constexpr size_t kStep = 64;

  // All bits set in the lanes of bits 0, 1, ...
  static FASTNORM_INLINE Indices<A> lanes_of(uint64_t bits) {
    const Indices<A> bit = (Indices<A>{} + 1) << lane_numbers<A>();
    return ((Indices<A>{} + static_cast<Index<A>>(bits)) & bit) != 0;
  }

  static void run(const T* x, size_t n, uint64_t first, uint64_t seed, uint64_t threshold, double scale, T* y) {
    const Philox philox(seed);
    const bool all = threshold >> 32 != 0, past_cache = streams(n * sizeof(T));
    const Vector<A> factor = broadcast(static_cast<A>(scale));
    const size_t piece = past_cache ? kStreamedPiece : kPiece;
    parallel_for((n + piece - 1) / piece, [&](size_t task, int) {
      Writer<T> writer(past_cache);
      const size_t end = std::min(n, (task + 1) * piece);
      for (size_t at = task * piece, count; at < end; at += count) {
        const uint64_t index = first + at, skip = index % kStep;
        count = std::min<size_t>(kStep - skip, end - at);
        const uint64_t kept =
            all ? ~uint64_t{0} : philox.below(index / kStep * (kStep / 4), static_cast<uint32_t>(threshold)) >> skip;
        const T* from = x + at;
        writer.run(y + at, count, Ahead<T, 1>{{from + kFetch}},
                   [&](size_t i, auto how) FASTNORM_INLINE_LAMBDA -> Vector<A> {
                     return lanes_of(kept >> i << how.skip) ? how.load(from + i) * factor : Vector<A>{};
                   });
      }
    });
  }
};

}  // namespace fastnorm::FASTNORM_LEVEL
