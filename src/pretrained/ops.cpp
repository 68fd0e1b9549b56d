// Published checkpoints as ops, for Python: words and tensors in, words and tensors out.
#include <turnout/pretrained.h>

#include "layers/moe_fields.h"
#include "pretrained/layer_tensors.h"

#include <c10/util/Exception.h>
#include <torch/library.h>

namespace turnout::pretrained {
namespace {

using Lists = std::tuple<std::vector<std::string>, std::vector<at::Tensor>>;

Lists as_lists(const Tensors& tensors) {
  Lists lists;
  for (const auto& [name, tensor] : tensors) {
    std::get<0>(lists).push_back(name);
    std::get<1>(lists).push_back(tensor);
  }
  return lists;
}

// {"family": …, "layers": […], "options": {…}}
std::string pretrained_moe_op(std::string folder) {
  PretrainedMoE moe = pretrained_moe(folder);
  JsonWriter options;
  visit_layer(options, moe.options);
  const nlohmann::ordered_json json = {{"family", moe.family}, {"layers", moe.layers}, {"options", options.json}};
  return json.dump();
}

Lists load_moe_layer_op(std::string folder, int64_t layer, std::optional<at::ScalarType> dtype) {
  return as_lists(load_layer(folder, layer, dtype));
}

Lists published_tensors_op(std::string folder, int64_t layer, std::string layout, std::vector<std::string> names,
                           std::vector<at::Tensor> tensors) {
  TORCH_CHECK_VALUE(names.size() == tensors.size(), "turnout::published_tensors: ", names.size(), " names came with ",
                    tensors.size(), " tensors, expected as many");
  Tensors module;
  for (size_t i = 0; i < names.size(); ++i) module[names[i]] = tensors[i];
  return as_lists(publish(folder, layer, parse_key_layout(layout), module));
}

void convert_checkpoint_op(std::string source, std::string target, std::string layout) {
  convert_checkpoint(source, target, parse_key_layout(layout));
}

TORCH_LIBRARY_IMPL(turnout, CompositeImplicitAutograd, m) {
  m.impl("pretrained_moe", pretrained_moe_op);
  m.impl("load_moe_layer", load_moe_layer_op);
  m.impl("published_tensors", published_tensors_op);
  m.impl("convert_checkpoint", convert_checkpoint_op);
}

}  // namespace
}  // namespace turnout::pretrained
