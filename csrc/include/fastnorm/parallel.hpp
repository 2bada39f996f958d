// The one place that knows threads. Kernels hand over numbered tasks; which thread runs a task never
// shows in a result, since tasks are cut by shape and write to places of their own.
#pragma once

#include <cstddef>

namespace fastnorm {

using Task = void (*)(void* context, std::size_t index, int worker);

// The order of the tasks that a thread has: descending where they go over what ascending ones have just read, whose end
// is still in cache.
enum class Order { ascending, descending };

// The i-th of so many tasks in this order.
inline std::size_t ordered(std::size_t i, std::size_t count, Order order) {
  return order == Order::ascending ? i : count - 1 - i;
}

// Runs task(context, i, worker) for i in [0, count), worker in [0, num_threads()). Serial inside a
// parallel region and where only one task or thread is there.
void run_tasks(std::size_t count, Task task, void* context, Order order);

class Team;

// One of the threads that go through the same loops together, in one parallel region. Two loops in a region cost less
// than a region each: two passes over 1 MB in caches 10.6 us instead of 11.7.
class Member {
 public:
  Member(Team* team, int worker, std::size_t members) : team_(team), worker_(worker), members_(members) {}
  // Its share of task(context, i, worker) for i in [0, count), once every member has done with the loop before. All
  // members call the same loops in the same order, and write what they share within loops alone.
  void share(std::size_t count, Task task, void* context, Order order);
  std::size_t members() const { return members_; }

 private:
  Team* team_;  // none: it is alone
  int worker_;
  std::size_t members_;
  std::size_t loops_ = 0;  // it has been through
};

// Runs body(context, member) on every thread; on the calling one alone inside a parallel region.
void run_together(void (*body)(void* context, Member& member), void* context);

int num_threads();
void set_num_threads(int count);

// "openmp" or "serial"
const char* threading();

// Makes a forked child able to start threads of its own; call once, at load.
void prepare_for_fork();

}  // namespace fastnorm
