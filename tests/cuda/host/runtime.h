// What the CUDA kernels' host twins are made of: threads of a grid, their meeting points, their memory, and the
// checks on all of it. Two schedulers implement the meeting points: fibers.cpp (one OS thread, order from a seed) and
// threads.cpp (one OS thread per CUDA thread). Compiled without sanitizers; sanitize.h tells the sanitizers what they
// cannot see.
#pragma once

#include <stdint.h>

#include <source_location>
#include <string>
#include <vector>

namespace flowdppo::host {

enum class Operation : int { kBlockBarrier, kClusterBarrier, kShuffle, kTicket, kFence };

// What goes wrong at a call site on purpose; faults.cpp has their names.
enum class Fault : int { kNone, kSkip, kAlwaysLast, kWrongLane, kMissingLane };

// A place in a kernel where threads meet or publish.
struct Site {
  Operation operation;
  const char* file;
  unsigned line;
  Fault fault;
  int64_t visits;
};

// The site of an operation, counted, with the fault planted there.
Site& visit(Operation operation, const std::source_location& where);
std::string name_of(const Site& site);

// A block's dynamic shared memory between two red zones. Poison is 0xff bytes: NaN in every floating type.
class SharedMemory {
 public:
  explicit SharedMemory(int64_t bytes);
  ~SharedMemory();
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;

  char* data() const { return base_ + kRedZone; }
  int64_t bytes() const { return bytes_; }
  bool holds(const void* address, int64_t bytes) const;
  void poison();
  // what was written where nothing may be, or an empty string
  std::string damage(bool ended) const;

 private:
  // data() is aligned to 16 bytes and to no more
  static constexpr int64_t kRedZone = 528;
  char* base_;
  int64_t bytes_;
};

struct Shape {
  int64_t blocks;
  int threads, cluster, shared_bytes;
};

struct Cluster;

struct Block {
  int64_t index = 0;
  int rank = 0, live = 0;
  // its shared memory is being set up, is set up
  bool begun = false, ready = false;
  SharedMemory* shared = nullptr;
  Cluster* cluster = nullptr;
  // addresses that stand for "this block begins", "this block has ended" and "before a fence of this block"
  char begin_event = 0, end_event = 0, fence_event = 0;
  // what the block has published: see publish() in runtime.cpp
  void* published = nullptr;
  bool publishing = false;
  // device fences since the last block barrier, and between the two last ones
  int fences = 0, fences_before = 0;
};

struct Cluster {
  std::vector<Block> blocks;
};

// 16 bytes on their way from global to shared memory, and the commit group they travel in.
struct Copy {
  void* to;
  const void* from;
  int64_t group;
};

// One CUDA thread.
struct Thread {
  static constexpr int kMostCopies = 1024;

  int index = 0;
  Block* block = nullptr;
  // stands for "before this thread's last fence"
  char fence_event = 0;
  // the counter of a ticket that no fence has followed yet
  unsigned* ticket = nullptr;
  bool took_last = false;
  // copies [0, pending), oldest first; the group that is open
  int pending = 0;
  int64_t group = 0;
  Copy* copies = nullptr;
};

struct Grid {
  const char* kernel;
  Shape shape;
  void (*body)(void*);
  void* arguments;
  char begin_event = 0, end_event = 0;
};

// Settings of the next launches.
struct Settings {
  uint64_t seed = 0;
  // largest shared memory of a block, blocks of a cluster
  int64_t shared_limit = 232448;
  int cluster_limit = 8;
};
Settings& settings();

// Implemented by each scheduler.
Thread& self();
const Grid& grid();
void meet_block(Thread& thread, const Site& site);
void meet_cluster(Thread& thread, const Site& site);
// the other lane's bits
uint64_t exchange(Thread& thread, uint64_t bits, int bytes, int mask, const Site& site);
// lets others run
void give_way(Thread& thread);
// the grid is lost: does not return to the kernel
[[noreturn]] void fail(const std::string& message);
void run(Grid& grid);

// Implemented once. An error is a sentence about what the kernel did; run_grid() returns 1 and keeps it.
int run_grid(const char* kernel, const Shape& shape, void (*body)(void*), void* arguments);
void set_error(const std::string& message);
void begin_thread(Thread& thread, Grid& grid);
void create_block(Block& block);
void destroy_block(Block& block);
// all threads of the block have reached a barrier and none has left it
void complete_barrier(Block& block);
void end_thread(Thread& thread, Grid& grid);
// what is wrong with a cluster whose threads have all ended, or an empty string
std::string check_cluster(const Cluster& cluster);

void block_barrier(const std::source_location& where);
void cluster_barrier(const std::source_location& where);
uint64_t shuffle(uint64_t bits, int bytes, int mask, const std::source_location& where);
unsigned take_ticket(unsigned* counter, unsigned last, const std::source_location& where);
void device_fence(const std::source_location& where);
char* shared_memory(int64_t bytes, int64_t alignment);
char* cluster_shared(const void* local, int64_t bytes, int rank);

// notes a copy, and says which are due when all but the newest `groups` are waited for
void begin_copy(void* to, const void* from);
Copy* due_copies(int groups, int& count);
void forget_copies(int count);

// a read-only load may not see what the launch itself has written
enum class Access { kLoad, kReadOnlyLoad, kStore };
// 16 aligned bytes of this block's shared memory, or of another's in its cluster
void check_shared(const void* address, int64_t bytes);
// global memory: aligned to its size, inside a registered buffer, and stores only where they are allowed
void check_global(const void* address, int64_t bytes, Access access);

}  // namespace flowdppo::host
