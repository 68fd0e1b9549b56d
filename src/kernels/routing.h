// Routing on plain arrays: the top-k of scores, and the grouping of routed rows by expert.
#pragma once

#include <cstdint>

#include "experts.h"

namespace turnout::kernels {

/// ids [tokens, k] of the k largest of scores [tokens, n], largest first; equal scores: the lower id first; NaN counts
/// as greater than any number. Ids of a token are always distinct and in [0, n).
///
/// @param stride elements from row to row of `scores`
/// @param k at most n
/// Cost about O(tokens · (n + k²)). Deterministic at any thread count.
void topk(const float* scores, int64_t stride, int64_t tokens, int64_t n, int64_t k, int64_t* ids,
          const ParallelFor& parallel);

/// Groups choices by expert, stable in token order, then in choice.
///
/// @param topk_ids [tokens, top_k], each in [0, num_experts) or -1 = not sent
/// @param expert_offsets [num_experts + 1]; the last is the number of rows
/// @param token_of_row [tokens · top_k]; -1 from the number of rows on
/// @param row_of_choice [tokens, top_k], -1 = not sent
/// @return the index of the first id out of range (then the outputs are not written), or -1
/// Cost O(tokens · top_k + num_experts). Deterministic at any thread count.
int64_t plan(const int64_t* topk_ids, int64_t tokens, int64_t top_k, int64_t num_experts, int64_t* expert_offsets,
             int64_t* token_of_row, int64_t* row_of_choice, const ParallelFor& parallel);

}  // namespace turnout::kernels
