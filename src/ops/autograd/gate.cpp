// Gradient of the gate's product: one op; differentiable calls where a second derivative is on the way.
#include "../defined.h"
#include "../gate.h"

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

namespace turnout::ops {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

using ForwardSignature = at::Tensor(const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&);
using BackwardSignature = GateGradients(const at::Tensor&, const at::Tensor&, const at::Tensor&, std::array<bool, 3>);

template <class Signature>
c10::TypedOperatorHandle<Signature> find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

class GateLogits : public Function<GateLogits> {
 public:
  static at::Tensor forward(AutogradContext* context, const at::Tensor& x, const at::Tensor& weight,
                            const std::optional<at::Tensor>& bias) {
    context->save_for_backward({x, weight});
    context->saved_data["bias"] = bias.has_value();
    at::AutoDispatchBelowADInplaceOrView below;
    static const auto op = find<ForwardSignature>("turnout::gate_logits");
    return op.call(x, weight, bias);
  }

  static variable_list backward(AutogradContext* context, variable_list grads) {
    const auto saved = context->get_saved_variables();
    const auto &x = saved[0], &weight = saved[1], &grad = grads[0];
    // an input that is not given has no edge to ask
    const bool bias = context->saved_data["bias"].toBool() && context->needs_input_grad(2);
    const std::array<bool, 3> needs{context->needs_input_grad(0), context->needs_input_grad(1), bias};
    if (at::GradMode::is_enabled())
      return {needs[0] ? grad.matmul(weight) : at::Tensor(), needs[1] ? grad.t().matmul(x) : at::Tensor(),
              needs[2] ? grad.sum(0) : at::Tensor()};
    static const auto op = find<BackwardSignature>("turnout::gate_logits_backward");
    const auto [of_x, of_weight, of_bias] = op.call(grad, x, weight, needs);
    return {needs[0] ? of_x : at::Tensor(), needs[1] ? of_weight : at::Tensor(), needs[2] ? of_bias : at::Tensor()};
  }
};

at::Tensor gate_logits_autograd(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias) {
  check_defined("turnout::gate_logits", {{"x", x}, {"weight", weight}});
  return GateLogits::apply(x, weight, bias);
}

TORCH_LIBRARY_IMPL(turnout, Autograd, m) { m.impl("gate_logits", gate_logits_autograd); }

}  // namespace
}  // namespace turnout::ops
