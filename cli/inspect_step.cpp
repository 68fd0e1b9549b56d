// One token from its gate to its output.
#include "inspect_sections.h"

#include <turnout/combine.h>
#include <turnout/experts.h>
#include <turnout/slots.h>

#include <ATen/Functions.h>
#include <c10/util/Exception.h>

namespace turnout::cli {
namespace {

constexpr int64_t kNumbersShown = 4;  // of a vector of width hidden

Json first_numbers(const at::Tensor& vector) {
  return to_json(vector.narrow(0, 0, std::min(kNumbersShown, vector.size(0))));
}

/// What decided whether the second expert stays.
Json policy_json(const ExampleOptions& o, double gate_2, double uniform) {
  Json json = {{"policy", to_string(o.policy)}};
  if (o.policy == SecondPolicy::threshold || o.policy == SecondPolicy::random) json["threshold"] = o.threshold;
  json["gate_2"] = gate_2;
  if (o.policy == SecondPolicy::random) {
    json["uniform"] = uniform;
    json["chance"] = std::min(1.0, gate_2 / std::max(o.threshold, Top2Options().epsilon));
  }
  return json;
}

}  // namespace

Json step_json(const Example& example, int64_t token) {
  const ExampleOptions& o = example.options;
  TORCH_CHECK_VALUE(token >= 0 && token < o.tokens(), "--step is ", token, ", expected a token from 0 to ",
                    o.tokens() - 1);
  const at::NoGradGuard no_grad;
  const Routed routed = route_example(example, o.policy);
  const DispatchPlan grouped = plan(routed.kept.topk_ids, o.experts);
  const DispatchPlan slots = slot_plan(routed.kept.topk_ids, o.experts, routed.capacity, o.group());
  compat::Experts experts = example.experts;
  const at::Tensor y_TD = experts->forward(example.x_rows(), routed.kept.topk_weights, grouped);
  // Every place through its expert by itself: what combine() then weighs.
  const at::Tensor of_slots =
      experts->forward(dispatch(example.x_rows(), slots).view({o.experts, -1, o.hidden})).view({-1, o.hidden});

  Json choices = Json::array();
  double probability_of_chosen = 0;
  for (int64_t k = 0; k < o.top_k; ++k) {
    const auto at_choice = [&](const at::Tensor& t) { return t[token][k]; };
    const auto wanted = at_choice(routed.wanted.topk_ids).item<int64_t>();
    const auto chosen = at_choice(routed.chosen.topk_ids).item<int64_t>();
    const auto kept = at_choice(routed.kept.topk_ids).item<int64_t>();
    const double probability = routed.chosen.scores[token][wanted].item<double>();
    probability_of_chosen += probability;
    Json choice = {{"expert", wanted},
                   {"probability", probability},
                   {"weight", to_json(at_choice(routed.wanted.topk_weights))},
                   {"fate", kept >= 0     ? "kept"
                            : chosen >= 0 ? "dropped"
                                          : "left out"}};
    if (chosen >= 0) choice["place"] = to_json(at_choice(routed.places));
    if (kept >= 0) {
      const auto slot = at_choice(slots.row_of_choice).item<int64_t>();
      choice["row"] = to_json(at_choice(grouped.row_of_choice));
      choice["slot"] = slot;
      choice["output"] = first_numbers(of_slots[slot]);
    }
    choices.push_back(std::move(choice));
  }
  Json json = {{"token", token},
               {"sequence", token / o.sequence},
               {"position", token % o.sequence},
               {"x", first_numbers(example.x_rows()[token])},
               {"more", o.hidden > kNumbersShown},
               {"logits", to_json(example.logits()[token])},
               {"scores", to_json(routed.chosen.scores[token])},
               {"probability_of_chosen", probability_of_chosen},
               {"capacity", routed.capacity},
               {"choices", std::move(choices)},
               {"output", first_numbers(y_TD[token])}};
  if (o.gshard())
    json["policy"] = policy_json(o, routed.wanted.topk_weights[token][1].item<double>(),
                                 example.uniform.view({-1})[token].item<double>());
  return json;
}

}  // namespace turnout::cli
