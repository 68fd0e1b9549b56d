// One token through a layer of a checkpoint, from its gate to its output.
#include "inspect_layer.h"
#include "inspect_sections.h"

#include <turnout/combine.h>

#include <ATen/Functions.h>

namespace turnout::cli {
namespace {

/// What capacity makes of the choices, told by the layer's own options. Places that were drawn at random stay unknown.
void limit(Passage& passage, const MoEOptions& o, int64_t sequence) {
  if (o.capacity.dropless()) return;
  Routed& routed = passage.routed;
  if (o.capacity.per_sequence) passage.group = sequence;
  routed.capacity = expert_capacity(o.capacity, passage.group, o.top_k, o.num_experts);
  if (o.capacity.order == DropOrder::random) return;
  const bool by_score = o.capacity.order == DropOrder::score;
  routed.places = queue_positions(routed.chosen.topk_ids, o.num_experts, passage.group, o.capacity.order,
                                  by_score ? routed.chosen.topk_weights : at::Tensor());
}

}  // namespace

Json layer_step_json(MoE moe, const at::Tensor& x, int64_t token) {
  const at::NoGradGuard no_grad;
  const MoEOptions& o = moe->options;
  const MoEOutput out = moe->forward(x);
  const Routing chosen = route(out.logits, o.top_k, o.router, moe->selection_bias);
  Passage passage{.x = x.reshape({-1, x.size(-1)}),
                  .logits = out.logits,
                  .routed = {.wanted = chosen, .chosen = chosen, .kept = out.routing},
                  .group = out.logits.size(0),
                  .experts = [bank = moe->experts](const at::Tensor& rows, const at::Tensor& topk_weights,
                                                   const DispatchPlan& plan) {
                    return bank->forward(rows, topk_weights, plan);
                  }};
  limit(passage, o, x.size(-2));
  Json json = passage_json(passage, token);
  json["weights"] = weights_rule(o.router);
  if (moe->selection_bias.defined())
    json["chosen_by"] = o.router.score == ScoreFunction::sigmoid ? "sigmoid + bias" : "probability + bias";
  if (!moe->shared) return json;
  const at::Tensor row = passage.x.narrow(0, token, 1);
  json["shared"] = {{"output", first_numbers(moe->shared->forward(row)[0])},
                    {"gate", moe->shared_gate ? moe->shared_gate->forward(row).sigmoid().item<double>() : 1.0}};
  json["output"] = first_numbers(out.output.reshape(passage.x.sizes())[token]);
  return json;
}

}  // namespace turnout::cli
