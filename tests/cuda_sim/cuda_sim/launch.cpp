// A launch: its blocks one after the other, the threads of each by turns.
#include <algorithm>
#include <bit>
#include <cstring>
#include <map>
#include <mutex>
#include <set>
#include <sstream>
#include <stdexcept>

#include "cuda_runtime.h"
#include "cuda_sim/engine.h"
#include "cuda_sim/image.h"
#include "cuda_sim/memory.h"
#include "cuda_sim/schedule.h"

namespace cuda_sim {
namespace {

std::mutex one_at_a_time;
bool call_has_worked = false;  // the next admission begins another call
int admitted = 0;
std::set<const void*> launched;
std::map<const void*, int> allowed_dynamic;  // by cudaFuncSetAttribute
void (*kernel_call)(void*);
void* kernel_arguments;

struct Start {
  uint32_t epoch;
  Index block;
};

std::vector<Start> starts;  // of the blocks of this launch so far

constexpr size_t kDefaultShared = 48 << 10, kMostShared = 227 << 10;

void thread_main() {
  try {
    kernel_call(kernel_arguments);
  } catch (const std::exception& error) {
    violate(std::string("an exception leaves the kernel: ") + error.what(), {});
  }
  Warp& warp = engine.my_warp();
  for (const Meeting* m : warp.open)
    if (m->mask >> lane() & 1u)
      violate("divergence: ends while other lanes wait for it at " + std::string(m->what), {});
  warp.living &= ~(1u << lane());
  --engine.living;
  stop(State::ended, "its end", {"", 0});
}

void begin_block(bool early) {
  Engine& e = engine;
  ++shadow.now.epoch;
  shadow.now.block = shadow.now.epoch;
  shadow.now.event = 0;
  starts.push_back({shadow.now.epoch, e.block});
  for (int w = 0; 32 * w < e.threads; ++w) {
    const int lanes = std::min(32, e.threads - 32 * w);
    e.warp[w].living = e.warp[w].ready = lanes == 32 ? ~0u : (1u << lanes) - 1;
    e.warp[w].syncs = 0;
    e.warp[w].open.clear();
  }
  for (int t = 0; t < e.threads; ++t) {
    e.thread[t].fiber.prepare(t, thread_main);
    e.thread[t].state = State::running;
    e.thread[t].waited_for_earlier = !early;
  }
  e.living = e.threads, e.at_barrier = 0;
}

void end_block() {
  for (int t = 0; t < engine.threads; ++t) {
    Thread& thread = engine.thread[t];
    if (!thread.copies.list.empty()) thread.copies.abandon();
    thread.copies.closed.clear();
    if (thread.products.issued || !thread.products.fences.empty()) thread.products.abandon();
  }
}

void enter(int t) {
  Engine& e = engine;
  e.current = t;
  shadow.now.thread = static_cast<uint32_t>(t);
  shadow.now.sync = e.warp[t / 32].syncs;
  shadow.now.early = !e.thread[t].waited_for_earlier;
  shadow.now.steps = 0;
  e.inside = true;
  e.thread[t].fiber.enter();
  e.inside = false;
}

bool release_barrier() {
  Engine& e = engine;
  if (e.at_barrier == 0 || e.at_barrier != e.living) return false;
  for (int t = 0; t < e.threads; ++t)
    if (e.thread[t].state == State::at_block) {
      e.thread[t].state = State::running;
      e.warp[t / 32].ready |= 1u << t % 32;
    }
  e.at_barrier = 0;
  e.barrier_result = e.barrier_count;
  ++shadow.now.epoch;
  return true;
}

void report_deadlock() {
  Engine& e = engine;
  std::ostringstream out;
  out << "deadlock: ";
  State told = State::running;
  int first = -1;
  for (int t = 0; t < e.threads; ++t) {
    const Thread& thread = e.thread[t];
    if (thread.state == State::ended || thread.state == told) continue;
    out << (first < 0 ? "thread " : " and thread ") << t << " waits at " << thread.what;
    if (thread.place.line) out << " (" << text_of(thread.place) << ")";
    told = thread.state;
    if (first < 0) first = t;
  }
  e.violation.reset(new Violation{out.str(), {}, first, e.block});
}

void run_block(Order& order, bool early) {
  Engine& e = engine;
  begin_block(early);
  order.begin_block(e);
  while (e.living > 0 && !e.violation) {
    const int t = order.next(e);
    if (t >= 0)
      enter(t);
    else if (!release_barrier())
      report_deadlock();
  }
  end_block();
}

[[noreturn]] void complain(const void* kernel) {
  const std::unique_ptr<Violation> v = std::move(engine.violation);
  std::ostringstream out;
  out << v->what << "; kernel " << Image::get().function(kernel);
  if (v->where.place.line)
    out << ", " << text_of(v->where.place);
  else if (v->where.pc)
    out << ", " << Image::get().source(v->where.pc);
  out << ", thread " << v->thread << " of " << name_of(v->block) << " of " << engine.threads
      << " threads";
  throw std::runtime_error(out.str());
}

void settle() { shadow.now.unsettled = shadow.now.launch = ++shadow.now.epoch; }

cudaError_t check(const cudaLaunchConfig_t& c, const void* kernel) {
  const uint64_t threads = uint64_t{c.blockDim.x} * c.blockDim.y * c.blockDim.z;
  const auto bad = [](unsigned n, unsigned most) { return n == 0 || n > most; };
  if (bad(c.gridDim.x, 0x7fffffffu) || bad(c.gridDim.y, 65535) || bad(c.gridDim.z, 65535) ||
      threads == 0 || threads > kMostThreads)
    return cudaErrorInvalidConfiguration;
  const auto known = allowed_dynamic.find(kernel);
  const size_t allowed = known == allowed_dynamic.end() ? kDefaultShared : known->second;
  const size_t fixed = Image::get().static_shared(kernel);
  if (c.dynamicSmemBytes > allowed || fixed > kDefaultShared ||
      c.dynamicSmemBytes + fixed > kMostShared)
    return cudaErrorInvalidValue;
  return cudaSuccess;
}

}  // namespace

std::string block_name(uint32_t epoch) {
  const auto after = std::ranges::upper_bound(starts, epoch, {}, &Start::epoch);
  return after == starts.begin() ? "a block" : name_of(std::prev(after)->block);
}

cudaError_t launch(const cudaLaunchConfig_t& c, const void* kernel, void (*call)(void*),
                   void* arguments) {
  const std::lock_guard lock(one_at_a_time);
  if (const cudaError_t status = check(c, kernel); status != cudaSuccess) return status;
  call_has_worked = true;
  launched.insert(kernel);
  Engine& e = engine;
  if (!e.thread) e.thread.reset(new Thread[kMostThreads]{});
  bool early = false;
  for (unsigned i = 0; i < c.numAttrs; ++i)
    early = early || (c.attrs[i].id == cudaLaunchAttributeProgrammaticStreamSerialization &&
                      c.attrs[i].val.programmaticStreamSerializationAllowed);
  kernel_call = call, kernel_arguments = arguments;
  e.grid = {c.gridDim.x, c.gridDim.y, c.gridDim.z};
  e.size = {c.blockDim.x, c.blockDim.y, c.blockDim.z};
  e.threads = static_cast<int>(c.blockDim.x * c.blockDim.y * c.blockDim.z);
  shadow.now.launch = shadow.now.epoch + 1;
  if (!early) shadow.now.unsettled = shadow.now.launch;
  shadow.begin_launch(c.dynamicSmemBytes);
  starts.clear();
  Order order(e.schedule);
  const uint64_t blocks = uint64_t{c.gridDim.x} * c.gridDim.y * c.gridDim.z;
  if (blocks > 1u << 22) throw std::runtime_error("a grid of this size is beyond the simulator");
  for (const uint32_t i : order.blocks(static_cast<uint32_t>(blocks))) {
    const unsigned row = i / c.gridDim.x;
    e.block = {i % c.gridDim.x, row % c.gridDim.y, row / c.gridDim.y};
    run_block(order, early);
    if (e.violation) complain(kernel);
  }
  return cudaSuccess;
}

void allow_dynamic(const void* kernel, int bytes) { allowed_dynamic[kernel] = bytes; }

void host_work(const void* read, void* written, size_t bytes) {
  const std::lock_guard lock(one_at_a_time);
  call_has_worked = true;
  settle();  // launches do not overlap it
  if (read) shadow.touch_whole(false, read, bytes);
  shadow.touch_whole(true, written, bytes);
}

void admit(const void* data, size_t bytes, const char* name) {
  const std::lock_guard lock(one_at_a_time);
  if (call_has_worked) {
    shadow.begin_call();
    call_has_worked = false;
    admitted = 0;
  }
  ++admitted;
  shadow.admit(reinterpret_cast<uintptr_t>(data), bytes, name);
}

void admit(distaya::Tensor& t) {
  t.on_cuda = true;
  const int64_t size = [&] {
    using enum distaya::Dtype;
    switch (t.dtype) {
      case f64:
      case i64: return 8;
      case f32:
      case i32: return 4;
      case f16:
      case bf16: return 2;
      default: return 1;
    }
  }();
  int64_t last = 0;  // a view's bytes end with its last element
  for (int i = 0; i < t.ndim; ++i) last += (t.sizes[i] - 1) * t.strides[i];
  std::ostringstream name;
  name << distaya::name_of(t.dtype) << " [";
  for (int i = 0; i < t.ndim; ++i) name << (i ? ", " : "") << t.sizes[i];
  name << "]";
  admit(t.data, t.numel() ? static_cast<size_t>((last + 1) * size) : 0, name.str().c_str());
}

}  // namespace cuda_sim

#define CUDA_SIM_EXPORT extern "C" __attribute__((visibility("default")))

CUDA_SIM_EXPORT void cuda_sim_schedule(int schedule) {
  cuda_sim::engine.schedule = static_cast<cuda_sim::Schedule>(schedule);
}

// The host waits for the device: no launch is still running.
CUDA_SIM_EXPORT void cuda_sim_settle() {
  const std::lock_guard lock(cuda_sim::one_at_a_time);
  cuda_sim::settle();
}

// Names, a line each: of all functions of the module, and of the kernels launched so far.
CUDA_SIM_EXPORT const char* cuda_sim_functions() {
  static std::string text;
  if (text.empty())
    for (const std::string& name : cuda_sim::Image::get().functions()) text += name + "\n";
  return text.c_str();
}

CUDA_SIM_EXPORT const char* cuda_sim_launched() {
  static std::string text;
  text.clear();
  for (const void* kernel : cuda_sim::launched)
    text += cuda_sim::Image::get().function(kernel) + "\n";
  return text.c_str();
}
