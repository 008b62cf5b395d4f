// SPDX-License-Identifier: Apache-2.0
// What Python modules that launch kernels under the emulator have in common.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "emulator.h"

namespace sparsebwd::cuda::emulator {

// The operands of a call: kernels may access the elements of these arrays while it lives. Arrays of
// any strides that are not negative; None is a null pointer.
class Operands {
 public:
  Operands() = default;
  Operands(const Operands&) = delete;
  ~Operands() { clear_buffers(); }

  template <class T>
  const T* input(const char* name, const pybind11::object& array) {
    return static_cast<const T*>(add(name, array, false, true));
  }

  // `initialised`: whether kernels may read what is there before they have written it.
  template <class T>
  T* output(const char* name, const pybind11::object& array, bool initialised = false) {
    return static_cast<T*>(const_cast<void*>(add(name, array, true, initialised)));
  }

  // Memory of just as many bytes, aligned to 256, full of NaNs.
  void* workspace(size_t bytes) {
    constexpr size_t kAlignment = 256;
    memory_ = std::make_unique<unsigned char[]>(bytes + 2 * kAlignment + kGuard);
    const auto address = reinterpret_cast<uintptr_t>(memory_.get());
    unsigned char* begin = memory_.get() + (kAlignment - address % kAlignment) % kAlignment;
    guard_ = begin + bytes;
    memset(begin, 0xFF, bytes);
    memset(guard_, kGuardByte, kGuard);
    add_buffer(begin, bytes, "workspace", true, false);
    return begin;
  }

  // Raises RuntimeError if the call has failed.
  void check(cudaError_t error) const {
    if (error != cudaSuccess)
      throw std::runtime_error(std::string(cudaGetErrorName(error)) + ": " +
                               cudaGetErrorString(error));
    const std::string mistake = take_host_error();
    if (!mistake.empty()) throw std::runtime_error(mistake);
    for (size_t i = 0; guard_ && i < kGuard; ++i)
      if (guard_[i] != kGuardByte)
        throw std::runtime_error("a kernel wrote beyond the end of its workspace");
  }

 private:
  static constexpr size_t kGuard = 256;
  static constexpr unsigned char kGuardByte = 0xA5;

  const void* add(const char* name, const pybind11::object& object, bool writable,
                  bool initialised) {
    if (object.is_none()) return nullptr;
    const auto array = object.cast<pybind11::array>();
    if (writable && !array.writeable())
      throw std::invalid_argument(std::string(name) + " is read-only");
    ssize_t bytes = array.itemsize();
    for (ssize_t i = 0; i < array.ndim(); ++i) {
      if (array.strides(i) < 0)
        throw std::invalid_argument(std::string(name) + " has negative strides");
      bytes += (array.shape(i) - 1) * array.strides(i);
    }
    if (array.size() > 0)
      add_buffer(array.data(), static_cast<size_t>(bytes), name, writable, initialised);
    return array.data();
  }

  std::unique_ptr<unsigned char[]> memory_;
  unsigned char* guard_ = nullptr;
};

// set_seed(int); set_device(multiprocessors, shared_per_block, shared_per_multiprocessor, cooperative).
inline void bind_controls(pybind11::module_& module) {
  module.def("set_seed", &set_seed);
  module.def("set_device", [](int multiprocessors, int shared_per_block,
                              int shared_per_multiprocessor, bool cooperative) {
    device() = {multiprocessors, shared_per_block, shared_per_multiprocessor, cooperative};
  });
}

}  // namespace sparsebwd::cuda::emulator
