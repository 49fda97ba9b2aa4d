// Which build of the streaming kernels runs.
#pragma once

#include "kernels.h"

namespace flowdppo::cpu {

// The widest instruction set this machine has, or the one that FLOWDPPO_CPU_ISA names (baseline, avx2, avx512); chosen
// at the first call. Throws std::runtime_error when the variable names something unknown or unsupported here.
const Kernels& kernels();

}  // namespace flowdppo::cpu
