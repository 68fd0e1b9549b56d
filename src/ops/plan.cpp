// Plan and capacity: the public calls, composed of the ops plan and queue_positions.
#include <turnout/plan.h>

#include "checks.h"
#include "dispatcher.h"
#include "names.h"

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <cmath>

namespace turnout {
namespace {

constexpr ops::Names<DropOrder, 4> kDropOrders{{{DropOrder::choice, "choice"},
                                                {DropOrder::position, "position"},
                                                {DropOrder::score, "score"},
                                                {DropOrder::random, "random"}}};

constexpr ops::Names<CapacityRounding, 3> kRoundings{{{CapacityRounding::ceil, "ceil"},
                                                      {CapacityRounding::floor, "floor"},
                                                      {CapacityRounding::share, "share"}}};

std::tuple<at::Tensor, at::Tensor, at::Tensor> limit_capacity_symint(const at::Tensor& topk_ids,
                                                                     const at::Tensor& topk_weights,
                                                                     int64_t num_experts, c10::SymInt capacity,
                                                                     c10::SymInt group_size,
                                                                     c10::string_view order, bool renormalize,
                                                                     std::optional<at::Tensor> priority) {
  constexpr const char* kOp = "turnout::limit_capacity";
  ops::check_dim(kOp, "topk_ids", topk_ids, 2, "[tokens, top_k]");
  ops::check_floating(kOp, "topk_weights", topk_weights);
  TORCH_CHECK_VALUE(topk_weights.sym_sizes() == topk_ids.sym_sizes(), kOp, ": topk_weights has shape ",
                    topk_weights.sym_sizes(), ", expected ", topk_ids.sym_sizes(), " as topk_ids has");
  ops::check_device(kOp, "topk_weights", topk_weights, "topk_ids", topk_ids);
  TORCH_CHECK_VALUE(capacity >= 1, kOp, ": capacity is ", capacity, ", expected at least 1");
  if (priority) priority = priority->detach();
  if (!priority && order == "score") priority = topk_weights.detach();
  if (!priority && order == "random") priority = at::rand_like(topk_weights.detach());
  const auto positions = ops::call_queue_positions(topk_ids, num_experts, group_size, order, priority);
  const auto kept = positions.ge(0).logical_and(positions.lt(at::Scalar(capacity)));
  auto weights = at::where(kept, topk_weights, at::zeros({}, topk_weights.options()));
  if (renormalize) {
    const auto sum = weights.sum(-1, /*keepdim=*/true);
    weights = weights / at::where(sum.eq(0), at::ones({}, sum.options()), sum);
  }
  const auto dropped = topk_ids.ge(0).logical_and(kept.logical_not()).sum();
  return {at::where(kept, topk_ids, at::full({}, -1, topk_ids.options())), weights, dropped};
}

// The places are a number: a compiled graph holds for one group size, and is made anew for another.
std::tuple<at::Tensor, at::Tensor, at::Tensor> apply_capacity_symint(const at::Tensor& topk_ids,
                                                                     const at::Tensor& topk_weights,
                                                                     int64_t num_experts, c10::SymInt group_size,
                                                                     const CapacityOptions& options) {
  ops::check_dim("turnout::apply_capacity", "topk_ids", topk_ids, 2, "[tokens, top_k]");
  const auto top_k = topk_ids.sym_size(1).guard_int(__FILE__, __LINE__);
  expert_capacity(options, 0, top_k, num_experts);  // throws for impossible options
  if (options.dropless() || topk_ids.sym_size(0) == 0)
    return {topk_ids.clone(), topk_weights.clone(), at::zeros({}, topk_ids.options().dtype(at::kLong))};
  const auto places = expert_capacity(options, group_size.guard_int(__FILE__, __LINE__), top_k, num_experts);
  return limit_capacity_symint(topk_ids, topk_weights, num_experts, places, std::move(group_size),
                               to_string(options.order), options.renormalize, std::nullopt);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> apply_capacity_op(
    const at::Tensor& topk_ids, const at::Tensor& topk_weights, int64_t num_experts, c10::SymInt group_size,
    double factor, int64_t fixed, int64_t minimum, c10::string_view rounding, bool count_choices,
    c10::string_view order, bool renormalize) {
  CapacityOptions options;
  options.factor = factor;
  options.fixed = fixed;
  options.minimum = minimum;
  options.rounding = parse_capacity_rounding(std::string(rounding));
  options.count_choices = count_choices;
  options.order = parse_drop_order(std::string(order));
  options.renormalize = renormalize;
  return apply_capacity_symint(topk_ids, topk_weights, num_experts, std::move(group_size), options);
}

// The order of the operations is the sources': it decides where a product falls on a whole number.
double places_of_factor(const CapacityOptions& options, double tokens, double choices, double experts) {
  switch (options.rounding) {
    case CapacityRounding::ceil:
      return std::ceil(tokens * choices / experts * options.factor);
    case CapacityRounding::floor:
      return std::floor(tokens * choices * options.factor / experts);
    case CapacityRounding::share:
      return choices * std::floor(options.factor * std::ceil(tokens / experts));
  }
  TORCH_INTERNAL_ASSERT(false, "a rounding without a rule");
}

int64_t expert_capacity_op(double factor, int64_t fixed, int64_t minimum, c10::string_view rounding,
                           bool count_choices, int64_t group_tokens, int64_t top_k, int64_t num_experts) {
  CapacityOptions options;
  options.factor = factor;
  options.fixed = fixed;
  options.minimum = minimum;
  options.rounding = parse_capacity_rounding(std::string(rounding));
  options.count_choices = count_choices;
  return expert_capacity(options, group_tokens, top_k, num_experts);
}

}  // namespace

at::Tensor ops::call_queue_positions(const at::Tensor& topk_ids, int64_t num_experts, c10::SymInt group_size,
                                     c10::string_view order, const std::optional<at::Tensor>& priority) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("turnout::queue_positions", "")
                             .typed<at::Tensor(const at::Tensor&, int64_t, c10::SymInt, c10::string_view,
                                               const std::optional<at::Tensor>&)>();
  return op.call(topk_ids, num_experts, std::move(group_size), order, priority);
}

DropOrder parse_drop_order(const std::string& name) { return ops::parse_name("drop order", kDropOrders, name); }
CapacityRounding parse_capacity_rounding(const std::string& name) {
  return ops::parse_name("capacity rounding", kRoundings, name);
}
std::string to_string(CapacityRounding rounding) { return ops::name_of(kRoundings, rounding); }
std::string to_string(DropOrder order) { return ops::name_of(kDropOrders, order); }

at::Tensor DispatchPlan::tokens_per_expert() const { return expert_offsets.diff(); }

DispatchPlan plan(const at::Tensor& topk_ids, int64_t num_experts) {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("turnout::plan", "")
          .typed<std::tuple<at::Tensor, at::Tensor, at::Tensor>(const at::Tensor&, int64_t)>();
  auto [expert_offsets, token_of_row, row_of_choice] = op.call(topk_ids, num_experts);
  return {expert_offsets, token_of_row, row_of_choice};
}

int64_t expert_capacity(const CapacityOptions& options, int64_t group_tokens, int64_t top_k, int64_t num_experts) {
  constexpr const char* kOp = "turnout::expert_capacity";
  TORCH_CHECK_VALUE(std::isfinite(options.factor) && options.factor >= 0, kOp, ": factor is ", options.factor,
                    ", expected a finite number of at least 0");
  ops::check_at_least(kOp, "fixed", options.fixed, 0);
  ops::check_at_least(kOp, "minimum", options.minimum, 0);
  ops::check_at_least(kOp, "group_tokens", group_tokens, 0);
  ops::check_at_least(kOp, "top_k", top_k, 1);
  ops::check_at_least(kOp, "num_experts", num_experts, 1);
  if (options.fixed > 0) return options.fixed;
  if (options.dropless()) return group_tokens;
  const double rounded = places_of_factor(options, static_cast<double>(group_tokens),
                                          options.count_choices ? static_cast<double>(top_k) : 1.0,
                                          static_cast<double>(num_experts));
  const bool all = rounded >= static_cast<double>(group_tokens);  // an expert takes a token once
  return std::max({all ? group_tokens : static_cast<int64_t>(rounded), options.minimum, int64_t{1}});
}

at::Tensor queue_positions(const at::Tensor& topk_ids, int64_t num_experts, int64_t group_size, DropOrder order,
                           const at::Tensor& priority) {
  return ops::call_queue_positions(topk_ids, num_experts, group_size, to_string(order),
                                priority.defined() ? std::optional(priority) : std::nullopt);
}

Capped limit_capacity(const Routing& routing, int64_t num_experts, int64_t capacity, int64_t group_size,
                      DropOrder order, bool renormalize, const at::Tensor& priority) {
  auto [ids, weights, dropped] =
      limit_capacity_symint(routing.topk_ids, routing.topk_weights, num_experts, capacity, group_size,
                            to_string(order), renormalize, priority.defined() ? std::optional(priority) : std::nullopt);
  return {{ids, weights, routing.scores}, dropped};
}

Capped apply_capacity(const Routing& routing, int64_t num_experts, int64_t group_size,
                      const CapacityOptions& options) {
  ops::check_dim("turnout::apply_capacity", "topk_ids", routing.topk_ids, 2, "[tokens, top_k]");
  if (options.dropless() || routing.topk_ids.size(0) == 0)
    return {routing, at::zeros({}, routing.topk_ids.options().dtype(at::kLong))};
  auto [ids, weights, dropped] =
      apply_capacity_symint(routing.topk_ids, routing.topk_weights, num_experts, group_size, options);
  return {{ids, weights, routing.scores}, dropped};
}

namespace {
TORCH_LIBRARY_IMPL(turnout, CompositeImplicitAutograd, m) {
  m.impl("apply_capacity", apply_capacity_op);
  m.impl("limit_capacity", limit_capacity_symint);
  m.impl("expert_capacity", expert_capacity_op);
}
}  // namespace
}  // namespace turnout
