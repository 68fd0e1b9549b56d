// Layers of published models: every family and layout, there and back; config.json; one error for all that is wrong.
#include <turnout/checkpoint.h>
#include <turnout/pretrained.h>

#include "helpers.h"
#include "pretrained_folders.h"
#include "tiny_models.h"

namespace turnout {
namespace {

using testing::has_layout;
using testing::published_configs;
using testing::random_layer;
using testing::write_config;
using testing::write_layer;

constexpr KeyLayout kLayouts[] = {KeyLayout::per_expert, KeyLayout::fused};

class Pretrained : public testing::FolderTest {
 protected:
  PretrainedMoE read(const std::string& family, const std::string& more = "") {
    write_config(folder, family, more);
    return pretrained_moe(folder);
  }
  /// All tensors of both are equal, by name.
  static void expect_same(const std::map<std::string, at::Tensor>& got, const std::map<std::string, at::Tensor>& want) {
    EXPECT_EQ(got.size(), want.size());
    for (const auto& [name, tensor] : want) {
      ASSERT_TRUE(got.count(name)) << name;
      EXPECT_TRUE(at::equal(got.at(name), tensor)) << name;
    }
  }
};

TEST_F(Pretrained, EveryFamilyComesBackFromEitherLayout) {
  for (const auto& [family, config] : published_configs())
    for (const KeyLayout layout : kLayouts) {
      if (!has_layout(family, layout)) continue;
      SCOPED_TRACE(family + " " + to_string(layout));
      const PretrainedMoE model = read(family);
      EXPECT_EQ(model.family, family);
      MoE moe = random_layer(folder);
      write_layer(folder, moe, model.layers.front(), layout);
      MoE back = load_moe_layer(folder, model.layers.front());
      expect_same(module_tensors(*back), module_tensors(*moe));
      for (const auto& parameter : back->parameters()) EXPECT_TRUE(parameter.requires_grad());
      const auto x = at::randn({2, 5, 32});
      EXPECT_TRUE(at::equal(back(x).output, moe(x).output));
    }
}

TEST_F(Pretrained, OptionsFollowTheConfig) {
  const auto mixtral = read("mixtral").options;
  EXPECT_EQ(mixtral.num_experts, 3);
  EXPECT_EQ(mixtral.activation, Activation::swiglu);
  EXPECT_EQ(mixtral.router.weights, RouterWeights::normalized);
  EXPECT_EQ(mixtral.balance_coefficient, 0);
  EXPECT_FALSE(mixtral.bias);
  const auto qwen = read("qwen2_moe").options;
  EXPECT_EQ(qwen.shared.ffn, 20);
  EXPECT_TRUE(qwen.shared.gated);
  EXPECT_EQ(qwen.router.weights, RouterWeights::probability);
  EXPECT_EQ(read("qwen3_moe").options.router.weights, RouterWeights::normalized);
  const auto v2 = read("deepseek_v2").options;
  EXPECT_EQ(v2.shared.ffn, 64);
  EXPECT_FALSE(v2.shared.gated);
  EXPECT_EQ(std::tuple(v2.router.groups, v2.router.kept_groups, v2.router.scale), std::tuple(2, 1, 2.5));
  std::string greedy = published_configs().at("deepseek_v2");
  greedy.replace(greedy.find("group_limited_greedy"), 20, "greedy");
  write_file(path("config.json"), "{" + greedy);
  EXPECT_EQ(pretrained_moe(folder).options.router.groups, 1);
  const auto v3 = read("deepseek_v3").options;
  EXPECT_TRUE(v3.selection_bias);
  EXPECT_EQ(v3.router.score, ScoreFunction::sigmoid);
  const auto oss = read("gpt_oss").options;
  EXPECT_TRUE(oss.bias && oss.gate_bias);
  EXPECT_EQ(to_string(oss.activation), "swiglu_clamped");
  const auto t5 = read("switch_transformers").options;
  EXPECT_EQ(std::tuple(t5.top_k, t5.capacity.fixed, t5.capacity.per_sequence), std::tuple(1, 2, true));
  EXPECT_EQ(t5.activation, Activation::relu);
}

TEST_F(Pretrained, LayersThatHoldExperts) {
  using Layers = std::vector<int64_t>;
  EXPECT_EQ(read("mixtral").layers, (Layers{0, 1, 2, 3}));
  EXPECT_EQ(read("qwen2_moe").layers, (Layers{3}));          // every second one, but not layer 1
  EXPECT_EQ(read("deepseek_v3").layers, (Layers{1, 2, 3}));  // layer 4 predicts several tokens
  EXPECT_EQ(read("switch_transformers").layers, (Layers{1, 3, 5}));
  EXPECT_SAYS(load_moe_layer(folder, 2),
              "layer 2 of this switch_transformers holds no experts, expected one of 1, 3, 5");
}

TEST_F(Pretrained, OneErrorListsEverythingThatDoesNotFit) {
  read("qwen2_moe");
  auto tensors = published_tensors(random_layer(folder), folder, 3, KeyLayout::per_expert);
  tensors["model.layers.3.mlp.extra"] = at::zeros(1);
  tensors.erase("model.layers.3.mlp.experts.1.up_proj.weight");
  tensors["model.layers.3.mlp.experts.2.down_proj.weight"] = at::zeros({32, 31});
  tensors["model.layers.3.mlp.gate.weight"] = at::zeros({3, 32}, at::kLong);
  save_tensors(path("model.safetensors"), {tensors, {}});
  const std::string message = testing::message_of([&] { load_moe_layer(folder, 3); });
  for (const char* words : {"'extra' is unused", "'experts.1.up_proj.weight' is missing",
                            "'experts.2.down_proj.weight' is Float [32, 31], expected floating point [32, 32]",
                            "'gate.weight' is Long [3, 32], expected floating point [3, 32]"})
    EXPECT_NE(message.find(words), std::string::npos) << words << "\n" << message;
  EXPECT_EQ(message.find(folder + ": model.layers.3.mlp.: does not fit the qwen2_moe"), 0u) << message;
  save_tensors(path("model.safetensors"), {{{"other", at::zeros(1)}}, {}});
  EXPECT_SAYS(load_moe_layer(folder, 3),
              "holds no tensor whose name starts with 'model.layers.3.mlp.' or 'layers.3.mlp.'");
}

TEST_F(Pretrained, BanksThatLieAsTheyAreUsedAreMappedNotRead) {
  read("mixtral");
  MoE moe = random_layer(folder, at::kBFloat16);
  write_layer(folder, moe, 0, KeyLayout::fused);
  MoE back = load_moe_layer(folder, 0);
  EXPECT_EQ(back->gate.ptr()->parameters()[0].scalar_type(), at::kBFloat16);
  const auto up = back->experts->named_parameters()["up"];
  EXPECT_EQ(up.scalar_type(), at::kBFloat16);
  EXPECT_EQ(up.storage().nbytes(), up.nbytes());  // its own piece of the file, not a part of a larger bank
  {
    const at::NoGradGuard no_grad;
    for (auto& parameter : back->parameters()) parameter.zero_();
  }
  expect_same(module_tensors(*load_moe_layer(folder, 0)), module_tensors(*moe));
}

TEST_F(Pretrained, TypesAreThoseAskedFor) {
  read("deepseek_v3");
  write_layer(folder, random_layer(folder, at::kBFloat16), 1, KeyLayout::per_expert);
  for (const auto type : {at::kFloat, at::kBFloat16}) {
    MoE moe = load_moe_layer(folder, 1, type);
    for (const auto& [name, tensor] : module_tensors(*moe)) {
      const bool gate = name == "selection_bias" || name == "gate.weight";
      EXPECT_EQ(tensor.scalar_type(), gate ? at::kFloat : type) << name;
    }
    EXPECT_EQ(moe(at::randn({3, 32}).to(type)).output.scalar_type(), type);
  }
  EXPECT_SAYS(load_moe_layer(folder, 1, at::kLong), "type is Long, expected float32");
}

TEST_F(Pretrained, ModelsSavedWithoutTheirHeadAreFound) {
  read("olmoe");
  MoE moe = random_layer(folder);
  std::map<std::string, at::Tensor> bare;
  for (const auto& [name, tensor] : published_tensors(moe, folder, 2, KeyLayout::per_expert))
    bare[name.substr(6)] = tensor;
  save_tensors(path("model.safetensors"), {bare, {}});
  expect_same(module_tensors(*load_moe_layer(folder, 2)), module_tensors(*moe));
}

TEST_F(Pretrained, LayoutsThatAFamilyLacksAndForeignModulesAreRefused) {
  read("gpt_oss");
  MoE moe = random_layer(folder);
  EXPECT_SAYS(published_tensors(moe, folder, 0, KeyLayout::per_expert),
              "layout is 'per_expert', which files of gpt_oss do not");
  read("mixtral");
  EXPECT_SAYS(published_tensors(moe, folder, 0, KeyLayout::fused), "experts.up_bias has no place");
  EXPECT_SAYS(parse_key_layout("new"), "expected one of per_expert, fused");
  EXPECT_EQ(parse_key_layout("fused"), KeyLayout::fused);
}

TEST_F(Pretrained, BanksThatAreNoBanksAreRefused) {
  const FeedForwardOptions options{4, 3, Activation::swiglu, false};
  const auto up = at::zeros({2, 6, 4}), down = at::zeros({2, 4, 3});
  EXPECT_EQ(FeedForwardBank(options, ExpertWeights{{up}, {down}})->up.data_ptr(), up.data_ptr());
  EXPECT_SAYS(FeedForwardBank(options, ExpertWeights{{up[0], up[1]}, {down}}), "up holds 2 tensors, expected one bank");
  EXPECT_SAYS(FeedForwardBank(options, ExpertWeights{{}, {}}), "down holds 0 tensors, expected one bank");
  EXPECT_SAYS(FeedForwardBank(options, ExpertWeights{{down}, {down}}), "up has shape [2, 4, 3], expected [2, 6, 4]");
  EXPECT_SAYS(FeedForwardBank(options, ExpertWeights{{up}, {down}, {at::zeros({2, 6})}, {}}), "biases are given");
}

TEST_F(Pretrained, ConfigsThatCannotBeServedSayWhy) {
  const auto says = [&](const std::string& family, const std::string& more, const std::string& words) {
    const std::string base = published_configs().at(family);
    const std::string field = more.substr(0, more.find(':'));
    std::string rest = base;
    if (const size_t at = rest.find(field + ":"); at != std::string::npos) rest.replace(at, field.size(), "\"was\"");
    write_file(path("config.json"), "{" + more + "," + rest);
    const std::string message = testing::message_of([&] { pretrained_moe(folder); });
    EXPECT_EQ(message.find(path("config.json") + ": "), 0u) << message;
    EXPECT_NE(message.find(words), std::string::npos) << more << "\n" << message;
  };
  says("mixtral", R"("hidden_act":"relu6")", R"(hidden_act is "relu6", expected silu or gelu)");
  says("mixtral", R"("num_local_experts":0)", "num_local_experts is 0, expected a whole number from 1");
  says("mixtral", R"("num_local_experts":1e3)", "num_local_experts is 1000.0");
  says("mixtral", R"("num_local_experts":99999999999999999999)", "num_local_experts is 1e+20");
  says("mixtral", R"("hidden_size":null)", "hidden_size is missing");
  says("mixtral", R"("num_experts_per_tok":4)", "top_k");
  says("mixtral", R"("model_type":"llama")", R"(model_type is "llama", expected one of mixtral, qwen2_moe)");
  says("qwen2_moe", R"("mlp_only_layers":[-1])", "mlp_only_layers is no list of whole numbers");
  says("qwen2_moe", R"("norm_topk_prob":"yes")", "expected true or false");
  says("deepseek_v2", R"("norm_topk_prob":true)", "sources disagree");
  says("deepseek_v2", R"("topk_method":"best")", "expected greedy or group_limited_greedy");
  says("deepseek_v3", R"("topk_method":"greedy")", "expected noaux_tc");
  says("deepseek_v3", R"("scoring_func":"softmax")", "expected sigmoid");
  says("deepseek_v3", R"("n_group":3)", "group");
  says("gpt_oss", R"("swiglu_limit":8.0)", "swiglu_limit is 8.0");
  says("switch_transformers", R"("dense_act_fn":"tanh")", "expected relu, gelu, gelu_new or silu");
  write_file(path("config.json"), std::string(5000, '['));
  EXPECT_SAYS(pretrained_moe(folder), "is no JSON object of at most 32 levels");
}

}  // namespace
}  // namespace turnout
