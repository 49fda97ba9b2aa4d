// The operators on plain pointers: cuts rows into chunks, spreads them over threads, and adds up in a fixed order.
#pragma once

#include <stdint.h>

#include "../objective.h"
#include "kernels.h"

namespace flowdppo::cpu {

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
  uint64_t seed = 0;
  int64_t first = 0;
};

// Rows are numbered r = i*inner + j.
struct RowShape {
  int64_t outer = 0, inner = 0, numel = 0;

  int64_t rows() const { return outer * inner; }
};

template <class T>
struct RowSource {
  RowShape shape;
  Latents current, old, noise, reference;
  NoiseStreams streams;
  StepTable<T> step;
  Form form = Form::kVelocity;
};

// Per-row tensors of an objective; null means absent.
template <class T>
struct ObjectiveInputs {
  const T* advantages = nullptr;
  const T* row_weights = nullptr;
  const T* old_log_prob = nullptr;
};

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

// stats is [4, R].
template <class T>
void row_stats(const RowSource<T>& source, bool second_moment, T* stats);

// coefficients is [3, R]; upstream holds one number per row, or one for all (stride 0); out is contiguous in current's
// dtype.
template <class T>
void row_grad(
    const RowSource<T>& source,
    const T* coefficients,
    const T* upstream,
    int64_t upstream_stride,
    double factor,
    void* out);

// rows is [kRowFields, R], summary [kSummaryFields]. With a gradient wanted (out not null) it is that of
// factor * sum(row losses).
template <class T>
void policy_loss(
    const RowSource<T>& source,
    const ObjectiveInputs<T>& inputs,
    const EpilogueOptions& options,
    T* rows,
    T* summary,
    double factor,
    void* out);

template <class T>
void sde_step(const SampleSource<T>& source);

}  // namespace flowdppo::cpu
