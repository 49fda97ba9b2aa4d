// The CUDA implementations of the operators whose schemas flowdppo_fast/ops.py defines, on LibTorch's stable ABI and
// the raw-pointer launchers of kernels/cuda. Nothing here waits for the device.

#include <dlfcn.h>

#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../../kernels/cuda/launchers.h"
#include "../operators.h"

#define FLOWDPPO_CUDA_NAMESPACE C10_CONCATENATE(FLOWDPPO_NAMESPACE, _cuda)

namespace flowdppo {

void binding::check_device(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.is_cuda(), name, ": got a tensor on another device, expected a CUDA GPU; move it there first");
}

namespace cuda {
namespace {

using namespace binding;
using gpu::Plan;

void check(int code, const char* what) {
  STD_TORCH_CHECK(
      code == cudaSuccess, "flowdppo_cuda: ", what, " failed: ", cudaGetErrorString(static_cast<cudaError_t>(code)),
      "; `flowdppo doctor` says for which GPUs the library was built");
}

// Part of torch's CUDA library. Looked up when first needed, so that this library builds and loads without it.
cudaStream_t current_stream(int32_t device) {
  using Function = AOTITorchError (*)(int32_t, void**);
  static const Function function = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return reinterpret_cast<Function>(
        dlsym(library != nullptr ? library : RTLD_DEFAULT, "aoti_torch_get_current_cuda_stream"));
  }();
  STD_TORCH_CHECK(function != nullptr, "flowdppo_cuda: this torch was built without CUDA; install one with it");
  void* stream = nullptr;
  STD_TORCH_CHECK(function(device, &stream) == 0, "flowdppo_cuda: asking torch for the current stream failed");
  return static_cast<cudaStream_t>(stream);
}

// The tensors' device and torch's current stream on it; the device is current while this lives.
class Place {
 public:
  explicit Place(const Tensor& tensor) : device_(tensor.get_device_index()) {
    int current = -1;
    check(cudaGetDevice(&current), "asking for the current device");
    if (current != device_) guard_.emplace(device_);
    stream_ = current_stream(device_);
  }

  int32_t device() const { return device_; }
  cudaStream_t stream() const { return stream_; }

 private:
  int32_t device_;
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
  cudaStream_t stream_;
};

// Counters and scratch memory of a launch. Each stream of each device has its own, zeroed once and kept, for calls of
// the usual size: what a stream runs, it runs one after the other. Under graph capture, where the graph may later run
// beside anything, and for calls beyond that size, it is memory of the call's own, zeroed on the stream.
class Scratch {
 public:
  Scratch(const Place& place, const Tensor& like, const Plan& plan, int64_t rows) {
    const int64_t tickets = gpu::ticket_count(rows), bytes = gpu::scratch_bytes(plan, rows);
    cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
    check(cudaStreamIsCapturing(place.stream(), &capture), "asking whether a graph is captured");
    const bool kept = capture == cudaStreamCaptureStatusNone && tickets <= kKeptTickets && bytes <= kKeptBytes;
    const int64_t ticket_bytes = kept ? kKeptTickets * kTicket : gpu::ceil_div(tickets * kTicket, 16) * 16;
    char* data = kept ? kept_memory(place) : own_memory(place, like, ticket_bytes, bytes);
    workspace_.tickets = reinterpret_cast<unsigned*>(data);
    workspace_.scratch = reinterpret_cast<double*>(data + ticket_bytes);
  }

  const gpu::Workspace& workspace() const { return workspace_; }

 private:
  static constexpr int64_t kTicket = sizeof(unsigned);
  // rows, and 32 bytes for each row and each block, of the largest call that needs no memory of its own
  static constexpr int64_t kKeptTickets = 4096, kKeptBytes = 8192 * 32;

  // Not torch's memory: of its pools, those of graphs and of use_mem_pool must not keep anything alive.
  static char* kept_memory(const Place& place) {
    // never freed: streams outlive whoever could do that
    static std::mutex& mutex = *new std::mutex;
    static auto& all = *new std::map<std::pair<int32_t, unsigned long long>, char*>;
    // not the handle: that of a stream that has ended, with work still under way, may come back as another's
    unsigned long long stream = 0;
    check(cudaStreamGetId(place.stream(), &stream), "asking for the stream's number");
    const std::lock_guard<std::mutex> lock(mutex);
    char*& data = all[std::make_pair(place.device(), stream)];
    if (data == nullptr) {
      const size_t size = kKeptTickets * kTicket + kKeptBytes;
      void* made = nullptr;
      // another thread may be capturing a graph, which is none of this allocation's business
      cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
      check(cudaThreadExchangeStreamCaptureMode(&mode), "preparing an allocation");
      const cudaError_t error = cudaMalloc(&made, size);
      check(cudaThreadExchangeStreamCaptureMode(&mode), "finishing an allocation");
      check(error, "allocating scratch memory");
      check(cudaMemsetAsync(made, 0, size, place.stream()), "clearing scratch memory");
      data = static_cast<char*>(made);
    }
    return data;
  }

  char* own_memory(const Place& place, const Tensor& like, int64_t ticket_bytes, int64_t bytes) {
    own_ = torch::stable::new_empty(like, {ticket_bytes + bytes}, ScalarType::Byte);
    char* data = static_cast<char*>(own_->mutable_data_ptr());
    check(cudaMemsetAsync(data, 0, static_cast<size_t>(ticket_bytes), place.stream()), "clearing counters");
    return data;
  }

  std::optional<Tensor> own_;
  gpu::Workspace workspace_;
};

// Latents as the kernels take them: of one dtype, with noise of that or of float32. Other mixtures are cast in front, to
// float32, which holds all of them exactly; the casts live as long as this.
class OneDtype {
 public:
  OneDtype(const SourceArguments& arguments, RowSource<float>& source) {
    if (!gpu::operands_of(source).mixed()) return;
    cast(arguments.current, source.current);
    cast(arguments.old, source.old);
    cast(arguments.drawn, source.noise);
    cast(arguments.reference, source.reference);
  }

  OneDtype(const SampleArguments& arguments, SampleSource<float>& source) {
    if (!gpu::operands_of(source).mixed()) return;
    cast(arguments.sample, source.sample);
    cast(arguments.velocity, source.velocity);
    cast(arguments.noise, source.noise);
    cast(arguments.previous, source.previous);
  }

 private:
  void cast(const OptionalTensor& tensor, Latents& latents) {
    if (!tensor.has_value() || latents.dtype == DType::kFloat32) return;
    Tensor wide = torch::stable::new_empty(*tensor, tensor->sizes(), ScalarType::Float);
    torch::stable::copy_(wide, *tensor);
    latents = {wide.const_data_ptr(), DType::kFloat32, wide.stride(0), wide.stride(1)};
    casts_.push_back(std::move(wide));
  }

  std::vector<Tensor> casts_;
};

void refuse_double(bool is_double, const char* name) {
  STD_TORCH_CHECK(
      !is_double, name, ": got dtype Double, but the cuda backend computes in float32; use backend='reference', or "
      "backend='triton', for float64");
}

// Its loops have no registers left for a third operand in the residual.
void refuse_matching(const SourceArguments& arguments) {
  STD_TORCH_CHECK(
      arguments.form != static_cast<int64_t>(Form::kMatching),
      "form: got 2 (matching), but the cuda backend has no kernel for it; use backend='triton'");
}

// The summary of no rows, and the loss that it begins with.
void write_nothing(const gpu::ObjectiveResults& results, cudaStream_t stream) {
  static const std::vector<float>& summary = *[] {
    auto* values = new std::vector<float>(kSummaryFields);
    RowSummary().write(values->data());
    return values;
  }();
  const auto copy = [&](float* to, int count) {
    check(
        cudaMemcpyAsync(to, summary.data(), count * sizeof(float), cudaMemcpyHostToDevice, stream),
        "writing the summary of no rows");
  };
  copy(results.summary, kSummaryFields);
  copy(results.loss, 1);
}

// Loss, row results and summary of `count` rows, and where they lie.
struct Results {
  LossTensors tensors;
  gpu::ObjectiveResults pointers;

  Results(const Tensor& like, int64_t count)
      : tensors(
            torch::stable::new_empty(like, std::vector<int64_t>(), ScalarType::Float),
            torch::stable::new_empty(like, {kRowFields, count}, ScalarType::Float),
            torch::stable::new_empty(like, {kSummaryFields}, ScalarType::Float)) {
    auto& [loss, rows, summary] = tensors;
    pointers = {
        loss.mutable_data_ptr<float>(), rows.mutable_data_ptr<float>(), summary.mutable_data_ptr<float>()};
  }
};

// One static function per operator; see csrc/operators.h.
struct Cuda {
  static Tensor row_stats(const SourceArguments& arguments, bool second_moment) {
    refuse_double(arguments.is_double(), "new");
    refuse_matching(arguments);
    RowSource<float> source = arguments.unpack<float>();
    const int64_t rows = source.shape.rows();
    Tensor stats = torch::stable::new_empty(arguments.current, {4, rows}, ScalarType::Float);
    if (rows == 0) return stats;
    const Place place(arguments.current);
    const OneDtype casts(arguments, source);
    const Plan plan = plan_of(source, false);
    const Scratch scratch(place, arguments.current, plan, rows);
    check(
        gpu::row_stats(
            source, second_moment, stats.mutable_data_ptr<float>(), plan, scratch.workspace(), place.stream()),
        "the launch of row_stats");
    return stats;
  }

  static Tensor row_grad(
      const SourceArguments& arguments, const Tensor& coefficients, const Tensor& upstream, double factor) {
    refuse_double(arguments.is_double(), "new");
    refuse_matching(arguments);
    RowSource<float> source = arguments.unpack<float>();
    const int64_t rows = source.shape.rows();
    const float* slopes = row_values<float>(coefficients, 3 * rows, "coefficients");
    const Upstream<float> outer = upstream_of<float>(upstream, rows);
    if (rows == 0) return torch::stable::new_empty(arguments.current, arguments.current.sizes());
    const Place place(arguments.current);
    const OneDtype casts(arguments, source);
    return gradient(arguments.current, source, slopes, outer, factor, place);
  }

  // `grad`: where the gradient goes, null if it is not asked for
  static LossTensors policy_loss(
      const SourceArguments& arguments, const ObjectiveArguments& objective, double factor, Tensor* grad) {
    refuse_double(arguments.is_double(), "new");
    refuse_matching(arguments);
    RowSource<float> source = arguments.unpack<float>();
    const int64_t count = source.shape.rows();
    const ObjectiveInputs<float> inputs = objective.unpack<float>(count);
    const EpilogueOptions options = objective.options();
    const Tensor& like = arguments.current;
    const Results made(like, count);
    const Place place(like);
    if (count == 0) {
      write_nothing(made.pointers, place.stream());
      if (grad != nullptr) *grad = torch::stable::new_empty(like, like.sizes());
      return made.tensors;
    }
    const OneDtype casts(arguments, source);
    const Plan plan = plan_of(source, true);
    const Scratch scratch(place, like, plan, count);
    check(
        gpu::policy_loss(source, inputs, options, made.pointers, plan, scratch.workspace(), place.stream()),
        "the launch of policy_loss");
    if (grad != nullptr) {
      *grad = gradient(like, source, made.pointers.rows + kGradP * count, {nullptr, 0}, factor, place);
    }
    return made.tensors;
  }

  static LossTensors log_prob_loss(const GivenRowArguments& arguments, const ObjectiveArguments& objective) {
    refuse_double(arguments.is_double(), "log_prob");
    const RowSource<float> source = arguments.unpack<float>();
    const ObjectiveInputs<float> inputs = arguments.unpack<float>(objective);
    const EpilogueOptions options = objective.options();
    const int64_t count = source.shape.rows();
    const Results made(arguments.log_prob, count);
    const Place place(arguments.log_prob);
    if (count == 0) {
      write_nothing(made.pointers, place.stream());
      return made.tensors;
    }
    check(gpu::log_prob_loss(source, inputs, options, made.pointers, place.stream()), "the launch of log_prob_loss");
    return made.tensors;
  }

  static StepTensors sde_step(const SampleArguments& arguments, bool with_mean, bool with_log_prob) {
    refuse_double(arguments.is_double(), "sample");
    refuse_double(arguments.next_dtype == ScalarType::Double, "dtype");
    SampleSource<float> source = arguments.unpack<float>();
    const Tensor& like = arguments.sample;
    const int64_t rows = source.shape.rows();
    const bool draws = !arguments.previous.has_value();
    const auto empty = [&](bool wanted, ScalarType type) {
      return wanted ? torch::stable::new_empty(like, like.sizes(), type) : torch::stable::new_empty(like, {0}, type);
    };
    Tensor next = empty(draws, arguments.next_dtype), mean = empty(with_mean, ScalarType::Float);
    Tensor log_prob = torch::stable::new_empty(like, {with_log_prob ? rows : 0}, ScalarType::Float);
    if (rows == 0) return {next, mean, log_prob};
    if (draws) source.next = next.mutable_data_ptr();
    if (with_mean) source.mean = mean.mutable_data_ptr<float>();
    if (with_log_prob) source.log_prob = log_prob.mutable_data_ptr<float>();

    const Place place(like);
    const OneDtype casts(arguments, source);
    const Plan plan = plan_of(source, false);
    std::optional<Scratch> scratch;
    if (with_log_prob) scratch.emplace(place, like, plan, rows);
    check(
        gpu::sde_step(source, plan, scratch.has_value() ? scratch->workspace() : gpu::Workspace(), place.stream()),
        "the launch of sde_step");
    return {next, mean, log_prob};
  }

 private:
  template <class Source>
  static Plan plan_of(const Source& source, bool finishes) {
    const gpu::Version version = gpu::operands_of(source).version();
    return gpu::plan_rows(source.shape.rows(), source.shape.numel, version.latents, finishes);
  }

  // In the dtype of `like`; that of cast latents is float32 before.
  static Tensor gradient(
      const Tensor& like, const RowSource<float>& source, const float* coefficients, const Upstream<float>& upstream,
      double factor, const Place& place) {
    const bool narrows = source.current.dtype != latent_dtype(like.scalar_type(), "new");
    Tensor grad = torch::stable::new_empty(like, like.sizes(), narrows ? ScalarType::Float : like.scalar_type());
    check(
        gpu::row_grad(
            source, coefficients, upstream.data, upstream.stride, factor, grad.mutable_data_ptr(), place.stream()),
        "the launch of row_grad");
    if (!narrows) return grad;
    Tensor narrow = torch::stable::new_empty(like, like.sizes());
    torch::stable::copy_(narrow, grad);
    return narrow;
  }
};

// The architectures that the library was compiled for.
std::string architectures_op() { return FLOWDPPO_CUDA_ARCHS; }

}  // namespace
}  // namespace cuda
}  // namespace flowdppo

STABLE_TORCH_LIBRARY_FRAGMENT(FLOWDPPO_CUDA_NAMESPACE, library) {
  library.def("architectures() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(FLOWDPPO_CUDA_NAMESPACE, CompositeExplicitAutograd, library) {
  library.impl("architectures", TORCH_BOX(&flowdppo::cuda::architectures_op));
}

STABLE_TORCH_LIBRARY_IMPL(FLOWDPPO_CUDA_NAMESPACE, CUDA, library) {
  flowdppo::binding::register_operators<flowdppo::cuda::Cuda>(library);
}

// For backend.py to compare with Python's lists.
extern "C" __attribute__((visibility("default"))) const char* flowdppo_names() { return flowdppo::names(); }
