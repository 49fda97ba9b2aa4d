// The epilogue: from a row's statistics to its loss and gradient coefficients, and the batch summary. Twin of
// flowdppo_fast/epilogue.py, which says what every line means; framework-free, host and device. Row arithmetic is in
// T in the same order as there, so that decisions at a threshold agree; batch sums are in double.
#pragma once

#include <math.h>
#include <stdint.h>

#include "macros.h"
#include "row_math.h"
#include "rules.h"

namespace flowdppo {

// What Python has under the same names, as in rules.h.
#define FLOWDPPO_TRUST_REGIONS(X) X(kKl, kl) X(kMeanDrift, mean_drift) X(kVelocityDrift, velocity_drift)
// lines of the row results
#define FLOWDPPO_ROW_FIELDS(X)                                                                \
  X(kLogRatio, log_ratio) X(kRatio, ratio) X(kKl, kl) X(kKept, kept) X(kLoss, loss)           \
  X(kGradP, grad_p) X(kGradQ, grad_q) X(kGradR, grad_r)
#define FLOWDPPO_SUMMARY(X)                                                                   \
  X(kSummaryLoss, loss) X(kPolicyLoss, policy_loss) X(kRatioMean, ratio_mean)                 \
  X(kRatioStd, ratio_std) X(kRatioMin, ratio_min) X(kRatioMax, ratio_max)                     \
  X(kApproxKl, approx_kl) X(kKlMean, kl_new_old_mean) X(kKlMax, kl_new_old_max)               \
  X(kKlMaskFraction, kl_mask_fraction) X(kPosRemovedFraction, pos_rm_fraction)                \
  X(kNegRemovedFraction, neg_rm_fraction) X(kMaskedFraction, masked_fraction)                 \
  X(kUnmaskedFraction, unmasked_fraction) X(kDriftMean, drift_mean)                           \
  X(kNonfiniteRows, nonfinite_rows) X(kClipFraction, clipfrac)                                \
  X(kClipAboveFraction, clipfrac_gt_one) X(kClipBelowFraction, clipfrac_lt_one)               \
  X(kKlRefMean, kl_ref_mean)
// `ints` and `floats` of the operator schemas
#define FLOWDPPO_CHOICES(X)                                                                   \
  X(Rule, rule) X(TrustRegion, trust_region) X(bool, sum_reduce)                              \
  X(bool, unnormalized_log_prob) X(bool, batch_bias) X(bool, reference_without_dt)
#define FLOWDPPO_NUMBERS(X)                                                                   \
  X(double, threshold) X(double, clip_low) X(double, clip_high)                               \
  X(double, advantage_clip) X(double, kl_weight) X(double, strength)

#define FLOWDPPO_MEMBER(type, name) type name;
#define FLOWDPPO_SPELLED(first, name) #name " "
#define FLOWDPPO_ONE(first, name) +1

enum class TrustRegion : int64_t { FLOWDPPO_TRUST_REGIONS(FLOWDPPO_ENUMERATOR) };
enum RowField { FLOWDPPO_ROW_FIELDS(FLOWDPPO_ENUMERATOR) kRowFields };
enum SummaryField { FLOWDPPO_SUMMARY(FLOWDPPO_ENUMERATOR) kSummaryFields };
constexpr int kRules = 0 FLOWDPPO_RULES(FLOWDPPO_ONE), kTrustRegions = 0 FLOWDPPO_TRUST_REGIONS(FLOWDPPO_ONE);
constexpr int kChoices = 0 FLOWDPPO_CHOICES(FLOWDPPO_ONE), kNumbers = 0 FLOWDPPO_NUMBERS(FLOWDPPO_ONE);

// As objectives.names() has them.
inline const char* names() {
  return "rules: " FLOWDPPO_RULES(FLOWDPPO_SPELLED) "trust regions: " FLOWDPPO_TRUST_REGIONS(FLOWDPPO_SPELLED)
      "row fields: " FLOWDPPO_ROW_FIELDS(FLOWDPPO_SPELLED) "summary: " FLOWDPPO_SUMMARY(FLOWDPPO_SPELLED)
      "options: " FLOWDPPO_CHOICES(FLOWDPPO_SPELLED) FLOWDPPO_NUMBERS(FLOWDPPO_SPELLED);
}

struct EpilogueOptions {
  FLOWDPPO_CHOICES(FLOWDPPO_MEMBER)
  FLOWDPPO_NUMBERS(FLOWDPPO_MEMBER)

  FLOWDPPO_HD_MEMBER bool couples_rows() const { return rule == Rule::kGrpoGuard && batch_bias; }
};

template <class T>
struct RowResult {
  T fields[kRowFields];
  // for the summary, and for the coupling of rows under a batch bias
  T excess, policy, reference, drift, coupling;
  bool far, above, below, dropped, advantage_positive, advantage_negative;
};

// This row's share of GRPO-Guard's bias; under a batch bias its mean over rows is passed to evaluate_row().
template <class T>
FLOWDPPO_HD T guard_divergence(T q, int64_t numel, const EpilogueOptions& o) {
  return T(0.5 * (o.sum_reduce ? static_cast<double>(numel) : 1.0)) * q;
}

template <class T>
FLOWDPPO_HD RowResult<T> evaluate_row(
    const RowStats<T>& stats,
    const RowNumbers<T>& row,
    T advantage,
    const RowWeights<T>& weights,
    // null: the log-ratio comes from P and Q alone
    const T* old_log_prob,
    // null: it is not given; else P, E and old_log_prob are not looked at, and GRAD_P is dl/dL, GRAD_Q at fixed L
    const T* given_log_ratio,
    T guard_bias,
    int64_t numel,
    const EpilogueOptions& o) {
  const T p = stats.p, q = stats.q, std = row.std;
  const T count = o.sum_reduce ? static_cast<T>(numel) : T(1);
  const T half_count = T(0.5) * count;
  const T bound_of_advantage = static_cast<T>(o.advantage_clip);
  // comparisons with NaN are false: a NaN advantage passes through
  T adv = advantage;
  adv = adv < -bound_of_advantage ? -bound_of_advantage : adv;
  adv = adv > bound_of_advantage ? bound_of_advantage : adv;

  const T slope = o.unnormalized_log_prob ? count * T(2) * (std * std) : count;
  T log_ratio, slope_p = slope, slope_q = T(-0.5) * slope;
  if (given_log_ratio != nullptr) {
    log_ratio = *given_log_ratio;
    slope_p = T(1);
    slope_q = T(0);
  } else if (old_log_prob == nullptr) {
    log_ratio = slope * (p - T(0.5) * q);
  } else {
    const T normalizer = o.unnormalized_log_prob ? T(0) : count * (log(std) + T(kLogSqrt2Pi));
    log_ratio = T(-0.5) * slope * (stats.e - T(2) * p + q) - normalizer - count * *old_log_prob;
  }
  T kl = half_count * q, slope_kl = half_count;
  if (o.trust_region == TrustRegion::kMeanDrift) {
    slope_kl = half_count * (std * std);
    kl = slope_kl * q;
  } else if (o.trust_region == TrustRegion::kVelocityDrift) {
    slope_kl = count / (row.scale * row.scale);
    kl = count * q / (row.scale * row.scale);
  }

  T exponent = log_ratio, gain = T(1);
  if (o.rule == Rule::kGrpoGuard) {
    exponent = (log_ratio + guard_bias) * std;
    slope_p *= std;
    slope_q = (slope_q + (o.batch_bias ? T(0) : half_count)) * std;
    gain = T(1) / row.neg_dt;
  }

  const T ratio = exp(exponent);
  // decisions use r - 1 and the sign of the exponent: exp() rounds what differs from 1 by less than an ulp to 1
  const T excess = expm1(exponent);
  RowValues<T> values;
  values.advantage = adv;
  values.size = adv < T(0) ? -adv : adv;
  values.exponent = exponent;
  values.ratio = ratio;
  values.excess = excess;
  values.kl = kl;
  values.threshold = static_cast<T>(o.threshold) * weights.threshold;
  values.high = static_cast<T>(o.clip_high);
  values.strength = static_cast<T>(o.strength) * weights.penalty;
  values.limit = static_cast<T>(adv > T(0) ? 1.0 + o.clip_high : 1.0 - o.clip_low);
  RowResult<T> out;
  out.far = values.far = kl >= values.threshold;
  out.above = values.above = excess > values.high;
  out.below = values.below = -excess > static_cast<T>(o.clip_low);
  out.advantage_positive = adv > T(0);
  out.advantage_negative = adv < T(0);
  const Decision<T> made = decide(o.rule, values);
  out.dropped = made.dropped;

  const T outer = weights.loss * gain;
  out.policy = outer * (made.dropped ? made.bound : made.surrogate);
  // the choice keeps an overflowed ratio out of dropped rows
  const T slope_x = outer * (made.dropped ? T(0) : made.slope);
  T grad_q = made.dropped ? T(0) : slope_x * slope_q;
  if (made.slope_penalty != T(0)) {
    out.policy += outer * made.penalty;
    grad_q += outer * made.slope_penalty * slope_kl;
  }
  const T slope_dt = o.reference_without_dt ? row.neg_dt : T(1);
  out.reference = half_count * stats.r * slope_dt;
  T loss = out.policy, grad_r = T(0);
  if (o.kl_weight > 0.0) {
    const T kl_weight = weights.loss * (static_cast<T>(o.kl_weight) * weights.reference);
    loss = out.policy + kl_weight * out.reference;
    grad_r = kl_weight * half_count * slope_dt;
  }
  out.fields[kLogRatio] = log_ratio;
  out.fields[kRatio] = ratio;
  out.fields[kKl] = kl;
  out.fields[kKept] = out.dropped ? T(0) : T(1);
  out.fields[kLoss] = loss;
  out.fields[kGradP] = out.dropped ? T(0) : slope_x * slope_p;
  out.fields[kGradQ] = grad_q;
  out.fields[kGradR] = grad_r;
  out.excess = excess;
  out.drift = std * std * q;
  out.coupling = slope_x * std;
  return out;
}

// Under a batch bias every row's Q moves the shared bias: what is added to each dl/dQ.
template <class T>
FLOWDPPO_HD T coupled_grad_q(double coupling_sum, int64_t rows, int64_t numel, const EpilogueOptions& o) {
  return static_cast<T>(guard_divergence(1.0, numel, o) / static_cast<double>(rows) * coupling_sum);
}

// Running batch statistics. Rows are added and partial summaries merged in a fixed order.
class RowSummary {
 public:
  template <class T>
  FLOWDPPO_HD_MEMBER void add(const RowResult<T>& row) {
    const T log_ratio = row.fields[kLogRatio], ratio = row.fields[kRatio], kl = row.fields[kKl];
    const T loss = row.fields[kLoss];
    RowSummary one;
    one.rows_ = 1.0;
    one.excess_ = one.excess_mean_ = row.excess;
    // zero, or NaN: an infinite ratio leaves no deviation to tell
    one.excess_squares_ = row.excess - row.excess;
    one.ratio_min_ = one.ratio_max_ = ratio;
    one.kl_max_ = kl;
    one.loss_ = loss;
    one.policy_ = row.policy;
    one.log_ratio_squares_ = static_cast<double>(log_ratio) * log_ratio;
    one.kl_ = kl;
    one.drift_ = row.drift;
    one.reference_ = row.reference;
    one.far_ = row.far;
    one.positive_removed_ = row.dropped && row.advantage_positive;
    one.negative_removed_ = row.dropped && row.advantage_negative;
    one.dropped_ = row.dropped;
    one.above_ = row.above;
    one.below_ = row.below;
    one.clipped_ = row.above || row.below;
    one.nonfinite_ = !(isfinite(log_ratio) && isfinite(ratio) && isfinite(kl) && isfinite(loss));
    merge(one);
  }

  FLOWDPPO_HD_MEMBER void merge(const RowSummary& other) {
    if (rows_ == 0.0) {
      *this = other;
      return;
    }
    if (other.rows_ == 0.0) return;
    const double rows = rows_ + other.rows_, delta = other.excess_mean_ - excess_mean_;
    excess_squares_ += other.excess_squares_ + delta * delta * (rows_ * other.rows_ / rows);
    excess_mean_ += delta * (other.rows_ / rows);
    rows_ = rows;
    FLOWDPPO_IN_ORDER;
    excess_ += other.excess_;
    // NaN wins
    ratio_min_ = ratio_min_ <= other.ratio_min_ || ratio_min_ != ratio_min_ ? ratio_min_ : other.ratio_min_;
    FLOWDPPO_IN_ORDER;
    ratio_max_ = ratio_max_ >= other.ratio_max_ || ratio_max_ != ratio_max_ ? ratio_max_ : other.ratio_max_;
    kl_max_ = kl_max_ >= other.kl_max_ || kl_max_ != kl_max_ ? kl_max_ : other.kl_max_;
    FLOWDPPO_IN_ORDER;
    loss_ += other.loss_;
    policy_ += other.policy_;
    log_ratio_squares_ += other.log_ratio_squares_;
    FLOWDPPO_IN_ORDER;
    kl_ += other.kl_;
    drift_ += other.drift_;
    reference_ += other.reference_;
    FLOWDPPO_IN_ORDER;
    far_ += other.far_;
    positive_removed_ += other.positive_removed_;
    negative_removed_ += other.negative_removed_;
    dropped_ += other.dropped_;
    FLOWDPPO_IN_ORDER;
    above_ += other.above_;
    below_ += other.below_;
    clipped_ += other.clipped_;
    nonfinite_ += other.nonfinite_;
  }

  template <class T>
  FLOWDPPO_HD_MEMBER void write(T* summary) const {
    if (rows_ == 0.0) {
      // no rows: no loss, nothing to count, and no statistics to report
      for (int i = 0; i < kSummaryFields; ++i) summary[i] = T(NAN);
      summary[kSummaryLoss] = summary[kPolicyLoss] = summary[kNonfiniteRows] = T(0);
      return;
    }
    const double n = rows_;
    summary[kSummaryLoss] = T(loss_ / n);
    summary[kPolicyLoss] = T(policy_ / n);
    summary[kRatioMean] = T(1.0 + excess_ / n);
    summary[kRatioStd] = n > 1.0 ? T(sqrt(excess_squares_ / (n - 1.0))) : T(0);
    summary[kRatioMin] = T(ratio_min_);
    summary[kRatioMax] = T(ratio_max_);
    summary[kApproxKl] = T(0.5 * log_ratio_squares_ / n);
    summary[kKlMean] = T(kl_ / n);
    summary[kKlMax] = T(kl_max_);
    summary[kKlMaskFraction] = T(far_ / n);
    summary[kPosRemovedFraction] = T(positive_removed_ / n);
    summary[kNegRemovedFraction] = T(negative_removed_ / n);
    summary[kMaskedFraction] = T(dropped_ / n);
    summary[kUnmaskedFraction] = T((n - dropped_) / n);
    summary[kDriftMean] = T(drift_ / n);
    summary[kNonfiniteRows] = T(nonfinite_);
    summary[kClipFraction] = T(clipped_ / n);
    summary[kClipAboveFraction] = T(above_ / n);
    summary[kClipBelowFraction] = T(below_ / n);
    summary[kKlRefMean] = T(reference_ / n);
  }

 private:
  double rows_ = 0.0;
  // r - 1: sum, and for the deviation running mean and sum of squared deviations (Welford, Chan)
  double excess_ = 0.0, excess_mean_ = 0.0, excess_squares_ = 0.0;
  double ratio_min_ = 0.0, ratio_max_ = 0.0, kl_max_ = 0.0;
  double loss_ = 0.0, policy_ = 0.0, log_ratio_squares_ = 0.0, kl_ = 0.0, drift_ = 0.0, reference_ = 0.0;
  double far_ = 0.0, positive_removed_ = 0.0, negative_removed_ = 0.0, dropped_ = 0.0;
  double above_ = 0.0, below_ = 0.0, clipped_ = 0.0, nonfinite_ = 0.0;
};

}  // namespace flowdppo
