// The operators with the arguments that the schemas of flowdppo_fast/ops.py list, for any backend: they gather the
// arguments and hand them to `Backend`, a struct with one static function per operator. Nothing else repeats the lists.
#pragma once

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "arguments.h"

// Where operators are registered; ops.py says when a copy of the package has another namespace.
#ifndef FLOWDPPO_NAMESPACE
#define FLOWDPPO_NAMESPACE flowdppo
#endif

namespace flowdppo::binding {

// loss, row results, summary
using LossTensors = std::tuple<Tensor, Tensor, Tensor>;
// next state, mean, log-prob
using StepTensors = std::tuple<Tensor, Tensor, Tensor>;

template <class Backend>
struct Operators {
  static Tensor row_stats(
      const Tensor& current,
      const Tensor& old,
      const OptionalTensor& drawn,
      const OptionalTensor& reference,
      const OptionalTensor& streams,
      const OptionalTensor& step,
      const std::vector<double>& step_values,
      int64_t seed,
      int64_t first_stream,
      int64_t form,
      bool second_moment) {
    return Backend::row_stats(
        {current, old, drawn, reference, streams, step, step_values, seed, first_stream, form}, second_moment);
  }

  static Tensor row_grad(
      const Tensor& current,
      const Tensor& old,
      const OptionalTensor& drawn,
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
    return Backend::row_grad(
        {current, old, drawn, reference, streams, step, step_values, seed, first_stream, form}, coefficients, upstream,
        factor);
  }

  static LossTensors policy_loss(
      const Tensor& current,
      const Tensor& old,
      const OptionalTensor& drawn,
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
    return Backend::policy_loss(
        {current, old, drawn, reference, streams, step, step_values, seed, first_stream, form},
        {advantages, row_weights, old_log_prob, ints, floats}, 0.0, nullptr);
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor> policy_loss_and_grad(
      const Tensor& current,
      const Tensor& old,
      const OptionalTensor& drawn,
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
    auto [loss, rows, summary] = Backend::policy_loss(
        {current, old, drawn, reference, streams, step, step_values, seed, first_stream, form},
        {advantages, row_weights, old_log_prob, ints, floats}, factor, &grad);
    return {loss, rows, summary, grad};
  }

  static LossTensors log_prob_loss(
      const Tensor& log_prob,
      const Tensor& old_log_prob,
      const OptionalTensor& drift,
      const OptionalTensor& reference_drift,
      const OptionalTensor& step,
      const std::vector<double>& step_values,
      const Tensor& advantages,
      const OptionalTensor& row_weights,
      const std::vector<int64_t>& ints,
      const std::vector<double>& floats) {
    return Backend::log_prob_loss(
        {log_prob, old_log_prob, drift, reference_drift, step, step_values},
        {advantages, row_weights, std::nullopt, ints, floats});
  }

  static StepTensors sde_step(
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
    return Backend::sde_step(
        {sample, velocity, noise, prev_sample, streams, step, step_values, seed, first_stream, dtype, unnormalized},
        with_mean, with_log_prob);
  }
};

template <class Backend, class Library>
void register_operators(Library& library) {
  using Ops = Operators<Backend>;
  library.impl("row_stats", TORCH_BOX(&Ops::row_stats));
  library.impl("row_grad", TORCH_BOX(&Ops::row_grad));
  library.impl("policy_loss", TORCH_BOX(&Ops::policy_loss));
  library.impl("policy_loss_and_grad", TORCH_BOX(&Ops::policy_loss_and_grad));
  library.impl("log_prob_loss", TORCH_BOX(&Ops::log_prob_loss));
  library.impl("sde_step", TORCH_BOX(&Ops::sde_step));
}

}  // namespace flowdppo::binding
