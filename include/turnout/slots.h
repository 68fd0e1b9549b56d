// Slots: the places of a capacity as rows of a plan, empty ones included, as GShard's dispatch and combine tensors
// have them; and what a hierarchy of routers makes of them.
#pragma once

#include <turnout/plan.h>

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace turnout {

/// A plan whose rows are places instead of choices: row (e · groups + g) · capacity + p is place p of group g in
/// expert e, so that dispatch() makes [experts, groups, capacity, hidden] with zeros in empty places, and combine()
/// takes it back.
///
/// @param topk_ids [tokens, top_k] int32 or int64; -1 = not sent. First choices queue before second ones, by position;
///        what queues behind `capacity` gets no place (limit_capacity also clears its id and weight)
/// @param group_size tokens of a group; must divide tokens
/// @return expert_offsets e · groups · capacity; token_of_row [experts · groups · capacity], -1 = empty;
///         row_of_choice [tokens, top_k], -1 = no place. Not for experts(), which takes plans without empty rows.
/// Gradient: none. Deterministic. Source: tensor2tensor moe.py, arXiv:2006.16668.
DispatchPlan slot_plan(const at::Tensor& topk_ids, int64_t num_experts, int64_t capacity, int64_t group_size);

/// What a slot of an outer router means to the inner one: 1 where its weight is above 0.5, 0.5 where it is above 0,
/// 0 where the slot is empty. An exact half-and-half split makes no first choice, as in the source.
///
/// @param topk_weights [tokens, top_k] of the outer router
/// @param plan slots of the same choices
/// @return [rows of the plan] of topk_weights' type
/// Gradient: none. Source: tensor2tensor moe.py, PyPI mixture-of-experts 0.2.3.
at::Tensor slot_importance(const at::Tensor& topk_weights, const DispatchPlan& plan);

/// Ids of the leaves of a two-level hierarchy: inner expert i within outer expert o is o · num_inner + i.
///
/// @param topk_ids [rows, top_k] of inner routers; rows lie in num_outer equal blocks, one an outer expert; -1 stays
/// @throws c10::ValueError when the rows do not divide
/// Gradient: none.
at::Tensor nested_ids(const at::Tensor& topk_ids, int64_t num_outer, int64_t num_inner);

/// GShard's dense tensors, one entry a place of an expert. Large: for reading and tests; layers use slot_plan() or
/// plan().
struct DispatchTensors {
  at::Tensor dispatch;  ///< [tokens, experts, capacity] 1 where combine is not 0, else 0
  at::Tensor combine;   ///< [tokens, experts, capacity] its weight there
};

/// @param topk_ids, topk_weights [tokens, top_k]; group_size as in slot_plan()
/// @return both of topk_weights' type
/// Gradient: combine to topk_weights. Deterministic.
DispatchTensors dispatch_tensors(const at::Tensor& topk_ids, const at::Tensor& topk_weights, int64_t num_experts,
                                 int64_t capacity, int64_t group_size);

}  // namespace turnout
