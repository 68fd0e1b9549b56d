// Slots: compositions of queue_positions, for any device.
//
// Legend: T tokens, K top_k, N = T·K choices, S slots = experts · groups · capacity.
#include <turnout/slots.h>

#include "checks.h"
#include "dispatcher.h"

#include <ATen/ATen.h>
#include <torch/library.h>

namespace turnout {
namespace {

// Place of each choice among the `capacity` of its expert and group; -1 = none. [tokens, top_k]
at::Tensor places(const char* op, const at::Tensor& topk_ids, int64_t num_experts, const c10::SymInt& capacity,
                  const c10::SymInt& group_size) {
  ops::check_dim(op, "topk_ids", topk_ids, 2, "[tokens, top_k]");
  TORCH_CHECK_VALUE(capacity >= 1, op, ": capacity is ", capacity, ", expected at least 1");
  const auto positions = ops::call_queue_positions(topk_ids, num_experts, group_size, "choice", std::nullopt);
  return positions.masked_fill(positions.ge(at::Scalar(capacity)), -1);
}

// Values of choices, written to the places `index` [tokens, top_k] of a vector; index -1 writes nowhere.
at::Tensor scatter_choices(const at::Tensor& index, const at::Tensor& values, const c10::SymInt& size, double empty) {
  const auto place_N = index.masked_fill(index.lt(0), at::Scalar(size)).flatten();
  return at::full_symint({size + 1}, empty, values.options())
      .scatter(0, place_N, values.flatten())
      .narrow_symint(0, 0, size);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> slot_plan_symint(const at::Tensor& topk_ids, int64_t num_experts,
                                                                c10::SymInt capacity, c10::SymInt group_size) {
  const auto place_TK = places("turnout::slot_plan", topk_ids, num_experts, capacity, group_size);
  const auto options = place_TK.options();
  const auto groups = topk_ids.sym_size(0) / group_size;
  const auto token_T1 = at::arange(at::Scalar(topk_ids.sym_size(0)), options).unsqueeze(1);
  const auto group_T1 = token_T1.div(at::Scalar(group_size), "floor");
  const auto row_TK = (topk_ids.to(at::kLong) * at::Scalar(groups) + group_T1) * at::Scalar(capacity) + place_TK;
  const auto row_of_choice = at::where(place_TK.lt(0), at::full({}, -1, options), row_TK);
  const auto rows_of_expert = groups * capacity;
  const auto token_of_row =
      scatter_choices(row_of_choice, token_T1.expand_symint(topk_ids.sym_sizes()), rows_of_expert * num_experts, -1);
  return {at::arange(num_experts + 1, options) * at::Scalar(rows_of_expert), token_of_row, row_of_choice};
}

at::Tensor slot_importance_op(const at::Tensor& topk_weights, const at::Tensor& token_of_row,
                              const at::Tensor& row_of_choice) {
  constexpr const char* kOp = "turnout::slot_importance";
  ops::check_floating(kOp, "topk_weights", topk_weights);
  ops::check_plan_tensors(kOp, token_of_row, row_of_choice, topk_weights);
  ops::check_topk_weights(kOp, topk_weights, row_of_choice, topk_weights);
  const auto weight_S = scatter_choices(row_of_choice, topk_weights.detach(), token_of_row.sym_size(0), 0);
  return (weight_S.gt(0.5).to(weight_S.scalar_type()) + weight_S.gt(0)) * 0.5;
}

std::tuple<at::Tensor, at::Tensor> dispatch_tensors_symint(const at::Tensor& topk_ids, const at::Tensor& topk_weights,
                                                           int64_t num_experts, c10::SymInt capacity,
                                                           c10::SymInt group_size) {
  constexpr const char* kOp = "turnout::dispatch_tensors";
  ops::check_dim(kOp, "topk_ids", topk_ids, 2, "[tokens, top_k]");
  ops::check_floating(kOp, "topk_weights", topk_weights);
  TORCH_CHECK_VALUE(topk_weights.sym_sizes() == topk_ids.sym_sizes(), kOp, ": topk_weights has shape ",
                    topk_weights.sym_sizes(), ", expected ", topk_ids.sym_sizes(), " as topk_ids has");
  const auto place_TK = places(kOp, topk_ids, num_experts, capacity, group_size);
  const auto tokens = topk_ids.sym_size(0), of_token = capacity * num_experts;
  const auto token_T1 = at::arange(at::Scalar(tokens), place_TK.options()).unsqueeze(1);
  const auto index_TK = token_T1 * at::Scalar(of_token) + topk_ids.to(at::kLong) * at::Scalar(capacity) + place_TK;
  const auto index = at::where(place_TK.lt(0), at::full({}, -1, place_TK.options()), index_TK);
  const auto combine =
      scatter_choices(index, topk_weights, tokens * of_token, 0).view_symint({tokens, num_experts, capacity});
  return {combine.ne(0).to(combine.scalar_type()), combine};
}

}  // namespace

DispatchPlan slot_plan(const at::Tensor& topk_ids, int64_t num_experts, int64_t capacity, int64_t group_size) {
  auto [expert_offsets, token_of_row, row_of_choice] = slot_plan_symint(topk_ids, num_experts, capacity, group_size);
  return {expert_offsets, token_of_row, row_of_choice};
}

at::Tensor slot_importance(const at::Tensor& topk_weights, const DispatchPlan& plan) {
  return slot_importance_op(topk_weights, plan.token_of_row, plan.row_of_choice);
}

at::Tensor nested_ids(const at::Tensor& topk_ids, int64_t num_outer, int64_t num_inner) {
  constexpr const char* kOp = "turnout::nested_ids";
  ops::check_dim(kOp, "topk_ids", topk_ids, 2, "[rows, top_k]");
  ops::check_integer(kOp, "topk_ids", topk_ids);
  ops::check_at_least(kOp, "num_outer", num_outer, 1);
  ops::check_at_least(kOp, "num_inner", num_inner, 1);
  TORCH_CHECK_VALUE(topk_ids.sym_size(0) % num_outer == 0, kOp, ": topk_ids has shape ", topk_ids.sym_sizes(),
                    ", expected rows in ", num_outer, " equal blocks (num_outer)");
  const auto first_O11 = (at::arange(num_outer, topk_ids.options()) * num_inner).view({num_outer, 1, 1});
  const auto ids = topk_ids.reshape_symint({num_outer, topk_ids.sym_size(0) / num_outer, topk_ids.sym_size(1)});
  return at::where(ids.lt(0), ids, ids + first_O11).view_symint(topk_ids.sym_sizes());
}

DispatchTensors dispatch_tensors(const at::Tensor& topk_ids, const at::Tensor& topk_weights, int64_t num_experts,
                                 int64_t capacity, int64_t group_size) {
  auto [dispatch, combine] = dispatch_tensors_symint(topk_ids, topk_weights, num_experts, capacity, group_size);
  return {dispatch, combine};
}

namespace {
TORCH_LIBRARY_IMPL(turnout, CompositeImplicitAutograd, m) {
  m.impl("slot_plan", slot_plan_symint);
  m.impl("slot_importance", slot_importance_op);
  m.impl("nested_ids", nested_ids);
  m.impl("dispatch_tensors", dispatch_tensors_symint);
}
}  // namespace
}  // namespace turnout
