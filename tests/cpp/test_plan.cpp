// Plan, queues and capacity: hand-worked cases and a naive loop.
#include "helpers.h"

#include <turnout/combine.h>
#include <turnout/plan.h>
#include <turnout/slots.h>

#include <limits>

namespace turnout {
namespace {

using testing::ids;
using testing::numbers;
using Numbers = std::vector<int64_t>;

TEST(Plan, GroupsByExpertStableInTokenOrder) {
  const auto made = plan(ids({{2, 0}, {0, -1}, {2, 1}}), 4);
  EXPECT_EQ(numbers(made.expert_offsets), (Numbers{0, 2, 3, 5, 5}));
  EXPECT_EQ(numbers(made.token_of_row), (Numbers{0, 1, 2, 0, 2, -1}));
  EXPECT_EQ(numbers(made.row_of_choice), (Numbers{3, 0, 1, -1, 4, 2}));
  EXPECT_EQ(numbers(made.tokens_per_expert()), (Numbers{2, 1, 2, 0}));
}

TEST(Plan, EmptySingleAndAllToOne) {
  EXPECT_EQ(numbers(plan(at::empty({0, 2}, at::kLong), 3).expert_offsets), (Numbers{0, 0, 0, 0}));
  const auto one = plan(ids({{0}}), 1);
  EXPECT_EQ(numbers(one.token_of_row), (Numbers{0}));
  const auto all = plan(ids({{1}, {1}, {1}}), 2);
  EXPECT_EQ(numbers(all.expert_offsets), (Numbers{0, 0, 3}));
  EXPECT_EQ(numbers(all.token_of_row), (Numbers{0, 1, 2}));
  EXPECT_EQ(numbers(plan(ids({{-1}, {-1}}), 2).token_of_row), (Numbers{-1, -1}));
}

TEST(Plan, AgreesWithANaiveLoopAndTakesInt32) {
  at::manual_seed(5);
  for (const auto& [tokens, top_k, experts] : {std::tuple{37, 3, 5}, {1000, 8, 64}, {3, 1, 300}}) {
    const auto chosen = at::randint(-1, experts, {tokens, top_k}, at::kLong);
    Numbers offsets{0}, token_of_row;
    Numbers row_of_choice(tokens * top_k, -1);
    const auto flat = numbers(chosen);
    for (int64_t e = 0; e < experts; ++e) {
      for (size_t i = 0; i < flat.size(); ++i)
        if (flat[i] == e) {
          row_of_choice[i] = static_cast<int64_t>(token_of_row.size());
          token_of_row.push_back(static_cast<int64_t>(i) / top_k);
        }
      offsets.push_back(static_cast<int64_t>(token_of_row.size()));
    }
    token_of_row.resize(flat.size(), -1);
    for (const auto type : {at::kLong, at::kInt}) {
      const auto made = plan(chosen.to(type), experts);
      EXPECT_EQ(numbers(made.expert_offsets), offsets);
      EXPECT_EQ(numbers(made.token_of_row), token_of_row);
      EXPECT_EQ(numbers(made.row_of_choice), row_of_choice);
    }
  }
}

TEST(Plan, NamesTheFirstBadTokenAndId) {
  EXPECT_SAYS(plan(ids({{0, 1}, {1, 7}}), 4), "turnout::plan: topk_ids[1, 1] is 7, expected -1 or 0 to 3");
  EXPECT_SAYS(plan(ids({{0, -2}}), 4), "topk_ids[0, 1] is -2");
  EXPECT_SAYS(plan(ids({{0}}), 0), "num_experts is 0, expected at least 1");
  EXPECT_SAYS(plan(at::zeros({2, 2}), 4), "topk_ids is Float, expected int64 or int32");
  EXPECT_SAYS(plan(at::zeros({2}, at::kLong), 4), "expected [tokens, top_k]");
}

TEST(QueuePositions, QueueInEachOrder) {
  const auto chosen = ids({{0, 1}, {1, 0}, {0, 1}});
  EXPECT_EQ(numbers(queue_positions(chosen, 2, 3, DropOrder::choice)), (Numbers{0, 1, 0, 2, 1, 2}));
  EXPECT_EQ(numbers(queue_positions(chosen, 2, 3, DropOrder::position)), (Numbers{0, 0, 1, 1, 2, 2}));
  const auto weights = at::tensor({.1, .9, .8, .2, .2, .9}).view({3, 2});
  EXPECT_EQ(numbers(queue_positions(chosen, 2, 3, DropOrder::score, weights)), (Numbers{2, 0, 2, 0, 1, 1}));
}

TEST(QueuePositions, CountInEachGroup) {
  EXPECT_EQ(numbers(queue_positions(ids({{0}, {0}, {0}, {-1}}), 1, 2, DropOrder::choice)), (Numbers{0, 1, 0, -1}));
}

TEST(QueuePositions, RefuseIdsOutOfRangeAndLetNanPushNobodyOut) {
  EXPECT_SAYS(queue_positions(ids({{4}, {0}}), 3, 1, DropOrder::choice), "turnout::queue_positions: topk_ids holds an id");
  EXPECT_SAYS(queue_positions(ids({{3}, {0}}), 3, 1, DropOrder::choice), "turnout::queue_positions: topk_ids holds an id");
  const auto weights = at::tensor({.9, std::nan(""), .8}).view({3, 1});
  EXPECT_EQ(numbers(queue_positions(ids({{0}, {0}, {0}}), 1, 3, DropOrder::score, weights)), (Numbers{0, 2, 1}));
}

TEST(QueuePositions, RefuseAWrongPriority) {
  const auto chosen = ids({{0}});
  EXPECT_SAYS(queue_positions(chosen, 1, 1, DropOrder::score), "order 'score' needs priority");
  EXPECT_SAYS(queue_positions(chosen, 1, 1, DropOrder::choice, at::ones({1, 1})), "takes no priority");
  EXPECT_SAYS(queue_positions(ids({{0}, {0}, {0}}), 1, 2, DropOrder::choice), "expected a divisor of 3 tokens");
}

Routing routing_of(const at::Tensor& chosen, const at::Tensor& weights) { return {chosen, weights, {}}; }

TEST(LimitCapacity, DropsCountsAndRenormalizes) {
  const auto chosen = ids({{0, 1}, {0, 1}, {0, 2}});
  const auto weights = at::tensor({.75, .25, .5, .5, .9, .1}).view({3, 2});
  const auto plain = limit_capacity(routing_of(chosen, weights), 3, 2, 3);
  EXPECT_EQ(numbers(plain.routing.topk_ids), (Numbers{0, 1, 0, 1, -1, 2}));
  EXPECT_EQ(plain.dropped.item<int64_t>(), 1);
  EXPECT_DOUBLE_EQ(plain.routing.topk_weights[2][1].item<double>(), .1);
  const auto renormalized = limit_capacity(routing_of(chosen, weights), 3, 2, 3, DropOrder::choice, true);
  EXPECT_DOUBLE_EQ(renormalized.routing.topk_weights[2][1].item<double>(), 1.0);
  const auto by_score = limit_capacity(routing_of(chosen, weights), 3, 2, 3, DropOrder::score);
  EXPECT_EQ(numbers(by_score.routing.topk_ids), (Numbers{0, 1, -1, 1, 0, 2}));
}

TEST(ApplyCapacity, IsThePlacesAndTheDropsInOne) {
  const auto routing = routing_of(ids({{0, 1}, {0, 1}, {0, 2}}), at::tensor({.75, .25, .5, .5, .9, .1}).view({3, 2}));
  CapacityOptions options;
  options.factor = 0.9;  // 0.9 · 3 tokens · 2 choices / 3 experts = 1.8 places
  EXPECT_EQ(numbers(apply_capacity(routing, 3, 3, options).routing.topk_ids), (Numbers{0, 1, 0, 1, -1, 2}));
  options.rounding = CapacityRounding::floor;
  options.order = DropOrder::score;
  options.renormalize = true;
  const auto one = apply_capacity(routing, 3, 3, options);
  EXPECT_EQ(numbers(one.routing.topk_ids), (Numbers{-1, -1, -1, 1, 0, 2}));
  EXPECT_DOUBLE_EQ(one.routing.topk_weights[1][1].item<double>(), 1.0);
  EXPECT_EQ(one.dropped.item<int64_t>(), 3);
  const auto all = apply_capacity(routing, 3, 3, {});
  EXPECT_TRUE(all.routing.topk_ids.equal(routing.topk_ids));
  EXPECT_EQ(all.dropped.item<int64_t>(), 0);
}

TEST(LimitCapacity, IsSeededWhenRandomAndLeavesNanOfATokenWithoutPlaces) {
  const auto chosen = at::zeros({40, 1}, at::kLong);
  const auto kept = [&](int64_t seed) {
    at::manual_seed(seed);
    return limit_capacity(routing_of(chosen, at::ones({40, 1})), 1, 10, 40, DropOrder::random);
  };
  EXPECT_TRUE(at::equal(kept(1).routing.topk_ids, kept(1).routing.topk_ids));
  EXPECT_FALSE(at::equal(kept(1).routing.topk_ids, kept(2).routing.topk_ids));
  EXPECT_EQ(kept(3).dropped.item<int64_t>(), 30);
  const auto none = limit_capacity(routing_of(chosen, at::ones({40, 1})), 1, 10, 40, DropOrder::choice, true);
  EXPECT_EQ(none.routing.topk_weights[39][0].item<double>(), 0);  // 0 / 0 must not be NaN
}

TEST(ExpertCapacity, RoundsAsEachSourceDoes) {
  CapacityOptions options;
  EXPECT_EQ(expert_capacity(options, 10, 2, 4), 10);  // dropless
  options.factor = 1.25;
  EXPECT_EQ(expert_capacity(options, 10, 2, 4), 7);  // ceil(6.25)
  CapacityOptions whole;
  whole.factor = 1.1;
  EXPECT_EQ(expert_capacity(whole, 50, 1, 5), 11);  // ceil(50 · 1 / 5 · 1.1), which another order makes 12
  whole.factor = 1;
  EXPECT_EQ(expert_capacity(whole, std::numeric_limits<int64_t>::max(), 1, 1), std::numeric_limits<int64_t>::max());
  options.rounding = CapacityRounding::floor;
  EXPECT_EQ(expert_capacity(options, 10, 2, 4), 6);
  options.count_choices = false;
  options.minimum = 4;
  EXPECT_EQ(expert_capacity(options, 10, 2, 4), 4);  // max(4, floor(3.125)), tensor2tensor
  options.factor = 100;
  EXPECT_EQ(expert_capacity(options, 10, 2, 4), 10);  // an expert takes a token once
  options.fixed = 3;
  EXPECT_EQ(expert_capacity(options, 10, 2, 4), 3);
  options.factor = -1;
  EXPECT_SAYS(expert_capacity(options, 10, 2, 4), "factor is -1, expected a finite number");
}

TEST(DispatchAndCombine, UndoEachOther) {
  at::manual_seed(6);
  const auto x = at::randn({5, 3}, at::kDouble);
  const auto made = plan(ids({{1, 0}, {0, -1}, {2, 1}, {-1, -1}, {1, 2}}), 3);
  const auto rows = dispatch(x, made);
  EXPECT_EQ(rows.size(0), 10);
  EXPECT_TRUE(rows.narrow(0, 7, 3).eq(0).all().item<bool>());
  const auto back = combine(rows, at::ones({5, 2}, at::kDouble), made);
  const auto sent = at::tensor({2.0, 1.0, 2.0, 0.0, 2.0}).unsqueeze(1);
  EXPECT_TRUE(at::allclose(back, x * sent));
}

TEST(DispatchAndCombine, DoNotSpreadNanThroughWhatIsNotSent) {
  auto x = at::ones({2, 2});
  x[0].fill_(std::numeric_limits<float>::quiet_NaN());
  const auto made = plan(ids({{0, 1}, {0, -1}}), 2);
  const auto y = combine(dispatch(x, made), at::ones({2, 2}), made);
  EXPECT_TRUE(y[0].isnan().all().item<bool>());
  EXPECT_TRUE(y[1].eq(1).all().item<bool>());
}

TEST(DispatchAndCombine, NameWrongArguments) {
  const auto made = plan(ids({{0, 1}, {0, -1}}), 2);
  EXPECT_SAYS(dispatch(at::ones({3, 2}), made), "x has shape [3, 2], expected size 2 (tokens of the plan)");
  EXPECT_SAYS(combine(at::ones({3, 2}), at::ones({2, 2}), made), "rows has shape [3, 2]");
  EXPECT_SAYS(combine(at::ones({4, 2}), at::ones({2, 1}), made), "topk_weights has shape [2, 1]");
  EXPECT_SAYS(combine(at::ones({4, 2}), at::ones({2, 2}, at::kDouble), made), "topk_weights is Double");
}

TEST(SlotPlan, HoldsEveryPlaceAndMarksEmptyOnes) {
  // two groups of two tokens, two experts, two places each
  const auto made = slot_plan(ids({{0}, {0}, {1}, {0}}), 2, 2, 2);
  EXPECT_EQ(numbers(made.expert_offsets), (Numbers{0, 4, 8}));
  EXPECT_EQ(numbers(made.token_of_row), (Numbers{0, 1, 3, -1, -1, -1, 2, -1}));
  EXPECT_EQ(numbers(made.row_of_choice), (Numbers{0, 1, 6, 2}));
  const auto importance = slot_importance(at::tensor({1.0, 0.5, 0.51, 0.0}).view({4, 1}), made);
  EXPECT_TRUE(at::equal(importance, at::tensor({1.0, .5, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0})));
}

}  // namespace
}  // namespace turnout
