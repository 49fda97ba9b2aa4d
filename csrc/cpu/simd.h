// CPU vectors through the GCC/Clang vector extension, as wide as this translation unit's instruction set: arithmetic
// lanes for philox.h, and loads and stores that convert bf16 and fp16. Included by kernels.cpp alone.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "../macros.h"

namespace flowdppo::cpu {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

using FloatV = float __attribute__((vector_size(kVectorBytes)));
using DoubleV = double __attribute__((vector_size(kVectorBytes)));
using IntV = int32_t __attribute__((vector_size(kVectorBytes)));
using UintV = uint32_t __attribute__((vector_size(kVectorBytes)));
using WordV = uint64_t __attribute__((vector_size(kVectorBytes)));
// as many 16-bit numbers as FloatV has lanes
using ShortV = uint16_t __attribute__((vector_size(kVectorBytes / 2)));
using ShortPairV = uint16_t __attribute__((vector_size(kVectorBytes)));

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

template <class Compute>
struct VectorOf;
template <>
struct VectorOf<float> {
  using Type = FloatV;
};
template <>
struct VectorOf<double> {
  using Type = DoubleV;
};
template <class Compute>
using Vector = typename VectorOf<Compute>::Type;
template <class Compute>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(Compute));

template <class V>
FLOWDPPO_HD V load_unaligned(const void* from) {
  V out;
  memcpy(&out, from, sizeof out);
  return out;
}

// intrinsics here and below, because compilers take the generic forms apart
FLOWDPPO_HD UintV widen(ShortV x) {
#if defined(__AVX512F__)
  return (UintV)_mm512_cvtepu16_epi32((__m256i)x);
#elif defined(__AVX2__)
  return (UintV)_mm256_cvtepu16_epi32((__m128i)x);
#elif defined(__SSE2__)
  return (UintV)_mm_unpacklo_epi16(_mm_loadl_epi64((const __m128i*)&x), _mm_setzero_si128());
#else
  return __builtin_convertvector(x, UintV);
#endif
}

// The upper halves of all lanes of a, then of b.
FLOWDPPO_HD ShortPairV pack_upper(UintV a, UintV b) {
#if defined(__AVX512F__)
  const __m512i upper = _mm512_set_epi16(
      63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33,
      31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
  return (ShortPairV)_mm512_permutex2var_epi16((__m512i)a, upper, (__m512i)b);
#elif defined(__AVX2__)
  const __m256i packed = _mm256_packus_epi32((__m256i)(a >> 16), (__m256i)(b >> 16));
  return (ShortPairV)_mm256_permute4x64_epi64(packed, 0xd8);
#elif defined(__SSE2__)
  // packing saturates signed numbers, so they are made signed
  return (ShortPairV)_mm_packs_epi32(_mm_srai_epi32((__m128i)a, 16), _mm_srai_epi32((__m128i)b, 16));
#else
  const ShortV halves[2] = {__builtin_convertvector(a >> 16, ShortV), __builtin_convertvector(b >> 16, ShortV)};
  return load_unaligned<ShortPairV>(halves);
#endif
}

FLOWDPPO_HD FloatV half_to_float(ShortV x) {
#if defined(__AVX512F__)
  return (FloatV)_mm512_cvtph_ps((__m256i)x);
#elif defined(__F16C__)
  return (FloatV)_mm256_cvtph_ps((__m128i)x);
#else
  const UintV h = widen(x), magnitude = h & 0x7fffu, sign = (h & 0x8000u) << 16;
  // exponents are rebiased by 112; infinities and NaN keep all exponent bits
  const UintV normal = (magnitude << 13) + (112u << 23);
  const UintV special = (magnitude << 13) | 0x7f800000u;
  // 0.5 has an ulp of 2^-24, the unit of fp16 subnormals
  const UintV subnormal = (UintV)((FloatV)(magnitude + 0x3f000000u) - 0.5f);
  const UintV finite = magnitude < 0x0400u ? subnormal : normal;
  return (FloatV)(sign | (magnitude >= 0x7c00u ? special : finite));
#endif
}

#if !defined(__F16C__) && !defined(__AVX512F__)
// in the upper half of each lane
FLOWDPPO_HD UintV float_to_half(FloatV x) {
  const UintV bits = (UintV)x, magnitude = bits & 0x7fffffffu, sign = bits & 0x80000000u;
  const UintV normal = (magnitude - (112u << 23) + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13;
  // adding 0.5 rounds to the unit of fp16 subnormals
  const UintV subnormal = (UintV)((FloatV)magnitude + 0.5f) - 0x3f000000u;
  const UintV finite = magnitude < (113u << 23) ? subnormal : normal;
  const UintV nan_or_inf = magnitude > 0x7f800000u ? UintV{} + 0x7e00u : UintV{} + 0x7c00u;
  // 65520 is halfway between the largest fp16 number and the next power of two
  return sign | (magnitude >= 0x477ff000u ? nan_or_inf : finite) << 16;
}
#endif

FLOWDPPO_HD ShortPairV floats_to_halves(FloatV a, FloatV b) {
#if defined(__AVX512F__)
  const __m512i low = _mm512_castsi256_si512(_mm512_cvtps_ph((__m512)a, _MM_FROUND_TO_NEAREST_INT));
  return (ShortPairV)_mm512_inserti64x4(low, _mm512_cvtps_ph((__m512)b, _MM_FROUND_TO_NEAREST_INT), 1);
#elif defined(__F16C__)
  const __m128i high = _mm256_cvtps_ph((__m256)b, _MM_FROUND_TO_NEAREST_INT);
  return (ShortPairV)_mm256_set_m128i(high, _mm256_cvtps_ph((__m256)a, _MM_FROUND_TO_NEAREST_INT));
#else
  return pack_upper(float_to_half(a), float_to_half(b));
#endif
}

// bf16 in the upper half of each lane
FLOWDPPO_HD UintV float_to_bfloat(FloatV x) {
  const UintV bits = (UintV)x;
  // to nearest, ties to even; a NaN must not be rounded up into infinity
  return x != x ? bits | 0x400000u : bits + 0x7fffu + ((bits >> 16) & 1u);
}

FLOWDPPO_HD FloatV load(const float* from) { return load_unaligned<FloatV>(from); }
FLOWDPPO_HD DoubleV load(const double* from) { return load_unaligned<DoubleV>(from); }
FLOWDPPO_HD FloatV load(const BFloat16* from) {
#if defined(__SSE2__) && !defined(__AVX2__)
  return (FloatV)_mm_unpacklo_epi16(_mm_setzero_si128(), _mm_loadl_epi64((const __m128i*)from));
#else
  return (FloatV)(widen(load_unaligned<ShortV>(from)) << 16);
#endif
}
FLOWDPPO_HD FloatV load(const Half* from) { return half_to_float(load_unaligned<ShortV>(from)); }

template <bool kBypassCache, class V>
FLOWDPPO_HD void store_vector(void* to, V x) {
#if defined(__SSE2__)
  if constexpr (kBypassCache) {
#if defined(__AVX512F__)
    _mm512_stream_si512((__m512i*)to, (__m512i)x);
#elif defined(__AVX2__)
    _mm256_stream_si256((__m256i*)to, (__m256i)x);
#else
    _mm_stream_si128((__m128i*)to, (__m128i)x);
#endif
    return;
  }
#endif
  memcpy(to, &x, sizeof x);
}

// Two consecutive vectors, so that 16-bit stores are whole vectors too. Bypassing the caches needs `to` aligned to the
// vector, and a fence() before anybody else reads.
template <bool kBypassCache = false>
FLOWDPPO_HD void store_pair(float* to, FloatV a, FloatV b) {
  store_vector<kBypassCache>(to, a);
  store_vector<kBypassCache>(to + kLanes<float>, b);
}
template <bool kBypassCache = false>
FLOWDPPO_HD void store_pair(double* to, DoubleV a, DoubleV b) {
  store_vector<kBypassCache>(to, a);
  store_vector<kBypassCache>(to + kLanes<double>, b);
}
template <bool kBypassCache = false>
FLOWDPPO_HD void store_pair(BFloat16* to, FloatV a, FloatV b) {
  store_vector<kBypassCache>(to, pack_upper(float_to_bfloat(a), float_to_bfloat(b)));
}
template <bool kBypassCache = false>
FLOWDPPO_HD void store_pair(Half* to, FloatV a, FloatV b) {
  store_vector<kBypassCache>(to, floats_to_halves(a, b));
}

FLOWDPPO_HD void fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

#if defined(__AVX512F__)
#define FLOWDPPO_LOW_LANES 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define FLOWDPPO_HIGH_LANES 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif defined(__AVX2__)
#define FLOWDPPO_LOW_LANES 0, 8, 1, 9, 2, 10, 3, 11
#define FLOWDPPO_HIGH_LANES 4, 12, 5, 13, 6, 14, 7, 15
#else
#define FLOWDPPO_LOW_LANES 0, 4, 1, 5
#define FLOWDPPO_HIGH_LANES 2, 6, 3, 7
#endif

// a0 b0 a1 b1 ... over two vectors
FLOWDPPO_HD void store_interleaved(float* to, FloatV a, FloatV b) {
#if defined(__clang__)
  const FloatV low = __builtin_shufflevector(a, b, FLOWDPPO_LOW_LANES);
  const FloatV high = __builtin_shufflevector(a, b, FLOWDPPO_HIGH_LANES);
#else
  const FloatV low = __builtin_shuffle(a, b, (IntV){FLOWDPPO_LOW_LANES});
  const FloatV high = __builtin_shuffle(a, b, (IntV){FLOWDPPO_HIGH_LANES});
#endif
  store_pair(to, low, high);
}

// philox.h on vectors.
struct VectorLanes {
  using Float = FloatV;
  using Uint = UintV;
  // Philox words live in the low halves of 64-bit lanes; what the high halves hold is never read
  using Word = WordV;
  using Key = uint64_t;

  FLOWDPPO_HD void multiply(Word a, uint32_t b, Word& high, Word& low) {
    const WordV factor = WordV{} + b;
#if defined(__AVX512F__)
    low = (WordV)_mm512_mul_epu32((__m512i)a, (__m512i)factor);
#elif defined(__AVX2__)
    low = (WordV)_mm256_mul_epu32((__m256i)a, (__m256i)factor);
#elif defined(__SSE2__)
    low = (WordV)_mm_mul_epu32((__m128i)a, (__m128i)factor);
#else
    low = (a & 0xffffffffu) * factor;
#endif
    high = low >> 32;
  }
  FLOWDPPO_HD Float signed_to_float(Uint x) { return __builtin_convertvector((IntV)x, FloatV); }
  FLOWDPPO_HD Float to_float(Uint x) {
#if defined(__AVX512F__)
    return (FloatV)_mm512_cvtepu32_ps((__m512i)x);
#else
    // both halves and their scaling are exact, so the sum rounds once, fused or not
    return multiply_add(signed_to_float(x >> 16), 65536.0f, signed_to_float(x & 0xffffu));
#endif
  }
  FLOWDPPO_HD Uint bits(Float x) { return (UintV)x; }
  FLOWDPPO_HD Float from_bits(Uint x) { return (FloatV)x; }
  // one rounding where the instruction set has it; b and c may be scalars
  template <class B, class C>
  FLOWDPPO_HD Float multiply_add(Float a, B b, C c) {
    return a * b + c;
  }
  FLOWDPPO_HD Float square_root(Float x) {
#if defined(__AVX512F__)
    return (FloatV)_mm512_sqrt_ps((__m512)x);
#elif defined(__AVX2__)
    return (FloatV)_mm256_sqrt_ps((__m256)x);
#elif defined(__SSE2__)
    return (FloatV)_mm_sqrt_ps((__m128)x);
#else
    for (int i = 0; i < kLanes<float>; ++i) x[i] = __builtin_sqrtf(x[i]);
    return x;
#endif
  }
  FLOWDPPO_HD Float select(Uint condition, Float yes, Float no) { return condition != 0u ? yes : no; }
};

}  // namespace
}  // namespace flowdppo::cpu
