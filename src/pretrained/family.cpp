// The table of published families. Sources: each family's configuration and modelling files in transformers 5.24, and
// the names in published checkpoints.
#include "pretrained/family.h"

namespace turnout::pretrained {
namespace {

std::vector<Family> table() {
  Family mixtral{.name = "mixtral", .router = "mixtral"};
  mixtral.ffn = {"intermediate_size"};
  mixtral.experts = {"num_local_experts", "num_experts"};
  mixtral.roots = {"model.layers.{l}.block_sparse_moe.", "model.layers.{l}.mlp."};
  mixtral.per_expert = {"experts.{e}.w1.weight", "experts.{e}.w3.weight", "experts.{e}.w2.weight"};

  Family qwen2{.name = "qwen2_moe", .router = "qwen2_moe"};
  qwen2.sparse = SparseRule::steps;
  qwen2.router_fields.norm_topk_prob = true;
  qwen2.shared_ffn = "shared_expert_intermediate_size";
  qwen2.shared = "shared_expert";
  qwen2.shared_gate = "shared_expert_gate.weight";

  Family qwen3{.name = "qwen3_moe", .router = "qwen3_moe"};
  qwen3.sparse = SparseRule::steps;
  qwen3.router_fields.norm_topk_prob = true;

  Family olmoe{.name = "olmoe", .router = "olmoe"};
  olmoe.ffn = {"intermediate_size"};
  olmoe.router_fields.norm_topk_prob = true;

  Family deepseek2{.name = "deepseek_v2", .router = "deepseek_v2"};
  deepseek2.experts = {"n_routed_experts", "num_experts"};
  deepseek2.sparse = SparseRule::after_dense;
  deepseek2.router_fields = {.scale = true, .groups = true, .greedy = true};
  deepseek2.float32_gate = true;
  deepseek2.shared_count = "n_shared_experts";
  deepseek2.shared = "shared_experts";

  Family deepseek3 = deepseek2;
  deepseek3.name = deepseek3.router = "deepseek_v3";
  deepseek3.experts = {"n_routed_experts", "num_local_experts"};
  deepseek3.router_fields = {.norm_topk_prob = true, .scale = true, .groups = true};
  deepseek3.selection_bias = "gate.e_score_correction_bias";

  Family gpt_oss{.name = "gpt_oss", .router = "gpt_oss"};
  gpt_oss.ffn = {"intermediate_size"};
  gpt_oss.experts = {"num_local_experts", "num_experts"};
  gpt_oss.bias = true;
  gpt_oss.gate_bias = "true";
  gpt_oss.gate = "router";
  gpt_oss.per_expert = {};
  gpt_oss.fused.transposed = true;

  Family switch_t5{.name = "switch_transformers", .router = "switch"};
  switch_t5.hidden = {"d_model"};
  switch_t5.ffn = {"d_ff"};
  switch_t5.experts = {"num_experts"};
  switch_t5.activation = "dense_act_fn";
  switch_t5.gate_bias = "router_bias";
  switch_t5.sparse = SparseRule::t5;
  switch_t5.sequence_capacity = true;
  switch_t5.roots = {};  // two, by the number of the layer
  switch_t5.gate = "router.classifier";
  switch_t5.float32_gate = true;
  switch_t5.per_expert = {"", "experts.expert_{e}.wi.weight", "experts.expert_{e}.wo.weight"};
  switch_t5.fused = {};

  return {mixtral, qwen2, qwen3, olmoe, deepseek2, deepseek3, gpt_oss, switch_t5};
}

}  // namespace

const std::vector<Family>& families() {
  static const std::vector<Family> all = table();
  return all;
}

std::string with_number(const std::string& pattern, int64_t number) {
  const size_t open = pattern.find('{');
  if (open == std::string::npos) return pattern;
  return std::string(pattern).replace(open, 3, std::to_string(number));
}

}  // namespace turnout::pretrained
