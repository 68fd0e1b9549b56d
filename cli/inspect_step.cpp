// One token from its gate to its output.
#include "inspect_sections.h"

#include <ATen/Functions.h>
#include <c10/util/Exception.h>

#include <fmt/format.h>

namespace turnout::cli {
namespace {

constexpr int64_t kNumbersShown = 4;  // of a vector of width hidden

/// What decided whether the second expert stays.
Json policy_json(const ExampleOptions& o, double gate_2, double uniform) {
  Json json = {{"policy", to_string(o.policy)}};
  if (o.policy == SecondPolicy::threshold) json["threshold"] = o.threshold;
  json["gate_2"] = gate_2;
  if (o.policy == SecondPolicy::random) {
    json["uniform"] = uniform;
    json["threshold"] = std::max(o.threshold, Top2Options().epsilon);
    json["chance"] = std::min(1.0, gate_2 / json["threshold"].get<double>());
  }
  return json;
}

/// A choice by its fate: only what was kept has a weight in the sum, a row and an output.
Json choice_json(const Passage& passage, const DispatchPlan& grouped, int64_t token, int64_t k) {
  const Routed& routed = passage.routed;
  const auto at_choice = [&](const at::Tensor& t) { return t[token][k]; };
  const auto wanted = at_choice(routed.wanted.topk_ids).item<int64_t>();
  const auto chosen = at_choice(routed.chosen.topk_ids).item<int64_t>();
  const auto kept = at_choice(routed.kept.topk_ids).item<int64_t>();
  Json choice = {{"expert", wanted},
                 {"probability", to_json(routed.chosen.scores[token][wanted])},
                 {"weight", to_json(at_choice((kept >= 0 ? routed.kept : routed.wanted).topk_weights))},
                 {"fate", kept >= 0     ? "kept"
                          : chosen >= 0 ? "dropped"
                                        : "left out"}};
  if (chosen >= 0 && routed.places.defined()) choice["place"] = to_json(at_choice(routed.places));
  if (kept < 0) return choice;
  const int64_t experts = grouped.num_experts(), groups = passage.x.size(0) / passage.group;
  if (routed.places.defined())
    choice["slot"] = (kept * groups + token / passage.group) * routed.capacity + choice["place"].get<int64_t>();
  choice["row"] = to_json(at_choice(grouped.row_of_choice));
  const auto alone = plan(at::full({1, 1}, kept, at::kLong), experts);
  const auto row = passage.x.narrow(0, token, 1);
  choice["output"] = first_numbers(passage.experts(row, at::ones({1, 1}, row.options()), alone)[0]);
  return choice;
}

}  // namespace

Json first_numbers(const at::Tensor& vector) {
  return to_json(vector.narrow(0, 0, std::min(kNumbersShown, vector.size(0))));
}

void check_step(int64_t token, int64_t tokens) {
  TORCH_CHECK_VALUE(token >= 0 && token < tokens, "--step is ", token, ", expected a token from 0 to ", tokens - 1);
}

std::string weights_rule(const RouterOptions& options) {
  // Probabilities sum to 1 over the experts, which sigmoids do not.
  const std::string scores = options.score == ScoreFunction::sigmoid ? "sigmoids of the logits" : "probabilities";
  std::string rule = options.weights == RouterWeights::normalized    ? "the " + scores + ", divided by their sum"
                     : options.weights == RouterWeights::probability ? "the " + scores + " themselves"
                                                                     : "softmax over the logits of the chosen";
  if (options.scale != 1.0) rule += fmt::format(", times {:g}", options.scale);
  return rule;
}

Json passage_json(const Passage& passage, int64_t token) {
  const at::NoGradGuard no_grad;
  const Routed& routed = passage.routed;
  const DispatchPlan grouped = plan(routed.kept.topk_ids, routed.chosen.scores.size(1));
  Json choices = Json::array();
  double probability_of_chosen = 0;
  for (int64_t k = 0; k < routed.wanted.topk_ids.size(1); ++k) {
    choices.push_back(choice_json(passage, grouped, token, k));
    probability_of_chosen += choices.back()["probability"].get<double>();
  }
  const auto of_token = [&](const at::Tensor& t) { return t.narrow(0, token, 1); };
  const at::Tensor y = passage.experts(of_token(passage.x), of_token(routed.kept.topk_weights),
                                       plan(of_token(routed.kept.topk_ids), grouped.num_experts()));
  return {{"x", first_numbers(passage.x[token])},
          {"more", passage.x.size(1) > kNumbersShown},
          {"logits", to_json(passage.logits[token])},
          {"scores", to_json(routed.chosen.scores[token])},
          {"probability_of_chosen", probability_of_chosen},
          {"capacity", routed.capacity},
          {"choices", std::move(choices)},
          {"output", first_numbers(y[0])}};
}

Json step_json(const Example& example, int64_t token) {
  const ExampleOptions& o = example.options;
  check_step(token, o.tokens());
  const Passage passage{.x = example.x_rows(),
                        .logits = example.logits(),
                        .routed = route_example(example, o.policy),
                        .group = o.group(),
                        .experts = [bank = example.experts](const at::Tensor& x, const at::Tensor& topk_weights,
                                                            const DispatchPlan& plan) mutable {
                          return bank->forward(x, topk_weights, plan);
                        }};
  Json json = {{"token", token}, {"sequence", token / o.sequence}, {"position", token % o.sequence}};
  json.update(passage_json(passage, token));
  if (o.gshard())
    json["policy"] = policy_json(o, passage.routed.wanted.topk_weights[token][1].item<double>(),
                                 example.uniform.view({-1})[token].item<double>());
  else
    json["weights"] = weights_rule(router_preset(o.router));
  return json;
}

}  // namespace turnout::cli
