// Runs a layer on what a safetensors file holds, so that the tests of another language can compare with it.
//
//   interchange IN OUT
//
// IN: metadata with the layer's options by name; the tensor "x"; "layer.NAME" of every parameter and buffer, or none, and
// then the layer keeps what it draws from the seed 0. OUT: "output", "aux_loss" and "layer.NAME" of all.
#include <turnout/checkpoint.h>
#include <turnout/hierarchical_moe.h>
#include <turnout/moe.h>

#include <ATen/ATen.h>

#include <cstdio>
#include <functional>

namespace turnout {
namespace {

using Words = std::map<std::string, std::string>;

int64_t number(const Words& words, const std::string& name, int64_t otherwise = 0) {
  const auto found = words.find(name);
  return found == words.end() ? otherwise : std::stoll(found->second);
}

MoEOptions moe_options(const Words& words) {
  MoEOptions options;
  options.hidden = number(words, "hidden");
  options.ffn = number(words, "ffn");
  options.num_experts = number(words, "num_experts");
  options.top_k = number(words, "top_k");
  options.activation = parse_activation(words.at("activation"));
  options.bias = number(words, "bias") != 0;
  options.gate_bias = number(words, "gate_bias") != 0;
  options.shared.ffn = number(words, "shared_ffn");
  options.shared.gated = number(words, "shared_gated") != 0;
  options.router = router_preset(words.at("router"));
  options.selection_bias = number(words, "selection_bias") != 0;
  if (words.count("selection")) options.selection = parse_selection(words.at("selection"));
  options.capacity.fixed = number(words, "capacity");
  options.z_coefficient = 1e-3;
  return options;
}

HierarchicalMoEOptions hierarchical_options(const Words& words) {
  HierarchicalMoEOptions options;
  options.hidden = number(words, "hidden");
  options.ffn = number(words, "ffn");
  options.num_experts = {number(words, "outer"), number(words, "inner")};
  options.gating.policy_train = SecondPolicy::all;
  return options;
}

TensorFile run(torch::nn::Module& module, const TensorFile& given,
               const std::function<std::pair<at::Tensor, at::Tensor>(const at::Tensor&)>& forward) {
  std::map<std::string, at::Tensor> state;
  for (const auto& [name, tensor] : given.tensors)
    if (name.rfind("layer.", 0) == 0) state.emplace(name.substr(6), tensor);
  if (!state.empty()) load_into_module(module, state, "the given state");

  const at::NoGradGuard no_grad;
  const auto [output, aux_loss] = forward(given.tensors.at("x"));
  TensorFile made{{{"output", output}, {"aux_loss", aux_loss}}, {}};
  for (const auto& [name, tensor] : module_tensors(module)) made.tensors.emplace("layer." + name, tensor);
  return made;
}

void interchange(const std::string& in, const std::string& out) {
  const auto given = load_tensors(in);
  at::manual_seed(0);
  if (given.metadata.at("kind") == "MoE") {
    MoE moe(moe_options(given.metadata));
    save_tensors(out, run(*moe, given, [&](const at::Tensor& x) {
                   const auto made = moe->forward(x);
                   return std::pair{made.output, made.aux_loss};
                 }));
    return;
  }
  HierarchicalMoE moe(hierarchical_options(given.metadata));
  save_tensors(out, run(*moe, given, [&](const at::Tensor& x) {
                 const auto made = moe->forward(x);
                 return std::pair{made.output, made.aux_loss};
               }));
}

}  // namespace
}  // namespace turnout

int main(int count, char** words) {
  try {
    TORCH_CHECK_VALUE(count == 3, "expected two arguments: IN OUT");
    turnout::interchange(words[1], words[2]);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "interchange: %s\n", error.what());
    return 2;
  }
  return 0;
}
