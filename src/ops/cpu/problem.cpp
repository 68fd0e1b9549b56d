// The experts' problem as the kernels take it.
#include "problem.h"

#include <ATen/ATen.h>

namespace turnout::ops {

kernels::Activation kernel_activation(Activation activation) {
  switch (activation) {
    case Activation::relu:
      return kernels::Activation::relu;
    case Activation::gelu:
      return kernels::Activation::gelu;
    case Activation::gelu_tanh:
      return kernels::Activation::gelu_tanh;
    case Activation::silu:
      return kernels::Activation::silu;
    case Activation::swiglu:
      return kernels::Activation::swiglu;
    case Activation::geglu:
      return kernels::Activation::geglu;
  }
  TORCH_INTERNAL_ASSERT(false, "an activation without a kernel");
}

std::optional<kernels::DType> kernel_type(at::ScalarType type, const kernels::Implementation& implementation) {
  if (type == at::kFloat) return kernels::DType::f32;
  if (type == at::kBFloat16) return kernels::DType::bf16;
  if (type == at::kDouble && implementation.stages == nullptr) return kernels::DType::f64;
  return std::nullopt;
}

Pointers::Pointers(at::TensorList weights, int64_t num_experts, int64_t dim) {
  if (weights.empty()) return;
  for (const auto& weight : weights) kept_.push_back(weight.contiguous());
  for (int64_t e = 0; e < num_experts; ++e) pointers_.push_back(expert_of(kept_, e, dim).data_ptr());
}

Prepared::Prepared(const ExpertsArgs& args, int64_t ffn, kernels::DType type)
    : x(args.x.stride(1) == 1 ? args.x : args.x.contiguous()),
      topk_weights(args.topk_weights.to(type == kernels::DType::f64 ? at::kDouble : at::kFloat).contiguous()),
      expert_offsets(args.expert_offsets.contiguous()),
      token_of_row(args.token_of_row.contiguous()),
      row_of_choice(args.row_of_choice.contiguous()),
      up(args.up, args.num_experts(), 2),
      down(args.down, args.num_experts(), 2),
      up_bias(args.up_bias, args.num_experts(), 1),
      down_bias(args.down_bias, args.num_experts(), 1) {
  problem.tokens = x.size(0);
  problem.hidden = x.size(1);
  problem.ffn = ffn;
  problem.num_experts = args.num_experts();
  problem.top_k = row_of_choice.size(1);
  problem.expert_offsets = expert_offsets.const_data_ptr<int64_t>();
  problem.rows = problem.expert_offsets[problem.num_experts];
  problem.dtype = type;
  problem.activation = kernel_activation(args.activation);
  problem.x = x.data_ptr();
  problem.x_stride = x.stride(0);
  problem.up = up.read();
  problem.down = down.read();
  problem.up_bias = up_bias.read();
  problem.down_bias = down_bias.read();
  problem.token_of_row = token_of_row.const_data_ptr<int64_t>();
  problem.row_of_choice = row_of_choice.const_data_ptr<int64_t>();
  problem.topk_weights = topk_weights.data_ptr();
}

}  // namespace turnout::ops
