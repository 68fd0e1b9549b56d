// Experts: against a naive loop in every type, activation, bias and layout; gradients against autograd of the loop.
#include "helpers.h"

#include <turnout/combine.h>
#include <turnout/experts.h>
#include <turnout/router.h>

#include <torch/autograd.h>

namespace turnout {
namespace {

using testing::bound;
using testing::ids;

struct Case {
  at::ScalarType type;
  Activation activation;
  bool bias;
  bool lists;  // separate experts instead of banks
};

std::string name_of(const ::testing::TestParamInfo<Case>& info) {
  return std::string(c10::toString(info.param.type)) + "_" + to_string(info.param.activation) +
         (info.param.bias ? "_bias" : "") + (info.param.lists ? "_lists" : "");
}

std::vector<Case> cases() {
  std::vector<Case> all;
  for (const auto type : {at::kFloat, at::kDouble, at::kBFloat16})
    for (const auto activation : {Activation::relu, Activation::gelu, Activation::gelu_tanh, Activation::silu,
                                  Activation::swiglu, Activation::geglu, Activation::swiglu_clamped})
      for (const bool bias : {false, true})
        for (const bool lists : {false, true}) all.push_back({type, activation, bias, lists});
  return all;
}

class ExpertsTest : public ::testing::TestWithParam<Case> {
 protected:
  static constexpr int64_t kTokens = 23, kHidden = 19, kFfn = 13, kExperts = 5, kTopK = 2;

  void SetUp() override {
    at::manual_seed(7);
    const bool clamped = GetParam().activation == Activation::swiglu_clamped;
    const auto rows = is_gated(GetParam().activation) ? 2 * kFfn : kFfn;
    const auto leaf = [&](at::IntArrayRef shape) {
      return (0.5 * at::randn(shape)).to(GetParam().type).to(at::kDouble).set_requires_grad(true);
    };
    x = leaf({kTokens, kHidden});
    if (clamped) x = (8 * x.detach()).to(GetParam().type).to(at::kDouble).set_requires_grad(true);  // beyond its clamps
    weights = leaf({kTokens, kTopK});
    up = leaf({kExperts, rows, kHidden});
    down = leaf({kExperts, kHidden, kFfn});
    up_bias = leaf({kExperts, rows});
    down_bias = leaf({kExperts, kHidden});
    // Expert 3 gets no token, token 4 is sent nowhere, token 5 to one expert.
    chosen = at::randint(0, 3, {kTokens, kTopK}, at::kLong);
    chosen.select(1, 0).fill_(4);
    chosen[4].fill_(-1);
    chosen[5][0] = -1;
  }

  std::vector<at::Tensor> leaves() const {
    std::vector<at::Tensor> all{x, weights, up, down};
    if (GetParam().bias) all.insert(all.end(), {up_bias, down_bias});
    return all;
  }

  at::Tensor naive() const {
    std::vector<at::Tensor> rows;
    for (int64_t t = 0; t < kTokens; ++t) {
      auto y = at::zeros({kHidden}, at::kDouble);
      for (int64_t k = 0; k < kTopK; ++k) {
        const auto e = chosen[t][k].item<int64_t>();
        if (e < 0) continue;
        const bool bias = GetParam().bias;
        y = y + weights[t][k] * testing::naive_expert(x[t], up[e], down[e], bias ? up_bias[e] : at::Tensor(),
                                                      bias ? down_bias[e] : at::Tensor(), GetParam().activation);
      }
      rows.push_back(y);
    }
    return at::stack(rows);
  }

  at::Tensor fused(const std::vector<at::Tensor>& inputs, bool weight_before_down = false) const {
    const auto list = [&](const at::Tensor& bank) {
      return GetParam().lists ? bank.unbind(0) : std::vector<at::Tensor>{bank};
    };
    ExpertWeights experts{list(inputs[2]), list(inputs[3])};
    if (GetParam().bias) {
      experts.up_bias = list(inputs[4]);
      experts.down_bias = list(inputs[5]);
    }
    return fused_experts(inputs[0], chosen, inputs[1], experts, GetParam().activation, weight_before_down);
  }

  std::vector<at::Tensor> in_type() const {
    std::vector<at::Tensor> all;
    for (const auto& leaf : leaves()) all.push_back(leaf.detach().to(GetParam().type).set_requires_grad(true));
    return all;
  }

  at::Tensor x, weights, up, down, up_bias, down_bias, chosen;
};

TEST_P(ExpertsTest, AgreesWithALoopForwardAndBackward) {
  const auto truth = naive();
  const auto inputs = in_type();
  const auto y = fused(inputs);
  EXPECT_EQ(y.scalar_type(), GetParam().type);
  EXPECT_LE((y.to(at::kDouble) - truth).abs().max().item<double>(), bound(truth, kHidden + kFfn, GetParam().type));
  EXPECT_TRUE(y[4].eq(0).all().item<bool>());

  const auto seed = at::randn(truth.sizes(), at::kDouble).to(GetParam().type);
  const auto wanted = torch::autograd::grad({truth}, leaves(), {seed.to(at::kDouble)});
  const auto got = torch::autograd::grad({y}, inputs, {seed});
  for (size_t i = 0; i < wanted.size(); ++i)
    EXPECT_LE((got[i].to(at::kDouble) - wanted[i]).abs().max().item<double>(),
              bound(wanted[i], kHidden + kFfn + kTokens, GetParam().type))
        << "gradient " << i;
  EXPECT_TRUE(got[2][3].eq(0).all().item<bool>()) << "an expert without tokens gets zeros";
}

TEST_P(ExpertsTest, TheWeightBeforeDownChangesNothingButRounding) {
  const auto truth = naive();
  const auto inputs = in_type();
  const auto before = fused(inputs, true), after = fused(inputs);
  EXPECT_LE((before.to(at::kDouble) - truth).abs().max().item<double>(), bound(truth, kHidden + kFfn, GetParam().type));
  EXPECT_FALSE(at::equal(before, after));  // it does round at another place
  const auto seed = at::randn(truth.sizes(), at::kDouble).to(GetParam().type);
  const auto wanted = torch::autograd::grad({after}, inputs, {seed}), got = torch::autograd::grad({before}, inputs, {seed});
  for (size_t i = 0; i < wanted.size(); ++i) EXPECT_TRUE(at::equal(got[i], wanted[i])) << "gradient " << i;
}

TEST_P(ExpertsTest, GivesTheSameBitsFromRunToRun) {
  const auto run = [&] {
    const auto inputs = in_type();
    const auto y = fused(inputs);
    auto all = torch::autograd::grad({y}, inputs, {at::ones_like(y)});
    all.push_back(y);
    return all;
  };
  const auto first = run(), second = run();
  for (size_t i = 0; i < first.size(); ++i) EXPECT_TRUE(at::equal(first[i], second[i])) << i;
}

INSTANTIATE_TEST_SUITE_P(All, ExpertsTest, ::testing::ValuesIn(cases()), name_of);

struct Bank {
  at::Tensor up, down;
  ExpertWeights weights() const { return {{up}, {down}}; }
};

Bank bank(int64_t experts, int64_t hidden, int64_t ffn) {
  return {at::randn({experts, ffn, hidden}), at::randn({experts, hidden, ffn})};
}

TEST(Experts, ServesNoTokensOneExpertAndEveryExpert) {
  at::manual_seed(8);
  const auto one = bank(1, 4, 3);
  EXPECT_EQ(fused_experts(at::empty({0, 4}), at::empty({0, 1}, at::kLong), at::empty({0, 1}), one.weights(),
                          Activation::relu)
                .sizes(),
            (at::IntArrayRef{0, 4}));
  const auto x = at::randn({3, 4});
  const auto by_hand = x.matmul(one.up[0].t()).relu().matmul(one.down[0].t());
  EXPECT_TRUE(at::allclose(
      fused_experts(x, at::zeros({3, 1}, at::kLong), at::ones({3, 1}), one.weights(), Activation::relu), by_hand));
  EXPECT_TRUE(at::allclose(feed_forward(x.view({3, 1, 4}), one.up[0], one.down[0], Activation::relu).view({3, 4}),
                           by_hand));
  const auto all = bank(3, 4, 3);  // top_k = experts
  const auto y = fused_experts(x, at::arange(3).expand({3, 3}), at::ones({3, 3}), all.weights(), Activation::relu);
  auto sum = at::zeros({3, 4});
  for (int64_t e = 0; e < 3; ++e) sum += x.matmul(all.up[e].t()).relu().matmul(all.down[e].t());
  EXPECT_TRUE(at::allclose(y, sum, 1e-5, 1e-5));
}

TEST(Experts, KeepsNanAndInfinityToTheirToken) {
  at::manual_seed(9);
  const auto weights = bank(2, 4, 3);
  auto x = at::randn({3, 4});
  const auto chosen = ids({{0, 1}, {1, 0}, {0, -1}});
  const auto clean = fused_experts(x, chosen, at::ones({3, 2}), weights.weights(), Activation::gelu);
  x[0].fill_(std::numeric_limits<float>::quiet_NaN());
  x[1][2] = std::numeric_limits<float>::infinity();
  const auto y = fused_experts(x, chosen, at::ones({3, 2}), weights.weights(), Activation::gelu);
  EXPECT_TRUE(y[0].isnan().all().item<bool>());
  EXPECT_TRUE(at::equal(y[2], clean[2]));
}

TEST(Experts, TakesStridedInputs) {
  at::manual_seed(10);
  const auto weights = bank(2, 4, 3);
  const auto chosen = ids({{0}, {1}, {0}});
  const auto x = at::randn({4, 3});
  const ExpertWeights strided{{weights.up.transpose(1, 2).contiguous().transpose(1, 2)},
                              {weights.down.transpose(0, 2).contiguous().transpose(0, 2)}};
  EXPECT_TRUE(at::allclose(fused_experts(x.t(), chosen, at::ones({3, 1}), strided, Activation::silu),
                           fused_experts(x.t().contiguous(), chosen, at::ones({3, 1}), weights.weights(), Activation::silu)));
}

TEST(Experts, RefusesASecondDerivativeInWords) {
  const auto weights = bank(2, 4, 3);
  const auto x = at::randn({3, 4}).set_requires_grad(true);
  const auto y = fused_experts(x, ids({{0}, {1}, {0}}), at::ones({3, 1}), weights.weights(), Activation::silu);
  const auto grad = torch::autograd::grad({y.square().sum()}, {x}, {}, true, /*create_graph=*/true)[0];
  EXPECT_SAYS(grad.sum().backward(), "turnout::experts: no second derivative");
}

TEST(ExpertsErrors, RefuseAPlanThatDoesNotBelongTogether) {
  const auto weights = bank(2, 4, 3);
  const auto x = at::randn({3, 4});
  const auto made = plan(ids({{0}, {1}, {0}}), 2);
  const auto run = [&](const DispatchPlan& given) {
    experts(x, at::ones({3, 1}), given, weights.weights(), Activation::relu);
  };
  const auto numbers = [](std::vector<int64_t> values) { return at::tensor(values, at::kLong); };
  EXPECT_SAYS(run({numbers({0, 2, 9}), made.token_of_row, made.row_of_choice}), "ends with 9 rows, expected at most 3");
  EXPECT_SAYS(run({numbers({0, 5, 3}), made.token_of_row, made.row_of_choice}), "falls from 5 to 3 at expert 1");
  EXPECT_SAYS(run({numbers({-7, 2, 3}), made.token_of_row, made.row_of_choice}), "begins with -7, expected 0");
  EXPECT_SAYS(run({made.expert_offsets, numbers({0, 99, 1}), made.row_of_choice}), "token_of_row[1] is 99");
  EXPECT_SAYS(run({made.expert_offsets, made.token_of_row, numbers({0, 1000, 1}).view({3, 1})}),
              "row_of_choice[1, 0] is 1000, which is neither -1 nor a row of that token");
  EXPECT_SAYS(run({made.expert_offsets, made.token_of_row, numbers({1, 0, 2}).view({3, 1})}), "row_of_choice[0, 0] is 1");
}

TEST(ExpertsErrors, NameTheArgumentWhatItGotAndWhatWasExpected) {
  const auto weights = bank(2, 4, 3);
  const auto chosen = ids({{0}, {1}, {0}});
  const auto ones = at::ones({3, 1});
  const auto x = at::randn({3, 4});
  const auto run = [&](const at::Tensor& given_x, const at::Tensor& given_ids, const at::Tensor& given_weights,
                       const ExpertWeights& experts, Activation activation = Activation::relu) {
    fused_experts(given_x, given_ids, given_weights, experts, activation);
  };
  EXPECT_SAYS(run(at::randn({4}), chosen, ones, weights.weights()), "x has shape [4], expected [tokens, hidden]");
  EXPECT_SAYS(run(at::randn({3, 5}), chosen, ones, weights.weights()), "up has shape [2, 3, 4], expected size 5");
  EXPECT_SAYS(run(x, ids({{0}, {2}, {0}}), ones, weights.weights()), "topk_ids[1, 0] is 2, expected -1 or 0 to 1");
  EXPECT_SAYS(run(x, ids({{0}, {1}}), ones, weights.weights()), "topk_ids has shape [2, 1], expected size 3");
  EXPECT_SAYS(run(x, chosen, at::ones({3, 2}), weights.weights()), "topk_weights has shape [3, 2]");
  EXPECT_SAYS(run(x, chosen, ones, {{weights.up.to(at::kDouble)}, {weights.down}}), "up is Double, expected Float");
  EXPECT_SAYS(run(x, chosen, ones, {{weights.up}, {at::randn({2, 4, 2})}}), "down has shape [2, 4, 2], expected size 3");
  EXPECT_SAYS(run(x, chosen, ones, {{weights.up}, {at::randn({3, 4, 3})}}), "down has shape [3, 4, 3], expected size 2");
  EXPECT_SAYS(run(x, chosen, ones, {{}, {weights.down}}), "up is empty");
  EXPECT_SAYS(run(x, chosen, ones, weights.weights(), Activation::swiglu), "up has 3 rows an expert, expected an even");
  EXPECT_SAYS(run(x, chosen, ones, {{weights.up}, {weights.down}, {at::randn({2, 4})}}), "up_bias has shape [2, 4]");
  EXPECT_SAYS(run(x.to(at::kLong), chosen, ones, weights.weights()), "x is Long");
  EXPECT_SAYS(parse_activation("gelus"), "activation is 'gelus', expected one of relu, gelu, gelu_tanh");
}

}  // namespace
}  // namespace turnout
