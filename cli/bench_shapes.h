// Shapes to measure, as data files hold them.
#pragma once

#include <turnout/experts.h>

#include <c10/core/ScalarType.h>
#include <nlohmann/json.hpp>

#include <cstdint>
#include <string>
#include <vector>

namespace turnout::cli {

/// One bank of experts, with the calls that are measured of it.
struct BenchShape {
  std::string name;
  std::string about{};
  int64_t experts = 0, top_k = 0, hidden = 0, ffn = 0;
  Activation activation = Activation::swiglu;
  std::vector<std::string> types;        ///< bf16, fp32
  std::vector<int64_t> tokens;           ///< of a forward and of a training step
  std::vector<int64_t> decode_tokens{};  ///< of a decoding call

  /// Elements of all weights.
  int64_t weights() const { return experts * (is_gated(activation) ? 3 : 2) * hidden * ffn; }
};

/// bf16 or fp32. @throws c10::ValueError for another word
c10::ScalarType parse_type(const std::string& name);

/// {"shapes": [{"name", "experts", "top_k", "hidden", "ffn", "activation", "types", "tokens", and where wanted "about",
/// "decode_tokens"}]}.
///
/// @throws FileError naming the file, the shape and the field
std::vector<BenchShape> load_shapes(const std::string& path);

/// Sizes of a shape, as results repeat them.
nlohmann::ordered_json to_json(const BenchShape& shape);

/// One line a shape.
std::string list_of(const std::vector<BenchShape>& shapes);

/// The shapes installed with the program, or of the source tree it was built in. @throws FileError where there are none
std::string default_shapes_file();

}  // namespace turnout::cli
