// Two levels: outer slots become the tokens of the inner level, whose experts run as one bank.
#include <turnout/combine.h>
#include <turnout/hierarchical_moe.h>
#include <turnout/slots.h>

#include "../ops/checks.h"

#include <ATen/ATen.h>

namespace turnout {
namespace {

constexpr const char* kName = "turnout::HierarchicalMoE";

Top2GatingOptions gating_of(const HierarchicalMoEOptions& options, int64_t num_experts, int64_t outer) {
  auto gating = options.gating;
  gating.hidden = options.hidden;
  gating.num_experts = num_experts;
  gating.outer = outer;
  return gating;
}

std::shared_ptr<ExpertsModule> bank_of(const HierarchicalMoEOptions& options) {
  const FeedForwardOptions expert{options.hidden, options.ffn > 0 ? options.ffn : 4 * options.hidden,
                                  options.activation, options.bias};
  return FeedForwardBank(expert, options.num_experts[0] * options.num_experts[1]).ptr();
}

}  // namespace

HierarchicalMoEImpl::HierarchicalMoEImpl(HierarchicalMoEOptions given) : HierarchicalMoEImpl(given, bank_of(given)) {}

HierarchicalMoEImpl::HierarchicalMoEImpl(HierarchicalMoEOptions given, std::shared_ptr<ExpertsModule> given_experts)
    : options(given), experts(std::move(given_experts)) {
  ops::check_at_least(kName, "hidden", options.hidden, 1);
  for (const auto count : options.num_experts) ops::check_at_least(kName, "num_experts of a level", count, 2);
  const auto all = options.num_experts[0] * options.num_experts[1];
  TORCH_CHECK_VALUE(experts->num_experts() == all, kName, ": experts holds ", experts->num_experts(),
                    " experts, expected ", all, " (outer · inner)");
  gate_outer = register_module("gate_outer", Top2Gating(gating_of(options, options.num_experts[0], 1)));
  gate_inner =
      register_module("gate_inner", Top2Gating(gating_of(options, options.num_experts[1], options.num_experts[0])));
  register_module("experts", experts);
}

HierarchicalMoEOutput HierarchicalMoEImpl::forward(const at::Tensor& x) {
  ops::check_dim(kName, "x", x, 3, "[groups, tokens, hidden]");
  const auto [outer, inner] = options.num_experts;
  const auto groups = x.size(0);
  const auto x_TD = x.reshape({-1, x.size(-1)});
  const auto first = gate_outer->forward(x);
  if (x_TD.size(0) == 0) {  // experts on other ranks are called all the same
    const auto none = plan(first.routing.topk_ids, outer * inner);
    const auto y = experts->forward(x_TD, first.routing.topk_weights, none);
    return {y.view(x.sizes()), first.loss * options.loss_coefficient, first.dropped,
            none.tokens_per_expert()};
  }

  const auto slots = slot_plan(first.routing.topk_ids, outer, first.capacity, first.group_size);
  const auto slot_x = dispatch(x_TD, slots);
  const auto importance = slot_importance(first.routing.topk_weights, slots);
  const auto second = gate_inner->forward(slot_x.view({outer, groups, first.capacity, -1}),
                                          importance.view({outer, groups, first.capacity}));
  // The experts of all outer groups are numbered through, so that one plan and one bank serve them.
  const auto ids = nested_ids(second.routing.topk_ids, outer, inner);
  const auto grouped = plan(ids, outer * inner);
  const auto slot_y = experts->forward(slot_x, second.routing.topk_weights, grouped);
  const auto y = combine(slot_y, first.routing.topk_weights, slots);
  return {y.view(x.sizes()), (first.loss + second.loss) * options.loss_coefficient, first.dropped + second.dropped,
          grouped.tokens_per_expert()};
}

}  // namespace turnout
