// Small kernels with everything the layer has to get right: a ticketed reduction over split rows, a sum over a cluster,
// a ring of asynchronous copies, and one that does what no kernel should. The layer's own tests break them.
#pragma once

#include "platform.cuh"

namespace flowdppo::toys {

using gpu::Bytes16;

struct RowSum {
  // rows of `numel` floats, a multiple of 4
  const float* in;
  int64_t numel;
  int splits;
  float* partials;
  unsigned* counters;
  float* sums;
};

struct RowSumShared {
  float warps[32];
  unsigned ticket;
};

inline float block_sum(float value, float* warps) {
  for (int mask = 16; mask > 0; mask /= 2) value += gpu::warp_shuffle_xor(value, mask);
  if (gpu::lane_index() == 0) warps[gpu::warp_index()] = value;
  gpu::block_barrier();
  float sum = 0.0f;
  for (int i = 0; i < gpu::block_threads() / 32; ++i) sum += warps[i];
  return sum;
}

// Block row*splits + split sums its share; the last block of a row adds the shares in order.
FLOWDPPO_KERNEL void row_sum(FLOWDPPO_KERNEL_ARGUMENT RowSum a) {
  auto& shared = gpu::shared_memory<RowSumShared>();
  const int64_t row = gpu::block_index() / a.splits, split = gpu::block_index() % a.splits, vectors = a.numel / 4;
  const int64_t begin = vectors * split / a.splits, end = vectors * (split + 1) / a.splits;
  float sum = 0.0f;
  for (int64_t i = begin + gpu::thread_index(); i < end; i += gpu::block_threads()) {
    const Bytes16 bytes = gpu::load16_streaming(a.in + row * a.numel + 4 * i);
    float values[4];
    memcpy(values, &bytes, sizeof values);
    for (float value : values) sum += value;
  }
  sum = block_sum(sum, shared.warps);
  // the last thread writes, the first one takes the ticket
  if (gpu::thread_index() == gpu::block_threads() - 1) a.partials[gpu::block_index()] = sum;
  gpu::block_barrier();
  if (gpu::thread_index() == 0) {
    gpu::device_fence();
    shared.ticket = gpu::take_ticket(a.counters + row, static_cast<unsigned>(a.splits - 1));
    gpu::device_fence();
  }
  gpu::block_barrier();
  if (shared.ticket != static_cast<unsigned>(a.splits - 1)) return;
  float share = 0.0f;
  for (int i = gpu::thread_index(); i < a.splits; i += gpu::block_threads())
    share += gpu::load_fresh(a.partials + row * a.splits + i);
  share = block_sum(share, shared.warps);
  if (gpu::thread_index() == 0) a.sums[row] = share;
}

struct ClusterSum {
  // one float per thread of the grid
  const float* in;
  // per thread: the sum over its cluster
  float* out;
};

struct ClusterSumShared {
  float warps[32];
  float sum;
};

FLOWDPPO_KERNEL void cluster_sum(FLOWDPPO_KERNEL_ARGUMENT ClusterSum a) {
  auto& shared = gpu::shared_memory<ClusterSumShared>();
  const int64_t at = gpu::block_index() * gpu::block_threads() + gpu::thread_index();
  const float sum = block_sum(a.in[at], shared.warps);
  if (gpu::thread_index() == 0) shared.sum = sum;
  gpu::cluster_barrier();
  float total = 0.0f;
  for (int rank = 0; rank < gpu::cluster_blocks(); ++rank) total += *gpu::cluster_shared(&shared.sum, rank);
  a.out[at] = total;
  // nobody may end while others still read its sum
  gpu::cluster_barrier();
}

struct Reverse {
  // `tiles` tiles of one 16-byte vector per thread; each is written in reverse order
  const uint32_t* in;
  uint32_t* out;
  int tiles;
};

// Two tiles under way at any time.
FLOWDPPO_KERNEL void reverse(FLOWDPPO_KERNEL_ARGUMENT Reverse a) {
  char* ring = &gpu::shared_memory<char>();
  const int threads = gpu::block_threads(), thread = gpu::thread_index();
  const auto slot = [&](int tile, int vector) { return ring + ((tile % 2) * threads + vector) * 16; };
  const auto fetch = [&](int tile) {
    if (tile < a.tiles) gpu::async_copy16(slot(tile, thread), a.in + (int64_t{tile} * threads + thread) * 4);
    gpu::async_commit();
  };
  fetch(0);
  fetch(1);
  for (int tile = 0; tile < a.tiles; ++tile) {
    gpu::async_wait<1>();
    gpu::block_barrier();
    const Bytes16 bytes = gpu::load16_shared(slot(tile, threads - 1 - thread));
    gpu::block_barrier();
    fetch(tile + 2);
    gpu::store16(a.out + (int64_t{tile} * threads + thread) * 4, bytes);
  }
  gpu::async_wait<0>();
}

// What a kernel may do wrong. Blocks of 64 threads in clusters of 2, with 256 bytes of shared memory.
enum class Mistake : int {
  kNone,
  kWriteBehindShared,
  kWriteInFrontOfShared,
  kEndBeforeBarrier,
  kTwoBarriers,
  kTwoMasks,
  kBadMask,
  kCopyNotAwaited,
  kReachForEndedBlock,
  kWriteToEndedBlock,
  kBadRank,
  kForeignAddress,
  kMisalignedShared,
  kMisalignedGlobal,
  kReadBeforeWritten,
  kTooLargeType
};

struct Misuse {
  Mistake mistake;
  // 1024 bytes
  uint32_t* memory;
};

struct Large {
  char bytes[512];
};

FLOWDPPO_KERNEL void misuse(FLOWDPPO_KERNEL_ARGUMENT Misuse a) {
  char* shared = &gpu::shared_memory<char>();
  uint32_t* words = reinterpret_cast<uint32_t*>(shared);
  const int thread = gpu::thread_index(), rank = gpu::cluster_rank();
  const auto is = [&](Mistake mistake) { return a.mistake == mistake; };
  if (is(Mistake::kWriteBehindShared) && thread == 0) shared[256] = 1;
  if (is(Mistake::kWriteInFrontOfShared) && thread == 0) shared[-1] = 1;
  if (is(Mistake::kEndBeforeBarrier) && thread == 17) return;
  if (is(Mistake::kTwoBarriers) && thread >= 32) {
    gpu::block_barrier();
  } else {
    gpu::block_barrier();
  }
  if (is(Mistake::kTwoMasks)) gpu::warp_shuffle_xor(1, thread % 32 == 3 ? 4 : 2);
  if (is(Mistake::kBadMask)) gpu::warp_shuffle_xor(1, 32);
  if (is(Mistake::kCopyNotAwaited) && thread == 1) gpu::async_copy16(shared, a.memory);
  if (is(Mistake::kBadRank)) gpu::cluster_shared(words, 2);
  if (is(Mistake::kForeignAddress)) gpu::cluster_shared(a.memory, 1);
  if (is(Mistake::kMisalignedShared)) gpu::load16_shared(shared + 8);
  if (is(Mistake::kMisalignedGlobal)) gpu::load16_streaming(a.memory + 1);
  if (is(Mistake::kTooLargeType)) gpu::shared_memory<Large>();
  uint32_t* theirs = gpu::cluster_shared(words, 1 - rank);
  gpu::cluster_barrier();
  if (is(Mistake::kReachForEndedBlock) || is(Mistake::kWriteToEndedBlock)) {
    // the block with rank 0 ends, and the other one waits for itself a while
    if (rank == 0) return;
    for (int i = 0; i < 100; ++i) gpu::block_barrier();
    if (is(Mistake::kReachForEndedBlock)) theirs = gpu::cluster_shared(words, 0);
    if (thread == 0) *theirs = 1;
    return;
  }
  if (thread == 0 && rank == 0) a.memory[0] = is(Mistake::kReadBeforeWritten) ? words[3] : 0;
  gpu::cluster_barrier();
}

}  // namespace flowdppo::toys
