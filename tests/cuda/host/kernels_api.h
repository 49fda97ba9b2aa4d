// Plain structs of the C interface; host_kernels.py has their ctypes twins.
#pragma once

#include <stdint.h>

// dtypes are those of row_source.h; null data: absent.
struct ApiLatents {
  const void* data;
  int64_t dtype, stride0, stride1;
};

// Of training rows: new, old, noise, reference; of a sampler step: sample, velocity, noise, given next state.
struct ApiSource {
  int64_t outer, inner, numel, form;
  ApiLatents latents[4];
  const int64_t* streams;
  uint64_t seed;
  int64_t first_stream;
  const float* table;
  int64_t columns;
  float values[4];
};

struct ApiObjective {
  const float* advantages;
  const float* row_weights;
  const float* old_log_prob;
  // of rows without latents
  const float* log_prob;
  const float* drift;
  const float* reference_drift;
  int64_t ints[6];
  double floats[5];
  float* loss;
  float* rows;
  float* summary;
};

struct ApiStep {
  int64_t unnormalized, next_dtype;
  void* next;
  float* mean;
  float* log_prob;
};

struct ApiWork {
  int64_t rows, numel, dtypes[4], has_noise, has_reference, aligned, couples_rows;
};

struct ApiLimits {
  int64_t processors, shared_per_block, max_cluster;
};

// Zeros: as the library plans. Else blocks of so many threads, streaming so many groups each or in clusters of so many.
struct ApiWish {
  int64_t threads, groups, cluster;
};

struct ApiConstants {
  // what kernels are compiled for at most, and what every block uses to add up
  int64_t stream_threads, holding_threads, reduce_bytes, slot_bytes;
};

enum class ApiKind : int64_t { kStatistics, kObjective, kGradient, kStep, kSinglePass, kLogProb };

// Of a streaming kernel (splits, elements) or of one that holds rows (groups, per_thread, holds_noise).
struct ApiPlan {
  int64_t possible, blocks, threads, cluster, shared_bytes, splits, elements, slots, groups, per_thread, holds_noise,
      scratch_bytes;
};

extern "C" {
ApiPlan api_plan(const ApiWork* work, int64_t kind, const ApiLimits* limits, const ApiWish* wish);
ApiConstants api_constants();
// 16-byte pieces of shared memory that hold a group
int64_t api_pieces(const ApiWork* work, int64_t holds_noise);
// elements that a thread takes at once
int64_t api_group(const ApiWork* work);
ApiWork api_describe(const ApiSource* source, const void* out);
ApiWork api_describe_step(const ApiSource* source, const ApiStep* step);
int64_t api_couples_rows(const ApiObjective* objective);
int64_t api_ticket_count(int64_t rows);

// 0, or an error that host_error() explains
int api_row_stats(
    const ApiSource* source, int64_t second_moment, float* stats, const ApiPlan* plan, unsigned* tickets,
    double* scratch);
int api_row_grad(
    const ApiSource* source, const float* coefficients, const float* upstream, int64_t upstream_stride, double factor,
    void* out, const ApiPlan* plan);
int api_policy_loss(
    const ApiSource* source, const ApiObjective* objective, const ApiPlan* plan, unsigned* tickets, double* scratch);
int api_policy_loss_and_grad(
    const ApiSource* source, const ApiObjective* objective, double factor, void* out, const ApiPlan* plan,
    unsigned* tickets, double* scratch);
// rows without latents: of the source only the number of rows and the step's numbers are looked at
int api_log_prob_loss(const ApiSource* source, const ApiObjective* objective, const ApiPlan* plan);
int api_sde_step(
    const ApiSource* source, const ApiStep* step, const ApiPlan* plan, unsigned* tickets, double* scratch);
}
