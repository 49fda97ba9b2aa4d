// What a test sets before a launch and asks after it.
#pragma once

#include <stdint.h>

#include <string>

#include "runtime.h"

namespace flowdppo::host {

constexpr unsigned char kPoisonByte = 0xff, kZoneByte = 0xa5;

// The first error since clear_error(); a failed launch returns 1.
const std::string& error();

void note_launch();

// An access to global memory: inside a registered buffer, if any is registered, and as that one allows. Loads of 16
// bytes are counted.
void check_range(const void* address, int64_t bytes, Access access);

}  // namespace flowdppo::host

// For ctypes and the drivers.
extern "C" {
// The order of blocks and threads of the next launches; 0 is in order.
void host_seed(uint64_t seed);
void host_limits(int64_t shared_bytes, int cluster);
// "" if there was no error since the last host_reset(), which also forgets launches, sites' visits and buffers.
const char* host_error();
void host_reset();
int64_t host_launches();
// A buffer that kernels may use: 'r' read once or more, 'w' read and written, 'x' not touched by 16-byte loads and
// stores.
void host_buffer(const void* data, int64_t bytes, char access);
// Bytes of the buffer that 16-byte loads took.
int64_t host_loaded(const void* data);
// Lines "operation file:line visits" of all sites since the library was loaded; visits since the last host_reset().
const char* host_sites();
// Plants a fault: "operation file:line fault"; "" removes it. 0, or 1 for text that is not understood.
int host_fault(const char* text);
}
