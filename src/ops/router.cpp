// Router: scores, choice and weights composed of differentiable calls, so that one text serves every device.
//
// Legend: T tokens, E experts, K top_k, G groups.
#include <turnout/router.h>

#include "checks.h"

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <limits>

namespace turnout {
namespace {

// Keeps the division of sigmoids by their sum finite where all have underflowed (Megatron-LM, DeepSeek-V3).
constexpr double kSigmoidEpsilon = 1e-20;

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

void check_arguments(const at::Tensor& logits, int64_t top_k, const RouterOptions& options,
                     const at::Tensor& selection_bias, const at::Tensor& token_mask) {
  constexpr const char* kOp = "turnout::route";
  ops::check_dim(kOp, "logits", logits, 2, "[tokens, experts]");
  ops::check_floating(kOp, "logits", logits);
  check(options, top_k, logits.sym_size(1).guard_int(__FILE__, __LINE__));  // experts: a property of the layer
  if (selection_bias.defined()) {
    ops::check_dim(kOp, "selection_bias", selection_bias, 1, "[experts]");
    ops::check_floating(kOp, "selection_bias", selection_bias);
    ops::check_size(kOp, "selection_bias", selection_bias, 0, logits.sym_size(1), "experts");
    ops::check_device(kOp, "selection_bias", selection_bias, "logits", logits);
  }
  ops::check_token_mask(kOp, token_mask, logits, "logits");
}

}  // namespace

at::Tensor topk(const at::Tensor& scores, int64_t top_k) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("turnout::topk", "")
                             .typed<at::Tensor(const at::Tensor&, int64_t)>();
  return op.call(scores, top_k);
}

Routing route(const at::Tensor& logits, int64_t top_k, const RouterOptions& options, const at::Tensor& selection_bias,
              const at::Tensor& token_mask) {
  check_arguments(logits, top_k, options, selection_bias, token_mask);
  const auto logits_TE =
      options.precision == RouterPrecision::logits ? logits : logits.to(ops::score_type(logits));
  const bool sigmoid = options.score == ScoreFunction::sigmoid;
  const auto scores_TE = sigmoid ? logits_TE.sigmoid() : logits_TE.softmax(-1);

  auto choice_TE = logits_TE.detach();
  if (selection_bias.defined() || options.groups > 1) choice_TE = scores_TE.detach().to(ops::score_type(logits));
  if (selection_bias.defined()) choice_TE = choice_TE + selection_bias.detach();
  if (options.groups > 1) choice_TE = limit_groups(choice_TE, options);
  auto ids_TK = turnout::topk(choice_TE, top_k);

  at::Tensor weights_TK;
  if (options.weights == RouterWeights::softmax_of_topk) {
    weights_TK = logits_TE.gather(-1, ids_TK).softmax(-1);
  } else {
    weights_TK = scores_TE.gather(-1, ids_TK);
    if (options.weights == RouterWeights::normalized) {
      auto sum_T1 = weights_TK.sum(-1, /*keepdim=*/true);
      if (options.epsilon > 0) sum_T1 = sum_T1 + options.epsilon;
      weights_TK = weights_TK / sum_T1;
    }
  }
  if (options.scale != 1.0) weights_TK = weights_TK * options.scale;
  if (options.cast_weights) weights_TK = weights_TK.to(logits.scalar_type());
  if (token_mask.defined()) {
    const auto padding_T1 = token_mask.logical_not().unsqueeze(-1);
    ids_TK = ids_TK.masked_fill(padding_T1, -1);
    weights_TK = weights_TK.masked_fill(padding_T1, 0);
  }
  if (!sigmoid) return {ids_TK, weights_TK, scores_TE};
  return {ids_TK, weights_TK, scores_TE / (scores_TE.sum(-1, /*keepdim=*/true) + kSigmoidEpsilon)};
}

namespace {

std::tuple<at::Tensor, at::Tensor, at::Tensor> route_op(
    const at::Tensor& logits, int64_t top_k, c10::string_view weights, double epsilon, c10::string_view score,
    double scale, int64_t groups, int64_t kept_groups, int64_t group_top, c10::string_view group_mask,
    c10::string_view precision, bool cast_weights, const std::optional<at::Tensor>& selection_bias,
    const std::optional<at::Tensor>& token_mask) {
  const RouterOptions options{.score = parse_score_function(std::string(score)),
                              .weights = parse_router_weights(std::string(weights)),
                              .epsilon = epsilon,
                              .scale = scale,
                              .groups = groups,
                              .kept_groups = kept_groups,
                              .group_top = group_top,
                              .group_mask = parse_group_mask(std::string(group_mask)),
                              .precision = parse_router_precision(std::string(precision)),
                              .cast_weights = cast_weights};
  auto routing = route(logits, top_k, options, selection_bias.value_or(at::Tensor()), token_mask.value_or(at::Tensor()));
  return {routing.topk_ids, routing.topk_weights, routing.scores};
}

TORCH_LIBRARY_IMPL(turnout, CompositeImplicitAutograd, m) { m.impl("route", route_op); }

}  // namespace
}  // namespace turnout
