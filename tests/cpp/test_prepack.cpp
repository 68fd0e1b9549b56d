// Packed experts: they stand in for the weights, own what they hold, and say what does not fit.
#include "helpers.h"

#include <turnout/experts.h>

namespace turnout {
namespace {

struct Given {
  explicit Given(at::ScalarType type) {
    at::manual_seed(11);
    const auto random = [&](at::IntArrayRef shape) { return at::randn(shape).to(type); };
    x = random({9, 10});
    weights = {{random({3, 14, 10})}, {random({3, 10, 7})}, {random({3, 14})}, {random({3, 10})}};
  }
  at::Tensor x, topk_weights = at::rand({9, 2});
  at::Tensor topk_ids = testing::ids({{0, 2}, {2, -1}, {0, 2}, {-1, -1}, {2, 0}, {0, -1}, {2, 0}, {0, 2}, {2, 0}});
  ExpertWeights weights;
};

class Prepack : public ::testing::TestWithParam<at::ScalarType> {};

TEST_P(Prepack, StandsInForTheWeightsAndIsASnapshot) {
  Given given(GetParam());
  const auto expected = fused_experts(given.x, given.topk_ids, given.topk_weights, given.weights, Activation::geglu);
  const auto packed = prepack(given.weights, Activation::geglu);
  for (const auto* list : {&given.weights.up, &given.weights.down, &given.weights.up_bias, &given.weights.down_bias})
    (*list)[0].zero_();
  const auto y = fused_experts(given.x, given.topk_ids, given.topk_weights, packed);
  EXPECT_EQ(y.scalar_type(), GetParam());
  // sums of at most 10 + 7 + 2 terms in another order; bfloat16 may round h and y to the neighbour
  const double epsilon = GetParam() == at::kBFloat16 ? 0x1p-8 : GetParam() == at::kFloat ? 0x1p-24 : 0x1p-53;
  const double terms = GetParam() == at::kBFloat16 ? 4 : 40;
  EXPECT_LE((y - expected).abs().max().item<double>(), terms * epsilon * expected.abs().max().item<double>());
}

INSTANTIATE_TEST_SUITE_P(Types, Prepack, ::testing::Values(at::kFloat, at::kBFloat16, at::kDouble),
                         [](const auto& info) { return std::string(c10::toString(info.param)); });

TEST(PrepackErrors, NameWhatDoesNotFit) {
  Given given(at::kFloat);
  auto packed = prepack(given.weights, Activation::swiglu);
  const auto call = [&] { return fused_experts(given.x, given.topk_ids, given.topk_weights, packed); };
  given.x.requires_grad_();
  EXPECT_SAYS(call(), "experts_packed: x requires a gradient, but packed weights are for inference");
  given.x = given.x.detach();
  packed.layout = "neon f32 gated 3x10x7 v2";
  EXPECT_SAYS(call(), "experts_packed: packed has the layout 'neon f32 gated 3x10x7 v2', expected '");
  EXPECT_SAYS(prepack({}, Activation::swiglu), "turnout::prepack: up is empty");
  given.weights.down = {at::zeros({3, 10, 8})};
  EXPECT_SAYS(prepack(given.weights, Activation::swiglu), "down has shape [3, 10, 8]");
}

}  // namespace
}  // namespace turnout
