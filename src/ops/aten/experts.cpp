// Experts as ATen calls, one product an expert: the path for any device and type. The CPU kernels do the same in one
// pass; this is what they are measured against and what serves where they do not.
//
// Legend: T tokens, K top_k, R = T·K rows, n rows of one expert, D hidden, U rows of up, F ffn.
#include "../experts_registration.h"

#include <turnout/combine.h>

#include <ATen/ATen.h>
#include <torch/library.h>

namespace turnout::ops {
namespace {

// GPT-OSS: the gate at most 7, up within ±7
constexpr double kClamp = 7, kClampedSlope = 1.702;

// act(pre), for gated activations act(gate) · up
at::Tensor activate(const at::Tensor& pre_nU, Activation activation) {
  switch (activation) {
    case Activation::relu:
      return pre_nU.relu();
    case Activation::gelu:
      return at::gelu(pre_nU);
    case Activation::gelu_tanh:
      return at::gelu(pre_nU, "tanh");
    case Activation::silu:
      return at::silu(pre_nU);
    case Activation::swiglu:
    case Activation::geglu:
    case Activation::swiglu_clamped:
      break;
  }
  const auto halves = pre_nU.chunk(2, -1);
  if (activation == Activation::swiglu_clamped) {
    const auto gate = halves[0].clamp_max(kClamp);
    return gate.mul(kClampedSlope).sigmoid_().mul_(gate).mul_(halves[1].clamp(-kClamp, kClamp).add_(1));
  }
  return (activation == Activation::swiglu ? at::silu(halves[0]) : at::gelu(halves[0])).mul_(halves[1]);
}

// d loss / d pre, from d loss / d h
at::Tensor activate_backward(const at::Tensor& grad_nF, const at::Tensor& pre_nU, Activation activation) {
  switch (activation) {
    case Activation::relu:
      return at::threshold_backward(grad_nF, pre_nU, 0);
    case Activation::gelu:
      return at::gelu_backward(grad_nF, pre_nU);
    case Activation::gelu_tanh:
      return at::gelu_backward(grad_nF, pre_nU, "tanh");
    case Activation::silu:
      return at::silu_backward(grad_nF, pre_nU);
    case Activation::swiglu:
    case Activation::geglu:
    case Activation::swiglu_clamped:
      break;
  }
  const auto halves = pre_nU.chunk(2, -1);
  if (activation == Activation::swiglu_clamped) {
    const auto gate = halves[0].clamp_max(kClamp), up = halves[1].clamp(-kClamp, kClamp).add_(1);
    const auto sigmoid = gate.mul(kClampedSlope).sigmoid_();
    const auto slope = sigmoid * (1 + gate * kClampedSlope * (1 - sigmoid));
    return at::cat({(grad_nF * up * slope).masked_fill_(halves[0] > kClamp, 0),
                    (grad_nF * gate * sigmoid).masked_fill_(halves[1].abs() > kClamp, 0)},
                   -1);
  }
  const bool swiglu = activation == Activation::swiglu;
  const auto through_gate = grad_nF * halves[1];
  return at::cat({swiglu ? at::silu_backward(through_gate, halves[0]) : at::gelu_backward(through_gate, halves[0]),
                  grad_nF * (swiglu ? at::silu(halves[0]) : at::gelu(halves[0]))},
                 -1);
}

at::Tensor linear(const at::Tensor& x, const at::Tensor& weight, at::TensorList bias, int64_t expert) {
  const auto y = x.matmul(weight.t());
  return bias.empty() ? y : y.add_(expert_of(bias, expert, 1));
}

// Rows of each expert as (first, count), read from the plan on the host.
std::vector<std::pair<int64_t, int64_t>> ranges_of(const at::Tensor& expert_offsets) {
  const auto offsets = expert_offsets.cpu();
  const auto* at = offsets.const_data_ptr<int64_t>();
  std::vector<std::pair<int64_t, int64_t>> ranges;
  for (int64_t e = 0; e + 1 < offsets.numel(); ++e) ranges.emplace_back(at[e], at[e + 1] - at[e]);
  return ranges;
}

// The choice that each row serves, flat: rows are a permutation of the sent choices. 0 behind the live rows.
struct Choices {
  explicit Choices(const ExpertsArgs& args)
      : row_N(args.row_of_choice.flatten()),
        sent(row_N.ge(0).nonzero().squeeze(1)),
        of_row(at::zeros({args.token_of_row.size(0)}, row_N.options())) {
    of_row.index_copy_(0, row_N.index_select(0, sent), sent);
  }
  at::Tensor row_N, sent, of_row;
};

at::Tensor weights_of_rows(const ExpertsArgs& args, const Choices& choices) {
  return args.topk_weights.flatten().index_select(0, choices.of_row);
}

// The sum of each token's rows.
at::Tensor sum_rows(const at::Tensor& rows, const ExpertsArgs& args) {
  const auto ones = at::ones(args.row_of_choice.sizes(), rows.options().dtype(at::kFloat));
  return combine(rows, ones, {args.expert_offsets, args.token_of_row, args.row_of_choice});
}

at::Tensor combine_rows(const at::Tensor& rows, const at::Tensor& weights, const ExpertsArgs& args) {
  return combine(rows, weights, {args.expert_offsets, args.token_of_row, args.row_of_choice});
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> experts_forward_aten(const ExpertsArgs& args, bool keep) {
  const auto sizes = check_experts(args);
  const auto rows = args.token_of_row.size(0), up_rows = sizes.up_rows.expect_int();
  auto kept_RU = at::zeros({keep ? rows : 0, up_rows}, args.x.options());
  auto y_RD = at::zeros({rows, args.x.size(1)}, args.x.options());
  const auto weight_R = args.weight_before_down ? weights_of_rows(args, Choices(args)) : at::Tensor();
  const auto ranges = ranges_of(args.expert_offsets);
  for (int64_t e = 0; e < args.num_experts(); ++e) {
    const auto [first, count] = ranges[e];
    if (count == 0) continue;
    const auto x_nD = args.x.index_select(0, args.token_of_row.narrow(0, first, count));
    const auto pre_nU = linear(x_nD, expert_of(args.up, e, 2), args.up_bias, e);
    if (keep) kept_RU.narrow(0, first, count).copy_(pre_nU);
    const auto h_nF = activate(pre_nU, args.activation), down = expert_of(args.down, e, 2);
    if (!args.weight_before_down) {
      y_RD.narrow(0, first, count).copy_(linear(h_nF, down, args.down_bias, e));
      continue;
    }
    const auto weight_n1 = weight_R.narrow(0, first, count).unsqueeze(1);
    auto y_nD = h_nF.mul(weight_n1).to(h_nF.scalar_type()).matmul(down.t());
    if (!args.down_bias.empty()) y_nD = y_nD + expert_of(args.down_bias, e, 1) * weight_n1;
    y_RD.narrow(0, first, count).copy_(y_nD);
  }
  if (args.weight_before_down) return {sum_rows(y_RD, args), kept_RU};
  return {combine_rows(y_RD, args.topk_weights, args), kept_RU};
}

ExpertsGradients experts_backward_aten(const at::Tensor& grad_TD, const ExpertsArgs& args, const at::Tensor& kept_RU,
                                       std::array<bool, 6> needs) {
  check_experts_backward(grad_TD, args, check_experts(args), kept_RU);
  const auto rows = args.token_of_row.size(0);
  ExpertsGradients grads;
  const auto zeros_of = [](at::TensorList tensors, bool needed) {
    std::vector<at::Tensor> zeros;
    if (needed)
      for (const auto& tensor : tensors) zeros.push_back(at::zeros(tensor.sizes(), tensor.options()));
    return zeros;
  };
  grads.up = zeros_of(args.up, needs[2]);
  grads.down = zeros_of(args.down, needs[3]);
  grads.up_bias = zeros_of(args.up_bias, needs[4]);
  grads.down_bias = zeros_of(args.down_bias, needs[5]);

  const Choices choices(args);
  const auto weight_R = weights_of_rows(args, choices);
  const auto wide = args.x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  auto grad_weight_R = at::zeros({rows}, weight_R.options().dtype(wide));
  auto grad_x_RD = at::zeros({needs[0] ? rows : 0, args.x.size(1)}, args.x.options());

  const auto ranges = ranges_of(args.expert_offsets);
  for (int64_t e = 0; e < args.num_experts(); ++e) {
    const auto [first, count] = ranges[e];
    if (count == 0) continue;
    const auto tokens_n = args.token_of_row.narrow(0, first, count);
    const auto x_nD = args.x.index_select(0, tokens_n);
    const auto grad_nD = grad_TD.index_select(0, tokens_n);
    const auto weight_n1 = weight_R.narrow(0, first, count).unsqueeze(1);
    const auto up = expert_of(args.up, e, 2), down = expert_of(args.down, e, 2);
    const auto pre_nU = kept_RU.size(0) > 0 ? kept_RU.narrow(0, first, count) : linear(x_nD, up, args.up_bias, e);
    const auto h_nF = activate(pre_nU, args.activation);
    const auto unweighted_nF = grad_nD.matmul(down);  // d loss / d h, were the routing weight 1
    const auto weighted_nD = grad_nD.mul(weight_n1).to(grad_nD.scalar_type());
    if (needs[1]) {
      // ⟨grad, down · h + bias⟩ without down · h: ⟨downᵀ · grad, h⟩ + ⟨grad, bias⟩
      auto dot_n = (unweighted_nF.to(wide) * h_nF).sum(-1);
      if (!args.down_bias.empty())
        dot_n += (grad_nD.to(wide) * expert_of(args.down_bias, e, 1)).sum(-1);
      grad_weight_R.narrow(0, first, count).copy_(dot_n);
    }
    if (needs[3]) expert_of(grads.down, e, 2).copy_(weighted_nD.t().matmul(h_nF));
    if (needs[5] && !args.down_bias.empty()) expert_of(grads.down_bias, e, 1).copy_(weighted_nD.sum(0));
    if (!(needs[0] || needs[2] || needs[4])) continue;
    const auto grad_h_nF = unweighted_nF.mul(weight_n1).to(grad_nD.scalar_type());
    const auto grad_pre_nU = activate_backward(grad_h_nF, pre_nU, args.activation);
    if (needs[0]) grad_x_RD.narrow(0, first, count).copy_(grad_pre_nU.matmul(up));
    if (needs[2]) expert_of(grads.up, e, 2).copy_(grad_pre_nU.t().matmul(x_nD));
    if (needs[4] && !args.up_bias.empty()) expert_of(grads.up_bias, e, 1).copy_(grad_pre_nU.sum(0));
  }
  grads.x = at::empty({0}, args.x.options());
  if (needs[0]) grads.x = sum_rows(grad_x_RD, args);
  grads.topk_weights = at::empty({0}, args.topk_weights.options());
  if (needs[1]) {
    auto grad_N = at::zeros({args.row_of_choice.numel()}, args.topk_weights.options());
    const auto row_of_sent = choices.row_N.index_select(0, choices.sent);
    grad_N.index_copy_(0, choices.sent, grad_weight_R.index_select(0, row_of_sent).to(grad_N.scalar_type()));
    grads.topk_weights = grad_N.view(args.row_of_choice.sizes());
  }
  return grads;
}

namespace {
TORCH_LIBRARY_IMPL(turnout, CompositeExplicitAutograd, m) {
  m.impl("experts", experts_op<experts_forward_aten>);
  m.impl("experts_forward", experts_forward_op<experts_forward_aten>);
  m.impl("experts_backward", experts_backward_op<experts_backward_aten>);
}
}  // namespace
}  // namespace turnout::ops
