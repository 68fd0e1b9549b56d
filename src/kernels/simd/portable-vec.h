// Four lanes in plain C++ (vector extensions of GCC and Clang): any CPU, and the shape of a new instruction set.
#pragma once

#include <stdint.h>
#include <string.h>

#define TURNOUT_INLINE inline __attribute__((always_inline))

namespace turnout::kernels {
namespace {

struct Portable {
  typedef float Reg __attribute__((vector_size(16)));
  typedef uint32_t Bits __attribute__((vector_size(16)));
  static constexpr int L = 4;
  static constexpr bool kBf16Dot = false;
  static constexpr int kVectors = 2, kRows = 4, kRowsBf16 = 4;
  static constexpr int kDotRows = 2;

  static TURNOUT_INLINE Reg zero() { return Reg{}; }
  static TURNOUT_INLINE Reg set1(float v) { return Reg{v, v, v, v}; }
  static TURNOUT_INLINE Reg word(const char* p) {
    float v;
    memcpy(&v, p, 4);
    return set1(v);
  }
  static TURNOUT_INLINE Reg load(const void* p) {
    Reg v;
    memcpy(&v, p, 16);
    return v;
  }
  static TURNOUT_INLINE void store(void* p, Reg v) { memcpy(p, &v, 16); }
  static TURNOUT_INLINE void stream(void* p, Reg v) { store(p, v); }
  static TURNOUT_INLINE Reg load_bytes(const char* p, int64_t n) {
    Reg v = zero();
    memcpy(&v, p, n < 16 ? static_cast<size_t>(n) : 16);
    return v;
  }
  static TURNOUT_INLINE void store_n(char* p, Reg v, int64_t n) { memcpy(p, &v, static_cast<size_t>(n) * 4); }
  static TURNOUT_INLINE Reg fma(Reg a, Reg b, Reg c) { return a * b + c; }
  static TURNOUT_INLINE void fma_into(Reg& c, Reg a, Reg b) { c = fma(a, b, c); }
  static TURNOUT_INLINE Reg add(Reg a, Reg b) { return a + b; }
  static TURNOUT_INLINE Reg sub(Reg a, Reg b) { return a - b; }
  static TURNOUT_INLINE Reg mul(Reg a, Reg b) { return a * b; }
  static TURNOUT_INLINE Reg abs(Reg a) { return (Reg)((Bits)a & 0x7fffffffu); }
  static TURNOUT_INLINE Reg clamp(Reg x, float lo, float hi) {
    x = x > hi ? set1(hi) : x;
    return x < lo ? set1(lo) : x;
  }
  static TURNOUT_INLINE Reg relu(Reg x) { return x < 0.f ? zero() : x; }
  static TURNOUT_INLINE Reg keep_positive(Reg x, Reg v) { return x <= 0.f ? zero() : v; }
  static TURNOUT_INLINE Reg round(Reg x) {  // adding 1.5·2²³ drops the fraction
    const Reg big = set1(12582912.f);
    return (x + big) - big;
  }
  static TURNOUT_INLINE Reg scale2(Reg x, Reg n) {
    Bits e;
    for (int i = 0; i < L; ++i) {
      const float v = n[i];
      e[i] = static_cast<uint32_t>((v == v ? static_cast<int>(v) : 0) + 127) << 23;
    }
    return x * (Reg)e;
  }
  static TURNOUT_INLINE Reg reciprocal(Reg d) { return set1(1.f) / d; }
  static TURNOUT_INLINE float sum(Reg v) { return (v[0] + v[2]) + (v[1] + v[3]); }
  /// c[j] (+)= Σ of the lanes of v[j].
  static TURNOUT_INLINE void store_sums(float* c, const Reg (&v)[4], bool more) {
    for (int j = 0; j < 4; ++j) c[j] = more ? c[j] + sum(v[j]) : sum(v[j]);
  }

  // ---- bf16
  static TURNOUT_INLINE Reg dot(Reg a, Reg b, Reg c) { return fma(high(a), high(b), fma(low(a), low(b), c)); }
  static TURNOUT_INLINE Reg low(Reg w) { return (Reg)((Bits)w << 16); }
  static TURNOUT_INLINE Reg high(Reg w) { return (Reg)((Bits)w & 0xffff0000u); }
  static TURNOUT_INLINE Bits rounded(Reg v) {
    const Bits u = (Bits)v, nan = (Bits)(v != v);
    const Bits r = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    return (r & ~nan) | (((u >> 16) | 0x40u) & nan);
  }
  static TURNOUT_INLINE Reg round_bf16(Reg v) { return (Reg)(rounded(v) << 16); }
  static TURNOUT_INLINE Reg load_bf16_n(const char* p, int64_t n) {
    uint16_t t[4] = {};
    memcpy(t, p, static_cast<size_t>(n) * 2);
    return (Reg)(Bits{t[0], t[1], t[2], t[3]} << 16);
  }
  static TURNOUT_INLINE Reg load_bf16(const char* p) { return load_bf16_n(p, 4); }
  static TURNOUT_INLINE void store_bf16_n(char* p, Reg v, int64_t n) {
    const Bits r = rounded(v);
    const uint16_t t[4] = {static_cast<uint16_t>(r[0]), static_cast<uint16_t>(r[1]), static_cast<uint16_t>(r[2]),
                           static_cast<uint16_t>(r[3])};
    memcpy(p, t, static_cast<size_t>(n) * 2);
  }
  static TURNOUT_INLINE void store_bf16(char* p, Reg v) { store_bf16_n(p, v, 4); }
  static TURNOUT_INLINE void stream_bf16(char* p, Reg v0, Reg v1) {
    store_bf16(p, v0);
    store_bf16(p + 8, v1);
  }
  static TURNOUT_INLINE Reg interleave(const char* a, const char* b, int64_t n) {
    const Bits x = (Bits)load_bf16_n(a, n) >> 16;
    return b == nullptr ? (Reg)x : (Reg)(x | (Bits)load_bf16_n(b, n));
  }
  static TURNOUT_INLINE Reg interleave(Reg a, Reg b) { return (Reg)(rounded(a) | rounded(b) << 16); }

  static TURNOUT_INLINE void transpose(Reg (&r)[4]) {
    const Reg a = r[0], b = r[1], c = r[2], d = r[3];
    for (int i = 0; i < 4; ++i) r[i] = Reg{a[i], b[i], c[i], d[i]};
  }
};

}  // namespace
}  // namespace turnout::kernels
