// Reading and writing latents: a group of elements in 16-byte pieces where rows are aligned, single elements elsewhere.
#pragma once

#include "../../csrc/row_source.h"
#include "normals.cuh"
#include "plan.h"
#include "platform.cuh"

namespace flowdppo::gpu {

FLOWDPPO_DEVICE float float_of(uint32_t word) {
  float out;
  memcpy(&out, &word, sizeof out);
  return out;
}

FLOWDPPO_DEVICE uint32_t bits_of(float value) {
  uint32_t out;
  memcpy(&out, &value, sizeof out);
  return out;
}

// One operand from the first element of a block's share on.
struct Operand {
  const char* data;
  DType dtype;
};

FLOWDPPO_DEVICE Operand operand_at(const Latents& latents, const RowShape& shape, unsigned row, int64_t first) {
  if (latents.data == nullptr) return {nullptr, latents.dtype};
  // rows are fewer than 2^31: 32-bit divisions are several times cheaper
  const unsigned inner = static_cast<unsigned>(shape.inner);
  const unsigned i = inner == 1 ? row : row / inner, j = inner == 1 ? 0 : row % inner;
  const int64_t element = i * latents.stride0 + j * latents.stride1 + first;
  return {static_cast<const char*>(latents.data) + element * size_of(latents.dtype), latents.dtype};
}

FLOWDPPO_DEVICE float element_of(const Operand& operand, int at) {
  if (operand.dtype == DType::kFloat32) return reinterpret_cast<const float*>(operand.data)[at];
  const uint16_t bits = reinterpret_cast<const uint16_t*>(operand.data)[at];
  return operand.dtype == DType::kBFloat16 ? from_bf16(bits) : from_fp16(bits);
}

// kCount consecutive elements in 16-byte pieces, as they lie in memory.
template <Stored kStored, int kCount>
struct Group {
  static constexpr bool kWide = kStored == Stored::kFloat32, kAny = kStored == Stored::kAny;
  static constexpr int kPieces = (kWide || kAny ? 4 : 2) * kCount / 16;
  Bytes16 pieces[kPieces];

  FLOWDPPO_DEVICE void load(const Operand& operand, int at) {
    if constexpr (kAny) {
      const bool wide = operand.dtype == DType::kFloat32;
      const char* address = operand.data + static_cast<int64_t>(at) * (wide ? 4 : 2);
      pieces[0] = load16_keep(address);
      // a 16-bit group is one piece
      pieces[1] = wide ? load16_keep(address + 16) : Bytes16{};
    } else if constexpr (kPieces == 1) {
      pieces[0] = load16_streaming(operand.data + static_cast<int64_t>(at) * (16 / kCount));
    } else {
      // two pieces of a thread share a sector: the second finds it in the first-level cache
      const char* address = operand.data + static_cast<int64_t>(at) * 4;
      pieces[0] = load16_keep(address);
      pieces[1] = load16_keep(address + 16);
    }
  }

  FLOWDPPO_DEVICE void unpack(DType dtype, float (&out)[kCount]) const {
    if constexpr (kWide) {
      unpack_floats(out);
    } else if constexpr (kStored == Stored::kBFloat16) {
      unpack_halves<true>(out);
    } else if constexpr (kStored == Stored::kFloat16) {
      unpack_halves<false>(out);
    } else if (dtype == DType::kFloat32) {
      unpack_floats(out);
    } else if (dtype == DType::kBFloat16) {
      unpack_halves<true>(out);
    } else {
      unpack_halves<false>(out);
    }
  }

 private:
  FLOWDPPO_DEVICE void unpack_floats(float (&out)[kCount]) const {
    FLOWDPPO_UNROLL
    for (int i = 0; i < kCount; ++i) out[i] = float_of(pieces[i / 4].word[i % 4]);
  }

  template <bool kBFloat16>
  FLOWDPPO_DEVICE void unpack_halves(float (&out)[kCount]) const {
    FLOWDPPO_UNROLL
    for (int i = 0; i < kCount; ++i) {
      const uint16_t bits = static_cast<uint16_t>(pieces[0].word[i / 2 % 4] >> (i % 2 * 16));
      out[i] = kBFloat16 ? from_bf16(bits) : from_fp16(bits);
    }
  }
};

// Noise that is not stored holds nothing.
template <int kCount>
struct Group<Stored::kGenerated, kCount> {
  FLOWDPPO_DEVICE void load(const Operand&, int) {}
  FLOWDPPO_DEVICE void unpack(DType, float (&)[kCount]) const {}
};

template <int kCount>
FLOWDPPO_DEVICE Bytes16 pack_halves(bool bfloat16, const float (&values)[kCount]) {
  Bytes16 out;
  FLOWDPPO_UNROLL
  for (int i = 0; i < 4; ++i) {
    const float low = values[2 * i % kCount], high = values[(2 * i + 1) % kCount];
    out.word[i] = bfloat16 ? to_bf16_pair(low, high) : to_fp16_pair(low, high);
  }
  return out;
}

template <int kCount>
FLOWDPPO_DEVICE Bytes16 pack_floats(const float (&values)[kCount], int piece) {
  Bytes16 out;
  FLOWDPPO_UNROLL
  for (int i = 0; i < 4; ++i) out.word[i] = bits_of(values[4 * piece + i]);
  return out;
}

// Writes a group as kStored, or as `dtype` where that is kAny; `data` is the first element of the block's share.
template <Stored kStored, int kCount>
FLOWDPPO_DEVICE void store_group(char* data, DType dtype, int at, const float (&values)[kCount]) {
  const bool wide = kStored == Stored::kFloat32 || (kStored == Stored::kAny && dtype == DType::kFloat32);
  if (wide) {
    FLOWDPPO_UNROLL
    for (int piece = 0; piece < kCount / 4; ++piece) {
      store16(data + static_cast<int64_t>(at) * 4 + 16 * piece, pack_floats(values, piece));
    }
    return;
  }
  const bool bfloat16 = kStored == Stored::kBFloat16 || (kStored == Stored::kAny && dtype == DType::kBFloat16);
  const Bytes16 packed = pack_halves(bfloat16, values);
  char* address = data + static_cast<int64_t>(at) * 2;
  if constexpr (kCount == 8) {
    store16(address, packed);
  } else {
    store8(address, {packed.word[0], packed.word[1]});
  }
}

FLOWDPPO_DEVICE void store_element(char* data, DType dtype, int at, float value) {
  if (dtype == DType::kFloat32) {
    reinterpret_cast<float*>(data)[at] = value;
  } else {
    reinterpret_cast<uint16_t*>(data)[at] = dtype == DType::kBFloat16 ? to_bf16(value) : to_fp16(value);
  }
}

// Elements first .. first+kCount-1 of a noise stream; `first` is a multiple of 4.
template <int kCount>
FLOWDPPO_DEVICE void generate(uint64_t seed, uint64_t stream, int64_t first, float (&out)[kCount]) {
  FLOWDPPO_UNROLL
  for (int i = 0; i < kCount; i += 4) {
    float z[4];
    philox_normals_by_hardware(seed, stream, static_cast<uint64_t>(first + i) / 4, z);
    FLOWDPPO_UNROLL
    for (int k = 0; k < 4; ++k) out[i + k] = z[k];
  }
}

// Spreads a block's share over its threads. Groups come in pairs, so that the loads of both are under way before the
// first is used; what fills no group, or all of rows that are not aligned, comes in fours (`few`).
template <int kCount, class Pair, class One, class Few>
FLOWDPPO_DEVICE void walk(int count, bool aligned, const Pair& pair, const One& one, const Few& few) {
  const int step = block_threads() * kCount, whole = aligned ? count - count % kCount : 0;
  int at = thread_index() * kCount;
  FLOWDPPO_NO_UNROLL
  for (; at + step < whole; at += 2 * step) pair(at, at + step);
  if (at < whole) one(at);
  FLOWDPPO_NO_UNROLL
  for (int rest = whole + 4 * thread_index(); rest < count; rest += 4 * block_threads()) {
    few(rest, count - rest < 4 ? count - rest : 4);
  }
}

}  // namespace flowdppo::gpu
