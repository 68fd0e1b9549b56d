// The header of a safetensors file, checked whole.
#pragma once

#include "checkpoint/input_file.h"

#include <c10/core/ScalarType.h>

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace turnout {

/// One tensor of a file: shape and type fit its bytes, which lie inside the file.
struct TensorEntry {
  std::string name;
  at::ScalarType type = at::kByte;
  std::vector<int64_t> shape;
  int64_t begin = 0;  ///< of its bytes, from the start of the file
  int64_t end = 0;
};

struct SafetensorsHeader {
  std::vector<TensorEntry> entries;  ///< in order of their bytes, which they tile
  std::map<std::string, std::string> metadata;
};

/// Memory: that of the header's text and of the entries; no tree of the JSON is built.
/// @throws FileError naming the file, and the tensor where one is to blame
SafetensorsHeader read_header(const InputFile& file);

}  // namespace turnout
