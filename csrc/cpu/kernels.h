// The streaming kernels' interface: plain pointers, one chunk of one row at a time. kernels.cpp is compiled once per
// instruction set; isa.cpp chooses among the tables it yields.
#pragma once

#include <stdint.h>

#include "../row_source.h"

namespace flowdppo::cpu {

// Rows are cut every kChunk elements. The cuts depend on nothing but N, and chunk sums are added in order of position:
// results do not depend on how many threads there are.
constexpr int64_t kChunk = 16384;

// A tensor's elements from the chunk's first on; null data means absent.
struct Operand {
  const void* data = nullptr;
  DType dtype = DType::kFloat32;
};

// Elements first .. first+count of a row. All dtypes are float64 or none is.
struct RowChunk {
  Operand current, old, noise, reference;
  // where noise is absent it is element first.. of this Philox stream
  PhiloxKey key = {};
  uint64_t stream = 0;
  int64_t first = 0, count = 0;
  Form form = Form::kVelocity;
  // where sums() leaves noise that it generates, room for kChunk elements of the accumulation dtype; null: nowhere
  void* noise_out = nullptr;
};

// The same of one sampler step mu = a*x + b*v, x' = mu + S*e.
struct SampleChunk {
  Operand sample, velocity, noise, previous;
  PhiloxKey key = {};
  uint64_t stream = 0;
  int64_t first = 0, count = 0;
  double a = 0.0, b = 0.0, std = 0.0;
  // null: not wanted. mean has the accumulation dtype
  void* next = nullptr;
  DType next_dtype = DType::kFloat32;
  void* mean = nullptr;
  bool with_moment = false;
};

struct Kernels {
  const char* isa;
  // nn is summed only with second_moment, ww only with a reference
  RawSums (*sums)(const RowChunk&, bool second_moment);
  // writes the gradient in current's dtype; `bypass_cache` for outputs much larger than the caches
  void (*gradient)(const RowChunk&, const GradFactors&, void* out, bool bypass_cache);
  // sum of e*e, or of (x' - mu)^2 where x' is given
  double (*sample)(const SampleChunk&);
};

namespace baseline {
const Kernels& kernels();
}
#if defined(FLOWDPPO_X86)
namespace avx2 {
const Kernels& kernels();
}
namespace avx512 {
const Kernels& kernels();
}
#endif

}  // namespace flowdppo::cpu
