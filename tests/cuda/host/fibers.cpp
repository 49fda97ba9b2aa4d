// Scheduler of fibers: every CUDA thread runs until it has to wait, on one OS thread. Who goes next comes from a
// seed, so that a hidden dependence on an order shows, and shows again.
#include <sys/mman.h>

#include <algorithm>
#include <deque>
#include <list>
#include <memory>

#include "control.h"
#include "runtime.h"
#include "sanitize.h"
#include "switch.h"

#if !defined(FLOWDPPO_HOST_UCONTEXT_SWITCH)
asm(R"(
.text
.hidden flowdppo_host_switch
.globl flowdppo_host_switch
.type flowdppo_host_switch, @function
flowdppo_host_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size flowdppo_host_switch, .-flowdppo_host_switch
)");
#endif

namespace flowdppo::host {

namespace {

// room for sanitized frames of unrolled loops
constexpr size_t kStackBytes = 256 * 1024, kGuardBytes = 4096;
constexpr int kWarp = 32;

// Stack and copies of one fiber; kept for later fibers.
class FiberMemory {
 public:
  FiberMemory() {
    base_ = static_cast<char*>(mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base_ == MAP_FAILED) throw std::bad_alloc();
    mprotect(base_, kGuardBytes, PROT_NONE);
  }
  ~FiberMemory() { munmap(base_, kBytes); }
  FiberMemory(const FiberMemory&) = delete;

  char* stack() const { return base_ + kGuardBytes; }
  Copy* copies() const { return reinterpret_cast<Copy*>(stack() + kStackBytes); }

 private:
  static constexpr size_t kBytes = kGuardBytes + kStackBytes + Thread::kMostCopies * sizeof(Copy);
  char* base_;
};

enum class State { kReady, kBlock, kCluster, kWarp, kEnded };

struct Fiber : Thread {
  Context context;
  std::unique_ptr<FiberMemory> memory;
  State state = State::kReady;
  const Site* site = nullptr;
  void* sanitizer = nullptr;
  void* fake_stack = nullptr;
  int meetings = 0, cluster_meetings = 0, exchanges = 0;
};

// Who waits, and at which call.
struct Meeting {
  int arrived = 0;
  const Site* site = nullptr;
};

struct Warp {
  Meeting meeting;
  int bytes = 0, mask = 0;
  // a lane may be one exchange ahead of another that has not yet fetched its value
  uint64_t lanes[2][kWarp];
};

struct BlockState {
  Meeting meeting;
  std::vector<std::unique_ptr<Fiber>> owned;
  std::vector<Fiber*> fibers;
  std::vector<Warp> warps;
  std::unique_ptr<SharedMemory> shared;
  // stands for the barrier, of even and of odd meetings
  char event[2];
};

struct ClusterState : Cluster {
  Meeting meeting;
  std::vector<BlockState> states;
  int live = 0;
  char event[2];
};

struct Random {
  uint64_t state;

  size_t below(size_t bound) {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return static_cast<size_t>(state >> 11) % bound;
  }
};

struct Scheduler;
Scheduler* scheduler;
Fiber* current;
std::vector<std::unique_ptr<FiberMemory>> spare;
// fibers of the thread sanitizer's from earlier grids: making one takes longer than what a CUDA thread does here
std::vector<void*> spare_sanitizers;

struct Scheduler {
  // which of the ready threads goes next
  enum class Policy { kOldest, kNewest, kAny };
  // in which order threads become ready, and blocks begin
  enum class Order { kForward, kBackward, kShuffled };

  Grid& grid;
  Policy policy;
  Order order;
  size_t resident;
  Random random;
  std::deque<Fiber*> ready;
  std::list<ClusterState> clusters;
  size_t running = 0;
  Context context;
  void* sanitizer = nullptr;
  std::string failure;

  explicit Scheduler(Grid& launched) : grid(launched) {
    const uint64_t seed = settings().seed;
    policy = static_cast<Policy>(seed % 3);
    order = static_cast<Order>(seed / 3 % 3);
    resident = 1 + seed % 4;
    random.state = (seed + 1) * 0x9e3779b97f4a7c15u;
    if (thread_sanitizer()) sanitizer = __tsan_get_current_fiber();
  }

  template <class T>
  void arrange(std::vector<T>& items) {
    if (order == Order::kBackward) std::reverse(items.begin(), items.end());
    if (order == Order::kShuffled) {
      for (size_t i = items.size(); i > 1; --i) std::swap(items[i - 1], items[random.below(i)]);
    }
  }

  void wake(std::vector<Fiber*> woken) {
    arrange(woken);
    for (Fiber* fiber : woken) {
      fiber->state = State::kReady;
      fiber->site = nullptr;
      ready.push_back(fiber);
    }
  }

  Fiber* next() {
    if (policy == Policy::kAny) std::swap(ready.back(), ready[random.below(ready.size())]);
    Fiber* fiber = policy == Policy::kOldest ? ready.front() : ready.back();
    policy == Policy::kOldest ? ready.pop_front() : ready.pop_back();
    return fiber;
  }

  void begin(int64_t number);
  void end(ClusterState& cluster);
  void discard(ClusterState& cluster);
  void resume(Fiber& fiber);
  void settle(Fiber& fiber);
  // whether all have arrived, and go on
  bool meet(Fiber& fiber, Meeting& meeting, size_t expected, const std::vector<Fiber*>& waiting);
  std::string deadlock() const;
  void execute();
};

ClusterState& cluster_of(const Thread& thread) { return *static_cast<ClusterState*>(thread.block->cluster); }
BlockState& state_of(const Thread& thread) {
  return cluster_of(thread).states[static_cast<size_t>(thread.block->rank)];
}
Warp& warp_of(const Thread& thread) { return state_of(thread).warps[static_cast<size_t>(thread.index / kWarp)]; }

// The scheduler's stack, for the address sanitizer.
const void* main_stack;
size_t main_stack_bytes;

// From a fiber to the scheduler.
void leave(Fiber& fiber) {
  if (__sanitizer_start_switch_fiber != nullptr) {
    // a fiber that has ended gives its fake stack back
    void** saved = fiber.state == State::kEnded ? nullptr : &fiber.fake_stack;
    __sanitizer_start_switch_fiber(saved, main_stack, main_stack_bytes);
  }
  if (thread_sanitizer()) __tsan_switch_to_fiber(scheduler->sanitizer, kNoSynchronisation);
  switch_context(fiber.context, scheduler->context);
  if (__sanitizer_finish_switch_fiber != nullptr) __sanitizer_finish_switch_fiber(fiber.fake_stack, nullptr, nullptr);
}

void enter() {
  if (__sanitizer_finish_switch_fiber != nullptr)
    __sanitizer_finish_switch_fiber(nullptr, &main_stack, &main_stack_bytes);
  Fiber& fiber = *current;
  begin_thread(fiber, scheduler->grid);
  scheduler->grid.body(scheduler->grid.arguments);
  end_thread(fiber, scheduler->grid);
  fiber.state = State::kEnded;
  leave(fiber);
}

void Scheduler::begin(int64_t number) {
  ClusterState& cluster = clusters.emplace_back();
  const Shape& shape = grid.shape;
  cluster.blocks.resize(static_cast<size_t>(shape.cluster));
  cluster.states = std::vector<BlockState>(static_cast<size_t>(shape.cluster));
  std::vector<Fiber*> begun;
  for (int rank = 0; rank < shape.cluster; ++rank) {
    Block& block = cluster.blocks[static_cast<size_t>(rank)];
    BlockState& state = cluster.states[static_cast<size_t>(rank)];
    state.shared = std::make_unique<SharedMemory>(shape.shared_bytes);
    state.warps.resize(static_cast<size_t>(shape.threads / kWarp));
    block.index = number * shape.cluster + rank;
    block.rank = rank;
    block.live = shape.threads;
    block.shared = state.shared.get();
    block.cluster = &cluster;
    create_block(block);
    for (int index = 0; index < shape.threads; ++index) {
      auto fiber = std::make_unique<Fiber>();
      if (spare.empty()) spare.push_back(std::make_unique<FiberMemory>());
      fiber->memory = std::move(spare.back());
      spare.pop_back();
      fiber->index = index;
      fiber->block = &block;
      fiber->copies = fiber->memory->copies();
      if (__asan_unpoison_memory_region != nullptr)
        __asan_unpoison_memory_region(fiber->memory->stack(), kStackBytes);
      prepare(fiber->context, fiber->memory->stack(), kStackBytes, enter);
      if (thread_sanitizer()) {
        if (spare_sanitizers.empty()) spare_sanitizers.push_back(__tsan_create_fiber(0));
        fiber->sanitizer = spare_sanitizers.back();
        spare_sanitizers.pop_back();
      }
      state.fibers.push_back(fiber.get());
      begun.push_back(fiber.get());
      state.owned.push_back(std::move(fiber));
    }
  }
  // fibers of earlier grids know nothing of what was just made for them
  release(&grid.begin_event);
  cluster.live = static_cast<int>(begun.size());
  ++running;
  wake(std::move(begun));
}

void Scheduler::resume(Fiber& fiber) {
  current = &fiber;
  void* fake_stack = nullptr;
  if (__sanitizer_start_switch_fiber != nullptr)
    __sanitizer_start_switch_fiber(&fake_stack, fiber.memory->stack(), kStackBytes);
  if (thread_sanitizer()) __tsan_switch_to_fiber(fiber.sanitizer, kNoSynchronisation);
  switch_context(context, fiber.context);
  if (__sanitizer_finish_switch_fiber != nullptr) __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
  current = nullptr;
}

bool Scheduler::meet(Fiber& fiber, Meeting& meeting, size_t expected, const std::vector<Fiber*>& waiting) {
  if (meeting.arrived == 0) meeting.site = fiber.site;
  if (meeting.site != fiber.site) {
    failure = "thread " + std::to_string(fiber.index) + " of block " + std::to_string(fiber.block->index) +
              " waits at " + name_of(*fiber.site) + " while others wait at " + name_of(*meeting.site);
    return false;
  }
  if (++meeting.arrived < static_cast<int>(expected)) return false;
  meeting.arrived = 0;
  wake(waiting);
  return true;
}

// What the fiber that has just left waits for.
void Scheduler::settle(Fiber& fiber) {
  ClusterState& cluster = cluster_of(fiber);
  BlockState& block = state_of(fiber);
  switch (fiber.state) {
    case State::kReady:
      policy == Policy::kOldest ? ready.push_back(&fiber) : ready.push_front(&fiber);
      break;
    case State::kBlock:
      if (meet(fiber, block.meeting, block.fibers.size(), block.fibers)) complete_barrier(*fiber.block);
      break;
    case State::kCluster: {
      std::vector<Fiber*> all;
      for (const BlockState& state : cluster.states) all.insert(all.end(), state.fibers.begin(), state.fibers.end());
      if (meet(fiber, cluster.meeting, all.size(), all)) {
        for (Block& member : cluster.blocks) complete_barrier(member);
      }
      break;
    }
    case State::kWarp: {
      const auto first = block.fibers.begin() + fiber.index / kWarp * kWarp;
      meet(fiber, warp_of(fiber).meeting, kWarp, {first, first + kWarp});
      break;
    }
    case State::kEnded:
      if (--cluster.live == 0) end(cluster);
      break;
  }
}

void Scheduler::end(ClusterState& cluster) {
  failure = check_cluster(cluster);
  --running;
  // under the thread sanitizer memory is not used again within a grid: two blocks that follow each other in the same
  // place would look like a race
  if (!thread_sanitizer()) discard(cluster);
}

void Scheduler::discard(ClusterState& cluster) {
  for (Block& block : cluster.blocks) destroy_block(block);
  for (BlockState& state : cluster.states) {
    for (Fiber* fiber : state.fibers) {
      // one that was given up in the middle of a kernel stays there
      if (fiber->sanitizer != nullptr && fiber->state == State::kEnded) spare_sanitizers.push_back(fiber->sanitizer);
      spare.push_back(std::move(fiber->memory));
    }
  }
  clusters.remove_if([&cluster](const ClusterState& other) { return &other == &cluster; });
}

std::string Scheduler::deadlock() const {
  std::vector<std::string> groups;
  std::vector<int> counts;
  std::vector<const Fiber*> examples;
  const auto count = [&](const Fiber& fiber) {
    const std::string what = fiber.state == State::kEnded ? "ended" : "wait at " + name_of(*fiber.site);
    const size_t at = static_cast<size_t>(std::find(groups.begin(), groups.end(), what) - groups.begin());
    if (at == groups.size()) {
      groups.push_back(what);
      counts.push_back(0);
      examples.push_back(&fiber);
    }
    ++counts[at];
  };
  for (const ClusterState& cluster : clusters) {
    if (cluster.live == 0) continue;
    for (const BlockState& state : cluster.states) {
      for (const Fiber* fiber : state.fibers) count(*fiber);
    }
  }
  std::string out = "deadlock:";
  for (size_t i = 0; i < groups.size(); ++i) {
    out += std::string(i == 0 ? " " : ", ") + std::to_string(counts[i]) + " threads " + groups[i] + " (thread " +
           std::to_string(examples[i]->index) + " of block " + std::to_string(examples[i]->block->index) + ")";
  }
  return out;
}

void Scheduler::execute() {
  std::vector<int64_t> waiting(static_cast<size_t>(grid.shape.blocks / grid.shape.cluster));
  for (size_t i = 0; i < waiting.size(); ++i) waiting[i] = static_cast<int64_t>(i);
  arrange(waiting);
  size_t begun = 0;
  while (failure.empty()) {
    while (running < resident && begun < waiting.size()) begin(waiting[begun++]);
    if (running == 0) break;
    if (ready.empty()) {
      failure = deadlock();
      break;
    }
    Fiber& fiber = *next();
    resume(fiber);
    if (failure.empty()) settle(fiber);
  }
  acquire(&grid.end_event);
  while (!clusters.empty()) discard(clusters.front());
}

void wait(Fiber& fiber, State state, const Site* site) {
  fiber.state = state;
  fiber.site = site;
  leave(fiber);
}

}  // namespace

Thread& self() { return *current; }
const Grid& grid() { return scheduler->grid; }

void meet_block(Thread& thread, const Site& site) {
  Fiber& fiber = static_cast<Fiber&>(thread);
  char* event = &state_of(thread).event[fiber.meetings++ % 2];
  release(event);
  wait(fiber, State::kBlock, &site);
  acquire(event);
}

void meet_cluster(Thread& thread, const Site& site) {
  Fiber& fiber = static_cast<Fiber&>(thread);
  char* event = &cluster_of(thread).event[fiber.cluster_meetings++ % 2];
  release(event);
  wait(fiber, State::kCluster, &site);
  acquire(event);
}

uint64_t exchange(Thread& thread, uint64_t bits, int bytes, int mask, const Site& site) {
  Fiber& fiber = static_cast<Fiber&>(thread);
  Warp& warp = warp_of(thread);
  const int lane = thread.index % kWarp, turn = fiber.exchanges++ % 2;
  if (warp.meeting.arrived == 0) {
    warp.bytes = bytes;
    warp.mask = mask;
  }
  if (warp.bytes != bytes || warp.mask != mask) fail(name_of(site) + ": lanes of a warp differ in mask or type");
  warp.lanes[turn][lane] = bits;
  wait(fiber, State::kWarp, &site);
  return warp.lanes[turn][lane ^ mask];
}

void give_way(Thread& thread) { wait(static_cast<Fiber&>(thread), State::kReady, nullptr); }

void fail(const std::string& message) {
  Fiber& fiber = *current;
  scheduler->failure =
      "thread " + std::to_string(fiber.index) + " of block " + std::to_string(fiber.block->index) + ": " + message;
  for (;;) leave(fiber);
}

void run(Grid& launched) {
  Scheduler here(launched);
  scheduler = &here;
  here.execute();
  scheduler = nullptr;
  set_error(here.failure);
}

}  // namespace flowdppo::host
