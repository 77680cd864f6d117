#include "cuda_sim/schedule.h"

#include <algorithm>
#include <bit>
#include <numeric>

namespace cuda_sim {

uint32_t Order::random() {  // xorshift32
  state_ ^= state_ << 13;
  state_ ^= state_ >> 17;
  return state_ ^= state_ << 5;
}

std::vector<uint32_t> Order::blocks(uint32_t count) {
  std::vector<uint32_t> order(count);
  std::iota(order.begin(), order.end(), 0u);
  if (schedule_ == Schedule::reverse || schedule_ == Schedule::greedy_reverse)
    std::reverse(order.begin(), order.end());
  if (schedule_ == Schedule::random)
    for (uint32_t i = count; i > 1; --i) std::swap(order[i - 1], order[random() % i]);
  return order;
}

void Order::begin_block(const Engine& e) {
  last_ = schedule_ == Schedule::reverse ? e.threads : -1;
}

int Order::from(const Engine& e, int thread) const {
  const int warps = (e.threads + 31) / 32, first = thread / 32 % warps;
  for (int i = 0; i <= warps; ++i) {
    const int w = (first + i) % warps;
    const uint32_t ready = e.warp[w].ready & (i == 0 ? ~0u << thread % 32 : ~0u);
    if (ready) return 32 * w + std::countr_zero(ready);
  }
  return -1;
}

int Order::down_from(const Engine& e, int thread) const {
  const int warps = (e.threads + 31) / 32, first = thread < 0 ? warps - 1 : thread / 32;
  for (int i = 0; i <= warps; ++i) {
    const int w = (first - i + 2 * warps) % warps;
    const uint32_t below = thread < 0 || i > 0 ? ~0u : ~0u >> (31 - thread % 32);
    if (e.warp[w].ready & below) return 32 * w + 31 - std::countl_zero(e.warp[w].ready & below);
  }
  return -1;
}

int Order::next(const Engine& e) {
  switch (schedule_) {
    case Schedule::forward: return last_ = from(e, (last_ + 1) % e.threads);
    case Schedule::reverse: return last_ = down_from(e, last_ - 1);
    case Schedule::random: return from(e, static_cast<int>(random() % e.threads));
    case Schedule::greedy: return from(e, 0);  // a warp goes on until all its lanes wait
    default: return down_from(e, -1);
  }
}

}  // namespace cuda_sim
