// Operands of mma as PTX lays them over the lanes of a warp, read from what the lanes left.
#pragma once

#include <string>

#include "cuda_sim/engine.h"

namespace cuda_sim {

// Words of a lane: 0..3 are A's registers, 4 the metadata, 5.. B's, 9.. D's.
struct Operand {
  const Meeting& m;
  Shape shape;

  // Stored element i of a row of A: 16 of them, 8 in tf32.
  float a(int row, int i) const;
  // Its column; -1 where the metadata's pair does not rise.
  int column(int row, int i) const;
  float b(int row, int column) const;
  uint32_t pair(int row, int i) const;  // metadata nibble of the group that element i is in

 private:
  float value(uint32_t word, int half) const;
};

std::string bad_metadata(const Operand& a, int row, int i);

}  // namespace cuda_sim
