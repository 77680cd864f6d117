#include "cuda_sim/engine.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <memory>
#include <sstream>
#include <stdexcept>

#include "cuda_sim/image.h"

namespace cuda_sim {

Engine engine;

std::string name_of(const Index& block) {
  std::ostringstream out;
  out << "block (" << block.of[0] << ", " << block.of[1] << ", " << block.of[2] << ")";
  return out.str();
}

std::string text_of(const Place& place) {
  return short_path(place.file) + ":" + std::to_string(place.line);
}

void violate(const std::string& what, const Where& where) {
  if (!engine.inside) throw std::runtime_error("simulated CUDA: " + what);
  if (!engine.violation)
    engine.violation.reset(new Violation{what, where, engine.current, engine.block});
  engine.inside = false;
  engine.me().fiber.leave();
  std::abort();  // a thread that broke a rule is never entered again
}

void stop(State state, const char* what, Place place) {
  Thread& me = engine.me();
  me.state = state, me.what = what, me.place = place;
  engine.my_warp().ready &= ~(1u << lane());
  me.fiber.leave();
}

namespace {

std::vector<std::unique_ptr<Meeting>> meetings;
std::vector<Meeting*> spare;

Meeting* new_meeting() {
  if (spare.empty()) {
    meetings.push_back(std::make_unique<Meeting>());
    spare.push_back(meetings.back().get());
  }
  Meeting* m = spare.back();
  spare.pop_back();
  return m;
}

std::string waits_at(const Thread& t) {
  return std::string(t.what) + " (" + text_of(t.place) + ")";
}

Meeting* find_open(const char* what, unsigned mask, const Where& where) {
  Warp& warp = engine.my_warp();
  const unsigned mine = 1u << lane();
  if (!(mask & mine))
    violate(std::string("wrong mask: ") + what + " is called by lane " + std::to_string(lane()) +
                ", which its mask does not name",
            where);
  if (mask & ~warp.living)
    violate(std::string("wrong mask: ") + what + " waits for lane " +
                std::to_string(std::countr_zero(mask & ~warp.living)) + ", which has ended",
            where);
  for (Meeting* m : warp.open) {
    if (!(m->mask & mask)) continue;
    if (m->mask != mask || (m->what != what && std::strcmp(m->what, what) != 0)) {
      const int other = engine.current / 32 * 32 + std::countr_zero(m->arrived);
      violate(std::string("divergence: ") + what + " is called while thread " +
                  std::to_string(other) + " of the warp waits at " + waits_at(engine.thread[other]),
              where);
    }
    return m;
  }
  Meeting* m = new_meeting();
  m->what = what, m->mask = mask, m->arrived = m->left = 0;
  warp.open.push_back(m);
  return m;
}

}  // namespace

Meeting& meet(const char* what, unsigned mask, const uint32_t* words, int n,
              void (*combine)(Meeting&), Place place) {
  Meeting& m = *find_open(what, mask, {place});
  Warp& warp = engine.my_warp();
  std::copy(words, words + n, m.in[lane()]);
  m.arrived |= 1u << lane();
  if (m.arrived != mask) {
    stop(State::at_warp, what, place);
    return m;
  }
  std::erase(warp.open, &m);
  engine.me().place = place;
  if (combine) combine(m);
  const int first = engine.current / 32 * 32;
  for (unsigned rest = mask & ~(1u << lane()); rest; rest &= rest - 1)
    engine.thread[first + std::countr_zero(rest)].state = State::running;
  warp.ready |= mask;
  return m;
}

void part(Meeting& m) {
  m.left |= 1u << lane();
  if (m.left == m.mask) spare.push_back(&m);
}

void warp_barrier(unsigned mask, Place place) {
  Meeting& m = meet(
      "__syncwarp", mask, nullptr, 0,
      [](Meeting& all) {
        // Fewer than all that live order their memory too, but that is not followed
        Warp& warp = engine.my_warp();
        if (all.mask == warp.living) ++warp.syncs;
      },
      place);
  shadow.now.sync = engine.my_warp().syncs;
  part(m);
}

void warp_barrier_only(const char* what) {
  part(meet(what, 0xffffffffu, nullptr, 0, nullptr, {"", 0}));
}

uint64_t shuffle(const char* what, unsigned mask, uint64_t mine, int from, int, Place place) {
  const uint32_t words[2] = {static_cast<uint32_t>(mine), static_cast<uint32_t>(mine >> 32)};
  Meeting& m = meet(what, mask, words, 2, nullptr, place);
  if (!(mask >> (from & 31) & 1u))
    violate(std::string("wrong mask: ") + what + " reads lane " + std::to_string(from) +
                ", which its mask does not name",
            {place});
  const uint32_t* theirs = m.in[from & 31];
  const uint64_t out = theirs[0] | uint64_t{theirs[1]} << 32;
  part(m);
  return out;
}

unsigned ballot(const char* what, unsigned mask, bool mine, Place place) {
  const uint32_t word = mine;
  Meeting& m = meet(what, mask, &word, 1, nullptr, place);
  unsigned out = 0;
  for (int l = 0; l < 32; ++l)
    if (mask >> l & 1u) out |= m.in[l][0] << l;
  part(m);
  return out;
}

unsigned match(unsigned mask, uint64_t mine, Place place) {
  const uint32_t words[2] = {static_cast<uint32_t>(mine), static_cast<uint32_t>(mine >> 32)};
  Meeting& m = meet("__match_any_sync", mask, words, 2, nullptr, place);
  unsigned out = 0;
  for (int l = 0; l < 32; ++l)
    if (mask >> l & 1u && m.in[l][0] == words[0] && m.in[l][1] == words[1]) out |= 1u << l;
  part(m);
  return out;
}

int block_count(bool mine, Place place) {
  Engine& e = engine;
  if (e.at_barrier == 0) {
    e.barrier = place, e.barrier_count = 0;
  } else if (e.barrier.line != place.line ||
             (e.barrier.file != place.file && std::strcmp(e.barrier.file, place.file) != 0)) {
    violate("divergence: __syncthreads while other threads of the block wait at the one of " +
                text_of(e.barrier),
            {place});
  }
  e.barrier_count += mine;
  ++e.at_barrier;
  stop(State::at_block, "__syncthreads", place);
  return e.barrier_result;
}

void block_barrier(Place place) { block_count(false, place); }

unsigned thread_index(int axis) {
  const auto& size = engine.size.of;
  const auto t = static_cast<unsigned>(engine.current);
  return axis == 0 ? t % size[0] : axis == 1 ? t / size[0] % size[1] : t / (size[0] * size[1]);
}

unsigned block_index(int axis) { return engine.block.of[axis]; }

unsigned block_size(int axis) { return engine.size.of[axis]; }

unsigned grid_size(int axis) { return engine.grid.of[axis]; }

int lane() { return engine.current % 32; }

unsigned living_lanes() { return engine.my_warp().living; }

void atomic_access(void* at, size_t bytes, Place place) {
  const auto address = reinterpret_cast<uintptr_t>(at);
  if (address % bytes)
    violate("misaligned: an atomic of " + std::to_string(bytes) + " bytes at " +
                shadow.describe(address),
            {place});
  shadow.touch(Access::atomic, at, bytes, {place});
}

void* dynamic_shared() { return shadow.dynamic(); }

size_t shared_address(const void* generic) {
  const auto at = reinterpret_cast<uintptr_t>(generic);
  if (!shadow.is_shared(generic))
    violate("a shared address is asked of " + shadow.describe(at), {});
  return shadow.shared_address(at);
}

void wait_for_earlier() {
  engine.me().waited_for_earlier = true;
  shadow.now.early = false;
}

}  // namespace cuda_sim
