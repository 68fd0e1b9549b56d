// Copies of rows, and their weighted sums in blocks of columns that stay in the L1 cache.
#include "rows.h"

#include <algorithm>
#include <bit>
#include <cstring>

namespace turnout::kernels {
namespace {

constexpr int64_t kBlock = 1024;  // columns summed at a time: 4 KB of fp32 beside as many of each row

float widen(float x) { return x; }
float widen(uint16_t x) { return std::bit_cast<float>(static_cast<uint32_t>(x) << 16); }

void narrow(float x, float& out) { out = x; }
// To the nearest, ties to even; NaN stays NaN.
void narrow(float x, uint16_t& out) {
  const auto bits = std::bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  out = static_cast<uint16_t>(x != x ? 0x7fc0 : rounded);
}

template <class T>
void sum_token(const T* rows, int64_t columns, const float* weights, const int64_t* row_of_choice, int64_t top_k,
               T* out) {
  float sum[kBlock];
  for (int64_t first = 0; first < columns; first += kBlock) {
    const int64_t n = std::min(kBlock, columns - first);
    std::fill_n(sum, n, 0.0f);
    for (int64_t k = 0; k < top_k; ++k) {
      if (row_of_choice[k] < 0) continue;
      const T* row = rows + row_of_choice[k] * columns + first;
      const float weight = weights[k];
      for (int64_t i = 0; i < n; ++i) sum[i] += widen(row[i]) * weight;
    }
    for (int64_t i = 0; i < n; ++i) narrow(sum[i], out[first + i]);
  }
}

template <class T>
void sum_tokens(const char* rows, int64_t columns, const float* weights, const int64_t* row_of_choice, int64_t tokens,
                int64_t top_k, char* out, const ParallelFor& parallel) {
  parallel(tokens, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t)
      sum_token(reinterpret_cast<const T*>(rows), columns, weights + t * top_k, row_of_choice + t * top_k, top_k,
                reinterpret_cast<T*>(out) + t * columns);
  });
}

}  // namespace

void gather_rows(const char* x, int64_t stride, int64_t bytes, const int64_t* token_of_row, int64_t rows, char* out,
                 const ParallelFor& parallel) {
  parallel(rows, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      if (token_of_row[r] < 0)
        std::memset(out + r * bytes, 0, static_cast<size_t>(bytes));
      else
        std::memcpy(out + r * bytes, x + token_of_row[r] * stride, static_cast<size_t>(bytes));
    }
  });
}

void sum_rows(const char* rows, bool bf16, int64_t columns, const float* weights, const int64_t* row_of_choice,
              int64_t tokens, int64_t top_k, char* out, const ParallelFor& parallel) {
  const auto sum = bf16 ? sum_tokens<uint16_t> : sum_tokens<float>;
  sum(rows, columns, weights, row_of_choice, tokens, top_k, out, parallel);
}

}  // namespace turnout::kernels
