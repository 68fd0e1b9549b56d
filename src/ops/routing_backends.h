// The path of ATen calls for routing ops that have CPU kernels beside it.
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

namespace turnout::ops {

at::Tensor topk_aten(const at::Tensor& scores, int64_t top_k);

std::tuple<at::Tensor, at::Tensor, at::Tensor> plan_aten(const at::Tensor& topk_ids, int64_t num_experts);

at::Tensor dispatch_aten(const at::Tensor& x, const at::Tensor& token_of_row, const at::Tensor& row_of_choice);

at::Tensor combine_aten(const at::Tensor& rows, const at::Tensor& topk_weights, const at::Tensor& token_of_row,
                        const at::Tensor& row_of_choice);

}  // namespace turnout::ops
