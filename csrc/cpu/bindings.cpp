// The CPU implementations of the operators whose schemas flowdppo_fast/ops.py defines, on LibTorch's stable ABI.

#include <string>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../operators.h"
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

// Loss, row results and summary, the last two filled in by `compute`.
template <class T, class Compute>
LossTensors loss_tensors(const Tensor& like, int64_t count, const Compute& compute) {
  Tensor rows = torch::stable::new_empty(like, {kRowFields, count}, kScalarType<T>);
  Tensor summary = torch::stable::new_empty(like, {kSummaryFields}, kScalarType<T>);
  compute(rows.mutable_data_ptr<T>(), summary.mutable_data_ptr<T>());
  // a tensor of its own, so that it can be scaled in place by whoever gets it
  Tensor loss = torch::stable::new_empty(like, std::vector<int64_t>(), kScalarType<T>);
  *loss.mutable_data_ptr<T>() = *summary.const_data_ptr<T>();
  return LossTensors(loss, rows, summary);
}

// One static function per operator; see csrc/operators.h.
struct Cpu {
  static Tensor row_stats(const SourceArguments& arguments, bool second_moment) {
    return with_type(arguments.is_double(), [&](auto type) {
      using T = decltype(type);
      const RowSource<T> source = arguments.unpack<T>();
      Tensor stats = torch::stable::new_empty(arguments.current, {4, source.shape.rows()}, kScalarType<T>);
      cpu::row_stats<T>(source, second_moment, stats.mutable_data_ptr<T>());
      return stats;
    });
  }

  static Tensor row_grad(
      const SourceArguments& arguments, const Tensor& coefficients, const Tensor& upstream, double factor) {
    return with_type(arguments.is_double(), [&](auto type) {
      using T = decltype(type);
      const RowSource<T> source = arguments.unpack<T>();
      const int64_t rows = source.shape.rows();
      const T* slopes = row_values<T>(coefficients, 3 * rows, "coefficients");
      const Upstream<T> outer = upstream_of<T>(upstream, rows);
      Tensor grad = torch::stable::new_empty(arguments.current, arguments.current.sizes());
      cpu::row_grad<T>(source, slopes, outer.data, outer.stride, factor, grad.mutable_data_ptr());
      return grad;
    });
  }

  // `grad`: where the gradient goes, null if it is not asked for
  static LossTensors policy_loss(
      const SourceArguments& arguments, const ObjectiveArguments& objective, double factor, Tensor* grad) {
    return with_type(arguments.is_double(), [&](auto type) {
      using T = decltype(type);
      const RowSource<T> source = arguments.unpack<T>();
      const int64_t count = source.shape.rows();
      const ObjectiveInputs<T> inputs = objective.unpack<T>(count);
      const EpilogueOptions options = objective.options();
      const Tensor& like = arguments.current;
      if (grad != nullptr) *grad = torch::stable::new_empty(like, like.sizes());
      return loss_tensors<T>(like, count, [&](T* rows, T* summary) {
        cpu::policy_loss<T>(
            source, inputs, options, rows, summary, factor, grad != nullptr ? grad->mutable_data_ptr() : nullptr);
      });
    });
  }

  static LossTensors log_prob_loss(const GivenRowArguments& arguments, const ObjectiveArguments& objective) {
    return with_type(arguments.is_double(), [&](auto type) {
      using T = decltype(type);
      const RowSource<T> source = arguments.unpack<T>();
      const ObjectiveInputs<T> inputs = arguments.unpack<T>(objective);
      const EpilogueOptions options = objective.options();
      return loss_tensors<T>(arguments.log_prob, source.shape.rows(), [&](T* rows, T* summary) {
        cpu::log_prob_loss<T>(source, inputs, options, rows, summary);
      });
    });
  }

  static StepTensors sde_step(const SampleArguments& arguments, bool with_mean, bool with_log_prob) {
    return with_type(arguments.is_double(), [&](auto type) {
      using T = decltype(type);
      SampleSource<T> source = arguments.unpack<T>();
      const Tensor& like = arguments.sample;
      const int64_t rows = source.shape.rows();
      const bool draws = !arguments.previous.has_value();
      const auto empty = [&](bool wanted, ScalarType scalar_type) {
        return wanted ? torch::stable::new_empty(like, like.sizes(), scalar_type)
                      : torch::stable::new_empty(like, {0}, scalar_type);
      };
      Tensor next = empty(draws, arguments.next_dtype), mean = empty(with_mean, kScalarType<T>);
      Tensor log_prob = torch::stable::new_empty(like, {with_log_prob ? rows : 0}, kScalarType<T>);
      if (draws) source.next = next.mutable_data_ptr();
      if (with_mean) source.mean = mean.mutable_data_ptr<T>();
      if (with_log_prob) source.log_prob = log_prob.mutable_data_ptr<T>();
      cpu::sde_step<T>(source);
      return StepTensors(next, mean, log_prob);
    });
  }
};

std::string cpu_isa_op() { return kernels().isa; }

}  // namespace
}  // namespace cpu
}  // namespace flowdppo

STABLE_TORCH_LIBRARY_FRAGMENT(FLOWDPPO_NAMESPACE, library) {
  library.def("cpu_isa() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(FLOWDPPO_NAMESPACE, CompositeExplicitAutograd, library) {
  library.impl("cpu_isa", TORCH_BOX(&flowdppo::cpu::cpu_isa_op));
}

STABLE_TORCH_LIBRARY_IMPL(FLOWDPPO_NAMESPACE, CPU, library) {
  flowdppo::binding::register_operators<flowdppo::cpu::Cpu>(library);
}

// For backend.py to compare with Python's lists.
extern "C" __attribute__((visibility("default"))) const char* flowdppo_names() { return flowdppo::names(); }
