// Philox-4x32-10 (Salmon, Moraes, Dror and Shaw, 2011): random numbers as a function of a counter and a key.
//
//   scalar:  c = {counter low half, counter high half, 0, 0},  k = {seed low half, seed high half}
//            ten times:  c = {hi(M1*c[2]) ^ c[1] ^ k[0], lo(M1*c[2]), hi(M0*c[0]) ^ c[3] ^ k[1], lo(M0*c[0])}
//                        k = {k[0] + W0, k[1] + W1}
//
// A vector works on one counter in each 64-bit lane: the four words of a counter are then four vectors, whose upper
// halves nobody looks at, and a product needs no shuffling before or after. So a round is two products, two shifts and
// two (AVX-512) or four exclusive ors.
#pragma once

#include <cstdint>

#include "fastnorm/simd.hpp"

namespace fastnorm::FASTNORM_LEVEL {

using std::uint32_t;
using std::uint64_t;

class Philox {
 public:
  explicit Philox(uint64_t seed) {
    auto low = static_cast<uint32_t>(seed), high = static_cast<uint32_t>(seed >> 32);
    for (auto& key : keys_) {
      key[0] = Wide{} + low;
      key[1] = Wide{} + high;
      low += 0x9E3779B9u;
      high += 0xBB67AE85u;
    }
  }

  // How many times 64 words are drawn together. A round waits for its products, and the two vectors of 64 words leave
  // AVX-512 idle meanwhile: with four, dropout of 256 K elements took one core 58 us instead of 73; six: 55. AVX2 has
  // four vectors in 64 words, and no registers for more.
#if FASTNORM_AVX512
  static constexpr int kBlocks = 2;
#else
  static constexpr int kBlocks = 1;
#endif

  // Which of 64*kBlocks words are below the threshold, as bits: those of 16*kBlocks counters from this one on.
  FASTNORM_INLINE void below(uint64_t counter, uint32_t threshold, uint64_t (&bits)[kBlocks]) const {
    Bits32 found[kVectors][2];
    words(counter, found);
    constexpr int kWords = kVectorBytes / sizeof(uint32_t);
#pragma GCC unroll 8
    for (int b = 0; b < kBlocks; ++b) {
      uint64_t block = 0;
#pragma GCC unroll 16
      for (int i = 0; i < 64 / kWords; ++i) {
        const int at = b * (64 / kWords) + i;
        block |= lanes_below(found[at / 2][at % 2], threshold) << (i * kWords);
      }
      bits[b] = block;
    }
  }

 private:
  typedef uint64_t Wide __attribute__((vector_size(kVectorBytes)));
  static constexpr int kCounters = kVectorBytes / sizeof(uint64_t);
  static constexpr int kVectors = 16 * kBlocks / kCounters;
  static constexpr int kRounds = 10;

  // The 64-bit products of the lanes' lower halves.
  static FASTNORM_INLINE Wide product(Wide a, Wide b) {
#if FASTNORM_AVX512
    return (Wide)_mm512_maskz_mul_epu32(0xff, (__m512i)a, (__m512i)b);  // the plain form warns, as in simd.hpp
#elif FASTNORM_AVX2
    return (Wide)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
    return (Wide)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
    return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
  }

  static FASTNORM_INLINE uint64_t lanes_below(Bits32 words, uint32_t threshold) {
#if FASTNORM_AVX512
    return _mm512_cmplt_epu32_mask((__m512i)words, _mm512_set1_epi32(static_cast<int>(threshold)));
#elif FASTNORM_AVX2
    return static_cast<uint32_t>(_mm256_movemask_ps((__m256)(words < threshold)));
#elif defined(__SSE2__)
    return static_cast<uint32_t>(_mm_movemask_ps((__m128)(words < threshold)));
#else
    uint64_t bits = 0;
    for (size_t i = 0; i < kLanes<float>; ++i) bits |= static_cast<uint64_t>(words[i] < threshold) << i;
    return bits;
#endif
  }

  // The words of these counters, in order. All vectors go through a round before the next, since a round waits for its
  // products: one vector after the other, dropout of 1 MB took 1.15 times as long with AVX2 and AVX-512, 1.5 with SSE2.
  FASTNORM_INLINE void words(uint64_t counter, Bits32 (&found)[kVectors][2]) const {
    // Even lanes take the first half of a vector's counters and odd ones the second, so that interleaving the lanes of
    // two vectors puts words in order.
    Wide numbers{}, evens{}, odds{};
    for (int i = 0; i < kCounters; ++i) {
      numbers[i] = static_cast<uint64_t>(i / 2 + i % 2 * (kCounters / 2));
      evens[i] = static_cast<uint64_t>(i % 2 == 0 ? i : kCounters + i - 1);
      odds[i] = static_cast<uint64_t>(i % 2 == 0 ? i + 1 : kCounters + i);
    }
    const Wide m0 = Wide{} + 0xD2511F53u, m1 = Wide{} + 0xCD9E8D57u;
    Wide c0[kVectors], c1[kVectors], c2[kVectors], c3[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      c0[v] = numbers + (counter + static_cast<uint64_t>(v * kCounters));
      c1[v] = c0[v] >> 32;
      c2[v] = c3[v] = Wide{};
    }
#pragma GCC unroll 10
    for (int round = 0; round < kRounds - 1; ++round) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        const Wide p0 = product(c0[v], m0), p1 = product(c2[v], m1);
        c0[v] = (p1 >> 32) ^ c1[v] ^ keys_[round][0];
        c2[v] = (p0 >> 32) ^ c3[v] ^ keys_[round][1];
        c1[v] = p1;
        c3[v] = p0;
      }
    }
    // The last round leaves words 0 and 1 in one lane, and words 2 and 3: the halves of the products change places.
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      const Wide p0 = product(c0[v], m0), p1 = product(c2[v], m1);
      const Wide w01 = (p1 >> 32 | p1 << 32) ^ (c1[v] & 0xffffffffu) ^ keys_[kRounds - 1][0];
      const Wide w23 = (p0 >> 32 | p0 << 32) ^ (c3[v] & 0xffffffffu) ^ keys_[kRounds - 1][1];
      found[v][0] = (Bits32)__builtin_shuffle(w01, w23, evens);
      found[v][1] = (Bits32)__builtin_shuffle(w01, w23, odds);
    }
  }

  Wide keys_[kRounds][2];
};

}  // namespace fastnorm::FASTNORM_LEVEL
