// Small hash functions: numbers that depend on nothing but their arguments, so that no random state must be kept.
#pragma once

#include <cstdint>
#include <string_view>

namespace turnout {

/// Finaliser of splitmix64: every bit of the result depends on every bit of x.
inline uint64_t mix_bits(uint64_t x) {
  x += 0x9e3779b97f4a7c15ull;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}

inline uint64_t hash_numbers(uint64_t a, uint64_t b, uint64_t c = 0) { return mix_bits(mix_bits(mix_bits(a) ^ b) ^ c); }

/// FNV-1a of bytes. @param seed result of an earlier call, to go on
inline uint64_t hash_bytes(std::string_view bytes, uint64_t seed = 0xcbf29ce484222325ull) {
  for (const char c : bytes) seed = (seed ^ static_cast<uint8_t>(c)) * 0x100000001b3ull;
  return seed;
}

/// The upper 53 bits as a number in [0, 1).
inline double hash_to_unit(uint64_t hash) { return static_cast<double>(hash >> 11) * 0x1.0p-53; }

}  // namespace turnout
