// What the kernels use of CUDA besides the language: instructions behind names, and launches.
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

#include <type_traits>

#include "plan.h"

#define FLOWDPPO_DEVICE __device__ __forceinline__

namespace flowdppo::gpu {

// blockIdx.x where the compiler shall not know it for the same.
FLOWDPPO_DEVICE unsigned block_index_again() {
  unsigned out;
  asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(out));
  return out;
}

// The block's dynamic shared memory; what lies behind a T is reached through pointers from its end.
template <class T>
FLOWDPPO_DEVICE T& shared_memory() {
  extern __shared__ __align__(16) unsigned char flowdppo_shared_memory[];
  return *reinterpret_cast<T*>(flowdppo_shared_memory);
}

// Counts up and returns the number before; after `last` comes 0. Whoever gets `last` sees what each of the others wrote
// before its ticket, and so does its block after a barrier.
FLOWDPPO_DEVICE unsigned take_ticket(unsigned* counter, unsigned last) {
  unsigned before;
  asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(__cvta_generic_to_global(counter)), "r"(last)
               : "memory");
  return before;
}

struct alignas(16) Bytes16 {
  uint32_t word[4];
};

// Inputs that nobody reads again soon; `address` is a multiple of 16, as in all that follow.
FLOWDPPO_DEVICE Bytes16 load16_streaming(const void* address) {
  Bytes16 out;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(out.word[0]), "=r"(out.word[1]), "=r"(out.word[2]), "=r"(out.word[3])
               : "l"(__cvta_generic_to_global(address)));
  return out;
}

FLOWDPPO_DEVICE Bytes16 load16_keep(const void* address) {
  Bytes16 out;
  asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(out.word[0]), "=r"(out.word[1]), "=r"(out.word[2]), "=r"(out.word[3])
               : "l"(__cvta_generic_to_global(address)));
  return out;
}

FLOWDPPO_DEVICE void store16(void* address, Bytes16 value) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(address)),
               "r"(value.word[0]), "r"(value.word[1]), "r"(value.word[2]), "r"(value.word[3])
               : "memory");
}

// `address` is a multiple of 8.
FLOWDPPO_DEVICE void store8(void* address, uint32_t low, uint32_t high) {
  asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(address)), "r"(low), "r"(high)
               : "memory");
}

FLOWDPPO_DEVICE float from_bf16(uint16_t bits) { return __uint_as_float(static_cast<uint32_t>(bits) << 16); }

FLOWDPPO_DEVICE float from_fp16(uint16_t bits) {
  float out;
  asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"(bits));
  return out;
}

// To nearest, ties to even; NaN stays NaN. In pairs `low` comes first in memory.
FLOWDPPO_DEVICE uint32_t to_bf16_pair(float low, float high) {
  uint32_t out;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  return out;
}

FLOWDPPO_DEVICE uint32_t to_fp16_pair(float low, float high) {
  uint32_t out;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  return out;
}

template <class Arguments>
int launch(void (*kernel)(Arguments), const Plan& plan, void* stream, const Arguments& arguments) {
  if (plan.blocks < 1 || plan.blocks > INT32_MAX) return cudaErrorInvalidValue;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(plan.blocks));
  config.blockDim = dim3(static_cast<unsigned>(plan.threads));
  config.dynamicSmemBytes = static_cast<size_t>(plan.shared_bytes);
  config.stream = static_cast<cudaStream_t>(stream);
  return cudaLaunchKernelEx(&config, kernel, arguments);
}

template <Stored kOfLatents, Stored kOfNoise, bool kWithReference>
struct CompiledVersion {
  static constexpr Stored kLatents = kOfLatents, kNoise = kOfNoise;
  static constexpr bool kReference = kWithReference;
};

template <bool kReference, Stored kLatents, class Visit>
FLOWDPPO_DEVICE void with_noise(Stored noise, const Visit& visit) {
  if (noise == Stored::kGenerated) {
    visit(CompiledVersion<kLatents, Stored::kGenerated, kReference>());
  } else if (kLatents != Stored::kFloat32 && noise == Stored::kFloat32) {
    visit(CompiledVersion<kLatents, Stored::kFloat32, kReference>());
  } else {
    visit(CompiledVersion<kLatents, kLatents, kReference>());
  }
}

// Calls visit(CompiledVersion) with the version's types.
template <bool kReference, class Visit>
FLOWDPPO_DEVICE void with_version(const Version& version, const Visit& visit) {
  if (version.latents == Stored::kBFloat16) {
    with_noise<kReference, Stored::kBFloat16>(version.noise, visit);
  } else if (version.latents == Stored::kFloat16) {
    with_noise<kReference, Stored::kFloat16>(version.noise, visit);
  } else {
    with_noise<kReference, Stored::kFloat32>(version.noise, visit);
  }
}

template <class Visit>
FLOWDPPO_DEVICE void with_version(const Version& version, const Visit& visit) {
  if (version.reference) {
    with_version<true>(version, visit);
  } else {
    with_version<false>(version, visit);
  }
}

}  // namespace flowdppo::gpu
