// Layouts: replicas of expert groups, capacity and losses of the joined batch, two levels of experts.
#include "ranks.h"

#include "../cpp/helpers.h"

#include <turnout/expert_parallel.h>

#include <numeric>

namespace turnout::testing {
namespace {

constexpr int64_t kHidden = 12;

/// One case: tokens of each rank, ranks that hold the experts, and what capacity drops.
struct Case {
  std::string name;
  std::vector<int64_t> tokens;
  int64_t expert_ranks = 0;
  double capacity = 0;
  DropOrder order = DropOrder::choice;
  bool renormalize = false;
};

void PrintTo(const Case& c, std::ostream* out) { *out << c.name; }

MoEOptions options_of(const Case& c) {
  MoEOptions options{.hidden = kHidden, .ffn = 10, .num_experts = 5};
  options.balance_coefficient = 0.3;
  options.z_coefficient = 0.1;
  options.capacity.factor = c.capacity;
  options.capacity.order = c.order;
  options.capacity.renormalize = c.renormalize;
  return options;
}

double difference(const at::Tensor& a, const at::Tensor& b) {
  return a.numel() == 0 ? 0 : (a - b).abs().max().item<double>();
}

class Layouts : public ::testing::TestWithParam<Case> {};

// The objective is the mean over tokens plus the losses; data-parallel training takes the mean over ranks, so a rank's
// own mean is weighted by its tokens.
void compare_with_one_process(World& world, const Case& c) {
  const auto rank = world.options.rank;
  const auto before = std::accumulate(c.tokens.begin(), c.tokens.begin() + rank, int64_t{0});
  const auto all = std::accumulate(c.tokens.begin(), c.tokens.end(), int64_t{0}), own = c.tokens[rank];
  at::manual_seed(7);
  const auto x = at::randn({all, kHidden}), target = at::randn({all, kHidden}) / static_cast<double>(all);

  at::manual_seed(11);
  MoE whole(options_of(c));
  at::manual_seed(13);  // of drops at random
  const auto truth = whole->forward(x);
  ((truth.output * target).sum() + truth.aux_loss).backward();

  at::manual_seed(11);
  const auto layout = make_layout(world, c.expert_ranks);
  auto moe = expert_parallel_moe(options_of(c), layout);
  at::manual_seed(rank == 0 ? 13 : 99);
  const auto made = moe->forward(x.narrow(0, before, own));
  const auto ranks = static_cast<double>(world.options.size);
  ((made.output * target.narrow(0, before, own)).sum() * ranks + made.aux_loss).backward();
  average_gradients(*moe, layout);

  EXPECT_LE(difference(made.output, truth.output.narrow(0, before, own)), bound(truth.output, 64, at::kFloat));
  EXPECT_TRUE(at::equal(made.routing.topk_ids, truth.routing.topk_ids.narrow(0, before, own)));
  EXPECT_NEAR(sum_over(made.aux_loss.detach(), world.all()).item<double>() / ranks, truth.aux_loss.item<double>(), 1e-5);
  EXPECT_EQ(sum_over(made.dropped, world.all()).item<int64_t>(), truth.dropped.item<int64_t>());
  EXPECT_EQ(truth.dropped.item<int64_t>() > 0, c.capacity > 0) << "whether the case drops at all";
  const auto parts = parts_of_banks(*moe);
  for (const auto& item : whole->named_parameters()) {
    auto expected = item.value().grad();
    if (const auto part = parts.find(item.key()); part != parts.end())
      expected = expected.narrow(0, part->second.first, part->second.count);
    const auto got = moe->named_parameters()[item.key()].grad();
    ASSERT_EQ(got.sizes(), expected.sizes()) << item.key();
    EXPECT_LE(difference(got, expected), 8 * bound(expected, 64, at::kFloat)) << item.key();
  }
}

TEST_P(Layouts, GiveWhatOneProcessGivesOnTheJoinedBatch) {
  const Case& c = GetParam();
  on_ranks(static_cast<int64_t>(c.tokens.size()), [&](World& world) { compare_with_one_process(world, c); });
}

INSTANTIATE_TEST_SUITE_P(
    All, Layouts,
    ::testing::Values(Case{"experts_on_all", {9, 4, 6}}, Case{"two_replicas_of_two", {5, 7, 3, 6}, 2},
                      Case{"data_parallel_alone", {6, 8}, 1}, Case{"places_by_choice", {9, 4, 6}, 0, 0.8},
                      Case{"places_by_position", {9, 0, 6}, 0, 0.7, DropOrder::position, true},
                      Case{"places_by_score", {9, 8}, 0, 0.7, DropOrder::score},
                      Case{"places_at_random", {9, 8}, 0, 0.7, DropOrder::random},
                      Case{"places_and_replicas", {6, 5, 4, 7}, 2, 0.6, DropOrder::score, true}),
    [](const auto& info) { return info.param.name; });

TEST(OwnBatch, LeavesLossesAndCapacityToEachRank) {
  on_ranks(2, [](World& world) {
    const Case c{"own", {}, 0, 0.8};
    at::manual_seed(7);
    const auto x = at::randn({2, 10, kHidden})[world.options.rank];
    at::manual_seed(11);
    const auto truth = MoE(options_of(c))->forward(x);
    at::manual_seed(11);
    auto layout = make_layout(world);
    layout.joined_batch = false;
    const auto made = expert_parallel_moe(options_of(c), layout)->forward(x);
    EXPECT_LE(difference(made.output, truth.output), bound(truth.output, 64, at::kFloat));
    EXPECT_NEAR(made.aux_loss.item<double>(), truth.aux_loss.item<double>(), 1e-6);
    EXPECT_EQ(made.dropped.item<int64_t>(), truth.dropped.item<int64_t>());
  });
}

TEST(Hierarchical, OuterGroupsLieOnRanks) {
  HierarchicalMoEOptions options{.hidden = kHidden, .ffn = 10, .num_experts = {3, 2}};
  options.gating.policy_train = SecondPolicy::all;
  on_ranks(2, [&](World& world) {
    const auto rank = world.options.rank;
    at::manual_seed(7);
    const auto x = at::randn({4, 9, kHidden}), grad = at::randn({4, 9, kHidden});
    at::manual_seed(11);
    HierarchicalMoE whole(options);
    const auto truth = whole->forward(x);
    truth.output.backward(grad);
    at::manual_seed(11);
    const auto layout = make_layout(world);
    auto moe = expert_parallel_moe(options, layout);
    const auto made = moe->forward(x.narrow(0, 2 * rank, 2));
    made.output.backward(grad.narrow(0, 2 * rank, 2));
    average_gradients(*moe, layout);
    EXPECT_LE(difference(made.output, truth.output.narrow(0, 2 * rank, 2)), bound(truth.output, 64, at::kFloat));
    const auto part = parts_of_banks(*moe).at("experts.up");
    EXPECT_EQ(part.count, rank == 0 ? 4 : 2);  // whole outer groups
    for (const auto& item : whole->named_parameters()) {
      auto expected = item.value().grad() / 2;
      if (item.key().starts_with("experts.")) expected = expected.narrow(0, part.first, part.count);
      EXPECT_LE(difference(moe->named_parameters()[item.key()].grad(), expected), 8 * bound(expected, 64, at::kFloat))
          << item.key();
    }
  });
}

TEST(Layout, RefusesRanksThatDoNotDivide) {
  on_ranks(2, [](World& world) {
    EXPECT_SAYS(make_layout(world, 3), "expert_ranks is 3, expected a divisor of 2");
    const MoEOptions one_expert{.hidden = 4, .ffn = 4, .num_experts = 1, .top_k = 1};
    EXPECT_SAYS(expert_parallel_moe(one_expert, make_layout(world)), "there are 1 experts for 2 ranks");
  });
}

}  // namespace
}  // namespace turnout::testing
