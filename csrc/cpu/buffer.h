// SPDX-License-Identifier: Apache-2.0
// Memory that is kept from call to call: fresh pages cost more than a sparse convolution.
#pragma once

#include <stdint.h>
#include <stdlib.h>

#include <new>

namespace sparsebwd {

// Bytes of all buffers that this thread has made.
inline int64_t& held_bytes() {
  static thread_local int64_t bytes = 0;
  return bytes;
}

template <class T>
class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() {
    free(data_);
    held_bytes() -= bytes_;
  }

  // Room for `count` elements, aligned to a cache line. What was there before is gone.
  void reserve(int64_t count) {
    const int64_t bytes = (count * static_cast<int64_t>(sizeof(T)) + 127) / 64 * 64;
    if (bytes <= bytes_) return;
    free(data_);
    data_ = nullptr;
    held_bytes() -= bytes_;
    bytes_ = 0;
    data_ = static_cast<T*>(aligned_alloc(64, static_cast<size_t>(bytes)));
    if (!data_) throw std::bad_alloc();
    bytes_ = bytes;
    held_bytes() += bytes_;
  }

  T* data() const { return data_; }

 private:
  T* data_ = nullptr;
  int64_t bytes_ = 0;
};

}  // namespace sparsebwd
