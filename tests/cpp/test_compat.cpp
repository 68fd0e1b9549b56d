// The layers of the five descriptions in C++: names, shapes, defaults and what each description promises. Parity with
// the published package is tested in Python, over the same ops.
#include "helpers.h"

#include <turnout/compat.h>

namespace turnout {
namespace {

using testing::numbers;

TEST(CompatMoeLayer, WeighsTheChosenExpertsBySoftmaxOfTheirLogits) {
  at::manual_seed(21);
  constexpr int64_t kHidden = 12, kExperts = 8;
  std::vector<torch::nn::AnyModule> experts;
  std::vector<torch::nn::Linear> linears;
  for (int64_t e = 0; e < kExperts; ++e) {
    linears.emplace_back(kHidden, kHidden);
    experts.emplace_back(linears.back());
  }
  torch::nn::Linear gate(kHidden, kExperts);
  compat::MoeLayer moe(experts, torch::nn::AnyModule(gate), 2);
  const auto inputs = at::randn({32, kHidden});
  const auto outputs = moe->forward(inputs);
  EXPECT_EQ(outputs.sizes(), inputs.sizes());
  auto truth = at::zeros_like(inputs);
  for (int64_t t = 0; t < 32; ++t) {
    const auto [logits, chosen] = gate->forward(inputs[t]).topk(2);
    const auto weights = logits.softmax(-1);
    for (int64_t k = 0; k < 2; ++k) truth[t] += weights[k] * linears[chosen[k].item<int64_t>()]->forward(inputs[t]);
  }
  EXPECT_TRUE(at::allclose(outputs, truth, 1e-5, 1e-6));
  outputs.sum().backward();
  for (const auto& linear : linears) EXPECT_TRUE(linear->weight.grad().defined());
  EXPECT_TRUE(gate->weight.grad().defined());
  EXPECT_SAYS(compat::MoeLayer(experts, torch::nn::AnyModule(gate), 9), "top_k is 9, expected 1 to 8");
  EXPECT_SAYS(moe->forward(at::randn({2, 3, kHidden})), "expected [batch · seq, hidden]");
}

TEST(CompatTopKRouter, GivesScoresThatSumToOne) {
  at::manual_seed(22);
  compat::TopKRouter router(16, compat::MoEConfig{8, 3});
  const auto [scores, indices] = router->forward(at::randn({2, 5, 16}));
  EXPECT_EQ(scores.sizes(), (at::IntArrayRef{2, 5, 3}));
  EXPECT_TRUE(at::allclose(scores.sum(-1), at::ones({2, 5})));
  EXPECT_TRUE(indices.ge(0).logical_and(indices.lt(8)).all().item<bool>());
  EXPECT_FALSE(router->gate->bias.defined());
}

TEST(CompatMixtureOfExperts, DropsSecondChoicesFirst) {
  at::manual_seed(23);
  compat::MoEConfig config{2, 2};
  config.expert_capacity = 3;
  compat::MixtureOfExperts moe(4, config);
  const auto x = at::randn({1, 4, 4});
  const auto [scores, indices] = moe->router->forward(x);
  auto truth = at::zeros({4, 4});
  std::vector<int64_t> taken(2, 0);
  for (int64_t k = 0; k < 2; ++k)
    for (int64_t t = 0; t < 4; ++t) {
      const auto e = indices[0][t][k].item<int64_t>();
      if (taken[e]++ >= 3) continue;
      truth[t] += scores[0][t][k] * moe->experts[e]->forward(x[0][t]);
    }
  EXPECT_TRUE(at::allclose(moe->forward(x)[0], truth, 1e-5, 1e-6));
  EXPECT_EQ((*moe->experts)[0]->weight().sizes(), (at::IntArrayRef{16, 4}));
}

TEST(CompatMoEConfig, NamesWhatIsInconsistent) {
  EXPECT_SAYS(compat::TopKRouter(0, compat::MoEConfig{}), "dim is 0, expected at least 1");
  EXPECT_SAYS(compat::TopKRouter(4, (compat::MoEConfig{2, 3})), "top_k is 3, expected 1 to 2 (num_experts)");
  EXPECT_SAYS(compat::TopKRouter(4, (compat::MoEConfig{0, 1})), "num_experts is 0");
  EXPECT_SAYS(compat::TopKRouter(4, (compat::MoEConfig{2, 1, 0.0})), "capacity_factor is 0");
  EXPECT_SAYS(compat::TopKRouter(4, (compat::MoEConfig{2, 1, 1.0, 0})), "expert_capacity is 0");
}

TEST(CompatSimpleMoELayer, PassesItsVerification) {
  compat::SimpleMoELayer moe_layer(32, 8, 2);
  const auto x = at::randn({4, 16, 32});
  const auto output = moe_layer->forward(x);
  ASSERT_EQ(output.sizes(), (at::IntArrayRef{4, 16, 32}));
  output.sum().backward();
  EXPECT_TRUE(moe_layer->gating_network->weight.grad().defined());
  for (const auto& expert : *moe_layer->experts) EXPECT_TRUE(expert->weight().grad().defined());
}

TEST(CompatSimpleMoELayer, GivesAlphaWhenBalanced) {
  compat::SimpleMoELayer layer(4, 4, 4, 0, 0.5);  // every expert takes every token
  layer->forward(at::randn({2, 3, 4}));
  EXPECT_NEAR(layer->load_balancing_loss.item<double>(), 0.5, 1e-6);
  std::vector<std::string> keys;
  for (const auto& parameter : layer->named_parameters()) keys.push_back(parameter.key());
  EXPECT_EQ(keys.size(), 2u + 4 * 4) << "each parameter is registered once";
}

TEST(CompatMoELayer, ReturnsOutputAndTheSwitchLoss) {
  at::manual_seed(24);
  compat::MoELayer moe(16, 4, 2);
  const auto x = at::randn({3, 8, 16});
  const auto [output, aux_loss] = moe->forward(x);
  EXPECT_EQ(output.sizes(), x.sizes());
  const auto logits = moe->moe->gate.forward<at::Tensor>(x.view({-1, 16}));
  const auto importance = logits.softmax(-1).mean(0);
  const auto load = at::one_hot(logits.argmax(-1), 4).to(at::kFloat).mean(0);
  EXPECT_NEAR(aux_loss.item<double>(), 4 * (importance * load).sum().item<double>(), 1e-5);
}

TEST(CompatMoELayer, BlendsWithADenseBlock) {
  at::manual_seed(25);
  compat::MoELayerOptions options{16, 4, 2};
  options.alpha = 0.5;
  compat::MoELayer layer(options);
  const auto x = at::randn({8, 16});
  const auto [output, aux_loss] = layer->forward(x);
  EXPECT_TRUE(at::allclose(output, 0.5 * layer->hybrid->dense->forward(x) + 0.5 * layer->moe->forward(x).output));
}

TEST(CompatTop2Gating, MakesTheTensorsOfTheDescription) {
  at::manual_seed(26);
  Top2GatingOptions options;
  options.hidden = 16;
  options.num_experts = 4;
  options.policy_train = SecondPolicy::all;
  compat::Top2Gating gating(options);
  const auto out = gating->forward(at::randn({2, 8, 16}));
  EXPECT_EQ(out.dispatch_tensor.sizes(), (at::IntArrayRef{2, 8, 4, 4}));  // max(4, floor(8 · 1.25 / 4))
  EXPECT_TRUE(at::equal(out.dispatch_tensor, out.combine_tensor.ne(0).to(at::kFloat)));
  EXPECT_TRUE(out.dispatch_tensor.sum({1}).le(1).all().item<bool>()) << "one token a place";
  gating->eval();
  EXPECT_EQ(gating->forward(at::randn({2, 16, 16})).dispatch_tensor.size(3), 8);  // floor(16 · 2 / 4)
}

TEST(CompatMoE, AgreesWithItsOwnDenseTensors) {
  at::manual_seed(27);
  compat::GShardOptions options;
  options.dim = 8;
  options.gating.policy_train = SecondPolicy::all;
  compat::MoE moe(options, 4);
  const auto x = at::randn({2, 12, 8});
  const auto [output, loss] = moe->forward(x);
  compat::Top2Gating gating(moe->gate->options);
  gating->w_gating.set_data(moe->gate->w_gating.detach());
  const auto tensors = gating->forward(x);
  const auto inputs = at::einsum("bnd,bnec->ebcd", {x, tensors.dispatch_tensor});
  const auto outputs = moe->experts->forward(inputs.reshape({4, -1, 8})).view(inputs.sizes());
  const auto truth = at::einsum("ebcd,bnec->bnd", {outputs, tensors.combine_tensor});
  EXPECT_TRUE(at::allclose(output, truth, 1e-5, 1e-6));
  EXPECT_NEAR(loss.item<double>(), 1e-2 * tensors.loss.item<double>(), 1e-7);
}

TEST(CompatHeirarchicalMoE, HasTheDefaultsOfTheDescriptionAndAGradientEverywhere) {
  at::manual_seed(28);
  compat::GShardOptions options;
  options.dim = 8;
  compat::HierarchicalMoE moe(options);
  EXPECT_EQ(moe->experts->w1.sizes(), (at::IntArrayRef{4, 4, 8, 32}));
  EXPECT_EQ(moe->layer->gate_inner->w_gating.sizes(), (at::IntArrayRef{4, 8, 4}));
  const auto [output, loss] = moe->forward(at::randn({2, 20, 8}));
  EXPECT_EQ(output.sizes(), (at::IntArrayRef{2, 20, 8}));
  (output.sum() + loss).backward();
  for (const auto& parameter : moe->named_parameters()) EXPECT_TRUE(parameter.value().grad().defined()) << parameter.key();
}

TEST(CompatExperts, ServeAnyNumberOfOuterAxes) {
  at::manual_seed(29);
  compat::Experts experts(4, std::vector<int64_t>{2, 3}, 5, Activation::gelu);
  const auto x = at::randn({2, 3, 7, 4});
  const auto hidden = at::gelu(at::einsum("...nd,...dh->...nh", {x, experts->w1}));
  EXPECT_TRUE(at::allclose(experts->forward(x), at::einsum("...nh,...hd->...nd", {hidden, experts->w2}), 1e-5, 1e-6));
  EXPECT_SAYS(experts->forward(at::randn({3, 2, 7, 4})), "turnout::compat::Experts: x has shape [3, 2, 7, 4]");
}

}  // namespace
}  // namespace turnout
