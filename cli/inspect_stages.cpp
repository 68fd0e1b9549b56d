// Shapes and tokens: the stages in the order in which data passes them.
#include "inspect_sections.h"

#include <turnout/combine.h>
#include <turnout/slots.h>

#include <ATen/Functions.h>

namespace turnout::cli {
namespace {

/// The stages' tensors, computed once by the grouped plan and once by the description's slots.
struct Passed {
  Routed routed;
  DispatchPlan grouped, slots;
  at::Tensor expert_inputs, expert_outputs, output, output_of_slots;
};

Passed pass(const Example& example) {
  const ExampleOptions& o = example.options;
  const at::NoGradGuard no_grad;
  Passed p;
  p.routed = route_example(example, o.policy);
  const Routing& kept = p.routed.kept;
  p.grouped = plan(kept.topk_ids, o.experts);
  p.output = compat::Experts(example.experts)->forward(example.x_rows(), kept.topk_weights, p.grouped);
  p.slots = slot_plan(kept.topk_ids, o.experts, p.routed.capacity, o.group());
  p.expert_inputs = dispatch(example.x_rows(), p.slots);
  p.expert_outputs = compat::Experts(example.experts)->forward(p.expert_inputs.view({o.experts, -1, o.hidden}));
  p.output_of_slots = combine(p.expert_outputs.view({-1, o.hidden}), kept.topk_weights, p.slots);
  return p;
}

Json stage(const char* described, Json described_shape, const char* here, Json here_shape) {
  return {{"described", described},
          {"described_shape", std::move(described_shape)},
          {"here", here},
          {"shape", std::move(here_shape)}};
}

const char* fate_of(int64_t wanted, int64_t chosen, int64_t kept) {
  return kept >= 0 ? "kept" : chosen >= 0 ? "dropped" : wanted >= 0 ? "left out" : "none";
}

}  // namespace

Json options_json(const Example& example) {
  const ExampleOptions& o = example.options;
  Json json = {{"batch", o.batch},     {"sequence", o.sequence}, {"hidden", o.hidden},
               {"experts", o.experts}, {"top_k", o.top_k},       {"router", o.router}};
  if (o.gshard()) {
    json["second_policy"] = to_string(o.policy);
    json["threshold"] = o.threshold;
  }
  json["capacity_factor"] = o.factor;
  json["minimum_capacity"] = o.minimum;
  json["drop_order"] = to_string(o.order);
  json["seed"] = o.seed;
  return json;
}

Json stages_json(const Example& example) {
  const ExampleOptions& o = example.options;
  const Passed p = pass(example);
  const int64_t B = o.batch, N = o.sequence, E = o.experts, C = p.routed.capacity;
  const int64_t groups = o.tokens() / o.group();
  const auto shape = [](const at::Tensor& tensor) { return shape_of(tensor); };
  const auto dense_shape = Json{B, N, E, C};
  Json list = Json::array();
  list.push_back(stage("inputs", shape(example.x), "x", shape(example.x_rows())));
  list.push_back(stage("raw_gates", Json{B, N, E}, "Routing.scores", shape(p.routed.chosen.scores)));
  if (o.top_k <= 2) {
    for (int64_t k = 0; k < o.top_k; ++k)
      list.push_back(stage(k == 0 ? "mask_1" : "mask_2", Json{B, N, E},
                           k == 0 ? "Routing.topk_ids[:, 0]" : "Routing.topk_ids[:, 1]",
                           shape(p.routed.chosen.topk_ids.select(1, k))));
    list.push_back(stage(o.top_k == 2 ? "gate_1, gate_2" : "gate_1", Json{B, N}, "Routing.topk_weights",
                         shape(p.routed.chosen.topk_weights)));
  } else {
    list.push_back(stage("masks", Json{B, N, E}, "Routing.topk_ids", shape(p.routed.chosen.topk_ids)));
    list.push_back(stage("gates", Json{B, N}, "Routing.topk_weights", shape(p.routed.chosen.topk_weights)));
  }
  list.push_back(stage("expert_capacity", C, "expert_capacity()", C));
  list.push_back(stage("dispatch_tensor", dense_shape, "DispatchPlan.token_of_row", shape(p.grouped.token_of_row)));
  list.push_back(stage("combine_tensor", dense_shape, "DispatchPlan.row_of_choice", shape(p.grouped.row_of_choice)));
  list.push_back(
      stage("expert_inputs", Json{E, groups, C, o.hidden}, "dispatch(x, slot_plan)", shape(p.expert_inputs)));
  list.push_back(stage("expert_outputs", Json{E, groups, C, o.hidden}, "(experts read x in place)", nullptr));
  list.push_back(stage("output", shape(example.x), "experts(x, weights, plan)", shape(p.output)));
  list.push_back(stage("loss", Json::array(), "balance loss", Json::array()));
  const auto live = p.grouped.expert_offsets[-1].item<int64_t>();
  return {{"stages", std::move(list)},
          {"capacity", C},
          {"dispatch_tensor_numbers", B * N * E * C},
          {"dispatch_tensor_ones", live},
          {"plan_numbers", p.grouped.token_of_row.numel() + p.grouped.row_of_choice.numel()},
          {"rows", live},
          {"slots", p.slots.token_of_row.size(0)},
          {"loss", p.routed.loss},
          {"largest_difference_of_both_ways", (p.output - p.output_of_slots).abs().max().item<double>()},
          {"expert_offsets", to_json(p.grouped.expert_offsets)},
          {"token_of_row", to_json(p.grouped.token_of_row)},
          {"row_of_choice", to_json(p.grouped.row_of_choice)}};
}

Json tokens_json(const Example& example) {
  const ExampleOptions& o = example.options;
  const Routed routed = route_example(example, o.policy);
  Json list = Json::array();
  for (int64_t t = 0; t < o.tokens(); ++t) {
    Json choices = Json::array();
    for (int64_t k = 0; k < o.top_k; ++k) {
      const auto id_in = [&](const Routing& routing) { return routing.topk_ids[t][k].item<int64_t>(); };
      const int64_t wanted = id_in(routed.wanted), chosen = id_in(routed.chosen), kept = id_in(routed.kept);
      choices.push_back({{"expert", wanted},
                         {"weight", to_json(routed.wanted.topk_weights[t][k])},
                         {"place", to_json(routed.places[t][k])},
                         {"fate", fate_of(wanted, chosen, kept)}});
    }
    list.push_back({{"token", t},
                    {"sequence", t / o.sequence},
                    {"position", t % o.sequence},
                    {"scores", to_json(routed.chosen.scores[t])},
                    {"choices", std::move(choices)}});
  }
  return list;
}

}  // namespace turnout::cli
