// Router and losses: hand-worked cases, ties, NaN, and the formulas written out.
#include "helpers.h"

#include <turnout/balance.h>
#include <turnout/router.h>

#include <limits>

namespace turnout {
namespace {

using testing::ids;
using testing::numbers;

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

TEST(TopK, TakesTheLowerIdOfEqualScores) {
  // at::topk gives 3 and 5 here.
  EXPECT_EQ(numbers(turnout::topk(at::zeros({1, 6}), 2)), (std::vector<int64_t>{0, 1}));
  EXPECT_EQ(numbers(turnout::topk(at::tensor({1.f, 3.f, 2.f, 3.f}).view({1, 4}), 3)), (std::vector<int64_t>{1, 3, 2}));
}

TEST(TopK, TiesStayLowAtEveryWidth) {
  for (int64_t experts = 1; experts <= 70; ++experts)
    for (const int64_t k : {int64_t{1}, std::min<int64_t>(3, experts), experts}) {
      const auto chosen = turnout::topk(at::full({3, experts}, 0.5), k);
      EXPECT_TRUE(at::equal(chosen, at::arange(k, at::kLong).expand({3, k}))) << experts << " experts, k " << k;
    }
}

TEST(TopK, GivesDistinctIdsInRangeForNanAndInfinity) {
  const double inf = std::numeric_limits<double>::infinity();
  const auto scores = at::tensor({kNan, kNan, kNan, kNan, -inf, inf, kNan, 0.0, -inf, -inf, -inf, -inf}).view({3, 4});
  EXPECT_EQ(numbers(turnout::topk(scores, 3)), (std::vector<int64_t>{0, 1, 2, 2, 1, 3, 0, 1, 2}));
}

TEST(TopK, AgreesWithTorchAwayFromTies) {
  at::manual_seed(1);
  const auto scores = at::randn({200, 33});
  EXPECT_TRUE(at::equal(turnout::topk(scores, 5), std::get<1>(scores.topk(5))));
}

TEST(TopK, ServesAnyLeadingShapeAndStrides) {
  at::manual_seed(2);
  const auto scores = at::randn({5, 4, 3}).permute({2, 0, 1});
  EXPECT_TRUE(at::equal(turnout::topk(scores, 2), std::get<1>(scores.topk(2))));
  EXPECT_EQ(turnout::topk(at::empty({0, 4}), 2).sizes(), (at::IntArrayRef{0, 2}));
}

TEST(Route, WeighsAsEachSourceDoes) {
  // exp: 1, 2, 4, 1; sum 8
  const auto logits = at::tensor({0.0, std::log(2.0), std::log(4.0), 0.0}).view({1, 4});
  const auto expect = [&](RouterWeights weights, std::vector<double> wanted) {
    const auto routing = route(logits, 2, {.weights = weights});
    EXPECT_EQ(numbers(routing.topk_ids), (std::vector<int64_t>{2, 1}));
    EXPECT_TRUE(at::allclose(routing.topk_weights, at::tensor(wanted).view({1, 2}), 1e-14, 0)) << to_string(weights);
    EXPECT_TRUE(at::allclose(routing.scores, at::tensor({.125, .25, .5, .125}).view({1, 4}), 1e-14, 0));
  };
  expect(RouterWeights::normalized, {2.0 / 3, 1.0 / 3});
  expect(RouterWeights::probability, {0.5, 0.25});
  expect(RouterWeights::softmax_of_topk, {2.0 / 3, 1.0 / 3});
  EXPECT_NEAR(route(logits, 2, {.epsilon = 0.25}).topk_weights[0][0].item<double>(), 0.5, 1e-14);
}

TEST(Route, RunsInFloat32ForLowerTypes) {
  at::manual_seed(3);
  const auto logits = at::randn({9, 5}).to(at::kBFloat16);
  const auto low = route(logits, 2), high = route(logits.to(at::kFloat), 2);
  EXPECT_EQ(low.topk_weights.scalar_type(), at::kFloat);
  EXPECT_TRUE(at::equal(low.topk_weights, high.topk_weights));
}

TEST(Route, ChoosesByLogitWhereProbabilitiesRoundToOne) {
  // Both probabilities are 0.5 in float32, but the second logit is larger.
  const auto logits = at::tensor({100.0f, std::nextafter(100.0f, 200.0f)}).view({1, 2});
  EXPECT_EQ(numbers(route(logits, 1).topk_ids), (std::vector<int64_t>{1}));
}

TEST(Route, KeepsNanToItsToken) {
  at::manual_seed(4);
  auto logits = at::randn({3, 4});
  const auto clean = route(logits, 2);
  logits[1].fill_(kNan);
  const auto routing = route(logits, 2);
  for (const int64_t t : {0, 2}) EXPECT_TRUE(at::equal(routing.topk_weights[t], clean.topk_weights[t]));
  EXPECT_TRUE(routing.topk_ids.ge(0).logical_and(routing.topk_ids.lt(4)).all().item<bool>());
  EXPECT_TRUE(balance_loss(routing.scores, routing.topk_ids).isnan().item<bool>());
}

TEST(Route, LimitsTheChoiceToTheBestGroups) {
  // Groups {.3, .05}, {.2, .19}, {.25, .01}: the maximum prefers the first, the sum of both the second.
  const auto logits = at::tensor({.3, .05, .2, .19, .25, .01}).log().view({1, 6});
  RouterOptions options{.weights = RouterWeights::probability, .groups = 3};
  EXPECT_EQ(numbers(route(logits, 2, options).topk_ids), (std::vector<int64_t>{0, 1}));
  options.group_top = 2;
  EXPECT_EQ(numbers(route(logits, 2, options).topk_ids), (std::vector<int64_t>{2, 3}));
  options.kept_groups = 2;
  EXPECT_EQ(numbers(route(logits, 2, options).topk_ids), (std::vector<int64_t>{0, 2}));
  options.scale = 2;
  EXPECT_TRUE(at::allclose(route(logits, 2, options).topk_weights, at::tensor({.6, .4}).view({1, 2}), 1e-14, 0));
}

TEST(Route, BiasSteersTheChoiceAndLeavesTheWeights) {
  const auto logits = at::tensor({.2, .5, .8, .4}).logit().view({1, 4});
  const auto bias = at::tensor({.9, 0., 0., -1.}, at::kFloat);
  const RouterOptions options{.score = ScoreFunction::sigmoid, .scale = 2};
  const auto routing = route(logits, 2, options, bias);
  EXPECT_EQ(numbers(routing.topk_ids), (std::vector<int64_t>{0, 2}));
  EXPECT_TRUE(at::allclose(routing.topk_weights, at::tensor({.4, 1.6}).view({1, 2}), 1e-14, 0));
  EXPECT_TRUE(at::allclose(routing.scores, at::tensor({.2, .5, .8, .4}).view({1, 4}) / 1.9, 1e-14, 0));
}

TEST(Route, MaskOfZeroBeatsNegativeScores) {
  const auto logits = at::tensor({.5, .6, .3, .4}).logit().view({1, 4});
  const auto bias = at::tensor({.1, -.9, -.9, -.9}, at::kFloat);  // biased .6, -.3 | -.6, -.5: the first group is kept
  RouterOptions options{.score = ScoreFunction::sigmoid, .weights = RouterWeights::probability, .groups = 2};
  EXPECT_EQ(numbers(route(logits, 2, options, bias).topk_ids), (std::vector<int64_t>{0, 1}));
  options.group_mask = GroupMask::zero;
  const auto routing = route(logits, 2, options, bias);
  EXPECT_EQ(numbers(routing.topk_ids), (std::vector<int64_t>{0, 2}));
  EXPECT_NEAR(routing.topk_weights[0][1].item<double>(), .3, 1e-14);
}

TEST(Route, SendsPaddingNowhere) {
  const auto logits = at::tensor({1.f, 2.f, 3.f, 1.f}).view({2, 2});
  const auto routing = route(logits, 1, {}, {}, at::tensor({1, 0}).to(at::kBool));
  EXPECT_EQ(numbers(routing.topk_ids), (std::vector<int64_t>{1, -1}));
  EXPECT_EQ(routing.topk_weights[1].item<float>(), 0);
  EXPECT_TRUE(at::equal(routing.scores, logits.softmax(-1)));
}

TEST(Route, KeepsTheLogitsTypeWhereAsked) {
  at::manual_seed(5);
  const auto logits = at::randn({9, 5}).to(at::kBFloat16);
  const auto low = route(logits, 2, router_preset("gpt_oss"));
  EXPECT_EQ(low.scores.scalar_type(), at::kBFloat16);
  EXPECT_TRUE(at::equal(low.topk_weights, logits.gather(-1, low.topk_ids).softmax(-1)));
  const auto cast = route(logits, 2, router_preset("olmoe"));
  EXPECT_EQ(cast.scores.scalar_type(), at::kFloat);
  EXPECT_TRUE(at::equal(cast.topk_weights, cast.scores.gather(-1, cast.topk_ids).to(at::kBFloat16)));
}

TEST(Presets, AreAllPossible) {
  for (const auto& family : router_preset_names()) check(router_preset(family), 2, 64);
  EXPECT_SAYS(router_preset("dense"), "router preset is 'dense', expected one of mixtral, qwen2_moe");
  EXPECT_SAYS(check(router_preset("deepseek_v3"), 8, 12), "groups is 8, expected a divisor of 12 experts");
}

TEST(RouteTop2, FollowsThePoliciesByHand) {
  // probabilities 1/2, 1/4, 1/8, 1/8: gates 2/3 and 1/3
  const auto logits = at::tensor({std::log(4.0), std::log(2.0), 0.0, 0.0}).view({1, 1, 4});
  const auto second = [&](SecondPolicy policy, double threshold, double u = 0) {
    const auto out = route_top2(logits, {policy, threshold, 0.0}, {}, at::full({1, 1}, u, at::kDouble));
    EXPECT_NEAR(out.routing.topk_weights[0][0][0].item<double>(), 2.0 / 3, 1e-14);
    return std::pair(out.routing.topk_ids[0][0][1].item<int64_t>(), out.routing.topk_weights[0][0][1].item<double>());
  };
  EXPECT_EQ(second(SecondPolicy::all, 0.9).first, 1);
  EXPECT_EQ(second(SecondPolicy::none, 0.0), std::pair(int64_t{-1}, 0.0));
  EXPECT_EQ(second(SecondPolicy::threshold, 0.33).first, 1);
  EXPECT_EQ(second(SecondPolicy::threshold, 0.34).first, -1);
  EXPECT_EQ(second(SecondPolicy::random, 0.5, 0.66).first, 1);   // chance 2/3
  EXPECT_EQ(second(SecondPolicy::random, 0.5, 0.67).first, -1);
  // density [1, 0, 0, 0] · proxy [1/2, …], mean over 4, times 16
  EXPECT_NEAR(route_top2(logits, {SecondPolicy::all}).balance_loss.item<double>(), 2.0, 1e-14);
}

TEST(RouteTop2, ReadsImportance) {
  const auto logits = at::tensor({std::log(4.0), std::log(2.0), 0.0, 0.0}).expand({1, 3, 4});
  const auto out = route_top2(logits, {SecondPolicy::all, 0.2, 0.0}, at::tensor({1.0, 0.5, 0.0}).view({1, 3}));
  EXPECT_EQ(numbers(out.routing.topk_ids), (std::vector<int64_t>{0, 1, -1, 0, -1, -1}));
  EXPECT_NEAR(out.routing.topk_weights[0][1][1].item<double>(), 1.0, 1e-14);
  // density 1/3 · proxy (1/2 / 3) of expert 0, mean over 4 experts, times 16
  EXPECT_NEAR(out.balance_loss.item<double>(), 4.0 / 18, 1e-14);
}

TEST(BalanceLoss, IsWhatTheConventionsSayWhenBalanced) {
  const auto scores = at::full({4, 4}, 0.25, at::kDouble);
  const auto chosen = ids({{0, 1}, {1, 2}, {2, 3}, {3, 0}});
  EXPECT_NEAR(balance_loss(scores, chosen, LoadCount::per_assignment).item<double>(), 1, 1e-14);
  EXPECT_NEAR(balance_loss(scores, chosen, LoadCount::per_token).item<double>(), 2, 1e-14);
  EXPECT_NEAR(balance_loss(scores, chosen, LoadCount::first_choice).item<double>(), 1, 1e-14);
}

TEST(BalanceLoss, TakesMeansWithinGroups) {
  // Each sequence sends all to one expert; over the batch the load is even.
  const auto chosen = ids({{0}, {0}, {1}, {1}});
  const auto scores = at::tensor({.75, .25, .75, .25, .25, .75, .25, .75}).view({4, 2});
  EXPECT_NEAR(balance_loss(scores, chosen, LoadCount::first_choice).item<double>(), 1.0, 1e-14);
  EXPECT_NEAR(balance_loss(scores, chosen, LoadCount::first_choice, 2).item<double>(), 1.5, 1e-14);
  EXPECT_SAYS(balance_loss(scores, chosen, LoadCount::first_choice, 3), "group_size is 3, expected a divisor of 4");
}

TEST(BalanceLoss, DoesNotCountWhatIsNotSentAndIsZeroWithoutTokens) {
  const auto scores = at::full({2, 2}, 0.5, at::kDouble);
  EXPECT_NEAR(balance_loss(scores, ids({{0, -1}, {-1, -1}})).item<double>(), 2 * (0.25 * 0.5), 1e-14);
  EXPECT_EQ(balance_loss(at::empty({0, 3}), at::empty({0, 2}, at::kLong)).item<double>(), 0);
  EXPECT_EQ(z_loss(at::empty({0, 3})).item<double>(), 0);
}

TEST(ZLoss, IsTheMeanSquareOfLogsumexp) {
  const auto logits = at::tensor({0.0, 0.0, std::log(3.0), 0.0}).view({2, 2});
  const double wanted = (std::pow(std::log(2.0), 2) + std::pow(std::log(4.0), 2)) / 2;
  EXPECT_NEAR(z_loss(logits).item<double>(), wanted, 1e-14);
}

TEST(Words, AreReadAndRefused) {
  EXPECT_EQ(parse_router_weights("probability"), RouterWeights::probability);
  EXPECT_EQ(to_string(SecondPolicy::threshold), "threshold");
  EXPECT_SAYS(parse_router_weights("best"), "'best', expected one of normalized, probability, softmax_of_topk");
  EXPECT_SAYS(parse_second_policy(""), "expected one of all, none, threshold, random");
  EXPECT_SAYS(parse_load_count("x"), "per_assignment");
}

TEST(RouterErrors, NameWhatTheyGot) {
  EXPECT_SAYS(turnout::topk(at::zeros({2, 4}), 5), "turnout::topk: top_k is 5, expected 1 to 4");
  EXPECT_SAYS(turnout::topk(at::zeros({2, 4}), 0), "top_k is 0");
  EXPECT_SAYS(turnout::topk(at::zeros({2, 4}, at::kLong), 1), "scores is Long");
  EXPECT_SAYS(route(at::zeros({4}), 1), "logits has shape [4], expected [tokens, experts]");
  EXPECT_SAYS(route_top2(at::zeros({1, 3, 1}), {}), "expected at least 2");
  EXPECT_SAYS(route_top2(at::zeros({1, 3, 2}), {}, at::zeros({1, 2})), "importance has shape [1, 2]");
  EXPECT_SAYS(balance_loss(at::zeros({2, 3}), ids({{0}})), "expected size 2 (tokens of scores)");
  EXPECT_SAYS(balance_loss(at::zeros({1, 3}), ids({{3}})), "turnout::balance_loss: topk_ids holds an id");
  EXPECT_SAYS(balance_loss(at::zeros({1, 3}), ids({{0}}).to(at::kMeta)), "topk_ids is on meta, but scores is on cpu");
  EXPECT_SAYS(route(at::zeros({1, 3}), 1, {.epsilon = kNan}), "epsilon is nan");
}

}  // namespace
}  // namespace turnout
