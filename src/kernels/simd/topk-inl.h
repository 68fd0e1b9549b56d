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

/// The largest key below `last`.
inline int64_t next_key(const int64_t* keys, int64_t n, int64_t last) {
  int64_t most = kNoKey;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t key = keys[i] < last ? keys[i] : kNoKey;
    most = key > most ? key : most;
  }
  return most;
}

/// Ids of the k largest, largest first; k at most n.
inline void topk_of(const int64_t* keys, int64_t n, int64_t k, int64_t* ids) {
  int64_t last = kAboveKeys;
  for (int64_t i = 0; i < k; ++i) {
    last = next_key(keys, n, last);
    ids[i] = id_of(last);
  }
}

}  // namespace
}  // namespace turnout::kernels
