// A layer from a checkpoint, looked at by itself.
#pragma once

#include "tensor_json.h"

#include <turnout/moe.h>

#include <cstdint>
#include <optional>
#include <string>

namespace turnout::cli {

struct LayerOptions {
  std::string checkpoint;  ///< folder; empty: the drawn example
  int64_t layer = 0;
  std::string text;  ///< file; empty: random rows
  int64_t tokens = 16384;
  uint64_t seed = 0;
  std::optional<int64_t> step;  ///< walk this one of the tokens
};

/// One token of a call through gate, choice, places, experts, shared expert and combine.
/// @param x [..., hidden] all tokens of the call
Json layer_step_json(MoE moe, const at::Tensor& x, int64_t token);

/// @throws FileError for a folder or file that is missing or foreign; c10::ValueError for a layer that is not there
Json layer_json(const LayerOptions& options);

}  // namespace turnout::cli
