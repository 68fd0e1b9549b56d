// Router: the public calls. On the CPU a kernel makes scores, choice and weights in one pass over each token; elsewhere
// and in types that it does not serve, they are composed of differentiable calls (router_composed.cpp).
#include <turnout/router_variants.h>

#include "checks.h"
#include "cpu/bridge.h"
#include "kernels/router.h"
#include "router_composed.h"

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

namespace turnout {
namespace {

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

// False also where the scalar reference is forced: it has no router.
bool has_kernel(const at::Tensor& logits, int64_t top_k, const RouterOptions& options) {
  const auto type = logits.scalar_type();
  return logits.device().is_cpu() &&
         (type == at::kFloat || (type == at::kBFloat16 && options.precision == RouterPrecision::float32)) &&
         logits.sym_size(1) <= kernels::kMostExperts && top_k <= kernels::kMostChoices &&
         options.kept_groups <= kernels::kMostChoices && options.group_top <= kernels::kMostChoices &&
         kernels::router_stages(ops::active_implementation()) != nullptr;
}

at::Tensor cast(const at::Tensor& weights, const RouterOptions& options, const at::Tensor& logits) {
  return options.cast_weights ? weights.to(logits.scalar_type()) : weights;
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
  Routing routing;
  if (has_kernel(logits, top_k, options)) {
    const auto bias = selection_bias.defined() ? std::optional(selection_bias) : std::nullopt;
    std::tie(routing.topk_ids, routing.topk_weights, routing.scores) =
        ops::call_route_forward(logits, top_k, options, bias);
  } else {
    routing = ops::route_composed(logits, top_k, options, selection_bias);
  }
  routing.topk_weights = cast(routing.topk_weights, options, logits);
  if (token_mask.defined()) {
    const auto padding_T1 = token_mask.logical_not().unsqueeze(-1);
    routing.topk_ids = routing.topk_ids.masked_fill(padding_T1, -1);
    routing.topk_weights = routing.topk_weights.masked_fill(padding_T1, 0);
  }
  return routing;
}

Routing route_chosen(const at::Tensor& logits, const at::Tensor& topk_ids, const RouterOptions& options,
                     const at::Tensor& token_mask) {
  constexpr const char* kOp = "turnout::route_chosen";
  ops::check_dim(kOp, "logits", logits, 2, "[tokens, experts]");
  ops::check_floating(kOp, "logits", logits);
  ops::check_dim(kOp, "topk_ids", topk_ids, 2, "[tokens, top_k]");
  ops::check_integer(kOp, "topk_ids", topk_ids);
  ops::check_size(kOp, "topk_ids", topk_ids, 0, logits.sym_size(0), "tokens of logits");
  TORCH_CHECK_VALUE(topk_ids.sym_size(1) >= 1, kOp, ": topk_ids has shape ", topk_ids.sym_sizes(),
                    ", expected top_k of at least 1");
  ops::check_device(kOp, "topk_ids", topk_ids, "logits", logits);
  ops::check_weight_options(kOp, options);
  ops::check_token_mask(kOp, token_mask, logits, "logits");
  at::_assert_async(topk_ids.ge(-1).logical_and(topk_ids.lt(at::Scalar(logits.sym_size(1)))).all(),
                    "turnout::route_chosen: topk_ids holds an id that is neither -1 nor one of the experts of logits");
  auto ids_TK = topk_ids.to(at::kLong);
  if (token_mask.defined()) ids_TK = ids_TK.masked_fill(token_mask.logical_not().unsqueeze(-1), -1);
  auto routing = ops::weigh_composed(logits, ids_TK.clamp_min(0), ids_TK.lt(0), options);
  return {ids_TK, cast(routing.topk_weights, options, logits), routing.scores};
}

namespace {

ops::RoutingTuple route_op(const at::Tensor& logits, int64_t top_k, c10::string_view weights, double epsilon,
                           c10::string_view score, double scale, int64_t groups, int64_t kept_groups,
                           int64_t group_top, c10::string_view group_mask, c10::string_view precision,
                           bool cast_weights, const std::optional<at::Tensor>& selection_bias,
                           const std::optional<at::Tensor>& token_mask) {
  auto options = ops::router_options(score, weights, epsilon, scale, groups, kept_groups, group_top, group_mask);
  options.precision = parse_router_precision(std::string(precision));
  options.cast_weights = cast_weights;
  auto routing =
      route(logits, top_k, options, selection_bias.value_or(at::Tensor()), token_mask.value_or(at::Tensor()));
  return {routing.topk_ids, routing.topk_weights, routing.scores};
}

ops::RoutingTuple route_chosen_op(const at::Tensor& logits, const at::Tensor& topk_ids, c10::string_view weights,
                                  double epsilon, c10::string_view score, double scale, c10::string_view precision,
                                  bool cast_weights, const std::optional<at::Tensor>& token_mask) {
  auto options = ops::router_options(score, weights, epsilon, scale);
  options.precision = parse_router_precision(std::string(precision));
  options.cast_weights = cast_weights;
  auto routing = route_chosen(logits, topk_ids, options, token_mask.value_or(at::Tensor()));
  return {routing.topk_ids, routing.topk_weights, routing.scores};
}

TORCH_LIBRARY_IMPL(turnout, CompositeImplicitAutograd, m) {
  m.impl("route", route_op);
  m.impl("route_chosen", route_chosen_op);
}

}  // namespace
}  // namespace turnout
