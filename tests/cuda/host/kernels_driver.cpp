// The kernels on small grids without Python, for the sanitizers, against serial loops:
//   kernels_driver SEED SCENARIO|all [FAULT]
// prints every scenario's name and the sites it visited, and ends with 1 where a result is wrong. Inputs are small
// multiples of 1/4 and coefficients powers of two, so that sums are exact in any order and results equal bit by bit.
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <functional>
#include <map>
#include <string>
#include <vector>

#include "control.h"
#include "kernels_api.h"
#include "normals.cuh"
#include "objective.h"
#include "philox.h"
#include "platform.cuh"
#include "row_source.h"

using namespace flowdppo;

namespace {

int wrong = 0;

void expect(bool right, const std::string& what) {
  if (right) return;
  printf("wrong: %s %s\n", what.c_str(), host_error());
  wrong = 1;
}

bool same(double got, double want) { return got == want || (got != got && want != want); }

// Rows of one operand at a 16-byte boundary plus `shift` elements.
class Latent {
 public:
  Latent(DType dtype, int64_t count, int64_t shift = 0) : dtype_(dtype), shift_(shift) {
    bytes_.resize(static_cast<size_t>((count + shift) * size_of(dtype) + 16));
  }

  char* data() {
    const uintptr_t at = reinterpret_cast<uintptr_t>(bytes_.data());
    return bytes_.data() + (16 - at % 16) % 16 + shift_ * size_of(dtype_);
  }
  DType dtype() const { return dtype_; }

  float get(int64_t i) {
    if (dtype_ == DType::kFloat32) return reinterpret_cast<float*>(data())[i];
    const uint16_t bits = reinterpret_cast<uint16_t*>(data())[i];
    return dtype_ == DType::kBFloat16 ? gpu::from_bf16(bits) : gpu::from_fp16(bits);
  }

  void set(int64_t i, float value) {
    if (dtype_ == DType::kFloat32) {
      reinterpret_cast<float*>(data())[i] = value;
    } else {
      reinterpret_cast<uint16_t*>(data())[i] =
          dtype_ == DType::kBFloat16 ? gpu::to_bf16(value) : gpu::to_fp16(value);
    }
  }

 private:
  DType dtype_;
  int64_t shift_;
  std::vector<char> bytes_;
};

struct Random {
  uint32_t state = 12345;

  // a multiple of 1/4 from -2 to 2
  float quarter() {
    state = state * 1664525u + 1013904223u;
    return static_cast<float>(static_cast<int>(state >> 16) % 17 - 8) * 0.25f;
  }
};

// Training rows: new, old, noise, reference.
struct Rows {
  int64_t outer, inner, numel;
  Form form;
  std::vector<Latent> latents;
  bool seeded, with_reference;
  uint64_t seed = 99;
  int64_t first_stream = 7;
  RowNumbers<float> numbers = {0.5f, 2.0f, 0.125f};

  Rows(int64_t outer_rows, int64_t inner_rows, int64_t elements, Form rows_form, std::vector<DType> dtypes,
       bool generated = false, bool reference = true, int64_t shift = 0)
      : outer(outer_rows), inner(inner_rows), numel(elements), form(rows_form), seeded(generated),
        with_reference(reference) {
    Random random;
    for (DType dtype : dtypes) {
      latents.emplace_back(dtype, count() * numel, shift);
      for (int64_t i = 0; i < count() * numel; ++i) latents.back().set(i, random.quarter());
    }
    if (form == Form::kMean) numbers.scale = 1.0f / numbers.std;
  }

  int64_t count() const { return outer * inner; }

  ApiSource source() {
    ApiSource out = {};
    out.outer = outer;
    out.inner = inner;
    out.numel = numel;
    out.form = static_cast<int64_t>(form);
    for (size_t i = 0; i < 4; ++i) {
      const bool absent = (i == 2 && seeded) || (i == 3 && !with_reference);
      Latent& latent = latents[i];
      out.latents[i] = {
          absent ? nullptr : latent.data(), static_cast<int64_t>(latent.dtype()), inner * numel, numel};
    }
    out.seed = seed;
    out.first_stream = first_stream;
    out.values[0] = numbers.std;
    out.values[1] = numbers.scale;
    out.values[2] = numbers.neg_dt;
    return out;
  }

  float noise(int64_t row, int64_t i) {
    if (!seeded) return latents[2].get(row * numel + i);
    float z[4];
    gpu::philox_normals_by_hardware(seed, static_cast<uint64_t>(first_stream + row), static_cast<uint64_t>(i / 4), z);
    return z[i % 4];
  }

  // what a row's sums and gradient are made of
  struct Terms {
    float d, n, w;
  };
  Terms terms(int64_t row, int64_t i) {
    const int64_t at = row * numel + i;
    const float x = latents[0].get(at), y = latents[1].get(at), n = noise(row, i);
    return {x - y, form == Form::kMean ? n - y : n, with_reference ? x - latents[3].get(at) : 0.0f};
  }

  RawSums sums(int64_t row) {
    RawSums out;
    for (int64_t i = 0; i < numel; ++i) {
      const Terms t = terms(row, i);
      out.nd += static_cast<double>(t.n) * t.d;
      out.dd += static_cast<double>(t.d) * t.d;
      out.nn += static_cast<double>(t.n) * t.n;
      out.ww += static_cast<double>(t.w) * t.w;
    }
    return out;
  }

  float gradient(int64_t row, int64_t i, const GradFactors& factors) {
    if (!factors.active) return 0.0f;
    const Terms t = terms(row, i);
    const float value = fmaf(static_cast<float>(factors.diff), t.d, static_cast<float>(factors.noise) * t.n);
    return with_reference ? fmaf(static_cast<float>(factors.ref), t.w, value) : value;
  }
};

// Tickets and scratch memory of several calls; scratch starts as NaN.
struct Workspace {
  std::vector<unsigned> tickets;
  std::vector<double> scratch;

  void room(int64_t rows, const ApiPlan& plan) {
    tickets.resize(static_cast<size_t>(api_ticket_count(rows)));
    scratch.assign(static_cast<size_t>(plan.scratch_bytes / 8), NAN);
  }
};

constexpr ApiLimits kLimits = {2, 232448, 8};

ApiPlan plan_for(ApiWork work, ApiKind kind, int64_t cluster = 2) {
  const ApiWish wish = {64, 1, cluster};
  return api_plan(&work, static_cast<int64_t>(kind), &kLimits, &wish);
}

void check_statistics(const std::string& name, Rows rows) {
  const ApiSource source = rows.source();
  const ApiPlan plan = plan_for(api_describe(&source, nullptr), ApiKind::kStatistics);
  Workspace workspace;
  workspace.room(rows.count(), plan);
  std::vector<float> stats(static_cast<size_t>(4 * rows.count()), NAN);
  const auto call = [&] {
    return api_row_stats(&source, 1, stats.data(), &plan, workspace.tickets.data(), workspace.scratch.data());
  };
  // twice: tickets are back at zero
  bool right = call() == 0 && call() == 0;
  for (int64_t row = 0; row < rows.count() && right; ++row) {
    const RawSums sums = rows.sums(row);
    const RowStats<float> want = finish_sums<float>(sums, rows.numbers.scale, rows.numel, rows.form);
    const float values[] = {want.p, want.q, want.e, want.r};
    // generated noise is not exact in any order: additions of a thread and of the partial sums
    const double slack = rows.seeded ? 16 * 1.2e-7 * 4.0 * rows.numbers.scale * rows.numbers.scale : 0.0;
    for (int64_t k = 0; k < 4; ++k)
      right = right && fabs(stats[static_cast<size_t>(k * rows.count() + row)] - values[k]) <= slack;
  }
  expect(right, name);
}

struct Objective {
  EpilogueOptions options;
  std::vector<float> advantages, weights, loss = {NAN}, rows, summary;
  // of rows without latents
  std::vector<float> log_prob, old_log_prob, drift, reference_drift;

  Objective(int64_t count, EpilogueOptions chosen) : options(chosen) {
    for (int64_t i = 0; i < count; ++i) {
      advantages.push_back(i % 2 == 0 ? 0.5f : -1.0f);
      weights.push_back(i % 3 == 0 ? 1.0f : 0.5f);
    }
    rows.assign(static_cast<size_t>(kRowFields * count), NAN);
    summary.assign(kSummaryFields, NAN);
  }

  static const float* pointer(const std::vector<float>& values) { return values.empty() ? nullptr : values.data(); }

  ApiObjective api() {
    return {
        advantages.data(), weights.data(), pointer(old_log_prob), pointer(log_prob), pointer(drift),
        pointer(reference_drift),
        {static_cast<int64_t>(options.rule), static_cast<int64_t>(options.trust_region), options.sum_reduce,
         options.unnormalized_log_prob, options.batch_bias, options.reference_without_dt},
        {options.threshold, options.clip_low, options.clip_high, options.advantage_clip, options.kl_weight},
        loss.data(), rows.data(), summary.data()};
  }

  bool agrees(Rows& source) {
    std::vector<RawSums> sums;
    for (int64_t row = 0; row < source.count(); ++row) sums.push_back(source.sums(row));
    return agrees(sums, source.numbers, source.numel, source.form);
  }

  // Row results and summary as one thread computes them; right if they are the kernels'.
  bool agrees(const std::vector<RawSums>& sums, const RowNumbers<float>& numbers, int64_t numel, Form form) {
    const int64_t count = static_cast<int64_t>(sums.size());
    std::vector<RowStats<float>> stats;
    double bias = 0.0, coupling = 0.0;
    for (const RawSums& row : sums) {
      stats.push_back(finish_sums<float>(row, numbers.scale, numel, form));
      bias += guard_divergence(stats.back().q, numel, options);
    }
    std::vector<RowResult<float>> results;
    RowSummary together;
    for (int64_t row = 0; row < count; ++row) {
      const auto at = static_cast<size_t>(row);
      const float own = options.couples_rows() ? static_cast<float>(bias / static_cast<double>(count))
                                               : guard_divergence(stats[at].q, numel, options);
      const float log_ratio = log_prob.empty() ? 0.0f : log_prob[at] - old_log_prob[at];
      results.push_back(evaluate_row<float>(
          stats[at], numbers, advantages[at], weights[at], nullptr, log_prob.empty() ? nullptr : &log_ratio, own, numel,
          options));
      together.add(results.back());
      coupling += results.back().coupling;
    }
    const float shift = options.couples_rows() ? coupled_grad_q<float>(coupling, count, numel, options) : 0.0f;
    bool right = true;
    for (int64_t row = 0; row < count; ++row) {
      for (int64_t field = 0; field < kRowFields; ++field) {
        float want = results[static_cast<size_t>(row)].fields[field];
        if (field == kGradQ && options.couples_rows()) want += shift;
        right = right && same(rows[static_cast<size_t>(field * count + row)], want);
      }
    }
    float want[kSummaryFields];
    together.write(want);
    // doubles added in another order, rounded to float once
    for (int i = 0; i < kSummaryFields; ++i)
      right = right && (same(summary[static_cast<size_t>(i)], want[i]) ||
                        fabs(summary[static_cast<size_t>(i)] - want[i]) <= 1.2e-7 * fabs(want[i]));
    return right && same(loss[0], summary[kSummaryLoss]);
  }
};

EpilogueOptions options_of(Rule rule, bool batch_bias) {
  return {rule, TrustRegion::kKl, false, false, batch_bias, false, 5.0, 0.1, 0.1, 8.0, 0.25};
}

void check_objective(const std::string& name, Rows rows, EpilogueOptions options) {
  const ApiSource source = rows.source();
  const ApiPlan plan = plan_for(api_describe(&source, nullptr), ApiKind::kObjective);
  Workspace workspace;
  workspace.room(rows.count(), plan);
  Objective objective(rows.count(), options);
  const ApiObjective api = objective.api();
  const auto call = [&] {
    return api_policy_loss(&source, &api, &plan, workspace.tickets.data(), workspace.scratch.data());
  };
  expect(call() == 0 && call() == 0 && objective.agrees(rows), name);
}

void check_log_prob(const std::string& name, int64_t count, EpilogueOptions options) {
  const RowNumbers<float> numbers = {0.5f, 2.0f, 0.25f};
  ApiSource source = {};
  source.outer = count;
  source.inner = source.numel = 1;
  source.values[0] = numbers.std;
  source.values[2] = numbers.neg_dt;
  ApiWork work = {};
  work.rows = count;
  const ApiPlan plan = plan_for(work, ApiKind::kLogProb);
  Objective objective(count, options);
  std::vector<RawSums> sums(static_cast<size_t>(count));
  for (int64_t row = 0; row < count; ++row) {
    objective.log_prob.push_back(0.03125f * static_cast<float>(row % 7 - 3));
    objective.old_log_prob.push_back(0.0625f);
    objective.drift.push_back(0.25f * static_cast<float>(row % 5));
    objective.reference_drift.push_back(0.125f * static_cast<float>(row % 3));
    sums[static_cast<size_t>(row)].dd = objective.drift.back();
    sums[static_cast<size_t>(row)].ww = objective.reference_drift.back();
  }
  const ApiObjective api = objective.api();
  const bool ran = api_log_prob_loss(&source, &api, &plan) == 0;
  expect(ran && objective.agrees(sums, numbers, 1, Form::kMean), name);
}

void check_gradient(const std::string& name, Rows rows) {
  const int64_t count = rows.count();
  std::vector<float> coefficients(static_cast<size_t>(3 * count));
  for (int64_t i = 0; i < 3 * count; ++i) {
    // the second row is dropped, and its latents must not matter
    coefficients[static_cast<size_t>(i)] = i % count == 1 ? 0.0f : static_cast<float>(i % 3) - 0.75f;
  }
  for (Latent& latent : rows.latents) {
    for (int64_t i = 0; i < rows.numel; ++i) latent.set(rows.numel + i, NAN);
  }
  Latent out(rows.latents[0].dtype(), count * rows.numel);
  const ApiSource source = rows.source();
  const float upstream = 0.5f;
  const ApiPlan plan = plan_for(api_describe(&source, out.data()), ApiKind::kGradient);
  bool right = api_row_grad(&source, coefficients.data(), &upstream, 0, 0.25, out.data(), &plan) == 0;
  for (int64_t row = 0; row < count && right; ++row) {
    const auto at = static_cast<size_t>(row), stride = static_cast<size_t>(count);
    const GradFactors factors = gradient_factors<float>(
        coefficients[at], coefficients[at + stride], coefficients[at + 2 * stride], 0.25 * upstream,
        rows.numbers.scale, rows.numel, rows.form);
    Latent want(rows.latents[0].dtype(), 1);
    for (int64_t i = 0; i < rows.numel; ++i) {
      want.set(0, rows.gradient(row, i, factors));
      right = right && same(out.get(row * rows.numel + i), want.get(0));
    }
  }
  expect(right, name);
}

void check_single_pass(const std::string& name, Rows rows, int64_t cluster) {
  const int64_t count = rows.count();
  Latent out(rows.latents[0].dtype(), count * rows.numel);
  const ApiSource source = rows.source();
  const ApiPlan plan = plan_for(api_describe(&source, out.data()), ApiKind::kSinglePass, cluster);
  Workspace workspace;
  workspace.room(count, plan);
  Objective objective(count, options_of(Rule::kDppo, false));
  const ApiObjective api = objective.api();
  const double factor = 0.25;
  const auto call = [&] {
    return api_policy_loss_and_grad(
        &source, &api, factor, out.data(), &plan, workspace.tickets.data(), workspace.scratch.data());
  };
  bool right = plan.possible != 0 && call() == 0 && call() == 0;
  // with generated noise the row results come from sums that are not exact: the gradient is checked against them
  if (!rows.seeded) right = right && objective.agrees(rows);
  for (int64_t row = 0; row < count && right; ++row) {
    const auto field = [&](int64_t which) { return objective.rows[static_cast<size_t>(which * count + row)]; };
    const GradFactors factors = gradient_factors<float>(
        field(kGradP), field(kGradQ), field(kGradR), factor, rows.numbers.scale, rows.numel, rows.form);
    Latent want(rows.latents[0].dtype(), 1);
    for (int64_t i = 0; i < rows.numel; ++i) {
      want.set(0, rows.gradient(row, i, factors));
      right = right && same(out.get(row * rows.numel + i), want.get(0));
    }
  }
  expect(right, name);
}

// Of a sampler step the latents are state, velocity, noise and given next state.
void check_step(const std::string& name, Rows rows, bool given) {
  const int64_t count = rows.count();
  const float a = 0.75f, b = -0.5f, std = 0.25f;
  ApiSource source = rows.source();
  source.values[0] = a;
  source.values[1] = b;
  source.values[2] = std;
  if (given) source.latents[2].data = nullptr;
  Latent next(DType::kBFloat16, count * rows.numel), mean(DType::kFloat32, count * rows.numel);
  std::vector<float> log_prob(static_cast<size_t>(count), NAN);
  const ApiStep step = {
      0, static_cast<int64_t>(DType::kBFloat16), given ? nullptr : next.data(), reinterpret_cast<float*>(mean.data()),
      log_prob.data()};
  const ApiPlan plan = plan_for(api_describe_step(&source, &step), ApiKind::kStep);
  Workspace workspace;
  workspace.room(count, plan);
  bool right = true;
  for (int call = 0; call < 2; ++call)
    right = right && api_sde_step(&source, &step, &plan, workspace.tickets.data(), workspace.scratch.data()) == 0;
  for (int64_t row = 0; row < count && right; ++row) {
    double moment = 0.0;
    for (int64_t i = 0; i < rows.numel; ++i) {
      const int64_t at = row * rows.numel + i;
      const float mu = a * rows.latents[0].get(at) + b * rows.latents[1].get(at);
      const float e = given ? rows.latents[3].get(at) - mu : rows.noise(row, i);
      moment += static_cast<double>(e) * e;
      right = right && same(mean.get(at), mu);
      if (!given) right = right && same(next.get(at), gpu::from_bf16(gpu::to_bf16(fmaf(std, e, mu))));
    }
    if (given) moment /= static_cast<double>(std) * static_cast<double>(std);
    const float want = step_log_prob<float>(moment / static_cast<double>(rows.numel), std, false);
    const float got = log_prob[static_cast<size_t>(row)];
    right = right && (rows.seeded ? fabs(got - want) <= 16 * 1.2e-7 * fabs(want) : same(got, want));
  }
  expect(right, name);
}

constexpr DType F = DType::kFloat32, B = DType::kBFloat16, H = DType::kFloat16;
constexpr Form V = Form::kVelocity, M = Form::kMean;

// Few rows, several splits or blocks of a cluster, and a tail that fills no vector.
const std::vector<std::pair<std::string, std::function<void(const std::string&)>>> kScenarios = {
    {"statistics", [](const std::string& name) { check_statistics(name, {1, 2, 1203, V, {B, B, B, B}}); }},
    {"statistics_seeded",
     [](const std::string& name) { check_statistics(name, {2, 1, 600, V, {F, F, F, F}, true, false}); }},
    {"statistics_mixed_unaligned",
     [](const std::string& name) { check_statistics(name, {1, 2, 600, M, {B, F, H, F}, false, true, 1}); }},
    {"one_split", [](const std::string& name) { check_statistics(name, {1, 2, 37, V, {F, F, F, F}}); }},
    {"objective",
     [](const std::string& name) {
       check_objective(name, {1, 3, 600, V, {B, B, F, B}}, options_of(Rule::kDppo, false));
     }},
    {"objective_coupled",
     [](const std::string& name) {
       check_objective(name, {1, 3, 300, M, {F, F, F, F}}, options_of(Rule::kGrpoGuard, true));
     }},
    {"objective_many_rows",
     [](const std::string& name) {
       check_objective(name, {35, 1, 9, V, {F, F, F, F}, false, false}, options_of(Rule::kRatioClip, false));
     }},
    {"log_prob", [](const std::string& name) { check_log_prob(name, 75, options_of(Rule::kDppo, false)); }},
    {"log_prob_coupled",
     [](const std::string& name) { check_log_prob(name, 70, options_of(Rule::kGrpoGuard, true)); }},
    {"gradient", [](const std::string& name) { check_gradient(name, {1, 3, 1203, V, {B, B, B, B}}); }},
    {"gradient_seeded",
     [](const std::string& name) { check_gradient(name, {2, 1, 600, V, {F, F, F, F}, true, false}); }},
    {"step", [](const std::string& name) { check_step(name, {1, 2, 1203, V, {B, B, B, B}, false, false}, false); }},
    {"step_seeded",
     [](const std::string& name) { check_step(name, {1, 2, 600, V, {F, F, F, F}, true, false}, false); }},
    {"step_given", [](const std::string& name) { check_step(name, {1, 2, 600, V, {F, F, F, F}}, true); }},
    {"single_pass",
     [](const std::string& name) { check_single_pass(name, {1, 2, 2400, V, {B, B, B, B}}, 2); }},
    // rows are only aligned and with a tail where there is one
    {"single_pass_seeded",
     [](const std::string& name) { check_single_pass(name, {1, 1, 1203, V, {F, F, F, F}, true, false}, 2); }},
    {"single_pass_cluster_of_3",
     [](const std::string& name) { check_single_pass(name, {2, 1, 804, M, {F, F, F, F}, false, false}, 3); }},
};

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3) return 2;
  host_seed(strtoull(argv[1], nullptr, 10));
  if (argc > 3 && host_fault(argv[3]) != 0) return 2;
  const std::string wanted = argv[2];
  for (const auto& [name, run] : kScenarios) {
    if (wanted != "all" && wanted != name) continue;
    host_reset();
    run(name);
    printf("scenario %s\n", name.c_str());
    fputs(host_sites(), stdout);
    fflush(stdout);
  }
  return wrong;
}
