#include "cuda_sim/copies.h"

#include <cstring>

#include "cuda_sim/engine.h"

namespace cuda_sim {

void Copies::land(size_t count) {
  for (size_t i = 0; i < count; ++i) {
    const Copy& c = list[i];
    Cell* to = shadow.cells(c.to, c.size, "writes", {});
    for (int b = 0; b < c.size; ++b) {
      to[b].copying = 0;
      shadow.note_write(to[b]);
      if (b < c.bytes) --shadow.cells(c.from + b, 1, "reads", {})->copied;
      c.to[b] = b < c.bytes ? c.from[b] : 0;
    }
  }
  list.erase(list.begin(), list.begin() + static_cast<long>(count));
}

void Copies::abandon() {
  for (const Copy& c : list) {
    Cell* to = shadow.cells(c.to, c.size, "writes", {});
    for (int b = 0; b < c.size; ++b) {
      to[b].copying = 0;
      if (b < c.bytes) --shadow.cells(c.from + b, 1, "reads", {})->copied;
    }
  }
  list.clear();
  closed.clear();
}

void copy_async(void* shared, const void* global, int size, int bytes, Place place) {
  const Where where{place};
  for (const void* at : {static_cast<const void*>(shared), global})
    if (reinterpret_cast<uintptr_t>(at) % static_cast<unsigned>(size))
      violate("misaligned: an asynchronous copy of " + std::to_string(size) + " bytes at " +
                  shadow.describe(reinterpret_cast<uintptr_t>(at)),
              where);
  if (!shadow.is_shared(shared))
    violate("an asynchronous copy goes to " + shadow.describe(reinterpret_cast<uintptr_t>(shared)) +
                ", not to shared memory",
            where);
  if (bytes < 0 || bytes > size)
    violate("an asynchronous copy reads " + std::to_string(bytes) + " of " + std::to_string(size) +
                " bytes",
            where);
  shadow.touch(Access::write, shared, size, where);
  shadow.touch(Access::read, global, bytes, where);
  Cell* to = shadow.cells(shared, size, "writes", where);
  for (int b = 0; b < size; ++b) to[b].copying = 1;
  const auto* from = static_cast<const uint8_t*>(global);
  for (int b = 0; b < bytes; ++b) ++shadow.cells(from + b, 1, "reads", where)->copied;
  engine.me().copies.list.push_back({static_cast<uint8_t*>(shared), from, size, bytes});
}

void copy_commit() {
  Copies& mine = engine.me().copies;
  mine.closed.push_back(mine.list.size());
}

void copy_wait(int pending) {
  Copies& mine = engine.me().copies;
  const int done = static_cast<int>(mine.closed.size()) - pending;
  if (done <= 0) return;
  const size_t count = mine.closed[done - 1];
  mine.land(count);
  mine.closed.erase(mine.closed.begin(), mine.closed.begin() + done);
  for (size_t& end : mine.closed) end -= count;
}

}  // namespace cuda_sim
