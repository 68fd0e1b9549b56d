// Selections of MoE other than top-k: experts that pick, Sinkhorn, hashing; and that the selection bias keeps its type.
#include "helpers.h"

#include <turnout/gate.h>
#include <turnout/moe.h>
#include <turnout/transformer.h>
#include <turnout/upcycle.h>

namespace turnout {
namespace {

using testing::numbers;

MoEOptions with(Selection selection, int64_t top_k = 2) {
  MoEOptions options;
  options.hidden = 6;
  options.ffn = 5;
  options.num_experts = 4;
  options.top_k = top_k;
  options.selection = selection;
  return options;
}

// Σ over experts of weight · expert(x), for what a routing sends.
at::Tensor naive_output(const MoE& moe, const at::Tensor& x_TD, const Routing& routing) {
  const auto bank = std::dynamic_pointer_cast<FeedForwardBankImpl>(moe->experts);
  auto y = at::zeros_like(x_TD);
  for (int64_t t = 0; t < x_TD.size(0); ++t)
    for (int64_t k = 0; k < routing.topk_ids.size(1); ++k) {
      const auto e = routing.topk_ids[t][k].item<int64_t>();
      if (e < 0) continue;
      y[t] += routing.topk_weights[t][k] * testing::naive_expert(x_TD[t], bank->up[e], bank->down[e], bank->up_bias[e],
                                                                 bank->down_bias[e], moe->options.activation);
    }
  return y;
}

at::Tensor logits_of(const MoE& moe, const at::Tensor& x) {
  return gate_logits(x.reshape({-1, 6}), moe->gate.get<torch::nn::Linear>()->weight);
}

TEST(Selection, ExpertsPickTheirBestTokensAndRunOnThem) {
  at::manual_seed(21);
  MoE moe(with(Selection::expert_choice));
  const auto x = at::randn({2, 6, 6});
  const auto out = moe->forward(x);
  const auto scores = logits_of(moe, x).softmax(-1);
  for (int64_t e = 0; e < 4; ++e) {  // 2 · 12 / 4 places
    const auto best = std::get<0>(std::get<1>(scores.select(1, e).topk(6)).sort());
    EXPECT_EQ(numbers(out.routing.topk_ids.select(1, e).eq(e).nonzero()), numbers(best));
  }
  EXPECT_EQ(numbers(out.plan.tokens_per_expert()), (std::vector<int64_t>{6, 6, 6, 6}));
  EXPECT_EQ(out.dropped.item<int64_t>(), 0);
  const at::NoGradGuard no_grad;
  const auto truth = naive_output(moe, x.view({-1, 6}), out.routing);
  EXPECT_LE((out.output.view({-1, 6}) - truth).abs().max().item<double>(), testing::bound(truth, 11, at::kFloat));
}

TEST(Selection, ExpertsPickWithinSequencesAndPassPaddingBy) {
  auto options = with(Selection::expert_choice);
  options.capacity.fixed = 2;
  options.capacity.per_sequence = true;
  MoE moe(options);
  const auto x = at::randn({3, 4, 6});
  const auto mask = at::tensor({1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0}).to(at::kBool).view({3, 4});
  const auto out = moe->forward(x, mask);
  EXPECT_EQ(numbers(out.plan.tokens_per_expert()), (std::vector<int64_t>{3, 3, 3, 3}));  // 2, 1 and 0
  EXPECT_TRUE(out.output.index({mask.logical_not()}).eq(0).all().item<bool>());
  options.capacity.fixed = 9;  // more than there are
  EXPECT_EQ(numbers(MoE(options)->forward(x).plan.tokens_per_expert()), (std::vector<int64_t>{12, 12, 12, 12}));
  EXPECT_EQ(MoE(options)->forward(at::empty({0, 4, 6})).output.sizes(), (at::IntArrayRef{0, 4, 6}));
}

TEST(Selection, SinkhornBalancesInTrainingAlone) {
  at::manual_seed(22);
  MoE moe(with(Selection::sinkhorn));
  const auto x = at::randn({64, 6});
  const auto logits = logits_of(moe, x);
  const auto trained = moe->forward(x);
  EXPECT_TRUE(at::equal(trained.routing.topk_ids, route_sinkhorn(logits, 2).topk_ids));
  moe->eval();
  const auto free = moe->forward(x);
  EXPECT_TRUE(at::equal(free.routing.topk_ids, std::get<1>(logits.topk(2))));
  EXPECT_FALSE(at::equal(trained.routing.topk_ids, free.routing.topk_ids));
}

TEST(Selection, SinkhornPassesPaddingBy) {
  const auto logits = at::randn({16, 4});
  const auto mask = at::arange(16).lt(12);
  const auto padded = route_sinkhorn(logits, 2, /*balanced=*/true, mask);
  EXPECT_TRUE(at::equal(padded.topk_ids.narrow(0, 0, 12), route_sinkhorn(logits.narrow(0, 0, 12), 2).topk_ids));
  EXPECT_TRUE(padded.topk_ids.narrow(0, 12, 4).eq(-1).all().item<bool>());
  EXPECT_TRUE(padded.topk_weights.narrow(0, 12, 4).eq(0).all().item<bool>());
}

TEST(Selection, HashGoesByTheWords) {
  auto options = with(Selection::hash, 1);
  options.hash_seed = 3;
  MoE moe(options);
  const auto words = at::tensor({5, 7, 5, 9}).view({2, 2});
  const auto x = at::randn({2, 2, 6});
  const auto out = moe->forward(x, {}, words);
  EXPECT_TRUE(at::equal(out.routing.topk_ids, hash_ids(words, 4, 1, 3)));
  EXPECT_TRUE(out.routing.topk_weights.eq(1).all().item<bool>());
  const auto masked = moe->forward(x, words.ne(5), words).routing.topk_ids;
  EXPECT_EQ(numbers(masked.lt(0)), (std::vector<int64_t>{1, 0, 1, 0}));
  EXPECT_SAYS(moe->forward(x), "token_ids is not defined, expected the words");
  EXPECT_SAYS(moe->forward(x, {}, words[0]), "token_ids has shape [2], expected [2, 2] (x without hidden)");
}

TEST(Selection, TakesNoBalancingLoss) {
  for (const auto selection : {Selection::expert_choice, Selection::sinkhorn, Selection::hash}) {
    auto options = with(selection);
    options.z_coefficient = 0.5;
    MoE moe(options);
    const auto x = at::randn({8, 6});
    const auto out = moe->forward(x, {}, at::arange(8));
    EXPECT_FALSE(out.balance_loss.defined());
    EXPECT_TRUE(at::allclose(out.aux_loss, 0.5 * z_loss(logits_of(moe, x))));
    (out.output.sum() + out.aux_loss).backward();
    for (const auto& parameter : moe->named_parameters())
      EXPECT_TRUE(parameter.value().grad().defined()) << parameter.key();
  }
}

TEST(Selection, RefusesWhatDoesNotGoTogether) {
  auto biased = with(Selection::hash);
  biased.selection_bias = true;
  EXPECT_SAYS(MoE{biased}, "selection_bias is set, but selection is hash, expected topk");
  auto grouped = with(Selection::hash);
  grouped.router.groups = 2;
  EXPECT_SAYS(MoE{grouped}, "router.groups is 2, expected 1 with selection hash");
  EXPECT_SAYS(parse_selection("best"), "selection is 'best', expected one of topk, expert_choice, sinkhorn, hash");
  const Group two{.rank = 0, .size = 2, .members = {0, 1}};
  for (const auto selection : {Selection::expert_choice, Selection::sinkhorn})
    EXPECT_SAYS(MoE(with(selection))->join(two), "expected one that looks at no token of other ranks");
  MoE(with(Selection::hash))->join(two);
  auto by_sequence = with(Selection::expert_choice);
  by_sequence.capacity.per_sequence = true;
  MoE(by_sequence)->join(two);
  EXPECT_SAYS(upcycle(FeedForward(FeedForwardOptions{6, 5}), with(Selection::sinkhorn)), "selection is sinkhorn");
  LanguageModelOptions model;
  model.kind = BlockKind::moe;
  model.moe.num_experts = 4;
  model.moe.ffn = 8;
  model.moe.selection = Selection::expert_choice;
  EXPECT_SAYS(check(model), "selection is expert_choice, expected topk: a language model");
}

struct Holder : torch::nn::Module {
  explicit Holder(const MoE& moe) { register_module("moe", moe); }
};

TEST(MoE, KeepsItsSelectionBiasInFloat32) {
  auto options = with(Selection::topk);
  options.selection_bias = true;
  MoE moe(options);
  const auto bias = at::tensor({1.001, 0.0, -1.001, 0.5}).to(at::kFloat);
  moe->selection_bias.copy_(bias);
  Holder model(moe);
  const auto kept = [&] {
    return moe->selection_bias.scalar_type() == at::kFloat && at::equal(moe->selection_bias, bias) &&
           at::equal(moe->named_buffers()["selection_bias"], bias);
  };
  model.to(at::kBFloat16);
  EXPECT_TRUE(kept());
  EXPECT_EQ(moe->gate.get<torch::nn::Linear>()->weight.scalar_type(), at::kBFloat16);
  model.to(at::Device(at::kCPU), at::kHalf);
  EXPECT_TRUE(kept());
  model.to(at::Device(at::kCPU));
  EXPECT_TRUE(kept());
}

}  // namespace
}  // namespace turnout
