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
    constexpr int L = V::L, P = 2 * L;
    constexpr bool kGated = is_gated(A);
    const int64_t col0 = kGated ? p * L : p * P, col1 = kGated ? ffn + p * L : p * P + L;
    const int64_t n0 = ffn - p * (kGated ? L : P), n1 = kGated ? n0 : n0 - L;
    const Reg bias0 = bias ? S::load_n(bias + col0 * S::size, n0) : V::zero();
    const Reg bias1 = bias ? S::load_n(bias + col1 * S::size, n1) : V::zero();
    const int64_t saved_stride = (kGated ? 2 * ffn : ffn) * S::size;
    for (int64_t i = 0; i < rows; ++i) {
      const Reg u0 = V::add(V::load(c + i * P), bias0), u1 = V::add(V::load(c + i * P + L), bias1);
      if (a.saved) {
        char* s = a.saved + (first + i) * saved_stride;
        S::store_n(s + col0 * S::size, u0, n0);
        S::store_n(s + col1 * S::size, u1, n1);
      }
      if (a.h == nullptr) continue;
      // columns beyond ffn are zeros (the rows of h have room for a whole panel)
      char* h = a.h + (first + i) * a.h_stride;
      const auto weighted = [&](Reg v) { return a.weight ? V::mul(v, V::set1(a.weight[first + i])) : v; };
      if constexpr (kGated) {
        S::store(h + p * L * S::size, weighted(V::mul(act<V, A>(u0), factor<V, A>(u1))));
      } else {
        S::store(h + p * P * S::size, weighted(act<V, A>(u0)));
        S::store(h + (p * P + L) * S::size, weighted(act<V, A>(u1)));
      }
    }
  }
};

template <class V, bool BF, Activation A>
void up_as(const UpArgs& a) {
  const ExpertsProblem& q = *a.problem;
  const int64_t words = words_of(q.hidden, BF), bytes = q.hidden * Stored<V, BF>::size;
  const char* bias = q.up_bias ? static_cast<const char*>(q.up_bias[a.expert]) : nullptr;
  const UpEpilogue<V, BF, A> epilogue{a, bias, q.ffn};
  if (a.packed) return sweep<V, BF>(a.x, words, a.begin, a.end, PackedSource<V>{a.packed, words}, epilogue, a.worker);
  const TransposedSource<V, BF, is_gated(A)> source{static_cast<const char*>(q.up[a.expert]), q.ffn, bytes};
  if (a.x.count <= kRowsInPlace<V>)
    sweep_in_place<V, BF>(a.x, bytes, a.begin, a.end, source, epilogue, a.worker);
  else
    sweep<V, BF>(a.x, words, a.begin, a.end, source, epilogue, a.worker);
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

/// Adds the bias (null: none), times the rows' weights (null: 1), and writes fp32 rows of whole panels, past the caches: they are read once, much later.
/// `out` and `stride` are multiples of a vector. The fence that ends a task (schedule.cpp) makes them visible.
template <class V, bool BF>
struct SlotEpilogue {
  const char* bias;
  const float* weight;
  int64_t columns;
  float* out;
  int64_t stride;

  void operator()(int64_t p, int64_t first, int64_t rows, const float* c) const {
    using S = Stored<V, BF>;
    constexpr int L = V::L, P = 2 * L;
    for (int h = 0; h < 2; ++h) {
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
  const int64_t words = words_of(q.ffn, BF), bytes = q.ffn * Stored<V, BF>::size;
  const char* bias = q.down_bias ? static_cast<const char*>(q.down_bias[a.expert]) : nullptr;
  const SlotEpilogue<V, BF> epilogue{bias, a.weight, q.hidden, a.out, a.out_stride};
  if (a.packed) return sweep<V, BF>(a.h, words, a.begin, a.end, PackedSource<V>{a.packed, words}, epilogue, a.worker);
  const TransposedSource<V, BF, false> source{static_cast<const char*>(q.down[a.expert]), q.hidden, bytes};
  if (a.h.count <= kRowsInPlace<V>)
    sweep_in_place<V, BF>(a.h, bytes, a.begin, a.end, source, epilogue, a.worker);
  else
    sweep<V, BF>(a.h, words, a.begin, a.end, source, epilogue, a.worker);
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

template <class V, bool BF>
void pack_up_typed(const ExpertsProblem& q, int64_t expert, int64_t begin, int64_t end, char* dst) {
  const int64_t words = words_of(q.hidden, BF), bytes = q.hidden * Stored<V, BF>::size, panel = words * 8 * V::L;
  const char* w = static_cast<const char*>(q.up[expert]);
  for (int64_t p = begin; p < end; ++p) {
    if (is_gated(q.activation))
      TransposedSource<V, BF, true>{w, q.ffn, bytes}.panel(p, 0, words, dst + p * panel);
    else
      TransposedSource<V, BF, false>{w, q.ffn, bytes}.panel(p, 0, words, dst + p * panel);
  }
}

template <class V, bool BF>
void pack_down_typed(const ExpertsProblem& q, int64_t expert, int64_t begin, int64_t end, char* dst) {
  const int64_t words = words_of(q.ffn, BF), bytes = q.ffn * Stored<V, BF>::size, panel = words * 8 * V::L;
  const char* w = static_cast<const char*>(q.down[expert]);
  for (int64_t p = begin; p < end; ++p)
    TransposedSource<V, BF, false>{w, q.hidden, bytes}.panel(p, 0, words, dst + p * panel);
}

}  // namespace
}  // namespace turnout::kernels
