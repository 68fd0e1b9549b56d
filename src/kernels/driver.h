// What the forward and the backward driver share: memory of workers, row pointers, the spans of tasks.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "experts.h"
#include "schedule.h"
#include "scratch.h"
#include "stages.h"
#include "table.h"

namespace turnout::kernels {

/// Bytes that a worker needs for sweep(), and `weight` for weight gradients.
inline int64_t worker_bytes(const Stages& s, int64_t weight) {
  const int64_t panel = s.panel * 4;
  const int64_t strips = kStripWords * panel;
  const int64_t sums = kPassRows * kSumPanels * panel;
  const int64_t rows = 2 * (kNaturalChunkWords + 2) * static_cast<int64_t>(sizeof(char*));
  return round_up(std::max(strips + sums + rows, weight), 4096) + 64;
}

/// The routing weight of each row.
inline void weights_of_rows(const ExpertsProblem& q, float* weight) {
  const float* weights = static_cast<const float*>(q.topk_weights);
  for (int64_t i = 0; i < q.tokens * q.top_k; ++i)
    if (q.row_of_choice[i] >= 0) weight[q.row_of_choice[i]] = weights[i];
}

/// Bytes of a row of `columns` elements with room for whole panels; never a multiple of 4 KB, which would put every row
/// in the same cache sets.
inline int64_t padded_row(int64_t columns, int64_t panel, size_t element) {
  const int64_t bytes = round_up(columns, panel) * static_cast<int64_t>(element);
  return round_up(bytes, 64) + 64;
}

/// Rows of x (or grad_y) as the products read them: in place, or copies, of bf16 rows that are wide or, since products
/// read words of two, have an odd length.
struct TokenRows {
  const char* base;
  int64_t stride;  ///< bytes

  static int64_t copied_stride(const Stages& s, const ExpertsProblem& q) {
    if (q.dtype != DType::bf16 || (q.hidden % 2 == 0 && !s.wide_rows)) return 0;
    return padded_row(q.hidden, 2, static_cast<size_t>(row_element(s, true)));
  }
  static int64_t copied_bytes(const Stages& s, const ExpertsProblem& q) { return q.tokens * copied_stride(s, q); }

  TokenRows(const Stages& s, const ExpertsProblem& q, const void* rows, int64_t row_stride, char* copies,
            const ParallelFor& parallel)
      : base(static_cast<const char*>(rows)), stride(row_stride * static_cast<int64_t>(size_of(q.dtype))) {
    const int64_t to = copied_stride(s, q);
    if (to == 0) return;
    parallel(q.tokens, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        char* copy = copies + t * to;
        if (s.wide_rows) {
          s.widen(base + t * stride, q.hidden, copy);
          continue;
        }
        std::memcpy(copy, base + t * stride, static_cast<size_t>(q.hidden) * 2);
        std::memset(copy + q.hidden * 2, 0, 2);
      }
    });
    base = copies;
    stride = to;
  }
};

/// Panels of a task: the whole product where many experts share the work, less where few do, in whole groups.
inline int64_t span_of(int64_t panels, int64_t words, int64_t items, int threads, int64_t chunk_words = kChunkWords) {
  // 8 tasks a thread and product keep the idle tail near 1 / 16 of a product's time over the items of a pass
  const int64_t pieces = div_up(int64_t{8} * threads, items > 0 ? items : 1);
  const int64_t group = group_of(words, chunk_words);
  return std::max(group, std::min(panels, round_up(div_up(panels, std::max<int64_t>(pieces, 1)), group)));
}

/// Consecutive items taken together so that there is work for all threads between a stage and the next.
struct Batch {
  size_t first, last;
  int64_t rows;
};

template <class Items>
std::vector<Batch> batches_of(const Items& items, int64_t rows_wanted) {
  std::vector<Batch> batches;
  for (size_t i = 0; i < items.size();) {
    Batch b{i, i, 0};
    while (b.last < items.size() && (b.rows == 0 || b.rows + items[b.last].rows <= rows_wanted))
      b.rows += items[b.last++].rows;
    batches.push_back(b);
    i = b.last;
  }
  return batches;
}

/// Throws std::invalid_argument where `implementation` does not serve the problem's type.
void check_type(const Implementation& implementation, const ExpertsProblem& problem);

}  // namespace turnout::kernels
