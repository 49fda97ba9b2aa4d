// Stands in for CUDA's run-time library under the CUDA backend's own binding, launchers and plans, which are compiled
// and linked as they are: launches go to a callback with the kernel's name and its parameters, device memory is the
// process's. Some of torch's functions are wrapped by the linker (`--wrap`), so that the operators take tensors on the
// CPU and every allocation is known.

#include <cuda_runtime_api.h>

#include <cstdint>
#include <cstring>
#include <map>
#include <string>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>

#include "plan.h"

namespace {

using Launch = int (*)(const char* kernel, int64_t blocks, int64_t threads, int64_t shared, void** parameters);
// `what` is the name of an operator of torch that gave the memory, or cudaMalloc
using Allocated = void (*)(const char* what, void* address, int64_t bytes);

Launch launch = nullptr;
Allocated allocated = nullptr;
std::string message;
// what the current stream is, and what it does
struct {
  void* handle = nullptr;
  unsigned long long id = 1;
  bool captures = false;
} stream;
cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;

std::map<const void*, std::string>& kernels() {
  static auto& names = *new std::map<const void*, std::string>;
  return names;
}

cudaError_t fail(const char* why) {
  message = why;
  return cudaErrorInvalidValue;
}

}  // namespace

extern "C" {

// ---- what tests call

void standin_callbacks(Launch on_launch, Allocated on_allocation) {
  launch = on_launch;
  allocated = on_allocation;
}

void standin_message(const char* text) { message = text; }

void standin_stream(void* handle, unsigned long long id, int captures) { stream = {handle, id, captures != 0}; }

// blocks, threads, shared bytes, splits, elements, slots, bytes of scratch memory
void standin_plan(int64_t rows, int64_t numel, int64_t latents, int64_t finishes, int64_t* out) {
  using namespace flowdppo::gpu;
  // negative latents: rows that have none
  const Plan plan =
      latents < 0 ? plan_given_rows(rows) : plan_rows(rows, numel, static_cast<Stored>(latents), finishes != 0);
  const int64_t fields[] = {
      plan.blocks, plan.threads, plan.shared_bytes, plan.splits, plan.elements, plan.slots, scratch_bytes(plan, rows)};
  std::memcpy(out, fields, sizeof fields);
}

// ---- CUDA's run-time library

void** __cudaRegisterFatBinary(void*) {
  static void* handle[4];
  return handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 1; }
void __cudaRegisterFunction(
    void**, const char* host, char*, const char* device, int, uint3*, uint3*, dim3*, dim3*, int*) {
  kernels()[host] = device;
}
// of launches written <<<>>>, which there are none of
unsigned __cudaPushCallConfiguration(dim3, dim3, size_t, void*) { return 1; }
cudaError_t __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) { return cudaErrorNotSupported; }
cudaError_t __cudaGetKernel(void**, const void*) { return cudaErrorNotSupported; }
cudaError_t __cudaLaunchKernel(void*, dim3, dim3, void**, size_t, cudaStream_t) { return cudaErrorNotSupported; }
cudaError_t cudaLaunchKernel(const void*, dim3, dim3, void**, size_t, cudaStream_t) { return cudaErrorNotSupported; }

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function, void** parameters) {
  if (kernels().count(function) == 0) return fail("there is no such kernel");
  if (config->stream != stream.handle) return fail("a launch on another stream than the current one");
  if (config->dynamicSmemBytes > 48 * 1024) return fail("more shared memory than a block has without asking");
  if (config->numAttrs != 0) return fail("launch attributes, which nothing here knows");
  return static_cast<cudaError_t>(launch(
      kernels()[function].c_str(), config->gridDim.x, config->blockDim.x,
      static_cast<int64_t>(config->dynamicSmemBytes), parameters));
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

const char* cudaGetErrorString(cudaError_t) { return message.c_str(); }

cudaError_t cudaStreamIsCapturing(cudaStream_t of, cudaStreamCaptureStatus* status) {
  if (of != stream.handle) return fail("a question about another stream than the current one");
  *status = stream.captures ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

cudaError_t cudaStreamGetId(cudaStream_t of, unsigned long long* id) {
  if (of != stream.handle) return fail("a question about another stream than the current one");
  *id = stream.id;
  return cudaSuccess;
}

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* exchanged) {
  const cudaStreamCaptureMode before = mode;
  mode = *exchanged;
  *exchanged = before;
  return cudaSuccess;
}

// As if another thread were capturing all the time, in the strictest mode.
cudaError_t cudaMalloc(void** address, size_t bytes) {
  if (mode != cudaStreamCaptureModeRelaxed) return fail("an allocation while another thread captures a graph");
  *address = ::operator new(bytes, std::align_val_t(256));
  std::memset(*address, 0xff, bytes);
  allocated("cudaMalloc", *address, static_cast<int64_t>(bytes));
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* address, int value, size_t bytes, cudaStream_t on) {
  if (on != stream.handle) return fail("a memset on another stream than the current one");
  std::memset(address, value, bytes);
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t on) {
  if (on != stream.handle) return fail("a copy on another stream than the current one");
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}

// ---- torch

AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** current) {
  *current = stream.handle;
  return 0;
}

AOTITorchError __real_aoti_torch_library_init_impl(
    const char*, const char*, const char*, uint32_t, TorchLibraryHandle*);
AOTITorchError __wrap_aoti_torch_library_init_impl(
    const char* name, const char* key, const char* file, uint32_t line, TorchLibraryHandle* library) {
  return __real_aoti_torch_library_init_impl(name, std::strcmp(key, "CUDA") == 0 ? "CPU" : key, file, line, library);
}

// The library that was built for GPUs may have defined its own operators before.
AOTITorchError __wrap_aoti_torch_library_def(TorchLibraryHandle, const char*) { return 0; }

AOTITorchError __wrap_aoti_torch_get_device_type(AtenTensorHandle, int32_t* type) {
  *type = aoti_torch_device_type_cuda();
  return 0;
}

AOTITorchError __wrap_aoti_torch_get_device_index(AtenTensorHandle, int32_t* index) {
  *index = 0;
  return 0;
}

AOTITorchError __real_torch_call_dispatcher(const char*, const char*, StableIValue*, uint64_t);
AOTITorchError __wrap_torch_call_dispatcher(
    const char* name, const char* overload, StableIValue* stack, uint64_t version) {
  const AOTITorchError error = __real_torch_call_dispatcher(name, overload, stack, version);
  if (error != 0 || std::strncmp(name, "aten::new_", 10) != 0) return error;
  AtenTensorHandle tensor;
  std::memcpy(&tensor, stack, sizeof tensor);
  void* address = nullptr;
  int64_t bytes = 0;
  aoti_torch_get_data_ptr(tensor, &address);
  aoti_torch_get_storage_size(tensor, &bytes);
  // what nobody writes is NaN
  if (std::strcmp(name, "aten::new_empty") == 0) std::memset(address, 0xff, static_cast<size_t>(bytes));
  allocated(name, address, bytes);
  return error;
}

}  // extern "C"
