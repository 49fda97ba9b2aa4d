// The toys without Python, for the sanitizers: toys_main SEED [FAULT]. Ends with 1 and a line on a wrong result.
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include <vector>

#include "control.h"

extern "C" int toy_row_sum(
    const float* in, int64_t rows, int64_t numel, int splits, int threads, int shared_bytes, float* partials,
    unsigned* counters, float* sums);
extern "C" int toy_cluster_sum(const float* in, int64_t blocks, int cluster, int threads, float* out);
extern "C" int toy_reverse(const uint32_t* in, int tiles, int threads, uint32_t* out);

namespace {

int wrong = 0;

void expect(bool right, const char* what) {
  if (right) return;
  printf("%s: wrong result; %s\n", what, host_error());
  wrong = 1;
}

void check_row_sum() {
  const int64_t rows = 3, numel = 1024;
  const int splits = 5;
  std::vector<float> in(rows * numel), partials(rows * splits), sums(rows);
  std::vector<unsigned> counters(rows);
  for (size_t i = 0; i < in.size(); ++i) in[i] = static_cast<float>(i % 17) - 3.0f;
  bool right = toy_row_sum(in.data(), rows, numel, splits, 64, 132, partials.data(), counters.data(), sums.data()) == 0;
  for (int64_t row = 0; row < rows; ++row) {
    float sum = 0.0f;
    for (int64_t i = 0; i < numel; ++i) sum += in[static_cast<size_t>(row * numel + i)];
    // whole numbers: exact in any order
    right = right && sums[static_cast<size_t>(row)] == sum;
  }
  expect(right, "row_sum");
}

void check_cluster_sum() {
  const int threads = 64, cluster = 3, blocks = 6;
  std::vector<float> in(threads * blocks), out(in.size());
  for (size_t i = 0; i < in.size(); ++i) in[i] = static_cast<float>(i % 13);
  bool right = toy_cluster_sum(in.data(), blocks, cluster, threads, out.data()) == 0;
  for (size_t i = 0; i < in.size(); ++i) {
    const size_t first = i / (threads * cluster) * threads * cluster;
    float sum = 0.0f;
    for (size_t j = first; j < first + threads * cluster; ++j) sum += in[j];
    right = right && out[i] == sum;
  }
  expect(right, "cluster_sum");
}

void check_reverse() {
  const int tiles = 5, threads = 64;
  std::vector<uint32_t> in(tiles * threads * 4), out(in.size());
  for (size_t i = 0; i < in.size(); ++i) in[i] = static_cast<uint32_t>(i) + 1;
  bool right = toy_reverse(in.data(), tiles, threads, out.data()) == 0;
  for (size_t i = 0; i < in.size(); ++i) {
    const size_t tile = i / (threads * 4), vector = i / 4 % threads;
    right = right && out[i] == in[(tile * threads + threads - 1 - vector) * 4 + i % 4];
  }
  expect(right, "reverse");
}

}  // namespace

int main(int argc, char** argv) {
  host_seed(argc > 1 ? strtoull(argv[1], nullptr, 10) : 0);
  if (argc > 2 && host_fault(argv[2]) != 0) return 2;
  check_row_sum();
  check_cluster_sum();
  check_reverse();
  fputs(host_sites(), stdout);
  return wrong;
}
