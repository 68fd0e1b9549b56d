// The table of stages of one instruction set: included once by its translation unit, after its registers.
#pragma once

#include "backward-inl.h"
#include "forward-inl.h"

namespace turnout::kernels {
namespace {

template <class V>
struct Body {
  static bool bf16(const ExpertsProblem& q) { return q.dtype == DType::bf16; }
  static void up(const UpArgs& a) { bf16(*a.problem) ? up_typed<V, true>(a) : up_typed<V, false>(a); }
  static void down(const DownArgs& a) { bf16(*a.problem) ? down_typed<V, true>(a) : down_typed<V, false>(a); }
  static void combine(const CombineArgs& a) {
    bf16(*a.problem) ? combine_typed<V, true>(a) : combine_typed<V, false>(a);
  }
  static void hidden_grad(const HiddenGradArgs& a) {
    bf16(*a.problem) ? hidden_grad_typed<V, true>(a) : hidden_grad_typed<V, false>(a);
  }
  static void input_grad(const InputGradArgs& a) {
    bf16(*a.problem) ? input_grad_typed<V, true>(a) : input_grad_typed<V, false>(a);
  }
  static void weight_grad(const WeightGradArgs& a) {
    if (!a.bf16) return weight_grad_typed<V, false, false>(a);
    weight_grad_typed<V, !kWideRows<V, true>, true>(a);
  }
  static void pack_rows(const PackRowsArgs& a) {
    a.bf16 ? pack_rows_typed<V, !kWideRows<V, true>>(a) : pack_rows_typed<V, false>(a);
  }
  static void bias_grad(const BiasGradArgs& a) { a.bf16 ? bias_grad_typed<V, true>(a) : bias_grad_typed<V, false>(a); }
  static float dot(const char* a, const char* b, int64_t n, bool bf) {
    return bf ? dot_typed<V, true>(a, b, n) : dot_typed<V, false>(a, b, n);
  }
  static void pack_up(const ExpertsProblem& q, int64_t e, int64_t begin, int64_t end, char* dst) {
    bf16(q) ? pack_up_typed<V, true>(q, e, begin, end, dst) : pack_up_typed<V, false>(q, e, begin, end, dst);
  }
  static void pack_down(const ExpertsProblem& q, int64_t e, int64_t begin, int64_t end, char* dst) {
    bf16(q) ? pack_down_typed<V, true>(q, e, begin, end, dst) : pack_down_typed<V, false>(q, e, begin, end, dst);
  }

  static constexpr Stages kStages = {kPanel<V>,
                                     8 * max_rows<V, false>(),
                                     kWideRows<V, true>,
                                     up,
                                     down,
                                     combine,
                                     hidden_grad,
                                     input_grad,
                                     weight_grad,
                                     pack_rows,
                                     bias_grad,
                                     dot,
                                     widen<V>,
                                     pack_up,
                                     pack_down};
};

}  // namespace
}  // namespace turnout::kernels
