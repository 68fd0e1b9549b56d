// The MoE layer: gate → route → capacity → plan → experts, and the losses; and its blend with a dense block.
#include <turnout/moe.h>

#include <turnout/exchange.h>
#include <turnout/gate.h>

#include "../ops/checks.h"
#include "joined_batch.h"

#include <ATen/ATen.h>
#include <torch/nn/init.h>

#include <cmath>

namespace turnout {
namespace {

constexpr const char* kName = "turnout::MoE";

// A linear gate runs by the op that gives the same bits at any number of threads.
at::Tensor product_of(torch::nn::AnyModule& gate, const at::Tensor& x_TD) {
  const auto linear = std::dynamic_pointer_cast<torch::nn::LinearImpl>(gate.ptr());
  return linear ? gate_logits(x_TD, linear->weight, linear->bias) : gate.forward<at::Tensor>(x_TD);
}

// Experts that pick tokens pick as many as there are places.
MoEOptions completed(MoEOptions options) {
  if (options.selection == Selection::expert_choice && options.capacity.dropless()) options.capacity.factor = 1;
  return options;
}

bool by_sequence(const CapacityOptions& how) { return how.per_sequence && !how.dropless(); }

void check_of_tokens(const char* name, const at::Tensor& tensor, const at::Tensor& x) {
  const auto tokens = x.sizes().slice(0, x.dim() - 1);
  TORCH_CHECK_VALUE(!tensor.defined() || tensor.sizes() == tokens, kName, ": ", name, " has shape ",
                    tensor.defined() ? tensor.sizes() : tokens, ", expected ", tokens, " (x without hidden)");
}

}  // namespace

void check(const MoEOptions& options) {
  ops::check_at_least(kName, "num_experts", options.num_experts, 1);
  ops::check_at_least(kName, "shared.ffn", options.shared.ffn, 0);
  TORCH_CHECK_VALUE(options.shared.ffn > 0 || !options.shared.gated, kName,
                    ": shared.gated is set, but shared.ffn is 0, expected at least 1");
  TORCH_CHECK_VALUE(options.jitter >= 0 && options.jitter < 1, kName, ": jitter is ", options.jitter,
                    ", expected 0 to below 1");
  TORCH_CHECK_VALUE(!options.noisy || options.hidden >= 1, kName, ": hidden is ", options.hidden,
                    ", expected at least 1 where the router is noisy");
  TORCH_CHECK_VALUE(options.top_k >= 1 && options.top_k <= options.num_experts, kName, ": top_k is ", options.top_k,
                    ", expected 1 to ", options.num_experts, " (num_experts)");
  check(options.router, options.top_k, options.num_experts);
  TORCH_CHECK_VALUE(options.selection != Selection::hash || options.router.groups == 1, kName, ": router.groups is ",
                    options.router.groups, ", expected 1 with selection hash, which knows no groups");
  TORCH_CHECK_VALUE(options.selection == Selection::topk || !options.selection_bias, kName,
                    ": selection_bias is set, but selection is ", to_string(options.selection), ", expected topk");
  for (const auto& [name, value] : {std::pair{"balance_coefficient", options.balance_coefficient},
                                    {"z_coefficient", options.z_coefficient}})
    TORCH_CHECK_VALUE(std::isfinite(value) && value >= 0, kName, ": ", name, " is ", value,
                      ", expected a finite number of at least 0");
  expert_capacity(options.capacity, 0, options.top_k, options.num_experts);  // throws for impossible options
}

MoEImpl::MoEImpl(MoEOptions given) : options(completed(given)) {
  check(options);
  ops::check_at_least(kName, "hidden", options.hidden, 1);
  ops::check_at_least(kName, "ffn", options.ffn, 1);
  const auto linear = torch::nn::LinearOptions(options.hidden, options.num_experts).bias(options.gate_bias);
  gate = torch::nn::AnyModule(torch::nn::Linear(linear));
  experts = FeedForwardBank(FeedForwardOptions{options.hidden, options.ffn, options.activation, options.bias},
                            options.num_experts)
                .ptr();
  register_modules();
}

MoEImpl::MoEImpl(MoEOptions given, torch::nn::AnyModule given_gate, std::shared_ptr<ExpertsModule> given_experts)
    : options(completed(given)), gate(std::move(given_gate)), experts(std::move(given_experts)) {
  check(options);
  TORCH_CHECK_VALUE(experts->num_experts() == options.num_experts, kName, ": experts holds ", experts->num_experts(),
                    " experts, expected ", options.num_experts, " (num_experts)");
  register_modules();
}

void MoEImpl::register_modules() {
  register_module("gate", gate.ptr());
  register_module("experts", experts);
  if (options.selection_bias) selection_bias = register_buffer("selection_bias", at::zeros({options.num_experts}));
  if (options.noisy) {
    const auto linear = torch::nn::LinearOptions(options.hidden, options.num_experts).bias(false);
    noise_gate = register_module("noise_gate", torch::nn::Linear(linear));
    torch::nn::init::zeros_(noise_gate->weight);
  }
  if (options.shared.ffn == 0) return;
  shared = register_module("shared", FeedForward(FeedForwardOptions{options.hidden, options.shared.ffn,
                                                                    options.activation, options.bias}));
  if (options.shared.gated)
    shared_gate = register_module("shared_gate",
                                  torch::nn::Linear(torch::nn::LinearOptions(options.hidden, 1).bias(false)));
}

void MoEImpl::join(const Group& ranks) {
  const bool competes = options.selection == Selection::sinkhorn ||
                        (options.selection == Selection::expert_choice && !by_sequence(options.capacity));
  TORCH_CHECK_VALUE(ranks.size == 1 || !competes, kName, ": selection is ", to_string(options.selection),
                    ", expected one that looks at no token of other ranks: topk, hash, or expert_choice with capacity "
                    "per sequence");
  joined_ = ranks;
}

void MoEImpl::to(at::Device device, at::ScalarType type, bool non_blocking) {
  const auto bias = selection_bias.defined() ? selection_bias.detach() : at::Tensor();
  torch::nn::Module::to(device, type, non_blocking);
  if (bias.defined()) selection_bias.set_data(bias.to(device, non_blocking));
}

void MoEImpl::to(at::ScalarType type, bool non_blocking) {
  const auto bias = selection_bias.defined() ? selection_bias.detach() : at::Tensor();
  torch::nn::Module::to(type, non_blocking);
  if (bias.defined()) selection_bias.set_data(bias);
}

Capped MoEImpl::limit(const Routing& routing, const at::Tensor& x) const {
  const auto& how = options.capacity;
  if (!how.dropless() && !how.per_sequence && joined_.size > 1)
    return limit_joined(routing, how, options.num_experts, joined_);
  const auto group = by_sequence(how) ? x.size(-2) : routing.topk_ids.size(0);
  return apply_capacity(routing, options.num_experts, group, how);
}

at::Tensor MoEImpl::logits_of(const at::Tensor& given_TD) {
  const auto parameters = gate.ptr()->parameters(/*recurse=*/true);
  const auto x_TD = parameters.empty() ? given_TD : given_TD.to(parameters[0].scalar_type());
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  auto logits_TE = product_of(gate, x_TD);
  ops::check_size(kName, "the gate's output", logits_TE, -1, options.num_experts, "num_experts");
  if (!options.noisy || !is_training()) return logits_TE;
  return noisy_logits(logits_TE, gate_logits(x_TD.to(noise_gate->weight.scalar_type()), noise_gate->weight)).logits;
}

// The plan stands where experts choose; elsewhere capacity comes before it.
ExpertChoice MoEImpl::choose(const at::Tensor& logits_TE, const at::Tensor& x, const at::Tensor& mask_T,
                             const at::Tensor& words) {
  switch (options.selection) {
    case Selection::topk:
      return {route(logits_TE, options.top_k, options.router, selection_bias, mask_T), {}};
    case Selection::sinkhorn:
      return {route_sinkhorn(logits_TE, options.top_k, is_training(), mask_T), {}};
    case Selection::expert_choice: {
      const auto group = by_sequence(options.capacity) ? x.size(-2) : logits_TE.size(0);
      const auto places = expert_capacity(options.capacity, group, options.top_k, options.num_experts);
      return route_expert_choice(logits_TE, places, group, mask_T);
    }
    case Selection::hash: {
      TORCH_CHECK_VALUE(words.defined(), kName, ": token_ids is not defined, expected the words that selection hash ",
                        "goes by");
      const auto ids_TK = hash_ids(words, options.num_experts, options.top_k, options.hash_seed);
      return {route_chosen(logits_TE, ids_TK, options.router, mask_T), {}};
    }
  }
  TORCH_INTERNAL_ASSERT(false, "a selection without a rule");
}

void MoEImpl::add_losses(const Routing& chosen, const at::Tensor& mask_T, MoEOutput& out) const {
  const auto sum =
      joined_.size == 1 ? SumOverRanks() : [this](const at::Tensor& own) { return sum_over(own, joined_); };
  out.aux_loss = at::zeros({}, chosen.scores.options());
  if (options.balance_coefficient > 0 && options.selection == Selection::topk) {
    out.balance_loss = balance_loss(chosen.scores, chosen.topk_ids, options.load_count, /*group_size=*/0, mask_T, sum);
    out.aux_loss = out.aux_loss + options.balance_coefficient * out.balance_loss;
  }
  if (options.z_coefficient > 0) {
    out.z_loss = z_loss(out.logits, mask_T, sum);
    out.aux_loss = out.aux_loss + options.z_coefficient * out.z_loss;
  }
}

MoEOutput MoEImpl::forward(const at::Tensor& x, const at::Tensor& token_mask, const at::Tensor& token_ids) {
  const bool sequences = by_sequence(options.capacity);
  TORCH_CHECK_VALUE(x.dim() >= (sequences ? 2 : 1), kName, ": x has shape ", x.sizes(), ", expected ",
                    sequences ? "[..., sequence, hidden]" : "[..., hidden]");
  TORCH_CHECK_VALUE(x.size(-1) >= 1, kName, ": x has shape ", x.sizes(), ", expected hidden of at least 1");
  check_of_tokens("token_mask", token_mask, x);
  check_of_tokens("token_ids", token_ids, x);
  auto x_TD = x.reshape({-1, x.size(-1)});
  const auto mask_T = token_mask.defined() ? token_mask.flatten() : at::Tensor();
  const auto jittered_TD = options.jitter > 0 && is_training() ? jitter(x_TD, options.jitter) : x_TD;
  if (options.jitter_experts) x_TD = jittered_TD;

  MoEOutput out;
  out.logits = logits_of(jittered_TD);
  auto chosen = choose(out.logits, x, mask_T, token_ids);
  add_losses(chosen.routing, mask_T, out);
  if (options.selection == Selection::expert_choice) {
    out.routing = std::move(chosen.routing);
    out.plan = std::move(chosen.plan);
    out.dropped = at::zeros({}, out.routing.topk_ids.options());
  } else {
    auto capped = limit(chosen.routing, x);
    out.routing = std::move(capped.routing);
    out.dropped = std::move(capped.dropped);
    out.plan = plan(out.routing.topk_ids, options.num_experts);
  }
  at::Tensor shared_TD, shared_logits_T1;
  auto y_TD = experts->forward_beside(x_TD, out.routing.topk_weights, out.plan, [&] {
    if (shared) shared_TD = shared->forward(x_TD);
    if (shared_gate) shared_logits_T1 = shared_gate->forward(x_TD);
  });
  if (shared) y_TD = add_shared(y_TD, shared_TD, shared_logits_T1);
  out.output = y_TD.reshape(x.sizes());
  return out;
}

HybridImpl::HybridImpl(FeedForward given_dense, MoE given_moe, double given_alpha)
    : alpha(given_alpha), dense(std::move(given_dense)), moe(std::move(given_moe)) {
  TORCH_CHECK_VALUE(alpha >= 0 && alpha <= 1, "turnout::Hybrid: alpha is ", alpha, ", expected 0 to 1");
  register_module("dense", dense);
  register_module("moe", moe);
}

MoEOutput HybridImpl::forward(const at::Tensor& x) {
  auto out = moe->forward(x);
  out.output = alpha * dense->forward(x) + (1 - alpha) * out.output;
  return out;
}

}  // namespace turnout
