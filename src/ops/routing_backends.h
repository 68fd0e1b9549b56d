// The path of ATen calls for routing ops that have CPU kernels beside it.
#pragma once

#include <ATen/core/Tensor.h>

namespace turnout::ops {

at::Tensor topk_aten(const at::Tensor& scores, int64_t top_k);

}  // namespace turnout::ops
