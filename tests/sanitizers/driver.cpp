// Runs every CPU operator on random shapes, dtypes, layouts and alignments under a sanitizer, with one thread and with
// several. Buffers have exactly the size of what may be touched. Numbers are compared with a plain loop, results of
// different thread counts bit for bit; full accuracy is the business of other tests.
//
//     driver CASES SEED           exit status 1 after a message if something disagrees
//     driver overread | race      makes a mistake on purpose, which the sanitizer must report

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <memory>
#include <random>
#include <string>
#include <vector>

#include "cpu/isa.h"
#include "cpu/rows.h"
#include "philox.h"

#include <torch/csrc/stable/ops.h>

using namespace flowdppo;

namespace {

std::mt19937_64 generator;

int64_t draw(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(generator); }

double normal() { return std::normal_distribution<double>()(generator); }

uint16_t bfloat16_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

float from_bfloat16(uint16_t half) {
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

// A strided operand whose storage ends with its last element and begins with its first.
struct Operand {
  std::unique_ptr<unsigned char[]> storage;
  Latents latents;
  int64_t inner_stride = 0, outer_stride = 0;

  Operand(const RowShape& shape, DType dtype, double scale) {
    const int64_t element = size_of(dtype), gap = draw(0, 1) != 0 ? draw(0, 9) : 0;
    inner_stride = shape.numel + gap;
    outer_stride = shape.inner * inner_stride + (draw(0, 3) == 0 ? draw(0, 5) : 0);
    // a shift that breaks vector alignment but not that of an element
    const int64_t shift = draw(0, 2) == 0 ? draw(1, 7) : 0;
    const int64_t last = (shape.outer - 1) * outer_stride + (shape.inner - 1) * inner_stride + shape.numel;
    storage.reset(new unsigned char[(shift + last) * element]);
    unsigned char* data = storage.get() + shift * element;
    memset(storage.get(), 0x7f, (shift + last) * element);
    latents = {data, dtype, outer_stride, inner_stride};
    for (int64_t i = 0; i < shape.outer; ++i) {
      for (int64_t j = 0; j < shape.inner; ++j) {
        for (int64_t n = 0; n < shape.numel; ++n) {
          set(data, dtype, i * outer_stride + j * inner_stride + n, scale * normal());
        }
      }
    }
  }

  static void set(unsigned char* data, DType dtype, int64_t place, double value) {
    if (dtype == DType::kFloat64) {
      memcpy(data + 8 * place, &value, 8);
    } else if (dtype == DType::kFloat32) {
      const float single = static_cast<float>(value);
      memcpy(data + 4 * place, &single, 4);
    } else if (dtype == DType::kBFloat16) {
      const uint16_t half = bfloat16_of(static_cast<float>(value));
      memcpy(data + 2 * place, &half, 2);
    } else {
      // every pattern with a small exponent is a float16 number of moderate size
      const uint16_t half = static_cast<uint16_t>((value < 0 ? 0x8000 : 0) | 0x3000 | (draw(0, 0x7ff)));
      memcpy(data + 2 * place, &half, 2);
    }
  }

  double at(int64_t i, int64_t j, int64_t n) const {
    const auto* data = static_cast<const unsigned char*>(latents.data);
    const int64_t place = i * outer_stride + j * inner_stride + n;
    if (latents.dtype == DType::kFloat64) {
      double value;
      memcpy(&value, data + 8 * place, 8);
      return value;
    }
    if (latents.dtype == DType::kFloat32) {
      float value;
      memcpy(&value, data + 4 * place, 4);
      return value;
    }
    uint16_t half;
    memcpy(&half, data + 2 * place, 2);
    if (latents.dtype == DType::kBFloat16) return from_bfloat16(half);
    const double magnitude = ldexp(1.0 + (half & 0x3ff) / 1024.0, ((half >> 10) & 0x1f) - 15);
    return (half & 0x8000) != 0 ? -magnitude : magnitude;
  }
};

[[noreturn]] void fail(const std::string& what) {
  fprintf(stderr, "driver: %s\n", what.c_str());
  exit(1);
}

void expect_close(double actual, double expected, double tolerance, const char* what) {
  if (!(fabs(actual - expected) <= tolerance)) {
    fail(std::string(what) + ": got " + std::to_string(actual) + ", expected " + std::to_string(expected));
  }
}

template <class T>
void expect_same(const std::vector<T>& a, const std::vector<T>& b, const char* what) {
  if (a.size() != b.size() || memcmp(a.data(), b.data(), a.size() * sizeof(T)) != 0) {
    fail(std::string(what) + ": bits depend on the number of threads");
  }
}

template <class T>
void one_case() {
  const bool is_double = sizeof(T) == 8;
  RowShape shape{draw(1, 3), draw(1, 3), 1};
  const int64_t sizes[] = {draw(1, 40), draw(41, 700), 16384 + draw(-3, 3), draw(30000, 50000)};
  shape.numel = sizes[draw(0, 15) == 0 ? 3 : draw(0, 5) == 0 ? 2 : draw(0, 1)];
  const int64_t rows = shape.rows(), numel = shape.numel;
  const auto dtype = [&] { return is_double ? DType::kFloat64 : static_cast<DType>(draw(0, 2)); };
  const Operand current(shape, dtype(), 1.0), old(shape, dtype(), 1.0), noise(shape, dtype(), 1.0);
  const Operand reference(shape, dtype(), 1.0);
  const bool means = draw(0, 2) == 0, seeded = !means && draw(0, 1) != 0, with_reference = draw(0, 2) == 0;

  std::vector<T> table(rows * 3);
  for (int64_t row = 0; row < rows; ++row) {
    table[3 * row] = T(0.1 + 0.1 * draw(0, 5));
    table[3 * row + 1] = T(-0.01 * draw(1, 5));
    table[3 * row + 2] = T(0.05);
  }
  std::vector<int64_t> streams(rows);
  for (int64_t& stream : streams) stream = draw(0, INT64_C(1) << 40);

  RowSource<T> source;
  source.shape = shape;
  source.current = current.latents;
  source.old = old.latents;
  if (!seeded) source.noise = noise.latents;
  if (with_reference) source.reference = reference.latents;
  source.streams = {draw(0, 1) != 0 ? streams.data() : nullptr, generator(), draw(0, 1000)};
  source.step.data = table.data();
  source.step.columns = 3;
  source.form = means ? Form::kMean : Form::kVelocity;

  std::vector<T> advantages(rows), weights(4 * rows), old_log_prob(rows), coefficients(3 * rows), upstream(rows);
  for (int64_t row = 0; row < rows; ++row) {
    advantages[row] = T(normal());
    for (int64_t line = 0; line < 4; ++line) weights[line * rows + row] = T(0.5 + 0.1 * draw(0, 9));
    old_log_prob[row] = T(-1.0 + 0.1 * normal());
    upstream[row] = T(normal());
    const bool dropped = draw(0, 2) == 0;
    for (int64_t k = 0; k < 3; ++k) coefficients[k * rows + row] = dropped ? T(0) : T(normal());
  }
  ObjectiveInputs<T> inputs;
  inputs.advantages = advantages.data();
  if (draw(0, 1) != 0) inputs.row_weights = weights.data();
  inputs.all_weights = inputs.row_weights != nullptr && draw(0, 1) != 0;
  if (draw(0, 3) == 0) inputs.old_log_prob = old_log_prob.data();
  EpilogueOptions options{};
  options.rule = static_cast<Rule>(draw(0, kRules - 1));
  options.trust_region = static_cast<TrustRegion>(draw(0, means ? 1 : 2));
  options.sum_reduce = draw(0, 4) == 0;
  options.batch_bias = draw(0, 1) != 0;
  options.threshold = pow(10.0, -draw(0, 6));
  options.clip_low = options.clip_high = 0.1;
  options.advantage_clip = 5.0;
  options.kl_weight = with_reference ? 0.1 : 0.0;
  options.strength = 0.1 * draw(0, 20);

  const int64_t element = size_of(current.latents.dtype);
  std::vector<std::vector<T>> stats_by_threads, rows_by_threads, summary_by_threads;
  std::vector<std::vector<unsigned char>> grads, losses_grads, nexts;
  const DType next_dtype = dtype();
  for (const int64_t threads : {1, 3}) {
    torch::stable::thread_count() = threads;
    std::vector<T> stats(4 * rows), row_results(kRowFields * rows), summary(kSummaryFields);
    cpu::row_stats<T>(source, true, stats.data());
    stats_by_threads.push_back(stats);

    std::vector<unsigned char> grad(rows * numel * element), loss_grad(rows * numel * element);
    cpu::row_grad<T>(source, coefficients.data(), upstream.data(), 1, 0.5, grad.data());
    grads.push_back(grad);
    cpu::policy_loss<T>(
        source, inputs, options, row_results.data(), summary.data(), 1.0 / static_cast<double>(rows), loss_grad.data());
    rows_by_threads.push_back(row_results);
    summary_by_threads.push_back(summary);
    losses_grads.push_back(loss_grad);

    ObjectiveInputs<T> given = inputs;
    given.log_prob = upstream.data();
    given.old_log_prob = old_log_prob.data();
    if (draw(0, 1) != 0) given.drift = weights.data();
    if (draw(0, 1) != 0) given.reference_drift = weights.data();
    StepTable<T> std_alone;
    std_alone.data = weights.data();
    std_alone.columns = 1;
    cpu::log_prob_loss<T>(given_source(rows, std_alone), given, options, row_results.data(), summary.data());
    for (int64_t row = 0; row < rows; ++row) {
      const T log_ratio = upstream[row] - old_log_prob[row];
      expect_close(row_results[kLogRatio * rows + row], log_ratio, 0.0, "log_prob_loss");
    }

    std::vector<T> step_table(rows * 3), mean(rows * numel), log_prob(rows);
    for (int64_t row = 0; row < rows; ++row) {
      step_table[3 * row] = T(0.9);
      step_table[3 * row + 1] = T(-0.1);
      step_table[3 * row + 2] = row % 3 == 0 ? T(0) : T(0.2);
    }
    SampleSource<T> sampling;
    sampling.shape = shape;
    sampling.sample = old.latents;
    sampling.velocity = current.latents;
    if (!seeded) sampling.noise = noise.latents;
    sampling.streams = source.streams;
    sampling.step.data = step_table.data();
    sampling.step.columns = 3;
    std::vector<unsigned char> next(rows * numel * size_of(next_dtype));
    sampling.next = next.data();
    sampling.next_dtype = next_dtype;
    sampling.mean = mean.data();
    sampling.log_prob = log_prob.data();
    cpu::sde_step<T>(sampling);
    nexts.push_back(next);
    expect_close(
        mean[0], T(0.9) * old.at(0, 0, 0) + T(-0.1) * current.at(0, 0, 0), is_double ? 1e-12 : 1e-5, "sampler mean");
  }
  expect_same(stats_by_threads[0], stats_by_threads[1], "row_stats");
  expect_same(rows_by_threads[0], rows_by_threads[1], "policy_loss rows");
  expect_same(summary_by_threads[0], summary_by_threads[1], "policy_loss summary");
  expect_same(grads[0], grads[1], "row_grad");
  expect_same(losses_grads[0], losses_grads[1], "policy_loss gradient");
  expect_same(nexts[0], nexts[1], "sde_step");

  for (int64_t row = 0; row < rows; ++row) {
    const int64_t i = row / shape.inner, j = row % shape.inner;
    const double scale = numbers_of(source.step, source.form, row).scale;
    double p = 0.0, q = 0.0, size = 0.0;
    for (int64_t n = 0; n < numel; ++n) {
      const double u = scale * (current.at(i, j, n) - old.at(i, j, n));
      q += u * u;
      if (!seeded) {
        const double e = means ? scale * (noise.at(i, j, n) - old.at(i, j, n)) : noise.at(i, j, n);
        p += e * u;
        size += fabs(e * u);
      }
    }
    // float32 products and sums of a few thousand numbers
    const double relative = is_double ? 1e-10 : 1e-4;
    const double count = static_cast<double>(numel);
    expect_close(stats_by_threads[0][rows + row], q / count, relative * q / count + 1e-30, "Q");
    if (!seeded) expect_close(stats_by_threads[0][row], p / count, relative * size / count + 1e-30, "P");
    if (coefficients[row] == T(0)) {
      for (int64_t byte = row * numel * element; byte < (row + 1) * numel * element; ++byte) {
        if (grads[0][byte] != 0) fail("row_grad: a dropped row has a gradient");
      }
    }
  }
}

void overread() {
  RowShape shape{1, 1, 100};
  const Operand current(shape, DType::kFloat32, 1.0), old(shape, DType::kFloat32, 1.0);
  const Operand noise(shape, DType::kFloat32, 1.0);
  RowSource<float> source;
  source.shape = {1, 1, 101};
  source.current = current.latents;
  source.old = old.latents;
  source.noise = noise.latents;
  source.step.values[0] = source.step.values[1] = source.step.values[2] = 1.0f;
  float stats[4];
  cpu::row_stats<float>(source, true, stats);
}

void race() {
  torch::stable::thread_count() = 2;
  int64_t sum = 0;
  torch::stable::parallel_for(0, 2, 1, [&](int64_t, int64_t end) { sum += end; });
  printf("%lld\n", static_cast<long long>(sum));
}

}  // namespace

int main(int argc, char** argv) {
  const std::string what = argc > 1 ? argv[1] : "";
  if (what == "overread") {
    overread();
  } else if (what == "race") {
    race();
  } else if (argc == 3) {
    generator.seed(strtoull(argv[2], nullptr, 10));
    const int64_t cases = strtoll(argv[1], nullptr, 10);
    for (int64_t i = 0; i < cases; ++i) {
      one_case<float>();
      if (i % 4 == 0) one_case<double>();
    }
    printf("%lld cases on %s\n", static_cast<long long>(cases), cpu::kernels().isa);
  } else {
    fprintf(stderr, "usage: driver CASES SEED | overread | race\n");
    return 2;
  }
  return 0;
}
