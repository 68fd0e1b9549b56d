// The same gates under other rules: policies, places, and load that collapses.
#include "inspect_sections.h"

#include <turnout/balance.h>
#include <turnout/statistics.h>

#include <ATen/Functions.h>

#include <algorithm>

namespace turnout::cli {
namespace {

constexpr double kConfidence = 8.0;  // logit of the expert that a token of collapse_json() wants
constexpr int64_t kMostSteps = 8;

/// Logits where the first `moved` tokens of the order want expert 0 and each other token its own in turn.
at::Tensor collapsing_logits(int64_t tokens, int64_t experts, double share) {
  const auto token_T = at::arange(tokens, at::kLong);
  const auto own_T = token_T.remainder(experts);
  // Tokens move in an order that takes all experts alike: by their turn number.
  const auto turn_T = token_T.div(experts, "floor");
  const double turns = static_cast<double>((tokens + experts - 1) / experts);
  const auto moved_T = turn_T.to(at::kDouble).lt(share * turns - 1e-9);
  const auto first_T = own_T.masked_fill(moved_T, 0);
  const auto second_T = (own_T + 1).remainder(experts);
  const auto logits = at::zeros({tokens, experts}, at::kDouble);
  logits.scatter_(1, second_T.unsqueeze(1), kConfidence / 2);
  return logits.scatter_(1, first_T.unsqueeze(1), kConfidence);
}

double value(const at::Tensor& scalar) { return scalar.item<double>(); }

}  // namespace

Json policies_json(const Example& example) {
  const ExampleOptions& o = example.options;
  Json list = Json::array();
  for (const SecondPolicy policy :
       {SecondPolicy::all, SecondPolicy::none, SecondPolicy::threshold, SecondPolicy::random}) {
    const Routed routed = route_example(example, policy);
    const DispatchPlan chosen = plan(routed.chosen.topk_ids, o.experts), kept = plan(routed.kept.topk_ids, o.experts);
    list.push_back({{"policy", to_string(policy)},
                    {"second_experts", routed.chosen.topk_ids.select(1, 1).ge(0).sum().item<int64_t>()},
                    {"wanted", to_json(chosen.tokens_per_expert())},
                    {"rows", to_json(kept.tokens_per_expert())},
                    {"dropped", routed.dropped},
                    {"loss", routed.loss}});
  }
  return list;
}

Json capacity_sweep(const Routing& chosen, int64_t num_experts, int64_t group_size, const CapacityOptions& rules,
                    const std::vector<double>& factors, const at::Tensor& priority) {
  const int64_t tokens = chosen.topk_ids.size(0), groups = tokens / group_size;
  const auto choices = chosen.topk_ids.ge(0).sum().item<int64_t>();
  Json list = Json::array();
  for (const double factor : factors) {
    CapacityOptions capacity = rules;
    capacity.factor = factor;
    const auto places_by = [&] { return expert_capacity(capacity, group_size, chosen.topk_ids.size(1), num_experts); };
    const int64_t places = places_by();
    capacity.minimum = 0;
    const int64_t places_of_factor = places_by();
    const Capped capped = limit_capacity(chosen, num_experts, places, group_size, rules.order,
                                         /*renormalize=*/false, priority);
    const auto dropped = capped.dropped.item<int64_t>();
    const int64_t slots = num_experts * groups * places, idle = slots - (choices - dropped);
    const auto share = [](int64_t part, int64_t whole) {
      return whole > 0 ? static_cast<double>(part) / static_cast<double>(whole) : 0.0;
    };
    list.push_back({{"factor", factor},
                    {"places", places},
                    {"places_of_factor", places_of_factor},
                    {"choices", choices},
                    {"dropped", dropped},
                    {"dropped_share", share(dropped, choices)},
                    {"tokens_without_expert", capped.routing.topk_ids.lt(0).all(1).sum().item<int64_t>()},
                    {"slots", slots},
                    {"idle", idle},
                    {"idle_share", share(idle, slots)}});
  }
  return list;
}

Json capacity_json(const Example& example, const std::vector<double>& factors) {
  const ExampleOptions& o = example.options;
  const Routed routed = route_example(example, o.policy);
  return capacity_sweep(routed.chosen, o.experts, o.group(), capacity_of(o), factors, routed.priority);
}

Json collapse_json(const Example& example) {
  const ExampleOptions& o = example.options;
  const int64_t tokens = o.tokens();
  const int64_t places = expert_capacity(capacity_of(o), o.group(), o.top_k, o.experts);
  Json list = Json::array();
  // Tokens move by whole turns of the experts: fewer turns, fewer steps.
  const int64_t steps = std::clamp<int64_t>(tokens / o.experts, 1, kMostSteps);
  for (int64_t step = 0; step <= steps; ++step) {
    const double share = static_cast<double>(step) / static_cast<double>(steps);
    const auto logits = collapsing_logits(tokens, o.experts, share);
    const Top2Routing top2 = route_top2(logits.unsqueeze(0), {.policy = SecondPolicy::none});
    const Routing first{top2.routing.topk_ids[0], top2.routing.topk_weights[0], top2.routing.scores[0]};
    const Capped capped = limit_capacity(first, o.experts, places, o.group());
    const DispatchPlan wanted = plan(first.topk_ids, o.experts);
    const RoutingStatistics statistics = routing_statistics(first, wanted);
    list.push_back({{"share", share},
                    {"wanted", to_json(statistics.tokens_per_expert)},
                    {"max_over_mean", value(statistics.max_over_mean)},
                    {"loss", value(balance_loss(first.scores, first.topk_ids, LoadCount::first_choice))},
                    {"entropy", value(statistics.entropy)},
                    {"z_loss", value(z_loss(logits))},
                    {"dropped", capped.dropped.item<int64_t>()}});
  }
  return list;
}

}  // namespace turnout::cli
