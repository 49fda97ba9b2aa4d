// The streaming kernels. Compiled once per instruction set with FLOWDPPO_ISA naming it; nothing here may be shared with
// the other builds, so everything but the table is in an unnamed namespace and no library templates are used.

#include "kernels.h"

#include "../philox.h"
#include "simd.h"

namespace flowdppo::cpu {
namespace {

// staging buffers hold one block; short enough for the first-level cache
constexpr int kBlock = 1024;
// independent accumulators, and how many terms each sums in float32 before it is added up in double
constexpr int kUnroll = 4;
constexpr int kDepth = 16;

template <class T>
struct Traits {
  using Compute = float;
  static constexpr DType dtype = DType::kFloat32;
};
template <>
struct Traits<double> {
  using Compute = double;
  static constexpr DType dtype = DType::kFloat64;
};
template <>
struct Traits<BFloat16> {
  using Compute = float;
  static constexpr DType dtype = DType::kBFloat16;
};
template <>
struct Traits<Half> {
  using Compute = float;
  static constexpr DType dtype = DType::kFloat16;
};

// Whole steps of accumulators that hold `count` elements.
template <class Compute>
constexpr int kStep = kUnroll * kLanes<Compute>;
template <class Compute>
FLOWDPPO_HD int round_to_steps(int count) {
  return (count + kStep<Compute> - 1) / kStep<Compute> * kStep<Compute>;
}

// Zeros from `count` to the end of its step: they add nothing to any sum.
template <class Compute, class T>
FLOWDPPO_HD void pad(T* buffer, int count) {
  memset(static_cast<void*>(buffer + count), 0, (round_to_steps<Compute>(count) - count) * sizeof(T));
}

// In whole steps: both sides must be padded.
template <class From, class To>
FLOWDPPO_HD void convert(const From* from, int count, To* to) {
  constexpr int lanes = kLanes<float>;
  for (int i = 0; i < round_to_steps<float>(count); i += 2 * lanes) {
    store_pair(to + i, load(from + i), load(from + i + lanes));
  }
}

template <class From>
__attribute__((noinline)) void widen_block(const From* from, int count, float* to) {
  if (count == kBlock) {
    convert(from, kBlock, to);
    return;
  }
  From padded[kBlock];
  memcpy(padded, from, count * sizeof(From));
  pad<float>(padded, count);
  convert(padded, count, to);
}

template <class To>
__attribute__((noinline)) void narrow_block(const float* from, int count, To* to) {
  if (count == kBlock) {
    convert(from, kBlock, to);
    return;
  }
  To padded[kBlock];
  convert(from, count, padded);
  memcpy(to, padded, count * sizeof(To));
}

// A block of results as `dtype` at element `offset` of `out`.
FLOWDPPO_HD void write_block(const float* from, int count, void* out, DType dtype, int64_t offset) {
  if (dtype == DType::kFloat32) {
    memcpy(static_cast<float*>(out) + offset, from, count * sizeof(float));
  } else if (dtype == DType::kBFloat16) {
    narrow_block(from, count, static_cast<BFloat16*>(out) + offset);
  } else if (dtype == DType::kFloat16) {
    narrow_block(from, count, static_cast<Half*>(out) + offset);
  } else {
    double* to = static_cast<double*>(out) + offset;
    for (int i = 0; i < count; ++i) to[i] = from[i];
  }
}

FLOWDPPO_HD void write_block(const double* from, int count, void* out, DType dtype, int64_t offset) {
  if (dtype == DType::kFloat64) {
    memcpy(static_cast<double*>(out) + offset, from, count * sizeof(double));
    return;
  }
  alignas(64) float single[kBlock] = {};
  for (int i = 0; i < count; ++i) single[i] = static_cast<float>(from[i]);
  write_block(single, count, out, dtype, offset);
}

// `count` normals from element `first` (a multiple of kBlock) of a stream, padded. Words first, normals second: two
// short loops keep more independent iterations in flight than one long loop.
__attribute__((noinline)) void fill_normals(const PhiloxKey& key, uint64_t stream, int64_t first, int count, float* to) {
  constexpr int lanes = kLanes<float>;
  alignas(64) uint32_t radius[kBlock / 2], angle[kBlock / 2];
  const uint64_t block = static_cast<uint64_t>(first) / 4;
  WordV lane = {};
  for (int i = 0; i < kVectorBytes / 8; ++i) lane[i] = i;
  lane += block;
  // the counters of one block of elements share their upper half
  const WordV high = WordV{} + (block >> 32), stream_low = WordV{} + stream, stream_high = WordV{} + (stream >> 32);
  for (int i = 0; 2 * i < count; i += lanes) {
    const PhiloxWords<WordV> w = philox4x32<VectorLanes>({lane, high, stream_low, stream_high}, key);
    // both pairs of a counter side by side: 32-bit lanes (w0, w2) and (w1, w3)
    const UintV radius_words = (UintV)((w.w0 & 0xffffffffu) | (w.w2 << 32));
    const UintV angle_words = (UintV)((w.w1 & 0xffffffffu) | (w.w3 << 32));
    memcpy(radius + i, &radius_words, sizeof radius_words);
    memcpy(angle + i, &angle_words, sizeof angle_words);
    lane += static_cast<uint64_t>(lanes / 2);
  }
  for (int i = 0; i < count; i += 2 * lanes) {
    FloatV cosine, sine;
    box_muller<VectorLanes>(
        load_unaligned<UintV>(radius + i / 2), load_unaligned<UintV>(angle + i / 2), cosine, sine);
    store_interleaved(to + i, cosine, sine);
  }
  pad<float>(to, count);
}

__attribute__((noinline)) void fill_normals(const PhiloxKey& key, uint64_t stream, int64_t first, int count, double* to) {
  for (int i = 0; i < count; i += 4) {
    double z[4];
    philox_normals(key, stream, static_cast<uint64_t>(first + i) / 4, z);
    memcpy(to + i, z, sizeof z);
  }
  pad<double>(to, count);
}

template <class T>
__attribute__((noinline)) const T* copy_padded(const T* from, int count, T* buffer) {
  memcpy(buffer, from, count * sizeof(T));
  pad<typename Traits<T>::Compute>(buffer, count);
  return buffer;
}

// One block of an operand as T, padded: in place where it is whole and stored so, else in `buffer`.
template <class T>
FLOWDPPO_HD const T* stage(const Operand& operand, int64_t offset, int count, T* buffer) {
  if constexpr (sizeof(T) == sizeof(float)) {
    if (operand.dtype == DType::kBFloat16) {
      widen_block(static_cast<const BFloat16*>(operand.data) + offset, count, buffer);
      return buffer;
    }
    if (operand.dtype == DType::kFloat16) {
      widen_block(static_cast<const Half*>(operand.data) + offset, count, buffer);
      return buffer;
    }
  }
  const T* data = static_cast<const T*>(operand.data) + offset;
  return count == kBlock ? data : copy_padded(data, count, buffer);
}

template <class T, class Chunk>
FLOWDPPO_HD const T* stage_noise(const Chunk& chunk, int64_t offset, int count, T* buffer) {
  // a path with 16-bit noise is taken only where noise is stored so
  if constexpr (sizeof(T) >= sizeof(float)) {
    if (chunk.noise.data == nullptr) {
      fill_normals(chunk.key, chunk.stream, chunk.first + offset, count, buffer);
      return buffer;
    }
  }
  return stage(chunk.noise, offset, count, buffer);
}

// Double sums of what short runs of vector accumulators hold.
struct Total {
  DoubleV lanes = {};

  FLOWDPPO_HD_MEMBER void add(const FloatV (&sums)[kUnroll]) {
    const FloatV sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    using HalfV = float __attribute__((vector_size(kVectorBytes / 2)));
    HalfV halves[2];
    memcpy(halves, &sum, sizeof sum);
    lanes += __builtin_convertvector(halves[0], DoubleV) + __builtin_convertvector(halves[1], DoubleV);
  }
  FLOWDPPO_HD_MEMBER void add(const DoubleV (&sums)[kUnroll]) { lanes += (sums[0] + sums[1]) + (sums[2] + sums[3]); }
  FLOWDPPO_HD_MEMBER double value() const {
    double values[kLanes<double>];
    memcpy(values, &lanes, sizeof values);
    for (int width = kLanes<double> / 2; width > 0; width /= 2) {
      for (int i = 0; i < width; ++i) values[i] += values[i + width];
    }
    return values[0];
  }
};
static_assert(kUnroll == 4, "Total::add adds four accumulators");

FLOWDPPO_HD int block_size(int64_t count, int64_t offset) {
  return static_cast<int>(count - offset < kBlock ? count - offset : kBlock);
}

// What n of RawSums is made of, and what the reference's place holds.
enum class Reads { kNoise, kNoiseRef, kState, kStateRef, kMatching };
constexpr bool is_mean(Reads reads) { return reads == Reads::kState || reads == Reads::kStateRef; }
constexpr bool has_ref(Reads reads) { return reads == Reads::kNoiseRef || reads == Reads::kStateRef; }

Reads reads_of(const RowChunk& chunk) {
  if (chunk.form == Form::kMatching) return Reads::kMatching;
  const bool with_reference = chunk.reference.data != nullptr;
  if (chunk.form == Form::kMean) return with_reference ? Reads::kStateRef : Reads::kState;
  return with_reference ? Reads::kNoiseRef : Reads::kNoise;
}

template <Reads kReads, bool kMoment, class Latent, class Noise>
RawSums chunk_sums(const RowChunk& chunk) {
  using Compute = typename Traits<Latent>::Compute;
  constexpr int step = kStep<Compute>;
  constexpr bool kMean = is_mean(kReads), kRef = has_ref(kReads), kMatching = kReads == Reads::kMatching;
  alignas(64) Latent current_buffer[kBlock], old_buffer[kBlock], reference_buffer[kBlock];
  alignas(64) Noise noise_buffer[kBlock];
  Total nd, dd, nn, ww;
  for (int64_t offset = 0; offset < chunk.count; offset += kBlock) {
    const int count = block_size(chunk.count, offset), end = round_to_steps<Compute>(count);
    const Latent* current = stage(chunk.current, offset, count, current_buffer);
    const Latent* old = stage(chunk.old, offset, count, old_buffer);
    Noise* generated = chunk.noise_out != nullptr ? static_cast<Noise*>(chunk.noise_out) + offset : noise_buffer;
    const Noise* noise = stage_noise(chunk, offset, count, generated);
    const Latent* reference = kRef || kMatching ? stage(chunk.reference, offset, count, reference_buffer) : nullptr;
    for (int i = 0; i < end;) {
      const int stop = end - i < kDepth * step ? end : i + kDepth * step;
      Vector<Compute> nd_run[kUnroll] = {}, dd_run[kUnroll] = {}, nn_run[kUnroll] = {}, ww_run[kUnroll] = {};
      for (; i < stop; i += step) {
        FLOWDPPO_UNROLL
        for (int k = 0; k < kUnroll; ++k) {
          const int at = i + k * kLanes<Compute>;
          const Vector<Compute> x = load(current + at), y = load(old + at), d = x - y;
          Vector<Compute> n = load(noise + at);
          if constexpr (kMatching) n -= load(reference + at);
          if constexpr (kMean || kMatching) n -= y;
          nd_run[k] += n * d;
          dd_run[k] += d * d;
          if constexpr (kMoment) nn_run[k] += n * n;
          if constexpr (kRef) {
            const Vector<Compute> w = x - load(reference + at);
            ww_run[k] += w * w;
          }
        }
      }
      nd.add(nd_run);
      dd.add(dd_run);
      if constexpr (kMoment) nn.add(nn_run);
      if constexpr (kRef) ww.add(ww_run);
    }
  }
  return {nd.value(), dd.value(), nn.value(), ww.value()};
}

template <Reads kReads, class Latent, class Noise>
void chunk_gradient(const RowChunk& chunk, const GradFactors& factors, void* out, bool bypass_cache) {
  using Compute = typename Traits<Latent>::Compute;
  constexpr bool kMean = is_mean(kReads), kRef = has_ref(kReads), kMatching = kReads == Reads::kMatching;
  alignas(64) Latent current_buffer[kBlock], old_buffer[kBlock], reference_buffer[kBlock], out_buffer[kBlock];
  alignas(64) Noise noise_buffer[kBlock];
  const Compute on_noise = static_cast<Compute>(factors.noise), on_diff = static_cast<Compute>(factors.diff);
  const Compute on_ref = static_cast<Compute>(factors.ref);
  // the gradient has current's dtype, which on the converting path is not Latent
  const DType dtype = chunk.current.dtype;
  const bool converts = dtype != Traits<Latent>::dtype;
  const bool aligned = reinterpret_cast<uintptr_t>(out) % kVectorBytes == 0;
  for (int64_t offset = 0; offset < chunk.count; offset += kBlock) {
    const int count = block_size(chunk.count, offset), end = round_to_steps<Compute>(count);
    const Latent* current = stage(chunk.current, offset, count, current_buffer);
    const Latent* old = stage(chunk.old, offset, count, old_buffer);
    const Noise* noise = stage_noise(chunk, offset, count, noise_buffer);
    const Latent* reference = kRef || kMatching ? stage(chunk.reference, offset, count, reference_buffer) : nullptr;
    const bool direct = count == kBlock && !converts;
    Latent* to = direct ? static_cast<Latent*>(out) + offset : out_buffer;
    const auto gradient_at = [&](int i) __attribute__((always_inline)) {
      const Vector<Compute> x = load(current + i), y = load(old + i);
      Vector<Compute> n = load(noise + i);
      if constexpr (kMatching) n -= load(reference + i);
      if constexpr (kMean || kMatching) n -= y;
      Vector<Compute> value = on_noise * n + on_diff * (x - y);
      if constexpr (kRef) value += on_ref * (x - load(reference + i));
      return value;
    };
    constexpr int lanes = kLanes<Compute>;
    if (direct && bypass_cache && aligned) {
      for (int i = 0; i < end; i += 2 * lanes) store_pair<true>(to + i, gradient_at(i), gradient_at(i + lanes));
    } else {
      for (int i = 0; i < end; i += 2 * lanes) store_pair(to + i, gradient_at(i), gradient_at(i + lanes));
    }
    if (direct) continue;
    if constexpr (sizeof(Latent) == sizeof(uint16_t)) {
      memcpy(static_cast<Latent*>(out) + offset, to, count * sizeof(Latent));
    } else {
      write_block(to, count, out, dtype, offset);
    }
  }
  if (bypass_cache) fence();
}

// Calls visit(Latent, Noise) with the types of the fastest path: 16-bit latents are read in place together with noise
// of the same type or float32 noise; every other mixture is converted to float32 block by block.
template <class Visit>
FLOWDPPO_HD auto with_path(const RowChunk& chunk, const Visit& visit) {
  const DType dtype = chunk.current.dtype;
  if (dtype == DType::kFloat64) return visit(double(), double());
  const bool same = chunk.old.dtype == dtype && (chunk.reference.data == nullptr || chunk.reference.dtype == dtype);
  const bool stored = chunk.noise.data != nullptr;
  if (same && stored && chunk.noise.dtype == dtype) {
    if (dtype == DType::kBFloat16) return visit(BFloat16(), BFloat16());
    if (dtype == DType::kFloat16) return visit(Half(), Half());
  } else if (same && (!stored || chunk.noise.dtype == DType::kFloat32)) {
    if (dtype == DType::kBFloat16) return visit(BFloat16(), float());
    if (dtype == DType::kFloat16) return visit(Half(), float());
  }
  return visit(float(), float());
}

RawSums sums(const RowChunk& chunk, bool second_moment) {
  return with_path(chunk, [&](auto latent, auto noise) {
    using Latent = decltype(latent);
    using Noise = decltype(noise);
    // in the order of Reads
    constexpr RawSums (*functions[5][2])(const RowChunk&) = {
        {chunk_sums<Reads::kNoise, false, Latent, Noise>, chunk_sums<Reads::kNoise, true, Latent, Noise>},
        {chunk_sums<Reads::kNoiseRef, false, Latent, Noise>, chunk_sums<Reads::kNoiseRef, true, Latent, Noise>},
        {chunk_sums<Reads::kState, false, Latent, Noise>, chunk_sums<Reads::kState, true, Latent, Noise>},
        {chunk_sums<Reads::kStateRef, false, Latent, Noise>, chunk_sums<Reads::kStateRef, true, Latent, Noise>},
        {chunk_sums<Reads::kMatching, false, Latent, Noise>, chunk_sums<Reads::kMatching, true, Latent, Noise>},
    };
    return functions[static_cast<int>(reads_of(chunk))][second_moment](chunk);
  });
}

void gradient(const RowChunk& chunk, const GradFactors& factors, void* out, bool bypass_cache) {
  with_path(chunk, [&](auto latent, auto noise) {
    using Latent = decltype(latent);
    using Noise = decltype(noise);
    constexpr void (*functions[5])(const RowChunk&, const GradFactors&, void*, bool) = {
        chunk_gradient<Reads::kNoise, Latent, Noise>,    chunk_gradient<Reads::kNoiseRef, Latent, Noise>,
        chunk_gradient<Reads::kState, Latent, Noise>,    chunk_gradient<Reads::kStateRef, Latent, Noise>,
        chunk_gradient<Reads::kMatching, Latent, Noise>,
    };
    functions[static_cast<int>(reads_of(chunk))](chunk, factors, out, bypass_cache);
  });
}

enum class NoiseUse {
  // mu is all there is
  kNone,
  // S == 0: x' = mu whatever the noise holds, but its moment is wanted
  kMoment,
  kAdd,
  // x' is given: e is what it contains
  kRecover,
};

template <NoiseUse kUse, class Compute>
double chunk_sample(const SampleChunk& chunk) {
  constexpr int step = kStep<Compute>;
  alignas(64) Compute sample_buffer[kBlock], velocity_buffer[kBlock], noise_buffer[kBlock];
  alignas(64) Compute mean_buffer[kBlock], next_buffer[kBlock];
  const Compute a = static_cast<Compute>(chunk.a), b = static_cast<Compute>(chunk.b);
  const Compute std = static_cast<Compute>(chunk.std);
  constexpr bool kWrites = kUse != NoiseUse::kRecover;
  Total total;
  for (int64_t offset = 0; offset < chunk.count; offset += kBlock) {
    const int count = block_size(chunk.count, offset), end = round_to_steps<Compute>(count);
    const Compute* sample = stage(chunk.sample, offset, count, sample_buffer);
    const Compute* velocity = stage(chunk.velocity, offset, count, velocity_buffer);
    const Compute* noise = nullptr;
    if constexpr (kUse == NoiseUse::kRecover) noise = stage(chunk.previous, offset, count, noise_buffer);
    if constexpr (kUse == NoiseUse::kMoment || kUse == NoiseUse::kAdd) {
      noise = stage_noise(chunk, offset, count, noise_buffer);
    }
    const bool next_in_place = kWrites && count == kBlock && chunk.next_dtype == Traits<Compute>::dtype;
    const bool mean_in_place = count == kBlock && chunk.mean != nullptr;
    Compute* next = next_in_place ? static_cast<Compute*>(chunk.next) + offset : next_buffer;
    Compute* mean = mean_in_place ? static_cast<Compute*>(chunk.mean) + offset : mean_buffer;
    for (int i = 0; i < end;) {
      const int stop = end - i < kDepth * step ? end : i + kDepth * step;
      Vector<Compute> squares[kUnroll] = {};
      for (; i < stop; i += step) {
        Vector<Compute> mu[kUnroll], reached[kUnroll];
        FLOWDPPO_UNROLL
        for (int k = 0; k < kUnroll; ++k) {
          const int at = i + k * kLanes<Compute>;
          mu[k] = reached[k] = a * load(sample + at) + b * load(velocity + at);
          if constexpr (kUse != NoiseUse::kNone) {
            Vector<Compute> e = load(noise + at);
            if constexpr (kUse == NoiseUse::kRecover) e -= mu[k];
            squares[k] += e * e;
            if constexpr (kUse == NoiseUse::kAdd) reached[k] += std * e;
          }
        }
        FLOWDPPO_UNROLL
        for (int k = 0; k < kUnroll; k += 2) {
          const int at = i + k * kLanes<Compute>;
          store_pair(mean + at, mu[k], mu[k + 1]);
          if constexpr (kWrites) store_pair(next + at, reached[k], reached[k + 1]);
        }
      }
      total.add(squares);
    }
    if (chunk.mean != nullptr && !mean_in_place) {
      memcpy(static_cast<Compute*>(chunk.mean) + offset, mean, count * sizeof(Compute));
    }
    if (kWrites && !next_in_place) write_block(next, count, chunk.next, chunk.next_dtype, offset);
  }
  return total.value();
}

template <class Compute>
double sample_as(const SampleChunk& chunk) {
  if (chunk.previous.data != nullptr) return chunk_sample<NoiseUse::kRecover, Compute>(chunk);
  if (static_cast<Compute>(chunk.std) != Compute(0)) return chunk_sample<NoiseUse::kAdd, Compute>(chunk);
  if (chunk.with_moment) return chunk_sample<NoiseUse::kMoment, Compute>(chunk);
  return chunk_sample<NoiseUse::kNone, Compute>(chunk);
}

double sample(const SampleChunk& chunk) {
  return chunk.sample.dtype == DType::kFloat64 ? sample_as<double>(chunk) : sample_as<float>(chunk);
}

}  // namespace

namespace FLOWDPPO_ISA {
#define FLOWDPPO_STRING(x) #x
#define FLOWDPPO_NAME(x) FLOWDPPO_STRING(x)
const Kernels& kernels() {
  static constexpr Kernels table = {FLOWDPPO_NAME(FLOWDPPO_ISA), sums, gradient, sample};
  return table;
}
}  // namespace FLOWDPPO_ISA

}  // namespace flowdppo::cpu
