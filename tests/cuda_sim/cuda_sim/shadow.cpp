#include "cuda_sim/shadow.h"

#include <pthread.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <sstream>
#include <unordered_map>

#include "cuda_sim/engine.h"
#include "cuda_sim/fiber.h"
#include "cuda_sim/image.h"

namespace cuda_sim {

Shadow shadow;

namespace {

constexpr size_t kPage = 1024;       // bytes of global memory whose cells lie together
constexpr size_t kMostPages = 8192;  // 256 MB of cells

constexpr uint32_t kMostSteps = 1u << 25;  // about a second

struct Page {
  Cell cells[kPage];
};

std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages;

struct Cached {
  uintptr_t number;
  Page* page;
} cached[256];

// Where the calling thread of the host has its stack and its copy of the shared variables.
struct Host {
  uintptr_t shared, stack_begin, stack_end;
};

Host host_of_thread() {
  pthread_attr_t attributes;
  void* stack = nullptr;
  size_t size = 0;
  pthread_getattr_np(pthread_self(), &attributes);
  pthread_attr_getstack(&attributes, &stack, &size);
  pthread_attr_destroy(&attributes);
  const auto begin = reinterpret_cast<uintptr_t>(stack);
  return {reinterpret_cast<uintptr_t>(Image::get().shared_base()), begin, begin + size};
}

constexpr const char* verb_of(Access access) {
  return access == Access::read ? "reads" : access == Access::write ? "writes" : "changes";
}

}  // namespace

void Shadow::begin_call() {
  ranges_.clear();
  last_range_ = 0;
}

void Shadow::admit(uintptr_t begin, size_t bytes, const std::string& name) {
  if (bytes) ranges_.push_back({begin, bytes, name});
}

void Shadow::begin_launch(size_t dynamic_bytes) {
  const Image& image = Image::get();
  if (!dynamic_) {
    dynamic_ = std::aligned_alloc(1024, kDynamicRoom);
    dynamic_cells_.resize(kDynamicRoom);
    static_cells_.resize(image.shared_bytes());
    variable_.resize(image.shared_bytes());
    for (size_t i = 0; i < image.shared().size(); ++i) {
      const Variable& v = image.shared()[i];
      std::fill_n(variable_.begin() + v.offset, v.size, static_cast<uint16_t>(i + 1));
    }
  }
  dynamic_bytes_ = dynamic_bytes;
  thread_local const Host host = host_of_thread();  // asking reads the system's table of memory
  static_ = host.shared;
  host_stack_begin_ = host.stack_begin;
  host_stack_end_ = host.stack_end;
  if (pages.size() > kMostPages && now.unsettled == now.launch) {
    pages.clear();
    std::fill(std::begin(cached), std::end(cached), Cached{});
  }
}

bool Shadow::on_stack(uintptr_t at) const {
  return Stacks::get().hold(at) || (host_stack_begin_ <= at && at < host_stack_end_);
}

Cell* Shadow::page(uintptr_t at) {
  const uintptr_t number = at / kPage;
  Cached& slot = cached[number % std::size(cached)];
  if (slot.number != number || !slot.page) {
    auto& page = pages[number];
    if (!page) page = std::make_unique<Page>();
    slot = {number, page.get()};
  }
  return &slot.page->cells[at % kPage];
}

Cell* Shadow::shared_cells(uintptr_t at, size_t bytes, const char* verb, const Where& where) {
  const size_t in_dynamic = at - reinterpret_cast<uintptr_t>(dynamic_);
  if (in_dynamic < kDynamicRoom) {
    if (in_dynamic + bytes > dynamic_bytes_)
      violate("out of bounds: " + std::string(verb) + " " + amount(bytes) + " at " + describe(at),
              where);
    return &dynamic_cells_[in_dynamic];
  }
  const size_t offset = at - static_;
  if (offset + bytes > static_cells_.size() || !variable_[offset] ||
      variable_[offset] != variable_[offset + bytes - 1])
    violate("out of bounds: " + std::string(verb) + " " + amount(bytes) + " at " + describe(at),
            where);
  return &static_cells_[offset];
}

void Shadow::need_admitted(uintptr_t at, size_t bytes, const char* verb, const Where& where) {
  const auto inside = [&](const Range& r) {
    return at - r.begin < r.bytes && at - r.begin + bytes <= r.bytes;
  };
  if (last_range_ < ranges_.size() && inside(ranges_[last_range_])) return;
  for (size_t i = 0; i < ranges_.size(); ++i)
    if (inside(ranges_[i])) {
      last_range_ = i;
      return;
    }
  violate("out of bounds: " + std::string(verb) + " " + amount(bytes) + " at " + describe(at),
          where);
}

Cell* Shadow::cells(const void* address, size_t bytes, const char* verb, const Where& where) {
  const auto at = reinterpret_cast<uintptr_t>(address);
  if (in_shared(at)) return shared_cells(at, bytes, verb, where);
  need_admitted(at, bytes, verb, where);
  return page(at);
}

inline bool Shadow::ordered(const Trace& t, uint32_t scope) const {
  if (t.epoch < scope) return true;
  if (t.epoch < now.block || t.blocks) return false;
  if (t.epoch < now.epoch) return true;
  if (t.warps || t.thread / 32 != now.thread / 32) return false;
  return t.sync < now.sync || (!t.lanes && t.thread == now.thread);
}

inline void Shadow::add(Trace& t, uint32_t scope) {
  if (t.epoch != now.epoch) {
    const bool others = t.epoch >= scope && (t.epoch < now.block || t.blocks);
    t = {now.epoch, now.thread, now.sync, 0, 0, others};
  } else if (t.thread / 32 != now.thread / 32) {
    t.warps = 1;
  } else if (t.sync < now.sync) {
    t.thread = now.thread, t.sync = now.sync, t.lanes = 0;
  } else if (t.thread != now.thread) {
    t.lanes = 1;
  }
}

inline void Shadow::note_write_now(Cell& cell) {
  cell.write = {now.epoch, now.thread, now.sync, 0, 0, 0};
  cell.event = now.event;
}

void Shadow::race(const char* does, const char* has, const Trace& t, uintptr_t at,
                  const Where& where) {
  std::ostringstream out;
  out << "race: " << does << " " << describe(at) << ", which ";
  const bool foreign = t.epoch < now.block || t.blocks;
  if (t.epoch >= now.block && (t.thread == now.thread || t.blocks))
    out << "another thread";
  else
    out << "thread " << t.thread;
  if (foreign)
    out << " of " << (t.blocks && t.epoch >= now.block ? "another block" : block_name(t.epoch))
        << " of the launch has " << has << ": nothing orders blocks";
  else
    out << " has " << has << " with no barrier since";
  violate(out.str(), where);
}

template <Access access>
void Shadow::check(Cell& cell, uintptr_t at, bool shared, const Where& where) {
  const char* verb = verb_of(access);
  const uint32_t scope = shared ? now.block : now.launch;
  if (cell.copying)
    violate(std::string("copy under way: ") + verb + " " + describe(at) +
                ", where an asynchronous copy has not been waited for",
            where);
  if (access != Access::read && (cell.products || cell.copied))
    violate(std::string("in use: ") + verb + " " + describe(at) + ", which " +
                (cell.products ? "a product" : "an asynchronous copy") + " under way still reads",
            where);
  if (!shared && now.early) {
    if (access != Access::read)
      violate(std::string("too early: ") + verb + " " + describe(at) + " before wait_for_earlier",
              where);
    const auto unsettled = [&](const Trace& t) {
      return t.epoch >= now.unsettled && t.epoch < now.launch;
    };
    if (unsettled(cell.write) || unsettled(cell.atomic))
      violate("too early: reads " + describe(at) +
                  " before wait_for_earlier; a launch that may still run writes it",
              where);
  }
  if (!ordered(cell.write, scope)) race(verb, "written", cell.write, at, where);
  if (access != Access::atomic && !ordered(cell.atomic, scope))
    race(verb, "changed by an atomic", cell.atomic, at, where);
  if (access != Access::read && !ordered(cell.read, scope))
    race(verb, "read", cell.read, at, where);
  if (shared && access != Access::write && cell.write.epoch < scope && cell.atomic.epoch < scope)
    violate(std::string("not written: ") + verb + " " + describe(at) +
                ", which no thread of the block has written",
            where);
  if constexpr (access == Access::read) add(cell.read, scope);
  if constexpr (access == Access::atomic) add(cell.atomic, scope);
  if constexpr (access == Access::write) note_write_now(cell);
}

void Shadow::note_write(Cell& cell) {
  ++now.event;
  note_write_now(cell);
}

void Shadow::note_read(Cell& cell) { add(cell.read, now.block); }

// Bytes of a word mostly have the same past: what follows for the first follows for them.
template <Access access>
void Shadow::check_all(Cell* cell, size_t bytes, uintptr_t at, bool shared, const Where& where) {
  if (access != Access::read) ++now.event;
  const Cell before = cell[0];
  check<access>(cell[0], at, shared, where);
  for (size_t i = 1; i < bytes; ++i)
    if (std::memcmp(&cell[i], &before, sizeof before) == 0)
      cell[i] = cell[0];
    else
      check<access>(cell[i], at + i, shared, where);
}

void Shadow::touch(Access access, const void* address, size_t bytes, const Where& where) {
  auto at = reinterpret_cast<uintptr_t>(address);
  if (on_stack(at) || bytes == 0) return;
  if (++now.steps == kMostSteps)
    violate("no end: " + std::to_string(kMostSteps) + " accesses in a row, the last of " +
                describe(at) + "; blocks run one after another and cannot wait for each other",
            where);
  const bool shared = in_shared(at);
  if (!shared) {
    // Constants of the module are nobody's tensor; nor are its variables.
    const bool ours = last_range_ < ranges_.size() &&
                      at - ranges_[last_range_].begin < ranges_[last_range_].bytes;
    if (!ours && Image::get().holds(at)) return;
    need_admitted(at, bytes, verb_of(access), where);
  }
  while (bytes) {
    const size_t part = shared ? bytes : std::min(bytes, kPage - at % kPage);
    Cell* cell = shared ? shared_cells(at, part, verb_of(access), where) : page(at);
    if (access == Access::read) check_all<Access::read>(cell, part, at, shared, where);
    if (access == Access::write) check_all<Access::write>(cell, part, at, shared, where);
    if (access == Access::atomic) check_all<Access::atomic>(cell, part, at, shared, where);
    at += part;
    bytes -= part;
  }
}

void Shadow::touch_whole(bool writes, const void* at, size_t bytes) {
  if (bytes) need_admitted(reinterpret_cast<uintptr_t>(at), bytes, writes ? "writes" : "reads", {});
}

// Dynamic memory begins at 1024, as behind what the system keeps; the module's variables, of which
// a real block would have only its own kernel's, follow it.
size_t Shadow::shared_address(uintptr_t at) const {
  const size_t offset = at - reinterpret_cast<uintptr_t>(dynamic_);
  return 1024 + (offset < kDynamicRoom ? offset : kDynamicRoom + (at - static_));
}

void* Shadow::from_shared_address(size_t address) const {
  const size_t offset = address - 1024;
  return static_cast<uint8_t*>(dynamic_) + (offset < kDynamicRoom ? offset : 0);
}

}  // namespace cuda_sim
