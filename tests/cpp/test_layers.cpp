// Layers: against a naive loop over tokens, capacity and drops by hand, losses that scale, and impossible options.
#include "helpers.h"

#include <turnout/gate.h>
#include <turnout/hierarchical_moe.h>
#include <turnout/moe.h>
#include <turnout/router_variants.h>
#include <turnout/slots.h>


namespace turnout {
namespace {

using testing::numbers;

MoEOptions small() {
  MoEOptions options;
  options.hidden = 6;
  options.ffn = 5;
  options.num_experts = 4;
  options.top_k = 2;
  return options;
}

at::Tensor naive_moe(const MoE& moe, const at::Tensor& x_TD) {
  auto gate = moe->gate.get<torch::nn::Linear>();
  const auto bank = std::dynamic_pointer_cast<FeedForwardBankImpl>(moe->experts);
  auto y = at::zeros_like(x_TD);
  for (int64_t t = 0; t < x_TD.size(0); ++t) {
    const auto probabilities = gate->forward(x_TD[t]).softmax(-1);
    const auto [weights, chosen] = probabilities.topk(moe->options.top_k);
    for (int64_t k = 0; k < moe->options.top_k; ++k) {
      const auto e = chosen[k].item<int64_t>();
      y[t] += weights[k] / weights.sum() *
              testing::naive_expert(x_TD[t], bank->up[e], bank->down[e], bank->up_bias[e], bank->down_bias[e],
                                    moe->options.activation);
    }
  }
  return y;
}

TEST(MoE, AgreesWithALoopOverTokensForAnyLeadingShape) {
  at::manual_seed(11);
  for (const auto activation : {Activation::gelu, Activation::swiglu}) {
    auto options = small();
    options.activation = activation;
    MoE moe(options);
    const auto x = at::randn({2, 3, 4, 6});
    const auto out = moe->forward(x);
    EXPECT_EQ(out.output.sizes(), x.sizes());
    const auto truth = naive_moe(moe, x.view({-1, 6}));
    EXPECT_LE((out.output.view({-1, 6}) - truth).abs().max().item<double>(), testing::bound(truth, 11, at::kFloat));
    EXPECT_EQ(out.dropped.item<int64_t>(), 0);
    EXPECT_EQ(numbers(out.plan.tokens_per_expert().sum()), (std::vector<int64_t>{48}));
  }
}

TEST(MoE, GivesEveryParameterAGradient) {
  at::manual_seed(12);
  auto options = small();
  options.z_coefficient = 1e-3;
  MoE moe(options);
  const auto x = at::randn({1, 6}).set_requires_grad(true);  // two of four experts get no token
  const auto out = moe->forward(x);
  (out.output.sum() + out.aux_loss).backward();
  for (const auto& parameter : moe->named_parameters())
    EXPECT_TRUE(parameter.value().grad().defined()) << parameter.key();
  EXPECT_TRUE(x.grad().defined());
}

TEST(MoE, AddsTheLossesItIsAskedFor) {
  at::manual_seed(13);
  auto options = small();
  options.balance_coefficient = 0.5;
  options.z_coefficient = 0.25;
  MoE moe(options);
  const auto x = at::randn({9, 6});
  const auto out = moe->forward(x);
  const auto logits = moe->gate.forward<at::Tensor>(x);
  const auto wanted = 0.5 * balance_loss(out.routing.scores, out.routing.topk_ids) + 0.25 * z_loss(logits);
  EXPECT_TRUE(at::allclose(out.aux_loss, wanted));
  options.balance_coefficient = options.z_coefficient = 0;
  MoE silent(options);
  EXPECT_FALSE(silent->forward(x).aux_loss.requires_grad());
}

TEST(MoE, DropsByCapacityOverTheBatchOrEachSequence) {
  auto options = small();
  options.top_k = 1;
  options.router.weights = RouterWeights::probability;
  options.capacity.fixed = 2;
  MoE moe(options);
  {
    const at::NoGradGuard no_grad;
    moe->gate.get<torch::nn::Linear>()->weight.zero_();  // every token ties: expert 0
  }
  const auto x = at::ones({2, 3, 6});
  const auto batch = moe->forward(x);
  EXPECT_EQ(batch.dropped.item<int64_t>(), 4);
  EXPECT_TRUE(batch.output.view({6, 6}).narrow(0, 2, 4).eq(0).all().item<bool>());
  EXPECT_FALSE(batch.output.view({6, 6}).narrow(0, 0, 2).eq(0).any().item<bool>());
  options.capacity.per_sequence = true;
  MoE per_sequence(options);
  per_sequence->gate.get<torch::nn::Linear>()->weight.set_data(at::zeros({4, 6}));
  const auto each = per_sequence->forward(x);
  EXPECT_EQ(each.dropped.item<int64_t>(), 2);
  EXPECT_EQ(numbers(each.routing.topk_ids), (std::vector<int64_t>{0, 0, -1, 0, 0, -1}));
  EXPECT_SAYS(per_sequence->forward(at::ones({6})), "expected [..., sequence, hidden]");
}

TEST(MoE, ChoosesByItsSelectionBias) {
  auto options = small();
  options.selection_bias = true;
  options.router = {.score = ScoreFunction::sigmoid, .weights = RouterWeights::probability};
  MoE moe(options);
  const auto x = at::randn({9, 6});
  const auto free = moe->forward(x);
  ASSERT_EQ(moe->named_buffers()["selection_bias"].sizes(), (at::IntArrayRef{4}));
  moe->selection_bias.copy_(at::tensor({0., 0., 2., 1.}));
  const auto steered = moe->forward(x);
  EXPECT_TRUE(steered.routing.topk_ids.eq(testing::ids({{2, 3}})).all().item<bool>());
  const auto wanted = moe->gate.forward<at::Tensor>(x).sigmoid().narrow(1, 2, 2);
  EXPECT_TRUE(at::allclose(steered.routing.topk_weights, wanted, /*rtol=*/4 * 1.2e-7, /*atol=*/0));
  EXPECT_TRUE(at::equal(steered.routing.scores, free.routing.scores));
}

TEST(MoE, PaddingTakesNoPlaceAndCountsInNoLoss) {
  auto options = small();
  options.z_coefficient = 1;
  options.capacity.fixed = 2;
  MoE moe(options);
  const auto x = at::randn({2, 4, 6});
  const auto mask = at::tensor({1, 1, 0, 0, 0, 1, 1, 0}).to(at::kBool).view({2, 4});
  const auto padded = moe->forward(x, mask);
  const auto real = moe->forward(x.index({mask}));
  EXPECT_TRUE(at::allclose(padded.output.index({mask}), real.output, 1e-5, 1e-6));
  EXPECT_TRUE(padded.output.index({mask.logical_not()}).eq(0).all().item<bool>());
  EXPECT_TRUE(at::allclose(padded.aux_loss, real.aux_loss, 1e-5));
  EXPECT_TRUE(at::equal(padded.dropped, real.dropped));
  EXPECT_SAYS(moe->forward(x, mask[0]), "token_mask has shape [4], expected [2, 4] (x without hidden)");
}

TEST(MoE, NoiseAndJitterActInTrainingAlone) {
  auto options = small();
  options.noisy = true;
  options.jitter = 0.5;
  MoE moe(options);
  const auto x = at::randn({9, 6});
  moe->eval();
  const auto weight = moe->gate.get<torch::nn::Linear>()->weight;
  EXPECT_TRUE(at::equal(moe->forward(x).routing.scores, route(gate_logits(x, weight), 2).scores));
  moe->train();
  at::manual_seed(6);
  const auto seen = moe->forward(x).routing.scores;
  at::manual_seed(6);
  const auto jittered = jitter(x, 0.5);
  const auto noisy = noisy_logits(gate_logits(jittered, weight), at::zeros({9, 4}));
  EXPECT_TRUE(at::equal(seen, route(noisy.logits, 2).scores));
  EXPECT_EQ(moe->noise_gate->weight.sizes(), (at::IntArrayRef{4, 6}));
  options.jitter = 1;
  EXPECT_SAYS(MoE{options}, "turnout::MoE: jitter is 1, expected 0 to below 1");
}

TEST(MoE, KeepsItsGateInTheTypeOfItsWeights) {
  at::manual_seed(16);
  MoE moe(small());
  moe->to(at::kBFloat16);
  const auto x = at::randn({20, 6}).to(at::kBFloat16);
  const auto& weight = moe->gate.get<torch::nn::Linear>()->weight;
  const auto error = [&](const at::Tensor& logits) {
    const auto scores = moe->forward(x).routing.scores;
    return (scores - logits.to(at::kFloat).softmax(-1)).abs().max().item<double>();
  };
  EXPECT_LT(error(at::linear(x, weight)), 1e-6);
  moe->gate.ptr()->to(at::kFloat);
  EXPECT_LT(error(at::linear(x.to(at::kFloat), weight)), 1e-6);
  EXPECT_GT(error(at::linear(x, weight.to(at::kBFloat16))), 1e-6);
  EXPECT_EQ(moe->forward(x).output.scalar_type(), at::kBFloat16);
}

TEST(MoE, ServesABatchWithoutTokensInEveryConfiguration) {
  for (const bool capped : {false, true}) {
    auto options = small();
    options.z_coefficient = 1;
    if (capped) options.capacity.factor = 1;
    MoE moe(options);
    const auto out = moe->forward(at::empty({0, 6}));
    EXPECT_EQ(out.output.sizes(), (at::IntArrayRef{0, 6}));
    EXPECT_EQ(out.aux_loss.item<double>(), 0);
    (out.output.sum() + out.aux_loss).backward();
  }
}

TEST(MoE, RunsAnyModulesByTheSamePlan) {
  at::manual_seed(14);
  auto options = small();
  MoE bank(options);
  const auto weights = std::dynamic_pointer_cast<FeedForwardBankImpl>(bank->experts);
  std::vector<torch::nn::AnyModule> modules;
  const at::NoGradGuard no_grad;
  for (int64_t e = 0; e < 4; ++e) {
    FeedForward expert(FeedForwardOptions{6, 5});
    expert->up.copy_(weights->up[e]);
    expert->down.copy_(weights->down[e]);
    expert->up_bias.copy_(weights->up_bias[e]);
    expert->down_bias.copy_(weights->down_bias[e]);
    modules.emplace_back(expert);
  }
  MoE list(options, bank->gate, ModuleExperts(modules).ptr());
  const auto x = at::randn({7, 6});
  EXPECT_TRUE(at::allclose(list->forward(x).output, bank->forward(x).output, 1e-5, 1e-6));
}

TEST(MoE, NamesTheExpertThatMakesAWrongShape) {
  std::vector<torch::nn::AnyModule> modules;
  for (int i = 0; i < 2; ++i) modules.emplace_back(torch::nn::Flatten(torch::nn::FlattenOptions().start_dim(0)));
  MoEOptions options;
  options.num_experts = 2;
  MoE moe(options, torch::nn::AnyModule(torch::nn::Linear(6, 2)), ModuleExperts(modules).ptr());
  EXPECT_SAYS(moe->forward(at::randn({3, 6})), "turnout::ModuleExperts: expert 0 made");
}

TEST(MoE, NamesImpossibleOptions) {
  const auto with = [](const std::function<void(MoEOptions&)>& change) {
    auto options = small();
    change(options);
    MoE moe(options);
  };
  EXPECT_SAYS(with([](auto& o) { o.hidden = 0; }), "turnout::MoE: hidden is 0, expected at least 1");
  EXPECT_SAYS(with([](auto& o) { o.ffn = -1; }), "ffn is -1");
  EXPECT_SAYS(with([](auto& o) { o.num_experts = 0; }), "num_experts is 0");
  EXPECT_SAYS(with([](auto& o) { o.top_k = 5; }), "top_k is 5, expected 1 to 4 (num_experts)");
  EXPECT_SAYS(with([](auto& o) { o.balance_coefficient = -1; }), "balance_coefficient is -1");
  EXPECT_SAYS(with([](auto& o) { o.capacity.factor = std::nan(""); }), "factor is nan");
  EXPECT_SAYS(MoE(small())->forward(at::randn({3, 5})), "gate_logits: weight has shape [4, 6], expected size 5");
  EXPECT_SAYS(FeedForward(FeedForwardOptions{3, 0}), "ffn is 0");
  EXPECT_SAYS(Hybrid(FeedForward(FeedForwardOptions{6, 5}), MoE(small()), 1.5), "alpha is 1.5, expected 0 to 1");
}

TEST(Hybrid, BlendsDenseAndMoE) {
  at::manual_seed(15);
  FeedForward dense(FeedForwardOptions{6, 5});
  MoE moe(small());
  Hybrid hybrid(dense, moe, 0.25);
  const auto x = at::randn({3, 6});
  EXPECT_TRUE(at::allclose(hybrid->forward(x).output, 0.25 * dense->forward(x) + 0.75 * moe->forward(x).output));
}

// The hierarchy written as the source writes it: dense tensors and einsum, from the gates of the layer.
at::Tensor einsum_hierarchy(HierarchicalMoE& layer, const at::Tensor& x) {
  const auto [outer, inner] = layer->options.num_experts;
  const auto tensors = [](const Top2GatingOutput& gated, at::IntArrayRef lead, int64_t experts) {
    auto made = dispatch_tensors(gated.routing.topk_ids, gated.routing.topk_weights, experts, gated.capacity,
                                 gated.group_size);
    auto shape = lead.vec();
    shape.insert(shape.end(), {experts, gated.capacity});
    return std::pair(made.dispatch.view(shape), made.combine.view(shape));
  };
  const auto first = layer->gate_outer->forward(x);
  const auto [dispatch_o, combine_o] = tensors(first, {x.size(0), x.size(1)}, outer);
  const auto in_o = at::einsum("bnd,bnec->ebcd", {x, dispatch_o});
  auto importance = combine_o.permute({2, 0, 3, 1}).sum(-1);
  importance = 0.5 * (importance.gt(0.5).to(at::kFloat) + importance.gt(0).to(at::kFloat));
  const auto second = layer->gate_inner->forward(in_o, importance);
  const auto [dispatch_i, combine_i] = tensors(second, {outer, x.size(0), first.capacity}, inner);
  const auto in_i = at::einsum("ebnd,ebnfc->efbcd", {in_o, dispatch_i});
  const auto bank = std::dynamic_pointer_cast<FeedForwardBankImpl>(layer->experts);
  const auto up = bank->up.view({outer, inner, -1, x.size(2)}), down = bank->down.view({outer, inner, x.size(2), -1});
  const auto out_i = at::einsum("efbch,efdh->efbcd", {at::einsum("efbcd,efhd->efbch", {in_i, up}).relu(), down});
  return at::einsum("ebcd,bnec->bnd", {at::einsum("efbcd,ebnfc->ebnd", {out_i, combine_i}), combine_o});
}

TEST(HierarchicalMoE, AgreesWithTheEinsumFormulation) {
  at::manual_seed(16);
  HierarchicalMoEOptions options;
  options.hidden = 8;
  options.ffn = 6;
  options.num_experts = {3, 4};
  options.gating.policy_train = options.gating.policy_eval = SecondPolicy::all;
  options.gating.capacity_factor_train = 0.7;  // drops, and slots that stay empty
  HierarchicalMoE layer(options);
  for (const int64_t tokens : {1, 7, 40}) {
    const auto x = at::randn({2, tokens, 8});
    const auto out = layer->forward(x);
    const auto truth = einsum_hierarchy(layer, x);
    EXPECT_LE((out.output - truth).abs().max().item<double>(), testing::bound(truth, 14, at::kFloat)) << tokens;
    if (tokens == 40) {
      EXPECT_GT(out.dropped.item<int64_t>(), 0);
    }
  }
  EXPECT_EQ(layer->forward(at::empty({2, 0, 8})).output.sizes(), (at::IntArrayRef{2, 0, 8}));
}

TEST(HierarchicalMoE, NamesImpossibleOptions) {
  HierarchicalMoEOptions options;
  options.hidden = 8;
  options.num_experts = {4, 1};
  EXPECT_SAYS(HierarchicalMoE moe(options), "num_experts of a level is 1, expected at least 2");
  options.num_experts = {2, 2};
  EXPECT_SAYS(HierarchicalMoE(options)->forward(at::randn({2, 8})), "expected [groups, tokens, hidden]");
  options.gating.capacity_factor_eval = 0;
  EXPECT_SAYS(HierarchicalMoE moe(options), "capacity_factor_eval is 0");
}

}  // namespace
}  // namespace turnout
