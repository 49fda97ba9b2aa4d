// The backward pass in one launch: the gradient of every kept row, zeros for the others.

#include "latents.cuh"
#include "launchers.h"

namespace flowdppo::gpu {
namespace {

struct GradientArguments {
  RowSource<float> source;
  const float* coefficients;
  const float* upstream;
  int64_t upstream_stride;
  double factor;
  void* out;
  Version version;
  unsigned splits;
  int elements;
  bool aligned;
};

// Zeros are the same bits in every dtype; `bytes` is even.
FLOWDPPO_DEVICE void clear(char* out, int bytes, bool aligned) {
  const int whole = aligned ? bytes / 16 * 16 : 0;
  for (int at = 16 * threadIdx.x; at < whole; at += 16 * kStreamThreads) store16(out + at, Bytes16{});
  for (int at = whole + 2 * threadIdx.x; at < bytes; at += 2 * kStreamThreads) {
    *reinterpret_cast<uint16_t*>(out + at) = 0;
  }
}

__global__ void __launch_bounds__(kStreamThreads, 3) gradient_kernel(const __grid_constant__ GradientArguments a) {
  const RowShape& shape = a.source.shape;
  // backwards: what a forward pass read last may still be cached
  const unsigned block = gridDim.x - 1 - blockIdx.x, row = block / a.splits, split = block % a.splits;
  const int64_t rows = shape.rows();
  const GradFactors factors = gradient_factors<float>(
      a.coefficients[row], a.coefficients[rows + row], a.coefficients[2 * rows + row],
      a.factor * (a.upstream != nullptr ? a.upstream[row * a.upstream_stride] : 1.0f),
      numbers_of(a.source.step, a.source.form, row).scale, shape.numel, a.source.form);
  const float on_noise = static_cast<float>(factors.noise), on_diff = static_cast<float>(factors.diff);
  const float on_ref = static_cast<float>(factors.ref);
  const bool mean = a.source.form == Form::kMean;
  with_version(a.version, [&](auto version) {
    using V = decltype(version);
    constexpr DType kDType = dtype_of(V::kLatents);
    const Share<V> share(a.source, row, split, a.elements);
    const int item = static_cast<int>(size_of(kDType));
    char* out = static_cast<char*>(a.out) + (static_cast<int64_t>(row) * shape.numel + share.first) * item;
    if (!factors.active) {
      clear(out, share.count * item, a.aligned);
      return;
    }
    share.walk(a.aligned, [&](const auto& v, int at, int length) {
      using Values = std::decay_t<decltype(v)>;
      float value[Values::kCount];
      FLOWDPPO_UNROLL
      for (int i = 0; i < v.kCount; ++i) {
        value[i] = fmaf(on_diff, v.x[i] - v.y[i], on_noise * (on_means<V>(mean) ? v.n[i] - v.y[i] : v.n[i]));
        if constexpr (V::kReference) value[i] = fmaf(on_ref, v.x[i] - v.w[i], value[i]);
      }
      store<Values>(out, kDType, at, length, value);
    });
  });
}

}  // namespace

int row_grad(
    const RowSource<float>& source, const float* coefficients, const float* upstream, int64_t upstream_stride,
    double factor, void* out, void* stream) {
  const RowShape& shape = source.shape;
  const Operands operands = operands_of(source);
  const Version version = operands.version();
  const Plan plan = plan_rows(shape.rows(), shape.numel, version.latents, false);
  const GradientArguments arguments = {
      source, coefficients, upstream, upstream_stride, factor, out, version, static_cast<unsigned>(plan.splits),
      static_cast<int>(plan.elements),
      rows_aligned(operands, shape) && rows_aligned(out, source.current.dtype, shape)};
  return launch(gradient_kernel, plan, stream, arguments);
}

}  // namespace flowdppo::gpu
