// Statistics of a routing: counts from the plan, entropy from the scores, size from the logits.
#include <turnout/statistics.h>

#include "checks.h"

#include <ATen/ATen.h>

#include <cmath>

namespace turnout {

RoutingStatistics routing_statistics(const Routing& routing, const DispatchPlan& plan, const at::Tensor& dropped,
                                     const at::Tensor& logits) {
  constexpr const char* kName = "turnout::routing_statistics";
  const at::NoGradGuard no_grad;
  const auto tokens = routing.topk_ids.size(0);
  const auto num_experts = plan.num_experts();
  ops::check_dim(kName, "scores", routing.scores, 2, "[tokens, experts]");
  ops::check_size(kName, "scores", routing.scores, 0, tokens, "tokens of topk_ids");
  ops::check_size(kName, "scores", routing.scores, 1, num_experts, "experts of the plan");

  RoutingStatistics s;
  s.tokens_per_expert = plan.tokens_per_expert().to(at::kCPU);
  s.choices = routing.topk_ids.numel();
  s.dropped = dropped.defined() ? dropped.item<int64_t>() : 0;
  s.dead_experts = s.tokens_per_expert.eq(0).sum().item<int64_t>();
  const auto rows = s.tokens_per_expert.sum().item<int64_t>();
  if (rows > 0)
    s.max_over_mean =
        s.tokens_per_expert.max().item<double>() * static_cast<double>(num_experts) / static_cast<double>(rows);
  if (tokens == 0) return s;

  const auto p_TE = routing.scores / routing.scores.sum(-1, /*keepdim=*/true);
  s.entropy = at::special_entr(p_TE).sum().item<double>() / static_cast<double>(tokens);
  if (logits.defined()) {
    ops::check_size(kName, "logits", logits, 0, tokens, "tokens of topk_ids");
    const auto size_TE = logits.to(routing.scores.scalar_type()).abs();
    s.logit_rms = std::sqrt(size_TE.square().mean().item<double>());
    s.logit_max = size_TE.max().item<double>();
  }
  return s;
}

}  // namespace turnout
