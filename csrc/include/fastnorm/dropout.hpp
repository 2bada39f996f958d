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
  // Elements whose words are drawn at a time: their fates are the bits of one number. Drawing them is work for the
  // processor and writing them is work for the memory, and small steps let the two overlap.
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
    // The fates of the kStep elements that this one is among, numbers counted from a multiple of kStep.
    const auto fates = [&](uint64_t index) FASTNORM_INLINE_LAMBDA {
      return all ? ~uint64_t{0} : philox.below(index / kStep * (kStep / 4), static_cast<uint32_t>(threshold));
    };
    parallel_for((n + piece - 1) / piece, [&](size_t task, int) {
      Writer<T> writer(past_cache);
      const size_t end = std::min(n, (task + 1) * piece);
      size_t at = task * piece;
      // Steps are cut where lines of the output begin, so that a step is whole lines: with broken ones at both ends,
      // 128 MB of float32 that begin 4 bytes after a line took 6.2 ms instead of 5.6.
      size_t count = kStep - reinterpret_cast<std::uintptr_t>(y + at) % kLineBytes / sizeof(T);
      uint64_t drawn = fates(first + at);
      for (; at < end; at += count, count = kStep) {
        count = std::min(count, end - at);
        const uint64_t index = first + at, skip = index % kStep;
        uint64_t kept = drawn >> skip;
        if (skip + count >= kStep) {
          drawn = fates(index + kStep);
          if (skip > 0) kept |= drawn << (kStep - skip);
        }
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
