// The part of the layer that both schedulers share: launch checks, shared memory, tickets, fences, copies.
#include "runtime.h"

#include <stdlib.h>
#include <string.h>

#include <algorithm>

#include "control.h"
#include "sanitize.h"

namespace flowdppo::host {

namespace {

constexpr int64_t kMostBlocks = 2147483647;
constexpr int kMostThreads = 1024;

// what this grid left other than zero; a kernel has few counters
struct Counters {
  static constexpr int kMost = 4096;
  unsigned* taken[kMost];
  int count = 0;
} counters;

void remember(unsigned* counter) {
  const int count = __atomic_load_n(&counters.count, __ATOMIC_ACQUIRE);
  for (int i = 0; i < count; ++i) {
    if (__atomic_load_n(&counters.taken[i], __ATOMIC_RELAXED) == counter) return;
  }
  const int at = __atomic_fetch_add(&counters.count, 1, __ATOMIC_ACQ_REL);
  if (at >= Counters::kMost) fail("more than " + std::to_string(Counters::kMost) + " ticket counters in one launch");
  __atomic_store_n(&counters.taken[at], counter, __ATOMIC_RELEASE);
}

std::string check_shape(const Shape& shape) {
  const auto got = [](const char* what, int64_t value, const std::string& expected) {
    return std::string("launch: got ") + what + " = " + std::to_string(value) + ", expected " + expected;
  };
  if (shape.blocks < 1 || shape.blocks > kMostBlocks) return got("blocks", shape.blocks, "1 to 2^31 - 1");
  if (shape.threads < 32 || shape.threads > kMostThreads || shape.threads % 32 != 0)
    return got("threads", shape.threads, "a multiple of 32 up to 1024");
  const int most = settings().cluster_limit;
  if (shape.cluster < 1 || shape.cluster > most) return got("cluster", shape.cluster, "1 to " + std::to_string(most));
  if (shape.blocks % shape.cluster != 0)
    return got("blocks", shape.blocks, "a multiple of the cluster's " + std::to_string(shape.cluster));
  const int64_t bytes = settings().shared_limit;
  if (shape.shared_bytes < 0 || shape.shared_bytes > bytes)
    return got("shared_bytes", shape.shared_bytes, "0 to " + std::to_string(bytes));
  return "";
}

std::string check_counters() {
  for (int i = 0; i < counters.count; ++i) {
    const unsigned left = *counters.taken[i];
    if (left != 0)
      return "a ticket counter holds " + std::to_string(left) + " after the launch, expected 0: fewer blocks took a "
             "ticket than its `last` says";
  }
  return "";
}

// Under the thread sanitizer what is read too early shows as a race.
void check_fence_after_ticket(const Thread& thread) {
  if (thread.ticket != nullptr && thread.took_last && !thread_sanitizer())
    fail("block " + std::to_string(thread.block->index) +
         " goes on with the last ticket without a device_fence() behind it");
}

int fences_of(const Block& block) {
  return __atomic_load_n(&block.fences, __ATOMIC_ACQUIRE) + __atomic_load_n(&block.fences_before, __ATOMIC_ACQUIRE);
}

std::string shared_range(const Block& block) {
  return std::to_string(block.shared->bytes()) + " bytes of shared memory of block " + std::to_string(block.index);
}

}  // namespace

Settings& settings() {
  static Settings current;
  return current;
}

SharedMemory::SharedMemory(int64_t bytes) : bytes_(bytes) {
  const size_t size = (static_cast<size_t>(bytes + 2 * kRedZone) / 32 + 1) * 32;
  base_ = static_cast<char*>(aligned_alloc(32, size));
  memset(base_, kZoneByte, size);
  poison();
}

SharedMemory::~SharedMemory() {
  if (__asan_unpoison_memory_region != nullptr) __asan_unpoison_memory_region(base_, bytes_ + 2 * kRedZone);
  free(base_);
}

bool SharedMemory::holds(const void* address, int64_t bytes) const {
  const char* at = static_cast<const char*>(address);
  return at >= data() && at + bytes <= data() + bytes_;
}

void SharedMemory::poison() { memset(data(), kPoisonByte, static_cast<size_t>(bytes_)); }

std::string SharedMemory::damage(bool ended) const {
  const auto all = [](const char* from, int64_t bytes, unsigned char byte) {
    return std::all_of(from, from + bytes, [byte](char x) { return static_cast<unsigned char>(x) == byte; });
  };
  if (!all(base_, kRedZone, kZoneByte)) return "wrote in front of its shared memory";
  if (!all(data() + bytes_, kRedZone, kZoneByte)) return "wrote behind its shared memory";
  if (ended && !all(data(), bytes_, kPoisonByte)) return "was written to by its cluster after it had ended";
  return "";
}

int run_grid(const char* kernel, const Shape& shape, void (*body)(void*), void* arguments) {
  std::string problem = check_shape(shape);
  if (problem.empty()) {
    counters.count = 0;
    note_launch();
    Grid grid{kernel, shape, body, arguments};
    run(grid);
    problem = error();
    if (problem.empty()) problem = check_counters();
  }
  if (problem.empty()) return 0;
  set_error(std::string(kernel) + ": " + problem);
  return 1;
}

void begin_thread(Thread& thread, Grid& grid) {
  Block& block = *thread.block;
  acquire(&grid.begin_event);
  if (__atomic_exchange_n(&block.begun, true, __ATOMIC_ACQ_REL) == false) {
    // what another block of the cluster wrote before this one began is lost
    block.shared->poison();
    release(&block.begin_event);
    __atomic_store_n(&block.ready, true, __ATOMIC_RELEASE);
  }
  while (!__atomic_load_n(&block.ready, __ATOMIC_ACQUIRE)) give_way(thread);
  acquire(&block.begin_event);
}

void end_thread(Thread& thread, Grid& grid) {
  Block& block = *thread.block;
  if (thread.pending > 0)
    fail("thread " + std::to_string(thread.index) + " of block " + std::to_string(block.index) + " ended with " +
         std::to_string(thread.pending) + " asynchronous copies that were not waited for");
  release(&block.end_event);
  if (__atomic_sub_fetch(&block.live, 1, __ATOMIC_ACQ_REL) == 0) {
    // the memory is gone: blocks of the cluster that still use it read poison
    acquire(&block.end_event);
    block.shared->poison();
  }
  release(&grid.end_event);
}

std::string check_cluster(const Cluster& cluster) {
  for (const Block& block : cluster.blocks) {
    const std::string damage = block.shared->damage(true);
    if (!damage.empty()) return "block " + std::to_string(block.index) + " " + damage;
  }
  return "";
}

// The order that tickets and fences make, as a GPU with relaxed atomics makes it: a ticket publishes what lies before a
// fence, the taker's own or, where a barrier came between, anybody's in the block; and the taker sees what others
// published only after a fence of its own. `published` stands for all that the block has published.
void create_block(Block& block) {
  if (thread_sanitizer()) block.published = __tsan_create_fiber(0);
}

void destroy_block(Block& block) {
  if (block.published != nullptr) __tsan_destroy_fiber(block.published);
  block.published = nullptr;
}

void complete_barrier(Block& block) {
  const int fences = __atomic_exchange_n(&block.fences, 0, __ATOMIC_ACQ_REL);
  __atomic_store_n(&block.fences_before, fences, __ATOMIC_RELEASE);
  if (thread_sanitizer()) as_fiber(block.published, [&] { acquire(&block.fence_event); });
}

void block_barrier(const std::source_location& where) {
  Site& site = visit(Operation::kBlockBarrier, where);
  if (site.fault == Fault::kSkip) return;
  Thread& thread = self();
  check_fence_after_ticket(thread);
  meet_block(thread, site);
}

void cluster_barrier(const std::source_location& where) {
  Site& site = visit(Operation::kClusterBarrier, where);
  if (site.fault == Fault::kSkip) return;
  check_fence_after_ticket(self());
  meet_cluster(self(), site);
}

uint64_t shuffle(uint64_t bits, int bytes, int mask, const std::source_location& where) {
  Site& site = visit(Operation::kShuffle, where);
  Thread& thread = self();
  if (site.fault == Fault::kMissingLane && thread.index % 32 == 5) return bits;
  if (site.fault == Fault::kWrongLane) mask ^= 1;
  if (mask < 0 || mask >= 32) fail(name_of(site) + ": got mask " + std::to_string(mask) + ", expected 0 to 31");
  return exchange(thread, bits, bytes, mask, site);
}

unsigned take_ticket(unsigned* counter, unsigned last, const std::source_location& where) {
  Site& site = visit(Operation::kTicket, where);
  Thread& thread = self();
  Block& block = *thread.block;
  give_way(thread);
  if (site.fault == Fault::kSkip) return 0;
  if (site.fault == Fault::kAlwaysLast) return last;
  check_range(counter, sizeof *counter, Access::kStore);
  remember(counter);
  if (thread_sanitizer()) {
    while (__atomic_exchange_n(&block.publishing, true, __ATOMIC_ACQ_REL)) give_way(thread);
    as_fiber(block.published, [&] {
      acquire(&thread.fence_event);
      release(counter);
    });
    __atomic_store_n(&block.publishing, false, __ATOMIC_RELEASE);
  } else if (fences_of(block) == 0) {
    fail(name_of(site) + ": block " + std::to_string(block.index) +
         " takes a ticket without a device_fence() before it");
  }
  unsigned before = __atomic_load_n(counter, __ATOMIC_RELAXED), after;
  do {
    after = before >= last ? 0 : before + 1;
  } while (!__atomic_compare_exchange_n(counter, &before, after, false, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED));
  if (before > last)
    fail(name_of(site) + ": the ticket counter held " + std::to_string(before) + ", expected at most " +
         std::to_string(last));
  thread.ticket = counter;
  thread.took_last = before == last;
  give_way(thread);
  return before;
}

void device_fence(const std::source_location& where) {
  const Site& site = visit(Operation::kFence, where);
  if (site.fault == Fault::kSkip) return;
  Thread& thread = self();
  if (thread.ticket != nullptr) acquire(thread.ticket);
  thread.ticket = nullptr;
  release(&thread.fence_event);
  release(&thread.block->fence_event);
  __atomic_fetch_add(&thread.block->fences, 1, __ATOMIC_ACQ_REL);
}

char* shared_memory(int64_t bytes, int64_t alignment) {
  const Block& block = *self().block;
  if (bytes > block.shared->bytes())
    fail("shared_memory: got a type of " + std::to_string(bytes) + " bytes, expected at most the launch's " +
         shared_range(block));
  if (alignment > 16) fail("shared_memory: got alignment " + std::to_string(alignment) + ", expected at most 16");
  return block.shared->data();
}

char* cluster_shared(const void* local, int64_t bytes, int rank) {
  const Block& block = *self().block;
  const std::vector<Block>& blocks = block.cluster->blocks;
  if (rank < 0 || rank >= static_cast<int>(blocks.size()))
    fail("cluster_shared: got rank " + std::to_string(rank) + ", expected 0 to " + std::to_string(blocks.size() - 1));
  if (!block.shared->holds(local, bytes))
    fail("cluster_shared: got an address outside the " + shared_range(block));
  const Block& other = blocks[static_cast<size_t>(rank)];
  if (__atomic_load_n(&other.live, __ATOMIC_ACQUIRE) == 0)
    fail("cluster_shared: block " + std::to_string(block.index) + " reaches for block " + std::to_string(other.index) +
         ", which has ended");
  return other.shared->data() + (static_cast<const char*>(local) - block.shared->data());
}

void check_shared(const void* address, int64_t bytes) {
  const Block& block = *self().block;
  if (reinterpret_cast<uintptr_t>(address) % 16 != 0)
    fail("16 bytes of shared memory at an address that is no multiple of 16");
  if (block.shared->holds(address, bytes)) return;
  for (const Block& other : block.cluster->blocks) {
    if (other.shared->holds(address, bytes)) return;
  }
  fail("16 bytes outside the " + shared_range(block));
}

void begin_copy(void* to, const void* from) {
  Thread& thread = self();
  if (thread.pending == Thread::kMostCopies)
    fail("more than " + std::to_string(Thread::kMostCopies) + " asynchronous copies of one thread under way");
  thread.copies[thread.pending++] = {to, from, thread.group};
}

Copy* due_copies(int groups, int& count) {
  Thread& thread = self();
  count = 0;
  while (count < thread.pending && thread.copies[count].group < thread.group - groups) ++count;
  return thread.copies;
}

void forget_copies(int count) {
  Thread& thread = self();
  std::copy(thread.copies + count, thread.copies + thread.pending, thread.copies);
  thread.pending -= count;
}

void check_global(const void* address, int64_t bytes, Access access) {
  if (reinterpret_cast<uintptr_t>(address) % static_cast<uintptr_t>(bytes) != 0)
    fail(std::to_string(bytes) + " bytes of global memory at an address that is no multiple of them");
  check_range(address, bytes, access);
}

}  // namespace flowdppo::host
