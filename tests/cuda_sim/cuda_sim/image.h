// The module's own file: which shared variables it declares, what its kernels are called, where a
// return address is in the sources.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace cuda_sim {

struct Variable {
  std::string name, owner;  // "bins", and the mangled function it is declared in
  size_t offset, size;      // in the image of the thread's storage
};

class Image {
 public:
  static const Image& get();

  const std::vector<Variable>& shared() const { return variables_; }

  size_t shared_bytes() const { return thread_storage_; }

  uint8_t* shared_base() const;                     // of the calling thread
  bool holds(uintptr_t at) const;                   // constants and variables of the module
  std::string function(const void* address) const;  // "mask::row_kernel"
  std::vector<std::string> functions() const;
  size_t static_shared(const void* kernel) const;      // bytes a kernel declares
  std::string source(uintptr_t return_address) const;  // "csrc/mask/mask_cuda.cu:51"

 private:
  Image();
  void read_symbols();

  struct Function {
    uintptr_t begin;
    std::string mangled;
  };

  struct Range {
    uintptr_t begin, end;
  };

  const Function* function_at(uintptr_t at) const;

  std::string path_;
  uintptr_t base_ = 0;
  size_t thread_storage_ = 0;
  std::vector<Range> ranges_;
  std::vector<Variable> variables_;
  std::vector<Function> functions_;
};

// A path as a reader of the repository knows it.
std::string short_path(const std::string& path);

}  // namespace cuda_sim
