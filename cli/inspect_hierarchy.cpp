// Two levels of gating: the layer's own gates and slots, looked at one after the other.
#include "inspect_sections.h"

#include <turnout/combine.h>
#include <turnout/hierarchical_moe.h>
#include <turnout/slots.h>

#include <ATen/Context.h>

namespace turnout::cli {
namespace {

HierarchicalMoE make_layer(const ExampleOptions& o) {
  HierarchicalMoEOptions options;
  options.hidden = o.hidden;
  options.ffn = o.ffn;
  options.num_experts = {o.experts, o.inner};
  options.gating.policy_train = o.policy;
  options.gating.threshold_train = o.threshold;
  options.gating.capacity_factor_train = o.factor;
  return HierarchicalMoE(options);
}

Json level_json(const Top2GatingOutput& gated, int64_t num_experts) {
  return {{"experts", num_experts},
          {"group", gated.group_size},
          {"capacity", gated.capacity},
          {"rows", to_json(plan(gated.routing.topk_ids, num_experts).tokens_per_expert())},
          {"dropped", gated.dropped.item<int64_t>()},
          {"loss", gated.loss.item<double>()}};
}

}  // namespace

Json hierarchy_json(const Example& example) {
  const ExampleOptions& o = example.options;
  const at::NoGradGuard no_grad;
  at::manual_seed(o.seed);
  HierarchicalMoE layer = make_layer(o);
  layer->train();
  at::manual_seed(o.seed);
  const HierarchicalMoEOutput whole = layer(example.x);

  // The same once more, one level after the other.
  at::manual_seed(o.seed);
  const Top2GatingOutput outer = layer->gate_outer(example.x);
  const DispatchPlan slots = slot_plan(outer.routing.topk_ids, o.experts, outer.capacity, outer.group_size);
  const at::Tensor slot_x = dispatch(example.x_rows(), slots).view({o.experts, o.batch, outer.capacity, o.hidden});
  const at::Tensor importance =
      slot_importance(outer.routing.topk_weights, slots).view({o.experts, o.batch, outer.capacity});
  const Top2GatingOutput inner = layer->gate_inner(slot_x, importance);
  const int64_t all = o.experts * o.inner;
  const DispatchPlan leaves = plan(nested_ids(inner.routing.topk_ids, o.experts, o.inner), all);

  const auto slots_with = [&](double value) { return importance.eq(value).sum().item<int64_t>(); };
  Json outer_json = level_json(outer, o.experts), inner_json = level_json(inner, o.inner);
  inner_json["rows"] = to_json(leaves.tokens_per_expert().view({o.experts, o.inner}));
  return {{"stages",
           {{{"name", "inputs"}, {"shape", shape_of(example.x)}},
            {{"name", "outer slots"}, {"shape", shape_of(slot_x)}},
            {{"name", "importance of a slot"}, {"shape", shape_of(importance)}},
            {{"name", "inner choices"}, {"shape", shape_of(inner.routing.topk_ids)}},
            {{"name", "output"}, {"shape", shape_of(whole.output)}}}},
          {"second_policy", to_string(o.policy)},
          {"outer", std::move(outer_json)},
          {"first_choice_slots", slots_with(1.0)},
          {"second_choice_slots", slots_with(0.5)},
          {"empty_slots", slots_with(0.0)},
          {"inner", std::move(inner_json)},
          {"tokens_per_expert", to_json(whole.tokens_per_expert)},
          {"dropped", whole.dropped.item<int64_t>()},
          {"loss_coefficient", layer->options.loss_coefficient},
          {"aux_loss", whole.aux_loss.item<double>()}};
}

}  // namespace turnout::cli
