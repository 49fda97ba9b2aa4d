// Host twin of kernels/cuda/platform.cuh: the same names for kernels that are compiled as plain C++. What a GPU would
// silently get wrong is an error here; see README.md beside this folder.
#pragma once

#include <stdint.h>
#include <string.h>

#include <source_location>

#include "launch_shape.h"
#include "runtime.h"

#define FLOWDPPO_KERNEL inline
#define FLOWDPPO_KERNEL_BOUNDS(max_threads, min_blocks)
#define FLOWDPPO_KERNEL_ARGUMENT const
#define FLOWDPPO_DEVICE inline

namespace flowdppo::gpu {

struct HostStream;
using Stream = HostStream*;
// where an operation is called
using Location = std::source_location;

FLOWDPPO_DEVICE int thread_index() { return host::self().index; }
FLOWDPPO_DEVICE int block_threads() { return host::grid().shape.threads; }
FLOWDPPO_DEVICE int64_t block_index() { return host::self().block->index; }
FLOWDPPO_DEVICE int64_t grid_blocks() { return host::grid().shape.blocks; }
FLOWDPPO_DEVICE int lane_index() { return thread_index() % 32; }
FLOWDPPO_DEVICE int warp_index() { return thread_index() / 32; }

FLOWDPPO_DEVICE void block_barrier(const Location& where = Location::current()) { host::block_barrier(where); }

template <class T>
FLOWDPPO_DEVICE T warp_shuffle_xor(T value, int mask, const Location& where = Location::current()) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  bits = host::shuffle(bits, sizeof value, mask, where);
  memcpy(&value, &bits, sizeof value);
  return value;
}

FLOWDPPO_DEVICE int cluster_rank() { return host::self().block->rank; }
FLOWDPPO_DEVICE int cluster_blocks() { return host::grid().shape.cluster; }
FLOWDPPO_DEVICE void cluster_barrier(const Location& where = Location::current()) { host::cluster_barrier(where); }

template <class T>
FLOWDPPO_DEVICE T* cluster_shared(T* local, int rank) {
  return reinterpret_cast<T*>(host::cluster_shared(local, sizeof(T), rank));
}

template <class T>
FLOWDPPO_DEVICE T& shared_memory() {
  return *reinterpret_cast<T*>(host::shared_memory(sizeof(T), alignof(T)));
}

FLOWDPPO_DEVICE unsigned take_ticket(unsigned* counter, unsigned last, const Location& where = Location::current()) {
  return host::take_ticket(counter, last, where);
}

FLOWDPPO_DEVICE void device_fence(const Location& where = Location::current()) { host::device_fence(where); }

template <class T>
FLOWDPPO_DEVICE T load_fresh(const T* address) {
  return *address;
}

struct alignas(16) Bytes16 {
  uint32_t word[4];
};

struct alignas(8) Bytes8 {
  uint32_t word[2];
};

namespace detail {

// 16 bytes of any type in one access, which the sanitizers see (a memcpy that the compiler expands they may not)
using Words [[gnu::vector_size(16), gnu::may_alias]] = uint32_t;
using HalfOfWords [[gnu::vector_size(8), gnu::may_alias]] = uint32_t;

FLOWDPPO_DEVICE void copy16(void* to, const void* from) {
  *static_cast<Words*>(to) = *static_cast<const Words*>(from);
}

FLOWDPPO_DEVICE Bytes16 load16(const void* address) {
  host::check_global(address, 16, host::Access::kReadOnlyLoad);
  Bytes16 out;
  copy16(&out, address);
  return out;
}

FLOWDPPO_DEVICE void store16(void* address, const Bytes16& value) {
  host::check_global(address, 16, host::Access::kStore);
  copy16(address, &value);
}

}  // namespace detail

FLOWDPPO_DEVICE Bytes16 load16_streaming(const void* address) { return detail::load16(address); }
FLOWDPPO_DEVICE Bytes16 load16_keep(const void* address) { return detail::load16(address); }
FLOWDPPO_DEVICE void store16(void* address, Bytes16 value) { detail::store16(address, value); }
FLOWDPPO_DEVICE void store16_streaming(void* address, Bytes16 value) { detail::store16(address, value); }

FLOWDPPO_DEVICE void store8(void* address, Bytes8 value) {
  host::check_global(address, 8, host::Access::kStore);
  *static_cast<detail::HalfOfWords*>(address) = detail::HalfOfWords{value.word[0], value.word[1]};
}

FLOWDPPO_DEVICE Bytes16 load16_shared(const void* address) {
  host::check_shared(address, sizeof(Bytes16));
  Bytes16 out;
  detail::copy16(&out, address);
  return out;
}

FLOWDPPO_DEVICE void store16_shared(void* address, Bytes16 value) {
  host::check_shared(address, sizeof(Bytes16));
  detail::copy16(address, &value);
}

// Lands at the last moment, in async_wait(). Until then its place holds poison: a reader or writer that comes too early
// shows, on either side.
FLOWDPPO_DEVICE void async_copy16(void* shared, const void* global) {
  host::check_shared(shared, sizeof(Bytes16));
  host::check_global(global, 16, host::Access::kLoad);
  host::begin_copy(shared, global);
  constexpr Bytes16 poison = {{~0u, ~0u, ~0u, ~0u}};
  detail::copy16(shared, &poison);
}

FLOWDPPO_DEVICE void async_commit() { ++host::self().group; }

template <int kPending>
FLOWDPPO_DEVICE void async_wait() {
  int count = 0;
  const host::Copy* due = host::due_copies(kPending, count);
  for (int i = 0; i < count; ++i) detail::copy16(due[i].to, due[i].from);
  host::forget_copies(count);
}

FLOWDPPO_DEVICE float from_bf16(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float out;
  memcpy(&out, &wide, sizeof out);
  return out;
}

FLOWDPPO_DEVICE float from_fp16(uint16_t bits) {
  const uint32_t sign = (bits & 0x8000u) << 16, exponent = (bits >> 10) & 31u, fraction = bits & 0x3ffu;
  // below 2^-14 numbers are multiples of 2^-24
  if (exponent == 0) return static_cast<float>(fraction) * (sign != 0 ? -0x1p-24f : 0x1p-24f);
  const uint32_t wide = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112u) << 23) | fraction << 13;
  float out;
  memcpy(&out, &wide, sizeof out);
  return out;
}

FLOWDPPO_DEVICE uint16_t to_bf16(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  if (value != value) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

FLOWDPPO_DEVICE uint16_t to_fp16(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  if (value != value) return 0x7fff;
  bits &= 0x7fffffffu;
  // from halfway between the largest number and the next one on
  if (bits >= 0x477ff000u) return sign | 0x7c00;
  if (bits < 0x38800000u) {
    // adding 1/2 leaves multiples of 2^-24 and rounds as it should
    float small;
    memcpy(&small, &bits, sizeof small);
    small += 0.5f;
    memcpy(&bits, &small, sizeof bits);
    return static_cast<uint16_t>(sign | (bits - 0x3f000000u));
  }
  bits += 0xfffu + ((bits >> 13) & 1u);
  return static_cast<uint16_t>(sign | ((bits - 0x38000000u) >> 13));
}

FLOWDPPO_DEVICE uint32_t to_bf16_pair(float low, float high) {
  return to_bf16(low) | static_cast<uint32_t>(to_bf16(high)) << 16;
}

FLOWDPPO_DEVICE uint32_t to_fp16_pair(float low, float high) {
  return to_fp16(low) | static_cast<uint32_t>(to_fp16(high)) << 16;
}

constexpr int kInvalidLaunch = 1;

template <auto kKernel, class Arguments>
int launch(const char* name, const LaunchShape& shape, Stream, const Arguments& arguments) {
  // kernels see the arguments as they were at the launch
  Arguments copy = arguments;
  return host::run_grid(
      name, {shape.blocks, shape.threads, shape.cluster, shape.shared_bytes},
      [](void* copied) { kKernel(*static_cast<const Arguments*>(copied)); }, &copy);
}

// Nothing limits them here.
template <auto kKernel>
int clusters_at_once(const LaunchShape& shape, int* count) {
  *count = static_cast<int>(shape.blocks / shape.cluster);
  return 0;
}

#define FLOWDPPO_LAUNCH(kernel, shape, stream, arguments) \
  ::flowdppo::gpu::launch<kernel>(#kernel, shape, stream, arguments)
#define FLOWDPPO_CLUSTERS_AT_ONCE(kernel, shape, count) ::flowdppo::gpu::clusters_at_once<kernel>(shape, count)

}  // namespace flowdppo::gpu
