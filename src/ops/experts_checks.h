// What an experts op is given, checked once for every backend.
#pragma once

#include <turnout/experts.h>

#include <ATen/core/Tensor.h>

namespace turnout::ops {

/// Arguments of turnout::experts and its forward and backward, by reference.
struct ExpertsArgs {
  const at::Tensor& x;               // [tokens, hidden]
  const at::Tensor& topk_weights;    // [tokens, top_k]
  const at::Tensor& expert_offsets;  // [experts + 1]
  const at::Tensor& token_of_row;    // [tokens · top_k]
  const at::Tensor& row_of_choice;   // [tokens, top_k]
  at::TensorList up, down, up_bias, down_bias;
  Activation activation;
  bool weight_before_down = false;  // of the forward: gradients are the same

  int64_t num_experts() const { return expert_offsets.size(0) - 1; }
  bool gated() const { return is_gated(activation); }
};

/// Sizes that all weights agree on.
struct ExpertsSizes {
  c10::SymInt hidden, ffn, up_rows;  // up_rows: ffn, or 2 · ffn for gated activations
};

/// @throws c10::ValueError or c10::TypeError naming the argument, what it got and what it expected
ExpertsSizes check_experts(const ExpertsArgs& args);

// Its parts, for weights that come packed: x, the plan and the routing weights; the biases.
void check_routed(const ExpertsArgs& args);
void check_biases(const ExpertsArgs& args, const ExpertsSizes& sizes);

/// What experts_backward is given beside the arguments of the forward.
/// @param preactivations [rows, up_rows], or [0, up_rows] where they are computed anew
void check_experts_backward(const at::Tensor& grad, const ExpertsArgs& args, const ExpertsSizes& sizes,
                            const at::Tensor& preactivations);

/// Weight of one expert, whether it stands in a bank (a list of one tensor with an experts axis) or alone.
/// @param dim axes of one expert's weight: 2 for a matrix, 1 for a bias
inline at::Tensor expert_of(at::TensorList weights, int64_t expert, int64_t dim) {
  const bool bank = weights.size() == 1 && weights[0].dim() == dim + 1;
  return bank ? weights[0].select(0, expert) : weights[expert];
}

}  // namespace turnout::ops
