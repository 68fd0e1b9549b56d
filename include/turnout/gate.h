// The gate: the linear map from tokens to logits that routers read.
#pragma once

#include <ATen/core/Tensor.h>

namespace turnout {

/// x · weightᵀ + bias, as torch::nn::Linear computes it, but with the same bits at any number of threads.
///
/// @param x [tokens, hidden]; weight [experts, hidden] and bias [experts] (or undefined) of x's type
/// @return [tokens, experts] of x's type
/// @throws c10::ValueError or c10::TypeError naming the argument, what it got and what it expected
/// Gradient: to all three; double backward works, by ATen calls. A NaN or Inf token harms only its own row.
/// Deterministic at any thread count, forward and backward, in float32 and bfloat16 on the CPU (others: at::linear).
at::Tensor gate_logits(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias = {});

}  // namespace turnout
