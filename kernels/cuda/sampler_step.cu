// One sampler step in one launch: mean, noise, next state, and where asked the log-prob, which the last block of a row
// finishes.

#include "launchers.h"
#include "latents.cuh"
#include "reduce.cuh"
#include "versions.cuh"

namespace flowdppo::gpu {
namespace {

struct StepArguments {
  SampleSource<float> source;
  unsigned* tickets;
  double* partials;
  unsigned splits;
  int elements;
  bool aligned;
};

// `a, b, S` of a row.
FLOWDPPO_DEVICE const float* step_of(const StepTable<float>& step, unsigned row) {
  return step.data == nullptr ? step.values : step.data + static_cast<int64_t>(row) * step.columns;
}

template <Stored kLatents, Stored kNoise>
FLOWDPPO_KERNEL FLOWDPPO_KERNEL_BOUNDS(kStreamThreads, (kLatents == Stored::kAny ? 2 : 3)) void step_kernel(
    FLOWDPPO_KERNEL_ARGUMENT StepArguments a) {
  constexpr int kCount = group_of(kLatents);
  constexpr bool kGenerated = kNoise == Stored::kGenerated;
  ReduceShared& shared = shared_memory<ReduceShared>();
  const SampleSource<float>& source = a.source;
  const RowShape& shape = source.shape;
  const unsigned block = static_cast<unsigned>(block_index()), row = block / a.splits, split = block % a.splits;
  const int64_t first = static_cast<int64_t>(split) * a.elements;
  const int count = static_cast<int>(shape.numel - first < a.elements ? shape.numel - first : a.elements);
  // of a given next state the noise is what it contains
  const bool given = !kGenerated && source.previous.data != nullptr;
  const Operand sample = operand_at(source.sample, shape, row, first);
  const Operand velocity = operand_at(source.velocity, shape, row, first);
  const Operand drawn = operand_at(given ? source.previous : source.noise, shape, row, first);
  const uint64_t seed = source.streams.seed, stream = stream_of(source.streams, row);
  const float* numbers = step_of(source.step, row);
  const float coef_x = numbers[0], coef_v = numbers[1], std = numbers[2];
  const bool with_moment = source.log_prob != nullptr;
  // a step without noise keeps its mean even if the noise tensor holds nothing usable
  const bool adds_noise = !given && std != 0.0f, reads_noise = adds_noise || with_moment;
  const int64_t element = static_cast<int64_t>(row) * shape.numel + first;
  const DType next_dtype = source.next_dtype;
  char* next = source.next != nullptr ? static_cast<char*>(source.next) + element * size_of(next_dtype) : nullptr;
  char* mean = source.mean != nullptr ? reinterpret_cast<char*>(source.mean + element) : nullptr;

  float moments[2] = {};
  // leaves the mean in x and the next state in v
  const auto advance = [&](float& x, float& v, float e, int lane) {
    const float mu = fmaf(coef_x, x, coef_v * v);
    x = mu;
    v = mu;
    if (!reads_noise) return;
    if (given) e -= mu;
    moments[lane] = fmaf(e, e, moments[lane]);
    if (adds_noise) v = fmaf(std, e, mu);
  };
  struct Loaded {
    Group<kNoise, kCount> noise;
    Group<kLatents, kCount> sample, velocity;
  };
  const auto load = [&](int at) {
    Loaded group;
    if (reads_noise) group.noise.load(drawn, at);
    group.sample.load(sample, at);
    group.velocity.load(velocity, at);
    return group;
  };
  const auto step = [&](const Loaded& group, int at) {
    float x[kCount], v[kCount], e[kCount] = {};
    group.sample.unpack(sample.dtype, x);
    group.velocity.unpack(velocity.dtype, v);
    if (reads_noise) {
      if constexpr (kGenerated) {
        generate(seed, stream, first + at, e);
      } else {
        group.noise.unpack(drawn.dtype, e);
      }
    }
    FLOWDPPO_UNROLL
    for (int i = 0; i < kCount; ++i) advance(x[i], v[i], e[i], i % 2);
    if (mean != nullptr) store_group<Stored::kFloat32>(mean, DType::kFloat32, at, x);
    if (next != nullptr) store_group<Stored::kAny>(next, next_dtype, at, v);
  };
  const auto pair = [&](int at, int following) {
    if constexpr (kLatents == Stored::kAny) {
      // groups of any dtype take twice the registers
      step(load(at), at);
      step(load(following), following);
    } else {
      const Loaded near = load(at), far = load(following);
      step(near, at);
      step(far, following);
    }
  };
  const auto one = [&](int at) { step(load(at), at); };
  const auto few = [&](int at, int length) {
    float e[4] = {};
    if constexpr (kGenerated) {
      if (reads_noise) generate(seed, stream, first + at, e);
    }
    FLOWDPPO_UNROLL
    for (int i = 0; i < 4; ++i) {
      if (i >= length) continue;
      float x = element_of(sample, at + i), v = element_of(velocity, at + i);
      if constexpr (!kGenerated) {
        if (reads_noise) e[i] = element_of(drawn, at + i);
      }
      advance(x, v, e[i], i % 2);
      if (mean != nullptr) store_element(mean, DType::kFloat32, at + i, x);
      if (next != nullptr) store_element(next, next_dtype, at + i, v);
    }
  };
  walk<kCount>(count, a.aligned, pair, one, few);

  if (!with_moment) return;
  RawSums sums;
  sums.nn = static_cast<double>(moments[0]) + moments[1];
  sums = block_sum(sums, shared);
  if (!finish_row(sums, a.partials, a.tickets + 1 + row, row, split, a.splits, shared)) return;
  if (thread_index() == 0) {
    double moment = sums.nn;
    // of a given state the sum is over (x' - mu)^2
    if (given) moment /= static_cast<double>(std) * static_cast<double>(std);
    source.log_prob[row] = step_log_prob<float>(moment / static_cast<double>(shape.numel), std, source.unnormalized);
  }
}

}  // namespace

int sde_step(const SampleSource<float>& source, const StreamPlan& plan, const Workspace& workspace, void* stream) {
  const Work work = describe(source);
  const StepArguments arguments = {
      source, workspace.tickets, workspace.scratch, static_cast<unsigned>(plan.splits),
      static_cast<int>(plan.elements), work.aligned};
  return with_version(version_of(work), [&](auto version) {
    using V = decltype(version);
    return FLOWDPPO_LAUNCH(
        (step_kernel<V::kLatents, V::kNoise>), plan.shape, static_cast<Stream>(stream), arguments);
  });
}

}  // namespace flowdppo::gpu
