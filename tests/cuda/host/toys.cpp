#include "toys.h"

#include "control.h"

using namespace flowdppo;

extern "C" int toy_row_sum(
    const float* in, int64_t rows, int64_t numel, int splits, int threads, int shared_bytes, float* partials,
    unsigned* counters, float* sums) {
  const toys::RowSum arguments = {in, numel, splits, partials, counters, sums};
  const gpu::LaunchShape shape = {rows * splits, threads, 1, shared_bytes};
  return FLOWDPPO_LAUNCH(toys::row_sum, shape, nullptr, arguments);
}

extern "C" int toy_cluster_sum(const float* in, int64_t blocks, int cluster, int threads, float* out) {
  const toys::ClusterSum arguments = {in, out};
  const gpu::LaunchShape shape = {blocks, threads, cluster, sizeof(toys::ClusterSumShared)};
  return FLOWDPPO_LAUNCH(toys::cluster_sum, shape, nullptr, arguments);
}

extern "C" int toy_reverse(const uint32_t* in, int tiles, int threads, uint32_t* out) {
  const toys::Reverse arguments = {in, out, tiles};
  return FLOWDPPO_LAUNCH(toys::reverse, (gpu::LaunchShape{1, threads, 1, threads * 32}), nullptr, arguments);
}

extern "C" int toy_misuse(int mistake, uint32_t* memory) {
  const toys::Misuse arguments = {static_cast<toys::Mistake>(mistake), memory};
  return FLOWDPPO_LAUNCH(toys::misuse, (gpu::LaunchShape{4, 64, 2, 256}), nullptr, arguments);
}

extern "C" int toy_launch(int64_t blocks, int threads, int cluster, int shared_bytes, uint32_t* memory) {
  const toys::Misuse arguments = {toys::Mistake::kNone, memory};
  return FLOWDPPO_LAUNCH(toys::misuse, (gpu::LaunchShape{blocks, threads, cluster, shared_bytes}), nullptr, arguments);
}
