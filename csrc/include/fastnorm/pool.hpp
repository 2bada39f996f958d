// Recycled memory for outputs. Fresh pages cost more than a normalization: the kernel hands out each of them and
// clears it. So the block of an output that is dropped waits here for the next output of about its size.
//
// Any thread may call any of these at any time; a forked child starts with no idle blocks.
#pragma once

#include <cstddef>

namespace fastnorm {

// Outputs of fewer bytes are left to malloc. It recycles tiny ones by itself, but gives memory at the end of its
// heap back to the system from 128 KB on: four outputs of 128 KB, dropped together, cost 50 us each instead of 3.
constexpr std::size_t kPooledFrom = std::size_t{32} << 10;

struct PoolState {
  std::size_t limit;   // bytes that idle blocks may take together
  std::size_t held;    // bytes that they take
  std::size_t blocks;  // how many there are
  std::size_t hits;    // outputs that got an idle block, since the start
  std::size_t misses;  // outputs that got new memory
};

// Whether an output of this size is worth a block: never with a limit of 0.
bool pooled(std::size_t size);

// malloc, realloc and free. Pointers from malloc are welcome in the latter two. nullptr where memory is short. A
// block's output begins `begun` bytes into a line.
void* pool_allocate(std::size_t size, std::size_t begun) noexcept;
void* pool_reallocate(void* address, std::size_t size) noexcept;
void pool_free(void* address) noexcept;

PoolState pool_state();
void set_pool_limit(std::size_t bytes);
void clear_pool();

}  // namespace fastnorm
