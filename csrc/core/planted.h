// Faults on purpose: .ci/sanitize runs them first, because a sanitizer that is silent proves
// nothing until it has spoken. They exist in builds with DISTAYA_SANITIZE alone.
#pragma once

#include <string>

namespace distaya {

// "overflow" (one element behind scratch), "undefined" (a signed overflow), "race" (two bodies of a
// parallel_for), "callers" (two calls at the same time: it waits until there are two).
void plant(const std::string& fault);

}  // namespace distaya
