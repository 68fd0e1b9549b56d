// Forward stages: up with the activation, down, the weighted combine; and the packing of weights.
#pragma once

#include "activation-inl.h"
#include "product-inl.h"

namespace turnout::kernels {
namespace {

/// Adds the bias, keeps u where asked, writes h = act(u) in the stored type.
template <class V, bool BF, Activation A>
struct UpEpilogue {
  const UpArgs& a;
  const char* bias;
  int64_t ffn;

  void operator()(int64_t p, int64_t first, int64_t rows, const float* c) const {
    using Reg = typename V::Reg;
    using S = Stored<V, BF>;
    using Row = RowOf<V, BF>;
    constexpr int64_t L = V::L, P = kPanel<V>;
    constexpr bool kGated = is_gated(A);
    constexpr int kStep = kGated ? 2 : 1;  // vectors that make one of h
    const int64_t saved_stride = (kGated ? 2 * ffn : ffn) * S::size;
    for (int j = 0; j < V::kVectors; j += kStep) {
      const int64_t col = (p * (V::kVectors / kStep) + j / kStep) * L, n = ffn - col;
      const Reg bias0 = bias ? S::load_n(bias + col * S::size, n) : V::zero();
      const Reg bias1 = kGated && bias ? S::load_n(bias + (ffn + col) * S::size, n) : V::zero();
      for (int64_t i = 0; i < rows; ++i) {
        const Reg u0 = V::add(V::load(c + i * P + j * L), bias0);
        const Reg u1 = kGated ? V::add(V::load(c + i * P + (j + kStep - 1) * L), bias1) : u0;
        if (a.saved) {
          char* s = a.saved + (first + i) * saved_stride;
          S::store_n(s + col * S::size, u0, n);
          if (kGated) S::store_n(s + (ffn + col) * S::size, u1, n);
        }
        if (a.h == nullptr) continue;
        Reg h = act<V, A>(u0);
        if constexpr (kGated) h = V::mul(h, factor<V, A>(u1));
        if (a.weight) h = V::mul(h, V::set1(a.weight[first + i]));
        // columns beyond ffn are zeros (the rows of h have room for a whole panel)
        Row::store(a.h + (first + i) * a.h_stride + col * Row::size, h);
      }
    }
  }
};

template <class V, bool BF, Activation A>
void up_as(const UpArgs& a) {
  const ExpertsProblem& q = *a.problem;
  const char* bias = q.up_bias ? static_cast<const char*>(q.up_bias[a.expert]) : nullptr;
  const TransposedSource<V, BF, is_gated(A)> source{static_cast<const char*>(a.packed ? nullptr : q.up[a.expert]),
                                                    q.ffn, q.hidden * Stored<V, BF>::size};
  product<V, BF>(a.x, q.hidden, a.packed, source, a.begin, a.end, UpEpilogue<V, BF, A>{a, bias, q.ffn}, a.worker);
}

template <class V, bool BF>
void up_typed(const UpArgs& a) {
  switch (a.problem->activation) {
    case Activation::relu:
      return up_as<V, BF, Activation::relu>(a);
    case Activation::gelu:
      return up_as<V, BF, Activation::gelu>(a);
    case Activation::gelu_tanh:
      return up_as<V, BF, Activation::gelu_tanh>(a);
    case Activation::silu:
      return up_as<V, BF, Activation::silu>(a);
    case Activation::swiglu:
      return up_as<V, BF, Activation::swiglu>(a);
    case Activation::geglu:
      return up_as<V, BF, Activation::geglu>(a);
    case Activation::swiglu_clamped:
      return up_as<V, BF, Activation::swiglu_clamped>(a);
  }
}

/// Adds the bias (null: none), times the rows' weights (null: 1), and writes fp32 rows of whole panels, past the
/// caches: they are read once, much later. `out` and `stride` are multiples of a vector. The fence that ends a task
/// (schedule.cpp) makes them visible.
template <class V, bool BF>
struct SlotEpilogue {
  const char* bias;
  const float* weight;
  int64_t columns;
  float* out;
  int64_t stride;

  void operator()(int64_t p, int64_t first, int64_t rows, const float* c) const {
    using S = Stored<V, BF>;
    constexpr int64_t L = V::L, P = kPanel<V>;
    for (int h = 0; h < V::kVectors; ++h) {
      const int64_t col = p * P + h * L;
      const auto b = bias ? S::load_n(bias + col * S::size, columns - col) : V::zero();
      for (int64_t i = 0; i < rows; ++i)
        V::stream(out + (first + i) * stride + col,
                  weight ? V::fma(V::set1(weight[first + i]), b, V::load(c + i * P + h * L))
                         : V::add(V::load(c + i * P + h * L), b));
    }
  }
};

template <class V, bool BF>
void down_typed(const DownArgs& a) {
  const ExpertsProblem& q = *a.problem;
  const char* bias = q.down_bias ? static_cast<const char*>(q.down_bias[a.expert]) : nullptr;
  const TransposedSource<V, BF, false> source{static_cast<const char*>(a.packed ? nullptr : q.down[a.expert]), q.hidden,
                                              q.ffn * Stored<V, BF>::size};
  product<V, BF>(a.h, q.ffn, a.packed, source, a.begin, a.end,
                 SlotEpilogue<V, BF>{bias, a.weight, q.hidden, a.out, a.out_stride}, a.worker);
}

template <class V, bool BF>
void combine_typed(const CombineArgs& a) {
  using Reg = typename V::Reg;
  using S = Stored<V, BF>;
  constexpr int L = V::L;
  const ExpertsProblem& q = *a.problem;
  const float* weights = static_cast<const float*>(q.topk_weights);
  for (int64_t t = a.begin; t < a.end; ++t) {
    char* y = a.y + t * q.hidden * S::size;
    const int64_t* row = q.row_of_choice + t * q.top_k;
    for (int64_t col = 0; col < q.hidden; col += 4 * L) {  // slots have room for whole vectors; y has not
      const int64_t left = q.hidden - col, vectors = left >= 4 * L ? 4 : (left + L - 1) / L;
      Reg acc[4] = {V::zero(), V::zero(), V::zero(), V::zero()};
      for (int64_t k = 0; k < q.top_k; ++k) {
        if (row[k] < 0) continue;
        const Reg w = V::set1(a.weighted ? weights[t * q.top_k + k] : 1.f);
        const float* s = a.slots + row[k] * a.slot_stride + col;
        for (int64_t j = 0; j < vectors; ++j) acc[j] = V::fma(w, V::load(s + j * L), acc[j]);
      }
      for (int64_t j = 0; j < vectors; ++j) S::store_n(y + (col + j * L) * S::size, acc[j], left - j * L);
    }
  }
}

/// n bf16 numbers as fp32, and a zero where n is odd: words of the weights hold two.
template <class V>
void widen(const char* src, int64_t n, char* dst) {
  int64_t i = 0;
  for (; i + V::L <= n; i += V::L) V::store(dst + 4 * i, V::load_bf16(src + 2 * i));
  if (i < n) V::store_n(dst + 4 * i, V::load_bf16_n(src + 2 * i, n - i), n - i);
  const float zero = 0;
  if (n % 2 != 0) __builtin_memcpy(dst + 4 * n, &zero, 4);
}

template <class V, bool BF, bool Gated>
void pack_panels(const void* weight, int64_t outputs, int64_t reduction, int64_t begin, int64_t end, char* dst) {
  const int64_t words = words_of(reduction, BF);
  const TransposedSource<V, BF, Gated, false> source{static_cast<const char*>(weight), outputs,
                                                     reduction * Stored<V, BF>::size};
  for (int64_t p = begin; p < end; ++p) source.panel(p, 0, words, dst + p * words * 4 * kPanel<V>);
}

template <class V, bool BF>
void pack_up_typed(const ExpertsProblem& q, int64_t expert, int64_t begin, int64_t end, char* dst) {
  if (is_gated(q.activation))
    pack_panels<V, BF, true>(q.up[expert], q.ffn, q.hidden, begin, end, dst);
  else
    pack_panels<V, BF, false>(q.up[expert], q.ffn, q.hidden, begin, end, dst);
}

template <class V, bool BF>
void pack_down_typed(const ExpertsProblem& q, int64_t expert, int64_t begin, int64_t end, char* dst) {
  pack_panels<V, BF, false>(q.down[expert], q.hidden, q.ffn, begin, end, dst);
}

}  // namespace
}  // namespace turnout::kernels
