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
    case Activation::swiglu_clamped:
      return kernels::Activation::swiglu_clamped;
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

namespace {

// The kernels follow these numbers without looking, so what plan() did not make must not reach them.
void check_plan_values(const kernels::ExpertsProblem& problem, int64_t allocated_rows) {
  constexpr const char* kOp = "turnout::experts";
  const auto* offsets = problem.expert_offsets;
  TORCH_CHECK_VALUE(offsets[0] == 0, kOp, ": expert_offsets begins with ", offsets[0], ", expected 0");
  for (int64_t e = 0; e < problem.num_experts; ++e)
    TORCH_CHECK_VALUE(offsets[e] <= offsets[e + 1], kOp, ": expert_offsets falls from ", offsets[e], " to ",
                      offsets[e + 1], " at expert ", e);
  TORCH_CHECK_VALUE(problem.rows <= allocated_rows, kOp, ": expert_offsets ends with ", problem.rows,
                    " rows, expected at most ", allocated_rows, " (token_of_row)");
  for (int64_t r = 0; r < problem.rows; ++r)
    TORCH_CHECK_VALUE(problem.token_of_row[r] >= 0 && problem.token_of_row[r] < problem.tokens, kOp,
                      ": token_of_row[", r, "] is ", problem.token_of_row[r], ", expected 0 to ", problem.tokens - 1,
                      " in a live row");
  for (int64_t t = 0; t < problem.tokens; ++t)
    for (int64_t k = 0; k < problem.top_k; ++k) {
      const auto row = problem.row_of_choice[t * problem.top_k + k];
      TORCH_CHECK_VALUE(row >= -1 && row < problem.rows && (row == -1 || problem.token_of_row[row] == t), kOp,
                        ": row_of_choice[", t, ", ", k, "] is ", row, ", which is neither -1 nor a row of that token");
    }
}

}  // namespace

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
  problem.weight_before_down = args.weight_before_down;
  problem.x = x.data_ptr();
  problem.x_stride = x.stride(0);
  problem.up = up.read();
  problem.down = down.read();
  problem.up_bias = up_bias.read();
  problem.down_bias = down_bias.read();
  problem.token_of_row = token_of_row.const_data_ptr<int64_t>();
  problem.row_of_choice = row_of_choice.const_data_ptr<int64_t>();
  problem.topk_weights = topk_weights.data_ptr();
  check_plan_values(problem, token_of_row.size(0));
}

}  // namespace turnout::ops
