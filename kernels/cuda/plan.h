// How work is cut and launched: pure functions of shapes, dtypes and device limits. No CUDA call, no state: the same
// question always gets the same answer, and the tests ask it without a GPU.
#pragma once

#include <stdint.h>

#include <initializer_list>

#include "../../csrc/row_source.h"
#include "launch_shape.h"

namespace flowdppo::gpu {

struct DeviceLimits {
  int processors = 0;
  // shared memory that a block may ask for
  int shared_per_block = 0;
  // blocks in the largest cluster; 1 where there are no clusters
  int max_cluster = 1;
};

// What the latents of a call look like to the kernels. Streams of noise are generated where none is stored.
struct Work {
  int64_t rows = 0, numel = 0;
  DType current = DType::kFloat32, old = DType::kFloat32, noise = DType::kFloat32, reference = DType::kFloat32;
  bool has_noise = false, has_reference = false;
  // every row of every operand and result starts at a multiple of 16 bytes
  bool aligned = false;
};

inline bool rows_aligned(const Latents& latents, const RowShape& shape) {
  if (latents.data == nullptr) return true;
  const int64_t item = size_of(latents.dtype);
  // a stride of one row is never taken
  return reinterpret_cast<uintptr_t>(latents.data) % 16 == 0 && (shape.outer == 1 || latents.stride0 * item % 16 == 0) &&
      (shape.inner == 1 || latents.stride1 * item % 16 == 0);
}

// The same of a contiguous result, null for none.
inline bool rows_aligned(const void* out, DType dtype, const RowShape& shape) {
  return rows_aligned(Latents{out, dtype, shape.inner * shape.numel, shape.numel}, shape);
}

// `out` is the gradient, null for none.
inline Work describe(const RowSource<float>& source, const void* out) {
  const RowShape& shape = source.shape;
  return {
      shape.rows(), shape.numel, source.current.dtype, source.old.dtype, source.noise.dtype, source.reference.dtype,
      source.noise.data != nullptr, source.reference.data != nullptr,
      rows_aligned(source.current, shape) && rows_aligned(source.old, shape) && rows_aligned(source.noise, shape) &&
          rows_aligned(source.reference, shape) && rows_aligned(out, source.current.dtype, shape)};
}

inline Work describe(const SampleSource<float>& source) {
  const RowShape& shape = source.shape;
  const Latents& drawn = source.previous.data != nullptr ? source.previous : source.noise;
  return {
      shape.rows(), shape.numel, source.sample.dtype, source.velocity.dtype, drawn.dtype, DType::kFloat32,
      drawn.data != nullptr, false,
      rows_aligned(source.sample, shape) && rows_aligned(source.velocity, shape) && rows_aligned(drawn, shape) &&
          rows_aligned(source.next, source.next_dtype, shape) && rows_aligned(source.mean, DType::kFloat32, shape)};
}

// How a compiled kernel finds an operand: in a known dtype, in one that it is told at run time, or nowhere.
enum class Stored { kFloat32, kBFloat16, kFloat16, kAny, kGenerated };

// Which compiled version of a kernel serves a call. Common dtypes have their own; mixtures share one.
struct Version {
  Stored latents, noise;
  bool reference;
};

inline Stored stored_as(DType dtype) {
  return dtype == DType::kBFloat16  ? Stored::kBFloat16
         : dtype == DType::kFloat16 ? Stored::kFloat16
                                    : Stored::kFloat32;
}

inline Version version_of(const Work& work) {
  const bool same = work.old == work.current && (!work.has_reference || work.reference == work.current);
  if (!work.has_noise) return {same ? stored_as(work.current) : Stored::kAny, Stored::kGenerated, work.has_reference};
  if (!same || (work.noise != work.current && work.noise != DType::kFloat32)) {
    return {Stored::kAny, Stored::kAny, work.has_reference};
  }
  return {stored_as(work.current), stored_as(work.noise), work.has_reference};
}

// Elements that a thread takes side by side: 16 bytes of the narrowest dtype.
FLOWDPPO_HD constexpr int group_of(Stored latents) { return latents == Stored::kFloat32 ? 4 : 8; }

// Threads of a streaming block, and of a block that holds its share of a row in shared memory.
constexpr int kStreamThreads = 256, kMostHoldingThreads = 256;
// Streaming blocks wanted before one takes several tiles, and the most tiles that it takes. They do not depend on the
// device, so that sums are the same bits on every GPU.
constexpr int64_t kWantedBlocks = 512, kMostTiles = 16;
// What a block uses to add up: see ReduceShared in reduce.cuh.
constexpr int kReduceBytes = 640;
// Rows that the finishing block adds to the summary side by side, and what each of them needs: Slot in objective.cuh.
constexpr int kMostSlots = 128, kSlotBytes = 256;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// The largest power of two that is not above `value`, which is at least 1.
constexpr int64_t power_of_two_below(int64_t value) {
  int64_t power = 1;
  while (power <= value / 2) power *= 2;
  return power;
}

constexpr int slots_for(int64_t rows) {
  int slots = 32;
  while (slots < rows && slots < kMostSlots) slots *= 2;
  return slots;
}

// A row is cut into `splits` blocks of `elements` elements; block number row*splits + split.
struct StreamPlan {
  LaunchShape shape;
  int64_t splits = 0, elements = 0;
  // 0 where no objective is finished
  int slots = 0;
};

inline StreamPlan stream_plan(int64_t rows, int64_t numel, int group, bool finishes) {
  const int64_t tile = int64_t{kStreamThreads} * group, tiles = ceil_div(numel, tile);
  // rows beyond every measure must not overflow
  const int64_t wanted = rows >= kWantedBlocks ? tiles : least(tiles, ceil_div(rows * tiles, kWantedBlocks));
  StreamPlan plan;
  plan.elements = tile * power_of_two_below(least(most(wanted, 1), kMostTiles));
  plan.splits = ceil_div(numel, plan.elements);
  plan.slots = finishes ? slots_for(rows) : 0;
  plan.shape = {
      rows * plan.splits, kStreamThreads, 1, kReduceBytes + plan.slots * kSlotBytes};
  return plan;
}

// Sums over rows; with `finishes` also the objective.
inline StreamPlan plan_forward(const Work& work, bool finishes) {
  return stream_plan(work.rows, work.numel, group_of(version_of(work).latents), finishes);
}

inline StreamPlan plan_gradient(const Work& work) {
  return stream_plan(work.rows, work.numel, group_of(version_of(work).latents), false);
}

// Rows without latents: the finishing block alone, a thread for each row that it takes side by side.
inline StreamPlan plan_log_prob(int64_t rows) {
  StreamPlan plan;
  plan.slots = slots_for(rows);
  plan.shape = {1, plan.slots, 1, kReduceBytes + plan.slots * kSlotBytes};
  return plan;
}

// Of a sampler step `current` is the state, `old` the velocity, `noise` the noise or the given next state.
inline StreamPlan plan_step(const Work& work) {
  return stream_plan(work.rows, work.numel, group_of(version_of(work).latents), false);
}

// Bytes of scratch memory that forward and step kernels need: four sums per block and per row.
inline int64_t scratch_bytes(const StreamPlan& plan, int64_t rows) {
  return static_cast<int64_t>(4 * sizeof(double)) * (plan.shape.blocks + rows);
}

// Counters that must be zero before a launch, and are zero again after it: one per row and one for all rows.
inline int64_t ticket_count(int64_t rows) { return rows + 1; }

// One cluster of blocks holds a row. Each block holds `groups` groups, as many per thread as `per_thread`.
struct HoldingPlan {
  // false: rows do not fit, or the version has no such kernel; two launches do the work
  bool possible = false;
  LaunchShape shape;
  int64_t groups = 0, per_thread = 0;
  // generated noise is held, not generated twice
  bool holds_noise = false;
  int slots = 0;
};

// 16-byte pieces that a group takes in shared memory.
constexpr int pieces_of(const Version& version, bool holds_noise) {
  const int noise = version.noise != Stored::kGenerated ? 1 : holds_noise ? group_of(version.latents) / 4 : 0;
  return 2 + (version.reference ? 1 : 0) + noise;
}

inline HoldingPlan holding_plan(
    const Version& version, int64_t rows, int64_t numel, int cluster, bool holds_noise) {
  const int64_t groups = ceil_div(numel / group_of(version.latents), cluster);
  // enough threads that each of them holds at least four groups, if there are that many
  int threads = static_cast<int>(least(most(power_of_two_below(most(groups / 4, 1)), 128), kMostHoldingThreads));
  HoldingPlan plan;
  plan.groups = groups;
  plan.per_thread = ceil_div(groups, threads);
  plan.holds_noise = holds_noise;
  plan.slots = slots_for(rows);
  const int64_t held = plan.per_thread * threads * 16 * pieces_of(version, holds_noise);
  const int64_t finish = int64_t{plan.slots} * kSlotBytes;
  const int64_t bytes = kReduceBytes + most(held, finish);
  plan.shape = {rows * cluster, threads, cluster, static_cast<int>(least(bytes, INT32_MAX))};
  return plan;
}

// The smallest cluster that leaves room for a second block beside it and gives every processor one; else the largest
// one, if a row fits it at all.
inline HoldingPlan plan_single_pass(const Work& work, bool couples_rows, const DeviceLimits& device) {
  const Version version = version_of(work);
  const bool served = version.latents != Stored::kAny &&
      (version.noise == version.latents || version.noise == Stored::kGenerated);
  if (!served || couples_rows || !work.aligned || device.max_cluster < 2) return {};
  const bool generated = version.noise == Stored::kGenerated;
  for (const bool holds_noise : {generated, false}) {
    for (int cluster = 1; cluster <= device.max_cluster; cluster *= 2) {
      const HoldingPlan plan = holding_plan(version, work.rows, work.numel, cluster, holds_noise);
      const bool roomy = 2 * plan.shape.shared_bytes <= device.shared_per_block;
      const bool fills = plan.shape.blocks >= device.processors;
      const bool last = 2 * cluster > device.max_cluster;
      if ((roomy && fills) || (last && plan.shape.shared_bytes <= device.shared_per_block)) {
        HoldingPlan chosen = plan;
        chosen.possible = true;
        return chosen;
      }
    }
    if (!generated) break;
  }
  return {};
}

}  // namespace flowdppo::gpu
