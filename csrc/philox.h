// Counter-based Gaussian noise: Philox4x32-7 (Salmon et al., SC 2011) and Box-Muller. The definition is in
// flowdppo_fast/noise.py; this is its twin for scalars and, through `Lanes`, for CPU vectors. GPUs share the words and
// have a Box-Muller of their own (kernels/cuda/normals.cuh).
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "macros.h"

namespace flowdppo {

constexpr float kUnit = 0x1p-32f, kHalfUnit = 0x1p-33f;

// The few operations the arithmetic below is written in; cpu/simd.h has the same for vectors.
struct ScalarLanes {
  using Float = float;
  using Uint = uint32_t;
  // of Philox
  using Word = uint32_t;
  using Key = uint32_t;

  FLOWDPPO_HD void multiply(Word a, uint32_t b, Word& high, Word& low) {
    const uint64_t product = static_cast<uint64_t>(a) * b;
    high = static_cast<uint32_t>(product >> 32);
    low = static_cast<uint32_t>(product);
  }
  FLOWDPPO_HD Float to_float(Uint x) { return static_cast<float>(x); }
  // of the bits of a signed integer
  FLOWDPPO_HD Float signed_to_float(Uint x) { return static_cast<float>(static_cast<int32_t>(x)); }
  FLOWDPPO_HD Uint bits(Float x) {
    Uint out;
    memcpy(&out, &x, sizeof out);
    return out;
  }
  FLOWDPPO_HD Float from_bits(Uint x) {
    Float out;
    memcpy(&out, &x, sizeof out);
    return out;
  }
  FLOWDPPO_HD Float multiply_add(Float a, Float b, Float c) { return fmaf(a, b, c); }
  FLOWDPPO_HD Float square_root(Float x) { return sqrtf(x); }
  FLOWDPPO_HD Float select(Uint condition, Float yes, Float no) { return condition != 0 ? yes : no; }
};

constexpr int kPhiloxRounds = 7;

// The keys of all rounds, which follow from the seed: made once, so that no generator does it per counter.
struct PhiloxKey {
  uint32_t low[kPhiloxRounds], high[kPhiloxRounds];
};

FLOWDPPO_HD PhiloxKey philox_key(uint64_t seed) {
  PhiloxKey out = {};
  uint32_t low = static_cast<uint32_t>(seed), high = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    out.low[round] = low;
    out.high[round] = high;
    low += 0x9E3779B9u;
    high += 0xBB67AE85u;
  }
  return out;
}

template <class Word>
struct PhiloxWords {
  Word w0, w1, w2, w3;
};

template <class Lanes>
FLOWDPPO_HD PhiloxWords<typename Lanes::Word> philox4x32(
    PhiloxWords<typename Lanes::Word> counter, const PhiloxKey& key) {
  using Word = typename Lanes::Word;
  using Key = typename Lanes::Key;
  FLOWDPPO_UNROLL
  for (int round = 0; round < kPhiloxRounds; ++round) {
    Word high0, high1, low0, low1;
    Lanes::multiply(counter.w0, 0xD2511F53u, high0, low0);
    Lanes::multiply(counter.w2, 0xCD9E8D57u, high1, low1);
    counter = {
        high1 ^ counter.w1 ^ static_cast<Key>(key.low[round]), low1,
        high0 ^ counter.w3 ^ static_cast<Key>(key.high[round]), low0};
  }
  return counter;
}

// -2*log(u), u in [2^-33, 1]: accurate to a few ulp also next to u = 1, where radii are small. Polynomials here are
// minimax fits whose coefficients were rounded to float32.
template <class Lanes>
FLOWDPPO_HD typename Lanes::Float minus_two_log(typename Lanes::Float u) {
  using Float = typename Lanes::Float;
  // u = 2^exponent * (1 + f), 1 + f in [sqrt(1/2), sqrt(2))
  const typename Lanes::Uint biased = Lanes::bits(u) + (0x3f800000u - 0x3f3504f3u);
  const Float exponent = Lanes::signed_to_float((biased >> 23) - 127u);
  const Float f = Lanes::from_bits((biased & 0x007fffffu) + 0x3f3504f3u) - 1.0f;
  Float tail = Lanes::multiply_add(f, 0.15268987f, -0.2552315f);
  tail = Lanes::multiply_add(tail, f, 0.26320365f);
  tail = Lanes::multiply_add(tail, f, -0.28403518f);
  tail = Lanes::multiply_add(tail, f, 0.33246714f);
  tail = Lanes::multiply_add(tail, f, -0.40002453f);
  tail = Lanes::multiply_add(tail, f, 0.5000164f);
  tail = Lanes::multiply_add(tail, f, -0.6666666f);
  const Float square = f * f;
  const Float curved = Lanes::multiply_add(square * f, tail, square);
  return Lanes::multiply_add(exponent, -1.38629436f, Lanes::multiply_add(f, -2.0f, curved));
}

// Two normals: radius sqrt(-2*log(u)) for u = radius_word * 2^-32 + 2^-33, where the word and the sum are rounded to
// float32, and angle_word * 2^-32 turns.
template <class Lanes>
FLOWDPPO_HD void box_muller(
    typename Lanes::Uint radius_word,
    typename Lanes::Uint angle_word,
    typename Lanes::Float& cosine,
    typename Lanes::Float& sine) {
  using Float = typename Lanes::Float;
  using Uint = typename Lanes::Uint;
  const Float uniform = Lanes::multiply_add(Lanes::to_float(radius_word), kUnit, kHalfUnit);
  const Float radius = Lanes::square_root(minus_two_log<Lanes>(uniform));
  // with an eighth of a turn added, the two top bits number the nearest quarter turn, and the rest is what is left of
  // it in quarter turns, [-1/2, 1/2): exact in integers
  const Uint shifted = angle_word + 0x20000000u;
  const Float r = Lanes::signed_to_float((shifted << 2) ^ 0x80000000u) * kUnit;
  const Float z = r * r;
  Float s = Lanes::multiply_add(z, -0.0046859714f, 0.079712525f);
  s = Lanes::multiply_add(s, z, -0.64596665f);
  s = Lanes::multiply_add(s, z, 1.5707964f) * r;
  Float c = Lanes::multiply_add(z, 0.0008944864f, -0.020855596f);
  c = Lanes::multiply_add(c, z, 0.25366855f);
  c = Lanes::multiply_add(c, z, -1.2337005f);
  c = Lanes::multiply_add(c, z, 1.0f);
  const Uint odd = shifted & 0x40000000u;
  const Uint sign_of_cosine = (shifted + 0x40000000u) & 0x80000000u, sign_of_sine = shifted & 0x80000000u;
  const Float unsigned_cosine = Lanes::select(odd, s, c), unsigned_sine = Lanes::select(odd, c, s);
  cosine = radius * Lanes::from_bits(Lanes::bits(unsigned_cosine) ^ sign_of_cosine);
  sine = radius * Lanes::from_bits(Lanes::bits(unsigned_sine) ^ sign_of_sine);
}

FLOWDPPO_HD void box_muller_words(uint32_t radius_word, uint32_t angle_word, float& cosine, float& sine) {
  box_muller<ScalarLanes>(radius_word, angle_word, cosine, sine);
}

// For float64 latents; speed does not matter there.
FLOWDPPO_HD void box_muller_words(uint32_t radius_word, uint32_t angle_word, double& cosine, double& sine) {
  const float uniform = fmaf(static_cast<float>(radius_word), kUnit, kHalfUnit);
  const double radius = sqrt(-2.0 * log(static_cast<double>(uniform)));
  const double angle = angle_word * (0x1p-32 * 6.283185307179586476925286766559);
  cosine = radius * cos(angle);
  sine = radius * sin(angle);
}

FLOWDPPO_HD PhiloxWords<uint32_t> philox_words(const PhiloxKey& key, uint64_t stream, uint64_t block) {
  const uint32_t block_low = static_cast<uint32_t>(block), block_high = static_cast<uint32_t>(block >> 32);
  const uint32_t stream_low = static_cast<uint32_t>(stream), stream_high = static_cast<uint32_t>(stream >> 32);
  return philox4x32<ScalarLanes>({block_low, block_high, stream_low, stream_high}, key);
}

// The four normals of one counter: elements 4*block .. 4*block+3 of the row that reads `stream`.
template <class T>
FLOWDPPO_HD void philox_normals(const PhiloxKey& key, uint64_t stream, uint64_t block, T (&z)[4]) {
  const PhiloxWords<uint32_t> w = philox_words(key, stream, block);
  box_muller_words(w.w0, w.w1, z[0], z[1]);
  box_muller_words(w.w2, w.w3, z[2], z[3]);
}

}  // namespace flowdppo
