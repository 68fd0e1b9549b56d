// Rows of tokens: copies of them grouped by expert, and weighted sums of those back. Any instruction set: memory is the limit.
#pragma once

#include <cstdint>

#include "experts.h"

namespace turnout::kernels {

/// out[r] = x[token_of_row[r]]; zeros where that is negative.
///
/// @param x rows of `bytes` bytes, `stride` bytes apart
/// @param token_of_row [rows], each below the rows of x
void gather_rows(const char* x, int64_t stride, int64_t bytes, const int64_t* token_of_row, int64_t rows, char* out,
                 const ParallelFor& parallel);

/// out[t] = Σ_k weights[t, k] · rows[row_of_choice[t, k]] in fp32, in order of k, rounded once; a negative choice adds
/// nothing, so that NaN in row 0 does not spread.
///
/// @param rows fp32, or bf16; `columns` numbers each, without gaps
/// @param row_of_choice [tokens, top_k], each below the rows
/// @param out [tokens, columns] of the type of rows
/// Same bits at any thread count.
void sum_rows(const char* rows, bool bf16, int64_t columns, const float* weights, const int64_t* row_of_choice,
              int64_t tokens, int64_t top_k, char* out, const ParallelFor& parallel);

}  // namespace turnout::kernels
