// SPDX-License-Identifier: Apache-2.0
// Memory that is kept from call to call: fresh pages cost more than a sparse convolution.
#pragma once

#include <stdint.h>
#include <stdlib.h>

#include <new>

namespace sparsebwd {

class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { free(data_); }

  // At least `count` elements, aligned to a cache line. What was there before is gone.
  template <class T>
  T* get(int64_t count) {
    const size_t bytes = (static_cast<size_t>(count) * sizeof(T) + 127) / 64 * 64;
    if (bytes > bytes_) {
      free(data_);
      bytes_ = 0;
      data_ = aligned_alloc(64, bytes);
      if (!data_) throw std::bad_alloc();
      bytes_ = bytes;
    }
    return static_cast<T*>(data_);
  }

 private:
  void* data_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace sparsebwd
