#include "cuda_sim/image.h"

#include <cxxabi.h>
#include <dlfcn.h>
#include <elf.h>
#include <link.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <sstream>
#include <stdexcept>

namespace cuda_sim {
namespace {

thread_local int anchor;  // makes the thread's storage exist

std::string demangled(const std::string& name) {
  int status = 0;
  char* text = abi::__cxa_demangle(name.c_str(), nullptr, nullptr, &status);
  const std::string out = status == 0 ? text : name;
  std::free(text);
  return out;
}

void remove_all(std::string& text, const std::string& part) {
  for (size_t at; (at = text.find(part)) != std::string::npos;) text.erase(at, part.size());
}

// Without what every name has, the result and the parameters.
std::string plain_name(const std::string& mangled) {
  std::string name = demangled(mangled);
  remove_all(name, "(anonymous namespace)::");
  remove_all(name, "distaya::");
  if (name.starts_with("void ")) name.erase(0, 5);
  int depth = 0;  // the parameters begin at the first parenthesis outside of <>
  for (size_t i = 0; i < name.size(); ++i) {
    depth += (name[i] == '<') - (name[i] == '>');
    if (name[i] == '(' && depth == 0) return name.substr(0, i);
  }
  return name;
}

}  // namespace

std::string short_path(const std::string& path) {
  for (const char* root : {"csrc/", "tests/cuda_sim/"}) {
    const size_t at = path.rfind(root);
    if (at != std::string::npos) return path.substr(at);
  }
  return path;
}

const Image& Image::get() {
  static const Image image;
  return image;
}

Image::Image() {
  Dl_info info;
  if (!dladdr(reinterpret_cast<void*>(&demangled), &info))
    throw std::runtime_error("the simulator does not find its own file");
  path_ = info.dli_fname;
  base_ = reinterpret_cast<uintptr_t>(info.dli_fbase);
  dl_iterate_phdr(
      [](dl_phdr_info* module, size_t, void* self) {
        auto& image = *static_cast<Image*>(self);
        if (module->dlpi_addr != image.base_) return 0;
        for (int i = 0; i < module->dlpi_phnum; ++i) {
          const ElfW(Phdr) & part = module->dlpi_phdr[i];
          const uintptr_t begin = module->dlpi_addr + part.p_vaddr;
          if (part.p_type == PT_LOAD) image.ranges_.push_back({begin, begin + part.p_memsz});
          if (part.p_type == PT_TLS) image.thread_storage_ = part.p_memsz;
        }
        return 1;
      },
      this);
  read_symbols();
}

void Image::read_symbols() {
  std::ifstream file(path_, std::ios::binary);
  const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
  ElfW(Ehdr) head;
  if (bytes.size() < sizeof head) throw std::runtime_error("cannot read " + path_);
  std::memcpy(&head, bytes.data(), sizeof head);
  std::vector<ElfW(Shdr)> sections(head.e_shnum);
  std::memcpy(sections.data(), bytes.data() + head.e_shoff, head.e_shnum * sizeof(ElfW(Shdr)));
  for (const ElfW(Shdr) & section : sections) {
    if (section.sh_type != SHT_SYMTAB) continue;
    const char* names = bytes.data() + sections[section.sh_link].sh_offset;
    for (size_t at = 0; at < section.sh_size; at += sizeof(ElfW(Sym))) {
      ElfW(Sym) symbol;
      std::memcpy(&symbol, bytes.data() + section.sh_offset + at, sizeof symbol);
      const std::string name = names + symbol.st_name;
      const int type = ELF64_ST_TYPE(symbol.st_info);
      if (symbol.st_shndx == SHN_UNDEF || symbol.st_size == 0) continue;
      if (type == STT_FUNC) functions_.push_back({base_ + symbol.st_value, name});
      if (type != STT_TLS) continue;
      std::string plain = demangled(name);
      plain = plain.substr(plain.rfind("::") == std::string::npos ? 0 : plain.rfind("::") + 2);
      // _ZZ<function>E<variable>
      const std::string owner = name.starts_with("_ZZ") ? "_Z" + name.substr(3) : "";
      variables_.push_back({plain, owner, symbol.st_value, symbol.st_size});
    }
  }
  std::ranges::sort(functions_, {}, &Function::begin);
  std::ranges::sort(variables_, {}, &Variable::offset);
}

uint8_t* Image::shared_base() const {
  static_cast<void>(*const_cast<volatile int*>(&anchor));

  struct Find {
    uintptr_t base;
    void* storage;
  } find{base_, nullptr};

  dl_iterate_phdr(
      [](dl_phdr_info* module, size_t, void* data) {
        auto& found = *static_cast<Find*>(data);
        if (module->dlpi_addr != found.base) return 0;
        found.storage = module->dlpi_tls_data;
        return 1;
      },
      &find);
  if (!find.storage) throw std::runtime_error("the simulator does not find its shared memory");
  return static_cast<uint8_t*>(find.storage);
}

bool Image::holds(uintptr_t at) const {
  return std::ranges::any_of(ranges_, [&](Range r) { return r.begin <= at && at < r.end; });
}

const Image::Function* Image::function_at(uintptr_t at) const {
  const auto after = std::ranges::upper_bound(functions_, at, {}, &Function::begin);
  return after == functions_.begin() ? nullptr : &*std::prev(after);
}

std::string Image::function(const void* address) const {
  const Function* found = function_at(reinterpret_cast<uintptr_t>(address));
  return found ? plain_name(found->mangled) : "?";
}

std::vector<std::string> Image::functions() const {
  std::vector<std::string> out;
  for (const Function& f : functions_)
    if (f.mangled.find('.') == std::string::npos)  // no clones
      out.push_back(plain_name(f.mangled));
  return out;
}

size_t Image::static_shared(const void* kernel) const {
  const Function* found = function_at(reinterpret_cast<uintptr_t>(kernel));
  size_t sum = 0;
  if (found)
    for (const Variable& v : variables_)
      if (v.owner.starts_with(found->mangled + "E")) sum += v.size;
  return sum;
}

std::string Image::source(uintptr_t return_address) const {
  std::ostringstream command;
  command << "addr2line -e '" << path_ << "' 0x" << std::hex << return_address - 1 - base_
          << " 2>/dev/null";
  std::string out;
  if (FILE* pipe = popen(command.str().c_str(), "r")) {
    char text[512];
    if (fgets(text, sizeof text, pipe)) out = text;
    pclose(pipe);
  }
  out = out.substr(0, out.find_first_of(" \n"));
  return out.empty() || out.starts_with("??") ? "an unknown line" : short_path(out);
}

}  // namespace cuda_sim
