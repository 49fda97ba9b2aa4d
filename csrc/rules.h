// What an objective does with a row, one case per rule: twin of flowdppo_fast/rules.py, which says what each of them is.
// Framework-free, host and device.
#pragma once

#include <stdint.h>

#include "macros.h"

namespace flowdppo {

// What Python has under the same names, each list once and in Python's order: backend.py compares them when it loads a
// library. X(enumerator, name), X(type, name).
#define FLOWDPPO_RULES(X)                                                                     \
  X(kDppo, dppo) X(kDppoSymmetric, dppo_symmetric) X(kRatioClip, ratio_clip)                  \
  X(kGrpoGuard, grpo_guard) X(kUnclipped, unclipped) X(kDppoClipped, dppo_clipped)            \
  X(kDppoPulled, dppo_pulled) X(kKlPenalty, kl_penalty) X(kDrpo, drpo)                        \
  X(kDrpoRatio, drpo_ratio) X(kLogHinge, log_hinge)

#define FLOWDPPO_ENUMERATOR(enumerator, name) enumerator,
enum class Rule : int64_t { FLOWDPPO_RULES(FLOWDPPO_ENUMERATOR) };

// What a row's loss, its threshold, its penalty and its KL to the reference are multiplied by.
template <class T>
struct RowWeights {
  T loss, threshold, penalty, reference;
};

// Of a row what rules look at; `size` is |advantage|.
template <class T>
struct RowValues {
  T advantage, size, exponent, ratio, excess, kl, limit, threshold, high, strength;
  bool far, above, below;

  FLOWDPPO_HD_MEMBER bool moves_away() const {
    return (advantage > T(0) && exponent > T(0)) || (advantage < T(0) && exponent < T(0));
  }
  FLOWDPPO_HD_MEMBER bool clipped() const { return (advantage > T(0) && above) || (advantage < T(0) && below); }
};

// What a dropped row adds to the loss, what a kept one adds and its slope by the exponent, and what both add, with its
// slope by the divergence.
template <class T>
struct Decision {
  bool dropped;
  T bound, surrogate, slope, penalty, slope_penalty;
};

template <class T>
FLOWDPPO_HD Decision<T> decide(Rule rule, const RowValues<T>& row) {
  const T surrogate = -row.advantage * row.ratio;
  Decision<T> out = {false, T(0), surrogate, surrogate, T(0), T(0)};
  switch (rule) {
    case Rule::kDppo:
      out.dropped = row.far && row.moves_away();
      break;
    case Rule::kDppoSymmetric:
      out.dropped = row.far;
      break;
    case Rule::kRatioClip:
    case Rule::kGrpoGuard:
      out.dropped = row.clipped();
      out.bound = -row.advantage * row.limit;
      break;
    case Rule::kUnclipped:
      break;
    case Rule::kDppoClipped:
      out.dropped = (row.far && row.moves_away()) || row.clipped();
      break;
    case Rule::kDppoPulled:
      out.dropped = row.far && row.moves_away();
      out.slope_penalty = row.far ? row.size * row.strength : T(0);
      out.penalty = out.slope_penalty * (row.kl - row.threshold);
      break;
    case Rule::kKlPenalty:
      out.slope_penalty = row.strength;
      out.penalty = row.strength * row.kl;
      break;
    case Rule::kDrpo:
      out.slope_penalty = row.size * row.strength;
      out.penalty = out.slope_penalty * row.kl;
      break;
    case Rule::kDrpoRatio: {
      const T pull = row.size * row.strength * row.excess;
      out.surrogate = surrogate + T(0.5) * pull * row.excess;
      out.slope = surrogate + pull * row.ratio;
      break;
    }
    case Rule::kLogHinge:
      out.dropped = (row.advantage > T(0) && row.exponent >= row.high) ||
          (row.advantage < T(0) && -row.exponent >= row.high);
      out.surrogate = row.size * row.high - row.advantage * row.exponent;
      out.slope = -row.advantage;
      break;
  }
  return out;
}

}  // namespace flowdppo
