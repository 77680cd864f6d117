// Which thread of a block runs next, and which block.
#pragma once

#include <cstdint>
#include <vector>

#include "cuda_sim/engine.h"

namespace cuda_sim {

class Order {
 public:
  explicit Order(Schedule schedule) : schedule_(schedule) {}

  std::vector<uint32_t> blocks(uint32_t count);
  void begin_block(const Engine& e);
  int next(const Engine& e);  // a thread that can run, or -1

 private:
  uint32_t random();
  int from(const Engine& e, int thread) const;  // the next that can run, going up and around
  int down_from(const Engine& e, int thread) const;

  Schedule schedule_;
  uint32_t state_ = 0x9e3779b9u;  // the same sequence in every launch
  int last_ = 0;
};

}  // namespace cuda_sim
