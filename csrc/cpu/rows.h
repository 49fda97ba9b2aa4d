// The operators on plain pointers: cuts rows into chunks, spreads them over threads, and adds up in a fixed order.
#pragma once

#include <stdint.h>

#include "../objective.h"
#include "../row_source.h"
#include "kernels.h"

namespace flowdppo::cpu {

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

// Rows without latents: given_source() and inputs with log-probs. rows and summary as above.
template <class T>
void log_prob_loss(
    const RowSource<T>& source,
    const ObjectiveInputs<T>& inputs,
    const EpilogueOptions& options,
    T* rows,
    T* summary);

template <class T>
void sde_step(const SampleSource<T>& source);

}  // namespace flowdppo::cpu
