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
  ~Buffer() {
    free(data_);
    held_ -= bytes_;
  }

  // Bytes of all buffers that this thread has made.
  static int64_t held() { return held_; }

  // At least `count` elements, aligned to a cache line. What was there before is gone.
  template <class T>
  T* get(int64_t count) {
    const int64_t bytes = (count * static_cast<int64_t>(sizeof(T)) + 127) / 64 * 64;
    if (bytes > bytes_) {
      free(data_);
      held_ -= bytes_;
      bytes_ = 0;
      data_ = aligned_alloc(64, bytes);
      if (!data_) throw std::bad_alloc();
      bytes_ = bytes;
      held_ += bytes_;
    }
    return static_cast<T*>(data_);
  }

 private:
  void* data_ = nullptr;
  int64_t bytes_ = 0;
  static inline thread_local int64_t held_ = 0;
};

}  // namespace sparsebwd
