// The O(1) arithmetic of one row: from the streaming kernels' raw sums to P, Q, E, R and back to gradient factors, and
// the sampler's log-prob. Twin of flowdppo_fast/reference.py; framework-free, host and device.
#pragma once

#include <math.h>
#include <stdint.h>

#include "macros.h"

namespace flowdppo {

constexpr double kLogSqrt2Pi = 0.91893853320467274178;

// What the first two latents and what was drawn are; `Form` in rows.py.
enum class Form : int64_t {
  // velocities; what was drawn is the noise e
  kVelocity = 0,
  // step means; what was drawn is the next state x', e = k*(x' - old)
  kMean = 1,
  // velocities at a noised sample; what was drawn is the noise, and the sample itself is in the reference's place:
  // e = (noise - sample) - old
  kMatching = 2,
};

template <class T>
struct RowNumbers {
  T std, scale, neg_dt;
};

// Raw sums over a row, k not applied: with d = new - old, n = noise (means: x' - old), w = new - reference.
struct RawSums {
  double nd = 0.0, dd = 0.0, nn = 0.0, ww = 0.0;

  FLOWDPPO_HD_MEMBER void add(const RawSums& other) {
    nd += other.nd;
    dd += other.dd;
    nn += other.nn;
    ww += other.ww;
  }
};

// P = mean(e*u), Q = mean(u*u), E = mean(e*e), R = mean((k*w)^2).
template <class T>
struct RowStats {
  T p, q, e, r;
};

template <class T>
FLOWDPPO_HD RowStats<T> finish_sums(const RawSums& sums, T scale, int64_t numel, Form form) {
  const double k = scale, k_squared = k * k, count = static_cast<double>(numel);
  const bool mean = form == Form::kMean;
  return {
      static_cast<T>((mean ? k_squared : k) * sums.nd / count),
      static_cast<T>(k_squared * sums.dd / count),
      static_cast<T>((mean ? k_squared : 1.0) * sums.nn / count),
      static_cast<T>(k_squared * sums.ww / count),
  };
}

// A row's gradient is noise*n + diff*d + ref*w with n, d, w of RawSums.
struct GradFactors {
  double noise = 0.0, diff = 0.0, ref = 0.0;
  // false: every coefficient is zero, the gradient is zero whatever the inputs hold
  bool active = false;
};

// factor * upstream * (k/N) * (gP*e + 2*gQ*u + 2*gR*w*k).
template <class T>
FLOWDPPO_HD GradFactors gradient_factors(
    T grad_p, T grad_q, T grad_r, double outer, T scale, int64_t numel, Form form) {
  const double k = scale, common = outer * k / static_cast<double>(numel);
  GradFactors out;
  out.noise = common * grad_p * (form == Form::kMean ? k : 1.0);
  out.diff = 2.0 * common * grad_q * k;
  out.ref = 2.0 * common * grad_r * k;
  // NaN compares unequal: it counts as active and reaches the gradient
  out.active = grad_p != T(0) || grad_q != T(0) || grad_r != T(0);
  return out;
}

// Mean-reduced log-prob of a sampler step whose noise has the given mean square.
template <class T>
FLOWDPPO_HD T step_log_prob(double moment, T std, bool unnormalized) {
  const double s = std;
  return static_cast<T>(unnormalized ? -(s * s) * moment : -0.5 * moment - log(s) - kLogSqrt2Pi);
}

}  // namespace flowdppo
