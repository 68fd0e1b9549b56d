// What the router's registrations share: the words of its ops, and the composition of differentiable calls.
#pragma once

#include <turnout/router.h>

#include <optional>
#include <tuple>

namespace turnout::ops {

using RoutingTuple = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

/// Scores, choice and weights for any device and type. Without the cast of the weights and without a token mask.
Routing route_composed(const at::Tensor& logits, int64_t top_k, const RouterOptions& options,
                       const at::Tensor& selection_bias);

/// Scores and weights for ids that are chosen already, each one of the experts.
/// @param absent choices that are not sent, bool [tokens, top_k], or undefined; they have no share in a sum, weight 0
Routing weigh_composed(const at::Tensor& logits, const at::Tensor& topk_ids, const at::Tensor& absent,
                       const RouterOptions& options);

/// The switches that make weights of scores. @throws c10::ValueError naming the one that is impossible
void check_weight_options(const char* op, const RouterOptions& options);

/// @throws c10::ValueError or c10::TypeError for shapes and types that the kernel's ops do not take
void check_route_forward(const at::Tensor& logits, int64_t top_k);
void check_route_backward(const std::optional<at::Tensor>& grad_weights, const std::optional<at::Tensor>& grad_scores,
                          const at::Tensor& logits, const at::Tensor& topk_ids, const at::Tensor& scores);

/// The options that the ops route_forward and route_backward take as words and numbers.
RouterOptions router_options(c10::string_view score, c10::string_view weights, double epsilon, double scale,
                             int64_t groups = 1, int64_t kept_groups = 1, int64_t group_top = 1,
                             c10::string_view group_mask = "minus_infinity");

/// The ops, through the dispatcher.
RoutingTuple call_route_forward(const at::Tensor& logits, int64_t top_k, const RouterOptions& options,
                                const std::optional<at::Tensor>& selection_bias);
at::Tensor call_route_backward(const std::optional<at::Tensor>& grad_weights,
                               const std::optional<at::Tensor>& grad_scores, const at::Tensor& logits,
                               const at::Tensor& topk_ids, const at::Tensor& scores, const RouterOptions& options);

}  // namespace turnout::ops
