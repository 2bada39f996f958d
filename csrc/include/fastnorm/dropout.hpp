// Dropout, forward and backward alike.
//
//   scalar:  word = philox(counter (first + i)/4, key seed)[(first + i) % 4]
//            y[i] = word < threshold ? x[i]*scale : 0
#pragma once

#include <algorithm>

#include "fastnorm/channel.hpp"
#include "fastnorm/philox.hpp"

namespace fastnorm::FASTNORM_LEVEL {

// Which elements are kept, as the bits of a number for kStep of them at a time.
class Fates {
 public:
  static constexpr size_t kStep = 64;

  // The first number is for the elements from index / kStep * kStep on.
  Fates(const Philox& philox, uint64_t threshold, uint64_t index)
      : philox_(philox), threshold_(threshold), counter_(index / kStep * (kStep / 4)) {}

  FASTNORM_INLINE uint64_t next() {
    if (threshold_ >> 32 != 0) return ~uint64_t{0};
    if (at_ == Philox::kBlocks) {
      philox_.below(counter_, static_cast<uint32_t>(threshold_), drawn_);
      counter_ += Philox::kBlocks * (kStep / 4);
      at_ = 0;
    }
    return drawn_[at_++];
  }

 private:
  const Philox& philox_;
  uint64_t threshold_, counter_, drawn_[Philox::kBlocks];
  int at_ = Philox::kBlocks;
};

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
  static constexpr size_t kStep = Fates::kStep;

  // The lanes of bits 0, 1, ... that are set, 0 in the others.
  static FASTNORM_INLINE Vector<A> lanes_of(uint64_t bits, Vector<A> v) {
#if FASTNORM_AVX512
    if constexpr (sizeof(A) == 4)
      return (Vector<A>)_mm512_maskz_mov_ps(static_cast<__mmask16>(bits), (__m512)v);
    else
      return (Vector<A>)_mm512_maskz_mov_pd(static_cast<__mmask8>(bits), (__m512d)v);
#else
    const Indices<A> bit = (Indices<A>{} + 1) << lane_numbers<A>();
    return ((Indices<A>{} + static_cast<Index<A> >(bits)) & bit) != 0 ? v : Vector<A>{};
#endif
  }

  static void run(const T* x, size_t n, uint64_t first, uint64_t seed, uint64_t threshold, double scale, T* y) {
    const Philox philox(seed);
    const bool past_cache = streams(n * sizeof(T), 1);
    const Vector<A> factor = broadcast(static_cast<A>(scale));
    const size_t piece = past_cache ? kStreamedPiece : kPiece;
    parallel_for((n + piece - 1) / piece, [&](size_t task, int) {
      Writer<T> writer(past_cache);
      const size_t end = std::min(n, (task + 1) * piece);
      size_t at = task * piece;
      // Steps are cut where lines of the output begin, so that a step is whole lines: with broken ones at both ends,
      // 128 MB of float32 that begin 4 bytes after a line took 6.2 ms instead of 5.6.
      size_t count = kStep - reinterpret_cast<std::uintptr_t>(y + at) % kLineBytes / sizeof(T);
      Fates fates(philox, threshold, first + at);
      uint64_t drawn = fates.next();
      for (; at < end; at += count, count = kStep) {
        count = std::min(count, end - at);
        const uint64_t index = first + at, skip = index % kStep;
        uint64_t kept = drawn >> skip;
        if (skip + count >= kStep) {
          drawn = fates.next();
          if (skip > 0) kept |= drawn << (kStep - skip);
        }
        const T* from = x + at;
        writer.run(y + at, count, Ahead<T, 1>{{from + kFetch}},
                   [&](size_t i, auto how) FASTNORM_INLINE_LAMBDA -> Vector<A> {
                     return lanes_of(kept >> i << how.skip, how.load(from + i) * factor);
                   });
      }
    });
  }
};

}  // namespace fastnorm::FASTNORM_LEVEL
