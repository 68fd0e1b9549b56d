// The path of ATen calls for routing ops that have CPU kernels beside it.
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

namespace turnout::ops {

at::Tensor topk_aten(const at::Tensor& scores, int64_t top_k);

std::tuple<at::Tensor, at::Tensor, at::Tensor> plan_aten(const at::Tensor& topk_ids, int64_t num_experts);

}  // namespace turnout::ops
