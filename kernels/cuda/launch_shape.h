// How a kernel is launched; everything is on grid axis x.
#pragma once

#include <stdint.h>

namespace flowdppo::gpu {

struct LaunchShape {
  int64_t blocks = 0;
  // a multiple of 32
  int threads = 0;
  // blocks that share their shared memory; `blocks` is a multiple of it
  int cluster = 1;
  int shared_bytes = 0;
};

}  // namespace flowdppo::gpu
