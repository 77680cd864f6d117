// The launch under way: its threads as fibers, their barriers, and what went wrong.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "cuda_sim/copies.h"
#include "cuda_sim/fiber.h"
#include "cuda_sim/products.h"
#include "cuda_sim/shadow.h"

namespace cuda_sim {

enum class Schedule : int { forward, reverse, random, greedy, greedy_reverse };

struct Index {
  unsigned of[3];
};

enum class State : uint8_t { running, at_warp, at_block, ended };

struct Thread {
  Fiber fiber;
  State state;
  const char* what;  // it waits at
  Place place;
  bool waited_for_earlier;
  Copies copies;
  Products products;
};

// Lanes of a warp that do one thing together: each leaves words, the last one combines them.
struct Meeting {
  const char* what;
  unsigned mask, arrived, left;
  uint32_t in[32][20];
  uint32_t out[32][4];
};

struct Warp {
  uint32_t living, ready;  // lanes
  uint32_t syncs;
  std::vector<Meeting*> open;
};

struct Violation {
  std::string what;
  Where where;
  int thread;
  Index block;
};

struct Engine {
  Schedule schedule = Schedule::forward;
  bool inside = false;  // a thread of a kernel runs

  Index grid, size, block;
  int threads;
  int current;
  std::unique_ptr<Thread[]> thread;
  Warp warp[kMostThreads / 32];
  int living, at_barrier;
  Place barrier;
  int barrier_count, barrier_result;
  std::unique_ptr<Violation> violation;

  Thread& me() { return thread[current]; }

  Warp& my_warp() { return warp[current / 32]; }
};

extern Engine engine;

// Records what the running thread did and never returns to it. Outside of kernels it throws.
[[noreturn]] void violate(const std::string& what, const Where& where);

// Stops the running thread until the scheduler picks it again.
void stop(State state, const char* what, Place place);

Meeting& meet(const char* what, unsigned mask, const uint32_t* words, int n,
              void (*combine)(Meeting&), Place place);
// All lanes of the warp, for its own sake; no memory is ordered.
void warp_barrier_only(const char* what);
void part(Meeting& meeting);  // each lane, once it has read what it wants

std::string block_name(uint32_t epoch);  // "block (1, 0, 0)"
std::string name_of(const Index& block);
std::string text_of(const Place& place);

}  // namespace cuda_sim
