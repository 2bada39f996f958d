#include <atomic>
#include <stdexcept>

#include "fastnorm/isa.hpp"

namespace fastnorm {

namespace base {
extern const Level level;
}
#ifdef FASTNORM_X86_LEVELS
namespace v3 {
extern const Level level;
}
namespace v4 {
extern const Level level;
}
#endif

std::vector<const Level*> levels() {
  std::vector<const Level*> found{&base::level};
#ifdef FASTNORM_X86_LEVELS
  __builtin_cpu_init();
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2") &&
                  __builtin_cpu_supports("f16c");
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                  __builtin_cpu_supports("avx512cd");
  if (v3) found.push_back(&v3::level);
  if (v4) found.push_back(&v4::level);
#endif
  return found;
}

namespace {
std::atomic<const Level*> chosen{nullptr};
}

const Level& level() {
  const Level* found = chosen.load(std::memory_order_relaxed);
  if (found == nullptr) {
    found = levels().back();
    chosen.store(found, std::memory_order_relaxed);
  }
  return *found;
}

void choose_level(const std::string& name) {
  std::string names;
  for (const Level* each : levels()) {
    if (name == each->name) {
      chosen.store(each, std::memory_order_relaxed);
      return;
    }
    names += (names.empty() ? "" : ", ") + std::string(each->name);
  }
  throw std::invalid_argument("instruction set level '" + name + "' is not available here, expected one of " + names);
}

}  // namespace fastnorm
