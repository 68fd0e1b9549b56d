// Top-k of a row of scores by keys: whole numbers in the order of the scores, all of them different.
//
// The next largest is the largest key below the last one: a pass of vector comparisons without branches or stores, so
// that rows overlap in the processor. k passes of n / 8 steps suit short rows; long ones are served by routing.cpp.
#pragma once

#include <stdint.h>
#include <string.h>

namespace turnout::kernels {
namespace {

constexpr int64_t kNoKey = INT64_MIN;    ///< below every key
constexpr int64_t kAboveKeys = INT64_MAX;  ///< above every key
constexpr int64_t kKeyIds = 0x7fffffff;  ///< low half of a key: this less the id, so that the lower id is the greater key

/// Greater scores have greater keys; equal scores (−0 and 0 too) the lower id; NaN has the greatest of all.
inline int64_t key_of(float score, int64_t id) {
  const float s = score + 0.f;
  int32_t bits;
  memcpy(&bits, &s, 4);
  bits ^= (bits >> 31) & 0x7fffffff;
  bits = s != s ? 0x7fffffff : bits;
  return static_cast<int64_t>(static_cast<uint64_t>(static_cast<uint32_t>(bits)) << 32) + (kKeyIds - id);
}

inline int64_t id_of(int64_t key) { return kKeyIds - (key & 0xffffffff); }

inline void keys_of(const float* scores, int64_t n, int64_t* keys) {
  for (int64_t i = 0; i < n; ++i) keys[i] = key_of(scores[i], i);
}

/// Vectors of whole numbers, as the compiler has them; a size that depends on a template parameter is beyond GCC 12.
template <int kBytes>
struct KeyVector;
template <>
struct KeyVector<16> {  // SSE2 compares no words of 64 bits: one is all there is
  typedef int64_t Type __attribute__((vector_size(8)));
};
template <>
struct KeyVector<32> {
  typedef int64_t Type __attribute__((vector_size(32)));
};
template <>
struct KeyVector<64> {
  typedef int64_t Type __attribute__((vector_size(64)));
};

/// The largest key below `last`.
template <int kBytes>
inline int64_t next_key(const int64_t* keys, int64_t n, int64_t last) {
  using Vector = typename KeyVector<kBytes>::Type;
  constexpr int kLanes = sizeof(Vector) / 8;
  const Vector none = Vector{} + kNoKey, limit = Vector{} + last;
  const auto read = [&](int64_t at) {
    Vector key;
    memcpy(&key, keys + at, sizeof(key));
    return key < limit ? key : none;
  };
  const auto larger = [](Vector a, Vector b) { return a > b ? a : b; };
  // two chains: a comparison and a choice take 4 cycles, a load half a one
  Vector lanes = none, others = none;
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    lanes = larger(read(i), lanes);
    others = larger(read(i + kLanes), others);
  }
  if (i + kLanes <= n) {
    lanes = larger(read(i), lanes);
    i += kLanes;
  }
  lanes = larger(others, lanes);
  int64_t most = kNoKey;
  for (; i < n; ++i)
    if (keys[i] < last && keys[i] > most) most = keys[i];
  for (int l = 0; l < kLanes; ++l) most = lanes[l] > most ? lanes[l] : most;
  return most;
}

/// Ids of the k largest, largest first; k at most n.
template <int kBytes>
inline void topk_of(const int64_t* keys, int64_t n, int64_t k, int64_t* ids) {
  int64_t last = kAboveKeys;
  for (int64_t i = 0; i < k; ++i) {
    last = next_key<kBytes>(keys, n, last);
    ids[i] = id_of(last);
  }
}

}  // namespace
}  // namespace turnout::kernels
