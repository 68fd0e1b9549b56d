// Packed weights: the public calls, and the registrations of their ops that are not the CPU's.
#include "packed.h"

#include "checks.h"

#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <torch/library.h>

namespace turnout {
namespace ops {
namespace {

constexpr const char* kPacked = "turnout::experts_packed";

int64_t count_experts(at::TensorList up) {
  TORCH_CHECK_VALUE(!up.empty(), "turnout::prepack: up is empty, expected a bank or one tensor an expert");
  const bool bank = up.size() == 1 && up[0].dim() == 3;
  TORCH_CHECK_VALUE(bank || up[0].dim() == 2, "turnout::prepack: up has shape ", up[0].sym_sizes(),
                    ", expected a bank [experts, rows, hidden], or one [rows, hidden] an expert");
  return bank ? up[0].sym_size(0).guard_int(__FILE__, __LINE__) : static_cast<int64_t>(up.size());
}

using Signature = at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                             const at::Tensor&, const at::Tensor&, c10::string_view, int64_t, at::TensorList,
                             at::TensorList, c10::string_view, bool);

c10::TypedOperatorHandle<Signature> experts_packed() {
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow(kPacked, "").typed<Signature>();
  return op;
}

std::tuple<std::string, int64_t, int64_t> packed_layout_op(at::TensorList up, at::TensorList down,
                                                           c10::string_view activation) {
  const WeightsAlone weights(up, down, parse_activation(std::string(activation)));
  return {packed_layout(weights), weights.args.num_experts(), weights.sizes.ffn.guard_int(__FILE__, __LINE__)};
}

at::Tensor prepack_meta(at::TensorList up, at::TensorList down, c10::string_view activation) {
  const WeightsAlone weights(up, down, parse_activation(std::string(activation)));
  return at::empty({packed_bytes(weights)}, weights.x.options().dtype(at::kByte));
}

at::Tensor experts_packed_meta(const at::Tensor& x, const at::Tensor& topk_weights, const at::Tensor& expert_offsets,
                               const at::Tensor& token_of_row, const at::Tensor& row_of_choice,
                               const at::Tensor& packed, c10::string_view /*layout*/, int64_t ffn,
                               at::TensorList up_bias, at::TensorList down_bias, c10::string_view activation,
                               bool /*weight_before_down*/) {
  check_packed({x,
                topk_weights,
                expert_offsets,
                token_of_row,
                row_of_choice,
                {},
                {},
                up_bias,
                down_bias,
                parse_activation(std::string(activation))},
               packed, ffn);
  return at::empty_symint(x.sym_sizes(), x.options());
}

at::Tensor experts_packed_autograd(const at::Tensor& x, const at::Tensor& topk_weights,
                                   const at::Tensor& expert_offsets, const at::Tensor& token_of_row,
                                   const at::Tensor& row_of_choice, const at::Tensor& packed, c10::string_view layout,
                                   int64_t ffn, at::TensorList up_bias, at::TensorList down_bias,
                                   c10::string_view activation, bool weight_before_down) {
  if (at::GradMode::is_enabled())
    for (const auto& [name, tensor] : {std::pair("x", x), std::pair("topk_weights", topk_weights)})
      TORCH_CHECK(!tensor.requires_grad(), kPacked, ": ", name,
                  " requires a gradient, but packed weights are for "
                  "inference; pass the plain weights, or call without gradients");
  at::AutoDispatchBelowADInplaceOrView below;
  return experts_packed().call(x, topk_weights, expert_offsets, token_of_row, row_of_choice, packed, layout, ffn,
                               up_bias, down_bias, activation, weight_before_down);
}

// Packed weights keep their type under autocast: x follows them, as it must.
at::Tensor experts_packed_autocast(const at::Tensor& x, const at::Tensor& topk_weights,
                                   const at::Tensor& expert_offsets, const at::Tensor& token_of_row,
                                   const at::Tensor& row_of_choice, const at::Tensor& packed, c10::string_view layout,
                                   int64_t ffn, at::TensorList up_bias, at::TensorList down_bias,
                                   c10::string_view activation, bool weight_before_down) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::DispatchKeySet(c10::DispatchKey::AutocastCPU));
  const auto type = layout.find(" bf16 ") != c10::string_view::npos ? at::kBFloat16 : at::kFloat;
  return experts_packed().call(at::autocast::cached_cast(type, x, c10::DeviceType::CPU), topk_weights.to(at::kFloat),
                               expert_offsets, token_of_row, row_of_choice, packed, layout, ffn, up_bias, down_bias,
                               activation, weight_before_down);
}

TORCH_LIBRARY_IMPL(turnout, CompositeImplicitAutograd, m) { m.impl("packed_layout", packed_layout_op); }
TORCH_LIBRARY_IMPL(turnout, Meta, m) {
  m.impl("prepack", prepack_meta);
  m.impl("experts_packed", experts_packed_meta);
}
TORCH_LIBRARY_IMPL(turnout, Autograd, m) { m.impl("experts_packed", experts_packed_autograd); }
TORCH_LIBRARY_IMPL(turnout, AutocastCPU, m) { m.impl("experts_packed", experts_packed_autocast); }

}  // namespace

WeightsAlone::WeightsAlone(at::TensorList up, at::TensorList down, Activation activation)
    : args{x, topk_weights, expert_offsets, token_of_row, row_of_choice, up, down, {}, {}, activation} {
  const auto experts = count_experts(up);
  const auto index = up[0].options().dtype(at::kLong);
  x = at::empty_symint({0, up[0].sym_size(-1)}, up[0].options());
  topk_weights = at::empty({0, 1}, up[0].options().dtype(at::kFloat));
  expert_offsets = at::zeros({experts + 1}, index);
  token_of_row = at::empty({0}, index);
  row_of_choice = at::empty({0, 1}, index);
  sizes = check_experts(args);
}

void check_packed(const ExpertsArgs& args, const at::Tensor& packed, int64_t ffn) {
  check_routed(args);
  check_at_least(kPacked, "ffn", ffn, 1);
  check_biases(args, {args.x.sym_size(1), ffn, args.gated() ? 2 * ffn : ffn});
  check_dim(kPacked, "packed", packed, 1, "[bytes]");
  TORCH_CHECK_TYPE(packed.scalar_type() == at::kByte, kPacked, ": packed is ", packed.scalar_type(),
                   ", expected uint8, as turnout::prepack returns");
  check_device(kPacked, "packed", packed, "x", args.x);
  TORCH_CHECK_VALUE(packed.is_contiguous(), kPacked, ": packed is not contiguous; clone() it");
}

}  // namespace ops

PackedExperts prepack(const ExpertWeights& weights, Activation activation) {
  const at::NoGradGuard no_gradients;
  PackedExperts packed;
  packed.activation = activation;
  const auto word = to_string(activation);
  std::tie(packed.layout, packed.num_experts, packed.ffn) = ops::packed_layout_op(weights.up, weights.down, word);
  const auto clones = [](const std::vector<at::Tensor>& tensors) {
    std::vector<at::Tensor> copies;
    for (const auto& tensor : tensors) copies.push_back(tensor.detach().clone());
    return copies;
  };
  packed.plain.up_bias = clones(weights.up_bias);
  packed.plain.down_bias = clones(weights.down_bias);
  if (packed.layout.empty()) {
    packed.plain.up = clones(weights.up);
    packed.plain.down = clones(weights.down);
    return packed;
  }
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("turnout::prepack", "")
                             .typed<at::Tensor(at::TensorList, at::TensorList, c10::string_view)>();
  packed.data = op.call(weights.up, weights.down, word);
  return packed;
}

at::Tensor fused_experts(const at::Tensor& x, const at::Tensor& topk_ids, const at::Tensor& topk_weights,
                         const PackedExperts& packed, bool weight_before_down) {
  if (!packed.data.defined())
    return fused_experts(x, topk_ids, topk_weights, packed.plain, packed.activation, weight_before_down);
  const auto routed = plan(topk_ids, packed.num_experts);
  return ops::experts_packed().call(x, topk_weights, routed.expert_offsets, routed.token_of_row, routed.row_of_choice,
                                    packed.data, packed.layout, packed.ffn, packed.plain.up_bias,
                                    packed.plain.down_bias, to_string(packed.activation), weight_before_down);
}

}  // namespace turnout
