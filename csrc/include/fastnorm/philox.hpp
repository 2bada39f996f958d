// Philox-4x32-7 (Salmon, Moraes, Dror and Shaw, 2011): random numbers as a function of a counter and a key.
//
//   scalar:  c = {counter low half, counter high half, stream, 0},  k = {seed low half, seed high half}
//            seven times:  c = {hi(M1*c[2]) ^ c[1] ^ k[0], lo(M1*c[2]), hi(M0*c[0]) ^ c[3] ^ k[1], lo(M0*c[0])}
//                          k = {k[0] + W0, k[1] + W1}
//            number(j) = c[j / 2] >> 16*(j % 2) & 0xffff, j from 0 to 7: the words cut in halves, the lower one first
//
// A vector works on one counter in each 64-bit lane: the four words of a counter are then four vectors, whose upper
// halves nobody looks at, and a product needs no shuffling before or after. So a round is two products, two shifts and
// two (AVX-512) or four exclusive ors.
#pragma once

#include <cstdint>

#include "fastnorm/simd.hpp"

namespace fastnorm::FASTNORM_LEVEL {

using std::uint16_t;
using std::uint32_t;
using std::uint64_t;

class Philox {
  typedef uint64_t Wide __attribute__((vector_size(kVectorBytes)));
  typedef uint16_t Numbers __attribute__((vector_size(kVectorBytes)));
  static constexpr uint32_t kM0 = 0xD2511F53u, kM1 = 0xCD9E8D57u, kW0 = 0x9E3779B9u, kW1 = 0xBB67AE85u;
  static constexpr int kRounds = 7;
  static constexpr int kCounters = kVectorBytes / sizeof(uint64_t);
  // Vectors that go through a round together, since a round waits for its products: as many as registers hold. With
  // four of them AVX-512 takes 4.3 ns for 64 numbers, with six 3.6.
#if FASTNORM_AVX512
  static constexpr int kVectors = 6;
#else
  static constexpr int kVectors = 4;
#endif

 public:
  static constexpr int kNumbers = 8;  // of a counter
  // Numbers that are drawn together, 64 for each of these; as bits they are one word.
  static constexpr int kWords = kVectors * kCounters * kNumbers / 64;
  struct Bits {
    uint64_t word[kWords];
  };

  explicit Philox(uint64_t seed) {
    auto low = static_cast<uint32_t>(seed), high = static_cast<uint32_t>(seed >> 32);
    for (auto& key : keys_) {
      key[0] = Wide{} + low;
      key[1] = Wide{} + high;
      low += kW0;
      high += kW1;
    }
  }

  // Which numbers of stream 0 are below the limit, from those of this counter on. Whether any is equal to it.
  FASTNORM_INLINE bool compare(uint64_t counter, uint16_t limit, Bits& below) const {
    Ties first, second;
    below = bits_of(counter, [&](Numbers w01, Numbers w23) FASTNORM_INLINE_LAMBDA {
      first.look(w01, limit);
      second.look(w23, limit);
      return in_order(are_below(w01, limit), are_below(w23, limit));
    });
    return first.any() || second.any();
  }

  // Which are equal to it: drawn once more, since there is one every 65,536 numbers.
  __attribute__((noinline, cold)) Bits equal(uint64_t counter, uint16_t limit) const {
    return bits_of(counter, [&](Numbers w01, Numbers w23)
                                FASTNORM_INLINE_LAMBDA { return in_order(are(w01, limit), are(w23, limit)); });
  }

  // Number j of a counter.
  uint16_t number(uint64_t counter, uint32_t stream, int j) const {
    uint32_t c[4] = {static_cast<uint32_t>(counter), static_cast<uint32_t>(counter >> 32), stream, 0};
    for (const auto& key : keys_) {
      const uint64_t p0 = uint64_t{kM0} * c[0], p1 = uint64_t{kM1} * c[2];
      c[0] = static_cast<uint32_t>(p1 >> 32 ^ key[0][0]) ^ c[1];
      c[1] = static_cast<uint32_t>(p1);
      c[2] = static_cast<uint32_t>(p0 >> 32 ^ key[1][0]) ^ c[3];
      c[3] = static_cast<uint32_t>(p0);
    }
    return static_cast<uint16_t>(c[j / 2] >> j % 2 * 16);
  }

 private:
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

  // Bits of the numbers from this counter on: of(words 0 and 1, words 2 and 3) gives those of a vector of counters.
  template <class Of>
  FASTNORM_INLINE Bits bits_of(uint64_t counter, const Of& of) const {
    Numbers found[kVectors][2];
    draw(counter, found);
    constexpr int kEach = kCounters * kNumbers;
    Bits bits{};
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) bits.word[v * kEach / 64] |= of(found[v][0], found[v][1]) << v * kEach % 64;
    return bits;
  }

  // Words 0 and 1 of these counters, and words 2 and 3, a counter in each 64-bit lane.
  FASTNORM_INLINE void draw(uint64_t counter, Numbers (&found)[kVectors][2]) const {
    Wide lanes{};
    for (int i = 0; i < kCounters; ++i) lanes[i] = static_cast<uint64_t>(i);
    const Wide m0 = Wide{} + kM0, m1 = Wide{} + kM1;
    Wide c0[kVectors], c1[kVectors], c2[kVectors], c3[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      c0[v] = lanes + (counter + static_cast<uint64_t>(v * kCounters));
      c1[v] = c0[v] >> 32;
      c2[v] = c3[v] = Wide{};
    }
#pragma GCC unroll 8
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
    // The last round leaves two words in a lane: the halves of the products change places.
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      const Wide p0 = product(c0[v], m0), p1 = product(c2[v], m1);
      found[v][0] = (Numbers)((p1 >> 32 | p1 << 32) ^ (c1[v] & 0xffffffffu) ^ keys_[kRounds - 1][0]);
      found[v][1] = (Numbers)((p0 >> 32 | p0 << 32) ^ (c3[v] & 0xffffffffu) ^ keys_[kRounds - 1][1]);
    }
  }

  // Comparisons, and the bits of those of words 0 and 1 with those of words 2 and 3: four of a counter, then four of
  // the other vector.
#if FASTNORM_AVX512
  static FASTNORM_INLINE uint64_t are_below(Numbers v, uint16_t limit) {
    return _mm512_cmplt_epu16_mask((__m512i)v, _mm512_set1_epi16(static_cast<short>(limit)));
  }
  static FASTNORM_INLINE uint64_t are(Numbers v, uint16_t limit) {
    return _mm512_cmpeq_epu16_mask((__m512i)v, _mm512_set1_epi16(static_cast<short>(limit)));
  }
  class Ties {
   public:
    FASTNORM_INLINE void look(Numbers v, uint16_t limit) {
      none_ = _mm512_mask_cmpneq_epu16_mask(none_, (__m512i)v, _mm512_set1_epi16(static_cast<short>(limit)));
    }
    FASTNORM_INLINE bool any() const { return none_ != 0xffffffff; }

   private:
    __mmask32 none_ = 0xffffffff;
  };
  static FASTNORM_INLINE uint64_t in_order(uint64_t first, uint64_t second) {
    return _pdep_u64(first, 0x0f0f0f0f0f0f0f0f) | _pdep_u64(second, 0xf0f0f0f0f0f0f0f0);
  }
#else
  static FASTNORM_INLINE Numbers are_below(Numbers v, uint16_t limit) { return (Numbers)(v < limit); }
  static FASTNORM_INLINE Numbers are(Numbers v, uint16_t limit) { return (Numbers)(v == limit); }
  class Ties {
   public:
    FASTNORM_INLINE void look(Numbers v, uint16_t limit) { found_ |= are(v, limit); }
    FASTNORM_INLINE bool any() const {
      const Wide words = (Wide)found_;
      uint64_t all = 0;
      for (int i = 0; i < kCounters; ++i) all |= words[i];
      return all != 0;
    }

   private:
    Numbers found_{};
  };
  static FASTNORM_INLINE uint64_t in_order(Numbers first, Numbers second) {
#if FASTNORM_AVX2  // a byte of a number: in 16 bytes two counters of `first`, then two of `second`, four bytes each
    const __m256i bytes = _mm256_packs_epi16((__m256i)first, (__m256i)second);
    return static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_shuffle_epi32(bytes, _MM_SHUFFLE(3, 1, 2, 0))));
#elif defined(__SSE2__)
    const __m128i bytes = _mm_packs_epi16((__m128i)first, (__m128i)second);
    return static_cast<uint32_t>(_mm_movemask_epi8(_mm_shuffle_epi32(bytes, _MM_SHUFFLE(3, 1, 2, 0))));
#else
    uint64_t bits = 0;
    for (int i = 0; i < 4 * kCounters; ++i) {
      const int at = i / 4 * kNumbers + i % 4;
      bits |= uint64_t{first[i] & 1u} << at | uint64_t{second[i] & 1u} << (at + 4);
    }
    return bits;
#endif
  }
#endif

  Wide keys_[kRounds][2];
};

}  // namespace fastnorm::FASTNORM_LEVEL
