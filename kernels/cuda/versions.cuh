// From a Version to the compiled kernel that serves it.
#pragma once

#include "plan.h"

namespace flowdppo::gpu {

template <Stored kOfLatents, Stored kOfNoise, bool kWithReference>
struct CompiledVersion {
  static constexpr Stored kLatents = kOfLatents, kNoise = kOfNoise;
  static constexpr bool kReference = kWithReference;
};

template <Stored kLatents, Stored kNoise, class Visit>
int with_reference(bool reference, const Visit& visit) {
  // mixtures find out at run time
  if constexpr (kLatents != Stored::kAny) {
    if (!reference) return visit(CompiledVersion<kLatents, kNoise, false>());
  }
  return visit(CompiledVersion<kLatents, kNoise, true>());
}

template <Stored kLatents, class Visit>
int with_noise(const Version& version, const Visit& visit) {
  if (version.noise == Stored::kGenerated) {
    return with_reference<kLatents, Stored::kGenerated>(version.reference, visit);
  }
  if constexpr (kLatents != Stored::kAny && kLatents != Stored::kFloat32) {
    if (version.noise == Stored::kFloat32) return with_reference<kLatents, Stored::kFloat32>(version.reference, visit);
  }
  return with_reference<kLatents, kLatents>(version.reference, visit);
}

// Calls visit(CompiledVersion) with the version's types and returns what that returns.
template <class Visit>
int with_version(const Version& version, const Visit& visit) {
  switch (version.latents) {
    case Stored::kFloat32:
      return with_noise<Stored::kFloat32>(version, visit);
    case Stored::kBFloat16:
      return with_noise<Stored::kBFloat16>(version, visit);
    case Stored::kFloat16:
      return with_noise<Stored::kFloat16>(version, visit);
    default:
      return with_noise<Stored::kAny>(version, visit);
  }
}

}  // namespace flowdppo::gpu
