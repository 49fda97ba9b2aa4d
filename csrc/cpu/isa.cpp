#include "isa.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#if defined(FLOWDPPO_X86)
#include <cpuid.h>
#endif

namespace flowdppo::cpu {
namespace {

struct Candidate {
  const char* name;
  bool supported;
  const Kernels& (*kernels)();
};

#if defined(FLOWDPPO_X86)
bool has_avx2() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  // not every compiler's __builtin_cpu_supports() knows f16c
  const bool f16c = __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & (1u << 29)) != 0;
  return f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
#endif

const Kernels& choose() {
  const Candidate candidates[] = {
#if defined(FLOWDPPO_X86)
      {"avx512", has_avx512(), avx512::kernels},
      {"avx2", has_avx2(), avx2::kernels},
#endif
      {"baseline", true, baseline::kernels},
  };
  const char* wanted = std::getenv("FLOWDPPO_CPU_ISA");
  std::string usable;
  for (const Candidate& candidate : candidates) {
    if (!candidate.supported) continue;
    if (wanted == nullptr || std::strcmp(wanted, candidate.name) == 0) return candidate.kernels();
    usable += std::string(usable.empty() ? "" : ", ") + candidate.name;
  }
  throw std::runtime_error(
      "FLOWDPPO_CPU_ISA: got '" + std::string(wanted) + "', but this machine and build run " + usable +
      "; choose one of these or unset the variable");
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace flowdppo::cpu
