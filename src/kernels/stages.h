// What one instruction set provides: the bodies of the tasks. Drivers (forward.cpp, backward.cpp) order them.
//
// A panel is `panel` words (2 or 4 vectors) along a product's outputs, stored [words of the reduction][panel]; a word
// is one float or two neighbouring bf16. In a gated `up` a vector of gate columns is followed by the vector of the up
// columns that belong to them, so that act(gate)·up happens lane by lane. Panels are padded with zeros.
#pragma once

#include "experts.h"

namespace turnout::kernels {

/// Rows whose words are read in place; `max_rows` of them share a tile (fewer where strides collide in the cache).
/// bf16 rows (of x, h, du, grad_y) are fp32 numbers, rounded to bf16, where Stages::wide_rows, and so are panels over rows.
struct RowSet {
  const char* const* rows;
  int64_t count;
};

/// u, h of one segment of an expert's rows, panels [begin, end) of `up`.
struct UpArgs {
  const ExpertsProblem* problem;
  int64_t expert;
  RowSet x;            ///< rows of x, even number of elements in bf16
  const char* packed;  ///< the expert's panels, or null: problem.up
  int64_t begin, end;
  char* h;  ///< [rows] of h_stride bytes, or null
  int64_t h_stride;
  char* saved;          ///< [rows, up_rows] contiguous, or null
  const float* weight;  ///< [rows] factors of h, or null
  char* worker;
};

/// a of one segment, panels [begin, end) of `down`.
struct DownArgs {
  const ExpertsProblem* problem;
  int64_t expert;
  RowSet h;
  const char* packed;
  int64_t begin, end;
  const float* weight;  ///< [rows] factors of the bias, or null
  float* out;           ///< [rows] of out_stride floats, a multiple of a panel
  int64_t out_stride;
  char* worker;
};

/// y[t] = Σ_k w · slots[row], tokens [begin, end).
struct CombineArgs {
  const ExpertsProblem* problem;
  const float* slots;  ///< [rows] of slot_stride floats
  int64_t slot_stride;
  bool weighted;  ///< false: w = 1
  char* y;
  int64_t begin, end;
};

/// From p = grad_y · down: du, the panels of topk_weight·h, and ⟨p, h⟩, panels [begin, end) of ffn.
struct HiddenGradArgs {
  const ExpertsProblem* problem;
  int64_t expert;
  RowSet grad_y;
  const float* weight;  ///< [rows] routing weight of each row
  const char* saved;    ///< [rows, up_rows]
  int64_t begin, end;
  char* du;  ///< [rows] of du_stride bytes
  int64_t du_stride;
  char* wh;     ///< panels of weight·h over the rows, or null
  float* dots;  ///< [rows] of dot_stride floats, one a panel of ffn
  int64_t dot_stride;
  char* worker;
};

/// grad x of each row = du · up, panels [begin, end) of hidden.
struct InputGradArgs {
  const ExpertsProblem* problem;
  int64_t expert;
  RowSet du;
  int64_t begin, end;
  float* out;
  int64_t out_stride;
  char* worker;
};

/// out[p, q] = Σ_rows a[row][p] · b[row][q], p in [begin, end).
struct WeightGradArgs {
  RowSet a;
  const char* b;  ///< panels over the rows
  int64_t q;      ///< columns of out
  int64_t begin, end;
  char* out;  ///< [.., q] in the problem's type
  bool bf16;
  bool streaming;  ///< out is too big for the caches
  char* worker;
};

/// Panels over rows: dst[panel][word of rows][panel words], from columns of rows.
struct PackRowsArgs {
  RowSet rows;
  int64_t columns;
  bool bf16;
  char* dst;
  int64_t begin, end;  ///< panels
};

/// out[c] = Σ_rows w · a[row][c] for c in [begin, end), fp32 sums.
struct BiasGradArgs {
  RowSet a;
  const float* weight;  ///< null: 1
  char* out;
  bool bf16;
  int64_t begin, end;
};

struct Stages {
  int64_t panel;         ///< words
  int64_t weight_rows;   ///< rows of a weight gradient are handed out in multiples of this
  bool wide_rows;        ///< bf16 rows are held as fp32 numbers: no dot product of pairs
  void (*up)(const UpArgs&);
  void (*down)(const DownArgs&);
  void (*combine)(const CombineArgs&);
  void (*hidden_grad)(const HiddenGradArgs&);
  void (*input_grad)(const InputGradArgs&);
  void (*weight_grad)(const WeightGradArgs&);
  void (*pack_rows)(const PackRowsArgs&);
  void (*bias_grad)(const BiasGradArgs&);
  float (*dot)(const char* row, const char* b, int64_t n, bool bf16);
  void (*widen)(const char* src, int64_t n, char* dst);  ///< bf16 → fp32, padded by a zero to an even number
  void (*pack_up)(const ExpertsProblem&, int64_t expert, int64_t begin, int64_t end, char* dst);
  void (*pack_down)(const ExpertsProblem&, int64_t expert, int64_t begin, int64_t end, char* dst);
};

extern const Stages kAvx512Bf16Stages, kAvx512Stages, kAvx2Stages, kPortableStages;

// ---- sizes that drivers and bodies share

/// Words of a reduction done in one pass: beyond that, a panel and its rows no longer fit the L2 cache together.
constexpr int64_t kChunkWords = 1024;
/// The same for plain weights [reduction, outputs]: few enough that their rows, a group's columns of each, arrive in
/// whole runs and stay in the L2 cache until they are packed, whatever the stride of a row.
constexpr int64_t kNaturalChunkWords = 256;
/// Words (times a panel) of weights that a worker holds at once: at most 1536 · 64 · 4 B = 384 KB of a 1 MB L2 cache.
constexpr int64_t kGroupWords = 1536;
/// The same with room for chunks that are rounded to whole pairs.
constexpr int64_t kStripWords = kGroupWords + 16;
/// Rows done in one pass where the reduction takes several.
constexpr int64_t kPassRows = 512;
/// Rows of a segment of `forward`: enough to make packing a panel cost about 2 %.
constexpr int64_t kSegmentRows = 1024;
/// Panels of a group at most, whose sums wait between passes.
constexpr int64_t kSumPanels = 8;
/// Words over rows that one pass of a weight gradient reduces.
constexpr int64_t kWeightChunkWords = 1024;
constexpr int64_t kMaxTileRows = 6;

constexpr int64_t div_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return div_up(a, b) * b; }
constexpr int64_t words_of(int64_t elements, bool bf16) { return bf16 ? (elements + 1) / 2 : elements; }

/// Bytes of an element of a row that products read.
constexpr int64_t row_element(const Stages& s, bool bf16) { return bf16 && !s.wide_rows ? 2 : 4; }

/// Panels of a reduction of `words` words that are held together.
constexpr int64_t group_of(int64_t words, int64_t chunk_words) {
  const int64_t chunk = div_up(words, div_up(words > 0 ? words : 1, chunk_words));
  const int64_t g = kGroupWords / (chunk > 0 ? chunk : 1);
  return g < 1 ? 1 : g > kSumPanels ? kSumPanels : g;
}

constexpr int64_t up_panels(const ExpertsProblem& p, int64_t panel) {
  return div_up(p.ffn, is_gated(p.activation) ? panel / 2 : panel);
}

}  // namespace turnout::kernels
