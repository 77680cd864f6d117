// What complaints call a byte.
#include <sstream>

#include "cuda_sim/image.h"
#include "cuda_sim/shadow.h"

namespace cuda_sim {

std::string amount(size_t bytes) {
  return std::to_string(bytes) + (bytes == 1 ? " byte" : " bytes");
}

std::string Shadow::describe(uintptr_t at) const {
  std::ostringstream out;
  const uintptr_t dynamic = reinterpret_cast<uintptr_t>(dynamic_);
  if (at - dynamic < kDynamicRoom) {
    out << "byte " << at - dynamic << " of dynamic shared memory (" << amount(dynamic_bytes_)
        << ")";
    return out.str();
  }
  if (at - static_ < static_cells_.size()) {
    const size_t offset = at - static_;
    const Variable* before = nullptr;
    for (const Variable& v : Image::get().shared())
      if (v.offset <= offset) before = &v;
    if (before && offset - before->offset < before->size)
      out << "byte " << offset - before->offset << " of shared " << before->name << " ("
          << amount(before->size) << ")";
    else if (before)
      out << amount(offset - before->offset - before->size) << " behind the end of shared "
          << before->name << " (" << amount(before->size) << ")";
    else
      out << "shared memory of no variable";
    return out.str();
  }
  const Range* nearest = nullptr;
  uintptr_t distance = UINTPTR_MAX;
  for (const Range& r : ranges_) {
    const uintptr_t d = at < r.begin             ? r.begin - at
                        : at - r.begin < r.bytes ? 0
                                                 : at - r.begin - r.bytes + 1;
    if (d < distance) nearest = &r, distance = d;
  }
  if (!nearest || distance > (1u << 20))
    out << "address 0x" << std::hex << at << ", which is in no tensor of the call";
  else if (distance == 0)
    out << "byte " << at - nearest->begin << " of " << nearest->name;
  else if (at < nearest->begin)
    out << amount(distance) << " before " << nearest->name;
  else
    out << amount(distance - 1) << " behind the end of " << nearest->name;
  return out.str();
}

}  // namespace cuda_sim
