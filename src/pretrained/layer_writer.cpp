// The parameters of MoE to a layer's published tensors, in either layout.
#include "pretrained/layer_tensors.h"

#include <ATen/ATen.h>
#include <c10/util/Exception.h>

#include <sstream>

namespace turnout::pretrained {
namespace {

using Shapes = std::map<std::string, std::vector<int64_t>>;

// What MoE holds for the family's options.
Shapes module_shapes(const Config& config) {
  const MoEOptions& o = config.moe.options;
  const int64_t halves = is_gated(o.activation) ? 2 : 1;
  Shapes shapes{{"gate.weight", {o.num_experts, o.hidden}},
                {"experts.up", {o.num_experts, halves * o.ffn, o.hidden}},
                {"experts.down", {o.num_experts, o.hidden, o.ffn}}};
  if (o.gate_bias) shapes["gate.bias"] = {o.num_experts};
  if (o.selection_bias) shapes["selection_bias"] = {o.num_experts};
  if (o.bias) shapes["experts.up_bias"] = {o.num_experts, halves * o.ffn};
  if (o.bias) shapes["experts.down_bias"] = {o.num_experts, o.hidden};
  if (o.shared.ffn > 0) shapes["shared.up"] = {halves * o.shared.ffn, o.hidden};
  if (o.shared.ffn > 0) shapes["shared.down"] = {o.hidden, o.shared.ffn};
  if (o.shared.gated) shapes["shared_gate.weight"] = {1, o.hidden};
  return shapes;
}

void check_module(const Config& config, const Tensors& module) {
  std::ostringstream problems;
  const Shapes shapes = module_shapes(config);
  for (const auto& [name, shape] : shapes) {
    const auto found = module.find(name);
    if (found == module.end())
      problems << "; " << name << " is missing";
    else if (found->second.sizes() != at::IntArrayRef(shape))
      problems << "; " << name << " is " << found->second.sizes() << ", expected " << at::IntArrayRef(shape);
  }
  for (const auto& item : module)
    if (!shapes.count(item.first)) problems << "; " << item.first << " has no place";
  TORCH_CHECK_VALUE(problems.str().empty(), "turnout: the module is no layer of this ", config.family->name,
                    problems.str());
}

// [U, …] as published matrices: gate rows, up rows.
void put_up(Tensors& out, const ExpertNames& names, const at::Tensor& up) {
  if (names.gate.empty()) {
    out[names.up] = up;
    return;
  }
  const int64_t ffn = up.size(0) / 2;
  out[names.gate] = up.narrow(0, 0, ffn);
  out[names.up] = up.narrow(0, ffn, ffn);
}

// Along axis 1: g0 g1 … u0 u1 … to g0 u0 g1 u1 …
at::Tensor rows_in_turn(const at::Tensor& bank) {
  return bank.unflatten(1, {2, bank.size(1) / 2}).transpose(1, 2).flatten(1, 2);
}

void put_banks(Tensors& out, const Family& family, const Tensors& module) {
  const BankNames& names = family.fused;
  const bool turned = names.transposed;
  const at::Tensor& up = module.at("experts.up");
  const at::Tensor& down = module.at("experts.down");
  out[names.up] = turned ? rows_in_turn(up).transpose(1, 2).contiguous() : up;
  out[names.down] = turned ? down.transpose(1, 2).contiguous() : down;
  if (!family.bias) return;
  const at::Tensor& up_bias = module.at("experts.up_bias");
  out[names.up + "_bias"] = turned ? rows_in_turn(up_bias) : up_bias;
  out[names.down + "_bias"] = module.at("experts.down_bias");
}

void put_experts(Tensors& out, const Family& family, const Tensors& module) {
  const at::Tensor& up = module.at("experts.up");
  for (int64_t e = 0; e < up.size(0); ++e) {
    const ExpertNames names{with_number(family.per_expert.gate, e), with_number(family.per_expert.up, e),
                            with_number(family.per_expert.down, e)};
    put_up(out, names, up[e]);
    out[names.down] = module.at("experts.down")[e];
  }
}

}  // namespace

Tensors to_published(const Config& config, const Tensors& module, KeyLayout layout) {
  const Family& family = *config.family;
  const bool fused = layout == KeyLayout::fused;
  TORCH_CHECK_VALUE(!(fused ? family.fused.down : family.per_expert.down).empty(), "turnout: the layout is '",
                    to_string(layout), "', which files of ", family.name, " do not have");
  check_module(config, module);
  const at::NoGradGuard no_grad;
  Tensors out{{family.gate + ".weight", module.at("gate.weight")}};
  const MoEOptions& options = config.moe.options;
  if (options.gate_bias) out[family.gate + ".bias"] = module.at("gate.bias");
  if (options.selection_bias) out[family.selection_bias] = module.at("selection_bias");
  if (options.shared.ffn > 0) {
    const std::string& name = family.shared;
    put_up(out, {name + ".gate_proj.weight", name + ".up_proj.weight", {}}, module.at("shared.up"));
    out[name + ".down_proj.weight"] = module.at("shared.down");
  }
  if (options.shared.gated) out[family.shared_gate] = module.at("shared_gate.weight");
  if (fused)
    put_banks(out, family, module);
  else
    put_experts(out, family, module);
  return out;
}

}  // namespace turnout::pretrained
