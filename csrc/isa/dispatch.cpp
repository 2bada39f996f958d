#include <atomic>
#include <stdexcept>

#include "fastnorm/isa.hpp"

namespace fastnorm {

namespace base {
extern const Kernels table;
}
#ifdef FASTNORM_X86_LEVELS
namespace v3 {
extern const Kernels table;
}
namespace v4 {
extern const Kernels table;
}
#endif

std::vector<const Kernels*> levels() {
  std::vector<const Kernels*> found{&base::table};
#ifdef FASTNORM_X86_LEVELS
  __builtin_cpu_init();
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2") &&
                  __builtin_cpu_supports("f16c");
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                  __builtin_cpu_supports("avx512cd");
  if (v3) found.push_back(&v3::table);
  if (v4) found.push_back(&v4::table);
#endif
  return found;
}

namespace {
std::atomic<const Kernels*> chosen{nullptr};
}

const Kernels& kernels() {
  const Kernels* table = chosen.load(std::memory_order_relaxed);
  if (table == nullptr) {
    table = levels().back();
    chosen.store(table, std::memory_order_relaxed);
  }
  return *table;
}

void choose_level(const std::string& name) {
  std::string names;
  for (const Kernels* table : levels()) {
    if (name == table->level) {
      chosen.store(table, std::memory_order_relaxed);
      return;
    }
    names += (names.empty() ? "" : ", ") + std::string(table->level);
  }
  throw std::invalid_argument("instruction set level '" + name + "' is not available here, expected one of " + names);
}

}  // namespace fastnorm
