// SPDX-License-Identifier: Apache-2.0
// CUDA's intrinsics that need no other thread: bits, casts, roundings, min and max. Part of emulator.h.
#pragma once

inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline int __popcll(unsigned long long value) { return __builtin_popcountll(value); }
inline int __ffs(int value) { return __builtin_ffs(value); }
inline int __ffsll(long long value) { return __builtin_ffsll(value); }
inline int __clz(int value) { return value ? __builtin_clz(static_cast<unsigned>(value)) : 32; }
inline int __clzll(long long value) {
  return value ? __builtin_clzll(static_cast<unsigned long long>(value)) : 64;
}
inline unsigned long long __brevll(unsigned long long value) {
  unsigned long long result = 0;
  for (int i = 0; i < 64; ++i) result |= (value >> i & 1) << (63 - i);
  return result;
}
inline unsigned __brev(unsigned value) { return static_cast<unsigned>(__brevll(value) >> 32); }
// The n-th set bit (n > 0) at or after `base`, (n < 0) at or before it, or ~0.
inline unsigned __fns(unsigned mask, unsigned base, int n) {
  if (n == 0) return mask >> base & 1 ? base : ~0u;
  for (int i = static_cast<int>(base), left = n < 0 ? -n : n; i >= 0 && i < 32; i += n < 0 ? -1 : 1)
    if (mask >> i & 1 && --left == 0) return static_cast<unsigned>(i);
  return ~0u;
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>(((static_cast<uint64_t>(high) << 32 | low) << (shift & 31)) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((static_cast<uint64_t>(high) << 32 | low) >> (shift & 31));
}
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t bytes = static_cast<uint64_t>(y) << 32 | x;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i)
    result |= static_cast<unsigned>(bytes >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
  return result;
}
inline unsigned __vmaxu2(unsigned x, unsigned y) {
  const unsigned low_x = x & 0xFFFF, low_y = y & 0xFFFF, high = (x > y ? x : y) & 0xFFFF0000;
  return high | (low_x > low_y ? low_x : low_y);
}
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32);
}
inline int __mulhi(int a, int b) { return static_cast<int>(static_cast<int64_t>(a) * b >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return static_cast<unsigned long long>(static_cast<unsigned __int128>(a) * b >> 64);
}

inline float __uint_as_float(unsigned bits) {
  return sparsebwd::cuda::emulator::bits_as<float>(bits);
}
inline unsigned __float_as_uint(float value) {
  return sparsebwd::cuda::emulator::bits_as<unsigned>(value);
}
inline float __int_as_float(int bits) { return sparsebwd::cuda::emulator::bits_as<float>(bits); }
inline int __float_as_int(float value) { return sparsebwd::cuda::emulator::bits_as<int>(value); }
inline double __longlong_as_double(long long bits) {
  return sparsebwd::cuda::emulator::bits_as<double>(bits);
}
inline long long __double_as_longlong(double value) {
  return sparsebwd::cuda::emulator::bits_as<long long>(value);
}

// Compiled without contraction, C++ rounds each operation as these do.
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return sqrtf(a); }
inline double __fma_rn(double a, double b, double c) { return fma(a, b, c); }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dsub_rn(double a, double b) { return a - b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline double __dsqrt_rn(double a) { return sqrt(a); }
inline float __double2float_rn(double a) { return static_cast<float>(a); }
inline float __int2float_rn(int a) { return static_cast<float>(a); }
inline float __uint2float_rn(unsigned a) { return static_cast<float>(a); }
inline float __ll2float_rn(long long a) { return static_cast<float>(a); }
inline double __ll2double_rn(long long a) { return static_cast<double>(a); }
inline int __float2int_rz(float a) { return static_cast<int>(a); }
inline int __float2int_rn(float a) { return static_cast<int>(rintf(a)); }
inline float __saturatef(float a) { return a > 0 ? (a < 1 ? a : 1) : 0; }  // of a NaN, 0

template <class A, class B, class T = std::common_type_t<A, B>>
inline std::enable_if_t<std::is_arithmetic_v<T>, T> min(A left, B right) {
  const T a = static_cast<T>(left), b = static_cast<T>(right);
  if constexpr (std::is_floating_point_v<T>) return std::fmin(a, b);
  else return b < a ? b : a;
}
template <class A, class B, class T = std::common_type_t<A, B>>
inline std::enable_if_t<std::is_arithmetic_v<T>, T> max(A left, B right) {
  const T a = static_cast<T>(left), b = static_cast<T>(right);
  if constexpr (std::is_floating_point_v<T>) return std::fmax(a, b);
  else return a < b ? b : a;
}
