// The gate's product: the public call, its checks, ATen calls for any device, shapes, autocast.
#include "gate.h"

#include "checks.h"

#include <turnout/gate.h>

#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

namespace turnout {
namespace ops {
namespace {

constexpr const char* kOp = "turnout::gate_logits";
using Signature = at::Tensor(const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&);

c10::TypedOperatorHandle<Signature> gate_logits() {
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow(kOp, "").typed<Signature>();
  return op;
}

void check_as_x(const char* op, const char* name, const at::Tensor& tensor, const at::Tensor& x) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == x.scalar_type(), op, ": ", name, " is ", tensor.scalar_type(),
                   ", expected ", x.scalar_type(), " as x is");
  check_device(op, name, tensor, "x", x);
}

}  // namespace

void check_gate(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias) {
  check_dim(kOp, "x", x, 2, "[tokens, hidden]");
  check_floating(kOp, "x", x);
  check_dim(kOp, "weight", weight, 2, "[experts, hidden]");
  check_size(kOp, "weight", weight, 1, x.sym_size(1), "hidden of x");
  TORCH_CHECK_VALUE(weight.sym_size(0) >= 1 && weight.sym_size(1) >= 1, kOp, ": weight has shape ", weight.sym_sizes(),
                    ", expected at least one expert and hidden of at least 1");
  check_as_x(kOp, "weight", weight, x);
  if (!bias) return;
  check_dim(kOp, "bias", *bias, 1, "[experts]");
  check_size(kOp, "bias", *bias, 0, weight.sym_size(0), "experts of weight");
  check_as_x(kOp, "bias", *bias, x);
}

void check_gate_backward(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weight) {
  constexpr const char* kBackward = "turnout::gate_logits_backward";
  check_gate(x, weight, std::nullopt);
  check_dim(kBackward, "grad", grad, 2, "[tokens, experts]");
  check_size(kBackward, "grad", grad, 0, x.sym_size(0), "tokens of x");
  check_size(kBackward, "grad", grad, 1, weight.sym_size(0), "experts of weight");
  check_as_x(kBackward, "grad", grad, x);
}

at::Tensor gate_logits_aten(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias) {
  check_gate(x, weight, bias);
  return at::linear(x, weight, bias);
}

GateGradients gate_logits_backward_aten(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weight,
                                        std::array<bool, 3> needs) {
  check_gate_backward(grad, x, weight);
  const auto none = at::empty({0}, x.options());
  return {needs[0] ? grad.matmul(weight) : none, needs[1] ? grad.t().matmul(x) : none, needs[2] ? grad.sum(0) : none};
}

namespace {

at::Tensor gate_logits_meta(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias) {
  check_gate(x, weight, bias);
  return at::empty_symint({x.sym_size(0), weight.sym_size(0)}, x.options());
}

GateGradients gate_logits_backward_meta(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weight,
                                        std::array<bool, 3> needs) {
  check_gate_backward(grad, x, weight);
  const auto make = [&](bool needed, c10::SymIntArrayRef sizes) {
    return needed ? at::empty_symint(sizes, x.options()) : at::empty({0}, x.options());
  };
  return {make(needs[0], x.sym_sizes()), make(needs[1], weight.sym_sizes()), make(needs[2], {weight.sym_size(0)})};
}

template <c10::DeviceType device>
at::Tensor gate_logits_autocast(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(
      c10::DispatchKeySet(at::autocast::get_autocast_dispatch_key_from_device_type(device)));
  const auto type = at::autocast::get_autocast_dtype(device);
  const auto cast = [&](const at::Tensor& tensor) { return at::autocast::cached_cast(type, tensor, device); };
  return gate_logits().call(cast(x), cast(weight), bias ? std::optional(cast(*bias)) : std::nullopt);
}

TORCH_LIBRARY_IMPL(turnout, CompositeExplicitAutograd, m) {
  m.impl("gate_logits", gate_logits_aten);
  m.impl("gate_logits_backward", gate_logits_backward_aten);
}
TORCH_LIBRARY_IMPL(turnout, Meta, m) {
  m.impl("gate_logits", gate_logits_meta);
  m.impl("gate_logits_backward", gate_logits_backward_meta);
}
TORCH_LIBRARY_IMPL(turnout, AutocastCPU, m) { m.impl("gate_logits", gate_logits_autocast<c10::DeviceType::CPU>); }
TORCH_LIBRARY_IMPL(turnout, AutocastCUDA, m) { m.impl("gate_logits", gate_logits_autocast<c10::DeviceType::CUDA>); }

}  // namespace
}  // namespace ops

at::Tensor gate_logits(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias) {
  return ops::gate_logits().call(x, weight, bias.defined() ? std::optional(bias) : std::nullopt);
}

}  // namespace turnout
