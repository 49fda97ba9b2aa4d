#include "control.h"

#include <string.h>

#include <array>
#include <atomic>

namespace flowdppo::host {

namespace {

constexpr std::array kOperations = {"block_barrier", "cluster_barrier", "warp_shuffle_xor", "take_ticket",
                                    "device_fence"};
constexpr std::array kFaults = {"none", "skip", "always_last", "wrong_lane", "missing_lane"};

struct Buffer {
  const char* begin;
  const char* end;
  char access;
  int64_t loaded;
};

// Kernels' threads read these lists and append to them under the lock; tests change them between launches.
constexpr int kMostSites = 512;
Site sites[kMostSites];
std::atomic<int> site_count;
std::atomic_flag sites_lock = ATOMIC_FLAG_INIT;
std::vector<Buffer> buffers;
std::atomic<int64_t> launches;
std::string first_error, planted, listing;

const char* base_name(const char* path) {
  const char* slash = strrchr(path, '/');
  return slash == nullptr ? path : slash + 1;
}

Fault planted_fault(const Site& site) {
  const std::string prefix = name_of(site) + " ";
  if (planted.compare(0, prefix.size(), prefix) != 0) return Fault::kNone;
  for (size_t i = 0; i < kFaults.size(); ++i) {
    if (planted.substr(prefix.size()) == kFaults[i]) return static_cast<Fault>(i);
  }
  return Fault::kNone;
}

Site* find(Operation operation, const std::source_location& where, int from, int to) {
  for (int i = from; i < to; ++i) {
    // one header gives several strings of the same name
    if (sites[i].line == where.line() && sites[i].operation == operation &&
        (sites[i].file == where.file_name() || strcmp(sites[i].file, where.file_name()) == 0)) {
      return &sites[i];
    }
  }
  return nullptr;
}

}  // namespace

Site& visit(Operation operation, const std::source_location& where) {
  const int known = site_count.load(std::memory_order_acquire);
  Site* site = find(operation, where, 0, known);
  if (site == nullptr) {
    while (sites_lock.test_and_set(std::memory_order_acquire)) {
    }
    const int count = site_count.load(std::memory_order_relaxed);
    site = find(operation, where, known, count);
    if (site == nullptr && count < kMostSites) {
      sites[count] = {operation, where.file_name(), where.line(), Fault::kNone, 0};
      site = &sites[count];
      site->fault = planted_fault(*site);
      site_count.store(count + 1, std::memory_order_release);
    }
    sites_lock.clear(std::memory_order_release);
    if (site == nullptr) fail("more than " + std::to_string(kMostSites) + " places where threads meet");
  }
  __atomic_fetch_add(&site->visits, 1, __ATOMIC_RELAXED);
  return *site;
}

std::string name_of(const Site& site) {
  return std::string(kOperations[static_cast<size_t>(site.operation)]) + " " + base_name(site.file) + ":" +
         std::to_string(site.line);
}

const std::string& error() { return first_error; }

void set_error(const std::string& message) { first_error = message; }

void note_launch() { ++launches; }

void check_range(const void* address, int64_t bytes, Access access) {
  if (buffers.empty()) return;
  const char* at = static_cast<const char*>(address);
  for (Buffer& buffer : buffers) {
    if (at < buffer.begin || at + bytes > buffer.end) continue;
    if (buffer.access == 'x') fail("touched a buffer that it has no business with");
    if (access == Access::kStore && buffer.access == 'r') fail("stored to a buffer that it may only read");
    if (access == Access::kReadOnlyLoad && buffer.access == 'w')
      fail("took a read-only load from a buffer that the launch writes");
    if (access != Access::kStore) __atomic_fetch_add(&buffer.loaded, bytes, __ATOMIC_RELAXED);
    return;
  }
  fail(std::string(access == Access::kStore ? "stored " : "loaded ") + std::to_string(bytes) +
       " bytes that are not inside one buffer");
}

}  // namespace flowdppo::host

using namespace flowdppo::host;

void host_seed(uint64_t seed) { settings().seed = seed; }

void host_limits(int64_t shared_bytes, int cluster) {
  settings().shared_limit = shared_bytes;
  settings().cluster_limit = cluster;
}

const char* host_error() { return first_error.c_str(); }

void host_reset() {
  first_error.clear();
  launches = 0;
  buffers.clear();
  for (int i = 0; i < site_count; ++i) sites[i].visits = 0;
}

int64_t host_launches() { return launches; }

void host_buffer(const void* data, int64_t bytes, char access) {
  const char* begin = static_cast<const char*>(data);
  buffers.push_back({begin, begin + bytes, access, 0});
}

int64_t host_loaded(const void* data) {
  int64_t loaded = 0;
  for (const Buffer& buffer : buffers) {
    if (buffer.begin == data) loaded += buffer.loaded;
  }
  return loaded;
}

const char* host_sites() {
  listing.clear();
  for (int i = 0; i < site_count; ++i) listing += name_of(sites[i]) + " " + std::to_string(sites[i].visits) + "\n";
  return listing.c_str();
}

int host_fault(const char* text) {
  planted = text;
  if (!planted.empty()) {
    const size_t space = planted.rfind(' ');
    bool known = false;
    for (const char* name : kFaults) known = known || planted.substr(space + 1) == name;
    if (space == std::string::npos || !known) return 1;
  }
  for (int i = 0; i < site_count; ++i) sites[i].fault = planted_fault(sites[i]);
  return 0;
}
