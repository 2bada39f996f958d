// One instruction set level: compiled once for each, with FASTNORM_LEVEL naming its namespace.
#include "fastnorm/channel.hpp"

namespace fastnorm::FASTNORM_LEVEL {

namespace {

constexpr size_t kRoofPiece = 1 << 16;

struct Nothing {
  void line(size_t) const {}
};

template <class F>
void stream_pieces(float* dst, size_t n, F f) {
  parallel_for((n + kRoofPiece - 1) / kRoofPiece, [&](size_t piece, int) {
    const size_t at = piece * kRoofPiece;
    Writer<float>(true).run(dst + at, std::min(kRoofPiece, n - at), Nothing{},
                            [&](size_t i, auto how) FASTNORM_INLINE_LAMBDA { return f(at + i, how); });
  });
}

}  // namespace

extern const Kernels float16, bfloat16, float32, float64;  // kernels.cpp

extern const Level level;
const Level level = {
    FASTNORM_LEVEL_NAME,
    {&float16, &bfloat16, &float32, &float64},
    [](const float* src, size_t n) {
      parallel_for((n + kRoofPiece - 1) / kRoofPiece, [&](size_t piece, int) {
        const float* from = src + piece * kRoofPiece;
        Vector<float> sums[4] = {};
        sum_run<float>(std::min(kRoofPiece, n - piece * kRoofPiece),
                       [&](size_t i, auto how, int k) FASTNORM_INLINE_LAMBDA { sums[k] += how.load(from + i); });
        const volatile double keep = total<float>(combined(sums));
        static_cast<void>(keep);
      });
    },
    [](const float* src, float* dst, size_t n) {
      stream_pieces(dst, n, [&](size_t i, auto how) FASTNORM_INLINE_LAMBDA { return how.load(src + i); });
    },
    [](const float* a, const float* b, float* dst, size_t n) {
      stream_pieces(dst, n,
                    [&](size_t i, auto how) FASTNORM_INLINE_LAMBDA { return how.load(a + i) + how.load(b + i); });
    },
};

}  // namespace fastnorm::FASTNORM_LEVEL
