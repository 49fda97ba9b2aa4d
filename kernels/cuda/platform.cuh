// The machine under the kernels: everything that a GPU does and plain C++ does not, behind these names. Kernel sources
// use nothing else of CUDA, so that they also compile as C++ against the tests' execution layer (host_platform.h),
// which has the same names:
//
//   FLOWDPPO_KERNEL, FLOWDPPO_KERNEL_BOUNDS(max_threads, min_blocks), FLOWDPPO_KERNEL_ARGUMENT, FLOWDPPO_DEVICE
//   Stream, LaunchShape, FLOWDPPO_LAUNCH(kernel, shape, stream, arguments) -> error code, 0 is success; kInvalidLaunch
//   FLOWDPPO_CLUSTERS_AT_ONCE(kernel, shape, count) -> error code; how many clusters the device runs at a time
//   thread_index, block_threads, block_index, grid_blocks, lane_index, warp_index
//   block_barrier, warp_shuffle_xor
//   cluster_rank, cluster_blocks, cluster_barrier, cluster_shared
//   shared_memory
//   take_ticket, device_fence, load_fresh
//   Bytes16, load16_streaming, load16_keep, store16, store16_streaming, load16_shared, store16_shared
//   Bytes8, store8
//   async_copy16, async_commit, async_wait
//   from_bf16, from_fp16, to_bf16, to_fp16, to_bf16_pair, to_fp16_pair
#pragma once

#include <stdint.h>

#include "launch_shape.h"

#if !defined(__CUDACC__)
#include "host_platform.h"
#else

#include <cuda_runtime.h>

#include <atomic>

#define FLOWDPPO_KERNEL __global__
#define FLOWDPPO_KERNEL_BOUNDS(max_threads, min_blocks) __launch_bounds__(max_threads, min_blocks)
// of a kernel's one argument, a struct: read in place from constant memory, also where it is indexed
#define FLOWDPPO_KERNEL_ARGUMENT const __grid_constant__
#define FLOWDPPO_DEVICE __device__ __forceinline__

namespace flowdppo::gpu {

using Stream = cudaStream_t;

FLOWDPPO_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
FLOWDPPO_DEVICE int block_threads() { return static_cast<int>(blockDim.x); }
FLOWDPPO_DEVICE int64_t block_index() { return blockIdx.x; }
FLOWDPPO_DEVICE int64_t grid_blocks() { return gridDim.x; }
// A warp is 32 threads, and a block a whole number of warps.
FLOWDPPO_DEVICE int lane_index() { return thread_index() % 32; }
FLOWDPPO_DEVICE int warp_index() { return thread_index() / 32; }

FLOWDPPO_DEVICE void block_barrier() { __syncthreads(); }

// The value of lane (own lane ^ mask); all 32 lanes must call it.
template <class T>
FLOWDPPO_DEVICE T warp_shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

// Without clusters a block is a cluster of its own.
FLOWDPPO_DEVICE int cluster_rank() {
#if __CUDA_ARCH__ >= 900
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
#else
  return 0;
#endif
}

FLOWDPPO_DEVICE int cluster_blocks() {
#if __CUDA_ARCH__ >= 900
  uint32_t count;
  asm volatile("mov.u32 %0, %%cluster_nctaid.x;" : "=r"(count));
  return static_cast<int>(count);
#else
  return 1;
#endif
}

// Of all threads of the cluster; what they wrote to shared memory before it is seen after it.
FLOWDPPO_DEVICE void cluster_barrier() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release;\n\tbarrier.cluster.wait.acquire;" ::: "memory");
#else
  __syncthreads();
#endif
}

// The same object in the shared memory of block `rank` of the cluster, which must not have ended yet.
template <class T>
FLOWDPPO_DEVICE T* cluster_shared(T* local, int rank) {
#if __CUDA_ARCH__ >= 900
  uint64_t address;
  asm("mapa.u64 %0, %1, %2;" : "=l"(address) : "l"(reinterpret_cast<uint64_t>(local)), "r"(rank));
  return reinterpret_cast<T*>(address);
#else
  return local;
#endif
}

// The block's dynamic shared memory; what lies behind a T is reached through pointers from its end.
template <class T>
FLOWDPPO_DEVICE T& shared_memory() {
  extern __shared__ __align__(16) unsigned char flowdppo_shared_memory[];
  return *reinterpret_cast<T*>(flowdppo_shared_memory);
}

// Counts up and returns the number before; after `last` comes 0. Whoever gets `last` sees what the others wrote
// before their device_fence() and ticket.
FLOWDPPO_DEVICE unsigned take_ticket(unsigned* counter, unsigned last) {
  unsigned before;
  asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(__cvta_generic_to_global(counter)), "r"(last)
               : "memory");
  return before;
}

FLOWDPPO_DEVICE void device_fence() { __threadfence(); }

// A scalar that another block of this launch may have written: not from this SM's first-level cache.
template <class T>
FLOWDPPO_DEVICE T load_fresh(const T* address) {
  return __ldcg(address);
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

FLOWDPPO_DEVICE void store16_streaming(void* address, Bytes16 value) {
  asm volatile("st.global.cs.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(address)),
               "r"(value.word[0]), "r"(value.word[1]), "r"(value.word[2]), "r"(value.word[3])
               : "memory");
}

struct alignas(8) Bytes8 {
  uint32_t word[2];
};

// `address` is a multiple of 8.
FLOWDPPO_DEVICE void store8(void* address, Bytes8 value) {
  asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(address)), "r"(value.word[0]),
               "r"(value.word[1])
               : "memory");
}

FLOWDPPO_DEVICE Bytes16 load16_shared(const void* address) {
  const uint4 value = *static_cast<const uint4*>(address);
  return {{value.x, value.y, value.z, value.w}};
}

FLOWDPPO_DEVICE void store16_shared(void* address, Bytes16 value) {
  *static_cast<uint4*>(address) = make_uint4(value.word[0], value.word[1], value.word[2], value.word[3]);
}

// Copies 16 bytes to shared memory without passing through registers. They are there for this thread after the wait
// for their commit group, for others after a barrier behind it.
FLOWDPPO_DEVICE void async_copy16(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(
                   static_cast<uint32_t>(__cvta_generic_to_shared(shared))),
               "l"(__cvta_generic_to_global(global))
               : "memory");
}

// Closes a group of copies.
FLOWDPPO_DEVICE void async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most kPending of this thread's groups are under way.
template <int kPending>
FLOWDPPO_DEVICE void async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
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

FLOWDPPO_DEVICE uint16_t to_bf16(float value) { return static_cast<uint16_t>(to_bf16_pair(value, 0.0f)); }
FLOWDPPO_DEVICE uint16_t to_fp16(float value) { return static_cast<uint16_t>(to_fp16_pair(value, 0.0f)); }

// More shared memory than any GPU gives a block without being asked, and the largest cluster that all of them run.
constexpr int kDefaultSharedBytes = 48 * 1024, kPortableCluster = 8, kMostDevices = 64;

constexpr int kInvalidLaunch = cudaErrorInvalidValue;

// What has to be said once before a kernel may use so much shared memory or so large a cluster.
template <auto kKernel>
int allow(const LaunchShape& shape) {
  // remembered: asking costs as much as a launch
  static std::atomic<int> allowed_bytes[kMostDevices], allowed_cluster[kMostDevices];
  if (shape.shared_bytes <= kDefaultSharedBytes && shape.cluster <= kPortableCluster) return cudaSuccess;
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  if (device >= kMostDevices) return kInvalidLaunch;
  if (allowed_bytes[device].load(std::memory_order_relaxed) < shape.shared_bytes) {
    error = cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shape.shared_bytes);
    if (error != cudaSuccess) return error;
    allowed_bytes[device].store(shape.shared_bytes, std::memory_order_relaxed);
  }
  if (shape.cluster > kPortableCluster && allowed_cluster[device].load(std::memory_order_relaxed) == 0) {
    error = cudaFuncSetAttribute(kKernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    if (error != cudaSuccess) return error;
    allowed_cluster[device].store(1, std::memory_order_relaxed);
  }
  return cudaSuccess;
}

inline cudaLaunchConfig_t configure(const LaunchShape& shape, Stream stream, cudaLaunchAttribute& cluster) {
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = static_cast<unsigned>(shape.cluster);
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(shape.blocks));
  config.blockDim = dim3(static_cast<unsigned>(shape.threads));
  config.dynamicSmemBytes = static_cast<size_t>(shape.shared_bytes);
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = shape.cluster > 1 ? 1 : 0;
  return config;
}

template <auto kKernel, class Arguments>
int launch(const LaunchShape& shape, Stream stream, const Arguments& arguments) {
  if (shape.blocks < 1 || shape.blocks > INT32_MAX) return kInvalidLaunch;
  const int refused = allow<kKernel>(shape);
  if (refused != cudaSuccess) return refused;
  cudaLaunchAttribute cluster;
  const cudaLaunchConfig_t config = configure(shape, stream, cluster);
  return cudaLaunchKernelEx(&config, kKernel, arguments);
}

template <auto kKernel>
int clusters_at_once(const LaunchShape& shape, int* count) {
  const int refused = allow<kKernel>(shape);
  if (refused != cudaSuccess) return refused;
  cudaLaunchAttribute cluster;
  const cudaLaunchConfig_t config = configure(shape, nullptr, cluster);
  return cudaOccupancyMaxActiveClusters(count, kKernel, &config);
}

#define FLOWDPPO_LAUNCH(kernel, shape, stream, arguments) ::flowdppo::gpu::launch<kernel>(shape, stream, arguments)
#define FLOWDPPO_CLUSTERS_AT_ONCE(kernel, shape, count) ::flowdppo::gpu::clusters_at_once<kernel>(shape, count)

}  // namespace flowdppo::gpu

#endif
