// The path of ATen calls against the CPU kernels, where both serve an op: on the CPU the dispatcher takes the kernels,
// so the other path, which other devices run, is called by its own name.
#include "helpers.h"

#include <turnout/combine.h>
#include <turnout/plan.h>
#include <turnout/router.h>

#include <ops/routing_backends.h>

namespace turnout {
namespace {

TEST(Backends, PlanTheSame) {
  at::manual_seed(41);
  for (const auto& [tokens, top_k, experts] : {std::tuple{0, 2, 3}, {1, 1, 1}, {37, 3, 5}, {1000, 8, 64}, {3, 1, 300}}) {
    const auto chosen = at::randint(-1, experts, {tokens, top_k}, at::kLong);
    const auto kernel = plan(chosen, experts);
    const auto [expert_offsets, token_of_row, row_of_choice] = ops::plan_aten(chosen, experts);
    EXPECT_TRUE(at::equal(kernel.expert_offsets, expert_offsets));
    EXPECT_TRUE(at::equal(kernel.token_of_row, token_of_row));
    EXPECT_TRUE(at::equal(kernel.row_of_choice, row_of_choice));
  }
  EXPECT_SAYS(ops::plan_aten(testing::ids({{0, 9}}), 4), "holds an id that is neither -1 nor one of the experts");
}

TEST(Backends, ChooseTheSame) {
  at::manual_seed(42);
  for (const int64_t experts : {1, 2, 7, 64, 257})
    for (const int64_t k : {int64_t{1}, std::min<int64_t>(4, experts)}) {
      auto scores = at::randint(0, 5, {50, experts}).to(at::kFloat);  // full of ties
      scores[3].fill_(std::numeric_limits<float>::quiet_NaN());
      EXPECT_TRUE(at::equal(turnout::topk(scores, k), ops::topk_aten(scores, k))) << experts << " experts, k " << k;
    }
}

// Of small integers and quarters, so that every sum is exact.
TEST(Backends, MoveAndSumRowsTheSame) {
  at::manual_seed(43);
  for (const auto type : {at::kFloat, at::kBFloat16})
    for (const auto& [tokens, top_k, columns] : {std::tuple{0, 2, 3}, {1, 1, 1}, {37, 3, 1025}, {9, 1, 2048}}) {
      const auto made = plan(at::randint(-1, 5, {tokens, top_k}, at::kLong), 5);
      auto x = at::randint(-9, 9, {columns, tokens}).to(type).t();  // not contiguous
      if (tokens > 2) x[2].fill_(std::numeric_limits<float>::quiet_NaN());
      const auto weights = at::randint(-4, 4, {tokens, top_k}).to(at::kFloat) / 4;
      const auto rows = dispatch(x, made);
      EXPECT_TRUE(at::equal(rows.nan_to_num(99), ops::dispatch_aten(x, made.token_of_row, made.row_of_choice).nan_to_num(99)));
      EXPECT_TRUE(at::equal(combine(rows, weights, made).nan_to_num(99),
                            ops::combine_aten(rows, weights, made.token_of_row, made.row_of_choice).nan_to_num(99)));
    }
  const auto made = plan(testing::ids({{0, 1}}), 2);
  const DispatchPlan wrong{made.expert_offsets, at::tensor({0, 7}, at::kLong), at::tensor({0, 2}, at::kLong).view({1, 2})};
  EXPECT_SAYS(dispatch(at::ones({1, 4}), wrong), "token_of_row holds 7, expected -1 to 0");
  EXPECT_SAYS(combine(at::ones({2, 4}), at::ones({1, 2}), wrong), "row_of_choice holds 2, expected -1 to 1");
}

}  // namespace
}  // namespace turnout
