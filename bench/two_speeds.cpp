// What a parallel region of two threads costs and what a streamed copy moves, in turn. On some machines both change
// from minute to minute, one against the other, with where the two threads run.
//
//     g++ -O2 -march=x86-64-v4 -fopenmp bench/two_speeds.cpp -o two_speeds && ./two_speeds
#include <immintrin.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace {

constexpr std::size_t kBytes = std::size_t{64} << 20, kVector = sizeof(__m512i), kHalf = kBytes / kVector / 2;

template <class F>
double best_seconds(int rounds, F f) {
  double best = 1e9;
  for (int i = 0; i < rounds; ++i) {
    const auto start = std::chrono::steady_clock::now();
    f();
    best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  return best;
}

void region() {
#pragma omp parallel for num_threads(2) schedule(static, 1)
  for (int half = 0; half < 2; ++half) asm volatile("");
}

void copy(const __m512i* from, __m512i* to) {
#pragma omp parallel for num_threads(2) schedule(static, 1)
  for (int half = 0; half < 2; ++half) {
    for (std::size_t i = half * kHalf; i < (half + 1) * kHalf; ++i)
      _mm512_stream_si512(to + i, _mm512_load_si512(from + i));
    _mm_sfence();
  }
}

}  // namespace

int main() {
  auto *from = static_cast<__m512i*>(std::aligned_alloc(kVector, kBytes)),
       *to = static_cast<__m512i*>(std::aligned_alloc(kVector, kBytes));
  std::memset(from, 7, kBytes);
  std::memset(to, 1, kBytes);
  for (int round = 0; round < 5; ++round) {
    const double meeting = best_seconds(2000, region), moving = best_seconds(12, [&] { copy(from, to); });
    std::printf("region %.2f us, copy %.0f GB/s\n", meeting * 1e6, 2e-9 * kBytes / moving);
  }
}
