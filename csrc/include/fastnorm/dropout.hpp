// Dropout, forward and backward alike.
//
//   scalar:  word = number(first + i, stream 0) << 16 | number(first + i, stream 1), with number(index, stream) =
//            number index % 8 of what Philox makes of the counter index/8
//            y[i] = word < threshold ? x[i]*scale : 0
//
// Stream 1 is looked at only for the element in 65,536 whose number of stream 0 is that of the threshold.
#pragma once

#include <algorithm>

#include "fastnorm/channel.hpp"
#include "fastnorm/philox.hpp"
#include "fastnorm/plan.hpp"

namespace fastnorm::FASTNORM_LEVEL {

// Which elements are kept, as bits.
class Fates {
 public:
  using Bits = Philox::Bits;
  static constexpr size_t kStep = 64 * Philox::kWords;
  static_assert(kDrawn % kStep == 0);

  // The first bits are `shift` of no meaning, fewer than 64, then those of the elements from index / 64 * 64 on.
  Fates(const Philox& philox, uint64_t threshold, uint64_t index, size_t shift)
      : philox_(philox), threshold_(threshold), counter_(index / 64 * (64 / Philox::kNumbers)), shift_(shift) {}

  // Of the next kStep elements.
  FASTNORM_INLINE Bits next() {
    Bits kept;
    if (threshold_ >> 32 != 0) {
      for (uint64_t& word : kept.word) word = ~uint64_t{0};
      return kept;
    }
    const auto upper = static_cast<uint16_t>(threshold_ >> 16);
    if (philox_.compare(counter_, upper, kept)) kept = settled(kept, philox_.equal(counter_, upper));
    counter_ += kStep / Philox::kNumbers;
    if (shift_ != 0)
      for (uint64_t& word : kept.word) {
        const uint64_t late = word >> (64 - shift_);
        word = word << shift_ | carried_;
        carried_ = late;
      }
    return kept;
  }

 private:
  // With the elements that tie with the upper half of the threshold. All by value, so that they are registers where
  // there is none.
  __attribute__((noinline, cold)) Bits settled(Bits kept, Bits ties) const {
    for (size_t i = 0; i < kStep; ++i)
      if (ties.word[i / 64] >> i % 64 & 1) {
        const uint16_t lower =
            philox_.number(counter_ + i / Philox::kNumbers, 1, static_cast<int>(i % Philox::kNumbers));
        kept.word[i / 64] |= uint64_t{lower < (threshold_ & 0xffff)} << i % 64;
      }
    return kept;
  }

  const Philox& philox_;
  uint64_t threshold_, counter_, carried_ = 0;
  size_t shift_;
};

template <class T>
struct Dropout {
  using A = Acc<T>;

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
    const DropoutPlan plan = plan_dropout(n, sizeof(T));
    constexpr bool kLines = kLanes<A> * sizeof(T) == kLineBytes;
    const Vector<A> factor = broadcast(static_cast<A>(scale));
    parallel_for(plan.tasks, [&](size_t task, int) {
      Writer<T> writer(plan.stream);
      // At most 64 elements, whose bits these are.
      const auto write = [&](size_t at, size_t count, uint64_t kept) FASTNORM_INLINE_LAMBDA {
        const T* from = x + at;
        writer.run(y + at, count, Ahead<T, 1>{{from}, plan.ahead},
                   [&](size_t i, auto how) FASTNORM_INLINE_LAMBDA -> Vector<A> {
                     return lanes_of(kept >> i << how.skip, how.load(from + i) * factor);
                   });
      };
      // All 64.
      const auto write_word = [&](size_t at, uint64_t kept) FASTNORM_INLINE_LAMBDA {
        if (!kLines || plan.stream) return write(at, 64, kept);
        repeat<64 / kLanes<A> >([&](auto k) FASTNORM_INLINE_LAMBDA {
          constexpr size_t i = k * kLanes<A>;
          store(y + at + i, lanes_of(kept >> i, Whole{}.load(x + at + i) * factor));
        });
      };
      // The bits are shifted until a word ends where a line of the output does, past the cache and where a vector fills
      // a line. With broken lines at both ends of 64 elements, 128 MB of float32 that begin 4 bytes after a line
      // took 6.2 ms instead of 5.6; in the cache, with vectors in two lines each, (1024, 1024) 66 us instead of 59,
      // (4096, 768) 257 instead of 212. But float16, whose vectors are half of a line, takes 1.02 times as long with
      // it.
      const size_t begin = task * plan.task, count = std::min(plan.task, n - begin), skip = (first + begin) % 64;
      const size_t broken = reinterpret_cast<std::uintptr_t>(y + begin) % kLineBytes / sizeof(T);
      const size_t shift = kLines || plan.stream ? (broken - skip) % 64 : 0;
      Fates fates(philox, threshold, first + begin, shift);
      const size_t lead = skip + shift;  // bits before that of the first element
      for (size_t bit = 0; bit < lead + count; bit += Fates::kStep) {
        const Fates::Bits kept = fates.next();
        if (bit >= lead && bit + Fates::kStep <= lead + count) {
          repeat<Philox::kWords>([&](auto w)
                                     FASTNORM_INLINE_LAMBDA { write_word(begin + bit - lead + 64 * w, kept.word[w]); });
          continue;
        }
        for (size_t w = 0; w < Philox::kWords; ++w) {
          const size_t from = std::max(bit + 64 * w, lead), to = std::min(bit + 64 * w + 64, lead + count);
          if (from < to) write(begin + from - lead, to - from, kept.word[w] >> from % 64);
        }
      }
    });
  }
};

}  // namespace fastnorm::FASTNORM_LEVEL
