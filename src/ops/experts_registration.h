// Binds a backend's functions, which take ExpertsArgs, to the schemas, which take each tensor by itself.
#pragma once

#include "backends.h"

#include <string>

namespace turnout::ops {

template <auto Forward>
std::tuple<at::Tensor, at::Tensor> experts_forward_op(const at::Tensor& x, const at::Tensor& topk_weights,
                                                      const at::Tensor& expert_offsets, const at::Tensor& token_of_row,
                                                      const at::Tensor& row_of_choice, at::TensorList up,
                                                      at::TensorList down, at::TensorList up_bias,
                                                      at::TensorList down_bias, c10::string_view activation,
                                                      bool keep, bool weight_before_down) {
  return Forward({x, topk_weights, expert_offsets, token_of_row, row_of_choice, up, down, up_bias, down_bias,
                  parse_activation(std::string(activation)), weight_before_down},
                 keep);
}

template <auto Forward>
at::Tensor experts_op(const at::Tensor& x, const at::Tensor& topk_weights, const at::Tensor& expert_offsets,
                      const at::Tensor& token_of_row, const at::Tensor& row_of_choice, at::TensorList up,
                      at::TensorList down, at::TensorList up_bias, at::TensorList down_bias,
                      c10::string_view activation, bool /*recompute*/, bool weight_before_down) {
  return std::get<0>(experts_forward_op<Forward>(x, topk_weights, expert_offsets, token_of_row, row_of_choice, up,
                                                 down, up_bias, down_bias, activation, /*keep=*/false,
                                                 weight_before_down));
}

using ExpertsGradientsTuple = std::tuple<at::Tensor, at::Tensor, std::vector<at::Tensor>, std::vector<at::Tensor>,
                                         std::vector<at::Tensor>, std::vector<at::Tensor>>;

template <auto Backward>
ExpertsGradientsTuple experts_backward_op(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& topk_weights,
                                          const at::Tensor& expert_offsets, const at::Tensor& token_of_row,
                                          const at::Tensor& row_of_choice, at::TensorList up, at::TensorList down,
                                          at::TensorList up_bias, at::TensorList down_bias,
                                          c10::string_view activation, const at::Tensor& preactivations,
                                          std::array<bool, 6> needs) {
  auto grads = Backward(grad,
                        {x, topk_weights, expert_offsets, token_of_row, row_of_choice, up, down, up_bias, down_bias,
                         parse_activation(std::string(activation))},
                        preactivations, needs);
  return {std::move(grads.x),    std::move(grads.topk_weights), std::move(grads.up),
          std::move(grads.down), std::move(grads.up_bias),      std::move(grads.down_bias)};
}

}  // namespace turnout::ops
