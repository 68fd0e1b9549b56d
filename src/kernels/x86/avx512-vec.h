// AVX-512 registers under the names that the bodies use; kDot: the CPU multiplies bf16 pairs itself.
#pragma once

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#define TURNOUT_INLINE inline __attribute__((always_inline))

namespace turnout::kernels {
namespace {  // internal linkage: nothing compiled with wide instructions may be shared at link time

template <bool kDot>
struct Avx512 {
  using Reg = __m512;
  static constexpr int L = 16;
  static constexpr bool kBf16Dot = kDot;
  // 6 rows × 4 vectors = 24 accumulators, 4 weights, 1 input of 32 registers. 12 × 2 is as fast where a core has its
  // whole front end, but takes 38 instructions for these 34: 5 to 9 points slower beside a busy sibling thread (Intel).
  static constexpr int kVectors = 4, kRows = 6, kRowsBf16 = 6;
  // rows × 4 outputs of in-place products: as many instructions for as many multiply-adds
  static constexpr int kDotRows = 6;

  static TURNOUT_INLINE Reg zero() { return _mm512_setzero_ps(); }
  static TURNOUT_INLINE Reg set1(float v) { return _mm512_set1_ps(v); }
  static TURNOUT_INLINE Reg word(const char* p) {
    int v;
    memcpy(&v, p, 4);
    return _mm512_castsi512_ps(_mm512_set1_epi32(v));
  }
  static TURNOUT_INLINE Reg load(const void* p) { return _mm512_loadu_ps(p); }
  static TURNOUT_INLINE void store(void* p, Reg v) { _mm512_storeu_ps(p, v); }
  static TURNOUT_INLINE void stream(void* p, Reg v) { _mm512_stream_ps(static_cast<float*>(p), v); }
  static TURNOUT_INLINE Reg load_bytes(const char* p, int64_t n) {
    return _mm512_castsi512_ps(_mm512_maskz_loadu_epi8(n >= 64 ? ~0ull : (1ull << n) - 1, p));
  }
  static TURNOUT_INLINE void store_n(char* p, Reg v, int64_t n) {
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), v);
  }
  static TURNOUT_INLINE Reg fma(Reg a, Reg b, Reg c) { return _mm512_fmadd_ps(a, b, c); }
  /// c += a · b in c's own register: the compiler, left to choose, moves the sums of a tile around.
  static TURNOUT_INLINE void fma_into(Reg& c, Reg a, Reg b) {
    asm("vfmadd231ps %2, %1, %0" : "+v"(c) : "v"(a), "v"(b));
  }
  static TURNOUT_INLINE Reg add(Reg a, Reg b) { return _mm512_add_ps(a, b); }
  static TURNOUT_INLINE Reg sub(Reg a, Reg b) { return _mm512_sub_ps(a, b); }
  static TURNOUT_INLINE Reg mul(Reg a, Reg b) { return _mm512_mul_ps(a, b); }
  static TURNOUT_INLINE Reg abs(Reg a) { return _mm512_abs_ps(a); }
  // max and min return the second operand where one is NaN, so NaN goes through clamp()
  static TURNOUT_INLINE Reg clamp(Reg x, float lo, float hi) {
    return _mm512_max_ps(set1(lo), _mm512_min_ps(set1(hi), x));
  }
  static TURNOUT_INLINE Reg relu(Reg x) { return _mm512_max_ps(zero(), x); }
  static TURNOUT_INLINE Reg keep_positive(Reg x, Reg v) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, zero(), _CMP_NLE_UQ), v);
  }
  static TURNOUT_INLINE Reg round(Reg x) { return _mm512_roundscale_ps(x, 8); }
  static TURNOUT_INLINE Reg scale2(Reg x, Reg n) { return _mm512_scalef_ps(x, n); }
  static TURNOUT_INLINE Reg reciprocal(Reg d) {  // 2⁻¹⁴, then one Newton step: 2⁻²⁷
    const Reg y = _mm512_rcp14_ps(d);
    return _mm512_mul_ps(y, _mm512_fnmadd_ps(d, y, set1(2.f)));
  }
  static TURNOUT_INLINE float sum(Reg v) { return _mm512_reduce_add_ps(v); }
  /// c[j] (+)= Σ of the lanes of v[j].
  static TURNOUT_INLINE void store_sums(float* c, const Reg (&v)[4], bool more) {
    const Reg a = add(_mm512_unpacklo_ps(v[0], v[1]), _mm512_unpackhi_ps(v[0], v[1]));
    const Reg b = add(_mm512_unpacklo_ps(v[2], v[3]), _mm512_unpackhi_ps(v[2], v[3]));
    const __m512d x = _mm512_castps_pd(a), y = _mm512_castps_pd(b);
    const Reg four = add(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
    const __m256 two = _mm256_add_ps(_mm512_castps512_ps256(four), _mm512_extractf32x8_ps(four, 1));
    const __m128 one = _mm_add_ps(_mm256_castps256_ps128(two), _mm256_extractf128_ps(two, 1));
    _mm_storeu_ps(c, more ? _mm_add_ps(_mm_loadu_ps(c), one) : one);
  }

  // ---- bf16
  static TURNOUT_INLINE Reg dot(Reg a, Reg b, Reg c) {
    if constexpr (kDot) {
#if defined(__AVX512BF16__)
      return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b);
#endif
    }
    return _mm512_fmadd_ps(high(a), high(b), _mm512_fmadd_ps(low(a), low(b), c));
  }
  static TURNOUT_INLINE Reg low(Reg w) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(w), 16)); }
  static TURNOUT_INLINE Reg high(Reg w) {
    return _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(w), _mm512_set1_epi32(-65536)));
  }
  static TURNOUT_INLINE __m256i narrow(Reg v) {
    if constexpr (kDot) {
#if defined(__AVX512BF16__)
      return (__m256i)_mm512_cvtneps_pbh(v);
#endif
    }
    const __m512i u = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    __m512i r = _mm512_srli_epi32(_mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    r = _mm512_mask_or_epi32(r, nan, _mm512_srli_epi32(u, 16), _mm512_set1_epi32(0x40));
    return _mm512_cvtepi32_epi16(r);
  }
  static TURNOUT_INLINE Reg widen(__m256i v) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16));
  }
  static TURNOUT_INLINE Reg round_bf16(Reg v) { return widen(narrow(v)); }
  static TURNOUT_INLINE __m256i load16(const char* p, int64_t n) {
    return _mm256_maskz_loadu_epi16(static_cast<__mmask16>(n >= L ? 0xffffu : (1u << n) - 1), p);
  }
  static TURNOUT_INLINE Reg load_bf16(const char* p) { return widen(_mm256_loadu_si256((const __m256i*)p)); }
  static TURNOUT_INLINE Reg load_bf16_n(const char* p, int64_t n) { return widen(load16(p, n)); }
  static TURNOUT_INLINE void store_bf16(char* p, Reg v) { _mm256_storeu_si256((__m256i*)p, narrow(v)); }
  static TURNOUT_INLINE void store_bf16_n(char* p, Reg v, int64_t n) {
    _mm256_mask_storeu_epi16(p, static_cast<__mmask16>((1u << n) - 1), narrow(v));
  }
  static TURNOUT_INLINE void stream_bf16(char* p, Reg v0, Reg v1) {
    const __m512i v = _mm512_inserti64x4(_mm512_castsi256_si512(narrow(v0)), narrow(v1), 1);
    _mm512_stream_si512((__m512i*)p, v);
  }
  /// Words of two rows of bf16: the first row in the low half. A null row counts as zeros.
  static TURNOUT_INLINE Reg interleave(const char* a, const char* b, int64_t n) {
    const __m512i x = _mm512_cvtepu16_epi32(load16(a, n));
    if (b == nullptr) return _mm512_castsi512_ps(x);
    return _mm512_castsi512_ps(_mm512_or_si512(x, _mm512_slli_epi32(_mm512_cvtepu16_epi32(load16(b, n)), 16)));
  }
  static TURNOUT_INLINE Reg interleave(Reg a, Reg b) {
    const __m512i x = _mm512_cvtepu16_epi32(narrow(a)), y = _mm512_cvtepu16_epi32(narrow(b));
    return _mm512_castsi512_ps(_mm512_or_si512(x, _mm512_slli_epi32(y, 16)));
  }

  /// Rows become columns, in four rounds of exchanges between halves of growing size.
  static TURNOUT_INLINE void transpose(Reg (&r)[16]) {
    Reg t[16];
    for (int i = 0; i < 16; i += 2) {
      t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
      t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
      for (int h = 0; h < 2; ++h) {
        const __m512d a = _mm512_castps_pd(t[i + h]), b = _mm512_castps_pd(t[i + h + 2]);
        r[i + 2 * h] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
        r[i + 2 * h + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
      }
    for (int c = 0; c < 4; ++c) {  // r[4q + c] holds column c of each 128-bit lane for rows 4q .. 4q + 3
      const Reg lo = _mm512_shuffle_f32x4(r[c], r[4 + c], 0x88), lo2 = _mm512_shuffle_f32x4(r[8 + c], r[12 + c], 0x88);
      const Reg hi = _mm512_shuffle_f32x4(r[c], r[4 + c], 0xdd), hi2 = _mm512_shuffle_f32x4(r[8 + c], r[12 + c], 0xdd);
      t[c] = _mm512_shuffle_f32x4(lo, lo2, 0x88);
      t[8 + c] = _mm512_shuffle_f32x4(lo, lo2, 0xdd);
      t[4 + c] = _mm512_shuffle_f32x4(hi, hi2, 0x88);
      t[12 + c] = _mm512_shuffle_f32x4(hi, hi2, 0xdd);
    }
    for (int i = 0; i < 16; ++i) r[i] = t[i];
  }
};

}  // namespace
}  // namespace turnout::kernels
