// One sampler step in one launch: mean, noise, next state, and where asked the log-prob, which the last block of a row
// finishes.

#include "latents.cuh"
#include "launchers.h"
#include "reduce.cuh"

namespace flowdppo::gpu {
namespace {

struct StepArguments {
  SampleSource<float> source;
  unsigned* tickets;
  double* partials;
  Version version;
  unsigned splits;
  int elements;
  bool aligned;
};

__global__ void __launch_bounds__(kStreamThreads, 3) step_kernel(const __grid_constant__ StepArguments a) {
  const SampleSource<float>& source = a.source;
  const RowShape& shape = source.shape;
  const unsigned row = blockIdx.x / a.splits, split = blockIdx.x % a.splits;
  const StepTable<float>& table = source.step;
  const float* numbers = table.data == nullptr ? table.values : table.data + static_cast<int64_t>(row) * table.columns;
  const float coef_x = numbers[0], coef_v = numbers[1], std = numbers[2];
  const bool given = source.previous.data != nullptr, with_moment = source.log_prob != nullptr;
  // a step without noise keeps its mean even if the noise tensor holds nothing usable
  const bool adds_noise = !given && std != 0.0f;
  float moments[2] = {};
  with_version<false>(a.version, [&](auto version) {
    using V = decltype(version);
    Share<V> share(source, row, split, a.elements);
    share.reads_noise = adds_noise || with_moment;
    const int64_t element = static_cast<int64_t>(row) * shape.numel + share.first;
    const DType dtype = source.next_dtype;
    char* next = source.next != nullptr ? static_cast<char*>(source.next) + element * size_of(dtype) : nullptr;
    char* mean = source.mean != nullptr ? reinterpret_cast<char*>(source.mean + element) : nullptr;
    share.walk(a.aligned, [&](const auto& v, int at, int length) {
      using Values = std::decay_t<decltype(v)>;
      float mu[Values::kCount], state[Values::kCount];
      FLOWDPPO_UNROLL
      for (int i = 0; i < v.kCount; ++i) {
        // what is not read or not there is 0; generated noise is always finite and never given
        constexpr bool kGenerated = V::kNoise == Stored::kGenerated;
        mu[i] = fmaf(coef_x, v.x[i], coef_v * v.y[i]);
        const float e = !kGenerated && given ? v.n[i] - mu[i] : v.n[i];
        moments[i % 2] = fmaf(e, e, moments[i % 2]);
        state[i] = kGenerated || adds_noise ? fmaf(std, e, mu[i]) : mu[i];
      }
      if (mean != nullptr) store<Values>(mean, DType::kFloat32, at, length, mu);
      if (next != nullptr) store<Values>(next, dtype, at, length, state);
    });
  });

  if (!with_moment) return;
  double sums[1] = {static_cast<double>(moments[0]) + moments[1]};
  block_sum(sums);
  if (!finish_row(sums, a.partials, a.tickets + 1 + row, row, split, a.splits)) return;
  if (threadIdx.x == 0) {
    double moment = sums[0];
    // of a given state the sum is over (x' - mu)^2
    if (given) moment /= static_cast<double>(std) * static_cast<double>(std);
    source.log_prob[row] = step_log_prob<float>(moment / static_cast<double>(shape.numel), std, source.unnormalized);
  }
}

}  // namespace

int sde_step(const SampleSource<float>& source, const Plan& plan, const Workspace& workspace, void* stream) {
  const RowShape& shape = source.shape;
  const Operands operands = operands_of(source);
  const StepArguments arguments = {
      source, workspace.tickets, workspace.scratch, operands.version(), static_cast<unsigned>(plan.splits),
      static_cast<int>(plan.elements),
      rows_aligned(operands, shape) && rows_aligned(source.next, source.next_dtype, shape) &&
          rows_aligned(source.mean, DType::kFloat32, shape)};
  return launch(step_kernel, plan, stream, arguments);
}

}  // namespace flowdppo::gpu
