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

/// Words [k0, k0 + words) of rows first[0..lanes) as one vector of columns of a panel; rows from `valid` on are zeros.
/// Where `Split`, the words are pairs of bf16, of which each number becomes a row of the panel.
template <class V, bool Split>
void pack_transposed(const char* first, int64_t bytes, int64_t valid, int64_t k0, int64_t words, char* dst) {
  using Reg = typename V::Reg;
  constexpr int L = V::L;
  constexpr int64_t row = 4 * kPanel<V>;
  for (int64_t k = 0; k < words; k += L) {
    const int64_t at = 4 * (k0 + k), n = words - k < L ? words - k : L;
    const bool whole = at + 4 * L <= bytes && valid >= L;
    Reg r[L];
    if (whole) {
      for (int i = 0; i < L; ++i) r[i] = V::load(first + i * bytes + at);
    } else {
      const int64_t left = bytes - at < 4 * L ? bytes - at : 4 * L;
      for (int i = 0; i < L; ++i) r[i] = i < valid ? V::load_bytes(first + i * bytes + at, left) : V::zero();
    }
    V::transpose(r);
    for (int i = 0; i < L; ++i) {
      if (i >= n) break;
      if constexpr (Split) {
        V::store(dst + (k + i) * 2 * row, V::low(r[i]));
        V::store(dst + ((k + i) * 2 + 1) * row, V::high(r[i]));
      } else {
        V::store(dst + (k + i) * row, r[i]);
      }
    }
  }
}

/// Columns [col, col + valid) of `count` rows as a panel over the rows: bf16 rows are interleaved two by two, or, where
/// `Split`, become fp32.
template <class V, bool BF, bool Split>
void pack_natural_panel(const char* const* rows, int64_t count, int64_t col, int64_t valid, char* dst) {
  constexpr int64_t L = V::L, size = Stored<V, BF>::size;
  constexpr bool kPairs = BF && !Split;
  const auto pack = [&](const auto& columns) __attribute__((always_inline)) {  // of vector h
    for (int64_t k = 0; k < words_of(count, kPairs); ++k)
#pragma GCC unroll 4
      for (int h = 0; h < V::kVectors; ++h) {
        const int64_t at = (col + h * L) * size, n = columns(h);
        char* d = dst + 4 * (k * kPanel<V> + h * L);
        if (n <= 0)
          V::store(d, V::zero());
        else if constexpr (kPairs)
          V::store(d, V::interleave(rows[2 * k] + at, 2 * k + 1 < count ? rows[2 * k + 1] + at : nullptr, n));
        else
          V::store(d, Stored<V, BF>::load_n(rows[k] + at, n));
      }
  };
  if (valid >= kPanel<V>)
    pack([](int) { return L; });
  else
    pack([&](int h) { return valid - h * L < L ? valid - h * L : L; });
}

/// The `i`th of `n` shares of `bytes` bytes, a line (or less) in each of `words` steps.
inline Ahead share(const char* begin, int64_t bytes, int64_t words, int64_t i, int64_t n) {
  const int64_t step = div_up(bytes, n * (words > 0 ? words : 1));
  return {begin + i * step * words, step};
}

/// Panels packed beforehand. As every source: panels [g, g + n), words [k0, k0 + words) of them, into strips or not;
/// and, with Fetch::next, what comes after them, of which each of n tiles fetches a share. `kStripBF`: whether words
/// are pairs of bf16; `kChunk`: words of a pass.
template <class V, bool BF>
struct PackedSource {
  static constexpr bool kStripBF = BF;
  static constexpr int64_t kChunk = kChunkWords;
  static constexpr Fetch kFetch = Fetch::next;
  const char* base;
  int64_t words;
  const char* panel(int64_t p, int64_t k0) const { return base + (p * words + k0) * 4 * kPanel<V>; }
  void panels(int64_t g, int64_t n, int64_t k0, int64_t, char*, const char** at) const {
    for (int64_t p = 0; p < n; ++p) at[p] = panel(g + p, k0);
  }
  Ahead ahead(int64_t p, int64_t k0, int64_t next, int64_t words_now, int64_t i, int64_t n) const {
    return share(panel(p, k0), next * 4 * kPanel<V>, words_now, i, n);
  }
};

/// The same, of pairs of bf16 that become fp32 panels: `words` and k0 count numbers.
template <class V>
struct SplitSource {
  static constexpr bool kStripBF = false;
  static constexpr int64_t kChunk = kChunkWords;
  static constexpr Fetch kFetch = Fetch::next;
  PackedSource<V, true> pairs;
  void panels(int64_t g, int64_t n, int64_t k0, int64_t words, char* strips, const char** at) const {
    constexpr int64_t row = 4 * kPanel<V>;
    for (int64_t p = 0; p < n; ++p) {
      const char* from = pairs.panel(g + p, k0 / 2);
      char* to = strips + p * words * row;
      at[p] = to;
      for (int64_t k = 0; k < words; k += 2, from += row, to += 2 * row)
        for (int64_t j = 0; j < row; j += 4 * V::L) {
          const auto w = V::load(from + j);
          V::store(to + j, V::low(w));
          V::store(to + row + j, V::high(w));
        }
    }
  }
  Ahead ahead(int64_t p, int64_t k0, int64_t next, int64_t words_now, int64_t i, int64_t n) const {
    return share(pairs.panel(p, k0 / 2), next * 2 * kPanel<V>, words_now, i, n);
  }
};

/// Plain weights [outputs, reduction]: the rows of a panel are transposed as they are needed, into fp32 where `Split`
/// (then k0 and `words` count numbers, an even lot of them).
template <class V, bool BF, bool Gated, bool Split = kWideRows<V, BF>>
struct TransposedSource {
  static constexpr bool kStripBF = BF && !Split;
  static constexpr int64_t kChunk = kChunkWords;
  static constexpr Fetch kFetch = Fetch::next;
  const char* weight;
  int64_t outputs, bytes;  ///< of all rows (of one half where gated), of a row
  /// First of the rows that are vector j of panel p, and how many there are from it on.
  const char* rows(int64_t p, int64_t j) const {
    return weight + (Gated ? (j % 2) * outputs + output(p, j) : output(p, j)) * bytes;
  }
  int64_t valid(int64_t p, int64_t j) const { return outputs - output(p, j); }
  const char* panel(int64_t p, int64_t k0, int64_t words, char* strip) const {
    constexpr int64_t per = Split ? 2 : 1;
    for (int j = 0; j < V::kVectors; ++j)
      pack_transposed<V, Split>(rows(p, j), bytes, valid(p, j), k0 / per, words / per, strip + 4 * j * V::L);
    return strip;
  }
  void panels(int64_t g, int64_t n, int64_t k0, int64_t words, char* strips, const char** at) const {
    for (int64_t p = 0; p < n; ++p) at[p] = panel(g + p, k0, words, strips + p * words * 4 * kPanel<V>);
  }
  // whole rows, vector by vector, when the last words of this panel are used
  Ahead ahead(int64_t p, int64_t k0, int64_t, int64_t words_now, int64_t i, int64_t n) const {
    if (k0 != 0) return {weight, 0};
    const int64_t j = i * V::kVectors / n, first = div_up(j * n, V::kVectors);
    return share(rows(p, j), V::L * bytes, words_now, i - first, div_up((j + 1) * n, V::kVectors) - first);
  }

 private:
  static int64_t output(int64_t p, int64_t j) {
    return Gated ? (p * (V::kVectors / 2) + j / 2) * V::L : (p * V::kVectors + j) * V::L;
  }
};

/// Plain weights [reduction, outputs]: columns of a panel are copied as they are needed, into fp32 where `Split`.
template <class V, bool BF, bool Split = kWideRows<V, BF>>
struct NaturalSource {
  static constexpr bool kStripBF = BF && !Split;
  static constexpr int64_t kChunk = kNaturalChunkWords;
  // nothing: fetching lines from memory there takes the few line buffers that the tiles need for the cache
  static constexpr Fetch kFetch = Fetch::none;
  const char* weight;
  int64_t outputs, reduction;
  const char** rows;                     ///< room for the row pointers of a chunk
  static constexpr int64_t kBlock = 16;  // rows packed together for all panels, so that a row is read in one go
  static constexpr int64_t kPer = kStripBF ? 2 : 1, kSize = Stored<V, BF>::size;

  void panels(int64_t g, int64_t n, int64_t k0, int64_t words, char* strips, const char** at) const {
    constexpr int64_t P = kPanel<V>;
    const int64_t first = k0 * kPer, left = reduction - first, count = words * kPer > left ? left : words * kPer;
    for (int64_t k = 0; k < count; ++k) rows[k] = weight + (first + k) * outputs * kSize;
    const int64_t begin = g * P * kSize, end = (g + n) * P < outputs ? begin + n * P * kSize : outputs * kSize;
    for (int64_t r = 0; r < count; r += kBlock) {
      const int64_t next = r + kBlock, m = count - r < kBlock ? count - r : kBlock;
      for (int64_t k = next; k < next + kBlock && k < count; ++k)
        for (int64_t b = begin; b < end; b += 64) __builtin_prefetch(rows[k] + b, 0, 2);
      for (int64_t p = 0; p < n; ++p)
        pack_natural_panel<V, BF, Split>(rows + r, m, (g + p) * P, outputs - (g + p) * P,
                                         strips + (p * words + r / kPer) * 4 * P);
    }
    for (int64_t p = 0; p < n; ++p) {
      at[p] = strips + p * words * 4 * P;
      // an even reduction is expected of fp32 numbers that were pairs
      if (Split && count < words) __builtin_memset(strips + (p * words + count) * 4 * P, 0, static_cast<size_t>(4 * P));
    }
  }
  Ahead ahead(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t) const { return {}; }
};

/// Rows up to which plain weights are read where they lie: beyond it, transposing a panel costs less than the sums over
/// lanes, or, where rows are wide, than widening the weights for every block of rows.
template <class V, bool BF>
constexpr int64_t kRowsInPlace = (kWideRows<V, BF> ? 3 : 8) * V::kDotRows;

/// Bytes of a weight that an in-place product of several blocks takes in one pass: 4 weights and the rows of a block
/// share the L1 cache.
constexpr int64_t kInPlaceBytes = 4096;

/// Rows up to which packed pairs of bf16 are split in every tile; for more, once into strips, whose writing and reading
/// costs as much as some 16 tiles.
template <class V>
constexpr int64_t kRowsSplitInTile = 16 * V::kRowsBf16;

/// Worker memory of a sweep.
template <class V>
struct SweepMemory {
  char* strips;       ///< kStripWords words of a panel
  float* sums;        ///< kPassRows rows of a group, used where the reduction takes several passes
  const char** rows;  ///< those of a chunk of a NaturalSource
};

template <class V>
SweepMemory<V> sweep_memory(char* worker) {
  char* sums = worker + kStripWords * 4 * kPanel<V>;
  char* rows = sums + kPassRows * kSumPanels * 4 * kPanel<V>;
  return {worker, reinterpret_cast<float*>(sums), reinterpret_cast<const char**>(rows)};
}

/// First row of block i of nb: rows divided evenly (a small remainder tile would waste registers), in whole pairs,
/// since bf16 panels over rows hold pairs.
TURNOUT_INLINE int64_t block_begin(int64_t rows, int64_t nb, int64_t i) {
  return i == nb ? rows : (rows + 1) / 2 * i / nb * 2;
}

/// @param words of the reduction, as the source counts them
template <class V, class Source, class Epilogue>
void sweep(const RowSet& a, int64_t words, int64_t begin, int64_t end, const Source& source, const Epilogue& epilogue,
           char* worker) {
  constexpr int64_t P = kPanel<V>;
  constexpr bool BF = Source::kStripBF;
  const SweepMemory<V> memory = sweep_memory<V>(worker);
  const int64_t group = group_of(words, Source::kChunk), passes = words > 0 ? div_up(words, Source::kChunk) : 1;
  const int64_t most = max_rows<V, BF>(), pass_rows = passes > 1 ? kPassRows : a.count;
  const auto chunk_begin = [&](int64_t c) { return c == passes ? words : words * c / passes / 2 * 2; };
  float local[kMaxTileRows * P];
  for (int64_t r0 = 0; r0 < a.count; r0 += pass_rows) {
    const int64_t m = a.count - r0 < pass_rows ? a.count - r0 : pass_rows;
    const int64_t nb = div_up(m, most);
    for (int64_t g = begin; g < end; g += group) {
      const int64_t n = end - g < group ? end - g : group;
      const char* panels[kSumPanels];
      for (int64_t c = 0; c < passes; ++c) {
        const int64_t k0 = chunk_begin(c), chunk = chunk_begin(c + 1) - k0;
        source.panels(g, n, k0, chunk, memory.strips, panels);
        // what comes after this: the next words of these panels, or the first of the next
        const bool last = c + 1 == passes;
        const int64_t next = last ? 0 : c + 1, next_k0 = chunk_begin(next),
                      next_words = chunk_begin(next + 1) - next_k0;
        for (int64_t i = 0; i < nb; ++i) {
          const int64_t first = block_begin(m, nb, i), rows = block_begin(m, nb, i + 1) - first;
          const TileFn fn =
              nb == 1 ? Tiles<V, BF, Fetch::panel, false>::fn[rows] : Tiles<V, BF, Source::kFetch, false>::fn[rows];
          for (int64_t p = 0; p < n; ++p) {
            float* sums = passes == 1 ? local : memory.sums + (p * m + first) * P;
            const int64_t after = !last || g + p + group >= end ? g + p : g + p + group;
            fn(chunk, a.rows + r0 + first, kWordBytes<V, BF> * k0, panels[p], sums, c > 0,
               source.ahead(after, next_k0, next_words, chunk, i, nb));
            if (last) epilogue(g + p, r0 + first, rows, sums);
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
  constexpr int64_t P = kPanel<V>, kStep = (kWideRows<V, BF> ? 2 : 4) * V::L;
  float* sums = sweep_memory<V>(worker).sums;
  const int64_t nb = div_up(a.count, V::kDotRows);
  const int64_t passes = nb == 1 || bytes <= kInPlaceBytes ? 1 : div_up(bytes, kInPlaceBytes);
  const auto pass_begin = [&](int64_t c) { return c == passes ? bytes : bytes * c / passes / kStep * kStep; };
  for (int64_t p = begin; p < end; ++p) {
    for (int h = 0; h < V::kVectors; ++h)
      for (int j = 0; j < V::L; j += 4) {
        const int64_t valid = source.valid(p, h) - j;
        const char* w = source.rows(p, h) + j * bytes;
        float* c = sums + h * V::L + j;
        if (valid <= 0) {
          for (int64_t i = 0; i < a.count; ++i)
            for (int q = 0; q < 4; ++q) c[i * P + q] = 0.f;
          continue;
        }
        // outputs that do not exist repeat the last one; the epilogue drops them
        const char* weights[4];
        for (int q = 0; q < 4; ++q) weights[q] = w + (q < valid ? q : valid - 1) * bytes;
        // 8 rows ahead: 32 KB of a hidden size of 2048 in bf16, far enough for memory, near enough for the L1 cache
        const int64_t next = 8 * bytes;
        for (int64_t k = 0; k < passes; ++k)
          for (int64_t i = 0; i < nb; ++i) {
            const int64_t first = a.count * i / nb, rows = a.count * (i + 1) / nb - first;
            const int64_t k0 = pass_begin(k), k1 = pass_begin(k + 1);
            if (nb == 1)
              Dots<V, BF, true>::fn[rows](k0, k1, a.rows, weights, c, {nullptr, next});
            else
              Dots<V, BF, false>::fn[rows](k0, k1, a.rows + first, weights, c + first * P,
                                           share(w + next, 4 * bytes, (k1 - k0) / kStep, k * nb + i, passes * nb));
          }
      }
    for (int64_t i = 0; i < a.count; i += kMaxTileRows)
      epilogue(p, i, a.count - i < kMaxTileRows ? a.count - i : kMaxTileRows, sums + i * P);
  }
}

/// Words of the strips that a reduction of plain weights goes through: wide rows have an even number of them.
template <class V, bool BF>
constexpr int64_t strip_words(int64_t elements) {
  return kWideRows<V, BF> ? 2 * words_of(elements, true) : words_of(elements, BF);
}

/// The product of rows with weights [outputs, reduction] of elements, packed beforehand or not.
template <class V, bool BF, bool Gated, class Epilogue>
void product(const RowSet& a, int64_t elements, const char* packed, const TransposedSource<V, BF, Gated>& source,
             int64_t begin, int64_t end, const Epilogue& epilogue, char* worker) {
  const int64_t words = words_of(elements, BF);
  if (packed) {
    const PackedSource<V, BF> panels{packed, words};
    if constexpr (kWideRows<V, BF>) {
      if (a.count > kRowsSplitInTile<V>)
        return sweep<V>(a, strip_words<V, BF>(elements), begin, end, SplitSource<V>{panels}, epilogue, worker);
    }
    return sweep<V>(a, words, begin, end, panels, epilogue, worker);
  }
  if (a.count <= kRowsInPlace<V, BF>)
    return sweep_in_place<V, BF>(a, source.bytes, begin, end, source, epilogue, worker);
  sweep<V>(a, strip_words<V, BF>(elements), begin, end, source, epilogue, worker);
}

}  // namespace
}  // namespace turnout::kernels
