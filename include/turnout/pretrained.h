// MoE layers of published models: out of their checkpoints into MoE, back into files, from one layout to the other.
//
// Families (model_type of config.json): mixtral, qwen2_moe, qwen3_moe, olmoe, deepseek_v2, deepseek_v3, gpt_oss,
// switch_transformers.
#pragma once

#include <turnout/moe.h>

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

namespace turnout {

/// How a checkpoint holds the weights of experts. Either is read; it is told by the names.
enum class KeyLayout {
  per_expert,  ///< a matrix an expert and projection, `experts.N.gate_proj.weight`, …: most files; not GPT-OSS
  fused,       ///< one bank a matrix, `experts.gate_up_proj`, …: transformers 5; not Switch
};

/// @throws c10::ValueError naming the word when it is not one of the two enumerators
KeyLayout parse_key_layout(const std::string& name);
std::string to_string(KeyLayout layout);

/// What config.json says of a model's MoE layers.
struct PretrainedMoE {
  std::string family;           ///< model_type
  /// That hold experts, ascending; of Switch the encoder's, then, counted on, the decoder's.
  std::vector<int64_t> layers;
  MoEOptions options;           ///< of each of them; coefficients of losses are 0
};

/// Reads `FOLDER/config.json`.
///
/// Layers for multi-token prediction, which stand behind a model's last, are left out.
/// @throws FileError naming the file, the field, what it holds and what was expected; so for a family or an activation
///         that is not served
PretrainedMoE pretrained_moe(const std::string& folder);

/// Loads one MoE layer of a published model, ready to run.
///
/// Shapes follow config.json. Either layout of keys is read, with or without `model.` before them; MXFP4 banks and
/// float8 matrices with `weight_scale_inv` are decoded. Only the layer's own shards are opened. Banks that lie in the
/// file as MoE holds them (`fused`, of the asked type, not GPT-OSS) are mapped, not read (checkpoint.h): nothing is
/// copied.
/// @param folder with config.json and model.safetensors or an index
/// @param layer one of pretrained_moe(folder).layers
/// @param type float32, bfloat16, float16 or float64, of the parameters; by default that of the file, bfloat16 where it
///        is decoded. Gates that their family computes in float32 (DeepSeek, Switch), and selection biases, are float32
///        in any case
/// @throws FileError: one message lists every tensor that is missing, unused or of a wrong shape or type;
///         c10::ValueError for a layer without experts; c10::TypeError for another type
MoE load_moe_layer(const std::string& folder, int64_t layer, std::optional<at::ScalarType> type = std::nullopt);

/// The tensors of a layer under the names that files of its family have for them; they share memory with `moe` where
/// the layout allows it.
///
/// @param folder whose config.json says which model it is
/// @throws c10::ValueError for a layer without experts, a layout that the family does not have, or a module whose
///         parameters are not those of the family
std::map<std::string, at::Tensor> published_tensors(const MoE& moe, const std::string& folder, int64_t layer,
                                                    KeyLayout layout);

/// Writes a whole checkpoint anew with its experts in another layout; all other tensors stay as they are.
///
/// What is quantised is decoded to bfloat16, and quantization_config is dropped from config.json. Written are
/// config.json, a shard for each MoE layer, one for all the rest, and the index; other files (tokenizers) are not
/// copied. Memory: that of one layer.
/// @param to a folder, made where it does not exist; not `from`, nor one that holds a checkpoint already
/// @throws FileError, c10::ValueError
void convert_checkpoint(const std::string& from, const std::string& to, KeyLayout layout);

}  // namespace turnout
