// The operators' arguments, as the schemas of flowdppo_fast/ops.py list them, checked and taken apart into plain
// pointers. Shared by the bindings; each of them says on which device its tensors must be.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "objective.h"
#include "row_source.h"

namespace flowdppo::binding {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline const char* name_of(ScalarType type) { return torch::headeronly::toString(type); }

template <class T>
constexpr ScalarType kScalarType = sizeof(T) == sizeof(double) ? ScalarType::Double : ScalarType::Float;

inline std::string shape_of(const Tensor& tensor) {
  std::string out = "[";
  for (int64_t i = 0; i < tensor.dim(); ++i) out += (i > 0 ? ", " : "") + std::to_string(tensor.size(i));
  return out + "]";
}

inline DType latent_dtype(ScalarType type, const char* name) {
  switch (type) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::Double:
      return DType::kFloat64;
    default:
      STD_TORCH_CHECK(
          false, name, ": got dtype ", name_of(type), ", expected Float, BFloat16, Half or Double; cast it first");
  }
}

// Defined by each binding: throws where the tensor is not on the device that it serves.
void check_device(const Tensor& tensor, const char* name);

inline RowShape row_shape(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(
      tensor.dim() == 3 && tensor.size(2) > 0, name, ": got shape ", shape_of(tensor),
      ", expected [R0, R1, N] with N > 0; reshape the rows first");
  return {tensor.size(0), tensor.size(1), tensor.size(2)};
}

// A latent tensor that must agree with the first one in shape and in being float64.
inline Latents latents_of(const Tensor& tensor, const RowShape& shape, bool is_double, const char* name) {
  check_device(tensor, name);
  const RowShape own = row_shape(tensor, name);
  STD_TORCH_CHECK(
      own.outer == shape.outer && own.inner == shape.inner && own.numel == shape.numel, name, ": got shape ",
      shape_of(tensor), ", expected that of the first latents, [", shape.outer, ", ", shape.inner, ", ", shape.numel,
      "]");
  STD_TORCH_CHECK(
      own.numel == 1 || tensor.stride(2) == 1, name, ": got stride ", tensor.stride(2),
      " in the last dim, expected 1; call .contiguous() first");
  const DType dtype = latent_dtype(tensor.scalar_type(), name);
  STD_TORCH_CHECK(
      (dtype == DType::kFloat64) == is_double, name, ": got dtype ", name_of(tensor.scalar_type()),
      ", but either all latents are Double or none is; cast it first");
  return {tensor.const_data_ptr(), dtype, tensor.stride(0), tensor.stride(1)};
}

inline Latents latents_of(const OptionalTensor& tensor, const RowShape& shape, bool is_double, const char* name) {
  return tensor.has_value() ? latents_of(*tensor, shape, is_double, name) : Latents();
}

// A contiguous tensor of `count` T.
template <class T>
const T* row_values(const Tensor& tensor, int64_t count, const char* name) {
  check_device(tensor, name);
  STD_TORCH_CHECK(
      tensor.scalar_type() == kScalarType<T>, name, ": got dtype ", name_of(tensor.scalar_type()), ", expected ",
      name_of(kScalarType<T>), ", the accumulation dtype; cast it first");
  STD_TORCH_CHECK(
      tensor.numel() == count && tensor.is_contiguous(), name, ": got shape ", shape_of(tensor),
      tensor.is_contiguous() ? "" : " (not contiguous)", ", expected ", count,
      " contiguous elements; expand it to the rows and call .contiguous() first");
  return tensor.const_data_ptr<T>();
}

template <class T>
const T* row_values(const OptionalTensor& tensor, int64_t count, const char* name) {
  return tensor.has_value() ? row_values<T>(*tensor, count, name) : nullptr;
}

inline NoiseStreams streams_of(const OptionalTensor& streams, int64_t rows, int64_t seed, int64_t first) {
  NoiseStreams out;
  out.key = philox_key(static_cast<uint64_t>(seed));
  out.first = first;
  if (streams.has_value()) {
    check_device(*streams, "streams");
    STD_TORCH_CHECK(
        streams->scalar_type() == ScalarType::Long && streams->numel() == rows && streams->is_contiguous(),
        "streams: got ", name_of(streams->scalar_type()), " of shape ", shape_of(*streams), ", expected ", rows,
        " contiguous Long elements");
    out.streams = streams->const_data_ptr<int64_t>();
  }
  return out;
}

template <class T>
StepTable<T> step_table(
    const OptionalTensor& step, const std::vector<double>& step_values, int64_t rows, bool std_is_enough) {
  StepTable<T> out;
  if (step.has_value()) {
    STD_TORCH_CHECK(
        step->dim() == 2 && (step->size(1) == 3 || (std_is_enough && step->size(1) == 1)), "step: got shape ",
        shape_of(*step), ", expected [", rows, ", 3]", std_is_enough ? " or one column for means" : "");
    out.columns = step->size(1);
    out.data = row_values<T>(*step, rows * out.columns, "step");
  } else {
    STD_TORCH_CHECK(
        step_values.size() == 3, "step_values: got ", step_values.size(), " numbers, expected 3 as there is no step");
    for (int i = 0; i < 3; ++i) out.values[i] = static_cast<T>(step_values[i]);
  }
  return out;
}

// The arguments that say where rows come from, as the schemas list them.
struct SourceArguments {
  const Tensor& current;
  const Tensor& old;
  const OptionalTensor& drawn;
  const OptionalTensor& reference;
  const OptionalTensor& streams;
  const OptionalTensor& step;
  const std::vector<double>& step_values;
  int64_t seed, first_stream, form;

  bool is_double() const { return current.scalar_type() == ScalarType::Double; }

  template <class T>
  RowSource<T> unpack() const {
    RowSource<T> out;
    out.shape = row_shape(current, "new");
    const int64_t rows = out.shape.rows();
    out.current = latents_of(current, out.shape, is_double(), "new");
    out.old = latents_of(old, out.shape, is_double(), "old");
    out.noise = latents_of(drawn, out.shape, is_double(), "drawn");
    out.reference = latents_of(reference, out.shape, is_double(), "reference");
    STD_TORCH_CHECK(
        form >= 0 && form <= 2, "form: got ", form, ", expected 0 (velocities), 1 (means) or 2 (matching)");
    out.form = static_cast<Form>(form);
    STD_TORCH_CHECK(
        reference.has_value() || out.form != Form::kMatching, "reference: got None, expected the samples without noise");
    STD_TORCH_CHECK(
        drawn.has_value() || out.form != Form::kMean, "drawn: got None, expected the next states that means need");
    out.streams = streams_of(streams, rows, seed, first_stream);
    out.step = step_table<T>(step, step_values, rows, out.form == Form::kMean);
    return out;
  }
};

struct ObjectiveArguments {
  const Tensor& advantages;
  const OptionalTensor& row_weights;
  const OptionalTensor& old_log_prob;
  const std::vector<int64_t>& ints;
  const std::vector<double>& floats;

  template <class T>
  ObjectiveInputs<T> unpack(int64_t rows) const {
    ObjectiveInputs<T> out;
    out.advantages = row_values<T>(advantages, rows, "advantages");
    out.all_weights = row_weights.has_value() && row_weights->dim() == 2;
    out.row_weights = row_values<T>(row_weights, out.all_weights ? 4 * rows : rows, "row_weights");
    out.old_log_prob = row_values<T>(old_log_prob, rows, "old_log_prob");
    return out;
  }

  EpilogueOptions options() const {
    STD_TORCH_CHECK(
        ints.size() == kChoices && floats.size() == kNumbers, "ints, floats: got ", ints.size(), " and ",
        floats.size(), " options, expected ", kChoices, " and ", kNumbers);
    STD_TORCH_CHECK(
        ints[0] >= 0 && ints[0] < kRules, "ints: got objective rule ", ints[0], ", expected 0..", kRules - 1);
    STD_TORCH_CHECK(
        ints[1] >= 0 && ints[1] < kTrustRegions, "ints: got trust region ", ints[1], ", expected 0..",
        kTrustRegions - 1);
    EpilogueOptions out;
    size_t choice = 0, number = 0;
#define FLOWDPPO_READ_CHOICE(type, name) out.name = static_cast<type>(ints[choice++]);
#define FLOWDPPO_READ_NUMBER(type, name) out.name = floats[number++];
    FLOWDPPO_CHOICES(FLOWDPPO_READ_CHOICE)
    FLOWDPPO_NUMBERS(FLOWDPPO_READ_NUMBER)
    return out;
  }
};

// Rows of a trainer that has log-probs and drifts in place of latents.
struct GivenRowArguments {
  const Tensor& log_prob;
  const Tensor& old_log_prob;
  const OptionalTensor& drift;
  const OptionalTensor& reference_drift;
  const OptionalTensor& step;
  const std::vector<double>& step_values;

  bool is_double() const { return log_prob.scalar_type() == ScalarType::Double; }

  template <class T>
  RowSource<T> unpack() const {
    return given_source(log_prob.numel(), step_table<T>(step, step_values, log_prob.numel(), true));
  }

  template <class T>
  ObjectiveInputs<T> unpack(const ObjectiveArguments& objective) const {
    const int64_t rows = log_prob.numel();
    ObjectiveInputs<T> out = objective.unpack<T>(rows);
    out.log_prob = row_values<T>(log_prob, rows, "log_prob");
    out.old_log_prob = row_values<T>(old_log_prob, rows, "old_log_prob");
    out.drift = row_values<T>(drift, rows, "drift");
    out.reference_drift = row_values<T>(reference_drift, rows, "reference_drift");
    return out;
  }
};

// What the gradient is multiplied by: one number per row, or one for all.
template <class T>
struct Upstream {
  const T* data;
  int64_t stride;
};

template <class T>
Upstream<T> upstream_of(const Tensor& upstream, int64_t rows) {
  check_device(upstream, "upstream");
  STD_TORCH_CHECK(
      upstream.scalar_type() == kScalarType<T>, "upstream: got dtype ", name_of(upstream.scalar_type()), ", expected ",
      name_of(kScalarType<T>), ", the accumulation dtype; cast it first");
  const bool single = upstream.numel() == 1;
  STD_TORCH_CHECK(
      single || (upstream.dim() == 1 && upstream.numel() == rows), "upstream: got shape ", shape_of(upstream),
      ", expected one number or ", rows);
  return {upstream.const_data_ptr<T>(), single ? 0 : upstream.stride(0)};
}

struct SampleArguments {
  const Tensor& sample;
  const Tensor& velocity;
  const OptionalTensor& noise;
  const OptionalTensor& previous;
  const OptionalTensor& streams;
  const OptionalTensor& step;
  const std::vector<double>& step_values;
  int64_t seed, first_stream;
  ScalarType next_dtype;
  bool unnormalized;

  bool is_double() const { return sample.scalar_type() == ScalarType::Double; }

  // without the outputs
  template <class T>
  SampleSource<T> unpack() const {
    SampleSource<T> out;
    out.shape = row_shape(sample, "sample");
    const int64_t rows = out.shape.rows();
    out.sample = latents_of(sample, out.shape, is_double(), "sample");
    out.velocity = latents_of(velocity, out.shape, is_double(), "velocity");
    out.noise = latents_of(noise, out.shape, is_double(), "noise");
    out.previous = latents_of(previous, out.shape, is_double(), "prev_sample");
    out.streams = streams_of(streams, rows, seed, first_stream);
    out.step = step_table<T>(step, step_values, rows, false);
    out.unnormalized = unnormalized;
    out.next_dtype = latent_dtype(next_dtype, "dtype");
    return out;
  }
};

}  // namespace flowdppo::binding
