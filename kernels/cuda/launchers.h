// The CUDA backend on plain pointers: what the binding calls. Every function launches at most once per kernel named,
// never waits, and returns a CUDA error code (0: launched). `stream` is a cudaStream_t.
#pragma once

#include <stdint.h>

#include "../../csrc/objective.h"
#include "../../csrc/row_source.h"
#include "plan.h"

namespace flowdppo::gpu {

// Device memory that a launch uses besides its arguments; nothing of it is needed once the launch has ended.
struct Workspace {
  // ticket_count() counters, all zero; left zero
  unsigned* tickets = nullptr;
  // scratch_bytes(), 16-byte aligned, never read before it is written
  double* scratch = nullptr;
};

// Results of an objective: rows [kRowFields, R], summary [kSummaryFields], the mean loss.
struct ObjectiveResults {
  float* loss = nullptr;
  float* rows = nullptr;
  float* summary = nullptr;
};

// stats is [4, R].
int row_stats(
    const RowSource<float>& source,
    bool second_moment,
    float* stats,
    const Plan& plan,
    const Workspace& workspace,
    void* stream);

int policy_loss(
    const RowSource<float>& source,
    const ObjectiveInputs<float>& inputs,
    const EpilogueOptions& options,
    const ObjectiveResults& results,
    const Plan& plan,
    const Workspace& workspace,
    void* stream);

// coefficients is [3, R]; upstream holds one number per row or one for all (stride 0), null stands for 1; out is
// contiguous in the dtype of the first latents.
int row_grad(
    const RowSource<float>& source,
    const float* coefficients,
    const float* upstream,
    int64_t upstream_stride,
    double factor,
    void* out,
    void* stream);

// Rows without latents: given_source() and inputs with log-probs.
int log_prob_loss(
    const RowSource<float>& source,
    const ObjectiveInputs<float>& inputs,
    const EpilogueOptions& options,
    const ObjectiveResults& results,
    void* stream);

int sde_step(const SampleSource<float>& source, const Plan& plan, const Workspace& workspace, void* stream);

}  // namespace flowdppo::gpu
