// Backward stages: the derivative of the activation fused into grad_y · down, then the gradients of x and the weights.
#pragma once

#include "forward-inl.h"

namespace turnout::kernels {
namespace {

/// From a tile of p = grad_y · down (unweighted): du = w·p ⊙ act'(u), the panel of w·h, and ⟨p, h⟩ of the panel.
template <class V, bool BF, Activation A>
struct HiddenGradEpilogue {
  const HiddenGradArgs& a;
  int64_t ffn;

  void operator()(int64_t p, int64_t first, int64_t rows, const float* c) const {
    using Reg = typename V::Reg;
    using S = Stored<V, BF>;
    using Row = RowOf<V, BF>;
    constexpr int64_t L = V::L, P = kPanel<V>;
    constexpr bool kGated = is_gated(A);
    const int64_t saved_stride = (kGated ? 2 * ffn : ffn) * S::size;
    float wh[(kMaxTileRows + 1) * P];
    for (int64_t i = 0; i < rows; ++i) {
      const Reg w = V::set1(a.weight[first + i]);
      const char* u = a.saved + (first + i) * saved_stride;
      char* du = a.du + (first + i) * a.du_stride;
      Reg dot = V::zero();
      for (int j = 0; j < V::kVectors; ++j) {
        const int64_t col = p * P + j * L, n = ffn - col;
        const Reg g = V::load(c + i * P + j * L), wg = V::mul(w, g);
        Reg slope, h = act<V, A>(S::load_n(u + col * S::size, n), &slope);
        if constexpr (kGated) {
          Reg up_slope;
          const Reg gate = h, up = factor<V, A>(S::load_n(u + (ffn + col) * S::size, n), &up_slope);
          h = V::mul(gate, up);
          Row::store_n(du + col * Row::size, V::mul(V::mul(wg, up), slope), n);
          Row::store_n(du + (ffn + col) * Row::size, V::mul(V::mul(wg, gate), up_slope), n);
        } else {
          Row::store(du + col * Row::size, V::mul(wg, slope));  // rows of du have room for a whole panel
        }
        dot = V::fma(g, h, dot);
        V::store(wh + i * P + j * L, Row::rounded(V::mul(w, h)));
      }
      a.dots[(first + i) * a.dot_stride + p] = V::sum(dot);
    }
    if (a.wh) store_panel(p, first, rows, wh);
  }

  /// Rows of a panel over rows; bf16 pairs start at even rows, an odd last row is paired with zeros.
  void store_panel(int64_t p, int64_t first, int64_t rows, float* wh) const {
    constexpr int64_t L = V::L, P = kPanel<V>;
    constexpr bool kPairs = BF && !kWideRows<V, BF>;
    char* dst = a.wh + (p * words_of(a.grad_y.count, kPairs) + (kPairs ? first / 2 : first)) * 4 * P;
    if constexpr (kPairs) {
      for (int j = 0; j < V::kVectors; ++j) V::store(wh + rows * P + j * L, V::zero());
      for (int64_t i = 0; i < rows; i += 2)
        for (int j = 0; j < V::kVectors; ++j)
          V::store(dst + i * 2 * P + 4 * j * L,
                   V::interleave(V::load(wh + i * P + j * L), V::load(wh + (i + 1) * P + j * L)));
    } else {
      for (int64_t i = 0; i < rows * V::kVectors; ++i) V::store(dst + i * 4 * L, V::load(wh + i * L));
    }
  }
};

template <class V, bool BF, Activation A>
void hidden_grad_as(const HiddenGradArgs& a) {
  const ExpertsProblem& q = *a.problem;
  const NaturalSource<V, BF> source{static_cast<const char*>(q.down[a.expert]), q.ffn, q.hidden,
                                    sweep_memory<V>(a.worker).rows};
  sweep<V>(a.grad_y, strip_words<V, BF>(q.hidden), a.begin, a.end, source, HiddenGradEpilogue<V, BF, A>{a, q.ffn},
           a.worker);
}

template <class V, bool BF>
void hidden_grad_typed(const HiddenGradArgs& a) {
  switch (a.problem->activation) {
    case Activation::relu:
      return hidden_grad_as<V, BF, Activation::relu>(a);
    case Activation::gelu:
      return hidden_grad_as<V, BF, Activation::gelu>(a);
    case Activation::gelu_tanh:
      return hidden_grad_as<V, BF, Activation::gelu_tanh>(a);
    case Activation::silu:
      return hidden_grad_as<V, BF, Activation::silu>(a);
    case Activation::swiglu:
      return hidden_grad_as<V, BF, Activation::swiglu>(a);
    case Activation::geglu:
      return hidden_grad_as<V, BF, Activation::geglu>(a);
    case Activation::swiglu_clamped:
      return hidden_grad_as<V, BF, Activation::swiglu_clamped>(a);
  }
}

template <class V, bool BF>
void input_grad_typed(const InputGradArgs& a) {
  const ExpertsProblem& q = *a.problem;
  const NaturalSource<V, BF> source{static_cast<const char*>(q.up[a.expert]), q.hidden, q.up_rows(),
                                    sweep_memory<V>(a.worker).rows};
  sweep<V>(a.du, strip_words<V, BF>(q.up_rows()), a.begin, a.end, source,
           SlotEpilogue<V, BF>{nullptr, nullptr, q.hidden, a.out, a.out_stride}, a.worker);
}

/// Columns [col, col + n) of rows [first, first + count), as a packed tile operand [words][n].
template <class V, bool BF>
void pack_columns(const char* const* rows, int64_t count, int64_t col, int64_t n, char* dst) {
  const int64_t at = col * Stored<V, BF>::size;
  if constexpr (BF) {
    for (int64_t k = 0; k < count; k += 2)
      V::store_n(dst + k * 2 * n, V::interleave(rows[k] + at, k + 1 < count ? rows[k + 1] + at : nullptr, n), n);
  } else {
    for (int64_t k = 0; k < count; ++k) V::store_n(dst + k * 4 * n, Stored<V, BF>::load_n(rows[k] + at, n), n);
  }
}

/// BF: of the gradient as stored.
template <class V, bool BF>
void store_gradient(const WeightGradArgs& a, int64_t row, int64_t rows, int64_t panel, const float* c) {
  using S = Stored<V, BF>;
  constexpr int64_t L = V::L, P = kPanel<V>;
  const int64_t col = panel * P, n = a.q - col;
  for (int64_t i = 0; i < rows; ++i) {
    char* out = a.out + ((row + i) * a.q + col) * S::size;
    // whole lines past the caches where the gradient is bigger than they are
    if (a.streaming && n >= P && (reinterpret_cast<uintptr_t>(out) & 63) == 0) {
      if constexpr (BF) {
        for (int j = 0; j < V::kVectors; j += 2)
          V::stream_bf16(out + j * L * S::size, V::load(c + i * P + j * L), V::load(c + i * P + (j + 1) * L));
      } else {
        for (int j = 0; j < V::kVectors; ++j) V::stream(out + j * L * S::size, V::load(c + i * P + j * L));
      }
    } else {
      for (int j = 0; j < V::kVectors; ++j) S::store_n(out + j * L * S::size, V::load(c + i * P + j * L), n - j * L);
    }
  }
}

/// BF: of the rows and panels; Out: of the gradient.
template <class V, bool BF, bool Out>
void weight_grad_typed(const WeightGradArgs& a) {
  constexpr int64_t P = kPanel<V>;
  constexpr int64_t most = max_rows<V, BF>();
  const int64_t words = words_of(a.a.count, BF), passes = div_up(words, kWeightChunkWords);
  const int64_t outputs = a.end - a.begin, nb = div_up(outputs, most), panels = div_up(a.q, P);
  char* strip = a.worker;
  const int64_t longest = words < kWeightChunkWords ? words : kWeightChunkWords;
  float* sums = reinterpret_cast<float*>(strip + round_up(outputs * longest * 4, 64));
  float local[kMaxTileRows * P];
  for (int64_t c = 0; c < passes; ++c) {
    const int64_t k0 = words * c / passes, chunk = words * (c + 1) / passes - k0;
    const int64_t per = BF ? 2 : 1, r0 = k0 * per;
    const int64_t r1 = r0 + chunk * per < a.a.count ? r0 + chunk * per : a.a.count;
    for (int64_t r = r0; r < r1; r += 64)  // 64 rows at a time: their lines serve every block of columns
      for (int64_t i = 0; i < nb; ++i) {
        const int64_t f = outputs * i / nb, n = outputs * (i + 1) / nb - f;
        pack_columns<V, BF>(a.a.rows + r, r1 - r < 64 ? r1 - r : 64, a.begin + f, n,
                            strip + f * chunk * 4 + (r - r0) / per * 4 * n);
      }
    for (int64_t q = 0; q < panels; ++q)
      for (int64_t i = 0; i < nb; ++i) {
        const int64_t f = outputs * i / nb, n = outputs * (i + 1) / nb - f;
        float* s = passes == 1 ? local : sums + (q * outputs + f) * P;
        const char* block = strip + f * chunk * 4;
        Tiles<V, BF, Fetch::none, true>::fn[n](chunk, &block, 0, a.b + (q * words + k0) * 4 * P, s, c > 0, {});
        if (c + 1 == passes) store_gradient<V, Out>(a, a.begin + f, n, q, s);
      }
  }
}

template <class V, bool BF>
void pack_rows_typed(const PackRowsArgs& a) {
  constexpr int64_t P = kPanel<V>;
  const int64_t words = words_of(a.rows.count, BF);
  for (int64_t r = 0; r < a.rows.count; r += 64)
    for (int64_t p = a.begin; p < a.end; ++p)
      pack_natural_panel<V, BF, false>(a.rows.rows + r, a.rows.count - r < 64 ? a.rows.count - r : 64, p * P,
                                       a.columns - p * P, a.dst + (p * words + words_of(r, BF)) * 4 * P);
}

template <class V, bool BF>
void bias_grad_typed(const BiasGradArgs& a) {
  using S = Stored<V, BF>;
  using Row = RowOf<V, BF>;
  constexpr int L = V::L;
  for (int64_t col = a.begin; col < a.end; col += L) {
    const int64_t n = a.end - col;
    auto sum = V::zero();
    for (int64_t r = 0; r < a.a.count; ++r)
      sum = V::fma(V::set1(a.weight ? a.weight[r] : 1.f), Row::load_n(a.a.rows[r] + col * Row::size, n), sum);
    S::store_n(a.out + col * S::size, sum, n);
  }
}

/// A row with a bias.
template <class V, bool BF>
float dot_typed(const char* a, const char* b, int64_t n) {
  using S = Stored<V, BF>;
  using Row = RowOf<V, BF>;
  auto sum = V::zero();
  for (int64_t i = 0; i < n; i += V::L)
    sum = V::fma(Row::load_n(a + i * Row::size, n - i), S::load_n(b + i * S::size, n - i), sum);
  return V::sum(sum);
}

}  // namespace
}  // namespace turnout::kernels
