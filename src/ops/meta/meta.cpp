// Shapes of every op that is not a composition: what compiled and exported graphs know without running anything.
#include "../checks.h"
#include "../experts_registration.h"
#include "../router_composed.h"

#include <ATen/ATen.h>
#include <torch/library.h>

namespace turnout::ops {
namespace {

at::Tensor topk_meta(const at::Tensor& scores, int64_t top_k) {
  check_topk(scores, top_k);
  auto shape = scores.sym_sizes().vec();
  shape.back() = top_k;
  return at::empty_symint(shape, scores.options().dtype(at::kLong));
}

RoutingTuple route_forward_meta(const at::Tensor& logits, int64_t top_k, c10::string_view score,
                                c10::string_view weights, double epsilon, double scale, int64_t groups,
                                int64_t kept_groups, int64_t group_top, c10::string_view group_mask,
                                const std::optional<at::Tensor>& /*selection_bias*/) {
  check_route_forward(logits, top_k);
  check(router_options(score, weights, epsilon, scale, groups, kept_groups, group_top, group_mask), top_k,
        logits.sym_size(1).guard_int(__FILE__, __LINE__));
  const auto wide = logits.options().dtype(at::kFloat);
  return {at::empty_symint({logits.sym_size(0), top_k}, wide.dtype(at::kLong)),
          at::empty_symint({logits.sym_size(0), top_k}, wide), at::empty_symint(logits.sym_sizes(), wide)};
}

at::Tensor route_backward_meta(const std::optional<at::Tensor>& grad_weights,
                               const std::optional<at::Tensor>& grad_scores, const at::Tensor& logits,
                               const at::Tensor& topk_ids, const at::Tensor& scores, c10::string_view score,
                               c10::string_view weights, double epsilon, double scale) {
  check_route_backward(grad_weights, grad_scores, logits, topk_ids, scores);
  router_options(score, weights, epsilon, scale);
  return at::empty_symint(logits.sym_sizes(), logits.options());
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> plan_meta(const at::Tensor& topk_ids, int64_t num_experts) {
  check_plan(topk_ids, num_experts);
  const auto options = topk_ids.options().dtype(at::kLong);
  return {at::empty({num_experts + 1}, options), at::empty_symint({topk_ids.sym_numel()}, options),
          at::empty_symint(topk_ids.sym_sizes(), options)};
}

at::Tensor queue_positions_meta(const at::Tensor& topk_ids, int64_t num_experts, c10::SymInt group_size,
                                c10::string_view order, const std::optional<at::Tensor>& priority) {
  check_queue(topk_ids, num_experts, group_size, order, priority);
  return at::empty_symint(topk_ids.sym_sizes(), topk_ids.options().dtype(at::kLong));
}

at::Tensor dispatch_meta(const at::Tensor& x, const at::Tensor& token_of_row, const at::Tensor& row_of_choice) {
  check_dispatch(x, token_of_row, row_of_choice);
  return at::empty_symint({token_of_row.sym_size(0), x.sym_size(1)}, x.options());
}

at::Tensor combine_meta(const at::Tensor& rows, const at::Tensor& topk_weights, const at::Tensor& token_of_row,
                        const at::Tensor& row_of_choice) {
  check_combine(rows, topk_weights, token_of_row, row_of_choice);
  return at::empty_symint({row_of_choice.sym_size(0), rows.sym_size(1)}, rows.options());
}

at::Tensor contiguous_like(const at::Tensor& tensor) {
  return at::empty_symint(tensor.sym_sizes(), tensor.options());
}

std::tuple<at::Tensor, at::Tensor> experts_forward_meta(const ExpertsArgs& args, bool keep) {
  const auto sizes = check_experts(args);
  const c10::SymInt rows = keep ? args.token_of_row.sym_size(0) : c10::SymInt(0);
  return {contiguous_like(args.x), at::empty_symint({rows, sizes.up_rows}, args.x.options())};
}

ExpertsGradients experts_backward_meta(const at::Tensor& grad, const ExpertsArgs& args,
                                       const at::Tensor& preactivations, std::array<bool, 6> needs) {
  check_experts_backward(grad, args, check_experts(args), preactivations);
  const auto like = [](at::TensorList tensors, bool needed) {
    std::vector<at::Tensor> grads;
    if (needed)
      for (const auto& tensor : tensors) grads.push_back(contiguous_like(tensor));
    return grads;
  };
  return {needs[0] ? contiguous_like(args.x) : at::empty({0}, grad.options()),
          needs[1] ? contiguous_like(args.topk_weights) : at::empty({0}, args.topk_weights.options()),
          like(args.up, needs[2]),
          like(args.down, needs[3]),
          like(args.up_bias, needs[4]),
          like(args.down_bias, needs[5])};
}

TORCH_LIBRARY_IMPL(turnout, Meta, m) {
  m.impl("topk", topk_meta);
  m.impl("route_forward", route_forward_meta);
  m.impl("route_backward", route_backward_meta);
  m.impl("plan", plan_meta);
  m.impl("queue_positions", queue_positions_meta);
  m.impl("dispatch", dispatch_meta);
  m.impl("combine", combine_meta);
  m.impl("experts", experts_op<experts_forward_meta>);
  m.impl("experts_forward", experts_forward_op<experts_forward_meta>);
  m.impl("experts_backward", experts_backward_op<experts_backward_meta>);
}

}  // namespace
}  // namespace turnout::ops
