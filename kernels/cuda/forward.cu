// The forward pass in one launch. Blocks stream their shares of the rows; the last block of a row adds up the row, and
// the last row's block finishes the objective.

#include "latents.cuh"
#include "launchers.h"
#include "objective.cuh"
#include "reduce.cuh"

namespace flowdppo::gpu {
namespace {

struct ForwardArguments {
  RowSource<float> source;
  ObjectiveArguments objective;
  // null: an objective is wanted
  float* stats;
  unsigned* tickets;
  double* partials;
  double* row_sums;
  Version version;
  unsigned splits;
  int elements;
  bool aligned, second_moment;
};

__global__ void __launch_bounds__(kStreamThreads, 3) forward_kernel(const __grid_constant__ ForwardArguments a) {
  const RowShape& shape = a.source.shape;
  const bool mean = a.source.form == Form::kMean;
  ThreadSums sums;
  with_version(a.version, [&](auto version) {
    using V = decltype(version);
    const Share<V> share(a.source, blockIdx.x / a.splits, blockIdx.x % a.splits, a.elements);
    share.walk(a.aligned, [&](const auto& v, int, int) {
      FLOWDPPO_UNROLL
      for (int i = 0; i < v.kCount; ++i) {
        const float d = v.x[i] - v.y[i], n = on_means<V>(mean) ? v.n[i] - v.y[i] : v.n[i];
        sums.nd[i % 2] = fmaf(n, d, sums.nd[i % 2]);
        sums.dd[i % 2] = fmaf(d, d, sums.dd[i % 2]);
        sums.nn[i % 2] = fmaf(n, n, sums.nn[i % 2]);
        if constexpr (V::kReference) {
          const float w = v.x[i] - v.w[i];
          sums.ww[i % 2] = fmaf(w, w, sums.ww[i % 2]);
        }
      }
    });
  });

  // worked out again: kept, it would cost registers that the loop lacks
  const unsigned block = block_index_again(), row = block / a.splits, split = block % a.splits;
  double total[kSums] = {
      static_cast<double>(sums.nd[0]) + sums.nd[1], static_cast<double>(sums.dd[0]) + sums.dd[1],
      static_cast<double>(sums.nn[0]) + sums.nn[1], static_cast<double>(sums.ww[0]) + sums.ww[1]};
  block_sum(total);
  if (!finish_row(total, a.partials, a.tickets + 1 + row, row, split, a.splits)) return;
  const unsigned rows = static_cast<unsigned>(shape.rows());
  if (a.stats != nullptr) {
    if (threadIdx.x == 0) {
      const RawSums all = {total[0], total[1], a.second_moment ? total[2] : 0.0, total[3]};
      const float scale = numbers_of(a.source.step, a.source.form, row).scale;
      const RowStats<float> stats = finish_sums<float>(all, scale, shape.numel, a.source.form);
      a.stats[row] = stats.p;
      a.stats[static_cast<int64_t>(rows) + row] = stats.q;
      a.stats[static_cast<int64_t>(rows) * 2 + row] = stats.e;
      a.stats[static_cast<int64_t>(rows) * 3 + row] = stats.r;
    }
    return;
  }
  if (threadIdx.x == 0) store_sums(a.row_sums + static_cast<int64_t>(row) * kSums, total);
  if (arrives_last(a.tickets, rows)) finish_objective<false>(a.source, a.objective, a.row_sums);
}

struct GivenArguments {
  RowSource<float> source;
  ObjectiveArguments objective;
};

__global__ void __launch_bounds__(kMostSlots, 1) given_kernel(const __grid_constant__ GivenArguments a) {
  finish_objective<true>(a.source, a.objective, nullptr);
}

int launch_forward(ForwardArguments arguments, const Plan& plan, const Workspace& workspace, void* stream) {
  const Operands operands = operands_of(arguments.source);
  arguments.objective.slots = plan.slots;
  arguments.tickets = workspace.tickets;
  arguments.partials = workspace.scratch;
  arguments.row_sums = workspace.scratch + plan.blocks * kSums;
  arguments.splits = static_cast<unsigned>(plan.splits);
  arguments.elements = static_cast<int>(plan.elements);
  arguments.aligned = rows_aligned(operands, arguments.source.shape);
  arguments.version = operands.version();
  return launch(forward_kernel, plan, stream, arguments);
}

}  // namespace

int row_stats(
    const RowSource<float>& source, bool second_moment, float* stats, const Plan& plan, const Workspace& workspace,
    void* stream) {
  ForwardArguments arguments = {};
  arguments.source = source;
  arguments.stats = stats;
  arguments.second_moment = second_moment;
  return launch_forward(arguments, plan, workspace, stream);
}

int policy_loss(
    const RowSource<float>& source, const ObjectiveInputs<float>& inputs, const EpilogueOptions& options,
    const ObjectiveResults& results, const Plan& plan, const Workspace& workspace, void* stream) {
  ForwardArguments arguments = {};
  arguments.source = source;
  arguments.objective = {inputs, options, results, plan.slots};
  return launch_forward(arguments, plan, workspace, stream);
}

int log_prob_loss(
    const RowSource<float>& source, const ObjectiveInputs<float>& inputs, const EpilogueOptions& options,
    const ObjectiveResults& results, void* stream) {
  const Plan plan = plan_given_rows(source.shape.rows());
  const GivenArguments arguments = {source, {inputs, options, results, plan.slots}};
  return launch(given_kernel, plan, stream, arguments);
}

}  // namespace flowdppo::gpu
