// How work is cut and launched: pure functions of shapes and dtypes. No CUDA call, no state: the same question always
// gets the same answer, on every GPU, and the tests ask it without one.
#pragma once

#include <stdint.h>

#include "../../csrc/row_source.h"

namespace flowdppo::gpu {

// How a compiled kernel finds an operand: in a known dtype, or nowhere.
enum class Stored { kFloat32, kBFloat16, kFloat16, kGenerated };

// Which compiled version of a kernel serves a call: latents of one dtype, noise of that or float32. There is none for
// mixtures of dtypes; whoever calls casts them to float32, which holds all of them exactly.
struct Version {
  Stored latents, noise;
  bool reference;
};

inline Stored stored_as(const Latents& latents) {
  return latents.data == nullptr              ? Stored::kGenerated
         : latents.dtype == DType::kBFloat16 ? Stored::kBFloat16
         : latents.dtype == DType::kFloat16  ? Stored::kFloat16
                                             : Stored::kFloat32;
}

// What kernels are handed of a training row or a sampler step: two latents, noise, and maybe a third.
struct Operands {
  Latents first, second, noise, reference;

  bool mixed() const {
    return second.dtype != first.dtype || (reference.data != nullptr && reference.dtype != first.dtype) ||
        (noise.data != nullptr && noise.dtype != first.dtype && noise.dtype != DType::kFloat32);
  }

  Version version() const { return {stored_as(first), stored_as(noise), reference.data != nullptr}; }
};

FLOWDPPO_HD Operands operands_of(const RowSource<float>& source) {
  return {source.current, source.old, source.noise, source.reference};
}

// Of a given next state the noise is what it contains.
FLOWDPPO_HD Operands operands_of(const SampleSource<float>& source) {
  return {source.sample, source.velocity, source.previous.data != nullptr ? source.previous : source.noise, {}};
}

// Whether every row starts at a multiple of 16 bytes.
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

inline bool rows_aligned(const Operands& operands, const RowShape& shape) {
  return rows_aligned(operands.first, shape) && rows_aligned(operands.second, shape) &&
      rows_aligned(operands.noise, shape) && rows_aligned(operands.reference, shape);
}

// Elements that a thread takes side by side: 16 bytes of the latents' dtype.
FLOWDPPO_HD constexpr int group_of(Stored latents) { return latents == Stored::kFloat32 ? 4 : 8; }

// Threads of a streaming block.
constexpr int kStreamThreads = 256;
// Streaming blocks wanted before one takes several tiles, and the most tiles that it takes. They do not depend on the
// device, so that rows are added up in the same order on every GPU.
constexpr int64_t kWantedBlocks = 512, kMostTiles = 16;
// What a block uses to add up: see ReduceShared in reduce.cuh.
constexpr int kReduceBytes = 320;
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
struct Plan {
  int64_t blocks = 0;
  int threads = 0, shared_bytes = 0;
  int64_t splits = 0, elements = 0;
  // 0 where no objective is finished
  int slots = 0;
};

// Of a kernel that streams rows; with `finishes` it also evaluates the objective.
inline Plan plan_rows(int64_t rows, int64_t numel, Stored latents, bool finishes) {
  const int64_t tile = int64_t{kStreamThreads} * group_of(latents), tiles = ceil_div(numel, tile);
  // rows beyond every measure must not overflow
  const int64_t wanted = rows >= kWantedBlocks ? tiles : least(tiles, ceil_div(rows * tiles, kWantedBlocks));
  Plan plan;
  plan.elements = tile * power_of_two_below(least(most(wanted, 1), kMostTiles));
  plan.splits = ceil_div(numel, plan.elements);
  plan.slots = finishes ? slots_for(rows) : 0;
  plan.blocks = rows * plan.splits;
  plan.threads = kStreamThreads;
  plan.shared_bytes = kReduceBytes + plan.slots * kSlotBytes;
  return plan;
}

// Of rows without latents: the finishing block alone, a thread for each row that it takes side by side.
inline Plan plan_given_rows(int64_t rows) {
  Plan plan;
  plan.slots = slots_for(rows);
  plan.blocks = 1;
  plan.threads = plan.slots;
  plan.shared_bytes = kReduceBytes + plan.slots * kSlotBytes;
  return plan;
}

// Bytes of scratch memory that forward and step kernels need: four sums per block and per row.
inline int64_t scratch_bytes(const Plan& plan, int64_t rows) {
  return static_cast<int64_t>(4 * sizeof(double)) * (plan.blocks + rows);
}

// Counters that must be zero before a launch, and are zero again after it: one per row and one for all rows.
inline int64_t ticket_count(int64_t rows) { return rows + 1; }

}  // namespace flowdppo::gpu
