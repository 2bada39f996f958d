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

  // Elements of a task.
  static constexpr size_t kPiece = size_t{1} << 14;
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
    parallel_for((n + kPiece - 1) / kPiece, [&](size_t piece, int) {
      Writer<T> writer(past_cache);
      const size_t end = std::min(n, (piece + 1) * kPiece);
      for (size_t at = piece * kPiece, count; at < end; at += count) {
        const uint64_t index = first + at, skip = index % kStep;
        count = std::min<size_t>(kStep - skip, end - at);
        const uint64_t kept =
            all ? ~uint64_t{0} : philox.below(index / kStep * (kStep / 4), static_cast<uint32_t>(threshold)) >> skip;
        const T* from = x + at;
        writer.run(y + at, count, Ahead<T, 1>{{from + kReadAhead}},
                   [&](size_t i, auto how) FASTNORM_INLINE_LAMBDA -> Vector<A> {
                     return lanes_of(kept >> i << how.skip) ? how.load(from + i) * factor : Vector<A>{};
                   });
      }
    });
  }
};

}  // namespace fastnorm::FASTNORM_LEVEL
