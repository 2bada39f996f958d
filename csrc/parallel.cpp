#include "fastnorm/parallel.hpp"

#include <atomic>

#ifdef _OPENMP
#include <omp.h>
#include <pthread.h>

#include <vector>
#endif

namespace fastnorm {

namespace {

std::atomic<int> threads{1};

void run_serially(std::size_t count, Task task, void* context, Order order) {
  for (std::size_t i = 0; i < count; ++i) task(context, order == Order::ascending ? i : count - 1 - i, 0);
}

}  // namespace

int num_threads() { return threads.load(std::memory_order_relaxed); }

void set_num_threads(int count) { threads.store(count, std::memory_order_relaxed); }

#ifdef _OPENMP

namespace {

// The tasks of one thread, on a cache line of their own.
struct alignas(64) Share {
  std::atomic<std::size_t> taken;
  std::size_t begin, end;
};

}  // namespace

// Each thread has the same tasks call after call and takes others' only when its own are done, so that what it read and
// wrote in the last call is still in its own caches. Against every task to whichever thread is free: LayerNorm (2048,
// 1024) forward 220 to 151 us in the state of this machine where a parallel region takes 2 us, as if its two cores had
// an L3 each, and (4096, 1024) 464 to 416 where it takes 0.8.
void run_tasks(std::size_t count, Task task, void* context, Order order) {
  const std::size_t sharers = count < static_cast<std::size_t>(num_threads()) ? count : num_threads();
  if (sharers <= 1 || omp_in_parallel()) return run_serially(count, task, context, order);
  std::vector<Share> shares(sharers);
  for (std::size_t s = 0; s < sharers; ++s) {
    shares[s].taken.store(0, std::memory_order_relaxed);
    shares[s].begin = count * s / sharers;
    shares[s].end = count * (s + 1) / sharers;
  }
#pragma omp parallel num_threads(static_cast<int>(sharers))
  {
    const int worker = omp_get_thread_num();
    for (std::size_t s = 0; s < sharers; ++s) {
      Share& share = shares[(worker + s) % sharers];
      const std::size_t tasks = share.end - share.begin;
      for (std::size_t k; (k = share.taken.fetch_add(1, std::memory_order_relaxed)) < tasks;) {
        task(context, order == Order::ascending ? share.begin + k : share.end - 1 - k, worker);
      }
    }
  }
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

void run_tasks(std::size_t count, Task task, void* context, Order order) { run_serially(count, task, context, order); }

const char* threading() { return "serial"; }

void prepare_for_fork() {}

#endif

}  // namespace fastnorm
