// The forward pass in one launch. Blocks stream their shares of the rows; the last block of a row adds up the row, and
// the last row's block finishes the objective.

#include "launchers.h"
#include "latents.cuh"
#include "objective.cuh"
#include "reduce.cuh"
#include "versions.cuh"

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
  unsigned splits;
  int elements, slots;
  bool aligned, second_moment;
};

template <int kCount, bool kReference>
FLOWDPPO_DEVICE void accumulate(
    const float (&x)[kCount], const float (&y)[kCount], const float (&noise)[kCount], const float (&reference)[kCount],
    bool mean, bool with_reference, ThreadSums& sums) {
  FLOWDPPO_UNROLL
  for (int i = 0; i < kCount; ++i) {
    const float d = x[i] - y[i], n = mean ? noise[i] - y[i] : noise[i];
    sums.nd[i % 2] = fmaf(n, d, sums.nd[i % 2]);
    sums.dd[i % 2] = fmaf(d, d, sums.dd[i % 2]);
    sums.nn[i % 2] = fmaf(n, n, sums.nn[i % 2]);
    if (kReference && with_reference) {
      const float w = x[i] - reference[i];
      sums.ww[i % 2] = fmaf(w, w, sums.ww[i % 2]);
    }
  }
}

template <Stored kLatents, Stored kNoise, bool kReference>
FLOWDPPO_KERNEL FLOWDPPO_KERNEL_BOUNDS(kStreamThreads, (kLatents == Stored::kAny ? 2 : 3)) void forward_kernel(
    FLOWDPPO_KERNEL_ARGUMENT ForwardArguments a) {
  constexpr int kCount = group_of(kLatents);
  ReduceShared& shared = shared_memory<ReduceShared>();
  const RowShape& shape = a.source.shape;
  const unsigned block = static_cast<unsigned>(block_index()), row = block / a.splits, split = block % a.splits;
  const int64_t first = static_cast<int64_t>(split) * a.elements;
  const int count = static_cast<int>(shape.numel - first < a.elements ? shape.numel - first : a.elements);
  const Operand current = operand_at(a.source.current, shape, row, first);
  const Operand old = operand_at(a.source.old, shape, row, first);
  const Operand noise = operand_at(a.source.noise, shape, row, first);
  const Operand reference = operand_at(a.source.reference, shape, row, first);
  const uint64_t seed = a.source.streams.seed, stream = stream_of(a.source.streams, row);
  const bool mean = a.source.form == Form::kMean;
  const bool with_reference = kReference && (kLatents != Stored::kAny || reference.data != nullptr);

  ThreadSums sums;
  struct Loaded {
    Group<kNoise, kCount> noise;
    Group<kLatents, kCount> current, old, reference;
  };
  const auto load = [&](int at) {
    Loaded group;
    group.noise.load(noise, at);
    group.current.load(current, at);
    group.old.load(old, at);
    if (with_reference) group.reference.load(reference, at);
    return group;
  };
  const auto add = [&](const Loaded& group, int at) {
    float x[kCount], y[kCount], n[kCount], w[kCount];
    group.current.unpack(current.dtype, x);
    group.old.unpack(old.dtype, y);
    if constexpr (kNoise == Stored::kGenerated) {
      generate(seed, stream, first + at, n);
    } else {
      group.noise.unpack(noise.dtype, n);
    }
    if (with_reference) group.reference.unpack(reference.dtype, w);
    accumulate<kCount, kReference>(x, y, n, w, mean, with_reference, sums);
  };
  const auto pair = [&](int at, int next) {
    if constexpr (kLatents == Stored::kAny) {
      // groups of any dtype take twice the registers
      add(load(at), at);
      add(load(next), next);
    } else {
      const Loaded near = load(at), far = load(next);
      add(near, at);
      add(far, next);
    }
  };
  const auto one = [&](int at) { add(load(at), at); };
  const auto few = [&](int at, int length) {
    float x[4] = {}, y[4] = {}, n[4] = {}, w[4] = {};
    if constexpr (kNoise == Stored::kGenerated) generate(seed, stream, first + at, n);
    FLOWDPPO_UNROLL
    for (int i = 0; i < 4; ++i) {
      if (i < length) {
        x[i] = element_of(current, at + i);
        y[i] = element_of(old, at + i);
        if constexpr (kNoise != Stored::kGenerated) n[i] = element_of(noise, at + i);
        if (with_reference) w[i] = element_of(reference, at + i);
      } else {
        n[i] = 0.0f;
      }
    }
    accumulate<4, kReference>(x, y, n, w, mean, with_reference, sums);
  };
  walk<kCount>(count, a.aligned, pair, one, few);

  RawSums total = block_sum(sums.total(), shared);
  if (!finish_row(total, a.partials, a.tickets + 1 + row, row, split, a.splits, shared)) return;
  const unsigned rows = static_cast<unsigned>(shape.rows());
  if (a.stats != nullptr) {
    if (thread_index() == 0) {
      if (!a.second_moment) total.nn = 0.0;
      const float scale = numbers_of(a.source.step, a.source.form, row).scale;
      const RowStats<float> stats = finish_sums<float>(total, scale, shape.numel, a.source.form);
      a.stats[row] = stats.p;
      a.stats[static_cast<int64_t>(rows) + row] = stats.q;
      a.stats[static_cast<int64_t>(rows) * 2 + row] = stats.e;
      a.stats[static_cast<int64_t>(rows) * 3 + row] = stats.r;
    }
    return;
  }
  if (thread_index() == 0) store_sums(a.row_sums + static_cast<int64_t>(row) * kSums, total);
  if (!arrives_last(a.tickets, rows, shared)) return;
  finish_objective<false>(a.source, a.objective, a.row_sums, a.slots, shared);
}

int launch_forward(ForwardArguments arguments, const StreamPlan& plan, const Workspace& workspace, void* stream) {
  const Work work = describe(arguments.source, nullptr);
  arguments.tickets = workspace.tickets;
  arguments.partials = workspace.scratch;
  arguments.row_sums = workspace.scratch + plan.shape.blocks * kSums;
  arguments.splits = static_cast<unsigned>(plan.splits);
  arguments.elements = static_cast<int>(plan.elements);
  arguments.slots = plan.slots;
  arguments.aligned = work.aligned;
  return with_version(version_of(work), [&](auto version) {
    using V = decltype(version);
    return FLOWDPPO_LAUNCH(
        (forward_kernel<V::kLatents, V::kNoise, V::kReference>), plan.shape, static_cast<Stream>(stream), arguments);
  });
}

}  // namespace

int row_stats(
    const RowSource<float>& source, bool second_moment, float* stats, const StreamPlan& plan,
    const Workspace& workspace, void* stream) {
  ForwardArguments arguments = {};
  arguments.source = source;
  arguments.stats = stats;
  arguments.second_moment = second_moment;
  return launch_forward(arguments, plan, workspace, stream);
}

int policy_loss(
    const RowSource<float>& source, const ObjectiveInputs<float>& inputs, const EpilogueOptions& options,
    const ObjectiveResults& results, const StreamPlan& plan, const Workspace& workspace, void* stream) {
  ForwardArguments arguments = {};
  arguments.source = source;
  arguments.objective = {inputs, options, results};
  return launch_forward(arguments, plan, workspace, stream);
}

}  // namespace flowdppo::gpu
