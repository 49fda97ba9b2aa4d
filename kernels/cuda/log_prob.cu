// The objective of rows that have log-probs and drifts in place of latents: one block, what finishes every forward pass.

#include "launchers.h"
#include "objective.cuh"
#include "reduce.cuh"

namespace flowdppo::gpu {
namespace {

struct LogProbArguments {
  RowSource<float> source;
  ObjectiveArguments objective;
  int slots;
};

FLOWDPPO_KERNEL FLOWDPPO_KERNEL_BOUNDS(kMostSlots, 1) void log_prob_kernel(
    FLOWDPPO_KERNEL_ARGUMENT LogProbArguments a) {
  finish_objective<true>(a.source, a.objective, nullptr, a.slots, shared_memory<ReduceShared>());
}

}  // namespace

int log_prob_loss(
    const RowSource<float>& source, const ObjectiveInputs<float>& inputs, const EpilogueOptions& options,
    const ObjectiveResults& results, const StreamPlan& plan, void* stream) {
  const LogProbArguments arguments = {source, {inputs, options, results}, plan.slots};
  return FLOWDPPO_LAUNCH(log_prob_kernel, plan.shape, static_cast<Stream>(stream), arguments);
}

}  // namespace flowdppo::gpu
