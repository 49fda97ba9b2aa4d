// In place of LibTorch's header: parallel_for on plain threads, so that a sanitizer sees every one of them.
#pragma once

#include <stdint.h>

#include <algorithm>
#include <thread>
#include <vector>

namespace torch::stable {

inline int64_t& thread_count() {
  static int64_t count = 1;
  return count;
}

inline int64_t get_num_threads() { return thread_count(); }

template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& work) {
  if (end <= begin) return;
  const int64_t most = (end - begin + std::max<int64_t>(grain, 1) - 1) / std::max<int64_t>(grain, 1);
  const int64_t threads = std::max<int64_t>(1, std::min(thread_count(), most));
  const int64_t share = (end - begin + threads - 1) / threads;
  std::vector<std::thread> others;
  for (int64_t first = begin + share; first < end; first += share) {
    others.emplace_back([&work, first, last = std::min(first + share, end)] { work(first, last); });
  }
  work(begin, std::min(begin + share, end));
  for (std::thread& other : others) other.join();
}

}  // namespace torch::stable
