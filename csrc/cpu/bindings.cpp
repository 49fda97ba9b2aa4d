// The CPU implementations of the operators whose schemas flowdppo_fast/ops.py defines, on LibTorch's stable ABI.

#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../arguments.h"
#include "isa.h"
#include "rows.h"

namespace flowdppo {

void binding::check_device(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.is_cpu(), name, ": got a tensor on another device, expected the CPU; move it there first");
}

namespace cpu {
namespace {

using namespace binding;

template <class Visit>
auto with_type(bool is_double, const Visit& visit) {
  return is_double ? visit(double()) : visit(float());
}

Tensor row_stats_op(
    const Tensor& current,
    const Tensor& old,
    const OptionalTensor& noise,
    const OptionalTensor& reference,
    const OptionalTensor& streams,
    const OptionalTensor& step,
    const std::vector<double>& step_values,
    int64_t seed,
    int64_t first_stream,
    int64_t form,
    bool second_moment) {
  const SourceArguments arguments{current, old, noise, reference, streams, step, step_values, seed, first_stream, form};
  return with_type(arguments.is_double(), [&](auto type) {
    using T = decltype(type);
    const RowSource<T> source = arguments.unpack<T>();
    Tensor stats = torch::stable::new_empty(current, {4, source.shape.rows()}, kScalarType<T>);
    row_stats<T>(source, second_moment, stats.mutable_data_ptr<T>());
    return stats;
  });
}

Tensor row_grad_op(
    const Tensor& current,
    const Tensor& old,
    const OptionalTensor& noise,
    const OptionalTensor& reference,
    const OptionalTensor& streams,
    const OptionalTensor& step,
    const std::vector<double>& step_values,
    int64_t seed,
    int64_t first_stream,
    int64_t form,
    const Tensor& coefficients,
    const Tensor& upstream,
    double factor) {
  const SourceArguments arguments{current, old, noise, reference, streams, step, step_values, seed, first_stream, form};
  return with_type(arguments.is_double(), [&](auto type) {
    using T = decltype(type);
    const RowSource<T> source = arguments.unpack<T>();
    const int64_t rows = source.shape.rows();
    const T* slopes = row_values<T>(coefficients, 3 * rows, "coefficients");
    const Upstream<T> outer = upstream_of<T>(upstream, rows);
    Tensor grad = torch::stable::new_empty(current, current.sizes());
    row_grad<T>(source, slopes, outer.data, outer.stride, factor, grad.mutable_data_ptr());
    return grad;
  });
}

using LossTensors = std::tuple<Tensor, Tensor, Tensor>;

LossTensors run_policy_loss(
    const SourceArguments& source_arguments, const ObjectiveArguments& objective, double factor, Tensor* grad) {
  return with_type(source_arguments.is_double(), [&](auto type) {
    using T = decltype(type);
    const RowSource<T> source = source_arguments.unpack<T>();
    const int64_t count = source.shape.rows();
    const ObjectiveInputs<T> inputs = objective.unpack<T>(count);
    const EpilogueOptions options = objective.options();
    const Tensor& like = source_arguments.current;
    Tensor rows = torch::stable::new_empty(like, {kRowFields, count}, kScalarType<T>);
    Tensor summary = torch::stable::new_empty(like, {kSummaryFields}, kScalarType<T>);
    if (grad != nullptr) *grad = torch::stable::new_empty(like, like.sizes());
    policy_loss<T>(
        source, inputs, options, rows.mutable_data_ptr<T>(), summary.mutable_data_ptr<T>(), factor,
        grad != nullptr ? grad->mutable_data_ptr() : nullptr);
    // a tensor of its own, so that it can be scaled in place by whoever gets it
    Tensor loss = torch::stable::new_empty(like, std::vector<int64_t>(), kScalarType<T>);
    *loss.mutable_data_ptr<T>() = *summary.const_data_ptr<T>();
    return LossTensors(loss, rows, summary);
  });
}

LossTensors policy_loss_op(
    const Tensor& current,
    const Tensor& old,
    const OptionalTensor& noise,
    const OptionalTensor& reference,
    const OptionalTensor& streams,
    const OptionalTensor& step,
    const std::vector<double>& step_values,
    int64_t seed,
    int64_t first_stream,
    int64_t form,
    const Tensor& advantages,
    const OptionalTensor& row_weights,
    const OptionalTensor& old_log_prob,
    const std::vector<int64_t>& ints,
    const std::vector<double>& floats) {
  return run_policy_loss(
      {current, old, noise, reference, streams, step, step_values, seed, first_stream, form},
      {advantages, row_weights, old_log_prob, ints, floats}, 0.0, nullptr);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> policy_loss_and_grad_op(
    const Tensor& current,
    const Tensor& old,
    const OptionalTensor& noise,
    const OptionalTensor& reference,
    const OptionalTensor& streams,
    const OptionalTensor& step,
    const std::vector<double>& step_values,
    int64_t seed,
    int64_t first_stream,
    int64_t form,
    const Tensor& advantages,
    const OptionalTensor& row_weights,
    const OptionalTensor& old_log_prob,
    const std::vector<int64_t>& ints,
    const std::vector<double>& floats,
    double factor) {
  Tensor grad;
  auto [loss, rows, summary] = run_policy_loss(
      {current, old, noise, reference, streams, step, step_values, seed, first_stream, form},
      {advantages, row_weights, old_log_prob, ints, floats}, factor, &grad);
  return {loss, rows, summary, grad};
}

std::tuple<Tensor, Tensor, Tensor> sde_step_op(
    const Tensor& sample,
    const Tensor& velocity,
    const OptionalTensor& noise,
    const OptionalTensor& prev_sample,
    const OptionalTensor& streams,
    const OptionalTensor& step,
    const std::vector<double>& step_values,
    int64_t seed,
    int64_t first_stream,
    ScalarType dtype,
    bool with_mean,
    bool with_log_prob,
    bool unnormalized) {
  const SampleArguments arguments{
      sample, velocity, noise, prev_sample, streams, step, step_values, seed, first_stream, dtype, unnormalized};
  return with_type(arguments.is_double(), [&](auto type) {
    using T = decltype(type);
    SampleSource<T> source = arguments.unpack<T>();
    const int64_t rows = source.shape.rows();
    const auto empty = [&](bool wanted, ScalarType scalar_type, bool per_row) {
      if (!wanted) return torch::stable::new_empty(sample, {0}, scalar_type);
      return per_row ? torch::stable::new_empty(sample, {rows}, scalar_type)
                     : torch::stable::new_empty(sample, sample.sizes(), scalar_type);
    };
    Tensor next = empty(!prev_sample.has_value(), dtype, false);
    Tensor mean = empty(with_mean, kScalarType<T>, false);
    Tensor log_prob = empty(with_log_prob, kScalarType<T>, true);
    if (!prev_sample.has_value()) source.next = next.mutable_data_ptr();
    if (with_mean) source.mean = mean.mutable_data_ptr<T>();
    if (with_log_prob) source.log_prob = log_prob.mutable_data_ptr<T>();
    sde_step<T>(source);
    return std::make_tuple(next, mean, log_prob);
  });
}

std::string cpu_isa_op() { return kernels().isa; }

}  // namespace
}  // namespace cpu
}  // namespace flowdppo

STABLE_TORCH_LIBRARY_FRAGMENT(flowdppo, library) {
  library.def("cpu_isa() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(flowdppo, CompositeExplicitAutograd, library) {
  library.impl("cpu_isa", TORCH_BOX(&flowdppo::cpu::cpu_isa_op));
}

STABLE_TORCH_LIBRARY_IMPL(flowdppo, CPU, library) {
  library.impl("row_stats", TORCH_BOX(&flowdppo::cpu::row_stats_op));
  library.impl("row_grad", TORCH_BOX(&flowdppo::cpu::row_grad_op));
  library.impl("policy_loss", TORCH_BOX(&flowdppo::cpu::policy_loss_op));
  library.impl("policy_loss_and_grad", TORCH_BOX(&flowdppo::cpu::policy_loss_and_grad_op));
  library.impl("sde_step", TORCH_BOX(&flowdppo::cpu::sde_step_op));
}
