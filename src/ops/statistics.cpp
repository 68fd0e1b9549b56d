// Statistics: a few operations on vectors of experts, and one pass over the scores.
#include <turnout/statistics.h>

#include "checks.h"

#include <ATen/ATen.h>
#include <torch/library.h>

namespace turnout {

RoutingStatistics routing_statistics(const Routing& routing, const DispatchPlan& plan, const at::Tensor& dropped,
                                     const at::Tensor& token_mask) {
  constexpr const char* kOp = "turnout::routing_statistics";
  ops::check_dim(kOp, "scores", routing.scores, 2, "[tokens, experts]");
  ops::check_floating(kOp, "scores", routing.scores);
  ops::check_dim(kOp, "expert_offsets", plan.expert_offsets, 1, "[experts + 1]");
  ops::check_size(kOp, "expert_offsets", plan.expert_offsets, 0, routing.scores.sym_size(1) + 1, "experts + 1");
  ops::check_device(kOp, "expert_offsets", plan.expert_offsets, "scores", routing.scores);
  ops::check_token_mask(kOp, token_mask, routing.scores, "scores");
  if (dropped.defined()) {
    ops::check_dim(kOp, "dropped", dropped, 0, "a scalar");
    ops::check_device(kOp, "dropped", dropped, "scores", routing.scores);
  }

  RoutingStatistics out;
  const auto scores_TE = routing.scores.detach().to(ops::score_type(routing.scores));
  out.tokens_per_expert = plan.tokens_per_expert();
  const auto load_E = out.tokens_per_expert.to(scores_TE.scalar_type());
  const auto rows = load_E.sum();
  out.max_over_mean = load_E.amax() / load_E.mean().clamp_min(1e-30);
  out.dead_experts = out.tokens_per_expert.eq(0).sum();
  const auto lost = dropped.defined() ? dropped.detach().to(scores_TE.scalar_type()) : at::zeros_like(rows);
  out.dropped_share = lost / (rows + lost).clamp_min(1);
  const auto of_tokens = at::special_entr(scores_TE).sum(-1);  // −p ln p, 0 at 0
  if (token_mask.defined()) {
    out.entropy = of_tokens.masked_fill(token_mask.logical_not(), 0).sum() / token_mask.sum().clamp_min(1);
  } else {
    out.entropy = scores_TE.sym_size(0) == 0 ? of_tokens.sum() : of_tokens.mean();
  }
  return out;
}

namespace {

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> routing_statistics_op(
    const at::Tensor& scores, const at::Tensor& expert_offsets, const std::optional<at::Tensor>& dropped,
    const std::optional<at::Tensor>& token_mask) {
  auto s = routing_statistics({{}, {}, scores}, {expert_offsets, {}, {}}, dropped.value_or(at::Tensor()),
                              token_mask.value_or(at::Tensor()));
  return {s.tokens_per_expert, s.dropped_share, s.max_over_mean, s.entropy, s.dead_experts};
}

TORCH_LIBRARY_IMPL(turnout, CompositeImplicitAutograd, m) { m.impl("routing_statistics", routing_statistics_op); }

}  // namespace
}  // namespace turnout
