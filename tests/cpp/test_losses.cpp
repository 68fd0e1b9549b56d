// Losses over ranks, the selection bias, statistics, and routers beside route(), from C++.
#include "helpers.h"

#include <turnout/balance.h>
#include <turnout/router_variants.h>
#include <turnout/statistics.h>

namespace turnout {
namespace {

using testing::ids;
using testing::numbers;

TEST(BalanceLoss, OfAllRanksHasTheWholeBatchsValueAndGradient) {
  at::manual_seed(1);
  const auto logits = at::randn({12, 4}, at::kDouble).requires_grad_();
  const auto part = [&](int64_t first, int64_t count) { return route(logits.narrow(0, first, count), 2); };
  const auto whole = part(0, 12), a = part(0, 3), b = part(3, 9);
  const auto total = balance_sums(a.scores, a.topk_ids).detach() + balance_sums(b.scores, b.topk_ids).detach();
  const SumOverRanks sum = [&](const at::Tensor& own) {
    EXPECT_FALSE(own.requires_grad());
    return total;
  };
  const auto expected = balance_loss(whole.scores, whole.topk_ids);
  const auto of_a = balance_loss(a.scores, a.topk_ids, LoadCount::per_assignment, 0, {}, sum);
  const auto of_b = balance_loss(b.scores, b.topk_ids, LoadCount::per_assignment, 0, {}, sum);
  EXPECT_TRUE(at::allclose(of_a, expected, 1e-13, 0));
  EXPECT_TRUE(at::allclose(of_b, expected, 1e-13, 0));
  ((of_a + of_b) / 2).backward();
  const auto mean = logits.grad().clone();
  logits.mutable_grad().zero_();
  expected.backward();
  EXPECT_TRUE(at::allclose(mean, logits.grad(), 1e-12, 1e-15));
  EXPECT_SAYS(balance_loss(a.scores, a.topk_ids, LoadCount::per_token, 3, {}, sum), "expected 0 with a sum over ranks");
}

TEST(SelectionBias, StepsTowardsTheMean) {
  const auto bias = at::tensor({0.5, 0.0, -0.5, 0.0});
  const auto counts = at::tensor({1, 4, 9, 2}, at::kLong);
  EXPECT_TRUE(at::equal(update_selection_bias(bias, counts, 0.125), at::tensor({.625, 0., -.625, .125})));
  const auto centred = update_selection_bias(bias, counts, 0.125, /*center=*/true);
  EXPECT_TRUE(at::equal(centred, at::tensor({.59375, -.03125, -.65625, .09375})));
  EXPECT_EQ(numbers(expert_counts(ids({{0, 2}, {2, -1}}), 3)), (std::vector<int64_t>{1, 0, 2}));
}

TEST(Statistics, ComeFromThePlan) {
  const auto scores = at::tensor({.5, .5, 1., 0.}).view({2, 2});
  const auto chosen = ids({{0}, {0}});
  const auto stats = routing_statistics({chosen, {}, scores}, plan(chosen, 2), at::tensor({1}, at::kLong).squeeze());
  EXPECT_EQ(numbers(stats.tokens_per_expert), (std::vector<int64_t>{2, 0}));
  EXPECT_NEAR(stats.dropped_share.item<double>(), 1.0 / 3, 1e-15);
  EXPECT_EQ(stats.max_over_mean.item<double>(), 2);
  EXPECT_NEAR(stats.entropy.item<double>(), std::log(2.0) / 2, 1e-15);
  EXPECT_EQ(stats.dead_experts.item<int64_t>(), 1);
}

TEST(ExpertChoice, GivesAPlanWithoutEmptyRows) {
  const auto logits = at::tensor({3., 0., 1., 0., 0., 2., 0., 1.}).view({4, 2});
  const auto [routing, plan] = route_expert_choice(logits, 2);
  EXPECT_EQ(numbers(routing.topk_ids), (std::vector<int64_t>{0, -1, 0, -1, -1, 1, -1, 1}));
  EXPECT_EQ(numbers(plan.token_of_row), (std::vector<int64_t>{0, 1, 2, 3}));
  EXPECT_TRUE(at::equal(routing.topk_weights.gt(0), routing.topk_ids.ge(0)));
}

TEST(Sinkhorn, BalancesRowsAndColumns) {
  at::manual_seed(2);
  const auto scaled = sinkhorn(at::randn({32, 4}, at::kDouble), 1e-12);
  EXPECT_TRUE(at::allclose(scaled.sum(0), at::full({4}, 1.0 / 4, at::kDouble), 1e-6));
  EXPECT_TRUE(at::allclose(scaled.sum(1), at::full({32}, 1.0 / 32, at::kDouble), 1e-6));
  EXPECT_EQ(route_sinkhorn(at::randn({32, 4}), 1).topk_weights.sizes(), (at::IntArrayRef{32, 1}));
}

TEST(NoisyLogits, AddNoiseTimesSoftplus) {
  const auto zeros = at::zeros({1, 3}, at::kDouble);
  const auto noisy = noisy_logits(zeros, zeros, 0.5, at::tensor({1., 0., -2.}).view({1, 3}));
  const double deviation = std::log(2.0) + 0.5;
  EXPECT_TRUE(at::allclose(noisy.logits, at::tensor({deviation, 0., -2 * deviation}).view({1, 3}), 1e-14, 0));
  // of equals each is chosen with Φ((0 − threshold) / deviation): 0 must beat 0; the first beats 0; the last too
  EXPECT_TRUE(at::allclose(noisy_load(zeros, noisy, 1), at::special_ndtr(at::tensor({0., -1., -1.})), 1e-14, 0));
}

TEST(HashIds, AreDistinctAndStay) {
  const auto chosen = hash_ids(at::arange(100), 5, 5);
  EXPECT_TRUE(at::equal(std::get<0>(chosen.sort(-1)), at::arange(5).expand({100, 5})));
  EXPECT_TRUE(at::equal(hash_ids(at::arange(100).to(at::kInt), 5, 2), chosen.narrow(1, 0, 2)));
}

}  // namespace
}  // namespace turnout
