// Folders as published models have them, tiny: config.json of every family, and weights drawn for it.
#pragma once

#include <turnout/checkpoint.h>
#include <turnout/pretrained.h>

#include <ATen/ATen.h>

#include <map>
#include <string>

namespace turnout::testing {

/// config.json by family: 3 experts of 32 × 32 (MXFP4 asks for 32), 2 chosen, 4 layers.
inline const std::map<std::string, std::string>& published_configs() {
  static const std::string sizes =
      R"("hidden_size":32,"num_hidden_layers":4,"num_experts_per_tok":2,"hidden_act":"silu",)";
  static const std::string deepseek =
      sizes + R"("moe_intermediate_size":32,"intermediate_size":64,"n_routed_experts":4,"n_shared_experts":2,
          "first_k_dense_replace":1,"n_group":2,"topk_group":1,"routed_scaling_factor":2.5,)";
  static const std::map<std::string, std::string> configs{
      {"mixtral", sizes + R"("model_type":"mixtral","intermediate_size":32,"num_local_experts":3})"},
      {"qwen2_moe", sizes + R"("model_type":"qwen2_moe","moe_intermediate_size":32,"num_experts":3,
          "shared_expert_intermediate_size":20,"decoder_sparse_step":2,"mlp_only_layers":[1],"norm_topk_prob":false})"},
      {"qwen3_moe", sizes + R"("model_type":"qwen3_moe","moe_intermediate_size":32,"num_experts":3,
          "norm_topk_prob":true})"},
      {"olmoe", sizes + R"("model_type":"olmoe","intermediate_size":32,"num_experts":3})"},
      {"deepseek_v2", deepseek + R"("model_type":"deepseek_v2","topk_method":"group_limited_greedy"})"},
      {"deepseek_v3", deepseek + R"("model_type":"deepseek_v3","topk_method":"noaux_tc","scoring_func":"sigmoid",
          "norm_topk_prob":true,"num_nextn_predict_layers":1})"},
      {"gpt_oss", sizes + R"("model_type":"gpt_oss","intermediate_size":32,"num_local_experts":3,
          "swiglu_limit":7.0})"},
      {"switch_transformers",
       R"("model_type":"switch_transformers","d_model":32,"d_ff":32,"num_experts":3,"num_layers":4,
          "num_decoder_layers":2,"num_sparse_encoder_layers":2,"num_sparse_decoder_layers":1,"expert_capacity":2,
          "dense_act_fn":"relu","router_bias":false})"}};
  return configs;
}

/// Writes FOLDER/config.json. @param more fields that go before the family's, each with a comma after it
inline void write_config(const std::string& folder, const std::string& family, const std::string& more = "") {
  write_file(folder + "/config.json", "{" + more + published_configs().at(family));
}

/// Whether files of a family know this layout.
inline bool has_layout(const std::string& family, KeyLayout layout) {
  return family != (layout == KeyLayout::fused ? "switch_transformers" : "gpt_oss");
}

/// A layer of the model whose config.json lies there, with random weights, its selection bias too.
inline MoE random_layer(const std::string& folder, at::ScalarType type = at::kFloat) {
  MoE moe(pretrained_moe(folder).options);
  moe->to(type);
  const at::NoGradGuard no_grad;
  for (const auto& [name, tensor] : module_tensors(*moe)) at::Tensor(tensor).normal_(0, 0.3);
  return moe;
}

/// Writes FOLDER/model.safetensors with this layer and a tensor that is none of its business.
inline void write_layer(const std::string& folder, const MoE& moe, int64_t layer, KeyLayout layout) {
  auto tensors = published_tensors(moe, folder, layer, layout);
  tensors["model.embed_tokens.weight"] = at::ones({2, 32});
  save_tensors(folder + "/model.safetensors", {tensors, {{"format", "pt"}}});
}

}  // namespace turnout::testing
