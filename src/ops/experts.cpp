// Experts: the public calls, and the ops that are compositions of plan and experts.
#include <turnout/experts.h>

#include "checks.h"
#include "names.h"

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

namespace turnout {
namespace {

constexpr ops::Names<Activation, 7> kActivations{{{Activation::relu, "relu"},
                                                  {Activation::gelu, "gelu"},
                                                  {Activation::gelu_tanh, "gelu_tanh"},
                                                  {Activation::silu, "silu"},
                                                  {Activation::swiglu, "swiglu"},
                                                  {Activation::geglu, "geglu"},
                                                  {Activation::swiglu_clamped, "swiglu_clamped"}}};

at::Tensor call_experts(const at::Tensor& x, const at::Tensor& topk_weights, const DispatchPlan& plan,
                        at::TensorList up, at::TensorList down, at::TensorList up_bias, at::TensorList down_bias,
                        c10::string_view activation, bool recompute, bool weight_before_down) {
  using Signature = at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                               const at::Tensor&, at::TensorList, at::TensorList, at::TensorList, at::TensorList,
                               c10::string_view, bool, bool);
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("turnout::experts", "").typed<Signature>();
  return op.call(x, topk_weights, plan.expert_offsets, plan.token_of_row, plan.row_of_choice, up, down, up_bias,
                 down_bias, activation, recompute, weight_before_down);
}

at::Tensor fused_experts_op(const at::Tensor& x, const at::Tensor& topk_ids, const at::Tensor& topk_weights,
                            at::TensorList up, at::TensorList down, at::TensorList up_bias, at::TensorList down_bias,
                            c10::string_view activation, bool recompute, bool weight_before_down) {
  constexpr const char* kOp = "turnout::fused_experts";
  TORCH_CHECK_VALUE(!up.empty(), kOp, ": up is empty, expected a bank or one tensor an expert");
  const bool bank = up.size() == 1 && up[0].dim() == 3;
  const auto num_experts =
      bank ? up[0].sym_size(0).guard_int(__FILE__, __LINE__) : static_cast<int64_t>(up.size());
  ops::check_dim(kOp, "x", x, 2, "[tokens, hidden]");
  ops::check_dim(kOp, "topk_ids", topk_ids, 2, "[tokens, top_k]");
  ops::check_size(kOp, "topk_ids", topk_ids, 0, x.sym_size(0), "tokens of x");
  return call_experts(x, topk_weights, plan(topk_ids, num_experts), up, down, up_bias, down_bias, activation,
                      recompute, weight_before_down);
}

at::Tensor feed_forward_op(const at::Tensor& x, const at::Tensor& up, const at::Tensor& down,
                           const std::optional<at::Tensor>& up_bias, const std::optional<at::Tensor>& down_bias,
                           c10::string_view activation) {
  constexpr const char* kOp = "turnout::feed_forward";
  TORCH_CHECK_VALUE(x.dim() >= 1 && x.sym_size(-1) >= 1, kOp, ": x has shape ", x.sym_sizes(),
                    ", expected [..., hidden] with hidden of at least 1");
  ops::check_dim(kOp, "up", up, 2, "[ffn, hidden] or [2 · ffn, hidden]");
  ops::check_size(kOp, "up", up, 1, x.sym_size(-1), "hidden of x");
  const auto rows = x.reshape_symint({-1, x.sym_size(-1)});
  const auto tokens = rows.sym_size(0);
  const auto index = rows.options().dtype(at::kLong);
  const auto row = at::arange(at::Scalar(tokens), index);
  const DispatchPlan one_expert{at::cat({at::zeros({1}, index), at::full_symint({1}, at::Scalar(tokens), index)}),
                                row, row.unsqueeze(1)};
  const auto weights = at::ones_symint({tokens, 1}, rows.options().dtype(at::kFloat));
  using List = std::vector<at::Tensor>;
  const auto y = call_experts(rows, weights, one_expert, List{up}, List{down}, up_bias ? List{*up_bias} : List{},
                              down_bias ? List{*down_bias} : List{}, activation, /*recompute=*/false,
                              /*weight_before_down=*/false);
  return y.reshape_symint(x.sym_sizes());
}

std::optional<at::Tensor> optional_of(const at::Tensor& tensor) {
  return tensor.defined() ? std::optional(tensor) : std::nullopt;
}

TORCH_LIBRARY_IMPL(turnout, CompositeImplicitAutograd, m) {
  m.impl("fused_experts", fused_experts_op);
  m.impl("feed_forward", feed_forward_op);
}

}  // namespace

Activation parse_activation(const std::string& name) { return ops::parse_name("activation", kActivations, name); }
std::string to_string(Activation activation) { return ops::name_of(kActivations, activation); }
bool is_gated(Activation activation) {
  return activation == Activation::swiglu || activation == Activation::geglu ||
         activation == Activation::swiglu_clamped;
}

at::Tensor experts(const at::Tensor& x, const at::Tensor& topk_weights, const DispatchPlan& plan,
                   const ExpertWeights& weights, Activation activation, bool weight_before_down) {
  return call_experts(x, topk_weights, plan, weights.up, weights.down, weights.up_bias, weights.down_bias,
                      to_string(activation), /*recompute=*/false, weight_before_down);
}

at::Tensor fused_experts(const at::Tensor& x, const at::Tensor& topk_ids, const at::Tensor& topk_weights,
                         const ExpertWeights& weights, Activation activation, bool weight_before_down) {
  return fused_experts_op(x, topk_ids, topk_weights, weights.up, weights.down, weights.up_bias, weights.down_bias,
                          to_string(activation), /*recompute=*/false, weight_before_down);
}

at::Tensor feed_forward(const at::Tensor& x, const at::Tensor& up, const at::Tensor& down, Activation activation,
                        const at::Tensor& up_bias, const at::Tensor& down_bias) {
  return feed_forward_op(x, up, down, optional_of(up_bias), optional_of(down_bias), to_string(activation));
}

int64_t feed_forward_flops(int64_t hidden, int64_t ffn, Activation activation, int64_t active) {
  return 2 * active * hidden * ffn * (is_gated(activation) ? 3 : 2);
}

}  // namespace turnout
