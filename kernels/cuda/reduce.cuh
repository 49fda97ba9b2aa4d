// Adding up over a block and over blocks, always in the same order.
#pragma once

#include "../../csrc/row_math.h"
#include "plan.h"
#include "platform.cuh"

namespace flowdppo::gpu {

// nd, dd, nn, ww of RawSums
constexpr int kSums = 4;
constexpr int kMostWarps = kMostHoldingThreads / 32;

struct alignas(16) ReduceShared {
  double warps[kSums][kMostWarps];
  double total[kSums];
  // what the block found out about its ticket
  unsigned last;
  // of single_pass.cu: this block's part of a row, and what the row's gradient is made of
  float on_noise, on_diff, on_ref;
  unsigned active;
  double part[kSums];
};
static_assert(sizeof(ReduceShared) <= kReduceBytes, "plan.h reserves less shared memory than blocks use");

// What lies behind the ReduceShared at the start of shared memory.
template <class T>
FLOWDPPO_DEVICE T* behind(ReduceShared& shared) {
  return reinterpret_cast<T*>(reinterpret_cast<char*>(&shared) + kReduceBytes);
}

// A thread's running sums in float32, two of each so that additions need not wait for each other.
struct ThreadSums {
  float nd[2] = {}, dd[2] = {}, nn[2] = {}, ww[2] = {};

  FLOWDPPO_DEVICE RawSums total() const {
    return {
        static_cast<double>(nd[0]) + nd[1], static_cast<double>(dd[0]) + dd[1], static_cast<double>(nn[0]) + nn[1],
        static_cast<double>(ww[0]) + ww[1]};
  }
};

// Sums over all threads, for all threads: butterflies in the warps, then the warps in order. All threads must call it.
FLOWDPPO_DEVICE RawSums block_sum(RawSums own, ReduceShared& shared) {
  double* sums[kSums] = {&own.nd, &own.dd, &own.nn, &own.ww};
  FLOWDPPO_UNROLL
  for (int mask = 16; mask > 0; mask /= 2) {
    FLOWDPPO_UNROLL
    for (int k = 0; k < kSums; ++k) *sums[k] += warp_shuffle_xor(*sums[k], mask);
  }
  if (lane_index() == 0) {
    FLOWDPPO_UNROLL
    for (int k = 0; k < kSums; ++k) shared.warps[k][warp_index()] = *sums[k];
  }
  block_barrier();
  if (thread_index() < kSums) {
    double total = 0.0;
    for (int warp = 0; warp < block_threads() / 32; ++warp) total += shared.warps[thread_index()][warp];
    shared.total[thread_index()] = total;
  }
  block_barrier();
  return {shared.total[0], shared.total[1], shared.total[2], shared.total[3]};
}

FLOWDPPO_DEVICE double block_sum(double own, ReduceShared& shared) {
  RawSums sums;
  sums.nd = own;
  return block_sum(sums, shared).nd;
}

FLOWDPPO_DEVICE void store_sums(double* to, const RawSums& sums) {
  to[0] = sums.nd;
  to[1] = sums.dd;
  to[2] = sums.nn;
  to[3] = sums.ww;
}

// Of a block that may have written them during this launch.
FLOWDPPO_DEVICE RawSums load_sums(const double* from) {
  return {load_fresh(from), load_fresh(from + 1), load_fresh(from + 2), load_fresh(from + 3)};
}

// Whether this block is the last of `count` to get here; if so it sees what thread 0 of the others stored before. All
// threads must call it, all get the same answer.
FLOWDPPO_DEVICE bool arrives_last(unsigned* counter, int64_t count, ReduceShared& shared) {
  if (thread_index() == 0) {
    device_fence();
    const unsigned last = static_cast<unsigned>(count - 1);
    shared.last = take_ticket(counter, last) == last;
    device_fence();
  }
  block_barrier();
  return shared.last != 0;
}

// A row's sums, for the block that is the last of the row's `splits` to bring its part; false for the others.
FLOWDPPO_DEVICE bool finish_row(
    RawSums& sums, double* partials, unsigned* ticket, unsigned row, unsigned split, unsigned splits,
    ReduceShared& shared) {
  if (splits == 1) return true;
  double* of_row = partials + static_cast<int64_t>(row) * splits * kSums;
  if (thread_index() == 0) store_sums(of_row + static_cast<int64_t>(split) * kSums, sums);
  if (!arrives_last(ticket, splits, shared)) return false;
  RawSums own;
  for (unsigned i = thread_index(); i < splits; i += block_threads()) {
    own.add(load_sums(of_row + static_cast<int64_t>(i) * kSums));
  }
  sums = block_sum(own, shared);
  return true;
}

}  // namespace flowdppo::gpu
