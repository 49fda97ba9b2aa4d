// The backward pass in one launch: the gradient of every kept row, zeros for the others.

#include "launchers.h"
#include "latents.cuh"
#include "versions.cuh"

namespace flowdppo::gpu {
namespace {

struct GradientArguments {
  RowSource<float> source;
  const float* coefficients;
  const float* upstream;
  int64_t upstream_stride;
  double factor;
  void* out;
  unsigned splits;
  int elements;
  bool aligned;
};

template <Stored kLatents, Stored kNoise, bool kReference>
FLOWDPPO_KERNEL FLOWDPPO_KERNEL_BOUNDS(kStreamThreads, (kLatents == Stored::kAny ? 2 : kReference ? 3 : 4)) void gradient_kernel(
    FLOWDPPO_KERNEL_ARGUMENT GradientArguments a) {
  constexpr int kCount = group_of(kLatents);
  const RowShape& shape = a.source.shape;
  // backwards: what a forward pass read last may still be cached
  const unsigned block = static_cast<unsigned>(grid_blocks() - 1 - block_index());
  const unsigned row = block / a.splits, split = block % a.splits;
  const int64_t rows = shape.rows(), first = static_cast<int64_t>(split) * a.elements;
  const int count = static_cast<int>(shape.numel - first < a.elements ? shape.numel - first : a.elements);
  const DType dtype = a.source.current.dtype;
  char* out = static_cast<char*>(a.out) + (static_cast<int64_t>(row) * shape.numel + first) * size_of(dtype);

  const float grad_p = a.coefficients[row], grad_q = a.coefficients[rows + row];
  const float grad_r = a.coefficients[2 * rows + row];
  const float upstream = a.upstream != nullptr ? a.upstream[row * a.upstream_stride] : 1.0f;
  const RowNumbers<float> numbers = numbers_of(a.source.step, a.source.form, row);
  const GradFactors factors = gradient_factors<float>(
      grad_p, grad_q, grad_r, a.factor * upstream, numbers.scale, shape.numel, a.source.form);
  if (!factors.active) {
    const float zeros[kCount] = {};
    const auto zero = [&](int at) { store_group<kLatents>(out, dtype, at, zeros); };
    walk<kCount>(
        count, a.aligned, [&](int at, int next) { zero(at), zero(next); }, zero,
        [&](int at, int length) {
          for (int i = 0; i < length; ++i) store_element(out, dtype, at + i, 0.0f);
        });
    return;
  }

  const float on_noise = static_cast<float>(factors.noise), on_diff = static_cast<float>(factors.diff);
  const float on_ref = static_cast<float>(factors.ref);
  const Operand current = operand_at(a.source.current, shape, row, first);
  const Operand old = operand_at(a.source.old, shape, row, first);
  const Operand noise = operand_at(a.source.noise, shape, row, first);
  const Operand reference = operand_at(a.source.reference, shape, row, first);
  const uint64_t seed = a.source.streams.seed, stream = stream_of(a.source.streams, row);
  const bool mean = a.source.form == Form::kMean;
  const bool with_reference = kReference && (kLatents != Stored::kAny || reference.data != nullptr);

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
  const auto gradient_of = [&](float x, float y, float n, float w) {
    const float through_noise = on_noise * (mean ? n - y : n);
    const float value = fmaf(on_diff, x - y, through_noise);
    return kReference && with_reference ? fmaf(on_ref, x - w, value) : value;
  };
  const auto write = [&](const Loaded& group, int at) {
    float x[kCount], y[kCount], n[kCount], w[kCount];
    group.current.unpack(current.dtype, x);
    group.old.unpack(old.dtype, y);
    if constexpr (kNoise == Stored::kGenerated) {
      generate(seed, stream, first + at, n);
    } else {
      group.noise.unpack(noise.dtype, n);
    }
    if (with_reference) group.reference.unpack(reference.dtype, w);
    float value[kCount];
    FLOWDPPO_UNROLL
    for (int i = 0; i < kCount; ++i) value[i] = gradient_of(x[i], y[i], n[i], w[i]);
    store_group<kLatents>(out, dtype, at, value);
  };
  const auto pair = [&](int at, int next) {
    if constexpr (kLatents == Stored::kAny) {
      // groups of any dtype take twice the registers
      write(load(at), at);
      write(load(next), next);
    } else {
      const Loaded near = load(at), far = load(next);
      write(near, at);
      write(far, next);
    }
  };
  const auto one = [&](int at) { write(load(at), at); };
  const auto few = [&](int at, int length) {
    float n[4] = {};
    if constexpr (kNoise == Stored::kGenerated) generate(seed, stream, first + at, n);
    FLOWDPPO_UNROLL
    for (int i = 0; i < 4; ++i) {
      if (i >= length) continue;
      if constexpr (kNoise != Stored::kGenerated) n[i] = element_of(noise, at + i);
      const float w = with_reference ? element_of(reference, at + i) : 0.0f;
      store_element(
          out, dtype, at + i, gradient_of(element_of(current, at + i), element_of(old, at + i), n[i], w));
    }
  };
  walk<kCount>(count, a.aligned, pair, one, few);
}

}  // namespace

int row_grad(
    const RowSource<float>& source, const float* coefficients, const float* upstream, int64_t upstream_stride,
    double factor, void* out, const StreamPlan& plan, void* stream) {
  const Work work = describe(source, out);
  const GradientArguments arguments = {
      source, coefficients, upstream, upstream_stride, factor, out, static_cast<unsigned>(plan.splits),
      static_cast<int>(plan.elements), work.aligned};
  return with_version(version_of(work), [&](auto version) {
    using V = decltype(version);
    return FLOWDPPO_LAUNCH(
        (gradient_kernel<V::kLatents, V::kNoise, V::kReference>), plan.shape, static_cast<Stream>(stream), arguments);
  });
}

}  // namespace flowdppo::gpu
