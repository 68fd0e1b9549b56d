// Experts on the CPU: hands tensors to the kernels as pointers, and torch's threads with them. float16, float64 and
// whatever the active implementation does not serve go the way of ATen calls.
#include "../experts_registration.h"
#include "fresh.h"
#include "problem.h"

#include <ATen/ATen.h>
#include <torch/library.h>

namespace turnout::ops {
namespace {

std::tuple<at::Tensor, at::Tensor> experts_forward_cpu(const ExpertsArgs& args, bool keep) {
  const auto& implementation = active_implementation();
  const auto type = kernel_type(args.x.scalar_type(), implementation);
  if (!type) return experts_forward_aten(args, keep);
  const auto sizes = check_experts(args);
  const Prepared prepared(args, sizes.ffn.expect_int(), *type);
  auto y = fresh(args.x.sizes(), args.x.options());
  auto kept = fresh({keep ? args.token_of_row.size(0) : 0, sizes.up_rows.expect_int()}, args.x.options());
  kernels::forward(implementation, prepared.problem, /*packed=*/nullptr, y.data_ptr(),
                   kept.size(0) > 0 ? kept.data_ptr() : nullptr, torch_threads());
  if (kept.size(0) > 0) {  // rows behind the live ones: zeros, as the ATen path leaves, not what the memory held
    const auto live = prepared.expert_offsets.const_data_ptr<int64_t>()[args.num_experts()];
    kept.narrow(0, live, kept.size(0) - live).zero_();
  }
  return {y, kept};
}

ExpertsGradients experts_backward_cpu(const at::Tensor& grad, const ExpertsArgs& args, const at::Tensor& kept,
                                      std::array<bool, 6> needs) {
  const auto& implementation = active_implementation();
  const auto type = kernel_type(args.x.scalar_type(), implementation);
  if (!type) return experts_backward_aten(grad, args, kept, needs);
  const auto sizes = check_experts(args);
  check_experts_backward(grad, args, sizes, kept);
  const Prepared prepared(args, sizes.ffn.expect_int(), *type);
  const auto empty_like = [](at::TensorList tensors, bool needed) {
    std::vector<at::Tensor> grads;
    if (needed)
      for (const auto& tensor : tensors) grads.push_back(fresh(tensor.sizes(), tensor.options()));
    return grads;
  };
  ExpertsGradients made{
      fresh(needs[0] ? args.x.sizes() : at::IntArrayRef{0}, args.x.options()),
      at::empty(needs[1] ? args.topk_weights.sizes() : at::IntArrayRef{0}, prepared.topk_weights.options()),
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
  const auto saved = kept.contiguous();
  kernels::backward(implementation, prepared.problem, saved.size(0) > 0 ? saved.data_ptr() : nullptr, rows.data_ptr(),
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
