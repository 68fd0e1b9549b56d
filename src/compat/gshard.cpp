// The GShard layers under their source's names and layouts (seed 004).
#include <turnout/compat.h>
#include <turnout/slots.h>

#include "../ops/checks.h"

#include <ATen/ATen.h>
#include <torch/nn/init.h>

#include <cmath>
#include <numeric>

namespace turnout::compat {
namespace {

turnout::Top2GatingOptions gating_of(const GShardOptions& options, int64_t num_experts) {
  auto gating = options.gating;
  gating.hidden = options.dim;
  gating.num_experts = num_experts;
  gating.outer = 1;
  return gating;
}

}  // namespace

Top2GatingTensors Top2GatingImpl::forward(const at::Tensor& x, const at::Tensor& importance,
                                          const at::Tensor& uniform) {
  const auto gated = turnout::Top2GatingImpl::forward(x, importance, uniform);
  const auto tensors = dispatch_tensors(gated.routing.topk_ids, gated.routing.topk_weights, options.num_experts,
                                        gated.capacity, gated.group_size);
  auto shape = x.sizes().vec();
  shape.back() = options.num_experts;
  shape.push_back(gated.capacity);
  return {tensors.dispatch.view(shape), tensors.combine.view(shape), gated.loss};
}

ExpertsImpl::ExpertsImpl(int64_t dim, std::vector<int64_t> num_experts, int64_t hidden_dim, Activation given)
    : activation(given) {
  constexpr const char* kName = "turnout::compat::Experts";
  ops::check_at_least(kName, "dim", dim, 1);
  for (const auto count : num_experts) ops::check_at_least(kName, "num_experts", count, 1);
  TORCH_CHECK_VALUE(!is_gated(activation), kName, ": activation is ", to_string(activation),
                    ", expected one without a gate");
  const auto hidden = hidden_dim > 0 ? hidden_dim : 4 * dim;
  const auto draw = [&](int64_t rows, int64_t columns) {
    auto shape = num_experts;
    shape.insert(shape.end(), {rows, columns});
    const double bound = 1.0 / std::sqrt(static_cast<double>(columns));
    return torch::nn::init::uniform_(torch::empty(shape), -bound, bound);
  };
  w1 = register_parameter("w1", draw(dim, hidden));
  w2 = register_parameter("w2", draw(hidden, dim));
}

int64_t ExpertsImpl::num_experts() const { return w1.numel() / (w1.size(-1) * w1.size(-2)); }

at::Tensor ExpertsImpl::forward(const at::Tensor& x, const at::Tensor& topk_weights, const DispatchPlan& plan) {
  const auto bank = [](const at::Tensor& w) {
    return std::vector<at::Tensor>{w.flatten(0, -3).transpose(-1, -2)};
  };
  return turnout::experts(x, topk_weights, plan, {bank(w1), bank(w2)}, activation);
}

at::Tensor ExpertsImpl::forward(const at::Tensor& x) {
  constexpr const char* kName = "turnout::compat::Experts";
  const auto outer = w1.sizes().slice(0, w1.dim() - 2);
  TORCH_CHECK_VALUE(x.dim() == w1.dim() && x.size(-1) == w1.size(-2) && x.sizes().slice(0, x.dim() - 2) == outer,
                    kName, ": x has shape ", x.sizes(), ", expected ", outer, " (num_experts), then [n, ",
                    w1.size(-2), "]");
  const auto rows = x.reshape({-1, x.size(-1)});
  const auto index = rows.options().dtype(at::kLong);
  const auto row = at::arange(rows.size(0), index);
  const DispatchPlan plan{at::arange(num_experts() + 1, index) * x.size(-2), row, row.unsqueeze(1)};
  return forward(rows, at::ones({rows.size(0), 1}, rows.options()), plan).view(x.sizes());
}

MoEImpl::MoEImpl(GShardOptions given, int64_t given_experts) : options(given), num_experts(given_experts) {
  gate = register_module("gate", turnout::Top2Gating(gating_of(options, num_experts)));
  experts = register_module(
      "experts", Experts(options.dim, std::vector<int64_t>{num_experts}, options.hidden_dim, options.activation));
}

std::tuple<at::Tensor, at::Tensor> MoEImpl::forward(const at::Tensor& inputs) {
  const auto gated = gate->forward(inputs);
  const auto x_TD = inputs.reshape({-1, options.dim});
  const auto y = experts->forward(x_TD, gated.routing.topk_weights, plan(gated.routing.topk_ids, num_experts));
  return {y.view(inputs.sizes()), gated.loss * options.loss_coef};
}

HeirarchicalMoEImpl::HeirarchicalMoEImpl(GShardOptions given, std::array<int64_t, 2> num_experts) : options(given) {
  HierarchicalMoEOptions hierarchical;
  hierarchical.hidden = options.dim;
  hierarchical.num_experts = num_experts;
  hierarchical.loss_coefficient = options.loss_coef;
  hierarchical.gating = options.gating;
  experts = Experts(options.dim, std::vector<int64_t>{num_experts[0], num_experts[1]}, options.hidden_dim,
                    options.activation);
  layer = register_module("layer", turnout::HierarchicalMoE(hierarchical, experts.ptr()));
}

std::tuple<at::Tensor, at::Tensor> HeirarchicalMoEImpl::forward(const at::Tensor& inputs) {
  auto out = layer->forward(inputs);
  return {out.output, out.aux_loss};
}

}  // namespace turnout::compat
