// Vectors of one instruction set level, on GCC's vector extensions: load, store, stream, partial ends.
// Everything here lives in the level's own namespace, so no level can link another's code by accident.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

#include "fastnorm/kernels.hpp"

// For what inner loops are made of. A closure passed to a real call goes through memory in pieces, and reading
// it back in one vector waits for all streamed stores before it: LayerNorm on rows of 128 took twice the time.
#define FASTNORM_INLINE __attribute__((always_inline)) inline
#define FASTNORM_INLINE_LAMBDA __attribute__((always_inline))

namespace fastnorm::FASTNORM_LEVEL {

using std::size_t;

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define FASTNORM_AVX512 1
constexpr size_t kVectorBytes = 64;
#elif defined(__AVX2__) && defined(__F16C__)
#define FASTNORM_AVX2 1
constexpr size_t kVectorBytes = 32;
#else
constexpr size_t kVectorBytes = 16;
#endif
constexpr size_t kLineBytes = 64;

template <class A>
struct VectorOf {
  typedef A type __attribute__((vector_size(kVectorBytes)));
};
template <class A>
using Vector = typename VectorOf<A>::type;
template <class A>
constexpr size_t kLanes = kVectorBytes / sizeof(A);

// The type arithmetic runs in: float for the narrow storage types.
template <class T>
struct AccumulationOf {
  using type = float;
};
template <>
struct AccumulationOf<double> {
  using type = double;
};
template <class T>
using Acc = typename AccumulationOf<T>::type;

template <class A>
FASTNORM_INLINE Vector<A> broadcast(A value) {
  return value - Vector<A>{};  // value - 0 keeps every value, -0 and NaN included
}

// ---- whole vectors ---------------------------------------------------------------------------------

using Floats = Vector<float>;
typedef std::uint16_t Bits16 __attribute__((vector_size(kVectorBytes / 2)));
typedef std::uint32_t Bits32 __attribute__((vector_size(kVectorBytes)));

template <class V, class T>
FASTNORM_INLINE V bits_at(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// 16 bits to 32 and back. By instructions where there is one: gcc 12 makes two halves of a vector and joins them, and
// bfloat16 then takes a third to a half longer.
#if FASTNORM_AVX512
// The masked forms with a full mask: gcc 12 warns of an uninitialized value inside the plain ones.
FASTNORM_INLINE Bits32 lengthen(Bits16 bits) { return (Bits32)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)bits); }
FASTNORM_INLINE Bits16 shorten(Bits32 words) { return (Bits16)_mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)words); }
#elif FASTNORM_AVX2
FASTNORM_INLINE Bits32 lengthen(Bits16 bits) { return (Bits32)_mm256_cvtepu16_epi32((__m128i)bits); }
FASTNORM_INLINE Bits16 shorten(Bits32 words) {
  return (Bits16)_mm_packus_epi32(_mm256_castsi256_si128((__m256i)words), _mm256_extracti128_si256((__m256i)words, 1));
}
#else
FASTNORM_INLINE Bits32 lengthen(Bits16 bits) { return __builtin_convertvector(bits, Bits32); }
FASTNORM_INLINE Bits16 shorten(Bits32 words) { return __builtin_convertvector(words, Bits16); }
#endif

FASTNORM_INLINE Floats widen(Bits16 bits, BFloat16) { return (Floats)(lengthen(bits) << 16); }

FASTNORM_INLINE Bits16 narrow(Floats v, BFloat16) {
  const Bits32 u = (Bits32)v;
  const Bits32 rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const Bits32 quiet = (u >> 16) | 0x40u;
  const auto nan = v != v;
  return shorten((Bits32)(nan ? quiet : rounded));
}

#if FASTNORM_AVX512
FASTNORM_INLINE Floats widen(Bits16 bits, Half) { return (Floats)_mm512_maskz_cvtph_ps(0xffff, (__m256i)bits); }
FASTNORM_INLINE Bits16 narrow(Floats v, Half) {
  return (Bits16)_mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT);
}
#elif FASTNORM_AVX2
FASTNORM_INLINE Floats widen(Bits16 bits, Half) { return (Floats)_mm256_cvtph_ps((__m128i)bits); }
FASTNORM_INLINE Bits16 narrow(Floats v, Half) { return (Bits16)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT); }
#else
// Without F16C, in integer and float arithmetic: the exponent is rebased by a multiplication, which also
// normalizes subnormals.
FASTNORM_INLINE Floats widen(Bits16 bits, Half) {
  const Bits32 u = lengthen(bits);
  const Bits32 magnitude = (u & 0x7fffu) << 13;
  const Floats scaled = (Floats)magnitude * 0x1p112f;
  const Bits32 special = magnitude | 0x7f800000u;
  const auto infinite = magnitude >= (0x7c00u << 13);
  return (Floats)((Bits32)(infinite ? special : (Bits32)scaled) | ((u & 0x8000u) << 16));
}
FASTNORM_INLINE Bits16 narrow(Floats v, Half) {
  const Bits32 u = (Bits32)v;
  const Bits32 sign = (u >> 16) & 0x8000u;
  const Bits32 magnitude = u & 0x7fffffffu;
  // Normal results: round the mantissa to 10 bits, ties to even. Subnormal ones: let float addition round.
  const Bits32 normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const Bits32 subnormal = (Bits32)((Floats)magnitude + 0.5f) - 0x3f000000u;
  const Bits32 nan = 0x7e00u | (magnitude >> 13 & 0x3ffu);
  const Bits32 infinity = Bits32{} + 0x7c00u;
  const auto is_subnormal = magnitude < 0x38800000u;
  const auto overflows = magnitude >= 0x477ff000u;
  const auto is_nan = magnitude > 0x7f800000u;
  Bits32 result = is_subnormal ? subnormal : normal;
  result = overflows ? (is_nan ? nan : infinity) : result;
  return shorten(result | sign);
}
#endif

template <class T>
FASTNORM_INLINE Vector<Acc<T>> load(const T* p) {
  if constexpr (sizeof(T) == 2)
    return widen(bits_at<Bits16>(p), T{});
  else
    return bits_at<Vector<T>>(p);
}

template <class T>
FASTNORM_INLINE void store(T* p, Vector<Acc<T>> v) {
  if constexpr (sizeof(T) == 2) {
    const Bits16 bits = narrow(v, T{});
    std::memcpy(p, &bits, sizeof bits);
  } else {
    std::memcpy(p, &v, sizeof v);
  }
}

// Past the cache; p is aligned to what is stored. Ordered before later loads by `fence`.
template <class T>
FASTNORM_INLINE void stream(T* p, Vector<Acc<T>> v) {
#if FASTNORM_AVX512
  if constexpr (sizeof(T) == 2)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)narrow(v, T{}));
  else
    _mm512_stream_si512(reinterpret_cast<__m512i*>(p), (__m512i)v);
#elif FASTNORM_AVX2
  if constexpr (sizeof(T) == 2)
    _mm_stream_si128(reinterpret_cast<__m128i*>(p), (__m128i)narrow(v, T{}));
  else
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)v);
#elif defined(__SSE2__)
  if constexpr (sizeof(T) == 2)
    store(p, v);
  else
    _mm_stream_si128(reinterpret_cast<__m128i*>(p), (__m128i)v);
#else
  store(p, v);
#endif
}

FASTNORM_INLINE void fence() {
#ifdef __SSE2__
  _mm_sfence();
#endif
}

template <class A>
using Index = std::conditional_t<sizeof(A) == 4, std::int32_t, std::int64_t>;
template <class A>
struct IndicesOf {
  typedef Index<A> type __attribute__((vector_size(kVectorBytes)));
};
template <class A>
using Indices = typename IndicesOf<A>::type;

template <class A>
FASTNORM_INLINE Indices<A> lane_numbers() {
  Indices<A> numbers{};
  for (size_t i = 0; i < kLanes<A>; ++i) numbers[i] = static_cast<Index<A>>(i);
  return numbers;
}

// numbers / size, of numbers less than 32 by a size of 16 at most: vectors have no division.
template <class I>
FASTNORM_INLINE I over(I numbers, size_t size) {
  return numbers * static_cast<std::remove_reference_t<decltype(numbers[0])>>(4096 / size + 1) >> 12;
}

// All bits set in lanes [first, last).
template <class A>
FASTNORM_INLINE Indices<A> lanes_between(size_t first, size_t last) {
  const Indices<A> numbers = lane_numbers<A>();
  return (numbers >= static_cast<Index<A>>(first)) & (numbers < static_cast<Index<A>>(last));
}

// a*b + c, fused where the level can: the only place where contraction happens.
template <class V>
FASTNORM_INLINE V mul_add(V a, V b, V c) {
#if FASTNORM_AVX512
  if constexpr (std::is_same_v<V, Floats>)
    return (V)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
  else
    return (V)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif FASTNORM_AVX2
  if constexpr (std::is_same_v<V, Floats>)
    return (V)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
  else
    return (V)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#else
  return a * b + c;
#endif
}

// ---- ends that do not fill a vector ----------------------------------------------------------------

// Lanes [skip, skip + n) from p on, the others from `fill`. Masked, not through memory: a load from a spot just
// written waits until the streamed stores before it are done, some 70 ns.
template <class T>
FASTNORM_INLINE Vector<Acc<T>> load_part(const T* p, size_t n, Vector<Acc<T>> fill, size_t skip = 0) {
#if FASTNORM_AVX512
  const auto mask = static_cast<__mmask16>(((1u << n) - 1) << skip);
  if constexpr (sizeof(T) == 4)
    return (Floats)_mm512_mask_loadu_ps((__m512)fill, mask, p - skip);
  else if constexpr (sizeof(T) == 8)
    return (Vector<Acc<T>>)_mm512_mask_loadu_pd((__m512d)fill, static_cast<__mmask8>(mask), p - skip);
  else {
    const Floats loaded = widen((Bits16)_mm256_maskz_loadu_epi16(mask, p - skip), T{});
    return (Floats)_mm512_mask_blend_ps(mask, (__m512)fill, (__m512)loaded);
  }
#else
#if FASTNORM_AVX2
  if constexpr (sizeof(T) == 4) {
    const auto mask = lanes_between<T>(skip, skip + n);
    return mask ? (Floats)_mm256_maskload_ps(p - skip, (__m256i)mask) : fill;
  } else if constexpr (sizeof(T) == 8) {
    const auto mask = lanes_between<T>(skip, skip + n);
    return mask ? (Vector<T>)_mm256_maskload_pd(p - skip, (__m256i)mask) : fill;
  }
#endif
  constexpr size_t lanes = kLanes<Acc<T>>;
  alignas(kVectorBytes) T lane[lanes] = {};
  for (size_t i = 0; i < n; ++i) lane[skip + i] = p[i];
  Vector<Acc<T>> v = load(lane);
  for (size_t i = 0; i < lanes; ++i)
    if (i < skip || i >= skip + n) v[i] = fill[i];
  return v;
#endif
}

// Lanes [skip, skip + n) to p on.
template <class T>
FASTNORM_INLINE void store_part(T* p, Vector<Acc<T>> v, size_t n, size_t skip = 0) {
#if FASTNORM_AVX512
  const auto mask = static_cast<__mmask16>(((1u << n) - 1) << skip);
  if constexpr (sizeof(T) == 4)
    _mm512_mask_storeu_ps(p - skip, mask, (__m512)v);
  else if constexpr (sizeof(T) == 8)
    _mm512_mask_storeu_pd(p - skip, static_cast<__mmask8>(mask), (__m512d)v);
  else
    _mm256_mask_storeu_epi16(p - skip, mask, (__m256i)narrow(v, T{}));
#else
#if FASTNORM_AVX2
  if constexpr (sizeof(T) == 4) {
    _mm256_maskstore_ps(p - skip, (__m256i)lanes_between<T>(skip, skip + n), (__m256)v);
    return;
  } else if constexpr (sizeof(T) == 8) {
    _mm256_maskstore_pd(p - skip, (__m256i)lanes_between<T>(skip, skip + n), (__m256d)v);
    return;
  }
#endif
  alignas(kVectorBytes) T lane[kLanes<Acc<T>>];
  store(lane, v);
  for (size_t i = 0; i < n; ++i) p[i] = lane[skip + i];
#endif
}

// How an expression reads its operands: whole vectors, or lanes [skip, skip + n) from the address on, the
// others being `fill`.
struct Whole {
  static constexpr size_t skip = 0;
  template <class T>
  FASTNORM_INLINE Vector<Acc<T>> load(const T* p) const {
    return FASTNORM_LEVEL::load(p);
  }
  template <class T>
  FASTNORM_INLINE Vector<Acc<T>> load(const T* p, Vector<Acc<T>>) const {
    return FASTNORM_LEVEL::load(p);
  }
  template <class V>
  FASTNORM_INLINE V pick(V v, V) const {
    return v;
  }
};
struct Part {
  size_t n, skip = 0;
  template <class T>
  FASTNORM_INLINE Vector<Acc<T>> load(const T* p) const {
    return load_part(p, n, Vector<Acc<T>>{}, skip);
  }
  template <class T>
  FASTNORM_INLINE Vector<Acc<T>> load(const T* p, Vector<Acc<T>> fill) const {
    return load_part(p, n, fill, skip);
  }
  // These lanes of v, the others of `otherwise`.
  template <class V>
  FASTNORM_INLINE V pick(V v, V otherwise) const {
    return lanes_between<std::remove_reference_t<decltype(v[0])>>(skip, skip + n) ? v : otherwise;
  }
};

// Lanes before p in the aligned vector that it lies in. A run of n elements is best walked in aligned vectors, the
// first of them a part, where every other one would lie in two lines; not where a vector is less than a line, or the
// run short.
template <class T>
FASTNORM_INLINE size_t begun_at(const T* p, size_t n) {
  constexpr size_t lanes = kLanes<Acc<T>>;
  if (kVectorBytes < kLineBytes || n < 16 * lanes) return 0;
  return reinterpret_cast<std::uintptr_t>(p) % (lanes * sizeof(T)) / sizeof(T);
}

// Reads vectors one after the other from p on, wherever it lies, by aligned loads, two of which are brought together
// where it begins within one: of arrays on their way from memory a load from two lines waits for both, and LayerNorm
// backward of (32768, 500) took 2.9 ms instead of 2.2. The line that p lies in is read, and up to kBeyond elements
// after those asked for.
template <class T>
class AlignedReader {
  using A = Acc<T>;
  static constexpr size_t kStep = kLanes<A>;

 public:
  static constexpr bool kAligned = kStep * sizeof(T) == kLineBytes;  // else it loads vectors as they are
  static constexpr size_t kBeyond = kAligned ? kStep : 0;

  FASTNORM_INLINE explicit AlignedReader(const T* p) : at_(p) {
    if constexpr (kAligned) {
      const size_t begun = reinterpret_cast<std::uintptr_t>(p) % (kStep * sizeof(T)) / sizeof(T);
      at_ = p - begun;
      from_ = lane_numbers<A>() + static_cast<Index<A>>(begun);
      last_ = load(at_);
    }
  }

  FASTNORM_INLINE Vector<A> next() {
    if constexpr (!kAligned) {
      at_ += kStep;
      return load(at_ - kStep);
    }
    const Vector<A> before = last_;
    at_ += kStep;
    last_ = load(at_);
    return __builtin_shuffle(before, last_, from_);
  }

 private:
  const T* at_;
  Indices<A> from_{};
  Vector<A> last_{};
};

// Lines of inputs to fetch while an output is written: those that the next slab or row will read. A store
// past the cache leaves the load ports idle; reading ahead meanwhile hides the next first pass. One array is fetched
// into L1, two into L2: on (4096, 4096) rows the forward took 2.5 ms instead of 2.7, on (8, 64, 112, 112) the backward
// 1.45 instead of 1.3.
template <class T, int count>
struct Ahead {
  const T* from[count];
  size_t elements;  // from the line being written to the one being fetched; 0: none is
  FASTNORM_INLINE void line(size_t i) const {
    if (elements == 0) return;
    for (int k = 0; k < count; ++k) __builtin_prefetch(from[k] + elements + i, 0, count == 1 ? 3 : 2);
  }
};

// Sums over a run, four accumulators deep to hide the latency of addition: add(i, how, k) adds the lanes
// from i on into accumulator k. Elements that are a multiple of four vectors apart meet in a lane of an accumulator.
// With `begun` the run begins so many lanes into its first vector, which turns lanes, and for some of them
// accumulators, by the same number of steps: `combined` and `total` do not see that, so a sum does not depend on where
// a run begins.
template <class A, class F>
FASTNORM_INLINE void sum_run(size_t n, const F& add, size_t begun = 0) {
  constexpr size_t lanes = kLanes<A>;
  size_t i = 0;
  if (begun > 0) {
    i = n < lanes - begun ? n : lanes - begun;
    add(0, Part{i, begun}, 3);
  }
  for (; i + 4 * lanes <= n; i += 4 * lanes) {
    add(i, Whole{}, 0);
    add(i + lanes, Whole{}, 1);
    add(i + 2 * lanes, Whole{}, 2);
    add(i + 3 * lanes, Whole{}, 3);
  }
  // Spelled out, so that accumulators are registers.
  const size_t whole = (n - i) / lanes;
  if (whole > 0) add(i, Whole{}, 0);
  if (whole > 1) add(i + lanes, Whole{}, 1);
  if (whole > 2) add(i + 2 * lanes, Whole{}, 2);
  i += whole * lanes;
  if (i == n) return;
  const Part rest{n - i};
  if (whole == 0) add(i, rest, 0);
  if (whole == 1) add(i, rest, 1);
  if (whole == 2) add(i, rest, 2);
  if (whole == 3) add(i, rest, 3);
}

// The sum of all lanes, halves onto halves: the same however lanes are turned. By shuffles: through memory it costs a
// row of 128 a third of its time.
template <class A>
FASTNORM_INLINE double total(Vector<A> v) {
  constexpr int n = static_cast<int>(kLanes<A>);
  const Indices<A> lane = lane_numbers<A>();
#pragma GCC unroll 4
  for (int half = n / 2; half > 0; half /= 2) v += __builtin_shuffle(v, lane ^ half);
  return static_cast<double>(v[0]);
}

typedef double FourDoubles __attribute__((vector_size(4 * sizeof(double))));

// `total` of four at once, the same bits with less than half of the shuffles: a vector holds sums of two, then of all.
template <class A>
FASTNORM_INLINE FourDoubles totals(const Vector<A> (&v)[4]) {
  constexpr Index<A> n = static_cast<Index<A>>(kLanes<A>);
  if constexpr (n < 4) {
    return FourDoubles{total<A>(v[0]), total<A>(v[1]), total<A>(v[2]), total<A>(v[3])};
  } else {
    // The first `size` lanes of every two times as many, of one vector and the other in turn, and the second ones,
    // added. Lanes of the other one count from n.
    const Indices<A> lane = lane_numbers<A>();
    const auto halves = [&](const Vector<A>& a, const Vector<A>& b, Index<A> size) FASTNORM_INLINE_LAMBDA {
      const Indices<A> first = (lane & ~size) + ((lane & size) != 0 ? Indices<A>{} + n : Indices<A>{});
      return __builtin_shuffle(a, b, first) + __builtin_shuffle(a, b, first + size);
    };
    Vector<A> all = halves(halves(v[0], v[1], n / 2), halves(v[2], v[3], n / 2), n / 4);
#pragma GCC unroll 4
    for (Index<A> half = n / 8; half > 0; half /= 2) all += __builtin_shuffle(all, lane ^ half);
    // They are in lanes 0, n/2, n/4 and 3n/4.
    all = __builtin_shuffle(all, ((lane & 1) * 2 + (lane >> 1 & 1)) * (n / 4));
    typedef A Four __attribute__((vector_size(4 * sizeof(A))));
    Four four;
    std::memcpy(&four, &all, sizeof four);
    return __builtin_convertvector(four, FourDoubles);
  }
}

FASTNORM_INLINE void store_four(double* to, FourDoubles v) { std::memcpy(to, &v, sizeof v); }
FASTNORM_INLINE void add_four(double* to, FourDoubles more) {
  FourDoubles sums;
  std::memcpy(&sums, to, sizeof sums);
  store_four(to, sums + more);
}

// Whether a lane has a bit set.
template <class A>
FASTNORM_INLINE bool any(Indices<A> v) {
  const Indices<A> lane = lane_numbers<A>();
#pragma GCC unroll 4
  for (int half = static_cast<int>(kLanes<A>) / 2; half > 0; half /= 2) v |= __builtin_shuffle(v, lane ^ half);
  return v[0] != 0;
}

// The same however accumulators are turned, or where the last ones were nothing.
template <class V, size_t count>
FASTNORM_INLINE V combined(const V (&sums)[count]) {
  static_assert(count >= 1 && count <= 4);
  if constexpr (count == 4) return (sums[0] + sums[2]) + (sums[1] + sums[3]);
  if constexpr (count == 3) return (sums[0] + sums[2]) + sums[1];
  if constexpr (count == 2) return sums[0] + sums[1];
  return sums[0];
}

// f(0), f(1) ... f(n - 1), each a constant: arrays of vectors that it indexes are registers.
template <size_t n, class F>
FASTNORM_INLINE void repeat(const F& f) {
  if constexpr (n > 0) {
    repeat<n - 1>(f);
    f(std::integral_constant<size_t, n - 1>{});
  }
}

// Calls f(c, how) for the vectors of columns [0, n).
template <class A, class F>
FASTNORM_INLINE void for_columns(size_t n, const F& f) {
  size_t c = 0;
  for (; c + kLanes<A> <= n; c += kLanes<A>) f(c, Whole{});
  if (c < n) f(c, Part{n - c});
}

// The same where the first column lies `begun` lanes into its vector.
template <class A, class F>
FASTNORM_INLINE void for_vectors(size_t n, size_t begun, const F& f) {
  size_t c = 0;
  if (begun > 0) {
    c = std::min(n, kLanes<A> - begun);
    f(size_t{0}, Part{c, begun});
  }
  for (; c + kLanes<A> <= n; c += kLanes<A>) f(c, Whole{});
  if (c < n) f(c, Part{n - c});
}

// Columns from c on, `wide` vectors of them, the last one loaded like `last` and the others whole.
template <class A, size_t wide, class Last>
struct Strip {
  static constexpr size_t width = wide;
  size_t c;
  Last last;

  // f(v, column, how) for each of its vectors, v as a constant.
  template <class F>
  FASTNORM_INLINE void each(const F& f) const {
    repeat<width>([&](auto v) FASTNORM_INLINE_LAMBDA {
      if constexpr (v + 1 == width)
        f(v, c + v * kLanes<A>, last);
      else
        f(v, c + v * kLanes<A>, Whole{});
    });
  }
};

// f(strip) for columns [c, n): strips of `wide` vectors, then one of half as many where it is filled, and so on.
template <class A, size_t wide, class F>
FASTNORM_INLINE void for_strips_from(size_t c, size_t n, const F& f) {
  constexpr size_t lanes = kLanes<A>, others = (wide - 1) * lanes;
  for (; c + wide * lanes <= n; c += wide * lanes) f(Strip<A, wide, Whole>{c, {}});
  if (c + others < n)
    f(Strip<A, wide, Part>{c, {n - c - others}});
  else if constexpr (wide > 1)
    for_strips_from<A, wide / 2>(c, n, f);
}
// For columns [0, n), the first `lead` of them, fewer than a vector has, as a strip of their own.
template <class A, size_t wide, class F>
FASTNORM_INLINE void for_strips(size_t n, size_t lead, const F& f) {
  const size_t begun = std::min(lead, n);
  if (begun > 0) f(Strip<A, 1, Part>{0, {begun}});
  for_strips_from<A, wide>(begun, n, f);
}

template <class T, class How>
FASTNORM_INLINE void put(T* p, Vector<Acc<T>> v, How how) {
  if constexpr (std::is_same_v<How, Part>)
    store_part(p, v, how.n, how.skip);
  else
    store(p, v);
}

// As many values of an accumulation dtype as a vector has doubles.
template <class A>
struct FewOf {
  typedef A type __attribute__((vector_size(kLanes<double> * sizeof(A))));
};
template <class A>
using Few = typename FewOf<A>::type;

template <class A>
FASTNORM_INLINE Few<A> few_of(Vector<double> v) {
  return __builtin_convertvector(v, Few<A>);
}
template <class A>
FASTNORM_INLINE Vector<double> doubles_of(Few<A> few) {
#if FASTNORM_AVX512  // gcc 12 makes two halves and joins them
  if constexpr (std::is_same_v<A, float>) return (Vector<double>)_mm512_maskz_cvtps_pd(0xff, (__m256)few);
#endif
  return __builtin_convertvector(few, Vector<double>);
}

// The first lanes of a vector, and a vector whose first lanes these are: not through memory, where a load of what was
// just stored in two pieces waits.
template <class A, size_t... i>
FASTNORM_INLINE Few<A> first_of(Vector<A> v, std::index_sequence<i...>) {
  return __builtin_shufflevector(v, v, i...);
}
template <class A, size_t... i>
FASTNORM_INLINE Vector<A> begun_with(Few<A> few, std::index_sequence<i...>) {
  return __builtin_shufflevector(few, few, (i < kLanes<double> ? static_cast<int>(i) : -1)...);
}

// Loads such values as doubles, and stores doubles as such.
template <class A, class How>
FASTNORM_INLINE Vector<double> load_doubles(const A* p, How how) {
  if constexpr (std::is_same_v<How, Part>)
    return doubles_of<A>(first_of<A>(how.load(p), std::make_index_sequence<kLanes<double>>()));
  else
    return doubles_of<A>(bits_at<Few<A>>(p));
}
template <class A, class How>
FASTNORM_INLINE void put_doubles(A* p, Vector<double> v, How how) {
  const Few<A> few = few_of<A>(v);
  if constexpr (std::is_same_v<How, Part>)
    put(p, begun_with<A>(few, std::make_index_sequence<kLanes<A>>()), how);
  else
    std::memcpy(p, &few, sizeof few);
}

// Writes runs: y[i] = f(i) for i in [0, n), a vector at a time, where f(i, how) returns the lanes from i on.
//
// With `past_cache` only whole aligned vectors are streamed. A vector that a run ends in is held back until the
// next run completes it, so runs that follow one another in memory are one stream; only where they don't is a
// broken vector stored plainly. A plain store of a line that is not in cache waits for it to be read and holds
// up the streamed stores behind it: with one at each end, rows of 512 bytes took twice the time.
template <class T>
class Writer {
 public:
  explicit Writer(bool past_cache) : past_cache_(past_cache) {}
  ~Writer() { flush(); }
  Writer(const Writer&) = delete;
  Writer& operator=(const Writer&) = delete;

  template <class Fetch, class F>
  FASTNORM_INLINE void run(T* y, size_t n, const Fetch& ahead, const F& f) {
    size_t i = 0;
    if (past_cache_) {
      if (held_ != 0 && y != next_) flush();
      ahead.line(0);
      const size_t begun = reinterpret_cast<std::uintptr_t>(y) % (kStep * sizeof(T)) / sizeof(T);
      if (begun != 0) {
        i = n < kStep - begun ? n : kStep - begun;
        if (held_ != 0)
          complete(y, i, f(0, Part{i, begun}));
        else
          store_part(y, f(0, Part{i}), i);
      }
      for (; i + kLine <= n; i += kLine) {
        ahead.line(i);
        for (size_t k = 0; k < kLine; k += kStep) stream(y + i + k, f(i + k, Whole{}));
      }
      for (; i + kStep <= n; i += kStep) stream(y + i, f(i, Whole{}));
      if (i < n) {
        ahead.line(n - 1);
        vector_ = f(i, Part{n - i});
        held_ = n - i;
        next_ = y + n;
      }
      return;
    }
    for_vectors<A>(n, begun_at(y, n), [&](size_t k, auto how) FASTNORM_INLINE_LAMBDA { put(y + k, f(k, how), how); });
  }

 private:
  using A = Acc<T>;
  static constexpr size_t kStep = kLanes<A>;
  static constexpr size_t kLine = kLineBytes / sizeof(T) > kStep ? kLineBytes / sizeof(T) : kStep;

  // Puts lanes [held_, held_ + n) of `more` to those held.
  FASTNORM_INLINE void complete(T* y, size_t n, Vector<A> more) {
    vector_ = lanes_between<A>(0, held_) ? vector_ : more;
    held_ += n;
    next_ = y + n;
    if (held_ == kStep) {
      stream(next_ - kStep, vector_);
      held_ = 0;
    }
  }

  FASTNORM_INLINE void flush() {
    if (held_ != 0) store_part(next_ - held_, vector_, held_);
    held_ = 0;
  }

  Vector<A> vector_{};
  T* next_ = nullptr;
  size_t held_ = 0;
  bool past_cache_;
};

}  // namespace fastnorm::FASTNORM_LEVEL
