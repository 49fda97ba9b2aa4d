// Seeded normals by the functions that a GPU has in hardware. Their errors by the PTX manual: of lg2 2^-22, absolute in
// (1/2, 2) and relative elsewhere; of sin and cos 2^-20.5, absolute, in [-2*pi, 2*pi]; of sqrt an ulp.
#pragma once

#include "../../csrc/philox.h"
#include "platform.cuh"

namespace flowdppo::gpu {

FLOWDPPO_DEVICE float hardware_log2(float x) {
  asm("lg2.approx.ftz.f32 %0, %0;" : "+f"(x));
  return x;
}

FLOWDPPO_DEVICE float hardware_cosine(float x) {
  asm("cos.approx.ftz.f32 %0, %0;" : "+f"(x));
  return x;
}

FLOWDPPO_DEVICE float hardware_sine(float x) {
  asm("sin.approx.ftz.f32 %0, %0;" : "+f"(x));
  return x;
}

FLOWDPPO_DEVICE float hardware_root(float x) {
  asm("sqrt.approx.ftz.f32 %0, %0;" : "+f"(x));
  return x;
}

// Two normals as in philox.h. Near u = 1 the logarithm has an absolute error of 2^-22; from 1 - 2^-11 on, -2*log(u) is
// 2*(1 - u) to 2.4e-7: both are off by the same there, which is 5e-6 in the radius.
FLOWDPPO_DEVICE void box_muller_by_hardware(uint32_t radius_word, uint32_t angle_word, float& cosine, float& sine) {
  const float rounded = static_cast<float>(radius_word), uniform = fmaf(rounded, kUnit, kHalfUnit);
  const float square = hardware_log2(uniform) * -1.38629436f, near = fmaf(rounded, -2.0f * kUnit, 2.0f);
  const float radius = hardware_root(uniform > 0.99951171875f ? near : square);
  // signed turns, in radians: the smaller angle is the more exact one
  const float angle = static_cast<float>(static_cast<int32_t>(angle_word)) * 1.46291808e-9f;
  cosine = radius * hardware_cosine(angle);
  sine = radius * hardware_sine(angle);
}

// The four normals of one counter.
FLOWDPPO_DEVICE void philox_normals_by_hardware(
    const PhiloxKey& key, uint64_t stream, uint64_t block, float (&z)[4]) {
  const PhiloxWords<uint32_t> w = philox_words(key, stream, block);
  box_muller_by_hardware(w.w0, w.w1, z[0], z[1]);
  box_muller_by_hardware(w.w2, w.w3, z[2], z[3]);
}

}  // namespace flowdppo::gpu
