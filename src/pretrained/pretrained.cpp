// The public calls for one layer: out of a checkpoint into MoE, and back under published names.
#include <turnout/pretrained.h>

#include <turnout/checkpoint.h>

#include "ops/names.h"
#include "pretrained/layer_tensors.h"

#include <ATen/ATen.h>
#include <c10/util/Exception.h>

namespace turnout {
namespace {

constexpr ops::Names<KeyLayout, 2> kLayouts{{{KeyLayout::per_expert, "per_expert"}, {KeyLayout::fused, "fused"}}};

void check_type(std::optional<at::ScalarType> type) {
  TORCH_CHECK_TYPE(!type || *type == at::kFloat || *type == at::kBFloat16 || *type == at::kHalf || *type == at::kDouble,
                   "turnout: load_moe_layer: type is ", *type, ", expected float32, bfloat16, float16 or float64");
}

// Gates and the selection bias in the type that the family computes them in.
void cast_gates(const pretrained::Family& family, pretrained::Tensors& module) {
  const at::ScalarType type = module.at("experts.down").scalar_type();
  for (const char* name : {"gate.weight", "gate.bias", "shared_gate.weight", "selection_bias"}) {
    const auto found = module.find(name);
    if (found == module.end()) continue;
    const std::string_view word(name);
    const bool float32 = word == "selection_bias" || (family.float32_gate && word.starts_with("gate."));
    found->second = found->second.to(float32 ? at::kFloat : type);
  }
}

MoE make_moe(const MoEOptions& options, const pretrained::Tensors& module) {
  ExpertWeights weights{{module.at("experts.up")}, {module.at("experts.down")}};
  if (options.bias) {
    weights.up_bias = {module.at("experts.up_bias")};
    weights.down_bias = {module.at("experts.down_bias")};
  }
  const FeedForwardOptions expert{options.hidden, options.ffn, options.activation, options.bias};
  const auto gate = torch::nn::LinearOptions(options.hidden, options.num_experts).bias(options.gate_bias);
  MoE moe(options, torch::nn::AnyModule(torch::nn::Linear(gate)), FeedForwardBank(expert, weights).ptr());
  for (auto& [name, tensor] : module_tensors(*moe))
    if (!name.starts_with("experts.")) at::Tensor(tensor).set_data(module.at(name));
  return moe;
}

}  // namespace

KeyLayout parse_key_layout(const std::string& name) { return ops::parse_name("layout of keys", kLayouts, name); }
std::string to_string(KeyLayout layout) { return ops::name_of(kLayouts, layout); }

namespace pretrained {

Tensors load_layer(const std::string& folder, int64_t layer, std::optional<at::ScalarType> type) {
  check_type(type);
  const Config config = read_config(folder);
  const FoundLayer found = find_layer(config, folder, layer);
  Tensors module = to_module(config, found.tensors, type, folder + ": " + found.root);
  cast_gates(*config.family, module);
  return module;
}

Tensors publish(const std::string& folder, int64_t layer, KeyLayout layout, const Tensors& module) {
  const Config config = read_config(folder);
  const std::string root = layer_roots(config, layer, layout).front();
  Tensors published;
  for (auto& [name, tensor] : to_published(config, module, layout)) published[root + name] = tensor;
  return published;
}

}  // namespace pretrained

MoE load_moe_layer(const std::string& folder, int64_t layer, std::optional<at::ScalarType> type) {
  return make_moe(pretrained_moe(folder).options, pretrained::load_layer(folder, layer, type));
}

std::map<std::string, at::Tensor> published_tensors(const MoE& moe, const std::string& folder, int64_t layer,
                                                    KeyLayout layout) {
  pretrained::Tensors module;
  for (const auto& [name, tensor] : module_tensors(*moe)) module[name] = tensor.detach();
  return pretrained::publish(folder, layer, layout, module);
}

}  // namespace turnout
