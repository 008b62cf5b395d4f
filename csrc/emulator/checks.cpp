// SPDX-License-Identifier: Apache-2.0
// Memory checks of the checked build. GCC's -fsanitize=thread puts a call of __tsan_read4(address)
// or the like before each access, -fsanitize=undefined one of __ubsan_handle_...() where a check
// has failed. Here are those functions.
//
// Each byte that kernels may access has a shadow: whether it was written, by whom last, and who
// read it last. An access is a race if one of those was not ordered before it. Order comes from
// barriers and warp intrinsics: each thread counts its own (`clock`), and has heard of others up to
// some count of theirs (`known`, see join()). Between blocks, it comes from grid_sync, and kernels
// that use __threadfence are trusted to pass data between blocks as they should.
#include <dlfcn.h>
#include <link.h>

#include <algorithm>
#include <cstdio>
#include <utility>

#include "runtime.h"

namespace sparsebwd::cuda::emulator {

#ifdef SPARSEBWD_EMULATOR_CHECKED

namespace {

struct Buffer {
  uintptr_t begin, end;
  std::string name;
  bool writable;
  Shadow shadow;
};
std::vector<Buffer> buffers;
std::string host_error;

struct Module {
  uintptr_t base = 0, begin = 0, end = 0;
};

// Where this module is in memory, with its constants.
const Module& module() {
  static const Module found = [] {
    Module module;
    dl_iterate_phdr(
        [](dl_phdr_info* info, size_t, void* result) {
          uintptr_t begin = UINTPTR_MAX, end = 0;
          for (int i = 0; i < info->dlpi_phnum; ++i) {
            const auto& header = info->dlpi_phdr[i];
            if (header.p_type != PT_LOAD) continue;
            begin = std::min<uintptr_t>(begin, info->dlpi_addr + header.p_vaddr);
            end = std::max<uintptr_t>(end, info->dlpi_addr + header.p_vaddr + header.p_memsz);
          }
          const auto here = reinterpret_cast<uintptr_t>(&state);
          if (here < begin || here >= end) return 0;
          *static_cast<Module*>(result) = {info->dlpi_addr, begin, end};
          return 1;
        },
        &module);
    return module;
  }();
  return found;
}

uint32_t place_of(const void* code) {
  return static_cast<uint32_t>(reinterpret_cast<uintptr_t>(code) - module().base);
}

std::string hex(uint64_t value) {
  char text[24];
  snprintf(text, sizeof text, "0x%llx", static_cast<unsigned long long>(value));
  return text;
}

// tests/emulation.py turns this into file and line.
std::string place_name(uint32_t place) { return "{code " + hex(place) + "}"; }

const char* verb(Use use) {
  switch (use) {
    case Use::kRead: return "reads";
    case Use::kAtomic: return "updates";
    case Use::kIssueCopy: return "copies to";
    default: return "writes";
  }
}

std::string thread_name(uint32_t thread) {
  const uint32_t all = thread - state.first_thread, number = all % state.block_threads;
  const dim3 &grid = state.launch.grid, &block = state.launch.block;
  const uint32_t index = all / state.block_threads;
  return "thread " +
         coordinates({number % block.x, number / block.x % block.y, number / block.x / block.y}) +
         " of block " +
         coordinates({index % grid.x, index / grid.x % grid.y, index / grid.x / grid.y});
}

// An access as it is checked, with what messages about it say.
struct Checked {
  const Fibre& fibre;
  uintptr_t address;
  size_t bytes;
  Use use;
  const void* code;

  [[noreturn]] void complain(const std::string& where, const std::string& what) const {
    fail("%s %zu bytes %s at %s: %s", verb(use), bytes, where.c_str(),
         place_name(place_of(code)).c_str(), what.c_str());
  }
};

// Whether what `access` says happened before what the fibre does now.
bool ordered(const Access& access, const Fibre& fibre) {
  if (access.thread < state.first_thread) return true;  // no access, or one of an earlier launch
  const Block& block = *fibre.block;
  const uint32_t number = access.thread - block.first_thread;
  if (number < state.block_threads)
    return number == fibre.number || (*fibre.known)[number] >= access.clock;
  if (state.fenced) return true;
  if (!state.launch.cooperative) return false;
  const uint32_t all = access.thread - state.first_thread;
  return state.blocks[all / state.block_threads]->threads[all % state.block_threads]->grid_clock >=
         access.clock;
}

void check_byte(Shadow::Byte& byte, const Access& now, const Checked& access,
                const std::string& where) {
  const Fibre& fibre = access.fibre;
  const auto race = [&](const char* what, const Access& other) {
    access.complain(where, "a race with " + thread_name(other.thread) + ", which " + what +
                               " them at " + place_name(other.place) + ", with no barrier between");
  };
  if (access.use == Use::kFinishCopy) {
    byte.write = now;
    byte.state = Shadow::kWritten;
    return;
  }
  if (byte.state == Shadow::kOnTheWay)
    access.complain(where, thread_name(byte.write.thread) +
                               " copies to them asynchronously, as of " +
                               place_name(byte.write.place) + ", and has not waited for that");
  const bool atomic = access.use == Use::kAtomic;
  if (byte.state == Shadow::kEmpty && (access.use == Use::kRead || atomic))
    access.complain(where, "nothing was written there");
  if (!(atomic && byte.atomic) && !ordered(byte.write, fibre)) race("wrote", byte.write);
  if (access.use == Use::kRead) {
    // Two reads stand for all that are not ordered.
    const int place = ordered(byte.reads[0], fibre)   ? 0
                      : ordered(byte.reads[1], fibre) ? 1
                                                      : now.thread % 2;
    byte.reads[place] = now;
    return;
  }
  for (const Access& read : byte.reads)
    if (!ordered(read, fibre)) race("read", read);
  byte.reads[0] = byte.reads[1] = {};
  byte.write = now;
  byte.atomic = atomic;
  byte.state = access.use == Use::kIssueCopy ? Shadow::kOnTheWay : Shadow::kWritten;
}

void check_bytes(Shadow& shadow, size_t offset, const Checked& access, const std::string& name) {
  const Fibre& fibre = access.fibre;
  const Access now = {fibre.block->first_thread + fibre.number, fibre.clock, place_of(access.code)};
  for (size_t i = 0; i < access.bytes; ++i) check_byte(shadow.bytes[offset + i], now, access, name);
}

// Where an address is that is in nothing that may be accessed: the nearest that is.
std::string describe(const Checked& access) {
  constexpr uintptr_t kNear = 1 << 20;
  uintptr_t distance = kNear;
  std::string nearest = "at address " + hex(access.address);
  const auto consider = [&](uintptr_t begin, uintptr_t end, const std::string& name) {
    const bool before = access.address < begin;
    const uintptr_t away = before ? begin - access.address : access.address + access.bytes - end;
    if (away > distance) return;
    distance = away;
    nearest = before ? std::to_string(away) + " bytes before " + name
                     : "at offset " + std::to_string(access.address - begin) + " of " + name +
                           ", which has " + std::to_string(end - begin) + " bytes,";
  };
  for (const Buffer& buffer : buffers) consider(buffer.begin, buffer.end, buffer.name);
  const auto shared = reinterpret_cast<uintptr_t>(access.fibre.block->shared);
  consider(shared, shared + state.launch.shared, "the block's shared memory");
  return nearest;
}

bool inside(const Checked& access, uintptr_t begin, uintptr_t end) {
  return access.address >= begin && access.address + access.bytes <= end;
}

}  // namespace

void add_buffer(const void* data, size_t bytes, const char* name, bool writable, bool initialised) {
  Buffer added = {reinterpret_cast<uintptr_t>(data),
                  reinterpret_cast<uintptr_t>(data) + bytes,
                  name,
                  writable,
                  {}};
  added.shadow.bytes.assign(bytes, {});
  const auto mark = [&](uintptr_t begin, const Shadow& of) {
    for (size_t i = 0; i < of.bytes.size(); ++i)
      if (of.bytes[i].state == Shadow::kWritten)
        added.shadow.bytes[begin - added.begin + i].state = Shadow::kWritten;
  };
  if (initialised)
    for (Shadow::Byte& byte : added.shadow.bytes) byte.state = Shadow::kWritten;
  // Operands that share memory become one.
  for (size_t i = 0; i < buffers.size();) {
    Buffer& other = buffers[i];
    if (other.end <= added.begin || added.end <= other.begin) {
      ++i;
      continue;
    }
    const Buffer before = std::move(added);
    added = {std::min(before.begin, other.begin),
             std::max(before.end, other.end),
             other.name + " / " + before.name,
             before.writable || other.writable,
             {}};
    added.shadow.bytes.assign(added.end - added.begin, {});
    mark(before.begin, before.shadow);
    mark(other.begin, other.shadow);
    buffers.erase(buffers.begin() + static_cast<ptrdiff_t>(i));
  }
  buffers.push_back(std::move(added));
}

void clear_buffers() { buffers.clear(); }

void check_access(const void* pointer, size_t bytes, Use use, const void* code) {
  const Fibre* fibre = state.current;
  if (!fibre || bytes == 0) return;
  const Checked access = {*fibre, reinterpret_cast<uintptr_t>(pointer), bytes, use, code};
  if (inside(access, reinterpret_cast<uintptr_t>(fibre->stack),
             reinterpret_cast<uintptr_t>(fibre->stack_end)))
    return;
  static const std::string kShared = "of shared memory";
  const auto shared = reinterpret_cast<uintptr_t>(fibre->block->shared);
  if (inside(access, shared, shared + state.launch.shared)) {
    check_bytes(fibre->block->shadow, access.address - shared, access, kShared);
    return;
  }
  for (Buffer& buffer : buffers)
    if (inside(access, buffer.begin, buffer.end)) {
      if (use != Use::kRead && !buffer.writable)
        access.complain("of " + buffer.name, "it is an input");
      check_bytes(buffer.shadow, access.address - buffer.begin, access, buffer.name);
      return;
    }
  if (use == Use::kRead) {
    const auto arguments = reinterpret_cast<uintptr_t>(state.launch.arguments);
    if (inside(access, arguments, arguments + state.launch.argument_bytes)) return;
    if (inside(access, module().begin, module().end)) return;
  }
  access.complain(describe(access), "that is out of bounds");
}

std::string take_host_error() { return std::exchange(host_error, {}); }

namespace {

void on_access(const void* pointer, size_t bytes, Use use, const void* code) {
  if (!state.current) return;
  if (reinterpret_cast<uintptr_t>(pointer) % bytes != 0)
    fail("%s %zu bytes at address %p, which is not a multiple of that, at %s", verb(use), bytes,
         pointer, place_name(place_of(code)).c_str());
  check_access(pointer, bytes, use, code);
}

struct SourceLocation {
  const char* file;
  uint32_t line, column;
};

// `data` of all handlers begins with the place in the source.
void undefined(const char* what, const void* data) {
  const auto* location = static_cast<const SourceLocation*>(data);
  const char* name = strrchr(location->file, '/');
  char text[300];
  snprintf(text, sizeof text, "undefined behaviour at %s:%u: %s", name ? name + 1 : location->file,
           location->line, what);
  if (state.current) fail("%s", text);
  if (host_error.empty()) host_error = text;
}

struct TypeMismatch {
  SourceLocation location;
  const void* type;
  unsigned char log_alignment, kind;
};

}  // namespace

#else

void add_buffer(const void*, size_t, const char*, bool, bool) {}
void clear_buffers() {}
void check_access(const void*, size_t, Use, const void*) {}
std::string take_host_error() { return ""; }

#endif

}  // namespace sparsebwd::cuda::emulator

#ifdef SPARSEBWD_EMULATOR_CHECKED

using namespace sparsebwd::cuda::emulator;

extern "C" {

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}

#define SPARSEBWD_CALLBACKS(bytes)                                 \
  void __tsan_read##bytes(void* p) {                               \
    on_access(p, bytes, Use::kRead, __builtin_return_address(0));  \
  }                                                                \
  void __tsan_write##bytes(void* p) {                              \
    on_access(p, bytes, Use::kWrite, __builtin_return_address(0)); \
  }
SPARSEBWD_CALLBACKS(1)
SPARSEBWD_CALLBACKS(2)
SPARSEBWD_CALLBACKS(4)
SPARSEBWD_CALLBACKS(8)
SPARSEBWD_CALLBACKS(16)
#undef SPARSEBWD_CALLBACKS

void __tsan_read_range(void* p, size_t bytes) {
  check_access(p, bytes, Use::kRead, __builtin_return_address(0));
}
void __tsan_write_range(void* p, size_t bytes) {
  check_access(p, bytes, Use::kWrite, __builtin_return_address(0));
}

void __ubsan_handle_type_mismatch_v1(const TypeMismatch* data, uintptr_t pointer) {
  const uintptr_t alignment = uintptr_t{1} << data->log_alignment;
  char text[100];
  if (pointer == 0) snprintf(text, sizeof text, "a null pointer is used");
  else if (pointer % alignment != 0)
    snprintf(text, sizeof text,
             "a misaligned access: %p is not a multiple of %zu, as its type needs",
             reinterpret_cast<void*>(pointer), static_cast<size_t>(alignment));
  else snprintf(text, sizeof text, "an access beyond the end of an object");
  undefined(text, data);
}

#define SPARSEBWD_HANDLER(name, what) \
  void __ubsan_handle_##name(const void* data) { undefined(what, data); }
SPARSEBWD_HANDLER(add_overflow, "a signed sum overflows")
SPARSEBWD_HANDLER(sub_overflow, "a signed difference overflows")
SPARSEBWD_HANDLER(mul_overflow, "a signed product overflows")
SPARSEBWD_HANDLER(negate_overflow, "a negation overflows")
SPARSEBWD_HANDLER(divrem_overflow, "a division by zero, or one that overflows")
SPARSEBWD_HANDLER(shift_out_of_bounds, "a shift by too much, or of a negative value")
SPARSEBWD_HANDLER(out_of_bounds, "an index is outside its array")
SPARSEBWD_HANDLER(builtin_unreachable, "code that cannot be reached is")
SPARSEBWD_HANDLER(missing_return, "a function returns no value")
SPARSEBWD_HANDLER(vla_bound_not_positive, "an array of no positive size")
SPARSEBWD_HANDLER(float_cast_overflow, "a floating-point value is outside the range of an integer")
SPARSEBWD_HANDLER(load_invalid_value,
                  "a value that its type, bool or an enumeration, does not have")
SPARSEBWD_HANDLER(invalid_builtin, "an argument that a builtin function does not accept")
SPARSEBWD_HANDLER(nonnull_arg, "a null pointer is passed where none may be")
SPARSEBWD_HANDLER(nonnull_return_v1, "a null pointer is returned where none may be")
SPARSEBWD_HANDLER(pointer_overflow, "pointer arithmetic overflows, or begins at a null pointer")
#undef SPARSEBWD_HANDLER

}  // extern "C"

#endif
