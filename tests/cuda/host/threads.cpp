// Scheduler of OS threads: every CUDA thread is one, a few clusters run at the same time. For the thread sanitizer
// and for what only shows when things truly happen at once; slow, and the order is not repeatable. Errors end the
// process.
#include <errno.h>
#include <linux/futex.h>
#include <stdio.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <memory>
#include <thread>

#include "control.h"
#include "runtime.h"
#include "sanitize.h"

namespace flowdppo::host {

namespace {

constexpr int kWarp = 32, kResident = 3, kExitCode = 3;

// Plain atomics and futexes, which the thread sanitizer does not see: it is told what a meeting orders.
struct Barrier {
  unsigned arrived = 0, generation = 0;
  unsigned expected = 0;
};

struct Warp {
  Barrier barrier;
  uint64_t lanes[2][kWarp];
};

struct BlockState {
  Barrier barrier;
  char event[2];
  std::vector<Warp> warps;
  std::unique_ptr<SharedMemory> shared;
};

struct ClusterState : Cluster {
  Barrier barrier;
  char event[2];
  std::vector<BlockState> states;
  // threads that neither wait nor have ended: none left is a deadlock
  int active = 0, live = 0;
};

struct Worker : Thread {
  int meetings = 0, cluster_meetings = 0, exchanges = 0;
  std::vector<Copy> room;
  uint64_t random = 0;
};

thread_local Worker* current;
Grid* launched;

ClusterState& cluster_of(const Thread& thread) { return *static_cast<ClusterState*>(thread.block->cluster); }
BlockState& state_of(const Thread& thread) {
  return cluster_of(thread).states[static_cast<size_t>(thread.block->rank)];
}

void rest(ClusterState& cluster, const char* where) {
  const bool last = __atomic_sub_fetch(&cluster.active, 1, __ATOMIC_ACQ_REL) == 0;
  if (last && __atomic_load_n(&cluster.live, __ATOMIC_ACQUIRE) > 0)
    fail(std::string("deadlock: all threads of the cluster wait or have ended, the last one at ") + where);
}

template <class Complete>
void meet(Thread& thread, Barrier& barrier, const char* where, const Complete& complete) {
  ClusterState& cluster = cluster_of(thread);
  const unsigned generation = __atomic_load_n(&barrier.generation, __ATOMIC_ACQUIRE);
  if (__atomic_add_fetch(&barrier.arrived, 1, __ATOMIC_ACQ_REL) == barrier.expected) {
    complete();
    __atomic_store_n(&barrier.arrived, 0, __ATOMIC_RELAXED);
    __atomic_add_fetch(&cluster.active, static_cast<int>(barrier.expected) - 1, __ATOMIC_ACQ_REL);
    __atomic_store_n(&barrier.generation, generation + 1, __ATOMIC_RELEASE);
    syscall(SYS_futex, &barrier.generation, FUTEX_WAKE_PRIVATE, barrier.expected, nullptr, nullptr, 0);
    return;
  }
  rest(cluster, where);
  while (__atomic_load_n(&barrier.generation, __ATOMIC_ACQUIRE) == generation)
    syscall(SYS_futex, &barrier.generation, FUTEX_WAIT_PRIVATE, generation, nullptr, nullptr, 0);
}

void run_cluster(Grid& grid, int64_t number) {
  const Shape& shape = grid.shape;
  ClusterState cluster;
  const auto count = static_cast<size_t>(shape.cluster);
  cluster.blocks.resize(count);
  cluster.states = std::vector<BlockState>(count);
  cluster.live = cluster.active = shape.cluster * shape.threads;
  cluster.barrier.expected = static_cast<unsigned>(cluster.live);
  for (int rank = 0; rank < shape.cluster; ++rank) {
    Block& block = cluster.blocks[static_cast<size_t>(rank)];
    BlockState& state = cluster.states[static_cast<size_t>(rank)];
    state.barrier.expected = static_cast<unsigned>(shape.threads);
    state.warps.resize(static_cast<size_t>(shape.threads / kWarp));
    for (Warp& warp : state.warps) warp.barrier.expected = kWarp;
    state.shared = std::make_unique<SharedMemory>(shape.shared_bytes);
    block.index = number * shape.cluster + rank;
    block.rank = rank;
    block.live = shape.threads;
    block.shared = state.shared.get();
    block.cluster = &cluster;
    create_block(block);
  }
  std::vector<Worker> workers(static_cast<size_t>(cluster.live));
  std::vector<std::thread> threads;
  for (size_t i = 0; i < workers.size(); ++i) {
    Worker& worker = workers[i];
    worker.index = static_cast<int>(i) % shape.threads;
    worker.block = &cluster.blocks[i / static_cast<size_t>(shape.threads)];
    worker.room.resize(Thread::kMostCopies);
    worker.copies = worker.room.data();
    worker.random = (settings().seed + 1) * 0x9e3779b97f4a7c15u + i + 1;
    threads.emplace_back([&grid, &cluster, &worker] {
      current = &worker;
      begin_thread(worker, grid);
      grid.body(grid.arguments);
      end_thread(worker, grid);
      __atomic_sub_fetch(&cluster.live, 1, __ATOMIC_ACQ_REL);
      rest(cluster, "its end");
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (Block& block : cluster.blocks) destroy_block(block);
  const std::string damage = check_cluster(cluster);
  if (!damage.empty()) fail(damage);
}

}  // namespace

Thread& self() { return *current; }
const Grid& grid() { return *launched; }

void meet_block(Thread& thread, const Site& site) {
  BlockState& block = state_of(thread);
  char* event = &block.event[static_cast<Worker&>(thread).meetings++ % 2];
  release(event);
  meet(thread, block.barrier, name_of(site).c_str(), [&] { complete_barrier(*thread.block); });
  acquire(event);
}

void meet_cluster(Thread& thread, const Site& site) {
  ClusterState& cluster = cluster_of(thread);
  char* event = &cluster.event[static_cast<Worker&>(thread).cluster_meetings++ % 2];
  release(event);
  meet(thread, cluster.barrier, name_of(site).c_str(), [&] {
    for (Block& block : cluster.blocks) complete_barrier(block);
  });
  acquire(event);
}

uint64_t exchange(Thread& thread, uint64_t bits, int, int mask, const Site& site) {
  Warp& warp = state_of(thread).warps[static_cast<size_t>(thread.index / kWarp)];
  const int lane = thread.index % kWarp, turn = static_cast<Worker&>(thread).exchanges++ % 2;
  __atomic_store_n(&warp.lanes[turn][lane], bits, __ATOMIC_RELAXED);
  meet(thread, warp.barrier, name_of(site).c_str(), [] {});
  return __atomic_load_n(&warp.lanes[turn][lane ^ mask], __ATOMIC_RELAXED);
}

// Sleeps now and then, so that blocks meet in another order with every seed.
void give_way(Thread& thread) {
  uint64_t& random = static_cast<Worker&>(thread).random;
  random ^= random << 13;
  random ^= random >> 7;
  random ^= random << 17;
  if (random % 2 == 0) return;
  const timespec pause = {0, static_cast<long>(random >> 20) % 200'000};
  nanosleep(&pause, nullptr);
}

void fail(const std::string& message) {
  fprintf(stderr, "%s: %s\n", launched->kernel, message.c_str());
  fflush(stderr);
  _exit(kExitCode);
}

void run(Grid& grid) {
  launched = &grid;
  const int64_t clusters = grid.shape.blocks / grid.shape.cluster;
  std::atomic<int64_t> next = 0;
  std::vector<std::thread> residents;
  for (int i = 0; i < kResident; ++i) {
    residents.emplace_back([&] {
      for (int64_t at = next++; at < clusters; at = next++) run_cluster(grid, at);
    });
  }
  for (std::thread& resident : residents) resident.join();
  launched = nullptr;
}

}  // namespace flowdppo::host
