// Top-k by insertion into a short sorted list; grouping by a counting sort over blocks of tokens.
#include "routing.h"

#include <algorithm>
#include <atomic>
#include <vector>

namespace turnout::kernels {
namespace {

/// a before b: greater first, NaN before numbers. Equal scores keep the order of ids, since ids are met in that order.
bool before(float a, float b) { return a > b || (a != a && b == b); }

void topk_of(const float* s, int64_t n, int64_t k, int64_t* ids) {
  int64_t held = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (held == k && !before(s[i], s[ids[k - 1]])) continue;
    int64_t at = held < k ? held++ : k - 1;
    for (; at > 0 && before(s[i], s[ids[at - 1]]); --at) ids[at] = ids[at - 1];
    ids[at] = i;
  }
}

// below this many choices, waking threads costs more than counting
constexpr int64_t kSmall = 1 << 14;

}  // namespace

void topk(const float* scores, int64_t stride, int64_t tokens, int64_t n, int64_t k, int64_t* ids,
          const ParallelFor& parallel) {
  const auto body = [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) topk_of(scores + t * stride, n, k, ids + t * k);
  };
  if (k <= 0) return;
  if (tokens * n < kSmall) return body(0, tokens);
  parallel(tokens, body);
}

int64_t plan(const int64_t* topk_ids, int64_t tokens, int64_t top_k, int64_t num_experts, int64_t* expert_offsets,
             int64_t* token_of_row, int64_t* row_of_choice, const ParallelFor& parallel) {
  const int64_t n = tokens * top_k, E = num_experts;
  const int64_t blocks = n < kSmall ? 1 : std::max(parallel.threads, 1);
  const auto first = [&](int64_t b) { return n * b / blocks; };
  const auto for_blocks = [&](const auto& f) {
    if (blocks == 1) return f(0);
    parallel(blocks, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) f(b);
    });
  };

  // counts of each block, then, expert by expert, the first row of each block
  std::vector<int64_t> at(static_cast<size_t>(blocks * E));
  std::atomic<int64_t> bad{n};
  for_blocks([&](int64_t b) {
    int64_t* count = at.data() + b * E;
    for (int64_t i = first(b); i < first(b + 1); ++i) {
      const int64_t e = topk_ids[i];
      if (e >= 0 && e < E) {
        ++count[e];
      } else if (e != -1) {
        int64_t seen = bad.load();
        while (i < seen && !bad.compare_exchange_weak(seen, i)) {
        }
        return;
      }
    }
  });
  if (bad.load() < n) return bad.load();

  int64_t rows = 0;
  for (int64_t e = 0; e < E; ++e) {
    expert_offsets[e] = rows;
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t count = at[static_cast<size_t>(b * E + e)];
      at[static_cast<size_t>(b * E + e)] = rows;
      rows += count;
    }
  }
  expert_offsets[E] = rows;

  for_blocks([&](int64_t b) {
    int64_t* next = at.data() + b * E;
    for (int64_t i = first(b); i < first(b + 1); ++i) {
      const int64_t e = topk_ids[i], row = e < 0 ? -1 : next[e]++;
      row_of_choice[i] = row;
      if (row >= 0) token_of_row[row] = i / top_k;
    }
  });
  std::fill(token_of_row + rows, token_of_row + n, int64_t{-1});
  return -1;
}

}  // namespace turnout::kernels
