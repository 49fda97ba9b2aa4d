// Adding up over a block and over blocks, always in the same order.
#pragma once

#include "../../csrc/row_math.h"
#include "platform.cuh"

namespace flowdppo::gpu {

// nd, dd, nn, ww of RawSums
constexpr int kSums = 4;

struct alignas(16) ReduceShared {
  double warps[kSums][kStreamThreads / 32];
  double total[kSums];
  // what the block found out about its ticket
  unsigned last;
};
static_assert(sizeof(ReduceShared) <= kReduceBytes, "plan.h reserves less shared memory than blocks use");

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
FLOWDPPO_DEVICE RawSums block_sum(RawSums own) {
  ReduceShared& shared = shared_memory<ReduceShared>();
  const unsigned thread = threadIdx.x;
  double* sums[kSums] = {&own.nd, &own.dd, &own.nn, &own.ww};
  FLOWDPPO_UNROLL
  for (int mask = 16; mask > 0; mask /= 2) {
    FLOWDPPO_UNROLL
    for (int k = 0; k < kSums; ++k) *sums[k] += __shfl_xor_sync(0xffffffffu, *sums[k], mask);
  }
  if (thread % 32 == 0) {
    FLOWDPPO_UNROLL
    for (int k = 0; k < kSums; ++k) shared.warps[k][thread / 32] = *sums[k];
  }
  __syncthreads();
  if (thread < kSums) {
    double total = 0.0;
    for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) total += shared.warps[thread][warp];
    shared.total[thread] = total;
  }
  __syncthreads();
  return {shared.total[0], shared.total[1], shared.total[2], shared.total[3]};
}

FLOWDPPO_DEVICE double block_sum(double own) {
  RawSums sums;
  sums.nd = own;
  return block_sum(sums).nd;
}

FLOWDPPO_DEVICE void store_sums(double* to, const RawSums& sums) {
  to[0] = sums.nd;
  to[1] = sums.dd;
  to[2] = sums.nn;
  to[3] = sums.ww;
}

// Of a block that may have written them during this launch: not from this SM's first-level cache.
FLOWDPPO_DEVICE RawSums load_sums(const double* from) {
  return {__ldcg(from), __ldcg(from + 1), __ldcg(from + 2), __ldcg(from + 3)};
}

// Whether this block is the last of `count` to get here; if so all of it sees what thread 0 of the others stored before.
// All threads must call it, all get the same answer.
FLOWDPPO_DEVICE bool arrives_last(unsigned* counter, unsigned count) {
  ReduceShared& shared = shared_memory<ReduceShared>();
  if (threadIdx.x == 0) shared.last = take_ticket(counter, count - 1) == count - 1;
  __syncthreads();
  return shared.last != 0;
}

// A row's sums, for the block that is the last of the row's `splits` to bring its part; false for the others.
FLOWDPPO_DEVICE bool finish_row(
    RawSums& sums, double* partials, unsigned* ticket, unsigned row, unsigned split, unsigned splits) {
  if (splits == 1) return true;
  double* of_row = partials + static_cast<int64_t>(row) * splits * kSums;
  if (threadIdx.x == 0) store_sums(of_row + static_cast<int64_t>(split) * kSums, sums);
  if (!arrives_last(ticket, splits)) return false;
  RawSums own;
  for (unsigned i = threadIdx.x; i < splits; i += kStreamThreads) {
    own.add(load_sums(of_row + static_cast<int64_t>(i) * kSums));
  }
  sums = block_sum(own);
  return true;
}

}  // namespace flowdppo::gpu
