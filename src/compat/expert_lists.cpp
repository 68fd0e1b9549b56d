// Experts as separate modules, and the layers that any experts and any gate make (seeds 000 to 003).
#include <turnout/compat.h>

#include "../ops/checks.h"

#include <ATen/ATen.h>

namespace turnout::compat {
namespace {

torch::nn::AnyModule any(const torch::nn::Linear& linear) { return torch::nn::AnyModule(linear); }

MoEOptions moe_options(int64_t num_experts, int64_t top_k, RouterWeights weights) {
  MoEOptions options;
  options.num_experts = num_experts;
  options.top_k = top_k;
  options.router.weights = weights;
  options.balance_coefficient = 0;
  return options;
}

}  // namespace

ExpertListImpl::ExpertListImpl(const FeedForwardOptions& options, int64_t num_experts) {
  ops::check_at_least("turnout::compat::ExpertList", "num_experts", num_experts, 1);
  for (int64_t e = 0; e < num_experts; ++e)
    experts_.push_back(register_module(std::to_string(e), Expert(options)));
}

at::Tensor ExpertListImpl::forward(const at::Tensor& x, const at::Tensor& topk_weights, const DispatchPlan& plan) {
  ExpertWeights weights;
  const auto& options = experts_.front()->options;
  for (const auto& expert : experts_) {
    weights.up.push_back(expert->up);
    weights.down.push_back(expert->down);
    if (!options.bias) continue;
    weights.up_bias.push_back(expert->up_bias);
    weights.down_bias.push_back(expert->down_bias);
  }
  return turnout::experts(x, topk_weights, plan, weights, options.activation);
}

MoeLayerImpl::MoeLayerImpl(std::vector<torch::nn::AnyModule> experts, torch::nn::AnyModule gate, int64_t top_k)
    : num_experts_per_tok(top_k) {
  const auto count = static_cast<int64_t>(experts.size());
  const auto bank = ModuleExperts(std::move(experts));
  layer = register_module("layer", turnout::MoE(moe_options(count, top_k, RouterWeights::softmax_of_topk),
                                                std::move(gate), bank.ptr()));
}

at::Tensor MoeLayerImpl::forward(const at::Tensor& inputs) {
  ops::check_dim("turnout::compat::MoeLayer", "inputs", inputs, 2, "[batch · seq, hidden]");
  return layer->forward(inputs).output;
}

void MoEConfig::validate() const {
  constexpr const char* kName = "turnout::compat::MoEConfig";
  ops::check_at_least(kName, "num_experts", num_experts, 1);
  TORCH_CHECK_VALUE(top_k >= 1 && top_k <= num_experts, kName, ": top_k is ", top_k, ", expected 1 to ", num_experts,
                    " (num_experts)");
  TORCH_CHECK_VALUE(std::isfinite(capacity_factor) && capacity_factor > 0, kName, ": capacity_factor is ",
                    capacity_factor, ", expected a finite number above 0");
  if (expert_capacity) ops::check_at_least(kName, "expert_capacity", *expert_capacity, 1);
}

TopKRouterImpl::TopKRouterImpl(int64_t given_dim, MoEConfig given) : dim(given_dim), config(given) {
  ops::check_at_least("turnout::compat::TopKRouter", "dim", dim, 1);
  config.validate();
  gate = register_module("gate",
                         torch::nn::Linear(torch::nn::LinearOptions(dim, config.num_experts).bias(false)));
}

std::tuple<at::Tensor, at::Tensor> TopKRouterImpl::forward(const at::Tensor& x) {
  constexpr const char* kName = "turnout::compat::TopKRouter";
  ops::check_dim(kName, "x", x, 3, "[batch, seq, dim]");
  ops::check_size(kName, "x", x, 2, dim, "dim");
  const auto routing = route(gate->forward(x.reshape({-1, dim})), config.top_k);
  const std::vector<int64_t> shape{x.size(0), x.size(1), config.top_k};
  return {routing.topk_weights.view(shape), routing.topk_ids.view(shape)};
}

MixtureOfExpertsImpl::MixtureOfExpertsImpl(int64_t given_dim, MoEConfig given) : dim(given_dim), config(given) {
  router = register_module("router", TopKRouter(dim, config));
  experts = register_module(
      "experts", ExpertList(FeedForwardOptions{dim, 4 * dim, Activation::gelu, /*bias=*/true}, config.num_experts));
}

at::Tensor MixtureOfExpertsImpl::forward(const at::Tensor& x) {
  const auto [scores, indices] = router->forward(x);
  const auto x_TD = x.reshape({-1, dim});
  if (x_TD.size(0) == 0) return x.clone();
  CapacityOptions capacity;
  capacity.factor = config.capacity_factor;
  capacity.fixed = config.expert_capacity.value_or(0);
  const auto places = expert_capacity(capacity, x_TD.size(0), config.top_k, config.num_experts);
  const Routing routing{indices.reshape({-1, config.top_k}), scores.reshape({-1, config.top_k}), {}};
  const auto kept = limit_capacity(routing, config.num_experts, places, x_TD.size(0), DropOrder::choice).routing;
  return experts->forward(x_TD, kept.topk_weights, plan(kept.topk_ids, config.num_experts)).view(x.sizes());
}

SimpleMoELayerImpl::SimpleMoELayerImpl(int64_t embedding_dim, int64_t num_experts, int64_t top_k, int64_t hidden_dim,
                                       double alpha, LoadCount load_count) {
  constexpr const char* kName = "turnout::compat::SimpleMoELayer";
  ops::check_at_least(kName, "embedding_dim", embedding_dim, 1);
  ops::check_at_least(kName, "num_experts", num_experts, 1);
  ops::check_at_least(kName, "hidden_dim", hidden_dim, 0);
  gating_network = register_module("gating_network", torch::nn::Linear(embedding_dim, num_experts));
  const FeedForwardOptions expert{embedding_dim, hidden_dim > 0 ? hidden_dim : 4 * embedding_dim, Activation::gelu};
  experts = register_module("experts", ExpertList(expert, num_experts));
  auto options = moe_options(num_experts, top_k, RouterWeights::normalized);
  options.balance_coefficient = alpha;
  options.load_count = load_count;
  // Not registered: its gate and experts are registered above, under the names of the description.
  layer_ = turnout::MoE(options, any(gating_network), experts.ptr());
}

at::Tensor SimpleMoELayerImpl::forward(const at::Tensor& x) {
  ops::check_dim("turnout::compat::SimpleMoELayer", "x", x, 3, "[batch, seq, embedding_dim]");
  auto out = layer_->forward(x);
  load_balancing_loss = out.aux_loss;
  return out.output;
}

MoELayerImpl::MoELayerImpl(int64_t hidden_dim, int64_t num_experts, int64_t top_k)
    : MoELayerImpl(MoELayerOptions{hidden_dim, num_experts, top_k}) {}

MoELayerImpl::MoELayerImpl(MoELayerOptions given) : options(given) {
  ops::check_at_least("turnout::compat::MoELayer", "hidden_dim", options.hidden_dim, 1);
  auto moe_opts = moe_options(options.num_experts, options.top_k,
                              options.raw_probabilities ? RouterWeights::probability : RouterWeights::softmax_of_topk);
  moe_opts.hidden = options.hidden_dim;
  moe_opts.ffn = options.ffn_dim > 0 ? options.ffn_dim : 4 * options.hidden_dim;
  moe_opts.activation = options.activation;
  moe_opts.balance_coefficient = 1;
  moe_opts.load_count = LoadCount::first_choice;
  moe = turnout::MoE(moe_opts);
  if (options.alpha) {
    const FeedForward dense(FeedForwardOptions{moe_opts.hidden, moe_opts.ffn, moe_opts.activation});
    hybrid = register_module("hybrid", turnout::Hybrid(dense, moe, *options.alpha));
  } else {
    register_module("moe", moe);
  }
}

std::tuple<at::Tensor, at::Tensor> MoELayerImpl::forward(const at::Tensor& x) {
  auto out = options.alpha ? hybrid->forward(x) : moe->forward(x);
  return {out.output, out.aux_loss};
}

}  // namespace turnout::compat
