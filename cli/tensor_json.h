// Tensors as nested lists of JSON.
#pragma once

#include <ATen/core/Tensor.h>
#include <nlohmann/json.hpp>

namespace turnout::cli {

using Json = nlohmann::ordered_json;

/// Numbers of any shape, on any device; whole ones stay whole. What is not finite becomes null.
Json to_json(const at::Tensor& tensor);
/// [2, 8, 16]
Json shape_of(const at::Tensor& tensor);

}  // namespace turnout::cli
