// The language model: what it may see, what it costs, how its options travel.
#include <turnout/transformer.h>

#include "helpers.h"
#include "tiny_models.h"

namespace turnout {
namespace {

using testing::tiny_model;
using testing::tiny_options;

at::Tensor some_tokens(int64_t batch, int64_t sequence) {
  return (at::arange(batch * sequence) * 37 % 251).view({batch, sequence});
}

struct Shape {
  BlockKind kind;
  LayerPattern pattern;
};

class EveryShape : public ::testing::TestWithParam<Shape> {
 protected:
  LanguageModelOptions options() const {
    LanguageModelOptions o = tiny_options(GetParam().kind);
    o.pattern = GetParam().pattern;
    return o;
  }
};

INSTANTIATE_TEST_SUITE_P(Kinds, EveryShape,
                         ::testing::Values(Shape{BlockKind::dense, LayerPattern::every},
                                           Shape{BlockKind::moe, LayerPattern::every},
                                           Shape{BlockKind::moe, LayerPattern::alternating},
                                           Shape{BlockKind::hybrid, LayerPattern::every},
                                           Shape{BlockKind::hybrid, LayerPattern::alternating}));

// In float64 a leak through the mask shows at 1e-3 or so; rounding of other GEMM shapes stays far below 1e-12.
TEST_P(EveryShape, LaterBytesNeverChangeEarlierLogits) {
  ByteLanguageModel model = tiny_model(options());
  model->to(at::kDouble);
  const at::Tensor tokens = some_tokens(2, 8);
  const at::Tensor before = model(tokens).logits;
  for (int64_t changed = 1; changed < 8; ++changed) {
    at::Tensor other = tokens.clone();
    other.select(1, changed).add_(1);
    const at::Tensor difference = (model(other).logits - before).abs();
    EXPECT_LT(difference.narrow(1, 0, changed).max().item<double>(), 1e-12) << "byte " << changed;
    EXPECT_GT(difference.select(1, changed).max().item<double>(), 1e-6) << "byte " << changed;
  }
}

TEST_P(EveryShape, PositionMatters) {
  ByteLanguageModel model = tiny_model(options());
  // The same bytes before the last one, in another order.
  const at::Tensor a = model(testing::ids({{1, 2, 3}})).logits[0][2];
  const at::Tensor b = model(testing::ids({{2, 1, 3}})).logits[0][2];
  EXPECT_GT((a - b).abs().max().item<double>(), 1e-5);
}

TEST_P(EveryShape, CountsEveryParameterOfTheModule) {
  for (const bool bias : {false, true}) {
    for (const Activation activation : {Activation::relu, Activation::swiglu}) {
      LanguageModelOptions o = options();
      o.bias = bias;
      o.activation = activation;
      o.tied_head = bias;
      o.moe.gate_bias = bias;
      if (bias) o.moe.shared = {.ffn = 5, .gated = activation == Activation::relu};
      ByteLanguageModel model(o);
      int64_t counted = 0;
      for (const at::Tensor& parameter : model->parameters()) counted += parameter.numel();
      EXPECT_EQ(count_parameters(o).total, counted);
    }
  }
}

TEST_P(EveryShape, SparseLayersReportAndDenseOnesDoNot) {
  ByteLanguageModel model = tiny_model(options());
  const LanguageModelOutput out = model(some_tokens(2, 8));
  double sum = 0;
  for (int64_t layer = 0; layer < 2; ++layer) {
    const auto& report = out.layers.at(static_cast<size_t>(layer));
    ASSERT_EQ(report.has_value(), options().is_sparse(layer)) << layer;
    if (!report) continue;
    EXPECT_EQ(report->plan.tokens_per_expert().sum().item<int64_t>(), 2 * 8 * 2);
    sum += report->aux_loss.item<double>();
  }
  EXPECT_NEAR(out.aux_loss.item<double>(), sum, 1e-6);
  EXPECT_EQ(out.logits.sizes(), at::IntArrayRef({2, 8, 256}));
}

TEST_P(EveryShape, EveryParameterGetsAGradient) {
  ByteLanguageModel model = tiny_model(options());
  const LanguageModelOutput out = model(some_tokens(2, 8));
  (out.logits.square().sum() + out.aux_loss).backward();
  for (const auto& item : model->named_parameters()) EXPECT_TRUE(item.value().grad().defined()) << item.key();
}

TEST_P(EveryShape, OptionsSurviveJson) {
  LanguageModelOptions o = options();
  o.moe.capacity.factor = 1.25;
  o.moe.capacity.order = DropOrder::score;
  o.moe.router.weights = RouterWeights::softmax_of_topk;
  o.alpha = 0.1;
  EXPECT_EQ(to_json(language_model_options_from_json(to_json(o))), to_json(o));
}

TEST(Flops, HandCount) {
  LanguageModelOptions o = tiny_options();
  o.activation = Activation::relu;
  const FlopCount count = flops_per_token(o);
  // Two layers. qkv 16·48, out 16·16 multiply-adds; a token of 8 sees 4.5 places on average: 2 products of 16 · 4.5.
  EXPECT_EQ(count.attention, 2 * 2 * (16 * 48 + 16 * 16 + 144));
  // Two experts of 16·12 up and 12·16 down.
  EXPECT_EQ(count.feed_forward, 2 * 2 * (2 * (16 * 12 + 12 * 16)));
  EXPECT_EQ(count.gate, 2 * 2 * 16 * 4);
  EXPECT_EQ(count.head, 2 * 16 * 256);
  EXPECT_EQ(count.total(), count.attention + count.feed_forward + count.gate + count.head);
  o.activation = Activation::swiglu;
  EXPECT_EQ(flops_per_token(o).feed_forward, 2 * 2 * (2 * 3 * 16 * 12));
  o.moe.shared = {.ffn = 5, .gated = true};
  EXPECT_EQ(flops_per_token(o).feed_forward, 2 * 2 * (2 * 3 * 16 * 12 + 3 * 16 * 5));
  EXPECT_EQ(flops_per_token(o).gate, 2 * 2 * 16 * (4 + 1));
}

TEST(Flops, ActiveParametersLeaveOutIdleExperts) {
  const LanguageModelOptions o = tiny_options();
  const ParameterCount count = count_parameters(o);
  // 2 of 4 experts idle in each of 2 layers.
  EXPECT_EQ(count.total - count.active, 2 * 2 * (2 * 16 * 12));
  const ParameterCount dense = count_parameters(tiny_options(BlockKind::dense));
  EXPECT_EQ(dense.total, dense.active);
}

TEST(Twin, CostsTheSame) {
  const LanguageModelOptions o = tiny_options();
  EXPECT_EQ(dense_twin(o).ffn, 2 * 12 + 4 / 2);
  EXPECT_EQ(flops_per_token(dense_twin(o)).total(), flops_per_token(o).total());
}

TEST(Twin, IsNeverCheaperAndAtMostOneUnitOfWidthDearer) {
  for (const Activation activation : {Activation::gelu, Activation::swiglu}) {
    for (const BlockKind kind : {BlockKind::moe, BlockKind::hybrid}) {
      for (const LayerPattern pattern : {LayerPattern::every, LayerPattern::alternating}) {
        for (const int64_t experts : {3, 4, 7, 16}) {
          LanguageModelOptions o = tiny_options(kind);
          o.activation = activation;
          o.pattern = pattern;
          o.layers = 3;
          o.moe.num_experts = experts;
          const int64_t excess = flops_per_token(dense_twin(o)).total() - flops_per_token(o).total();
          EXPECT_GE(excess, 0);
          EXPECT_LT(excess, o.layers * feed_forward_flops(o.hidden, 1, activation));
        }
      }
    }
  }
}

TEST(Options, ImpossibleOnesAreNamed) {
  const auto refused = [](auto change) {
    LanguageModelOptions o = tiny_options();
    change(o);
    return testing::message_of([&] { check(o); });
  };
  const auto says = [](const std::string& message, const char* words) {
    EXPECT_NE(message.find(words), std::string::npos) << message;
  };
  says(refused([](auto& o) { o.layers = 0; }), "layers is 0");
  says(refused([](auto& o) { o.hidden = 18; }), "hidden is 18, expected a multiple of 2 · heads = 4");
  says(refused([](auto& o) { o.context = -1; }), "context is -1");
  says(refused([](auto& o) { o.alpha = 1.5; }), "alpha is 1.5");
  says(refused([](auto& o) { o.moe.top_k = 5; }), "top_k is 5, expected 1 to 4 (num_experts)");
  says(refused([](auto& o) { o.moe.num_experts = 0; }), "experts is 0");
  says(refused([](auto& o) { o.hidden = int64_t{1} << 40; }), "hidden is 1099511627776");
  says(refused([](auto& o) { o.moe.balance_coefficient = -1; }), "balance_coefficient is -1");
  says(refused([](auto& o) { o.moe.capacity.factor = -2; }), "-2");
  says(testing::message_of([] { parse_block_kind("sparse"); }), "'sparse', expected one of dense, moe, hybrid");
}

TEST(Options, ForeignJsonIsNamed) {
  std::string json = to_json(tiny_options());
  EXPECT_SAYS(language_model_options_from_json("{"), "not valid JSON");
  EXPECT_SAYS(language_model_options_from_json("[]"), "not a JSON object");
  EXPECT_SAYS(language_model_options_from_json("{}"), "model.vocabulary is missing");
  std::string other = json;
  other.replace(other.find("\"layers\": 2"), 11, "\"layers\": \"2\"");
  EXPECT_SAYS(language_model_options_from_json(other), "model.layers is \"2\", expected a whole number");
  other = json;
  other.insert(1, "\"colour\": 1,");
  EXPECT_SAYS(language_model_options_from_json(other), "model.colour is unknown");
}

TEST(Model, BadTokensAreNamed) {
  ByteLanguageModel model = tiny_model(tiny_options());
  EXPECT_SAYS(model(at::zeros({8}, at::kLong)), "1-dimensional, expected [batch, sequence]");
  EXPECT_SAYS(model(at::zeros({1, 8})), "expected int64");
  EXPECT_SAYS(model(at::zeros({1, 9}, at::kLong)), "a sequence of 9, expected 1 to the context, 8");
  EXPECT_SAYS(model(at::full({1, 2}, 256, at::kLong)), "expected 0 to 255");
  EXPECT_SAYS(model(at::full({1, 2}, -1, at::kLong)), "from -1");
}

TEST(Model, FirstNonFiniteLayerIsFound) {
  const at::Tensor tokens = some_tokens(1, 4);
  const at::NoGradGuard no_grad;
  ByteLanguageModel model = tiny_model(tiny_options());
  EXPECT_EQ(model->first_non_finite(tokens), "");
  model->norm->weight.fill_(NAN);
  EXPECT_EQ(model->first_non_finite(tokens), "head");
  model->blocks[1]->attention->out->weight.fill_(INFINITY);
  EXPECT_EQ(model->first_non_finite(tokens), "layer 1");
  model->blocks[0]->feed_forward_norm->bias.fill_(NAN);
  EXPECT_EQ(model->first_non_finite(tokens), "layer 0");
  model->embedding->weight.fill_(NAN);
  EXPECT_EQ(model->first_non_finite(tokens), "embedding");
}

TEST(Generate, IsAFunctionOfItsSeed) {
  ByteLanguageModel model = tiny_model(tiny_options());
  const auto run = [&](double temperature, uint64_t seed) {
    return generate(model, "some prompt", {.tokens = 30, .temperature = temperature, .seed = seed});
  };
  EXPECT_EQ(run(1.0, 3), run(1.0, 3));
  EXPECT_NE(run(1.0, 3), run(1.0, 4));
  EXPECT_EQ(run(0.0, 3), run(0.0, 4));
  EXPECT_EQ(run(1.0, 3).size(), 30u);
  EXPECT_SAYS(generate(model, "", {}), "prompt is empty");
  EXPECT_SAYS(run(-1.0, 0), "temperature is -1");
}

}  // namespace
}  // namespace turnout
