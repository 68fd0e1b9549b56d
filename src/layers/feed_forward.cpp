// Feed-forward blocks: one dense, and a bank of many. Parameters and their initial values; the maths is in ops.
#include <turnout/moe.h>

#include "../ops/checks.h"
#include "weight_parts.h"

#include <torch/nn/init.h>

#include <cmath>

namespace turnout {
namespace {

// Uniform in ±1/√fan_in, as torch::nn::Linear draws weight and bias.
at::Tensor draw(at::IntArrayRef shape, int64_t fan_in) {
  const double bound = 1.0 / std::sqrt(static_cast<double>(fan_in));
  return torch::nn::init::uniform_(torch::empty(shape), -bound, bound);
}

// Each expert of the whole bank is drawn in turn, those of the range are kept: [count, shape of one].
at::Tensor draw_range(std::vector<int64_t> shape, int64_t fan_in, const ExpertRange& range) {
  const auto one = shape;
  shape.insert(shape.begin(), range.count);
  auto kept = torch::empty(shape);
  for (int64_t e = 0; e < range.all; ++e) {
    const auto drawn = draw(one, fan_in);
    if (e >= range.first && e < range.first + range.count) kept[e - range.first].copy_(drawn);
  }
  return kept;
}

void check(const char* name, const FeedForwardOptions& options) {
  ops::check_at_least(name, "hidden", options.hidden, 1);
  ops::check_at_least(name, "ffn", options.ffn, 1);
}

int64_t up_rows(const FeedForwardOptions& options) { return is_gated(options.activation) ? 2 * options.ffn : options.ffn; }

}  // namespace

FeedForwardImpl::FeedForwardImpl(FeedForwardOptions given) : options(given) {
  check("turnout::FeedForward", options);
  up = register_parameter("up", draw({up_rows(options), options.hidden}, options.hidden));
  down = register_parameter("down", draw({options.hidden, options.ffn}, options.ffn));
  if (!options.bias) return;
  up_bias = register_parameter("up_bias", draw({up_rows(options)}, options.hidden));
  down_bias = register_parameter("down_bias", draw({options.hidden}, options.ffn));
}

at::Tensor FeedForwardImpl::forward(const at::Tensor& x) {
  return feed_forward(x, up, down, options.activation, up_bias, down_bias);
}

FeedForwardBankImpl::FeedForwardBankImpl(FeedForwardOptions given, int64_t num_experts)
    : FeedForwardBankImpl(given, ExpertRange{0, num_experts, num_experts}) {}

FeedForwardBankImpl::FeedForwardBankImpl(FeedForwardOptions given, ExpertRange range) : options(given) {
  constexpr const char* kName = "turnout::FeedForwardBank";
  check(kName, options);
  ops::check_at_least(kName, "num_experts", range.count, 1);
  ops::check_at_least(kName, "first", range.first, 0);
  ops::check_at_least(kName, "num_experts of the whole bank", range.all, range.first + range.count);
  up = register_parameter("up", draw_range({up_rows(options), options.hidden}, options.hidden, range));
  down = register_parameter("down", draw_range({options.hidden, options.ffn}, options.ffn, range));
  if (!options.bias) return;
  up_bias = register_parameter("up_bias", draw_range({up_rows(options)}, options.hidden, range));
  down_bias = register_parameter("down_bias", draw_range({options.hidden}, options.ffn, range));
}

FeedForwardBankImpl::FeedForwardBankImpl(FeedForwardOptions given, const ExpertWeights& banks) : options(given) {
  constexpr const char* kName = "turnout::FeedForwardBank";
  check(kName, options);
  const auto adopt = [&](const char* name, const std::vector<at::Tensor>& bank, std::vector<int64_t> shape) {
    TORCH_CHECK_VALUE(bank.size() == 1 && bank[0].dim() == static_cast<int64_t>(shape.size()) + 1, kName, ": ", name,
                      " holds ", bank.size(), " tensors, expected one bank of all experts");
    shape.insert(shape.begin(), banks.down[0].size(0));
    TORCH_CHECK_VALUE(shape[0] >= 1 && bank[0].sizes() == at::IntArrayRef(shape), kName, ": ", name, " has shape ",
                      bank[0].sizes(), ", expected ", at::IntArrayRef(shape));
    return register_parameter(name, bank[0].detach());
  };
  down = adopt("down", banks.down, {options.hidden, options.ffn});
  up = adopt("up", banks.up, {up_rows(options), options.hidden});
  TORCH_CHECK_VALUE(options.bias == !banks.up_bias.empty() && options.bias == !banks.down_bias.empty(), kName,
                    ": biases are ", options.bias ? "missing" : "given", ", expected as options.bias says");
  if (!options.bias) return;
  up_bias = adopt("up_bias", banks.up_bias, {up_rows(options)});
  down_bias = adopt("down_bias", banks.down_bias, {options.hidden});
}

ExpertWeights FeedForwardBankImpl::weights() const {
  ExpertWeights weights{{up}, {down}};
  if (options.bias) {
    weights.up_bias = {up_bias};
    weights.down_bias = {down_bias};
  }
  return weights;
}

at::Tensor FeedForwardBankImpl::forward(const at::Tensor& x, const at::Tensor& topk_weights,
                                        const DispatchPlan& plan) {
  return turnout::experts(x, topk_weights, plan, weights(), options.activation);
}

std::vector<RunExperts> FeedForwardBankImpl::parts(const std::vector<int64_t>& counts) {
  return run_parts(weights(), options.activation, counts);
}

}  // namespace turnout
