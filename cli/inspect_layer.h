// A layer from a checkpoint, looked at by itself.
#pragma once

#include "tensor_json.h"

#include <cstdint>
#include <string>

namespace turnout::cli {

struct LayerOptions {
  std::string checkpoint;  ///< folder; empty: the drawn example
  int64_t layer = 0;
  std::string text;  ///< file; empty: random rows
  int64_t tokens = 16384;
  uint64_t seed = 0;
};

/// @throws FileError for a folder or file that is missing or foreign; c10::ValueError for a layer that is not there
Json layer_json(const LayerOptions& options);

}  // namespace turnout::cli
