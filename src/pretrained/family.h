// Published families as data: how config.json calls the sizes, which router they have, how their weights are called.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace turnout::pretrained {

/// Which layers hold experts.
enum class SparseRule {
  all,          ///< every one (Mixtral, OLMoE, GPT-OSS)
  steps,        ///< each decoder_sparse_step-th that mlp_only_layers does not name (Qwen)
  after_dense,  ///< from first_k_dense_replace on (DeepSeek), but not those for multi-token prediction behind the last
  t5,           ///< num_sparse_encoder_layers and num_sparse_decoder_layers, encoder first (Switch)
};

/// What of the router config.json sets, beside the number of experts and of choices.
struct RouterFields {
  bool norm_topk_prob = false;  ///< divides the weights by their sum, or not
  bool scale = false;           ///< routed_scaling_factor
  bool groups = false;          ///< n_group and topk_group
  bool greedy = false;          ///< topk_method may be "greedy": no groups then
};

/// Names of the matrices of one expert, {e} its number; `gate` is empty where the activation has none.
struct ExpertNames {
  std::string gate, up, down;
};

/// Names of banks; empty where the family has none. Biases: NAME_bias. MXFP4: NAME_blocks, NAME_scales.
struct BankNames {
  std::string up, down;
  bool transposed = false;  ///< [experts, columns, rows], gate and up columns in turn (GPT-OSS)
};

struct Family {
  std::string name;    ///< model_type in config.json
  std::string router;  ///< router_preset
  // config.json: names tried in turn
  std::vector<std::string> hidden{"hidden_size"};
  std::vector<std::string> ffn{"moe_intermediate_size"};
  std::vector<std::string> experts{"num_experts", "num_local_experts"};
  std::string activation{"hidden_act"};  ///< name of the field
  bool bias = false;                     ///< of the experts
  std::string gate_bias{};               ///< "true", or the field that says so; empty: none
  std::string shared_ffn{};              ///< field with the width of the shared expert
  std::string shared_count{};            ///< field with the number of shared experts, each as wide as an expert
  SparseRule sparse = SparseRule::all;
  RouterFields router_fields{};
  bool sequence_capacity = false;  ///< expert_capacity places a sequence, by position (Switch)
  // keys, after the root of the layer
  std::vector<std::string> roots{"model.layers.{l}.mlp."};  ///< that of per-expert files first, that of banks last
  std::string gate{"gate"};                                 ///< GATE.weight, GATE.bias
  bool float32_gate = false;  ///< logits are computed in float32 whatever the model's type
  std::string selection_bias{};
  std::string shared{};       ///< SHARED.gate_proj.weight, …
  std::string shared_gate{};  ///< σ of it multiplies the shared expert
  ExpertNames per_expert{"experts.{e}.gate_proj.weight", "experts.{e}.up_proj.weight", "experts.{e}.down_proj.weight"};
  BankNames fused{"experts.gate_up_proj", "experts.down_proj"};
};

/// All of them.
const std::vector<Family>& families();

/// `pattern` with a number in place of its {…}.
std::string with_number(const std::string& pattern, int64_t number);

}  // namespace turnout::pretrained
