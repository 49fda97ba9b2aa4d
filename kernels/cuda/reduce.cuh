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
};

// Sums over all threads, for all threads: butterflies in the warps, then the warps in order. All threads must call it.
template <int kCount>
FLOWDPPO_DEVICE void block_sum(double (&sums)[kCount]) {
  ReduceShared& shared = shared_memory<ReduceShared>();
  const unsigned thread = threadIdx.x;
  FLOWDPPO_UNROLL
  for (int mask = 16; mask > 0; mask /= 2) {
    FLOWDPPO_UNROLL
    for (int k = 0; k < kCount; ++k) sums[k] += __shfl_xor_sync(0xffffffffu, sums[k], mask);
  }
  if (thread % 32 == 0) {
    FLOWDPPO_UNROLL
    for (int k = 0; k < kCount; ++k) shared.warps[k][thread / 32] = sums[k];
  }
  __syncthreads();
  if (thread < kCount) {
    double total = 0.0;
    for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) total += shared.warps[thread][warp];
    shared.total[thread] = total;
  }
  __syncthreads();
  FLOWDPPO_UNROLL
  for (int k = 0; k < kCount; ++k) sums[k] = shared.total[k];
}

FLOWDPPO_DEVICE double block_sum(double own) {
  double sums[1] = {own};
  block_sum(sums);
  return sums[0];
}

template <int kCount>
FLOWDPPO_DEVICE void store_sums(double* to, const double (&sums)[kCount]) {
  FLOWDPPO_UNROLL
  for (int k = 0; k < kCount; ++k) to[k] = sums[k];
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
template <int kCount>
FLOWDPPO_DEVICE bool finish_row(
    double (&sums)[kCount], double* partials, unsigned* ticket, unsigned row, unsigned split, unsigned splits) {
  if (splits == 1) return true;
  double* of_row = partials + static_cast<int64_t>(row) * splits * kCount;
  if (threadIdx.x == 0) store_sums(of_row + static_cast<int64_t>(split) * kCount, sums);
  if (!arrives_last(ticket, splits)) return false;
  FLOWDPPO_UNROLL
  for (int k = 0; k < kCount; ++k) sums[k] = 0.0;
  for (unsigned i = threadIdx.x; i < splits; i += kStreamThreads) {
    FLOWDPPO_UNROLL
    for (int k = 0; k < kCount; ++k) sums[k] += __ldcg(of_row + static_cast<int64_t>(i) * kCount + k);
  }
  block_sum(sums);
  return true;
}

}  // namespace flowdppo::gpu
