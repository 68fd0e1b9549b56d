// Runtime: what runs and why, and the promise that results do not depend on the number of threads.
#include "helpers.h"

#include <turnout/experts.h>
#include <turnout/plan.h>
#include <turnout/router.h>
#include <turnout/runtime.h>

#include <ATen/Parallel.h>
#include <torch/autograd.h>

#include <algorithm>
#include <cstdlib>

namespace turnout {
namespace {

TEST(KernelChoices, NameOneThatRunsAndAReasonForEachOther) {
  const auto choices = kernel_choices();
  EXPECT_EQ(std::count_if(choices.begin(), choices.end(), [](const auto& c) { return c.active; }), 1);
  for (const auto& choice : choices) EXPECT_EQ(choice.reason.empty(), choice.active) << choice.name;
  const char* forced = std::getenv("TURNOUT_FORCE_ISA");  // set by the runs that prove each implementation
  if (forced != nullptr) {
    const auto named =
        std::find_if(choices.begin(), choices.end(), [&](const auto& c) { return c.name == forced; });
    ASSERT_NE(named, choices.end());
    EXPECT_TRUE(named->active) << forced;
  }
}

TEST(Versions, AreThoseOfTheBuild) {
  EXPECT_EQ(version(), "0.1.0");
  EXPECT_EQ(built_for_torch().substr(0, 2), "2.");
}

TEST(Determinism, GivesTheSameBitsAtAnyThreadCount) {
  at::manual_seed(31);
  constexpr int64_t kTokens = 301, kHidden = 72, kFfn = 56, kExperts = 7;
  const int before = at::get_num_threads();
  for (const auto type : {at::kFloat, at::kBFloat16}) {
    const auto leaf = [&](at::IntArrayRef shape) { return (0.3 * at::randn(shape)).to(type).set_requires_grad(true); };
    const auto x = leaf({kTokens, kHidden}), up = leaf({kExperts, 2 * kFfn, kHidden});
    const auto down = leaf({kExperts, kHidden, kFfn});
    const auto scores = at::randn({kTokens, kExperts});
    const auto weights = at::rand({kTokens, 2}).set_requires_grad(true);
    std::vector<std::vector<at::Tensor>> runs;
    for (const int threads : {1, 2, 3, 8}) {
      at::set_num_threads(threads);
      const auto chosen = turnout::topk(scores, 2);
      const auto y = fused_experts(x, chosen, weights, {{up}, {down}}, Activation::swiglu);
      auto made = torch::autograd::grad({y}, {x, up, down, weights}, {at::ones_like(y)});
      made.insert(made.end(), {y, chosen, plan(chosen, kExperts).token_of_row});
      runs.push_back(std::move(made));
    }
    for (size_t run = 1; run < runs.size(); ++run)
      for (size_t i = 0; i < runs[run].size(); ++i) EXPECT_TRUE(at::equal(runs[run][i], runs[0][i])) << i;
  }
  at::set_num_threads(before);
}

}  // namespace
}  // namespace turnout
