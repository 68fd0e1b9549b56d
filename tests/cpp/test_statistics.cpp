// Routing statistics: hand-worked counts, the ends of the entropy, no tokens, shapes that do not belong together.
#include <turnout/statistics.h>

#include "helpers.h"

#include <cmath>

namespace turnout {
namespace {

using testing::ids;
using testing::numbers;

TEST(Statistics, CountsWhatTheRouterDid) {
  // Logits whose softmax is (1/2, 1/4, 1/4, 0): entropy ln 2 · (1/2 + 2/4 + 2/4) = 1.5 ln 2.
  const auto logits = at::tensor({std::log(2.0), 0.0, 0.0, -1000.0}).repeat({3, 1});
  Routing routing = route(logits, 2);
  routing.topk_ids = ids({{0, 1}, {0, -1}, {0, 2}});
  const auto s = routing_statistics(routing, plan(routing.topk_ids, 4), at::tensor(int64_t{1}), logits);
  EXPECT_EQ(numbers(s.tokens_per_expert), (std::vector<int64_t>{3, 1, 1, 0}));
  EXPECT_EQ(s.choices, 6);
  EXPECT_EQ(s.dropped, 1);
  EXPECT_EQ(s.dead_experts, 1);
  EXPECT_DOUBLE_EQ(s.max_over_mean, 3 / (5.0 / 4));
  EXPECT_NEAR(s.entropy, 1.5 * std::log(2.0), 1e-6);
  EXPECT_NEAR(s.logit_max, 1000, 1e-9);
  EXPECT_NEAR(s.logit_rms, std::sqrt((1e6 + std::log(2.0) * std::log(2.0)) / 4), 1e-3);
}

TEST(Statistics, EntropyReachesFromCertainToUndecided) {
  const auto entropy = [](const at::Tensor& scores) {
    const auto chosen = topk(scores, 1);
    return routing_statistics({chosen, at::ones({scores.size(0), 1}), scores}, plan(chosen, scores.size(1))).entropy;
  };
  EXPECT_DOUBLE_EQ(entropy(at::eye(5, at::kDouble)), 0);
  EXPECT_NEAR(entropy(at::full({3, 8}, 1.0 / 8, at::kDouble)), std::log(8.0), 1e-14);
  // Scores that do not sum to 1, as sigmoids do, count by their shares.
  EXPECT_NEAR(entropy(at::full({3, 8}, 0.9, at::kDouble)), std::log(8.0), 1e-14);
}

TEST(Statistics, NoTokensAndOneToken) {
  for (const int64_t tokens : {0, 1}) {
    const auto logits = at::zeros({tokens, 3});
    const auto routing = route(logits, 1);
    const auto s = routing_statistics(routing, plan(routing.topk_ids, 3), {}, logits);
    EXPECT_EQ(s.choices, tokens);
    EXPECT_EQ(s.dead_experts, 3 - tokens);
    EXPECT_EQ(s.max_over_mean, tokens == 0 ? 0 : 3);
    EXPECT_EQ(s.logit_max, 0);
    EXPECT_TRUE(std::isfinite(s.entropy));
  }
}

TEST(Statistics, WhatDoesNotBelongTogetherIsRefused) {
  const auto routing = route(at::zeros({4, 3}), 1);
  EXPECT_SAYS(routing_statistics(routing, plan(routing.topk_ids, 5)), "experts of the plan");
  EXPECT_SAYS(routing_statistics(routing, plan(routing.topk_ids, 3), {}, at::zeros({5, 3})), "logits");
}

}  // namespace
}  // namespace turnout
