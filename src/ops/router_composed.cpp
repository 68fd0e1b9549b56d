// The router composed of differentiable calls: one text for every device and type, and the kernel's second derivative.
//
// Legend: T tokens, E experts, K top_k, G groups.
#include "router_composed.h"

#include "checks.h"
#include "kernels/router.h"

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <limits>

namespace turnout::ops {
namespace {

// Keeps the division of sigmoids by their sum finite where all have underflowed (Megatron-LM, DeepSeek-V3).
constexpr double kSigmoidEpsilon = 1e-20;

struct Scored {
  at::Tensor logits, scores;  // [T, E] in the router's type
};

Scored score(const at::Tensor& logits, const RouterOptions& options) {
  const auto logits_TE = options.precision == RouterPrecision::logits ? logits : logits.to(score_type(logits));
  return {logits_TE, options.score == ScoreFunction::sigmoid ? logits_TE.sigmoid() : logits_TE.softmax(-1)};
}

at::Tensor probabilities(const at::Tensor& scores_TE, const RouterOptions& options) {
  if (options.score == ScoreFunction::softmax) return scores_TE;
  return scores_TE / (scores_TE.sum(-1, /*keepdim=*/true) + kSigmoidEpsilon);
}

// Leaves of each row the scores of its best groups.
at::Tensor limit_groups(const at::Tensor& scores_TE, const RouterOptions& options) {
  const auto size = scores_TE.sym_size(1) / options.groups;
  const auto by_group = scores_TE.reshape_symint({scores_TE.sym_size(0), options.groups, size});
  const auto best = options.group_top == 1 ? by_group.amax(-1)
                                           : by_group.gather(-1, turnout::topk(by_group, options.group_top)).sum(-1);
  const auto kept = turnout::topk(best, options.kept_groups);
  const auto left_out = at::ones_like(best, at::kBool).scatter(-1, kept, false);
  const double instead = options.group_mask == GroupMask::zero ? 0.0 : -std::numeric_limits<double>::infinity();
  return by_group.masked_fill(left_out.unsqueeze(-1), instead).reshape_symint(scores_TE.sym_sizes());
}

at::Tensor weigh(const Scored& scored, const at::Tensor& ids_TK, const at::Tensor& absent,
                 const RouterOptions& options) {
  at::Tensor weights_TK;
  if (options.weights == RouterWeights::softmax_of_topk) {
    auto chosen_TK = scored.logits.gather(-1, ids_TK);
    if (absent.defined()) {
      // A row without any choice keeps its logits: the softmax of nothing is NaN.
      const auto some = absent.logical_not().any(-1, /*keepdim=*/true);
      chosen_TK = chosen_TK.masked_fill(absent.logical_and(some), -std::numeric_limits<double>::infinity());
    }
    weights_TK = chosen_TK.softmax(-1);
  } else {
    weights_TK = scored.scores.gather(-1, ids_TK);
    if (absent.defined()) weights_TK = weights_TK.masked_fill(absent, 0);
    if (options.weights == RouterWeights::normalized) {
      auto sum_T1 = weights_TK.sum(-1, /*keepdim=*/true);
      if (options.epsilon > 0) sum_T1 = sum_T1 + options.epsilon;
      if (absent.defined()) sum_T1 = sum_T1.masked_fill(absent.all(-1, /*keepdim=*/true), 1);
      weights_TK = weights_TK / sum_T1;
    }
  }
  if (options.scale != 1.0) weights_TK = weights_TK * options.scale;
  return absent.defined() ? weights_TK.masked_fill(absent, 0) : weights_TK;
}

}  // namespace

Routing route_composed(const at::Tensor& logits, int64_t top_k, const RouterOptions& options,
                       const at::Tensor& selection_bias) {
  const auto scored = score(logits, options);
  auto choice_TE = scored.logits.detach();
  if (selection_bias.defined() || options.groups > 1) choice_TE = scored.scores.detach().to(score_type(logits));
  if (selection_bias.defined()) choice_TE = choice_TE + selection_bias.detach();
  if (options.groups > 1) choice_TE = limit_groups(choice_TE, options);
  const auto ids_TK = turnout::topk(choice_TE, top_k);
  return {ids_TK, weigh(scored, ids_TK, {}, options), probabilities(scored.scores, options)};
}

Routing weigh_composed(const at::Tensor& logits, const at::Tensor& topk_ids, const at::Tensor& absent,
                       const RouterOptions& options) {
  const auto scored = score(logits, options);
  return {topk_ids, weigh(scored, topk_ids, absent, options), probabilities(scored.scores, options)};
}

void check_route_forward(const at::Tensor& logits, int64_t top_k) {
  constexpr const char* kOp = "turnout::route_forward";
  check_dim(kOp, "logits", logits, 2, "[tokens, experts]");
  const auto type = logits.scalar_type();
  TORCH_CHECK_TYPE(type == at::kFloat || type == at::kBFloat16, kOp, ": logits is ", type,
                   ", expected float32 or bfloat16");
  TORCH_CHECK_VALUE(logits.sym_size(1) <= kernels::kMostExperts && top_k <= kernels::kMostChoices, kOp,
                    ": logits has shape ", logits.sym_sizes(), " and top_k is ", top_k, ", expected at most ",
                    kernels::kMostExperts, " experts and ", kernels::kMostChoices, " choices");
}

void check_route_backward(const std::optional<at::Tensor>& grad_weights, const std::optional<at::Tensor>& grad_scores,
                          const at::Tensor& logits, const at::Tensor& topk_ids, const at::Tensor& scores) {
  constexpr const char* kOp = "turnout::route_backward";
  check_dim(kOp, "topk_ids", topk_ids, 2, "[tokens, top_k]");
  check_route_forward(logits, topk_ids.sym_size(1).guard_int(__FILE__, __LINE__));
  check_size(kOp, "topk_ids", topk_ids, 0, logits.sym_size(0), "tokens of logits");
  for (const auto& [name, tensor, like] : {std::tuple{"scores", std::optional(scores), logits},
                                           {"grad_weights", grad_weights, topk_ids},
                                           {"grad_scores", grad_scores, logits}})
    TORCH_CHECK_VALUE(!tensor || tensor->sym_sizes() == like.sym_sizes(), kOp, ": ", name, " has shape ",
                      tensor ? tensor->sym_sizes() : like.sym_sizes(), ", expected ", like.sym_sizes());
}

RouterOptions router_options(c10::string_view score, c10::string_view weights, double epsilon, double scale,
                             int64_t groups, int64_t kept_groups, int64_t group_top, c10::string_view group_mask) {
  return {.score = parse_score_function(std::string(score)),
          .weights = parse_router_weights(std::string(weights)),
          .epsilon = epsilon,
          .scale = scale,
          .groups = groups,
          .kept_groups = kept_groups,
          .group_top = group_top,
          .group_mask = parse_group_mask(std::string(group_mask))};
}

RoutingTuple call_route_forward(const at::Tensor& logits, int64_t top_k, const RouterOptions& o,
                                const std::optional<at::Tensor>& selection_bias) {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("turnout::route_forward", "")
          .typed<RoutingTuple(const at::Tensor&, int64_t, c10::string_view, c10::string_view, double, double, int64_t,
                              int64_t, int64_t, c10::string_view, const std::optional<at::Tensor>&)>();
  return op.call(logits, top_k, to_string(o.score), to_string(o.weights), o.epsilon, o.scale, o.groups, o.kept_groups,
                 o.group_top, to_string(o.group_mask), selection_bias);
}

at::Tensor call_route_backward(const std::optional<at::Tensor>& grad_weights,
                               const std::optional<at::Tensor>& grad_scores, const at::Tensor& logits,
                               const at::Tensor& topk_ids, const at::Tensor& scores, const RouterOptions& o) {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("turnout::route_backward", "")
          .typed<at::Tensor(const std::optional<at::Tensor>&, const std::optional<at::Tensor>&, const at::Tensor&,
                            const at::Tensor&, const at::Tensor&, c10::string_view, c10::string_view, double,
                            double)>();
  return op.call(grad_weights, grad_scores, logits, topk_ids, scores, to_string(o.score), to_string(o.weights),
                 o.epsilon, o.scale);
}

}  // namespace turnout::ops
