// The router on the CPU, by its kernel. Its scalar truth is the composition (router_composed.cpp).
#include "../checks.h"
#include "../router_composed.h"
#include "bridge.h"

#include "../../kernels/router.h"

#include <ATen/ATen.h>
#include <torch/library.h>

#include <algorithm>

namespace turnout::ops {
namespace {

kernels::RouterProblem problem_of(const at::Tensor& logits, int64_t top_k, const RouterOptions& options) {
  kernels::RouterProblem problem;
  problem.tokens = logits.size(0);
  problem.num_experts = logits.size(1);
  problem.top_k = top_k;
  problem.dtype = logits.scalar_type() == at::kBFloat16 ? kernels::DType::bf16 : kernels::DType::f32;
  problem.logits = logits.const_data_ptr();
  problem.stride = logits.stride(0);
  problem.score =
      options.score == ScoreFunction::sigmoid ? kernels::RouterScore::sigmoid : kernels::RouterScore::softmax;
  problem.weights = options.weights == RouterWeights::normalized    ? kernels::RouterWeight::normalized
                    : options.weights == RouterWeights::probability ? kernels::RouterWeight::probability
                                                                    : kernels::RouterWeight::softmax_of_topk;
  problem.epsilon = static_cast<float>(options.epsilon);
  problem.scale = static_cast<float>(options.scale);
  problem.groups = options.groups;
  problem.kept_groups = options.kept_groups;
  problem.group_top = options.group_top;
  problem.mask_by_zero = options.group_mask == GroupMask::zero;
  return problem;
}

const kernels::RouterStages& active_stages() {
  const auto* stages = kernels::router_stages(active_implementation());
  TORCH_CHECK_VALUE(stages != nullptr, "turnout: the reference has no router kernel; turnout::route does without it");
  return *stages;
}

// Rows whose elements are neighbours.
at::Tensor rows_of(const at::Tensor& logits) { return logits.stride(1) == 1 ? logits : logits.contiguous(); }

RoutingTuple route_forward_cpu(const at::Tensor& logits, int64_t top_k, c10::string_view score,
                               c10::string_view weights, double epsilon, double scale, int64_t groups,
                               int64_t kept_groups, int64_t group_top, c10::string_view group_mask,
                               const std::optional<at::Tensor>& selection_bias) {
  check_route_forward(logits, top_k);
  const auto options = router_options(score, weights, epsilon, scale, groups, kept_groups, group_top, group_mask);
  check(options, top_k, logits.size(1));
  const auto rows = rows_of(logits);
  const auto bias = selection_bias ? selection_bias->to(at::kFloat).contiguous() : at::Tensor();
  auto problem = problem_of(rows, top_k, options);
  if (bias.defined()) problem.selection_bias = bias.const_data_ptr<float>();
  const auto wide = logits.options().dtype(at::kFloat);
  auto ids = at::empty({problem.tokens, top_k}, wide.dtype(at::kLong));
  auto topk_weights = at::empty({problem.tokens, top_k}, wide);
  auto scores = at::empty({problem.tokens, problem.num_experts}, wide);
  kernels::route(active_stages(), problem,
                 {ids.mutable_data_ptr<int64_t>(), topk_weights.mutable_data_ptr<float>(),
                  scores.mutable_data_ptr<float>()},
                 torch_threads());
  return {ids, topk_weights, scores};
}

at::Tensor route_backward_cpu(const std::optional<at::Tensor>& grad_weights,
                              const std::optional<at::Tensor>& grad_scores, const at::Tensor& logits,
                              const at::Tensor& topk_ids, const at::Tensor& scores, c10::string_view score,
                              c10::string_view weights, double epsilon, double scale) {
  check_route_backward(grad_weights, grad_scores, logits, topk_ids, scores);
  const auto options = router_options(score, weights, epsilon, scale);
  const auto rows = rows_of(logits);
  const auto ids = topk_ids.contiguous(), made = scores.contiguous();
  const auto of_weights = grad_weights ? grad_weights->to(at::kFloat).contiguous() : at::Tensor();
  const auto of_scores = grad_scores ? grad_scores->to(at::kFloat).contiguous() : at::Tensor();
  const auto problem = problem_of(rows, topk_ids.size(1), options);
  // The kernel follows ids without looking.
  const auto* id = ids.const_data_ptr<int64_t>();
  TORCH_CHECK_VALUE(std::all_of(id, id + ids.numel(), [&](int64_t e) { return e >= 0 && e < problem.num_experts; }),
                    "turnout::route_backward: topk_ids holds an id that is none of the experts of logits");
  auto grad = at::empty({problem.tokens, problem.num_experts}, logits.options());
  kernels::route_backward(active_stages(), problem,
                          {ids.const_data_ptr<int64_t>(), made.const_data_ptr<float>(),
                           of_weights.defined() ? of_weights.const_data_ptr<float>() : nullptr,
                           of_scores.defined() ? of_scores.const_data_ptr<float>() : nullptr, grad.mutable_data_ptr()},
                          torch_threads());
  return grad;
}

TORCH_LIBRARY_IMPL(turnout, CPU, m) {
  m.impl("route_forward", route_forward_cpu);
  m.impl("route_backward", route_backward_cpu);
}

}  // namespace
}  // namespace turnout::ops
