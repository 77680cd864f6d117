// cp.async: what a thread has under way.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace cuda_sim {

struct Copy {
  uint8_t* to;
  const uint8_t* from;
  int size, bytes;  // the first `bytes` of `size` are read, the others are zeros
};

struct Copies {
  std::vector<Copy> list;      // oldest first
  std::vector<size_t> closed;  // ends of the committed groups in `list`

  void land(size_t count);  // the oldest `count`
  void abandon();           // at the end of the block
};

}  // namespace cuda_sim
