// What a cache allows a normalization: two bare passes over an array, one to sum, one to multiply, add and store, next
// to a plain copy and addition. No statistics are made of the sums, nothing is safe from cancelling: only the walk is
// that of the kernels. 'run': sums in registers, as along rows; 'columns': sums by column of 1,024, eight rows at a
// time, stored a row at a time with coefficients by column. Threads share rows and meet at a barrier between the
// passes.
//
//     g++ -O3 -march=x86-64-v4 -mprefer-vector-width=512 -fopenmp bench/bare_passes.cpp -o bare_passes && ./bare_passes
#include <immintrin.h>
#include <omp.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <type_traits>

namespace {

using Vector = __m512;
constexpr std::size_t kLanes = 16, kColumns = 1024, kTogether = 8, kPadded = kColumns + 5 * kLanes;
// From the end of an array to the next one, so that they begin at different places of a page.
constexpr std::size_t kApart = 21 * kLanes;

// Best of a tenth of a second, in us.
template <class F>
double best(F f) {
  using Clock = std::chrono::steady_clock;
  const auto seconds = [](Clock::time_point since) {
    return std::chrono::duration<double>(Clock::now() - since).count();
  };
  double found = 1e9;
  for (const auto start = Clock::now(); seconds(start) < 0.1;) {
    const auto now = Clock::now();
    for (int i = 0; i < 4; ++i) f();
    found = std::min(found, seconds(now) / 4);
  }
  return found * 1e6;
}

// What the second pass multiplies with and adds, by column, and the sums of one thread.
struct Columns {
  alignas(64) float of[3][kPadded];
};
Columns coefficients, sums_of[2];

// One term of each sum: d and d*d forward, dy and dy*d backward.
template <bool backward>
void add(const float* x, const float* dy, Vector centre, Vector& first, Vector& second) {
  const Vector d = _mm512_load_ps(x) - centre, other = backward ? _mm512_load_ps(dy) : d;
  first += other;
  second = _mm512_fmadd_ps(other, d, second);
}

template <bool backward>
void sum_run(const float* x, const float* dy, std::size_t n, Columns& to) {
  Vector first[4] = {}, second[4] = {};
  const Vector centre = _mm512_load_ps(coefficients.of[0]);
  for (std::size_t i = 0; i < n; i += 4 * kLanes)
#pragma GCC unroll 4
    for (std::size_t k = 0; k < 4; ++k)
      add<backward>(x + i + k * kLanes, dy + i + k * kLanes, centre, first[k], second[k]);
  _mm512_store_ps(to.of[0], (first[0] + first[2]) + (first[1] + first[3]));
  _mm512_store_ps(to.of[1], (second[0] + second[2]) + (second[1] + second[3]));
}

template <bool backward>
void sum_columns(const float* x, const float* dy, std::size_t n, Columns& to) {
  std::memset(&to, 0, sizeof to);
  for (std::size_t row = 0; row < n; row += kTogether * kColumns)
    for (std::size_t c = 0; c < kColumns; c += kLanes) {
      Vector first[2] = {_mm512_load_ps(to.of[0] + c)}, second[2] = {_mm512_load_ps(to.of[1] + c)};
      const Vector centre = _mm512_load_ps(coefficients.of[0] + c);
#pragma GCC unroll 8
      for (std::size_t r = 0; r < kTogether; ++r) {
        const std::size_t at = row + r * kColumns + c;
        add<backward>(x + at, dy + at, centre, first[r % 2], second[r % 2]);
      }
      _mm512_store_ps(to.of[0] + c, first[0] + first[1]);
      _mm512_store_ps(to.of[1] + c, second[0] + second[1]);
    }
}

// From the last rows, still in the cache, to the first ones, 64 at a time.
template <bool backward, bool columns>
void write(const float* x, const float* dy, std::size_t n, float* y) {
  const auto& k = coefficients.of;
  const std::size_t block = std::min(n, 64 * kColumns);
  for (std::size_t end = n; end > 0; end -= block)
    for (std::size_t i = end - block; i < end; i += kLanes) {
      const std::size_t c = columns ? i % kColumns : 0;
      const Vector d = _mm512_load_ps(x + i) - _mm512_load_ps(k[0] + c), scale = _mm512_load_ps(k[1] + c),
                   shift = _mm512_load_ps(k[2] + c);
      _mm512_store_ps(y + i, backward ? scale * _mm512_fmadd_ps(d, shift, _mm512_load_ps(dy + i) - shift)
                                      : _mm512_fmadd_ps(d, scale, shift));
    }
}

// body(begin of this thread's elements, their number, thread) on so many threads.
template <class F>
void on_threads(int threads, std::size_t n, F body) {
#pragma omp parallel num_threads(threads) if (threads > 1)
  body(n / threads * omp_get_thread_num(), n / threads, omp_get_thread_num());
}

template <bool backward>
void measure(const float* x, const float* dy, float* y, std::size_t n) {
  const auto simple = [&](int threads) {
    return best([&] {
      on_threads(threads, n, [&](std::size_t at, std::size_t some, int) {
        for (std::size_t i = at; i < at + some; i += kLanes)
          _mm512_store_ps(y + i, backward ? _mm512_load_ps(x + i) + _mm512_load_ps(dy + i) : _mm512_load_ps(x + i));
      });
    });
  };
  const auto passes = [&](int threads, auto columns) {
    return best([&] {
      on_threads(threads, n, [&](std::size_t at, std::size_t some, int thread) {
        (columns.value ? sum_columns<backward> : sum_run<backward>)(x + at, dy + at, some, sums_of[thread]);
#pragma omp barrier
        write<backward, columns.value>(x + at, dy + at, some, y + at);
      });
    });
  };
  std::printf("%8zu %-8s", n * sizeof(float) >> 10, backward ? "backward" : "forward");
  for (int threads = 1; threads <= 2; ++threads) {
    const double floor = simple(threads), run = passes(threads, std::false_type{}),
                 columns = passes(threads, std::true_type{});
    std::printf(" | %8.2f %8.2f %5.2f %8.2f %5.2f", floor, run, floor / run, columns, floor / columns);
  }
  std::printf("\n");
}

}  // namespace

int main() {
  std::printf("us, and shares of a copy (forward) or addition (backward)\n%17s | %-38s | two threads\n", "",
              "one thread");
  std::printf("%8s %-8s | %8s %8s %5s %8s %5s | %8s %8s %5s %8s %5s\n", "KB", "", "floor", "run", "share", "columns",
              "share", "floor", "run", "share", "columns", "share");
  std::mt19937 random;
  std::normal_distribution<float> normal;
  for (std::size_t n = std::size_t{1} << 14; n <= std::size_t{1} << 22; n *= 2) {
    float* const memory = static_cast<float*>(std::aligned_alloc(4096, 3 * (n + kApart) * sizeof(float)));
    float* arrays[3];
    for (std::size_t i = 0; i < 3; ++i) {
      arrays[i] = memory + i * (n + kApart);
      std::generate_n(arrays[i], n, [&] { return normal(random); });
    }
    measure<false>(arrays[0], arrays[1], arrays[2], n);
    measure<true>(arrays[0], arrays[1], arrays[2], n);
    std::free(memory);
  }
}
