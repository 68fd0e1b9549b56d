// Gradient of the router's kernel: one node each way. A second derivative goes through the composition.
#include "../router_composed.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

namespace turnout::ops {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

std::optional<at::Tensor> if_defined(const at::Tensor& tensor) {
  return tensor.defined() ? std::optional(tensor) : std::nullopt;
}

// The gradient of the logits as a part of the graph.
at::Tensor differentiable_gradient(const variable_list& grads, const at::Tensor& logits, const at::Tensor& topk_ids,
                                   const RouterOptions& options) {
  const auto routing = weigh_composed(logits, topk_ids, {}, options);
  variable_list made{routing.topk_weights, routing.scores}, outputs, given;
  for (size_t i = 0; i < made.size(); ++i) {
    if (!grads[1 + i].defined()) continue;
    outputs.push_back(made[i]);
    given.push_back(grads[1 + i]);
  }
  return torch::autograd::grad(outputs, {logits}, given, /*retain_graph=*/true, /*create_graph=*/true)[0];
}

class Route : public Function<Route> {
 public:
  static variable_list forward(AutogradContext* context, const at::Tensor& logits, int64_t top_k,
                               const RouterOptions& options, const std::optional<at::Tensor>& selection_bias) {
    at::AutoDispatchBelowADInplaceOrView below;
    auto [ids, weights, scores] = call_route_forward(logits, top_k, options, selection_bias);
    context->save_for_backward({logits, ids, scores});
    context->mark_non_differentiable({ids});
    context->set_materialize_grads(false);
    context->saved_data["score"] = to_string(options.score);
    context->saved_data["weights"] = to_string(options.weights);
    context->saved_data["epsilon"] = options.epsilon;
    context->saved_data["scale"] = options.scale;
    return {ids, weights, scores};
  }

  static variable_list backward(AutogradContext* context, variable_list grads) {
    if (!grads[1].defined() && !grads[2].defined()) return {{}, {}, {}, {}};
    const auto saved = context->get_saved_variables();
    auto& data = context->saved_data;
    const auto options = router_options(data["score"].toStringRef(), data["weights"].toStringRef(),
                                        data["epsilon"].toDouble(), data["scale"].toDouble());
    if (at::GradMode::is_enabled()) return {differentiable_gradient(grads, saved[0], saved[1], options), {}, {}, {}};
    return {call_route_backward(if_defined(grads[1]), if_defined(grads[2]), saved[0], saved[1], saved[2], options),
            {}, {}, {}};
  }
};

RoutingTuple route_forward_autograd(const at::Tensor& logits, int64_t top_k, c10::string_view score,
                                    c10::string_view weights, double epsilon, double scale, int64_t groups,
                                    int64_t kept_groups, int64_t group_top, c10::string_view group_mask,
                                    const std::optional<at::Tensor>& selection_bias) {
  const auto made = Route::apply(
      logits, top_k, router_options(score, weights, epsilon, scale, groups, kept_groups, group_top, group_mask),
      selection_bias);
  return {made[0], made[1], made[2]};
}

TORCH_LIBRARY_IMPL(turnout, Autograd, m) { m.impl("route_forward", route_forward_autograd); }

}  // namespace
}  // namespace turnout::ops
