// Dispatch and combine: rows to experts and back, for experts that are any modules.
#pragma once

#include <turnout/plan.h>

#include <ATen/core/Tensor.h>

namespace turnout {

/// Rows of x in the plan's order.
///
/// @param x [tokens, hidden]
/// @return [rows of the plan, hidden]; zeros where the plan's row is empty
/// Gradient: to x, summed over choices in order. Double backward works. Deterministic.
at::Tensor dispatch(const at::Tensor& x, const DispatchPlan& plan);

/// y[t] = Σ_k topk_weights[t, k] · rows[row_of_choice[t, k]], summed in order of choice.
///
/// @param rows [rows of the plan, hidden]: what the experts made of the dispatched rows
/// @param topk_weights [tokens, top_k] float32, or rows' type
/// @return [tokens, hidden] of rows' type, accumulated in float32 (float64 for float64)
/// Gradient: to rows and topk_weights. Double backward works. Deterministic.
at::Tensor combine(const at::Tensor& rows, const at::Tensor& topk_weights, const DispatchPlan& plan);

/// y + shared, or y + σ(gate_logits) · shared: what shared experts made, added to what the routed ones did.
///
/// @param y, shared [tokens, hidden]
/// @param gate_logits [tokens, 1] (Qwen2-MoE), or undefined (DeepSeek)
/// Gradient: to all three. Double backward works. Deterministic.
at::Tensor add_shared(const at::Tensor& y, const at::Tensor& shared, const at::Tensor& gate_logits = {});

}  // namespace turnout
