// Gradient of experts: forward and backward are ops, called below autograd, so compiled graphs see two nodes.
#include "../defined.h"
#include "../experts_registration.h"

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <string>

namespace turnout::ops {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

using ForwardSignature = std::tuple<at::Tensor, at::Tensor>(const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                                            const at::Tensor&, const at::Tensor&, at::TensorList,
                                                            at::TensorList, at::TensorList, at::TensorList,
                                                            c10::string_view, bool, bool);
using BackwardSignature = ExpertsGradientsTuple(const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                                const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                                at::TensorList, at::TensorList, at::TensorList, at::TensorList,
                                                c10::string_view, const at::Tensor&, std::array<bool, 6>);

template <class Signature>
c10::TypedOperatorHandle<Signature> find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

// experts_backward as a node of its own: its only job is to refuse a second derivative in words.
class RefuseDoubleBackward : public Function<RefuseDoubleBackward> {
 public:
  static variable_list forward(AutogradContext*, at::TensorList grads, at::TensorList /*inputs*/) {
    variable_list fresh;
    for (const auto& grad : grads) fresh.push_back(grad.alias());
    return fresh;
  }
  static variable_list backward(AutogradContext*, variable_list) {
    TORCH_CHECK_NOT_IMPLEMENTED(false,
                                "turnout::experts: no second derivative; use turnout::dispatch and turnout::combine "
                                "with expert modules where double backward is needed");
  }
};

class Experts : public Function<Experts> {
 public:
  static at::Tensor forward(AutogradContext* context, const at::Tensor& x, const at::Tensor& topk_weights,
                            const at::Tensor& expert_offsets, const at::Tensor& token_of_row,
                            const at::Tensor& row_of_choice, at::TensorList up, at::TensorList down,
                            at::TensorList up_bias, at::TensorList down_bias, const std::string& activation,
                            bool recompute, bool weight_before_down) {
    at::AutoDispatchBelowADInplaceOrView below;
    static const auto op = find<ForwardSignature>("turnout::experts_forward");
    auto [y, preactivations] = op.call(x, topk_weights, expert_offsets, token_of_row, row_of_choice, up, down,
                                       up_bias, down_bias, activation, /*keep=*/!recompute, weight_before_down);
    variable_list saved{x, topk_weights, expert_offsets, token_of_row, row_of_choice, preactivations};
    for (const auto list : {up, down, up_bias, down_bias}) saved.insert(saved.end(), list.begin(), list.end());
    context->save_for_backward(saved);
    context->saved_data["activation"] = activation;
    context->saved_data["sizes"] =
        std::vector<int64_t>{static_cast<int64_t>(up.size()), static_cast<int64_t>(down.size()),
                             static_cast<int64_t>(up_bias.size()), static_cast<int64_t>(down_bias.size())};
    return y;
  }

  static variable_list backward(AutogradContext* context, variable_list grads) {
    const auto saved = context->get_saved_variables();
    const auto sizes = context->saved_data["sizes"].toIntVector();
    const auto activation = context->saved_data["activation"].toStringRef();
    std::array<at::TensorList, 4> lists;
    std::array<bool, 6> needs{context->needs_input_grad(0), context->needs_input_grad(1)};
    size_t at = 6, input = 5;  // where the lists begin among what was saved, and among the inputs
    for (size_t i = 0; i < lists.size(); ++i) {
      lists[i] = at::TensorList(saved).slice(at, sizes[i]);
      for (int64_t n = 0; n < sizes[i]; ++n) needs[2 + i] = needs[2 + i] || context->needs_input_grad(input + n);
      at += sizes[i];
      input += sizes[i];
    }
    static const auto op = find<BackwardSignature>("turnout::experts_backward");
    auto [x, topk_weights, up, down, up_bias, down_bias] =
        op.call(grads[0].contiguous(), saved[0], saved[1], saved[2], saved[3], saved[4], lists[0], lists[1], lists[2],
                lists[3], activation, saved[5], needs);
    variable_list result{needs[0] ? x : at::Tensor(), needs[1] ? topk_weights : at::Tensor(), {}, {}, {}};
    const std::array<std::vector<at::Tensor>*, 4> made{&up, &down, &up_bias, &down_bias};
    for (size_t i = 0; i < made.size(); ++i) {
      made[i]->resize(sizes[i]);
      result.insert(result.end(), made[i]->begin(), made[i]->end());
    }
    result.insert(result.end(), 3, at::Tensor());  // activation, recompute, weight_before_down
    return result;
  }
};

at::Tensor experts_autograd(const at::Tensor& x, const at::Tensor& topk_weights, const at::Tensor& expert_offsets,
                            const at::Tensor& token_of_row, const at::Tensor& row_of_choice, at::TensorList up,
                            at::TensorList down, at::TensorList up_bias, at::TensorList down_bias,
                            c10::string_view activation, bool recompute, bool weight_before_down) {
  constexpr const char* kOp = "turnout::experts";
  check_defined(kOp, {{"x", x},
                      {"topk_weights", topk_weights},
                      {"expert_offsets", expert_offsets},
                      {"token_of_row", token_of_row},
                      {"row_of_choice", row_of_choice}});
  for (const auto& [name, list] :
       {std::pair{"up", up}, {"down", down}, {"up_bias", up_bias}, {"down_bias", down_bias}})
    for (const auto& tensor : list) check_defined(kOp, {{name, tensor}});
  return Experts::apply(x, topk_weights, expert_offsets, token_of_row, row_of_choice, up, down, up_bias, down_bias,
                        std::string(activation), recompute, weight_before_down);
}

ExpertsGradientsTuple experts_backward_autograd(const at::Tensor& grad, const at::Tensor& x,
                                                const at::Tensor& topk_weights, const at::Tensor& expert_offsets,
                                                const at::Tensor& token_of_row, const at::Tensor& row_of_choice,
                                                at::TensorList up, at::TensorList down, at::TensorList up_bias,
                                                at::TensorList down_bias, c10::string_view activation,
                                                const at::Tensor& preactivations, std::array<bool, 6> needs) {
  ExpertsGradientsTuple grads;
  {
    at::AutoDispatchBelowADInplaceOrView below;
    static const auto op = find<BackwardSignature>("turnout::experts_backward");
    grads = op.call(grad, x, topk_weights, expert_offsets, token_of_row, row_of_choice, up, down, up_bias, down_bias,
                    activation, preactivations, needs);
  }
  if (!at::GradMode::is_enabled()) return grads;

  auto& [grad_x, grad_weights, grad_up, grad_down, grad_up_bias, grad_down_bias] = grads;
  variable_list inputs{grad, x, topk_weights};
  for (const auto list : {up, down, up_bias, down_bias}) inputs.insert(inputs.end(), list.begin(), list.end());
  variable_list flat{grad_x, grad_weights};
  const std::array<std::vector<at::Tensor>*, 4> lists{&grad_up, &grad_down, &grad_up_bias, &grad_down_bias};
  for (const auto* list : lists) flat.insert(flat.end(), list->begin(), list->end());
  flat = RefuseDoubleBackward::apply(at::TensorList(flat), at::TensorList(inputs));
  size_t next = 0;
  grad_x = flat[next++];
  grad_weights = flat[next++];
  for (auto* list : lists)
    for (auto& tensor : *list) tensor = flat[next++];
  return grads;
}

TORCH_LIBRARY_IMPL(turnout, Autograd, m) {
  m.impl("experts", experts_autograd);
  m.impl("experts_backward", experts_backward_autograd);
}

}  // namespace
}  // namespace turnout::ops
