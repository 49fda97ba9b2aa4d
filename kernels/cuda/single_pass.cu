// Loss, row results, summary and gradient in one launch that reads every input once. A cluster of blocks holds a row in
// its shared memory: each block copies and adds up its share, the blocks exchange their sums, and each then knows the
// row's gradient factors and writes the gradient of what it holds.

#include "launchers.h"
#include "latents.cuh"
#include "objective.cuh"
#include "reduce.cuh"
#include "versions.cuh"

namespace flowdppo::gpu {
namespace {

// copies are awaited in so many steps, so that adding up begins before the last has arrived
constexpr int kSteps = 4;

struct HoldingArguments {
  RowSource<float> source;
  ObjectiveArguments objective;
  double factor;
  void* out;
  unsigned* tickets;
  double* row_sums;
  int groups, per_thread, slots;
  bool holds_noise;
};

// The part of a thread in the block's copy of the row: piece `piece` of its `j`-th group. Neighbours in a warp are
// neighbours in memory.
struct Held {
  char* data;
  int per_thread;

  FLOWDPPO_DEVICE char* at(int piece, int j) const {
    return data + ((static_cast<int64_t>(piece) * per_thread + j) * block_threads() + thread_index()) * 16;
  }
};

template <Stored kStored, int kCount>
FLOWDPPO_DEVICE void unpack_held(const char* address, float (&out)[kCount]) {
  Group<kStored, kCount> group;
  group.pieces[0] = load16_shared(address);
  group.unpack(DType::kFloat32, out);
}

// Steps until copies are complete, as the wait needs a number known to the compiler.
FLOWDPPO_DEVICE void await_step(int step) {
  static_assert(kSteps == 4, "one wait for each step");
  if (step == 0) async_wait<3>();
  if (step == 1) async_wait<2>();
  if (step == 2) async_wait<1>();
  if (step == 3) async_wait<0>();
}

template <Stored kLatents, Stored kNoise, bool kReference>
FLOWDPPO_KERNEL FLOWDPPO_KERNEL_BOUNDS(kMostHoldingThreads, 2) void holding_kernel(
    FLOWDPPO_KERNEL_ARGUMENT HoldingArguments a) {
  constexpr int kCount = group_of(kLatents), kItem = 16 / kCount;
  constexpr bool kGenerated = kNoise == Stored::kGenerated;
  // pieces in shared memory: current, old, then reference and noise where there are any
  constexpr int kReferencePiece = 2, kNoisePiece = kReference ? 3 : 2;
  ReduceShared& shared = shared_memory<ReduceShared>();
  const RowShape& shape = a.source.shape;
  const int rank = cluster_rank(), blocks = cluster_blocks();
  const unsigned row = static_cast<unsigned>(block_index()) / static_cast<unsigned>(blocks);
  const int64_t all_groups = shape.numel / kCount, first_group = static_cast<int64_t>(rank) * a.groups;
  const int64_t left = all_groups - first_group;
  const int groups = left <= 0 ? 0 : static_cast<int>(left < a.groups ? left : a.groups);
  const int64_t first = first_group * kCount;
  // what fills no group is read in place, by the last block
  const int tail = rank == blocks - 1 ? static_cast<int>(shape.numel - all_groups * kCount) : 0;
  const Operand current = operand_at(a.source.current, shape, row, first);
  const Operand old = operand_at(a.source.old, shape, row, first);
  const Operand noise = operand_at(a.source.noise, shape, row, first);
  const Operand reference = operand_at(a.source.reference, shape, row, first);
  const int64_t tail_first = all_groups * kCount;
  const uint64_t seed = a.source.streams.seed, stream = stream_of(a.source.streams, row);
  const bool mean = a.source.form == Form::kMean;
  const Held held = {behind<char>(shared), a.per_thread};
  const int threads = block_threads(), thread = thread_index();

  FLOWDPPO_UNROLL
  for (int step = 0; step < kSteps; ++step) {
    FLOWDPPO_NO_UNROLL
    for (int j = step * a.per_thread / kSteps; j < (step + 1) * a.per_thread / kSteps; ++j) {
      const int group = j * threads + thread;
      if (group >= groups) break;
      const int64_t offset = static_cast<int64_t>(group) * (kCount * kItem);
      async_copy16(held.at(0, j), current.data + offset);
      async_copy16(held.at(1, j), old.data + offset);
      if constexpr (kReference) async_copy16(held.at(kReferencePiece, j), reference.data + offset);
      if constexpr (!kGenerated) async_copy16(held.at(kNoisePiece, j), noise.data + offset);
    }
    async_commit();
  }

  const auto element = [&](const Latents& latents, int i) {
    return element_of(operand_at(latents, shape, row, tail_first), i);
  };
  const auto tail_noise = [&](int i) {
    if constexpr (kGenerated) {
      float z[4];
      generate(seed, stream, (tail_first + i) / 4 * 4, z);
      const int at = static_cast<int>((tail_first + i) % 4);
      return at == 0 ? z[0] : at == 1 ? z[1] : at == 2 ? z[2] : z[3];
    } else {
      return element(a.source.noise, i);
    }
  };
  const auto noise_of = [&](int group, int j, float (&n)[kCount]) {
    if constexpr (!kGenerated) {
      unpack_held<kNoise>(held.at(kNoisePiece, j), n);
    } else {
      generate(seed, stream, first + static_cast<int64_t>(group) * kCount, n);
    }
  };

  ThreadSums sums;
  const auto add = [&](float x, float y, float n, float w, int lane) {
    const float d = x - y;
    n = mean ? n - y : n;
    sums.nd[lane] = fmaf(n, d, sums.nd[lane]);
    sums.dd[lane] = fmaf(d, d, sums.dd[lane]);
    sums.nn[lane] = fmaf(n, n, sums.nn[lane]);
    if constexpr (kReference) sums.ww[lane] = fmaf(x - w, x - w, sums.ww[lane]);
  };
  FLOWDPPO_UNROLL
  for (int step = 0; step < kSteps; ++step) {
    await_step(step);
    FLOWDPPO_NO_UNROLL
    for (int j = step * a.per_thread / kSteps; j < (step + 1) * a.per_thread / kSteps; ++j) {
      const int group = j * threads + thread;
      if (group >= groups) break;
      float x[kCount], y[kCount], n[kCount], w[kCount] = {};
      unpack_held<kLatents>(held.at(0, j), x);
      unpack_held<kLatents>(held.at(1, j), y);
      if constexpr (kReference) unpack_held<kLatents>(held.at(kReferencePiece, j), w);
      noise_of(group, j, n);
      if (kGenerated && a.holds_noise) {
        FLOWDPPO_UNROLL
        for (int piece = 0; piece < kCount / 4; ++piece) {
          store16_shared(held.at(kNoisePiece + piece, j), pack_floats(n, piece));
        }
      }
      FLOWDPPO_UNROLL
      for (int i = 0; i < kCount; ++i) add(x[i], y[i], n[i], w[i], i % 2);
    }
  }
  if (thread < tail) {
    const float w = kReference ? element(a.source.reference, thread) : 0.0f;
    add(element(a.source.current, thread), element(a.source.old, thread), tail_noise(thread), w, 0);
  }

  const RawSums part = block_sum(sums.total(), shared);
  if (thread == 0) store_sums(shared.part, part);
  cluster_barrier();
  if (thread == 0) {
    RawSums total;
    for (int from = 0; from < blocks; ++from) {
      const double* theirs = cluster_shared(shared.part, from);
      total.add({theirs[0], theirs[1], theirs[2], theirs[3]});
    }
    const RowResult<float> result = evaluate<false>(a.source, a.objective, row, total, false, 0.0f);
    const RowNumbers<float> numbers = numbers_of(a.source.step, a.source.form, row);
    const GradFactors factors = gradient_factors<float>(
        result.fields[kGradP], result.fields[kGradQ], result.fields[kGradR], a.factor, numbers.scale, shape.numel,
        a.source.form);
    shared.on_noise = static_cast<float>(factors.noise);
    shared.on_diff = static_cast<float>(factors.diff);
    shared.on_ref = static_cast<float>(factors.ref);
    shared.active = factors.active;
    if (rank == 0) store_sums(a.row_sums + static_cast<int64_t>(row) * kSums, total);
  }
  // also keeps every block until all have read its sums
  cluster_barrier();

  const bool active = shared.active != 0;
  const float on_noise = shared.on_noise, on_diff = shared.on_diff, on_ref = shared.on_ref;
  char* out = static_cast<char*>(a.out) + (static_cast<int64_t>(row) * shape.numel + first) * kItem;
  const auto gradient_of = [&](float x, float y, float n, float w) {
    if (!active) return 0.0f;
    const float through_noise = on_noise * (mean ? n - y : n);
    const float value = fmaf(on_diff, x - y, through_noise);
    return kReference ? fmaf(on_ref, x - w, value) : value;
  };
  FLOWDPPO_NO_UNROLL
  for (int j = 0; j < a.per_thread; ++j) {
    const int group = j * threads + thread;
    if (group >= groups) break;
    float x[kCount] = {}, y[kCount] = {}, n[kCount] = {}, w[kCount] = {}, value[kCount];
    if (active) {
      unpack_held<kLatents>(held.at(0, j), x);
      unpack_held<kLatents>(held.at(1, j), y);
      if constexpr (kReference) unpack_held<kLatents>(held.at(kReferencePiece, j), w);
      if (kGenerated && a.holds_noise) {
        FLOWDPPO_UNROLL
        for (int i = 0; i < kCount; i += 4) {
          const Bytes16 piece = load16_shared(held.at(kNoisePiece + i / 4, j));
          FLOWDPPO_UNROLL
          for (int k = 0; k < 4; ++k) n[i + k] = float_of(piece.word[k]);
        }
      } else {
        noise_of(group, j, n);
      }
    }
    FLOWDPPO_UNROLL
    for (int i = 0; i < kCount; ++i) value[i] = gradient_of(x[i], y[i], n[i], w[i]);
    store_group<kLatents>(out, a.source.current.dtype, group * kCount, value);
  }
  if (thread < tail) {
    const float w = kReference ? element(a.source.reference, thread) : 0.0f;
    const float value = active
        ? gradient_of(element(a.source.current, thread), element(a.source.old, thread), tail_noise(thread), w)
        : 0.0f;
    char* end = static_cast<char*>(a.out) + (static_cast<int64_t>(row) * shape.numel + tail_first) * kItem;
    store_element(end, a.source.current.dtype, thread, value);
  }

  if (rank != 0) return;
  // what the block held is overwritten from here on
  if (!arrives_last(a.tickets, shape.rows(), shared)) return;
  finish_objective<false>(a.source, a.objective, a.row_sums, a.slots, shared);
}

// Calls visit(CompiledVersion) for the versions that have a kernel here; others are a plan's mistake.
template <class Visit>
int with_holding_version(const Version& version, const Visit& visit) {
  return with_version(version, [&](auto compiled) {
    using V = decltype(compiled);
    if constexpr (V::kLatents != Stored::kAny && (V::kNoise == V::kLatents || V::kNoise == Stored::kGenerated)) {
      return visit(compiled);
    } else {
      return kInvalidLaunch;
    }
  });
}

}  // namespace

int policy_loss_and_grad(
    const RowSource<float>& source, const ObjectiveInputs<float>& inputs, const EpilogueOptions& options,
    const ObjectiveResults& results, double factor, void* out, const HoldingPlan& plan, const Workspace& workspace,
    void* stream) {
  const HoldingArguments arguments = {
      source, {inputs, options, results}, factor, out, workspace.tickets, workspace.scratch,
      static_cast<int>(plan.groups), static_cast<int>(plan.per_thread), plan.slots, plan.holds_noise};
  return with_holding_version(version_of(describe(source, out)), [&](auto version) {
    using V = decltype(version);
    return FLOWDPPO_LAUNCH(
        (holding_kernel<V::kLatents, V::kNoise, V::kReference>), plan.shape, static_cast<Stream>(stream), arguments);
  });
}

int holding_clusters(const LaunchShape& shape, int* clusters) {
  return FLOWDPPO_CLUSTERS_AT_ONCE(
      (holding_kernel<Stored::kBFloat16, Stored::kBFloat16, false>), shape, clusters);
}

}  // namespace flowdppo::gpu
