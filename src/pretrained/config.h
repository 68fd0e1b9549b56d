// config.json of a published model: its family, which layers hold experts, and the options of the layer.
#pragma once

#include <turnout/pretrained.h>

#include "pretrained/family.h"

#include <array>

namespace turnout::pretrained {

struct Config {
  const Family* family = nullptr;
  PretrainedMoE moe;
  int64_t encoder_layers = 0;                  ///< Switch: layers from here on stand in the decoder
  std::array<int64_t, 2> fp8_block{128, 128};  ///< quantization_config.weight_block_size
};

/// @throws FileError naming the file, the field, what it is and what was expected
Config read_config(const std::string& folder);

/// The text of config.json for the same model with nothing quantised. @throws FileError
std::string config_without_quantization(const std::string& folder);

/// What the names of a layer's tensors start with, by layout, the other one second.
/// @throws c10::ValueError when the layer holds no experts
std::vector<std::string> layer_roots(const Config& config, int64_t layer, KeyLayout layout);

}  // namespace turnout::pretrained
