// The gate's product on the CPU by the kernels; float16, float64 and the reference go the way of ATen calls.
#include "../gate.h"
#include "problem.h"

#include "../../kernels/linear.h"

#include <ATen/ATen.h>
#include <torch/library.h>

namespace turnout::ops {
namespace {

std::optional<kernels::DType> served_type(const at::Tensor& x) {
  const auto& implementation = active_implementation();
  return implementation.stages == nullptr ? std::nullopt : kernel_type(x.scalar_type(), implementation);
}

at::Tensor contiguous_rows(const at::Tensor& rows) { return rows.stride(1) == 1 ? rows : rows.contiguous(); }

kernels::LinearProblem problem_of(const at::Tensor& x, const at::Tensor& weight, kernels::DType type) {
  return {x.size(0), x.size(1), weight.size(0), type, x.data_ptr(), x.stride(0), weight.data_ptr()};
}

at::Tensor gate_logits_cpu(const at::Tensor& given, const at::Tensor& given_weight,
                           const std::optional<at::Tensor>& given_bias) {
  const auto type = served_type(given);
  if (!type) return gate_logits_aten(given, given_weight, given_bias);
  check_gate(given, given_weight, given_bias);
  const auto x = contiguous_rows(given), weight = given_weight.contiguous();
  const auto bias = given_bias ? given_bias->contiguous() : at::Tensor();
  auto y = at::empty({x.size(0), weight.size(0)}, x.options());
  auto problem = problem_of(x, weight, *type);
  problem.bias = given_bias ? bias.data_ptr() : nullptr;
  kernels::linear(active_implementation(), problem, y.data_ptr(), torch_threads());
  return y;
}

GateGradients gate_logits_backward_cpu(const at::Tensor& given_grad, const at::Tensor& given,
                                       const at::Tensor& given_weight, std::array<bool, 3> needs) {
  const auto type = served_type(given);
  if (!type) return gate_logits_backward_aten(given_grad, given, given_weight, needs);
  check_gate_backward(given_grad, given, given_weight);
  const auto grad = contiguous_rows(given_grad), x = contiguous_rows(given), weight = given_weight.contiguous();
  const auto make = [&](bool needed, at::IntArrayRef sizes) {
    return at::empty(needed ? sizes : at::IntArrayRef{0}, x.options());
  };
  GateGradients made{make(needs[0], x.sizes()), make(needs[1], weight.sizes()), make(needs[2], {weight.size(0)})};
  const kernels::LinearGradients pointers{needs[0] ? std::get<0>(made).data_ptr() : nullptr,
                                          needs[1] ? std::get<1>(made).data_ptr() : nullptr,
                                          needs[2] ? std::get<2>(made).data_ptr() : nullptr};
  kernels::linear_backward(active_implementation(), problem_of(x, weight, *type), grad.data_ptr(), grad.stride(0),
                           pointers, torch_threads());
  return made;
}

TORCH_LIBRARY_IMPL(turnout, CPU, m) {
  m.impl("gate_logits", gate_logits_cpu);
  m.impl("gate_logits_backward", gate_logits_backward_cpu);
}

}  // namespace
}  // namespace turnout::ops
