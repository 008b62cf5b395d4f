// SPDX-License-Identifier: Apache-2.0
// Names of functions, from the symbol table of this module: kernels are not exported, so that the
// dynamic linker does not know them.
#include <cxxabi.h>
#include <dlfcn.h>
#include <elf.h>
#include <link.h>

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>

#include "runtime.h"

namespace sparsebwd::cuda::emulator {

namespace {

std::string symbol_at(const std::string& file, uint64_t offset) {
  std::ifstream stream(file, std::ios::binary);
  const std::string image((std::istreambuf_iterator<char>(stream)),
                          std::istreambuf_iterator<char>());
  const auto* header = reinterpret_cast<const ElfW(Ehdr)*>(image.data());
  if (image.size() < sizeof *header) return "";
  const auto* sections = reinterpret_cast<const ElfW(Shdr)*>(image.data() + header->e_shoff);
  for (int i = 0; i < header->e_shnum; ++i) {
    if (sections[i].sh_type != SHT_SYMTAB) continue;
    const char* names = image.data() + sections[sections[i].sh_link].sh_offset;
    const auto* symbols = reinterpret_cast<const ElfW(Sym)*>(image.data() + sections[i].sh_offset);
    for (size_t j = 0; j < sections[i].sh_size / sizeof *symbols; ++j)
      if (symbols[j].st_value <= offset && offset < symbols[j].st_value + symbols[j].st_size)
        return names + symbols[j].st_name;
  }
  return "";
}

// Without parameters and what every kernel has in common.
std::string shortened(std::string name) {
  for (const std::string common : {"(anonymous namespace)::", "sparsebwd::cuda::", "void "})
    for (size_t at; (at = name.find(common)) != std::string::npos;) name.erase(at, common.size());
  int depth = 0;  // of < >, whose arguments may have parentheses
  for (size_t i = 0; i < name.size(); ++i) {
    depth += name[i] == '<' ? 1 : name[i] == '>' ? -1 : 0;
    if (name[i] == '(' && depth == 0) return name.substr(0, i);
  }
  return name;
}

}  // namespace

std::string symbol(const void* address) {
  Dl_info info;
  std::string name;
  if (dladdr(address, &info) != 0)
    name =
        symbol_at(info.dli_fname, static_cast<uint64_t>(static_cast<const char*>(address) -
                                                        static_cast<const char*>(info.dli_fbase)));
  if (name.empty()) {
    char text[32];
    snprintf(text, sizeof text, "%p", address);
    return text;
  }
  int status = 0;
  char* readable = abi::__cxa_demangle(name.c_str(), nullptr, nullptr, &status);
  const std::string result = readable ? shortened(readable) : name;
  free(readable);
  return result;
}

}  // namespace sparsebwd::cuda::emulator
