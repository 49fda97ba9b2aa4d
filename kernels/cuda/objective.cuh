// From the sums of all rows to loss, row results and summary: the work of the one block that finishes a launch, or that
// is all of it where a trainer has the rows' log-probs.
#pragma once

#include "../../csrc/objective.h"
#include "../../csrc/row_source.h"
#include "launchers.h"
#include "reduce.cuh"

namespace flowdppo::gpu {

struct ObjectiveArguments {
  ObjectiveInputs<float> inputs;
  EpilogueOptions options;
  ObjectiveResults results;
  int slots;
};

// What a thread of the finishing block works on, in shared memory: registers are for the streaming loops.
struct Slot {
  RowSummary summary;
  RowResult<float> result;
  double coupling;
  float bias;
};
static_assert(sizeof(Slot) <= kSlotBytes, "plan.h reserves less shared memory than slots take");

// Loss, row results and summary. All threads of the block must call it. Thread t takes rows t, t + slots, ..; the
// slots' summaries are then merged pairwise. kGiven: a trainer's own log-probs and drifts stand in for what streaming
// adds up.
template <bool kGiven>
FLOWDPPO_DEVICE void finish_objective(
    const RowSource<float>& source, const ObjectiveArguments& objective, const double* row_sums) {
  const EpilogueOptions& options = objective.options;
  const ObjectiveInputs<float>& inputs = objective.inputs;
  const unsigned rows = static_cast<unsigned>(source.shape.rows()), thread = threadIdx.x;
  const unsigned slots = static_cast<unsigned>(objective.slots), first = thread < slots ? thread : rows;
  const int64_t numel = source.shape.numel;
  Slot* all = reinterpret_cast<Slot*>(reinterpret_cast<char*>(&shared_memory<ReduceShared>()) + kReduceBytes);
  const bool coupled = options.couples_rows();
  const auto stats_of = [&](unsigned row, const RawSums& sums) {
    return finish_sums<float>(sums, numbers_of(source.step, source.form, row).scale, numel, source.form);
  };
  if (coupled) {
    double own = 0.0;
    for (unsigned row = first; row < rows; row += slots) {
      RawSums sums;
      if constexpr (kGiven) {
        sums = inputs.given_sums(row);
      } else {
        sums.dd = __ldcg(row_sums + static_cast<int64_t>(row) * kSums + 1);
      }
      own += guard_divergence(stats_of(row, sums).q, numel, options);
    }
    own = block_sum(own);
    if (thread < slots) all[thread].bias = static_cast<float>(own / static_cast<double>(rows));
  }
  if (thread < slots) {
    all[thread].summary = RowSummary();
    all[thread].coupling = 0.0;
  }
  float* out = objective.results.rows;
  for (unsigned row = first; row < rows; row += slots) {
    RawSums sums;
    if constexpr (kGiven) {
      sums = inputs.given_sums(row);
    } else {
      sums = load_sums(row_sums + static_cast<int64_t>(row) * kSums);
    }
    const RowStats<float> stats = stats_of(row, sums);
    const float log_ratio = kGiven ? inputs.given_log_ratio(row) : 0.0f;
    Slot& slot = all[thread];
    slot.result = evaluate_row<float>(
        stats, numbers_of(source.step, source.form, row), inputs.advantages[row],
        inputs.weights(row, rows),
        inputs.old_log_prob != nullptr ? inputs.old_log_prob + row : nullptr, kGiven ? &log_ratio : nullptr,
        coupled ? slot.bias : guard_divergence(stats.q, numel, options), numel, options);
    FLOWDPPO_IN_ORDER;
    FLOWDPPO_UNROLL
    for (int field = 0; field < kRowFields; ++field) {
      out[static_cast<int64_t>(field) * rows + row] = slot.result.fields[field];
    }
    slot.coupling += slot.result.coupling;
    FLOWDPPO_IN_ORDER;
    slot.summary.add(slot.result);
  }
  if (coupled) {
    const double coupling = block_sum(thread < slots ? all[thread].coupling : 0.0);
    const float shift = coupled_grad_q<float>(coupling, rows, numel, options);
    for (unsigned row = first; row < rows; row += slots) out[static_cast<int64_t>(kGradQ) * rows + row] += shift;
  }
  for (unsigned width = slots / 2; width > 0; width /= 2) {
    __syncthreads();
    if (thread < width) all[thread].summary.merge(all[thread + width].summary);
  }
  // thread 0 merged last
  if (thread == 0) {
    all[0].summary.write(objective.results.summary);
    *objective.results.loss = objective.results.summary[kSummaryLoss];
  }
}

}  // namespace flowdppo::gpu
