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

/// c [MR][panel] (+)= rows · b; accumulates where `add`. Rows are read from byte `k0` on, or packed [words][MR] in
/// rows[0] where `Packed`. `Stream`: the panel itself comes from memory and is fetched 8 KB ahead.
template <class V, bool BF, int MR, bool Stream, bool Packed>
void tile(int64_t words, const char* const* rows, int64_t k0, const char* b, float* c, bool add, Ahead ahead) {
  using Reg = typename V::Reg;
  constexpr int L = V::L, N = V::kVectors, P = N * L;
  constexpr bool Wide = kWideRows<V, BF>;
  static_assert(!(Wide && Packed), "packed rows of wide bf16 are those of fp32");
  Reg acc[MR][N];
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i)
    for (int j = 0; j < N; ++j) acc[i][j] = add ? V::load(c + i * P + j * L) : V::zero();
  const char* row[MR];
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i) row[i] = Packed ? rows[0] + 4 * i : rows[i] + k0;
  const char* a = row[0];
  const char* line = ahead.p;
#pragma GCC unroll 4
  for (int64_t k = 0; k < words; ++k) {
    if constexpr (Stream) {
      for (int j = 0; j < N; ++j) __builtin_prefetch(b + 8192 + 4 * j * L);
    } else if constexpr (!Packed) {
      __builtin_prefetch(line, 0, 2);
      line += ahead.step;
    }
    const auto step = [&](const Reg(&w)[N], int64_t at) __attribute__((always_inline)) {
#pragma GCC unroll 16
      for (int i = 0; i < MR; ++i) {
        const Reg x = V::word((Packed ? a + 4 * i : row[i] + kWordBytes<V, BF> * k) + at);
        for (int j = 0; j < N; ++j) acc[i][j] = BF && !Wide ? V::dot(x, w[j], acc[i][j]) : V::fma(x, w[j], acc[i][j]);
      }
    };
    Reg w[N];
    for (int j = 0; j < N; ++j) w[j] = Wide ? V::low(V::load(b + 4 * j * L)) : V::load(b + 4 * j * L);
    step(w, 0);
    if constexpr (Wide) {
      for (int j = 0; j < N; ++j) w[j] = V::high(V::load(b + 4 * j * L));
      step(w, 4);
    }
    b += 4 * P;
    if constexpr (Packed) a += 4 * MR;
  }
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i)
    for (int j = 0; j < N; ++j) V::store(c + i * P + j * L, acc[i][j]);
}

using TileFn = void (*)(int64_t, const char* const*, int64_t, const char*, float*, bool, Ahead);

template <class V, bool BF, bool Stream, bool Packed, class Rows = std::make_integer_sequence<int, max_rows<V, BF>()>>
struct Tiles;
template <class V, bool BF, bool Stream, bool Packed, int... I>
struct Tiles<V, BF, Stream, Packed, std::integer_sequence<int, I...>> {
  static constexpr TileFn fn[] = {nullptr, tile<V, BF, I + 1, Stream, Packed>...};
};

/// c[i * panel + j] = ⟨rows[i], weights[j]⟩ for MR rows and 4 weights of `bytes` bytes, fetching `next` bytes ahead.
/// A step takes the elements of one register of weights: words, or, where rows are wide, a register of bf16 numbers.
template <class V, bool BF, int MR>
void dots(int64_t bytes, const char* const* rows, const char* const* weights, int64_t next, float* c) {
  using Reg = typename V::Reg;
  constexpr bool Wide = kWideRows<V, BF>;
  constexpr int B = (Wide ? 2 : 4) * V::L, R = Wide ? 2 : 1;  // bytes of weights a step, and of a row for each of them
  Reg acc[MR][4];
  for (int i = 0; i < MR; ++i)
    for (int j = 0; j < 4; ++j) acc[i][j] = V::zero();
  const auto step = [&](const Reg(&x)[MR], const Reg(&w)[4]) __attribute__((always_inline)) {
    for (int j = 0; j < 4; ++j)
      for (int i = 0; i < MR; ++i)
        acc[i][j] = BF && !Wide ? V::dot(x[i], w[j], acc[i][j]) : V::fma(x[i], w[j], acc[i][j]);
  };
  int64_t k = 0;
  for (; k + B <= bytes; k += B) {
    Reg x[MR], w[4];
    for (int i = 0; i < MR; ++i) x[i] = V::load(rows[i] + R * k);
    for (int j = 0; j < 4; ++j) {
      w[j] = Wide ? V::load_bf16(weights[j] + k) : V::load(weights[j] + k);
      __builtin_prefetch(weights[j] + next + k);
    }
    step(x, w);
  }
  if (k < bytes) {
    Reg x[MR], w[4];
    for (int i = 0; i < MR; ++i) x[i] = V::load_bytes(rows[i] + R * k, R * (bytes - k));
    for (int j = 0; j < 4; ++j)
      w[j] = Wide ? V::load_bf16_n(weights[j] + k, (bytes - k) / 2) : V::load_bytes(weights[j] + k, bytes - k);
    step(x, w);
  }
  for (int i = 0; i < MR; ++i)
    for (int j = 0; j < 4; ++j) c[i * kPanel<V> + j] = V::sum(acc[i][j]);
}

using DotsFn = void (*)(int64_t, const char* const*, const char* const*, int64_t, float*);

template <class V, bool BF, class Rows = std::make_integer_sequence<int, V::kDotRows>>
struct Dots;
template <class V, bool BF, int... I>
struct Dots<V, BF, std::integer_sequence<int, I...>> {
  static constexpr DotsFn fn[] = {nullptr, dots<V, BF, I + 1>...};
};

}  // namespace
}  // namespace turnout::kernels
