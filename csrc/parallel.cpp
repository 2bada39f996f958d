#include "fastnorm/parallel.hpp"

#include <atomic>

#ifdef _OPENMP
#include <omp.h>
#include <pthread.h>
#endif

namespace fastnorm {

namespace {
std::atomic<int> threads{1};
}

int num_threads() { return threads.load(std::memory_order_relaxed); }

void set_num_threads(int count) { threads.store(count, std::memory_order_relaxed); }

#ifdef _OPENMP

void run_tasks(std::size_t count, Task task, void* context) {
  const int wanted = count < static_cast<std::size_t>(num_threads()) ? static_cast<int>(count) : num_threads();
  if (wanted <= 1 || omp_in_parallel()) {
    for (std::size_t i = 0; i < count; ++i) task(context, i, 0);
    return;
  }
#pragma omp parallel for num_threads(wanted) schedule(dynamic, 1)
  for (std::size_t i = 0; i < count; ++i) task(context, i, omp_get_thread_num());
}

const char* threading() { return "openmp"; }

// libgomp's pool does not survive a fork: the child waits for threads that it does not have. Releasing
// the pool before each fork lets parent and child start afresh. GCC has the call since 9, though its
// _OPENMP says 4.5 still in 12.
void prepare_for_fork() {
#if _OPENMP >= 201811 || __GNUC__ >= 9
  pthread_atfork([] { omp_pause_resource_all(omp_pause_soft); }, nullptr, nullptr);
#endif
}

#else

void run_tasks(std::size_t count, Task task, void* context) {
  for (std::size_t i = 0; i < count; ++i) task(context, i, 0);
}

const char* threading() { return "serial"; }

void prepare_for_fork() {}

#endif

}  // namespace fastnorm
