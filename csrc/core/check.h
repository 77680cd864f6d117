// Errors the caller can act on: one sentence with the numbers in it, raised as Python's ValueError.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace distaya {

// pybind11 translates std::invalid_argument to ValueError.
struct Error : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

template <class... Words>
[[noreturn]] void fail(const Words&... words) {
  std::ostringstream sentence;
  (sentence << ... << words);
  throw Error(sentence.str());
}

template <class... Words>
void check(bool ok, const Words&... words) {
  if (!ok) [[unlikely]]
    fail(words...);
}

}  // namespace distaya
