#include "rows.h"

#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#include <torch/csrc/stable/ops.h>

#include "isa.h"

namespace flowdppo::cpu {
namespace {

// a thread is worth waking for this many elements; regenerating noise costs several times more than reading it
constexpr int64_t kElementsPerThread = 65536;
constexpr int64_t kSeededElementsPerThread = 16384;
// what may be expected to stay cached between the two looks at a row: a shared last level, or each core's own
constexpr int64_t kSharedCacheBytes = int64_t{16} << 20, kCacheBytesPerThread = int64_t{2} << 20;
// gradients of this size are written past the caches: that saves reading each line first, and sweeping the caches
constexpr int64_t kBypassBytes = int64_t{4} << 20;
// generated noise that all threads together may keep between the two looks at a row
constexpr int64_t kKeptNoiseBytes = int64_t{1} << 20;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t chunks_per_row(const RowShape& shape) { return ceil_div(shape.numel, kChunk); }

int64_t chunk_grain(const RowShape& shape, bool seeded) {
  const int64_t wanted = seeded ? kSeededElementsPerThread : kElementsPerThread;
  return ceil_div(wanted, shape.numel < kChunk ? shape.numel : kChunk);
}

Operand operand_at(const Latents& latents, const RowShape& shape, int64_t row, int64_t first) {
  if (latents.data == nullptr) return {};
  const int64_t element =
      row / shape.inner * latents.stride0 + row % shape.inner * latents.stride1 + first;
  return {static_cast<const char*>(latents.data) + element * size_of(latents.dtype), latents.dtype};
}

int64_t chunk_count(const RowShape& shape, int64_t chunk) {
  const int64_t left = shape.numel - chunk * kChunk;
  return left < kChunk ? left : kChunk;
}

template <class T>
RowChunk chunk_of(const RowSource<T>& source, int64_t row, int64_t chunk) {
  const int64_t first = chunk * kChunk;
  RowChunk out;
  out.current = operand_at(source.current, source.shape, row, first);
  out.old = operand_at(source.old, source.shape, row, first);
  out.noise = operand_at(source.noise, source.shape, row, first);
  out.reference = operand_at(source.reference, source.shape, row, first);
  out.key = source.streams.key;
  out.stream = stream_of(source.streams, row);
  out.first = first;
  out.count = chunk_count(source.shape, chunk);
  out.form = source.form;
  return out;
}

// Generated noise of a row's first chunks, kept between the two looks at the row.
template <class T>
struct KeptNoise {
  int64_t chunks = 0;
  std::unique_ptr<T[]> data;

  T* at(int64_t chunk) { return chunk < chunks ? data.get() + chunk * kChunk : nullptr; }
};

template <class T>
class Rows {
 public:
  explicit Rows(const RowSource<T>& source)
      : source_(source),
        kernels_(kernels()),
        chunks_(chunks_per_row(source.shape)),
        grain_(chunk_grain(source.shape, source.noise.data == nullptr)),
        threads_(torch::stable::get_num_threads()),
        bypass_cache_(source.shape.rows() * source.shape.numel * size_of(source.current.dtype) >= kBypassBytes) {}

  int64_t count() const { return source_.shape.rows(); }
  int64_t numel() const { return source_.shape.numel; }

  // Raw sums of rows first .. last-1.
  void sum(int64_t first, int64_t last, bool second_moment, RawSums* totals) const {
    std::vector<RawSums> partial((last - first) * chunks_);
    torch::stable::parallel_for(0, static_cast<int64_t>(partial.size()), grain_, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        partial[i] = kernels_.sums(chunk_of(source_, first + i / chunks_, i % chunks_), second_moment);
      }
    });
    for (int64_t row = 0; row < last - first; ++row) {
      totals[row] = {};
      for (int64_t chunk = 0; chunk < chunks_; ++chunk) totals[row].add(partial[row * chunks_ + chunk]);
    }
  }

  // The same of one row, on this thread. Noise that it generates is left in `kept`.
  RawSums sum_row(int64_t row, bool second_moment, KeptNoise<T>& kept) const {
    RawSums total;
    for (int64_t chunk = 0; chunk < chunks_; ++chunk) {
      RowChunk work = chunk_of(source_, row, chunk);
      work.noise_out = kept.at(chunk);
      total.add(kernels_.sums(work, second_moment));
    }
    return total;
  }

  // Gradients of rows first .. last-1; the chunks that sum() looked at last come first, they may still be cached.
  void gradient(int64_t first, int64_t last, const GradFactors* factors, void* out) const {
    torch::stable::parallel_for(0, (last - first) * chunks_, grain_, [&](int64_t begin, int64_t end) {
      for (int64_t i = end; i-- > begin;) {
        const int64_t row = i / chunks_;
        gradient_chunk(chunk_of(source_, first + row, i % chunks_), first + row, factors[row], out);
      }
    });
  }

  // After sum_row().
  void gradient_row(int64_t row, const GradFactors& factors, KeptNoise<T>& kept, void* out) const {
    for (int64_t chunk = chunks_; chunk-- > 0;) {
      RowChunk work = chunk_of(source_, row, chunk);
      if (T* noise = kept.at(chunk)) work.noise = {noise, sizeof(T) == 8 ? DType::kFloat64 : DType::kFloat32};
      gradient_chunk(work, row, factors, out);
    }
  }

  // A thread's share of the room for generated noise, in whole chunks and no more than a row.
  KeptNoise<T> room_for_noise() const {
    if (source_.noise.data != nullptr) return {};
    const int64_t share = kKeptNoiseBytes / threads_ / (kChunk * static_cast<int64_t>(sizeof(T)));
    const int64_t chunks = share < chunks_ ? share : chunks_;
    return {chunks, std::unique_ptr<T[]>(new T[chunks * kChunk])};
  }

  RowStats<T> stats(int64_t row, const RawSums& sums) const {
    return finish_sums<T>(sums, numbers_of(source_.step, source_.form, row).scale, numel(), source_.form);
  }

  GradFactors factors(int64_t row, T grad_p, T grad_q, T grad_r, double outer) const {
    return gradient_factors<T>(
        grad_p, grad_q, grad_r, outer, numbers_of(source_.step, source_.form, row).scale, numel(), source_.form);
  }

  // Whether each row is read twice by one thread, or every thread works on all rows.
  bool row_per_thread() const {
    const bool balanced = count() % threads_ == 0 || count() >= 4 * threads_;
    return threads_ == 1 || (balanced && row_bytes() * threads_ <= cache_bytes());
  }

  // How many rows to look at before coming back to them.
  int64_t rows_per_wave() const {
    const int64_t fitting = cache_bytes() / row_bytes();
    return fitting < 1 ? 1 : fitting;
  }

  int64_t row_grain() const { return ceil_div(grain_, chunks_); }

 private:
  void gradient_chunk(const RowChunk& work, int64_t row, const GradFactors& factors, void* out) const {
    const int64_t itemsize = size_of(source_.current.dtype);
    void* to = static_cast<char*>(out) + (row * numel() + work.first) * itemsize;
    if (factors.active) {
      kernels_.gradient(work, factors, to, bypass_cache_);
    } else {
      std::memset(to, 0, work.count * itemsize);
    }
  }

  int64_t cache_bytes() const {
    const int64_t own = threads_ * kCacheBytesPerThread;
    return own > kSharedCacheBytes ? own : kSharedCacheBytes;
  }

  int64_t row_bytes() const {
    int64_t itemsize = 0;
    for (const Latents* latents : {&source_.current, &source_.old, &source_.noise, &source_.reference}) {
      if (latents->data != nullptr) itemsize += size_of(latents->dtype);
    }
    return itemsize * numel();
  }

  const RowSource<T>& source_;
  const Kernels& kernels_;
  int64_t chunks_, grain_, threads_;
  bool bypass_cache_;
};

// The objective on the rows' statistics.
template <class T>
class Epilogue {
 public:
  Epilogue(const RowSource<T>& source, const ObjectiveInputs<T>& inputs, const EpilogueOptions& options)
      : source_(source), inputs_(inputs), options_(options), results_(source.shape.rows()) {}

  const RowResult<T>& evaluate(int64_t row, const RowStats<T>& stats, T guard_bias) {
    const RowWeights<T> weights = inputs_.weights(row, source_.shape.rows());
    const T* old_log_prob = inputs_.old_log_prob != nullptr ? inputs_.old_log_prob + row : nullptr;
    const bool given = inputs_.log_prob != nullptr;
    const T log_ratio = given ? inputs_.given_log_ratio(row) : T(0);
    results_[row] = evaluate_row<T>(
        stats, numbers_of(source_.step, source_.form, row), inputs_.advantages[row], weights, old_log_prob,
        given ? &log_ratio : nullptr, guard_bias, source_.shape.numel, options_);
    return results_[row];
  }

  const RowResult<T>& evaluate(int64_t row, const RowStats<T>& stats) {
    return evaluate(row, stats, guard_divergence(stats.q, source_.shape.numel, options_));
  }

  void evaluate(const std::vector<RowStats<T>>& stats) {
    const int64_t rows = static_cast<int64_t>(stats.size()), numel = source_.shape.numel;
    if (!options_.couples_rows()) {
      for (int64_t row = 0; row < rows; ++row) evaluate(row, stats[row]);
      return;
    }
    // the bias that all rows share
    double bias = 0.0, coupling = 0.0;
    for (const RowStats<T>& row : stats) bias += guard_divergence(row.q, numel, options_);
    for (int64_t row = 0; row < rows; ++row) {
      coupling += evaluate(row, stats[row], static_cast<T>(bias / static_cast<double>(rows))).coupling;
    }
    const T shared = coupled_grad_q<T>(coupling, rows, numel, options_);
    for (RowResult<T>& result : results_) result.fields[kGradQ] += shared;
  }

  const RowResult<T>& result(int64_t row) const { return results_[row]; }

  void write(T* rows, T* summary) const {
    const int64_t count = static_cast<int64_t>(results_.size());
    RowSummary total;
    for (int64_t row = 0; row < count; ++row) {
      for (int field = 0; field < kRowFields; ++field) rows[field * count + row] = results_[row].fields[field];
      total.add(results_[row]);
    }
    total.write(summary);
  }

 private:
  const RowSource<T>& source_;
  const ObjectiveInputs<T>& inputs_;
  const EpilogueOptions& options_;
  std::vector<RowResult<T>> results_;
};

}  // namespace

template <class T>
void row_stats(const RowSource<T>& source, bool second_moment, T* stats) {
  const Rows<T> rows(source);
  const int64_t count = rows.count();
  std::vector<RawSums> sums(count);
  rows.sum(0, count, second_moment, sums.data());
  for (int64_t row = 0; row < count; ++row) {
    const RowStats<T> finished = rows.stats(row, sums[row]);
    stats[row] = finished.p;
    stats[count + row] = finished.q;
    stats[2 * count + row] = finished.e;
    stats[3 * count + row] = finished.r;
  }
}

template <class T>
void row_grad(
    const RowSource<T>& source,
    const T* coefficients,
    const T* upstream,
    int64_t upstream_stride,
    double factor,
    void* out) {
  const Rows<T> rows(source);
  const int64_t count = rows.count();
  std::vector<GradFactors> factors(count);
  for (int64_t row = 0; row < count; ++row) {
    factors[row] = rows.factors(
        row, coefficients[row], coefficients[count + row], coefficients[2 * count + row],
        factor * upstream[row * upstream_stride]);
  }
  rows.gradient(0, count, factors.data(), out);
}

template <class T>
void policy_loss(
    const RowSource<T>& source,
    const ObjectiveInputs<T>& inputs,
    const EpilogueOptions& options,
    T* row_results,
    T* summary,
    double factor,
    void* out) {
  const Rows<T> rows(source);
  const int64_t count = rows.count();
  const bool second_moment = inputs.old_log_prob != nullptr;
  Epilogue<T> epilogue(source, inputs, options);
  const auto factors = [&](int64_t row) {
    const T* fields = epilogue.result(row).fields;
    return rows.factors(row, fields[kGradP], fields[kGradQ], fields[kGradR], factor);
  };

  if (out != nullptr && !options.couples_rows() && rows.row_per_thread()) {
    torch::stable::parallel_for(0, count, rows.row_grain(), [&](int64_t begin, int64_t end) {
      KeptNoise<T> kept = rows.room_for_noise();
      for (int64_t row = begin; row < end; ++row) {
        epilogue.evaluate(row, rows.stats(row, rows.sum_row(row, second_moment, kept)));
        rows.gradient_row(row, factors(row), kept, out);
      }
    });
  } else {
    // rows that share a bias are all summed before the first gradient
    const int64_t wave = out == nullptr || options.couples_rows() ? count : rows.rows_per_wave();
    std::vector<RawSums> sums(wave < count ? wave : count);
    std::vector<GradFactors> wave_factors(sums.size());
    for (int64_t first = 0; first < count; first += wave) {
      const int64_t last = count - first < wave ? count : first + wave;
      rows.sum(first, last, second_moment, sums.data());
      if (options.couples_rows()) {
        std::vector<RowStats<T>> stats(count);
        for (int64_t row = 0; row < count; ++row) stats[row] = rows.stats(row, sums[row]);
        epilogue.evaluate(stats);
      } else {
        for (int64_t row = first; row < last; ++row) epilogue.evaluate(row, rows.stats(row, sums[row - first]));
      }
      if (out == nullptr) continue;
      for (int64_t row = first; row < last; ++row) wave_factors[row - first] = factors(row);
      rows.gradient(first, last, wave_factors.data(), out);
    }
  }
  epilogue.write(row_results, summary);
}

template <class T>
void log_prob_loss(
    const RowSource<T>& source,
    const ObjectiveInputs<T>& inputs,
    const EpilogueOptions& options,
    T* row_results,
    T* summary) {
  const int64_t count = source.shape.rows();
  Epilogue<T> epilogue(source, inputs, options);
  std::vector<RowStats<T>> stats(count);
  for (int64_t row = 0; row < count; ++row) {
    const T scale = numbers_of(source.step, source.form, row).scale;
    stats[row] = finish_sums<T>(inputs.given_sums(row), scale, source.shape.numel, source.form);
  }
  epilogue.evaluate(stats);
  epilogue.write(row_results, summary);
}

template <class T>
void sde_step(const SampleSource<T>& source) {
  const Kernels& table = kernels();
  const RowShape& shape = source.shape;
  const int64_t chunks = chunks_per_row(shape), count = shape.rows();
  const bool seeded = source.noise.data == nullptr && source.previous.data == nullptr;
  const auto numbers = [&](int64_t row) {
    return source.step.data == nullptr ? source.step.values : source.step.data + row * source.step.columns;
  };
  std::vector<double> moments(source.log_prob != nullptr ? count * chunks : 0);
  torch::stable::parallel_for(0, count * chunks, chunk_grain(shape, seeded), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / chunks, chunk = i % chunks, first = chunk * kChunk, element = row * shape.numel + first;
      const T* step = numbers(row);
      SampleChunk out;
      out.sample = operand_at(source.sample, shape, row, first);
      out.velocity = operand_at(source.velocity, shape, row, first);
      out.noise = operand_at(source.noise, shape, row, first);
      out.previous = operand_at(source.previous, shape, row, first);
      out.key = source.streams.key;
      out.stream = stream_of(source.streams, row);
      out.first = first;
      out.count = chunk_count(shape, chunk);
      out.a = step[0];
      out.b = step[1];
      out.std = step[2];
      out.next_dtype = source.next_dtype;
      if (source.next != nullptr) out.next = static_cast<char*>(source.next) + element * size_of(source.next_dtype);
      if (source.mean != nullptr) out.mean = source.mean + element;
      out.with_moment = source.log_prob != nullptr;
      const double moment = table.sample(out);
      if (source.log_prob != nullptr) moments[i] = moment;
    }
  });
  if (source.log_prob == nullptr) return;
  for (int64_t row = 0; row < count; ++row) {
    double moment = 0.0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) moment += moments[row * chunks + chunk];
    const T std = numbers(row)[2];
    // of a given state the sum is over (x' - mu)^2
    if (source.previous.data != nullptr) moment /= static_cast<double>(std) * static_cast<double>(std);
    source.log_prob[row] = step_log_prob<T>(moment / static_cast<double>(shape.numel), std, source.unnormalized);
  }
}

#define FLOWDPPO_INSTANTIATE(T)                                                                                  \
  template void row_stats<T>(const RowSource<T>&, bool, T*);                                                     \
  template void row_grad<T>(const RowSource<T>&, const T*, const T*, int64_t, double, void*);                    \
  template void policy_loss<T>(                                                                                  \
      const RowSource<T>&, const ObjectiveInputs<T>&, const EpilogueOptions&, T*, T*, double, void*);            \
  template void log_prob_loss<T>(                                                                                \
      const RowSource<T>&, const ObjectiveInputs<T>&, const EpilogueOptions&, T*, T*);                           \
  template void sde_step<T>(const SampleSource<T>&);
FLOWDPPO_INSTANTIATE(float)
FLOWDPPO_INSTANTIATE(double)

}  // namespace flowdppo::cpu
