// Reading and writing latents: a group of elements in 16-byte pieces where rows are aligned, single elements elsewhere.
#pragma once

#include "../../csrc/row_source.h"
#include "normals.cuh"
#include "platform.cuh"

namespace flowdppo::gpu {

FLOWDPPO_HD constexpr DType dtype_of(Stored stored) {
  return stored == Stored::kBFloat16 ? DType::kBFloat16 : stored == Stored::kFloat16 ? DType::kFloat16 : DType::kFloat32;
}

template <Stored kStored>
FLOWDPPO_DEVICE float element_of(const char* data, int at) {
  if constexpr (kStored == Stored::kFloat32) {
    return reinterpret_cast<const float*>(data)[at];
  } else {
    const uint16_t bits = reinterpret_cast<const uint16_t*>(data)[at];
    return kStored == Stored::kBFloat16 ? from_bf16(bits) : from_fp16(bits);
  }
}

// kCount consecutive elements in 16-byte pieces, as they lie in memory. What is not stored holds nothing.
template <Stored kStored, int kCount>
struct Group {
  static constexpr bool kWide = kStored == Stored::kFloat32;
  static constexpr int kPieces = kStored == Stored::kGenerated ? 0 : (kWide ? 4 : 2) * kCount / 16;
  Bytes16 pieces[kPieces > 0 ? kPieces : 1];

  FLOWDPPO_DEVICE void load(const char* data, int at) {
    const char* address = data + static_cast<int64_t>(at) * (kWide ? 4 : 2);
    if constexpr (kPieces == 1) {
      pieces[0] = load16_streaming(address);
    } else if constexpr (kPieces == 2) {
      // two pieces of a thread share a sector: the second finds it in the first-level cache
      pieces[0] = load16_keep(address);
      pieces[1] = load16_keep(address + 16);
    }
  }

  FLOWDPPO_DEVICE void unpack(float (&out)[kCount]) const {
    FLOWDPPO_UNROLL
    for (int i = 0; i < kCount; ++i) {
      if constexpr (kWide) {
        out[i] = __uint_as_float(pieces[i / 4].word[i % 4]);
      } else {
        const uint16_t bits = static_cast<uint16_t>(pieces[0].word[i / 2] >> (i % 2 * 16));
        out[i] = kStored == Stored::kBFloat16 ? from_bf16(bits) : from_fp16(bits);
      }
    }
  }
};

// kCount elements of a noise stream from counter `block` on, each of which gives four.
template <int kCount>
FLOWDPPO_DEVICE void generate(const PhiloxKey& key, uint64_t stream, uint64_t block, float (&out)[kCount]) {
  FLOWDPPO_UNROLL
  for (int i = 0; i < kCount; i += 4) {
    float z[4];
    philox_normals_by_hardware(key, stream, block + i / 4, z);
    FLOWDPPO_UNROLL
    for (int k = 0; k < 4; ++k) out[i + k] = z[k];
  }
}

// Whether rows are means, which a seed does not go with: only velocities are known to be.
template <class Version>
FLOWDPPO_DEVICE bool on_means(bool asked) {
  return Version::kNoise != Stored::kGenerated && asked;
}

// kCount elements of each operand: two latents, noise, and a reference where there is one. kGroup: a whole group.
template <int kOfElements, bool kWholeGroup>
struct Values {
  static constexpr int kCount = kOfElements;
  static constexpr bool kGroup = kWholeGroup;
  float x[kCount] = {}, y[kCount] = {}, n[kCount] = {}, w[kCount] = {};
};

// A block's share of a row, from element `first` of it on.
template <class Version>
struct Share {
  static constexpr Stored kLatents = Version::kLatents, kNoise = Version::kNoise;
  static constexpr bool kReference = Version::kReference;
  static constexpr int kCount = group_of(kLatents);
  static constexpr bool kGenerated = kNoise == Stored::kGenerated;
  const char *x, *y, *noise, *reference;
  const PhiloxKey& key;
  uint64_t stream;
  int64_t first;
  int count;
  // false: stored noise is left alone, and is zeros
  bool reads_noise = true;

  template <class Source>
  FLOWDPPO_DEVICE Share(const Source& source, unsigned row, unsigned split, int elements)
      : key(source.streams.key), stream(stream_of(source.streams, row)),
        first(static_cast<int64_t>(split) * elements) {
    const RowShape& shape = source.shape;
    const Operands operands = operands_of(source);
    x = at(operands.first, shape, row);
    y = at(operands.second, shape, row);
    noise = at(operands.noise, shape, row);
    reference = at(operands.reference, shape, row);
    count = static_cast<int>(shape.numel - first < elements ? shape.numel - first : elements);
  }

  struct Loaded {
    Group<kNoise, kCount> noise;
    Group<kLatents, kCount> x, y, reference;
  };

  FLOWDPPO_DEVICE Loaded load(int at) const {
    Loaded group;
    if (reads_noise) group.noise.load(noise, at);
    group.x.load(x, at);
    group.y.load(y, at);
    if constexpr (kReference) group.reference.load(reference, at);
    return group;
  }

  FLOWDPPO_DEVICE Values<kCount, true> values(const Loaded& group, int at) const {
    Values<kCount, true> out;
    group.x.unpack(out.x);
    group.y.unpack(out.y);
    if constexpr (kReference) group.reference.unpack(out.w);
    if constexpr (kGenerated) {
      generate(key, stream, block_of(at), out.n);
    } else {
      if (reads_noise) group.noise.unpack(out.n);
    }
    return out;
  }

  // Zeros from element `length` on.
  FLOWDPPO_DEVICE Values<4, false> few(int at, int length) const {
    Values<4, false> out;
    float drawn[4] = {};
    if constexpr (kGenerated) generate(key, stream, block_of(at), drawn);
    FLOWDPPO_UNROLL
    for (int i = 0; i < 4; ++i) {
      if (i >= length) continue;
      out.x[i] = element_of<kLatents>(x, at + i);
      out.y[i] = element_of<kLatents>(y, at + i);
      if constexpr (kReference) out.w[i] = element_of<kLatents>(reference, at + i);
      if constexpr (kGenerated) {
        out.n[i] = drawn[i];
      } else {
        if (reads_noise) out.n[i] = element_of<kNoise>(noise, at + i);
      }
    }
    return out;
  }

  // Calls use(values, at, length) with this thread's elements. Groups come in pairs, so that the loads of both are
  // under way before the first is used; what fills no group, or all of rows that are not aligned, comes in fours.
  template <class Use>
  FLOWDPPO_DEVICE void walk(bool aligned, const Use& use) const {
    const int step = kStreamThreads * kCount, whole = aligned ? count - count % kCount : 0;
    int at = threadIdx.x * kCount;
    FLOWDPPO_NO_UNROLL
    for (; at + step < whole; at += 2 * step) {
      const Loaded near = load(at), far = load(at + step);
      use(values(near, at), at, kCount);
      use(values(far, at + step), at + step, kCount);
    }
    if (at < whole) use(values(load(at), at), at, kCount);
    FLOWDPPO_NO_UNROLL
    for (int rest = whole + 4 * threadIdx.x; rest < count; rest += 4 * kStreamThreads) {
      const int length = count - rest < 4 ? count - rest : 4;
      use(few(rest, length), rest, length);
    }
  }

 private:
  // the counter of the share's element `at`, a multiple of 4 like `first`
  FLOWDPPO_DEVICE uint64_t block_of(int at) const {
    return static_cast<uint64_t>(first) / 4 + static_cast<unsigned>(at) / 4;
  }

  FLOWDPPO_DEVICE const char* at(const Latents& latents, const RowShape& shape, unsigned row) const {
    if (latents.data == nullptr) return nullptr;
    // rows are fewer than 2^31: 32-bit divisions are several times cheaper
    const unsigned inner = static_cast<unsigned>(shape.inner);
    const unsigned i = inner == 1 ? row : row / inner, j = inner == 1 ? 0 : row % inner;
    const int64_t element = i * latents.stride0 + j * latents.stride1 + first;
    return static_cast<const char*>(latents.data) + element * size_of(latents.dtype);
  }
};

// Writes kCount values as `dtype`; `data` is the first element of the block's share, and their place in it a multiple
// of 8 bytes.
template <int kCount>
FLOWDPPO_DEVICE void store_group(char* data, DType dtype, int at, const float (&values)[kCount]) {
  Bytes16 out;
  if (dtype == DType::kFloat32) {
    FLOWDPPO_UNROLL
    for (int piece = 0; piece < kCount / 4; ++piece) {
      FLOWDPPO_UNROLL
      for (int i = 0; i < 4; ++i) out.word[i] = __float_as_uint(values[4 * piece + i]);
      store16(data + static_cast<int64_t>(at) * 4 + 16 * piece, out);
    }
    return;
  }
  FLOWDPPO_UNROLL
  for (int i = 0; i < kCount / 2; ++i) {
    const float low = values[2 * i], high = values[2 * i + 1];
    out.word[i] = dtype == DType::kBFloat16 ? to_bf16_pair(low, high) : to_fp16_pair(low, high);
  }
  char* address = data + static_cast<int64_t>(at) * 2;
  if constexpr (kCount == 8) {
    store16(address, out);
  } else {
    store8(address, out.word[0], out.word[1]);
  }
}

// The same of a group of Values, or of the `length` elements of what is not one.
template <class V>
FLOWDPPO_DEVICE void store(char* data, DType dtype, int at, int length, const float (&values)[V::kCount]) {
  if constexpr (V::kGroup) {
    store_group(data, dtype, at, values);
  } else {
    FLOWDPPO_UNROLL
    for (int i = 0; i < V::kCount; ++i) {
      if (i >= length) continue;
      const float value = values[i];
      if (dtype == DType::kFloat32) {
        reinterpret_cast<float*>(data)[at + i] = value;
      } else {
        reinterpret_cast<uint16_t*>(data)[at + i] = static_cast<uint16_t>(
            dtype == DType::kBFloat16 ? to_bf16_pair(value, 0.0f) : to_fp16_pair(value, 0.0f));
      }
    }
  }
}

}  // namespace flowdppo::gpu
