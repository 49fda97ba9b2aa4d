// The CUDA kernels' launchers and plans behind a C interface of plain fields, for ctypes and for the sanitizers'
// driver.
#include "kernels_api.h"

#include "launchers.h"
#include "plan.h"

using namespace flowdppo;

namespace {

Latents latents(const ApiLatents& from) {
  return {from.data, static_cast<DType>(from.dtype), from.stride0, from.stride1};
}

template <class Source>
void fill(Source& to, const ApiSource& from) {
  to.shape = {from.outer, from.inner, from.numel};
  to.streams = {from.streams, from.seed, from.first_stream};
  to.step.data = from.table;
  to.step.columns = from.columns;
  for (int i = 0; i < 3; ++i) to.step.values[i] = from.values[i];
}

RowSource<float> rows(const ApiSource& from) {
  RowSource<float> to;
  fill(to, from);
  to.current = latents(from.latents[0]);
  to.old = latents(from.latents[1]);
  to.noise = latents(from.latents[2]);
  to.reference = latents(from.latents[3]);
  to.form = static_cast<Form>(from.form);
  return to;
}

SampleSource<float> samples(const ApiSource& from, const ApiStep& step) {
  SampleSource<float> to;
  fill(to, from);
  to.sample = latents(from.latents[0]);
  to.velocity = latents(from.latents[1]);
  to.noise = latents(from.latents[2]);
  to.previous = latents(from.latents[3]);
  to.unnormalized = step.unnormalized != 0;
  to.next = step.next;
  to.next_dtype = static_cast<DType>(step.next_dtype);
  to.mean = step.mean;
  to.log_prob = step.log_prob;
  return to;
}

EpilogueOptions options(const ApiObjective& from) {
  const int64_t* ints = from.ints;
  const double* floats = from.floats;
  return {
      static_cast<Rule>(ints[0]), static_cast<TrustRegion>(ints[1]), ints[2] != 0, ints[3] != 0, ints[4] != 0,
      ints[5] != 0, floats[0], floats[1], floats[2], floats[3], floats[4]};
}

ObjectiveInputs<float> inputs(const ApiObjective& from) {
  return {from.advantages, from.row_weights, from.old_log_prob, from.log_prob, from.drift, from.reference_drift};
}

gpu::ObjectiveResults results(const ApiObjective& from) { return {from.loss, from.rows, from.summary}; }

gpu::LaunchShape shape(const ApiPlan& plan) {
  return {plan.blocks, static_cast<int>(plan.threads), static_cast<int>(plan.cluster),
          static_cast<int>(plan.shared_bytes)};
}

gpu::StreamPlan stream(const ApiPlan& plan) {
  return {shape(plan), plan.splits, plan.elements, static_cast<int>(plan.slots)};
}

gpu::HoldingPlan holding(const ApiPlan& plan) {
  return {plan.possible != 0, shape(plan), plan.groups, plan.per_thread, plan.holds_noise != 0,
          static_cast<int>(plan.slots)};
}

void write(const gpu::LaunchShape& shape, ApiPlan& plan) {
  plan.blocks = shape.blocks;
  plan.threads = shape.threads;
  plan.cluster = shape.cluster;
  plan.shared_bytes = shape.shared_bytes;
}

ApiPlan api(const gpu::StreamPlan& from, int64_t rows) {
  ApiPlan to = {};
  write(from.shape, to);
  to.possible = 1;
  to.splits = from.splits;
  to.elements = from.elements;
  to.slots = from.slots;
  to.scratch_bytes = gpu::scratch_bytes(from, rows);
  return to;
}

ApiPlan api(const gpu::HoldingPlan& from, int64_t rows) {
  ApiPlan to = {};
  write(from.shape, to);
  to.possible = from.possible;
  to.groups = from.groups;
  to.per_thread = from.per_thread;
  to.holds_noise = from.holds_noise;
  to.slots = from.slots;
  to.scratch_bytes = rows * 4 * static_cast<int64_t>(sizeof(double));
  return to;
}

gpu::Work work(const ApiWork& from) {
  gpu::Work to;
  to.rows = from.rows;
  to.numel = from.numel;
  to.current = static_cast<DType>(from.dtypes[0]);
  to.old = static_cast<DType>(from.dtypes[1]);
  to.noise = static_cast<DType>(from.dtypes[2]);
  to.reference = static_cast<DType>(from.dtypes[3]);
  to.has_noise = from.has_noise != 0;
  to.has_reference = from.has_reference != 0;
  to.aligned = from.aligned != 0;
  return to;
}

ApiWork api(const gpu::Work& from) {
  const auto dtype = [](DType type) { return static_cast<int64_t>(type); };
  return {
      from.rows, from.numel, {dtype(from.current), dtype(from.old), dtype(from.noise), dtype(from.reference)},
      from.has_noise, from.has_reference, from.aligned, 0};
}

gpu::StreamPlan cut(gpu::StreamPlan plan, const gpu::Work& work, const ApiWish& wish) {
  if (wish.threads == 0) return plan;
  const int slots = static_cast<int>(gpu::least(plan.slots, wish.threads));
  plan.elements = wish.threads * wish.groups * gpu::group_of(gpu::version_of(work).latents);
  plan.splits = gpu::ceil_div(work.numel, plan.elements);
  plan.shape.blocks = work.rows * plan.splits;
  plan.shape.threads = static_cast<int>(wish.threads);
  plan.shape.shared_bytes -= (plan.slots - slots) * gpu::kSlotBytes;
  plan.slots = slots;
  return plan;
}

gpu::HoldingPlan cut(gpu::HoldingPlan plan, const gpu::Work& work, const ApiWish& wish) {
  if (wish.threads == 0 || !plan.possible) return plan;
  const gpu::Version version = gpu::version_of(work);
  plan.groups = gpu::ceil_div(work.numel / gpu::group_of(version.latents), wish.cluster);
  plan.per_thread = gpu::ceil_div(plan.groups, wish.threads);
  plan.slots = static_cast<int>(gpu::least(plan.slots, wish.threads));
  const int64_t held = plan.per_thread * wish.threads * 16 * gpu::pieces_of(version, plan.holds_noise);
  const int64_t bytes = gpu::kReduceBytes + gpu::most(held, int64_t{plan.slots} * gpu::kSlotBytes);
  plan.shape = {
      work.rows * wish.cluster, static_cast<int>(wish.threads), static_cast<int>(wish.cluster),
      static_cast<int>(bytes)};
  return plan;
}

}  // namespace

ApiPlan api_plan(const ApiWork* wanted, int64_t kind, const ApiLimits* limits, const ApiWish* wish) {
  const gpu::Work found = work(*wanted);
  switch (static_cast<ApiKind>(kind)) {
    case ApiKind::kStatistics:
      return api(cut(gpu::plan_forward(found, false), found, *wish), found.rows);
    case ApiKind::kObjective:
      return api(cut(gpu::plan_forward(found, true), found, *wish), found.rows);
    case ApiKind::kGradient:
      return api(cut(gpu::plan_gradient(found), found, *wish), found.rows);
    case ApiKind::kStep:
      return api(cut(gpu::plan_step(found), found, *wish), found.rows);
    case ApiKind::kLogProb:
      return api(gpu::plan_log_prob(wish->threads == 0 ? found.rows : gpu::least(found.rows, wish->threads)), 0);
    default:
      break;
  }
  const gpu::DeviceLimits device = {
      static_cast<int>(limits->processors), static_cast<int>(limits->shared_per_block),
      static_cast<int>(limits->max_cluster)};
  return api(cut(gpu::plan_single_pass(found, wanted->couples_rows != 0, device), found, *wish), found.rows);
}

ApiConstants api_constants() {
  return {gpu::kStreamThreads, gpu::kMostHoldingThreads, gpu::kReduceBytes, gpu::kSlotBytes};
}

int64_t api_pieces(const ApiWork* wanted, int64_t holds_noise) {
  return gpu::pieces_of(gpu::version_of(work(*wanted)), holds_noise != 0);
}

int64_t api_group(const ApiWork* wanted) { return gpu::group_of(gpu::version_of(work(*wanted)).latents); }

ApiWork api_describe(const ApiSource* source, const void* out) { return api(gpu::describe(rows(*source), out)); }

ApiWork api_describe_step(const ApiSource* source, const ApiStep* step) {
  return api(gpu::describe(samples(*source, *step)));
}

int64_t api_couples_rows(const ApiObjective* objective) { return options(*objective).couples_rows(); }

int64_t api_ticket_count(int64_t rows) { return gpu::ticket_count(rows); }

int api_row_stats(
    const ApiSource* source, int64_t second_moment, float* stats, const ApiPlan* plan, unsigned* tickets,
    double* scratch) {
  return gpu::row_stats(rows(*source), second_moment != 0, stats, stream(*plan), {tickets, scratch}, nullptr);
}

int api_row_grad(
    const ApiSource* source, const float* coefficients, const float* upstream, int64_t upstream_stride, double factor,
    void* out, const ApiPlan* plan) {
  return gpu::row_grad(
      rows(*source), coefficients, upstream, upstream_stride, factor, out, stream(*plan), nullptr);
}

int api_policy_loss(
    const ApiSource* source, const ApiObjective* objective, const ApiPlan* plan, unsigned* tickets, double* scratch) {
  return gpu::policy_loss(
      rows(*source), inputs(*objective), options(*objective), results(*objective), stream(*plan), {tickets, scratch},
      nullptr);
}

int api_policy_loss_and_grad(
    const ApiSource* source, const ApiObjective* objective, double factor, void* out, const ApiPlan* plan,
    unsigned* tickets, double* scratch) {
  return gpu::policy_loss_and_grad(
      rows(*source), inputs(*objective), options(*objective), results(*objective), factor, out, holding(*plan),
      {tickets, scratch}, nullptr);
}

int api_log_prob_loss(const ApiSource* source, const ApiObjective* objective, const ApiPlan* plan) {
  const RowSource<float> from = given_source(source->outer * source->inner, rows(*source).step);
  return gpu::log_prob_loss(
      from, inputs(*objective), options(*objective), results(*objective), stream(*plan), nullptr);
}

int api_sde_step(
    const ApiSource* source, const ApiStep* step, const ApiPlan* plan, unsigned* tickets, double* scratch) {
  return gpu::sde_step(samples(*source, *step), stream(*plan), {tickets, scratch}, nullptr);
}
