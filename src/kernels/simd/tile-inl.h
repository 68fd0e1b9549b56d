// The innermost loops: a tile of rows × one panel, and in-place dot products of few rows with plain weights.
//
// Every output is one chain of fused multiply-adds in the order of the reduction, whatever the number of rows in its
// tile: a row's result does not depend on the rows beside it, and so not on the split of work.
#pragma once

#include <stdint.h>
#include <utility>

namespace turnout::kernels {
namespace {

/// Words of a panel.
template <class V>
constexpr int64_t kPanel = V::kVectors* V::L;

template <class V, bool BF>
constexpr int max_rows() {
  constexpr int rows = BF ? V::kRowsBf16 : V::kRows;
  static_assert(rows % 2 == 0 && rows <= kMaxTileRows, "blocks of rows are whole pairs (block_begin)");
  return rows;
}

/// Rows of bf16 (x, h, du, grad_y) are held as fp32 numbers where the CPU has no dot product of pairs: then only the
/// panels are split into numbers as they are used, once for all rows of a tile.
template <class V, bool BF>
constexpr bool kWideRows = BF && !V::kBf16Dot;

/// Bytes that a word of the reduction takes in a row.
template <class V, bool BF>
constexpr int64_t kWordBytes = kWideRows<V, BF> ? 8 : 4;

/// Where a tile's reads ahead go: a line at p, then one every `step` bytes, a line a word of the reduction.
struct Ahead {
  const char* p;
  int64_t step;
};

/// What a tile fetches: nothing; a share of what comes after it (Ahead); or its own panel, 8 KB ahead.
enum class Fetch { none, next, panel };

/// What was loaded before is loaded anew after it: the compiler would keep it in registers that are not there.
inline void forget_loads() {
#if defined(__GNUC__)
  asm volatile("" ::: "memory");
#endif
}

/// acc += x · w, of pairs of bf16 or of numbers.
template <class V, bool Pairs>
TURNOUT_INLINE void accumulate(typename V::Reg& acc, typename V::Reg x, typename V::Reg w) {
  if constexpr (Pairs)
    acc = V::dot(x, w, acc);
  else
    V::fma_into(acc, x, w);
}

/// c [MR][panel] (+)= rows · b; accumulates where `add`. Rows are read from byte `k0` on, or packed [words][MR] in
/// rows[0] where `Packed`.
template <class V, bool BF, int MR, Fetch F, bool Packed>
void tile(int64_t words, const char* const* rows, int64_t k0, const char* b, float* c, bool add, Ahead ahead) {
  using Reg = typename V::Reg;
  constexpr int L = V::L, N = V::kVectors, P = N * L;
  constexpr int64_t kUnroll = 4, kRow = Packed ? 4 * MR : kWordBytes<V, BF>;
  constexpr bool Wide = kWideRows<V, BF>;
  static_assert(!(Wide && Packed), "packed rows of wide bf16 are those of fp32");
  Reg acc[MR][N];
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i)
    for (int j = 0; j < N; ++j) acc[i][j] = add ? V::load(c + i * P + j * L) : V::zero();
  const char* row[MR];
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i) row[i] = Packed ? rows[0] + 4 * i : rows[i] + k0;
  // word `u` after those that were done: `done` bytes of a row, and b
  const auto word = [&](int64_t done, int64_t u) __attribute__((always_inline)) {
    const auto step = [&](const Reg(&w)[N], int64_t at) __attribute__((always_inline)) {
#pragma GCC unroll 16
      for (int i = 0; i < MR; ++i) {
        const Reg x = V::word(row[i] + done + (kRow * u + at));
        for (int j = 0; j < N; ++j) accumulate<V, BF && !Wide>(acc[i][j], x, w[j]);
      }
    };
    const char* now = b + 4 * P * u;
    Reg w[N];
    for (int j = 0; j < N; ++j) w[j] = Wide ? V::low(V::load(now + 4 * j * L)) : V::load(now + 4 * j * L);
    step(w, 0);
    if constexpr (Wide) {
      forget_loads();
      for (int j = 0; j < N; ++j) w[j] = V::high(V::load(now + 4 * j * L));
      step(w, 4);
    }
  };
  const char* line = ahead.p;
  int64_t k = 0, done = 0;
  for (; k + kUnroll <= words; k += kUnroll, done += kUnroll * kRow, b += kUnroll * 4 * P) {
#pragma GCC unroll 4
    for (int64_t u = 0; u < kUnroll; ++u) {
      if constexpr (F == Fetch::panel) {
        for (int j = 0; j < N; ++j) __builtin_prefetch(b + 8192 + 4 * (u * P + j * L));
      } else if constexpr (F == Fetch::next) {
        __builtin_prefetch(line + u * ahead.step, 0, 2);
      }
      word(done, u);
    }
    if constexpr (F == Fetch::next) line += kUnroll * ahead.step;
  }
  for (; k < words; ++k, done += kRow, b += 4 * P) word(done, 0);
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i)
    for (int j = 0; j < N; ++j) V::store(c + i * P + j * L, acc[i][j]);
}

using TileFn = void (*)(int64_t, const char* const*, int64_t, const char*, float*, bool, Ahead);

template <class V, bool BF, Fetch F, bool Packed, class Rows = std::make_integer_sequence<int, max_rows<V, BF>()>>
struct Tiles;
template <class V, bool BF, Fetch F, bool Packed, int... I>
struct Tiles<V, BF, F, Packed, std::integer_sequence<int, I...>> {
  static constexpr TileFn fn[] = {nullptr, tile<V, BF, I + 1, F, Packed>...};
};

/// c[i * panel + j] (+)= ⟨rows[i], weights[j]⟩ over bytes [k0, end) of 4 weights, for MR rows. A step takes the
/// elements of one register of weights: words, or, where rows are wide, a register of bf16 numbers. `Stream`: the
/// weights themselves come from memory, and those `ahead.step` bytes on are fetched; else a line a step, as tiles do.
template <class V, bool BF, int MR, bool Stream>
void dots(int64_t k0, int64_t end, const char* const* rows, const char* const* weights, float* c, Ahead ahead) {
  using Reg = typename V::Reg;
  constexpr bool Wide = kWideRows<V, BF>;
  constexpr int B = (Wide ? 2 : 4) * V::L, R = Wide ? 2 : 1;  // bytes of weights a step, and of a row for each of them
  Reg acc[MR][4];
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i)
    for (int j = 0; j < 4; ++j) acc[i][j] = V::zero();
  const auto step = [&](const Reg(&w)[4], const auto& row) __attribute__((always_inline)) {
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
      const Reg x = row(i);
      for (int j = 0; j < 4; ++j) accumulate<V, BF && !Wide>(acc[i][j], x, w[j]);
    }
  };
  const char* line = ahead.p;
  int64_t k = k0;
  for (; k + B <= end; k += B) {
    Reg w[4];
    for (int j = 0; j < 4; ++j) {
      w[j] = Wide ? V::load_bf16(weights[j] + k) : V::load(weights[j] + k);
      if constexpr (Stream) __builtin_prefetch(weights[j] + ahead.step + k);
    }
    if constexpr (!Stream) {
      __builtin_prefetch(line, 0, 2);
      line += ahead.step;
    }
    step(
        w, [&](int i) __attribute__((always_inline)) { return V::load(rows[i] + R * k); });
  }
  if (k < end) {
    Reg w[4];
    for (int j = 0; j < 4; ++j)
      w[j] = Wide ? V::load_bf16_n(weights[j] + k, (end - k) / 2) : V::load_bytes(weights[j] + k, end - k);
    step(
        w, [&](int i) __attribute__((always_inline)) { return V::load_bytes(rows[i] + R * k, R * (end - k)); });
  }
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i) V::store_sums(c + i * kPanel<V>, acc[i], k0 > 0);
}

using DotsFn = void (*)(int64_t, int64_t, const char* const*, const char* const*, float*, Ahead);

template <class V, bool BF, bool Stream, class Rows = std::make_integer_sequence<int, V::kDotRows>>
struct Dots;
template <class V, bool BF, bool Stream, int... I>
struct Dots<V, BF, Stream, std::integer_sequence<int, I...>> {
  static constexpr DotsFn fn[] = {nullptr, dots<V, BF, I + 1, Stream>...};
};

}  // namespace
}  // namespace turnout::kernels
