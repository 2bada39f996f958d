#include "fastnorm/pool.hpp"

#include <pthread.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>
#include <optional>
#include <unordered_map>
#include <vector>

namespace fastnorm {

namespace {

using std::size_t;

constexpr size_t kCacheLine = 64;
constexpr size_t kSmallPage = size_t{4} << 10;
constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kMostWaste = 8;     // a block may be larger than the output in it by one part in eight
constexpr size_t kMostBlocks = 512;  // bounds the search

// A block that waited for so long is given back when the next one is dropped: new pages cost 0.1 s a GB, so keeping
// it would save a program of this pace next to nothing. MADV_FREE, which leaves blocks both to the system and to
// reuse, costs a call with two threads up to 40%, 13 us for each huge page: every one interrupts the other CPU.
constexpr std::chrono::seconds kLongestWait{10};

using Clock = std::chrono::steady_clock;

struct Block {
  char* address;  // where a line begins
  size_t capacity;
  Clock::time_point since{};  // when it was dropped
};

size_t round_up(size_t size, size_t unit) { return (size + unit - 1) / unit * unit; }

// Whole huge pages where that is little more; the end of a smaller block is made of small pages. An output begins
// anywhere in the first line of its block.
size_t capacity_for(size_t size) {
  const size_t pages = round_up(size, size >= kMostWaste * kHugePage ? kHugePage : kSmallPage);
  return pages - size < kCacheLine ? pages + kSmallPage : pages;
}

// The largest block for an output of this size.
size_t most_for(size_t size) { return capacity_for(size) + size / kMostWaste; }

// Memory that begins with a huge page, so that it has as many as fit. nullptr where there is none.
char* map(size_t capacity) {
  void* mapped = mmap(nullptr, capacity + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) return nullptr;
  char* const begin = static_cast<char*>(mapped);
  char* const address = reinterpret_cast<char*>(round_up(reinterpret_cast<size_t>(begin), kHugePage));
  if (address > begin) munmap(begin, static_cast<size_t>(address - begin));
  munmap(address + capacity, kHugePage - static_cast<size_t>(address - begin));
#ifdef MADV_HUGEPAGE
  madvise(address, capacity, MADV_HUGEPAGE);
#endif
  return address;
}

char* obtain(size_t capacity) {
  return capacity >= kHugePage ? map(capacity) : static_cast<char*>(std::aligned_alloc(kCacheLine, capacity));
}

// Of the block that an output lies in.
char* block_of(void* output) { return static_cast<char*>(output) - reinterpret_cast<size_t>(output) % kCacheLine; }

void release(Block block) {
  if (block.capacity >= kHugePage) {
    munmap(block.address, block.capacity);
  } else {
    std::free(block.address);
  }
}

class Pool {
 public:
  bool wants(size_t size) const { return size >= kPooledFrom && size <= limit_; }

  void* allocate(size_t size, size_t begun) {
    if (char* const reused = reuse(size)) return reused + begun;
    const Block fresh{obtain(capacity_for(size)), capacity_for(size)};
    if (fresh.address == nullptr) return nullptr;
    try {
      const std::lock_guard lock(mutex_);
      lent_.emplace(fresh.address, fresh.capacity);
    } catch (...) {
      release(fresh);
      throw;
    }
    return fresh.address + begun;
  }

  // The capacity of an output's block, 0 where it has none.
  size_t capacity(void* output) {
    const std::lock_guard lock(mutex_);
    const auto found = lent_.find(block_of(output));
    return found == lent_.end() ? 0 : found->second;
  }

  // Takes an output's block back; false where it has none.
  bool take_back(void* output) {
    {
      const std::lock_guard lock(mutex_);
      const auto found = lent_.find(block_of(output));
      if (found == lent_.end()) return false;
      idle_.push_back({found->first, found->second, Clock::now()});
      held_ += found->second;
      lent_.erase(found);
    }
    release_beyond(limit_);
    return true;
  }

  void set_limit(size_t bytes) {
    limit_ = bytes;
    release_beyond(bytes);
  }

  // Gives blocks back to the system, longest idle first, until none is too old and all take no more than this.
  void release_beyond(size_t bytes) {
    while (const auto block = oldest_beyond(bytes)) release(*block);
  }

  PoolState state() {
    const std::lock_guard lock(mutex_);
    return {limit_, held_, idle_.size(), hits_, misses_};
  }

  void lock() { mutex_.lock(); }
  void unlock() { mutex_.unlock(); }

 private:
  // The idle block that fits best, of equals the latest, which may still be in the caches; nullptr without one.
  char* reuse(size_t size) {
    const size_t least = size + kCacheLine, most = most_for(size);
    const std::lock_guard lock(mutex_);
    auto best = idle_.end();
    for (auto block = idle_.begin(); block != idle_.end(); ++block) {
      if (block->capacity < least || block->capacity > most) continue;
      if (best == idle_.end() || block->capacity <= best->capacity) best = block;
    }
    if (best == idle_.end()) {
      ++misses_;
      return nullptr;
    }
    char* const address = best->address;
    lent_.emplace(address, best->capacity);  // before the rest: it may throw
    held_ -= best->capacity;
    idle_.erase(best);
    ++hits_;
    return address;
  }

  std::optional<Block> oldest_beyond(size_t bytes) {
    const std::lock_guard lock(mutex_);
    if (idle_.empty()) return std::nullopt;
    const Block oldest = idle_.front();
    const bool old = Clock::now() - oldest.since > kLongestWait;
    if (!old && held_ <= bytes && idle_.size() <= kMostBlocks) return std::nullopt;
    idle_.erase(idle_.begin());
    held_ -= oldest.capacity;
    return oldest;
  }

  std::mutex mutex_;
  std::vector<Block> idle_;  // longest idle first
  std::unordered_map<char*, size_t> lent_;
  size_t held_ = 0, hits_ = 0, misses_ = 0;
  std::atomic<size_t> limit_{0};
};

// Never destroyed: arrays may outlive everything else at exit. A fork waits until nobody changes the pool. The
// child gives its copy of the idle blocks back, since pages that both have are copied when the parent writes to them.
Pool& the_pool() {
  static Pool& pool = *[] {
    pthread_atfork([] { the_pool().lock(); }, [] { the_pool().unlock(); },
                   [] {
                     the_pool().unlock();
                     the_pool().release_beyond(0);
                   });
    return new Pool;
  }();
  return pool;
}

}  // namespace

bool pooled(size_t size) { return the_pool().wants(size); }

void* pool_allocate(size_t size, size_t begun) noexcept {
  if (!pooled(size)) return std::malloc(size);
  try {
    return the_pool().allocate(size, begun % kCacheLine);
  } catch (const std::bad_alloc&) {
    return nullptr;
  }
}

void* pool_reallocate(void* address, size_t size) noexcept {
  const size_t capacity = the_pool().capacity(address);
  if (capacity == 0) return std::realloc(address, size);
  const size_t begun = reinterpret_cast<size_t>(address) % kCacheLine;
  if (size + begun <= capacity && capacity <= most_for(size)) return address;
  void* const moved = pool_allocate(size, begun);
  if (moved == nullptr) return nullptr;
  std::memcpy(moved, address, std::min(size, capacity - begun));
  pool_free(address);
  return moved;
}

void pool_free(void* address) noexcept {
  if (!the_pool().take_back(address)) std::free(address);
}

PoolState pool_state() { return the_pool().state(); }

void set_pool_limit(size_t bytes) { the_pool().set_limit(bytes); }

void clear_pool() { the_pool().release_beyond(0); }

}  // namespace fastnorm
