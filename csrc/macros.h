// What lets one header serve the host compiler and nvcc.
#pragma once

#if defined(__CUDACC__)
#define FLOWDPPO_HD static __host__ __device__ __forceinline__
#define FLOWDPPO_HD_MEMBER __host__ __device__ __forceinline__
#define FLOWDPPO_UNROLL _Pragma("unroll")
#define FLOWDPPO_NO_UNROLL _Pragma("unroll 1")
// what touches memory behind it stays behind it: keeps nvcc from loading everything first, into registers it lacks
#define FLOWDPPO_IN_ORDER asm volatile("" ::: "memory")
#else
#define FLOWDPPO_NO_UNROLL
#define FLOWDPPO_IN_ORDER
// static and always inlined: translation units built for different instruction sets must never share a copy
#define FLOWDPPO_HD static inline __attribute__((always_inline))
#define FLOWDPPO_HD_MEMBER inline __attribute__((always_inline))
#if defined(__clang__)
#define FLOWDPPO_UNROLL _Pragma("unroll")
#else
#define FLOWDPPO_UNROLL _Pragma("GCC unroll 16")
#endif
#endif
