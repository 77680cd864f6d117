// What is known about every byte a kernel may touch: who accessed it last, and when.
//
// Time is counted in epochs. Every block of every launch has its own, a new one begins at each
// block barrier, and inside an epoch each warp counts its __syncwarp. So one number tells whether
// an access was in an earlier launch, in another block, before a barrier, or unordered.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "cuda_sim/api.h"

namespace cuda_sim {

// Accesses of one kind to a byte: of a set that nothing orders, what a later one must know.
struct Trace {
  uint32_t epoch;
  uint32_t thread : 10;  // one of the latest
  uint32_t sync : 19;    // its warp's barriers
  uint32_t lanes : 1;    // others of its warp too
  uint32_t warps : 1;    // other warps too
  uint32_t blocks : 1;   // other blocks of this launch too
};

struct Cell {
  Trace write, read, atomic;
  uint32_t event;    // of the last write: counts fences and writes of the launch
  uint8_t copying;   // an asynchronous copy will write here
  uint8_t products;  // products under way that read here
  uint16_t copied;   // asynchronous copies under way that read here
};

static_assert(sizeof(Cell) == 32);

enum class Access : uint8_t { read, write, atomic };

// The moment, as far as ordering goes.
struct Now {
  uint32_t epoch, sync, thread;
  uint32_t block, launch;  // their first epochs
  uint32_t unsettled;      // first epoch of the launches that may still be running
  uint32_t event;
  uint32_t steps;  // accesses of this thread since it last ran
  bool early;      // this thread runs beside them and has not waited
};

// Where an access is made: a place, or a return address.
struct Where {
  Place place{nullptr, 0};
  uintptr_t pc = 0;
};

std::string amount(size_t bytes);  // "1 byte", "4 bytes"

class Shadow {
 public:
  Now now{};

  void begin_call();  // forgets what was admitted
  void admit(uintptr_t begin, size_t bytes, const std::string& name);
  // Shared memory of the launch: the module's variables and the dynamic part.
  void begin_launch(size_t dynamic_bytes);
  void begin_block();

  // Checks an access of the running thread and remembers it.
  void touch(Access access, const void* at, size_t bytes, const Where& where);
  // The same for the host's own work in stream order: bounds only, and nobody touches it now.
  void touch_whole(bool writes, const void* at, size_t bytes);
  // Cells of `bytes` bytes, which must lie together; fails like touch does.
  Cell* cells(const void* at, size_t bytes, const char* verb, const Where& where);

  bool is_shared(const void* at) const { return in_shared(reinterpret_cast<uintptr_t>(at)); }

  void note_write(Cell& cell);  // without a question
  void note_read(Cell& cell);
  std::string describe(uintptr_t at) const;

  void* dynamic() const { return dynamic_; }

  size_t shared_address(uintptr_t at) const;
  void* from_shared_address(size_t address) const;

  size_t dynamic_bytes() const { return dynamic_bytes_; }

 private:
  struct Range {
    uintptr_t begin;
    size_t bytes;
    std::string name;
  };

  bool in_shared(uintptr_t at) const {
    return at - reinterpret_cast<uintptr_t>(dynamic_) < kDynamicRoom ||
           at - static_ < static_cells_.size();
  }

  bool on_stack(uintptr_t at) const;
  Cell* shared_cells(uintptr_t at, size_t bytes, const char* verb, const Where& where);
  Cell* page(uintptr_t at);
  void need_admitted(uintptr_t at, size_t bytes, const char* verb, const Where& where);
  template <Access access>
  void check(Cell& cell, uintptr_t at, bool shared, const Where& where);
  template <Access access>
  void check_all(Cell* cell, size_t bytes, uintptr_t at, bool shared, const Where& where);
  bool ordered(const Trace& t, uint32_t scope) const;
  void add(Trace& t, uint32_t scope);
  void note_write_now(Cell& cell);
  [[noreturn]] void race(const char* does, const char* has, const Trace& t, uintptr_t at,
                         const Where& where);

  static constexpr size_t kDynamicRoom = size_t{256} << 10;

  std::vector<Range> ranges_;
  size_t last_range_ = 0;
  uintptr_t static_ = 0;            // the module's shared variables
  std::vector<uint16_t> variable_;  // of each byte, 1 + its index; 0 between variables
  std::vector<Cell> static_cells_, dynamic_cells_;
  void* dynamic_ = nullptr;
  size_t dynamic_bytes_ = 0;
  uintptr_t host_stack_begin_ = 0, host_stack_end_ = 0;
};

extern Shadow shadow;

}  // namespace cuda_sim
