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
};

// What a thread of the finishing block works on, in shared memory: registers are for the streaming loops.
struct Slot {
  RowSummary summary;
  RowResult<float> result;
};
static_assert(sizeof(Slot) <= kSlotBytes, "plan.h reserves less shared memory than slots take");

// kGiven: a trainer's own log-probs and drifts stand in for what streaming adds up.
template <bool kGiven>
FLOWDPPO_DEVICE RawSums sums_of(const ObjectiveArguments& objective, const double* row_sums, unsigned row) {
  if constexpr (kGiven) {
    return objective.inputs.given_sums(row);
  } else {
    return load_sums(row_sums + static_cast<int64_t>(row) * kSums);
  }
}

template <bool kGiven>
FLOWDPPO_DEVICE RowResult<float> evaluate(
    const RowSource<float>& source, const ObjectiveArguments& objective, unsigned row, const RawSums& sums,
    bool coupled, float shared_bias) {
  const ObjectiveInputs<float>& inputs = objective.inputs;
  const RowNumbers<float> numbers = numbers_of(source.step, source.form, row);
  const RowStats<float> stats = finish_sums<float>(sums, numbers.scale, source.shape.numel, source.form);
  const float bias = coupled ? shared_bias : guard_divergence(stats.q, source.shape.numel, objective.options);
  const float log_ratio = kGiven ? inputs.given_log_ratio(row) : 0.0f;
  return evaluate_row<float>(
      stats, numbers, inputs.advantages[row], inputs.row_weights != nullptr ? inputs.row_weights[row] : 1.0f,
      inputs.old_log_prob != nullptr ? inputs.old_log_prob + row : nullptr, kGiven ? &log_ratio : nullptr, bias,
      source.shape.numel, objective.options);
}

// All threads of the block must call it. Thread t takes rows t, t + slots, ..; the slots' summaries are then merged
// pairwise.
template <bool kGiven>
FLOWDPPO_DEVICE void finish_objective(
    const RowSource<float>& source, const ObjectiveArguments& objective, const double* row_sums, int slots,
    ReduceShared& shared) {
  const EpilogueOptions& options = objective.options;
  const unsigned rows = static_cast<unsigned>(source.shape.rows()), thread = thread_index();
  const unsigned first = thread < static_cast<unsigned>(slots) ? thread : rows;
  Slot* all = behind<Slot>(shared);
  const bool coupled = options.couples_rows();
  float bias = 0.0f;
  if (coupled) {
    double own = 0.0;
    for (unsigned row = first; row < rows; row += slots) {
      const float scale = numbers_of(source.step, source.form, row).scale;
      const RawSums sums = sums_of<kGiven>(objective, row_sums, row);
      own += guard_divergence(finish_sums<float>(sums, scale, source.shape.numel, source.form).q, source.shape.numel,
                              options);
    }
    bias = static_cast<float>(block_sum(own, shared) / static_cast<double>(rows));
  }
  if (thread < static_cast<unsigned>(slots)) all[thread].summary = RowSummary();
  double coupling = 0.0;
  float* out = objective.results.rows;
  for (unsigned row = first; row < rows; row += slots) {
    const RawSums sums = sums_of<kGiven>(objective, row_sums, row);
    Slot& slot = all[thread];
    slot.result = evaluate<kGiven>(source, objective, row, sums, coupled, bias);
    FLOWDPPO_IN_ORDER;
    FLOWDPPO_UNROLL
    for (int field = 0; field < kRowFields; ++field) {
      out[static_cast<int64_t>(field) * rows + row] = slot.result.fields[field];
    }
    coupling += slot.result.coupling;
    FLOWDPPO_IN_ORDER;
    slot.summary.add(slot.result);
  }
  if (coupled) {
    const float shift = coupled_grad_q<float>(block_sum(coupling, shared), rows, source.shape.numel, options);
    for (unsigned row = first; row < rows; row += slots) out[static_cast<int64_t>(kGradQ) * rows + row] += shift;
  }
  for (int width = slots / 2; width > 0; width /= 2) {
    block_barrier();
    if (thread < static_cast<unsigned>(width)) all[thread].summary.merge(all[thread + width].summary);
  }
  // thread 0 merged last
  if (thread == 0) {
    all[0].summary.write(objective.results.summary);
    *objective.results.loss = objective.results.summary[kSummaryLoss];
  }
}

}  // namespace flowdppo::gpu
