// Argument checks: every error names the op, the argument, what it got and what it expected.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>
#include <c10/util/string_view.h>

#include <optional>

namespace turnout::ops {

/// `tensor` is defined and has `dim` axes. @param shape how the axes are called, such as "[tokens, top_k]"
void check_dim(const char* op, const char* name, const at::Tensor& tensor, int64_t dim, const char* shape);

/// `tensor` is float16, bfloat16, float32 or float64.
void check_floating(const char* op, const char* name, const at::Tensor& tensor);

/// `tensor` is int32 or int64.
void check_integer(const char* op, const char* name, const at::Tensor& tensor);

/// Both tensors live on one device.
void check_device(const char* op, const char* name, const at::Tensor& tensor, const char* other_name,
                  const at::Tensor& other);

/// Axis `dim` of `tensor` has `size` elements. @param why what sets the size, such as "experts of the gate"
void check_size(const char* op, const char* name, const at::Tensor& tensor, int64_t dim, const c10::SymInt& size,
                const char* why);

/// A mask of tokens: undefined, or bool with one entry a row of `rows`.
void check_token_mask(const char* op, const at::Tensor& token_mask, const at::Tensor& rows, const char* rows_name);

/// What routers and losses compute in: float32, or float64 for float64.
at::ScalarType score_type(const at::Tensor& scores);

/// `value` is at least `least`.
void check_at_least(const char* op, const char* name, int64_t value, int64_t least);

// Checks of whole ops, shared by all their backends.
void check_topk(const at::Tensor& scores, int64_t top_k);
void check_plan(const at::Tensor& topk_ids, int64_t num_experts);
void check_queue(const at::Tensor& topk_ids, int64_t num_experts, const c10::SymInt& group_size,
                 c10::string_view order, const std::optional<at::Tensor>& priority);
/// The three tensors of a plan, for x or rows on `device_of`.
void check_plan_tensors(const char* op, const at::Tensor& token_of_row, const at::Tensor& row_of_choice,
                        const at::Tensor& device_of);

/// topk_weights [tokens, top_k] float32, or the type of x.
void check_topk_weights(const char* op, const at::Tensor& topk_weights, const at::Tensor& row_of_choice,
                        const at::Tensor& x);
void check_dispatch(const at::Tensor& x, const at::Tensor& token_of_row, const at::Tensor& row_of_choice);
void check_combine(const at::Tensor& rows, const at::Tensor& topk_weights, const at::Tensor& token_of_row,
                   const at::Tensor& row_of_choice);

}  // namespace turnout::ops
