// Vectors of one instruction set level, on GCC's vector extensions: load, store, stream, partial ends.
// Everything here lives in the level's own namespace, so no level can link another's code by accident.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

#include "fastnorm/kernels.hpp"

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
inline Vector<A> broadcast(A value) {
  return value - Vector<A>{};  // value - 0 keeps every value, -0 and NaN included
}

// ---- whole vectors ---------------------------------------------------------------------------------

using Floats = Vector<float>;
typedef std::uint16_t Bits16 __attribute__((vector_size(kVectorBytes / 2)));
typedef std::uint32_t Bits32 __attribute__((vector_size(kVectorBytes)));

template <class V, class T>
inline V bits_at(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline Floats widen(Bits16 bits, BFloat16) { return (Floats)(__builtin_convertvector(bits, Bits32) << 16); }

inline Bits16 narrow(Floats v, BFloat16) {
  const Bits32 u = (Bits32)v;
  const Bits32 rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const Bits32 quiet = (u >> 16) | 0x40u;
  const auto nan = v != v;
  return __builtin_convertvector((Bits32)(nan ? quiet : rounded), Bits16);
}

#if FASTNORM_AVX512
// The masked forms with a full mask: gcc 12 warns of an uninitialized value inside the plain ones.
inline Floats widen(Bits16 bits, Half) { return (Floats)_mm512_maskz_cvtph_ps(0xffff, (__m256i)bits); }
inline Bits16 narrow(Floats v, Half) {
  return (Bits16)_mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT);
}
#elif FASTNORM_AVX2
inline Floats widen(Bits16 bits, Half) { return (Floats)_mm256_cvtph_ps((__m128i)bits); }
inline Bits16 narrow(Floats v, Half) { return (Bits16)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT); }
#else
// Without F16C, in integer and float arithmetic: the exponent is rebased by a multiplication, which also
// normalizes subnormals.
inline Floats widen(Bits16 bits, Half) {
  const Bits32 u = __builtin_convertvector(bits, Bits32);
  const Bits32 magnitude = (u & 0x7fffu) << 13;
  const Floats scaled = (Floats)magnitude * 0x1p112f;
  const Bits32 special = magnitude | 0x7f800000u;
  const auto infinite = magnitude >= (0x7c00u << 13);
  return (Floats)((Bits32)(infinite ? special : (Bits32)scaled) | ((u & 0x8000u) << 16));
}
inline Bits16 narrow(Floats v, Half) {
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
  return __builtin_convertvector(result | sign, Bits16);
}
#endif

template <class T>
inline Vector<Acc<T>> load(const T* p) {
  if constexpr (sizeof(T) == 2)
    return widen(bits_at<Bits16>(p), T{});
  else
    return bits_at<Vector<T>>(p);
}

template <class T>
inline void store(T* p, Vector<Acc<T>> v) {
  if constexpr (sizeof(T) == 2) {
    const Bits16 bits = narrow(v, T{});
    std::memcpy(p, &bits, sizeof bits);
  } else {
    std::memcpy(p, &v, sizeof v);
  }
}

// Past the cache; p is aligned to what is stored. Ordered before later loads by `fence`.
template <class T>
inline void stream(T* p, Vector<Acc<T>> v) {
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

inline void fence() {
#ifdef __SSE2__
  _mm_sfence();
#endif
}

// ---- ends that do not fill a vector ----------------------------------------------------------------

template <class T>
inline Vector<Acc<T>> load_part(const T* p, size_t n, Vector<Acc<T>> fill) {
#if FASTNORM_AVX512
  if constexpr (sizeof(T) == 4)
    return (Floats)_mm512_mask_loadu_ps((__m512)fill, static_cast<__mmask16>((1u << n) - 1), p);
  else if constexpr (sizeof(T) == 8)
    return (Vector<Acc<T>>)_mm512_mask_loadu_pd((__m512d)fill, static_cast<__mmask8>((1u << n) - 1), p);
  else {
    const auto mask = static_cast<__mmask16>((1u << n) - 1);
    const Floats loaded = widen((Bits16)_mm256_maskz_loadu_epi16(mask, p), T{});
    return (Floats)_mm512_mask_blend_ps(mask, (__m512)fill, (__m512)loaded);
  }
#else
  constexpr size_t lanes = kLanes<Acc<T>>;
  alignas(kVectorBytes) T lane[lanes] = {};
  for (size_t i = 0; i < n; ++i) lane[i] = p[i];
  Vector<Acc<T>> v = load(lane);
  for (size_t i = n; i < lanes; ++i) v[i] = fill[i];
  return v;
#endif
}

template <class T>
inline void store_part(T* p, Vector<Acc<T>> v, size_t n) {
#if FASTNORM_AVX512
  if constexpr (sizeof(T) == 4)
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), (__m512)v);
  else if constexpr (sizeof(T) == 8)
    _mm512_mask_storeu_pd(p, static_cast<__mmask8>((1u << n) - 1), (__m512d)v);
  else
    _mm256_mask_storeu_epi16(p, static_cast<__mmask16>((1u << n) - 1), (__m256i)narrow(v, T{}));
#else
  alignas(kVectorBytes) T lane[kLanes<Acc<T>>];
  store(lane, v);
  for (size_t i = 0; i < n; ++i) p[i] = lane[i];
#endif
}

// How an expression reads its operands: whole vectors, or the first n lanes (the others are `fill`).
struct Whole {
  template <class T>
  Vector<Acc<T>> load(const T* p) const {
    return FASTNORM_LEVEL::load(p);
  }
  template <class T>
  Vector<Acc<T>> load(const T* p, Vector<Acc<T>>) const {
    return FASTNORM_LEVEL::load(p);
  }
};
struct Part {
  size_t n;
  template <class T>
  Vector<Acc<T>> load(const T* p) const {
    return load_part(p, n, Vector<Acc<T>>{});
  }
  template <class T>
  Vector<Acc<T>> load(const T* p, Vector<Acc<T>> fill) const {
    return load_part(p, n, fill);
  }
};

// y[i] = f(i) for i in [0, n), a vector at a time: f(i, how) returns the lanes from i on.
// With `past_cache`, whole lines are streamed; the broken lines at both ends are stored plainly, since a
// line may be shared with a neighbouring run.
template <class T, class F>
inline void write_run(T* y, size_t n, bool past_cache, F f) {
  constexpr size_t lanes = kLanes<Acc<T>>;
  constexpr size_t line = kLineBytes / sizeof(T) > lanes ? kLineBytes / sizeof(T) : lanes;
  size_t i = 0;
  if (past_cache) {
    const size_t misaligned = reinterpret_cast<std::uintptr_t>(y) % kLineBytes / sizeof(T);
    const size_t head = misaligned == 0 ? 0 : kLineBytes / sizeof(T) - misaligned;
    if (head + line <= n) {
      for (; i + lanes <= head; i += lanes) store(y + i, f(i, Whole{}));
      if (i < head) store_part(y + i, f(i, Part{head - i}), head - i);
      for (i = head; i + line <= n; i += line)
        for (size_t k = 0; k < line; k += lanes) stream(y + i + k, f(i + k, Whole{}));
    }
  }
  for (; i + lanes <= n; i += lanes) store(y + i, f(i, Whole{}));
  if (i < n) store_part(y + i, f(i, Part{n - i}), n - i);
}

// Sums over a run, four accumulators deep to hide the latency of addition: add(i, how, k) adds the lanes
// from i on into accumulator k. The same lanes go to the same accumulator whatever surrounds the run.
template <class A, class F>
inline void sum_run(size_t n, F add) {
  constexpr size_t lanes = kLanes<A>;
  size_t i = 0;
  for (; i + 4 * lanes <= n; i += 4 * lanes) {
    add(i, Whole{}, 0);
    add(i + lanes, Whole{}, 1);
    add(i + 2 * lanes, Whole{}, 2);
    add(i + 3 * lanes, Whole{}, 3);
  }
  for (int k = 0; i + lanes <= n; i += lanes, ++k) add(i, Whole{}, k);
  if (i < n) add(i, Part{n - i}, 3);
}

// The sum of all lanes, pairwise in a fixed order.
template <class A>
inline double total(Vector<A> sum) {
  A lane[kLanes<A>];
  std::memcpy(lane, &sum, sizeof lane);
  for (size_t width = kLanes<A> / 2; width > 0; width /= 2)
    for (size_t i = 0; i < width; ++i) lane[i] += lane[i + width];
  return static_cast<double>(lane[0]);
}

template <class V>
inline V combined(const V (&sums)[4]) {
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

}  // namespace fastnorm::FASTNORM_LEVEL
