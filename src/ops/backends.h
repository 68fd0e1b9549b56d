// The backends of the experts ops: ATen calls for any device, kernels on the CPU. One signature.
#pragma once

#include "experts_checks.h"

#include <array>
#include <tuple>
#include <vector>

namespace turnout::ops {

/// Gradients in the order of turnout::experts_backward; what is not needed is an empty tensor or an empty list.
struct ExpertsGradients {
  at::Tensor x, topk_weights;
  std::vector<at::Tensor> up, down, up_bias, down_bias;
};

/// @param keep return the pre-activations [rows, U] for the backward; otherwise [0, U]
std::tuple<at::Tensor, at::Tensor> experts_forward_aten(const ExpertsArgs& args, bool keep);

/// @param preactivations [rows, U] of the forward, or [0, U] to compute them anew
/// @param needs which of x, topk_weights, up, down, up_bias, down_bias are wanted
ExpertsGradients experts_backward_aten(const at::Tensor& grad, const ExpertsArgs& args,
                                       const at::Tensor& preactivations, std::array<bool, 6> needs);

}  // namespace turnout::ops
