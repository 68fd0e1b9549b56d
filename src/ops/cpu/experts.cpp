// Experts on the CPU: hands tensors to the kernels as pointers, and torch's threads with them. float16, float64 and
// whatever the active implementation does not serve go the way of ATen calls.
#include "../experts_registration.h"
#include "bridge.h"

#include <ATen/ATen.h>
#include <torch/library.h>

namespace turnout::ops {
namespace {

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

// One pointer an expert, into contiguous tensors that are kept alive with it.
class Pointers {
 public:
  Pointers(at::TensorList weights, int64_t num_experts, int64_t dim) {
    if (weights.empty()) return;
    for (const auto& weight : weights) kept_.push_back(weight.contiguous());
    for (int64_t e = 0; e < num_experts; ++e) pointers_.push_back(expert_of(kept_, e, dim).data_ptr());
  }
  const void* const* read() const { return pointers_.empty() ? nullptr : pointers_.data(); }
  void* const* write() const { return pointers_.empty() ? nullptr : const_cast<void* const*>(pointers_.data()); }

 private:
  std::vector<at::Tensor> kept_;
  std::vector<void*> pointers_;
};

// The problem of a call, and what its pointers point into.
struct Prepared {
  Prepared(const ExpertsArgs& args, const ExpertsSizes& sizes, kernels::DType type)
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
    problem.hidden = sizes.hidden.expect_int();
    problem.ffn = sizes.ffn.expect_int();
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

  at::Tensor x, topk_weights, expert_offsets, token_of_row, row_of_choice;
  Pointers up, down, up_bias, down_bias;
  kernels::ExpertsProblem problem;
};

std::tuple<at::Tensor, at::Tensor> experts_forward_cpu(const ExpertsArgs& args, bool keep) {
  const auto& implementation = active_implementation();
  const auto type = kernel_type(args.x.scalar_type(), implementation);
  if (!type) return experts_forward_aten(args, keep);
  const auto sizes = check_experts(args);
  const Prepared prepared(args, sizes, *type);
  auto y = at::empty(args.x.sizes(), args.x.options());
  auto kept = at::empty({keep ? args.token_of_row.size(0) : 0, sizes.up_rows.expect_int()}, args.x.options());
  kernels::forward(implementation, prepared.problem, /*packed=*/nullptr, y.data_ptr(),
                   kept.size(0) > 0 ? kept.data_ptr() : nullptr, torch_threads());
  return {y, kept};
}

ExpertsGradients experts_backward_cpu(const at::Tensor& grad, const ExpertsArgs& args, const at::Tensor& kept,
                                      std::array<bool, 6> needs) {
  const auto& implementation = active_implementation();
  const auto type = kernel_type(args.x.scalar_type(), implementation);
  if (!type) return experts_backward_aten(grad, args, kept, needs);
  const auto sizes = check_experts(args);
  const Prepared prepared(args, sizes, *type);
  const auto empty_like = [](at::TensorList tensors, bool needed) {
    std::vector<at::Tensor> grads;
    if (needed)
      for (const auto& tensor : tensors) grads.push_back(at::empty(tensor.sizes(), tensor.options()));
    return grads;
  };
  ExpertsGradients made{at::empty(needs[0] ? args.x.sizes() : at::IntArrayRef{0}, args.x.options()),
                        at::empty(needs[1] ? args.topk_weights.sizes() : at::IntArrayRef{0},
                                  prepared.topk_weights.options()),
                        empty_like(args.up, needs[2]),
                        empty_like(args.down, needs[3]),
                        empty_like(args.up_bias, needs[4]),
                        empty_like(args.down_bias, needs[5])};
  const auto experts = args.num_experts();
  const Pointers up(made.up, experts, 2), down(made.down, experts, 2);
  const Pointers up_bias(made.up_bias, experts, 1), down_bias(made.down_bias, experts, 1);
  kernels::ExpertsGradients pointers;
  pointers.x = needs[0] ? made.x.data_ptr() : nullptr;
  pointers.topk_weights = needs[1] ? made.topk_weights.data_ptr() : nullptr;
  pointers.up = up.write();
  pointers.down = down.write();
  pointers.up_bias = up_bias.write();
  pointers.down_bias = down_bias.write();
  const auto rows = grad.stride(1) == 1 ? grad : grad.contiguous();
  kernels::backward(implementation, prepared.problem, kept.size(0) > 0 ? kept.data_ptr() : nullptr, rows.data_ptr(),
                    rows.stride(0), pointers, torch_threads());
  made.topk_weights = made.topk_weights.to(args.topk_weights.scalar_type());
  return made;
}

TORCH_LIBRARY_IMPL(turnout, CPU, m) {
  m.impl("experts", experts_op<experts_forward_cpu>);
  m.impl("experts_forward", experts_forward_op<experts_forward_cpu>);
  m.impl("experts_backward", experts_backward_op<experts_backward_cpu>);
}

}  // namespace
}  // namespace turnout::ops
