// The path of ATen calls against the CPU kernels, where both serve an op: on the CPU the dispatcher takes the kernels,
// so the other path, which other devices run, is called by its own name.
#include "helpers.h"

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

}  // namespace
}  // namespace turnout
