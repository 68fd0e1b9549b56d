// The gate's product: what its registrations share.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <tuple>

namespace turnout::ops {

using GateGradients = std::tuple<at::Tensor, at::Tensor, at::Tensor>;  // of x, weight, bias; what is not needed: [0]

/// @throws c10::ValueError or c10::TypeError naming the argument, what it got and what it expected
void check_gate(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias);
void check_gate_backward(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weight);

at::Tensor gate_logits_aten(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias);
GateGradients gate_logits_backward_aten(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weight,
                                        std::array<bool, 3> needs);

}  // namespace turnout::ops
