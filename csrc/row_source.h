// Where the rows of an operator come from, as plain pointers: what every compiled backend is handed.
#pragma once

#include <math.h>
#include <stdint.h>

#include "macros.h"
#include "philox.h"
#include "row_math.h"
#include "rules.h"

namespace flowdppo {

enum class DType : int { kFloat32, kBFloat16, kFloat16, kFloat64 };

FLOWDPPO_HD int64_t size_of(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

// One operand of all rows: row (i, j) starts at data + i*stride0 + j*stride1 elements. Null data means absent.
struct Latents {
  const void* data = nullptr;
  DType dtype = DType::kFloat32;
  int64_t stride0 = 0, stride1 = 0;
};

// A per-row table of three numbers (or one: S), or three numbers for all rows; in the accumulation dtype T.
template <class T>
struct StepTable {
  const T* data = nullptr;
  int64_t columns = 0;
  T values[3] = {};
};

struct NoiseStreams {
  // null: consecutive from `first`
  const int64_t* streams = nullptr;
  PhiloxKey key = {};
  int64_t first = 0;
};

FLOWDPPO_HD uint64_t stream_of(const NoiseStreams& streams, int64_t row) {
  return streams.streams != nullptr ? static_cast<uint64_t>(streams.streams[row])
                                    : static_cast<uint64_t>(streams.first) + static_cast<uint64_t>(row);
}

// Rows are numbered r = i*inner + j.
struct RowShape {
  int64_t outer = 0, inner = 0, numel = 0;

  FLOWDPPO_HD_MEMBER int64_t rows() const { return outer * inner; }
};

template <class T>
struct RowSource {
  RowShape shape;
  Latents current, old, noise, reference;
  NoiseStreams streams;
  StepTable<T> step;
  Form form = Form::kVelocity;
};

// `S, k, -dt` of a training row.
template <class T>
FLOWDPPO_HD RowNumbers<T> numbers_of(const StepTable<T>& step, Form form, int64_t row) {
  const T* values = step.data == nullptr ? step.values : step.data + row * step.columns;
  const bool only_std = step.data != nullptr && step.columns == 1;
  const T std = values[0];
  const bool inverse = only_std || form == Form::kMean;
  return {std, inverse ? T(1) / std : values[1], only_std ? T(NAN) : values[2]};
}

// Per-row tensors of an objective; null means absent.
template <class T>
struct ObjectiveInputs {
  const T* advantages = nullptr;
  const T* row_weights = nullptr;
  // whether row_weights has all four lines of RowWeights, each of as many rows; else the first
  bool all_weights = false;
  const T* old_log_prob = nullptr;
  // of a trainer that has log-probs and mean squared drifts in place of latents
  const T* log_prob = nullptr;
  const T* drift = nullptr;
  const T* reference_drift = nullptr;

  FLOWDPPO_HD_MEMBER RowWeights<T> weights(int64_t row, int64_t rows) const {
    RowWeights<T> out = {T(1), T(1), T(1), T(1)};
    if (row_weights != nullptr) out.loss = row_weights[row];
    if (all_weights) {
      out.threshold = row_weights[rows + row];
      out.penalty = row_weights[2 * rows + row];
      out.reference = row_weights[3 * rows + row];
    }
    return out;
  }

  FLOWDPPO_HD_MEMBER T given_log_ratio(int64_t row) const { return log_prob[row] - old_log_prob[row]; }

  // The drifts as sums over rows of one element.
  FLOWDPPO_HD_MEMBER RawSums given_sums(int64_t row) const {
    RawSums out;
    if (drift != nullptr) out.dd = drift[row];
    if (reference_drift != nullptr) out.ww = reference_drift[row];
    return out;
  }
};

// Rows without latents: of one element, with k = 1/S.
template <class T>
FLOWDPPO_HD RowSource<T> given_source(int64_t rows, const StepTable<T>& step) {
  RowSource<T> out;
  out.shape = {rows, 1, 1};
  out.step = step;
  out.form = Form::kMean;
  return out;
}

// One sampler step mu = a*x + b*v, x' = mu + S*e; its table holds a, b, S.
template <class T>
struct SampleSource {
  RowShape shape;
  Latents sample, velocity, noise, previous;
  NoiseStreams streams;
  StepTable<T> step;
  bool unnormalized = false;
  // contiguous outputs; null: not wanted
  void* next = nullptr;
  DType next_dtype = DType::kFloat32;
  T* mean = nullptr;
  T* log_prob = nullptr;
};

}  // namespace flowdppo
