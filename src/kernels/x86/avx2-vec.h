// AVX2 + FMA registers under the names that the bodies use; bf16 pairs are split into two fp32 products.
#pragma once

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#define TURNOUT_INLINE inline __attribute__((always_inline))

namespace turnout::kernels {
namespace {

struct Avx2 {
  using Reg = __m256;
  static constexpr int L = 8;
  static constexpr bool kBf16Dot = false;
  // of 16 registers: 6 × 2 accumulators, 2 weights, 1 input; 4 × 2, 4, 2 where pairs are split
  static constexpr int kVectors = 2, kRows = 6, kRowsBf16 = 4;
  static constexpr int kDotRows = 2;

  static TURNOUT_INLINE Reg zero() { return _mm256_setzero_ps(); }
  static TURNOUT_INLINE Reg set1(float v) { return _mm256_set1_ps(v); }
  static TURNOUT_INLINE Reg word(const char* p) {
    int v;
    memcpy(&v, p, 4);
    return _mm256_castsi256_ps(_mm256_set1_epi32(v));
  }
  static TURNOUT_INLINE Reg load(const void* p) { return _mm256_loadu_ps(static_cast<const float*>(p)); }
  static TURNOUT_INLINE void store(void* p, Reg v) { _mm256_storeu_ps(static_cast<float*>(p), v); }
  static TURNOUT_INLINE void stream(void* p, Reg v) { _mm256_stream_ps(static_cast<float*>(p), v); }
  static TURNOUT_INLINE Reg load_bytes(const char* p, int64_t n) {
    if (n >= 32) return load(p);
    alignas(32) char t[32] = {};
    memcpy(t, p, static_cast<size_t>(n));
    return _mm256_load_ps(reinterpret_cast<const float*>(t));
  }
  static TURNOUT_INLINE void store_n(char* p, Reg v, int64_t n) {
    if (n >= L) return store(p, v);
    alignas(32) float t[8];
    _mm256_store_ps(t, v);
    memcpy(p, t, static_cast<size_t>(n) * 4);
  }
  static TURNOUT_INLINE Reg fma(Reg a, Reg b, Reg c) { return _mm256_fmadd_ps(a, b, c); }
  static TURNOUT_INLINE void fma_into(Reg& c, Reg a, Reg b) {
    asm("vfmadd231ps %2, %1, %0" : "+x"(c) : "x"(a), "x"(b));
  }
  static TURNOUT_INLINE Reg add(Reg a, Reg b) { return _mm256_add_ps(a, b); }
  static TURNOUT_INLINE Reg sub(Reg a, Reg b) { return _mm256_sub_ps(a, b); }
  static TURNOUT_INLINE Reg mul(Reg a, Reg b) { return _mm256_mul_ps(a, b); }
  static TURNOUT_INLINE Reg abs(Reg a) { return _mm256_andnot_ps(set1(-0.f), a); }
  static TURNOUT_INLINE Reg clamp(Reg x, float lo, float hi) {
    return _mm256_max_ps(set1(lo), _mm256_min_ps(set1(hi), x));
  }
  static TURNOUT_INLINE Reg relu(Reg x) { return _mm256_max_ps(zero(), x); }
  static TURNOUT_INLINE Reg keep_positive(Reg x, Reg v) {
    return _mm256_and_ps(_mm256_cmp_ps(x, zero(), _CMP_NLE_UQ), v);
  }
  static TURNOUT_INLINE Reg round(Reg x) { return _mm256_round_ps(x, 8); }
  static TURNOUT_INLINE Reg scale2(Reg x, Reg n) {
    const __m256i e = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return mul(x, _mm256_castsi256_ps(_mm256_slli_epi32(e, 23)));
  }
  static TURNOUT_INLINE Reg reciprocal(Reg d) { return _mm256_div_ps(set1(1.f), d); }
  static TURNOUT_INLINE float sum(Reg v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
  }
  /// c[j] (+)= Σ of the lanes of v[j].
  static TURNOUT_INLINE void store_sums(float* c, const Reg (&v)[4], bool more) {
    const Reg four = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
    const __m128 one = _mm_add_ps(_mm256_castps256_ps128(four), _mm256_extractf128_ps(four, 1));
    _mm_storeu_ps(c, more ? _mm_add_ps(_mm_loadu_ps(c), one) : one);
  }

  // ---- bf16
  static TURNOUT_INLINE Reg dot(Reg a, Reg b, Reg c) { return fma(high(a), high(b), fma(low(a), low(b), c)); }
  static TURNOUT_INLINE Reg low(Reg w) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(w), 16)); }
  static TURNOUT_INLINE Reg high(Reg w) {
    return _mm256_castsi256_ps(_mm256_and_si256(_mm256_castps_si256(w), _mm256_set1_epi32(-65536)));
  }
  /// bf16 of each lane, in the low halves of 8 words: round to nearest even, NaN stays NaN.
  static TURNOUT_INLINE __m256i rounded(Reg v) {
    const __m256i u = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    const __m256i r = _mm256_srli_epi32(_mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
    const __m256i quiet = _mm256_or_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(0x40));
    return _mm256_blendv_epi8(r, quiet, _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q)));
  }
  static TURNOUT_INLINE __m128i narrow(Reg v) {
    const __m256i r = rounded(v);
    return _mm_packus_epi32(_mm256_castsi256_si128(r), _mm256_extracti128_si256(r, 1));
  }
  static TURNOUT_INLINE Reg widen(__m128i v) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16));
  }
  static TURNOUT_INLINE Reg round_bf16(Reg v) { return _mm256_castsi256_ps(_mm256_slli_epi32(rounded(v), 16)); }
  static TURNOUT_INLINE __m128i load16(const char* p, int64_t n) {
    if (n >= L) return _mm_loadu_si128((const __m128i*)p);
    alignas(16) char t[16] = {};
    memcpy(t, p, static_cast<size_t>(n) * 2);
    return _mm_load_si128((const __m128i*)t);
  }
  static TURNOUT_INLINE Reg load_bf16(const char* p) { return widen(_mm_loadu_si128((const __m128i*)p)); }
  static TURNOUT_INLINE Reg load_bf16_n(const char* p, int64_t n) { return widen(load16(p, n)); }
  static TURNOUT_INLINE void store_bf16(char* p, Reg v) { _mm_storeu_si128((__m128i*)p, narrow(v)); }
  static TURNOUT_INLINE void store_bf16_n(char* p, Reg v, int64_t n) {
    if (n >= L) return store_bf16(p, v);
    alignas(16) char t[16];
    _mm_store_si128((__m128i*)t, narrow(v));
    memcpy(p, t, static_cast<size_t>(n) * 2);
  }
  static TURNOUT_INLINE void stream_bf16(char* p, Reg v0, Reg v1) {
    _mm256_stream_si256((__m256i*)p, _mm256_inserti128_si256(_mm256_castsi128_si256(narrow(v0)), narrow(v1), 1));
  }
  static TURNOUT_INLINE Reg interleave(const char* a, const char* b, int64_t n) {
    const __m256i x = _mm256_cvtepu16_epi32(load16(a, n));
    if (b == nullptr) return _mm256_castsi256_ps(x);
    return _mm256_castsi256_ps(_mm256_or_si256(x, _mm256_slli_epi32(_mm256_cvtepu16_epi32(load16(b, n)), 16)));
  }
  static TURNOUT_INLINE Reg interleave(Reg a, Reg b) {
    return _mm256_castsi256_ps(_mm256_or_si256(rounded(a), _mm256_slli_epi32(rounded(b), 16)));
  }

  static TURNOUT_INLINE void transpose(Reg (&r)[8]) {
    Reg t[8];
    for (int i = 0; i < 8; i += 2) {
      t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
      t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
    for (int i = 0; i < 8; i += 4)
      for (int h = 0; h < 2; ++h) {
        r[i + 2 * h] = _mm256_shuffle_ps(t[i + h], t[i + h + 2], 0x44);
        r[i + 2 * h + 1] = _mm256_shuffle_ps(t[i + h], t[i + h + 2], 0xee);
      }
    for (int c = 0; c < 4; ++c) {
      t[c] = _mm256_permute2f128_ps(r[c], r[4 + c], 0x20);
      t[4 + c] = _mm256_permute2f128_ps(r[c], r[4 + c], 0x31);
    }
    for (int i = 0; i < 8; ++i) r[i] = t[i];
  }
};

}  // namespace
}  // namespace turnout::kernels
