// Upcycling and shared experts: against the dense block itself, and against sums written out.
#include "helpers.h"

#include <turnout/upcycle.h>

namespace turnout {
namespace {

using testing::bound;

constexpr int64_t kHidden = 24, kFfn = 16;

// The dense block, its layer of experts, and how far apart their outputs are.
void expect_same(Activation activation, bool bias, const MoEOptions& options, int64_t slices, at::ScalarType type) {
  FeedForward dense(FeedForwardOptions{kHidden, kFfn, activation, bias});
  dense->to(type);
  MoE moe = upcycle(dense, options, slices);
  const auto x = at::randn({3, 11, kHidden}, at::TensorOptions(type));
  const auto out = moe->forward(x);
  const auto truth = dense->forward(x);
  EXPECT_EQ(out.output.scalar_type(), type);
  EXPECT_LE((out.output - truth).abs().max().item<double>(), bound(truth, kHidden + kFfn, type))
      << to_string(activation) << " slices " << slices << " weights " << to_string(options.router.weights);
  const auto copy = out.routing.topk_ids.div(slices, "floor").view({33, options.top_k / slices, slices});
  EXPECT_TRUE(copy.eq(copy.narrow(2, 0, 1)).all().item<bool>()) << "the choices are whole copies";
}

TEST(Upcycle, ComputesWhatTheDenseBlockDid) {
  at::manual_seed(21);
  for (const auto type : {at::kFloat, at::kDouble})
    for (const auto activation : {Activation::gelu, Activation::relu, Activation::swiglu})
      for (const bool bias : {false, true})
        for (const auto weights : {RouterWeights::normalized, RouterWeights::softmax_of_topk})
          for (const int64_t slices : {1, 2, 4, 8}) {
            MoEOptions options{.num_experts = 4 * slices, .top_k = 2 * slices, .router = {.weights = weights}};
            expect_same(activation, bias, options, slices, type);
          }
}

TEST(Upcycle, ProbabilitiesAddUpWhereLogitsAreEqual) {
  at::manual_seed(22);
  FeedForward dense(FeedForwardOptions{kHidden, kFfn, Activation::swiglu, true});
  MoEOptions options{.num_experts = 12, .top_k = 4, .router = {.weights = RouterWeights::probability}};
  MoE moe = upcycle(dense, options, 4);
  {
    const at::NoGradGuard no_grad;
    moe->gate.get<torch::nn::Linear>()->weight.zero_();
  }
  const auto x = at::randn({9, kHidden});
  const auto truth = dense->forward(x);
  EXPECT_LE((moe->forward(x).output - truth).abs().max().item<double>(), bound(truth, kHidden + kFfn, at::kFloat));
}

TEST(Upcycle, CutsByHand) {
  // ffn 4 in two slices: gate rows 0 1 | 2 3, up rows 4 5 | 6 7.
  FeedForward dense(FeedForwardOptions{1, 4, Activation::swiglu, true});
  {
    const at::NoGradGuard no_grad;
    dense->up.copy_(at::arange(8.0).view({8, 1}));
    dense->up_bias.copy_(at::arange(8.0));
    dense->down.copy_(at::arange(4.0).view({1, 4}));
    dense->down_bias.fill_(3);
  }
  MoE moe = upcycle(dense, MoEOptions{.num_experts = 4, .top_k = 2, .gate_bias = true}, 2);
  const auto bank = std::dynamic_pointer_cast<FeedForwardBankImpl>(moe->experts);
  const std::vector<int64_t> rows{0, 1, 4, 5, 2, 3, 6, 7, 0, 1, 4, 5, 2, 3, 6, 7};
  EXPECT_EQ(testing::numbers(bank->up), rows);
  EXPECT_EQ(testing::numbers(bank->up_bias), rows);
  EXPECT_EQ(testing::numbers(bank->down), (std::vector<int64_t>{0, 2, 4, 6, 0, 2, 4, 6}));  // twice: weights are halves
  EXPECT_EQ(testing::numbers(bank->down_bias), (std::vector<int64_t>{3, 3, 3, 3}));
  for (const auto& parameter : moe->gate.ptr()->parameters()) {
    EXPECT_TRUE(at::equal(parameter[0], parameter[1]));
    EXPECT_TRUE(at::equal(parameter[2], parameter[3]));
    EXPECT_FALSE(at::equal(parameter[1], parameter[2]));
  }
}

TEST(Upcycle, OwnsItsWeightsAndTrains) {
  FeedForward dense(FeedForwardOptions{6, 4, Activation::gelu, true});
  MoE moe = upcycle(dense, MoEOptions{.num_experts = 2, .top_k = 1});
  const auto out = moe->forward(at::randn({5, 6}));
  (out.output.sum() + out.aux_loss).backward();
  for (const auto& parameter : moe->named_parameters())
    EXPECT_TRUE(parameter.value().grad().defined()) << parameter.key();
  EXPECT_FALSE(dense->up.grad().defined());
}

TEST(Upcycle, NamesImpossibleOptions) {
  FeedForward dense(FeedForwardOptions{6, 4});
  const auto with = [&](MoEOptions options, int64_t slices) { upcycle(dense, options, slices); };
  EXPECT_SAYS(with({.num_experts = 6, .top_k = 4}, 4), "num_experts is 6, expected a multiple of 4 (slices)");
  EXPECT_SAYS(with({.num_experts = 8, .top_k = 2}, 4), "top_k is 2, expected a multiple of 4");
  EXPECT_SAYS(with({.num_experts = 3, .top_k = 3}, 3), "ffn of the dense block is 4");
  EXPECT_SAYS(with({.num_experts = 2, .top_k = 1}, 0), "slices is 0");
  EXPECT_SAYS(with({.num_experts = 2, .top_k = 1, .shared = {.ffn = 4}}, 1), "shared.ffn is 4");
  EXPECT_SAYS(with({.num_experts = 2, .top_k = 1, .capacity = {.factor = 1}}, 1), "capacity is limited");
}

MoEOptions with_shared(bool gated) {
  return {.hidden = 6, .ffn = 5, .num_experts = 4, .top_k = 2, .activation = Activation::swiglu, .bias = false,
          .shared = {.ffn = 7, .gated = gated}};
}

TEST(SharedExpert, IsAddedToTheChosenOnes) {
  at::manual_seed(23);
  for (const bool gated : {false, true}) {
    MoE moe(with_shared(gated));
    MoE alone(MoEOptions{.hidden = 6, .ffn = 5, .num_experts = 4, .top_k = 2}, moe->gate, moe->experts);
    const auto x = at::randn({2, 3, 6});
    const auto out = moe->forward(x).output;
    auto truth = alone->forward(x).output.clone();
    for (int64_t t = 0; t < 6; ++t) {
      const auto row = x.view({6, 6})[t];
      const auto y = testing::naive_expert(row, moe->shared->up, moe->shared->down, {}, {}, Activation::swiglu);
      truth.view({6, 6})[t] += gated ? y / (1 + (-moe->shared_gate->weight.mv(row)).exp()) : y;
    }
    EXPECT_LE((out - truth).abs().max().item<double>(), bound(truth, 13, at::kFloat));
    out.sum().backward();
    EXPECT_TRUE(moe->shared->up.grad().defined());
    EXPECT_EQ(gated, !moe->shared_gate.is_empty());
    const auto names = moe->named_parameters();
    EXPECT_TRUE(names.contains("shared.up") && names.contains("shared.down"));
    EXPECT_EQ(names.contains("shared_gate.weight"), gated);
  }
}

TEST(SharedExpert, ServesNoTokensAndNamesImpossibleOptions) {
  EXPECT_EQ(MoE(with_shared(true))->forward(at::empty({0, 6})).output.sizes(), (at::IntArrayRef{0, 6}));
  auto options = with_shared(true);
  options.shared.ffn = -1;
  EXPECT_SAYS(MoE moe(options), "shared.ffn is -1");
  options.shared.ffn = 0;
  EXPECT_SAYS(MoE moe(options), "shared.gated is set, but shared.ffn is 0");
}

}  // namespace
}  // namespace turnout
