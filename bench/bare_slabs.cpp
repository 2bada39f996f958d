// What memory allows a normalization that takes slabs of channels: the kernels' walk with next to no arithmetic,
// against a streamed copy (forward) or sum (backward) of the same arrays in order.
//
// An array of (rows, pitch) is cut into slabs of `width` floats. Each of two threads reads a slab, some rows at a time,
// then reads it again, now from a cache, and streams the result. Fetching is as in the kernels: while one array is
// summed, the rows after the next ones; while a row is written, the row before it and a line of the next slab.
//
//     g++ -O2 -march=x86-64-v4 -fopenmp bench/bare_slabs.cpp -o bare_slabs && ./bare_slabs
#include <immintrin.h>
#include <omp.h>
#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <initializer_list>

namespace {

constexpr std::size_t kLine = 16;  // floats
constexpr std::size_t kPage = std::size_t{2} << 20;
constexpr int kRounds = 15;

struct Case {
  const char* what;
  std::size_t rows, pitch, forward, backward;  // widths of slabs
};

struct Arrays {
  const float *dy, *x;
  float* out;
};

float* array(std::size_t floats) {
  void* const memory = std::aligned_alloc(kPage, (floats * sizeof(float) + kPage - 1) / kPage * kPage);
  madvise(memory, floats * sizeof(float), MADV_HUGEPAGE);
  float* const values = static_cast<float*>(memory);
  for (std::size_t i = 0; i < floats; ++i) values[i] = static_cast<float>(i % 1009);
  return values;
}

template <int kArrays>
__m512 load(const Arrays& a, std::size_t at) {
  const __m512 x = _mm512_load_ps(a.x + at);
  return kArrays == 1 ? x : _mm512_add_ps(x, _mm512_load_ps(a.dy + at));
}

// f(i) for the thread's share of [0, count).
template <class F>
void shared_out(std::size_t count, F f) {
#pragma omp parallel num_threads(2)
  {
    const std::size_t t = static_cast<std::size_t>(omp_get_thread_num());
    for (std::size_t i = count * t / 2; i < count * (t + 1) / 2; ++i) f(i);
    _mm_sfence();
  }
}

template <int kArrays>
void in_order(std::size_t floats, const Arrays& a) {
  shared_out(floats / kLine, [&](std::size_t i) { _mm512_stream_ps(a.out + i * kLine, load<kArrays>(a, i * kLine)); });
}

template <int kArrays, bool kFetch>
__m512 sum(const Case& c, std::size_t c0, std::size_t width, const Arrays& a) {
  constexpr std::size_t kRows = kArrays == 1 ? 8 : 4;
  __m512 sums[kRows] = {};
  for (std::size_t r = 0; r < c.rows; r += kRows)
    for (std::size_t i = c0; i < c0 + width; i += kLine)
      for (std::size_t k = 0; k < kRows && r + k < c.rows; ++k) {
        const std::size_t at = (r + k) * c.pitch + i;
        if (kFetch && kArrays == 1) _mm_prefetch(a.x + at + 2 * kRows * c.pitch, _MM_HINT_T1);
        sums[k] = _mm512_add_ps(sums[k], load<kArrays>(a, at));
      }
  for (std::size_t k = 1; k < kRows; ++k) sums[0] = _mm512_add_ps(sums[0], sums[k]);
  return sums[0];
}

template <int kArrays, bool kFetch>
void write(const Case& c, std::size_t c0, std::size_t width, const Arrays& a, __m512 shift) {
  for (std::size_t r = c.rows; r-- > 0;)
    for (std::size_t i = c0; i < c0 + width; i += kLine) {
      const std::size_t at = r * c.pitch + i;
      _mm512_stream_ps(a.out + at, _mm512_sub_ps(load<kArrays>(a, at), shift));
      if (!kFetch) continue;
      _mm_prefetch(a.x + at + width, _MM_HINT_T1);
      if (kArrays == 1 || r == 0) continue;
      _mm_prefetch(a.x + at - c.pitch, _MM_HINT_T1);
      _mm_prefetch(a.dy + at - c.pitch, _MM_HINT_T1);
    }
}

template <int kArrays, bool kFetch>
void in_slabs(const Case& c, const Arrays& a) {
  const std::size_t width = kArrays == 1 ? c.forward : c.backward;
  shared_out((c.pitch + width - 1) / width, [&](std::size_t slab) {
    const std::size_t c0 = slab * width, n = std::min(width, c.pitch - c0);
    write<kArrays, kFetch>(c, c0, n, a, sum<kArrays, kFetch>(c, c0, n, a));
  });
}

template <class F>
double milliseconds(F f) {
  const auto start = std::chrono::steady_clock::now();
  f();
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count();
}

template <int kArrays>
void report(const Case& c, const Arrays& a) {
  double floor = 1e9, plain = 1e9, fetching = 1e9;
  for (int round = 0; round < kRounds; ++round) {
    floor = std::min(floor, milliseconds([&] { in_order<kArrays>(c.rows * c.pitch, a); }));
    plain = std::min(plain, milliseconds([&] { in_slabs<kArrays, false>(c, a); }));
    fetching = std::min(fetching, milliseconds([&] { in_slabs<kArrays, true>(c, a); }));
  }
  const std::size_t bytes = c.rows * c.pitch * sizeof(float) * (kArrays + 1),
                    row = (kArrays == 1 ? c.forward : c.backward) * sizeof(float);
  std::printf("| %s %s | %.1f | %zu | %.0f | %.2f | %.2f | %.2f | %.2f |\n", c.what,
              kArrays == 1 ? "forward" : "backward", static_cast<double>(row) / 1024, row * c.rows * kArrays / 1024,
              static_cast<double>(bytes) * 1e-6 / floor, floor, plain, fetching, floor / std::min(plain, fetching));
}

}  // namespace

int main() {
  const Case cases[] = {
      {"NCHW 512x512x7x7", 512, 512 * 49, 16 * 49, 16 * 49},
      {"NCHW 128x2048x7x7", 128, 2048 * 49, 16 * 49, 32 * 49},
      {"NCHW 256x256x14x14", 256, 256 * 196, 4 * 196, 4 * 196},
      {"NCHW 50x1024x14x14", 50, 1024 * 196, 8 * 196, 4 * 196},
      {"NCHW 50x64x56x56", 50, 64 * 3136, 3136, 3136},
      {"NCHW 16x256x56x56", 16, 256 * 3136, 2 * 3136, 3136},
      {"4096x4096", 4096, 4096, 128, 128},
      {"2048x8192", 2048, 8192, 256, 256},
      {"256x65536", 256, 65536, 400, 256},
  };
  std::size_t most = 0;
  for (const Case& c : cases) most = std::max(most, (c.rows + 16) * c.pitch + c.pitch);  // what is fetched past the end
  const Arrays a{array(most), array(most), array(most)};
  std::printf(
      "| array | a slab's row, KB | slab, KB | GB/s | in order, ms | slabs | fetching | of it, the better |\n"
      "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n");
  for (const Case& c : cases) {
    report<1>(c, a);
    report<2>(c, a);
  }
}
