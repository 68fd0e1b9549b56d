// A product of rows with panels: where panels come from (sources), and the order in which tiles are computed (sweep).
//
// An epilogue is called once a tile with the finished fp32 sums, `epilogue(panel, first row, rows, c)`, with
// c [rows][panel]: activations, biases and stores live there, so one set of tiles serves every product.
#pragma once

#include <stdint.h>

#include "tile-inl.h"

namespace turnout::kernels {
namespace {

/// Element sizes and conversions of the two stored types.
template <class V, bool BF>
struct Stored {
  using Reg = typename V::Reg;
  static constexpr int64_t size = BF ? 2 : 4;
  static TURNOUT_INLINE Reg load_n(const char* p, int64_t n) {
    if (n <= 0) return V::zero();
    if constexpr (BF)
      return n >= V::L ? V::load_bf16(p) : V::load_bf16_n(p, n);
    else
      return n >= V::L ? V::load(p) : V::load_bytes(p, n * 4);
  }
  static TURNOUT_INLINE void store(char* p, Reg v) {
    if constexpr (BF)
      V::store_bf16(p, v);
    else
      V::store(p, v);
  }
  static TURNOUT_INLINE void store_n(char* p, Reg v, int64_t n) {
    if (n >= V::L) return store(p, v);
    if (n <= 0) return;
    if constexpr (BF)
      V::store_bf16_n(p, v, n);
    else
      V::store_n(p, v, n);
  }
};

/// Elements of the rows that products read: as stored, or fp32 numbers that are rounded to bf16 (kWideRows).
template <class V, bool BF>
struct RowOf {
  using Reg = typename V::Reg;
  using S = Stored<V, BF && !kWideRows<V, BF>>;
  static constexpr int64_t size = S::size;
  static TURNOUT_INLINE Reg load_n(const char* p, int64_t n) { return S::load_n(p, n); }
  static TURNOUT_INLINE void store(char* p, Reg v) { S::store(p, rounded(v)); }
  static TURNOUT_INLINE void store_n(char* p, Reg v, int64_t n) { S::store_n(p, rounded(v), n); }
  static TURNOUT_INLINE Reg rounded(Reg v) {
    if constexpr (kWideRows<V, BF>)
      return V::round_bf16(v);
    else
      return v;
  }
};

/// Rows first[0..lanes) of a matrix of row size `bytes`, words [k0, k0 + words), as columns of a half panel.
/// Rows from `valid` on count as zeros.
template <class V>
void pack_transposed_half(const char* first, int64_t bytes, int64_t valid, int64_t k0, int64_t words, char* dst) {
  using Reg = typename V::Reg;
  constexpr int L = V::L;
  for (int64_t k = 0; k < words; k += L) {
    const int64_t at = 4 * (k0 + k), n = words - k < L ? words - k : L;
    const bool whole = at + 4 * L <= bytes && valid >= L;
    Reg r[L];
    if (whole) {
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) r[i] = V::load(first + i * bytes + at);
    } else {
      const int64_t left = bytes - at < 4 * L ? bytes - at : 4 * L;
      for (int i = 0; i < L; ++i) r[i] = i < valid ? V::load_bytes(first + i * bytes + at, left) : V::zero();
    }
    V::transpose(r);
    for (int i = 0; i < L; ++i)
      if (i < n) V::store(dst + (k + i) * 8 * L, r[i]);
  }
}

/// Columns [col, col + valid) of `count` rows as a panel over the rows: bf16 rows are interleaved two by two.
template <class V, bool BF>
void pack_natural_panel(const char* const* rows, int64_t count, int64_t col, int64_t valid, char* dst) {
  constexpr int L = V::L;
  for (int h = 0; h < 2; ++h) {
    const int64_t at = (col + h * L) * Stored<V, BF>::size, n = valid - h * L < L ? valid - h * L : L;
    char* d = dst + 4 * h * L;
    if (n <= 0) {
      for (int64_t k = 0; k < words_of(count, BF); ++k) V::store(d + 8 * L * k, V::zero());
    } else if constexpr (BF) {
      for (int64_t k = 0; k < (count + 1) / 2; ++k) {
        const bool pair = 2 * k + 1 < count;
        V::store(d + 8 * L * k, V::interleave(rows[2 * k] + at, pair ? rows[2 * k + 1] + at : nullptr, n));
      }
    } else {
      for (int64_t k = 0; k < count; ++k) V::store(d + 8 * L * k, Stored<V, BF>::load_n(rows[k] + at, n));
    }
  }
}

/// Panels packed beforehand. As every source: panels [g, g + n), words [k0, k0 + words) of them, into strips or not.
template <class V>
struct PackedSource {
  const char* base;
  int64_t words;
  const char* panel(int64_t p, int64_t k0) const { return base + (p * words + k0) * 8 * V::L; }
  void panels(int64_t g, int64_t n, int64_t k0, int64_t, char*, const char** at) const {
    for (int64_t p = 0; p < n; ++p) at[p] = panel(g + p, k0);
  }
  // the next group of panels arrives while this one is used: each of `n` tiles fetches its share
  Ahead ahead(int64_t p, int64_t k0, int64_t chunk, int64_t i, int64_t n) const {
    const int64_t step = 8 * V::L / n;
    return {panel(p, k0) + i * step * chunk, step};
  }
};

/// Plain weights [outputs, reduction]: the rows of a panel are transposed as they are needed.
template <class V, bool BF, bool Gated>
struct TransposedSource {
  const char* weight;
  int64_t outputs, bytes;  ///< of all rows (of one half where gated), of a row
  const char* half(int64_t p, int h) const {
    return Gated ? weight + (h * outputs + p * V::L) * bytes : weight + (2 * p + h) * V::L * bytes;
  }
  int64_t valid(int64_t p, int h) const { return Gated ? outputs - p * V::L : outputs - (2 * p + h) * V::L; }
  const char* panel(int64_t p, int64_t k0, int64_t words, char* strip) const {
    for (int h = 0; h < 2; ++h)
      pack_transposed_half<V>(half(p, h), bytes, valid(p, h), k0, words, strip + 4 * h * V::L);
    return strip;
  }
  void panels(int64_t g, int64_t n, int64_t k0, int64_t words, char* strips, const char** at) const {
    for (int64_t p = 0; p < n; ++p) at[p] = panel(g + p, k0, words, strips + p * words * 8 * V::L);
  }
  Ahead ahead(int64_t p, int64_t, int64_t chunk, int64_t i, int64_t n) const {
    const int h = 2 * i >= n ? 1 : 0;
    const int64_t share = n > 1 ? n / 2 : 1, step = 4 * V::L / share, j = h ? i - (n + 1) / 2 : i;
    return {half(p, h) + j * step * chunk, step};
  }
};

/// Plain weights [reduction, outputs]: columns of a panel are copied as they are needed.
template <class V, bool BF>
struct NaturalSource {
  const char* weight;
  int64_t outputs, reduction;
  const char** rows;  ///< room for the row pointers of a chunk
  static constexpr int64_t kBlock = 16;  // rows packed together for all panels, so that a row is read in one go

  void panels(int64_t g, int64_t n, int64_t k0, int64_t words, char* strips, const char** at) const {
    constexpr int64_t P = 2 * V::L, size = Stored<V, BF>::size;
    const int64_t per = BF ? 2 : 1, first = k0 * per;
    const int64_t count = first + words * per > reduction ? reduction - first : words * per;
    for (int64_t k = 0; k < count; ++k) rows[k] = weight + (first + k) * outputs * size;
    const int64_t begin = g * P * size, end = (g + n) * P < outputs ? begin + n * P * size : outputs * size;
    for (int64_t r = 0; r < count; r += kBlock) {
      const int64_t next = r + kBlock, m = count - r < kBlock ? count - r : kBlock;
      for (int64_t k = next; k < next + kBlock && k < count; ++k)
        for (int64_t b = begin; b < end; b += 64) __builtin_prefetch(rows[k] + b, 0, 2);
      for (int64_t p = 0; p < n; ++p)
        pack_natural_panel<V, BF>(rows + r, m, (g + p) * P, outputs - (g + p) * P,
                                  strips + (p * words + words_of(r, BF)) * 4 * P);
    }
    for (int64_t p = 0; p < n; ++p) at[p] = strips + p * words * 4 * P;
  }
  // a word's line (bf16: the lines of its two rows, by turns), once; not where the rows' lines push each other out of
  // the cache before they are packed: rows of a multiple of 4 KB share a 32nd of a 2 MB cache
  Ahead ahead(int64_t p, int64_t k0, int64_t, int64_t i, int64_t) const {
    const int64_t row = outputs * Stored<V, BF>::size;
    if (i > 1 || (row & 4095) == 0) return {weight, 0};
    const char* at = weight + k0 * (BF ? 2 : 1) * row + p * 2 * V::L * Stored<V, BF>::size;
    return BF ? Ahead{at + (i & 1) * row, 2 * row} : Ahead{at + (i & 1) * 64, row};
  }
};

/// Rows up to which plain weights are read where they lie: beyond it, packing a panel costs less than re-reading it.
template <class V>
constexpr int64_t kRowsInPlace = 4 * V::kDotRows;

/// Worker memory of a sweep.
template <class V>
struct SweepMemory {
  char* strips;  ///< kGroupWords (at least kChunkWords) panels of words
  float* sums;   ///< kPassRows rows of a group, used where the reduction takes several passes
  const char** rows;
};

constexpr int64_t kStripWords = kGroupWords > kChunkWords ? kGroupWords : kChunkWords;
// several passes mean chunks of more than kChunkWords / 2 words, hence groups of at most this many panels
constexpr int64_t kSumPanels = kGroupWords / (kChunkWords / 2);

template <class V>
SweepMemory<V> sweep_memory(char* worker) {
  char* sums = worker + kStripWords * 8 * V::L;
  char* rows = sums + kPassRows * kSumPanels * 8 * V::L;
  return {worker, reinterpret_cast<float*>(sums), reinterpret_cast<const char**>(rows)};
}

/// Rows of a tile: fewer where all rows start in the same cache set (12 rows and 2 lines of weights exceed 12 ways).
template <class V, bool BF>
int64_t tile_rows(const RowSet& a) {
  constexpr int kMax = max_rows<V, BF>();
  if (kMax <= 8 || a.count < 2) return kMax;
  const int64_t stride = a.rows[1] - a.rows[0];
  return (stride & 4095) == 0 ? 8 : kMax;
}

/// First row of block i of nb: rows divided evenly (a small remainder tile would waste registers), in whole pairs,
/// since bf16 panels over rows hold pairs.
TURNOUT_INLINE int64_t block_begin(int64_t rows, int64_t nb, int64_t i) {
  return i == nb ? rows : (rows + 1) / 2 * i / nb * 2;
}

template <class V, bool BF, class Source, class Epilogue>
void sweep(const RowSet& a, int64_t words, int64_t begin, int64_t end, const Source& source, const Epilogue& epilogue,
           char* worker) {
  constexpr int64_t P = 2 * V::L;
  const SweepMemory<V> memory = sweep_memory<V>(worker);
  const int64_t group = group_of(words), passes = words > 0 ? div_up(words, kChunkWords) : 1;
  const int64_t most = tile_rows<V, BF>(a), pass_rows = passes > 1 ? kPassRows : a.count;
  float local[kMaxTileRows * P];
  for (int64_t r0 = 0; r0 < a.count; r0 += pass_rows) {
    const int64_t m = a.count - r0 < pass_rows ? a.count - r0 : pass_rows;
    const int64_t nb = div_up(m, most);
    for (int64_t g = begin; g < end; g += group) {
      const int64_t n = end - g < group ? end - g : group;
      const char* panels[8];
      for (int64_t c = 0; c < passes; ++c) {
        const int64_t k0 = words * c / passes, chunk = words * (c + 1) / passes - k0;
        source.panels(g, n, k0, chunk, memory.strips, panels);
        for (int64_t i = 0; i < nb; ++i) {
          const int64_t first = block_begin(m, nb, i), rows = block_begin(m, nb, i + 1) - first;
          const TileFn fn = nb == 1 ? Tiles<V, BF, true, false>::fn[rows] : Tiles<V, BF, false, false>::fn[rows];
          for (int64_t p = 0; p < n; ++p) {
            float* sums = passes == 1 ? local : memory.sums + (p * m + first) * P;
            const int64_t next = g + p + group < end ? g + p + group : g + p;
            fn(chunk, a.rows + r0 + first, kWordBytes<V, BF> * k0, panels[p], sums, c > 0, source.ahead(next, k0, chunk, i, nb));
            if (c + 1 == passes) epilogue(g + p, r0 + first, rows, sums);
          }
        }
      }
    }
  }
}

/// The same for few rows and plain weights [outputs, reduction], which are read once, where they lie.
template <class V, bool BF, bool Gated, class Epilogue>
void sweep_in_place(const RowSet& a, int64_t bytes, int64_t begin, int64_t end,
                    const TransposedSource<V, BF, Gated>& source, const Epilogue& epilogue, char* worker) {
  constexpr int64_t P = 2 * V::L;
  float* sums = sweep_memory<V>(worker).sums;
  for (int64_t p = begin; p < end; ++p) {
    for (int h = 0; h < 2; ++h)
      for (int j = 0; j < V::L; j += 4) {
        const int64_t valid = source.valid(p, h) - j;
        const char* w = source.half(p, h) + j * bytes;
        if (valid <= 0) {
          for (int64_t i = 0; i < a.count; ++i)
            for (int q = 0; q < 4; ++q) sums[i * P + h * V::L + j + q] = 0.f;
          continue;
        }
        // outputs that do not exist repeat the last one; the epilogue drops them
        const char* weights[4];
        for (int q = 0; q < 4; ++q) weights[q] = w + (q < valid ? q : valid - 1) * bytes;
        for (int64_t i = 0; i < a.count; i += V::kDotRows) {
          const int64_t rows = a.count - i < V::kDotRows ? a.count - i : V::kDotRows;
          // 8 rows ahead: 32 KB of a hidden size of 2048 in bf16, far enough for memory, near enough for the L1 cache
          Dots<V, BF>::fn[rows](bytes, a.rows + i, weights, 8 * bytes, sums + i * P + h * V::L + j);
        }
      }
    for (int64_t i = 0; i < a.count; i += kMaxTileRows)
      epilogue(p, i, a.count - i < kMaxTileRows ? a.count - i : kMaxTileRows, sums + i * P);
  }
}

}  // namespace
}  // namespace turnout::kernels
