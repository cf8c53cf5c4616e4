// In the place of torch's header, for counting instructions: one thread, and nothing of torch to link with.
#pragma once

#include <cstdint>

namespace torch::stable {

inline uint32_t get_num_threads() { return 1; }

template <typename Work>
void parallel_for(int64_t begin, int64_t end, int64_t, const Work& work) {
  work(begin, end);
}

}  // namespace torch::stable
