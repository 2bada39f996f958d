// The one place that knows threads. Kernels hand over numbered tasks; which thread runs a task never
// shows in a result, since tasks are cut by shape and write to places of their own.
#pragma once

#include <cstddef>

namespace fastnorm {

using Task = void (*)(void* context, std::size_t index, int worker);

// The order of the tasks that a thread has: descending where they go over what ascending ones have just read, whose end
// is still in cache.
enum class Order { ascending, descending };

// Runs task(context, i, worker) for i in [0, count), worker in [0, num_threads()). Serial inside a
// parallel region and where only one task or thread is there.
void run_tasks(std::size_t count, Task task, void* context, Order order);

int num_threads();
void set_num_threads(int count);

// "openmp" or "serial"
const char* threading();

// Makes a forked child able to start threads of its own; call once, at load.
void prepare_for_fork();

}  // namespace fastnorm
