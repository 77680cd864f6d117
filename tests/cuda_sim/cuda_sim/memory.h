// Which memory a kernel may touch: what crossed the border for the call it is part of.
#pragma once

#include "core/tensor.h"

namespace cuda_sim {

// `name` is what complaints call these bytes. The first admission after a launch forgets those of
// the call before.
void admit(const void* data, size_t bytes, const char* name);

// A tensor that crossed: its bytes are admitted, and from here on it is a tensor on the device.
void admit(distaya::Tensor& t);

}  // namespace cuda_sim
