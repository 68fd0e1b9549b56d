// Argument checks: the messages are written here once.
#include "checks.h"

namespace turnout::ops {

void check_dim(const char* op, const char* name, const at::Tensor& tensor, int64_t dim, const char* shape) {
  TORCH_CHECK_VALUE(tensor.defined(), op, ": ", name, " is not defined, expected ", shape);
  TORCH_CHECK_VALUE(tensor.dim() == dim, op, ": ", name, " has shape ", tensor.sym_sizes(), ", expected ", shape);
}

void check_floating(const char* op, const char* name, const at::Tensor& tensor) {
  TORCH_CHECK_VALUE(tensor.defined(), op, ": ", name, " is not defined, expected a tensor");
  const auto type = tensor.scalar_type();
  TORCH_CHECK_TYPE(type == at::kFloat || type == at::kDouble || type == at::kBFloat16 || type == at::kHalf, op, ": ",
                   name, " is ", type, ", expected float32, float64, bfloat16 or float16");
  TORCH_CHECK_TYPE(tensor.layout() == at::kStrided, op, ": ", name, " is ", tensor.layout(),
                   ", expected a dense tensor (Strided)");
}

void check_integer(const char* op, const char* name, const at::Tensor& tensor) {
  TORCH_CHECK_VALUE(tensor.defined(), op, ": ", name, " is not defined, expected a tensor");
  const auto type = tensor.scalar_type();
  TORCH_CHECK_TYPE(type == at::kLong || type == at::kInt, op, ": ", name, " is ", type,
                   ", expected int64 or int32");
}

void check_device(const char* op, const char* name, const at::Tensor& tensor, const char* other_name,
                  const at::Tensor& other) {
  TORCH_CHECK_VALUE(tensor.device() == other.device(), op, ": ", name, " is on ", tensor.device(), ", but ",
                    other_name, " is on ", other.device());
}

void check_size(const char* op, const char* name, const at::Tensor& tensor, int64_t dim, const c10::SymInt& size,
                const char* why) {
  TORCH_CHECK_VALUE(tensor.sym_size(dim) == size, op, ": ", name, " has shape ", tensor.sym_sizes(),
                    ", expected size ", size, " (", why, ") on axis ", dim);
}

void check_at_least(const char* op, const char* name, int64_t value, int64_t least) {
  TORCH_CHECK_VALUE(value >= least, op, ": ", name, " is ", value, ", expected at least ", least);
}

void check_token_mask(const char* op, const at::Tensor& token_mask, const at::Tensor& rows, const char* rows_name) {
  if (!token_mask.defined()) return;
  check_dim(op, "token_mask", token_mask, 1, "[tokens]");
  TORCH_CHECK_TYPE(token_mask.scalar_type() == at::kBool, op, ": token_mask is ", token_mask.scalar_type(),
                   ", expected bool");
  check_size(op, "token_mask", token_mask, 0, rows.sym_size(0), "tokens");
  check_device(op, "token_mask", token_mask, rows_name, rows);
}

at::ScalarType score_type(const at::Tensor& scores) {
  return scores.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

void check_topk(const at::Tensor& scores, int64_t top_k) {
  constexpr const char* kOp = "turnout::topk";
  check_floating(kOp, "scores", scores);
  TORCH_CHECK_VALUE(scores.dim() >= 1, kOp, ": scores has no axes, expected [..., experts]");
  TORCH_CHECK_VALUE(top_k >= 1 && scores.sym_size(-1) >= top_k, kOp, ": top_k is ", top_k, ", expected 1 to ",
                    scores.sym_size(-1), " (experts)");
}

void check_plan(const at::Tensor& topk_ids, int64_t num_experts) {
  constexpr const char* kOp = "turnout::plan";
  check_dim(kOp, "topk_ids", topk_ids, 2, "[tokens, top_k]");
  check_integer(kOp, "topk_ids", topk_ids);
  check_at_least(kOp, "num_experts", num_experts, 1);
  TORCH_CHECK_VALUE(topk_ids.sym_size(1) >= 1, kOp, ": topk_ids has shape ", topk_ids.sym_sizes(),
                    ", expected top_k of at least 1");
}

void check_queue(const at::Tensor& topk_ids, int64_t num_experts, const c10::SymInt& group_size,
                 c10::string_view order, const std::optional<at::Tensor>& priority) {
  constexpr const char* kOp = "turnout::queue_positions";
  check_dim(kOp, "topk_ids", topk_ids, 2, "[tokens, top_k]");
  check_integer(kOp, "topk_ids", topk_ids);
  check_at_least(kOp, "num_experts", num_experts, 1);
  TORCH_CHECK_VALUE(group_size >= 1 && topk_ids.sym_size(0) % group_size == 0, kOp, ": group_size is ", group_size,
                    ", expected a divisor of ", topk_ids.sym_size(0), " tokens");
  TORCH_CHECK_VALUE(order == "choice" || order == "position" || order == "score" || order == "random", kOp,
                    ": order is '", order, "', expected one of choice, position, score, random");
  const bool needs = order == "score" || order == "random";
  TORCH_CHECK_VALUE(needs == priority.has_value(), kOp, ": order '", order, needs ? "' needs" : "' takes no",
                    " priority");
  if (!priority) return;
  check_floating(kOp, "priority", *priority);
  check_device(kOp, "priority", *priority, "topk_ids", topk_ids);
  TORCH_CHECK_VALUE(priority->sym_sizes() == topk_ids.sym_sizes(), kOp, ": priority has shape ",
                    priority->sym_sizes(), ", expected ", topk_ids.sym_sizes(), " as topk_ids has");
}

void check_plan_tensors(const char* op, const at::Tensor& token_of_row, const at::Tensor& row_of_choice,
                        const at::Tensor& device_of) {
  check_dim(op, "token_of_row", token_of_row, 1, "[rows]");
  check_dim(op, "row_of_choice", row_of_choice, 2, "[tokens, top_k]");
  for (const auto& [name, tensor] : {std::pair{"token_of_row", token_of_row}, {"row_of_choice", row_of_choice}}) {
    TORCH_CHECK_TYPE(tensor.scalar_type() == at::kLong, op, ": ", name, " is ", tensor.scalar_type(),
                     ", expected int64");
    check_device(op, name, tensor, "x", device_of);
  }
}

void check_topk_weights(const char* op, const at::Tensor& topk_weights, const at::Tensor& row_of_choice,
                        const at::Tensor& x) {
  check_dim(op, "topk_weights", topk_weights, 2, "[tokens, top_k]");
  TORCH_CHECK_VALUE(topk_weights.sym_sizes() == row_of_choice.sym_sizes(), op, ": topk_weights has shape ",
                    topk_weights.sym_sizes(), ", expected ", row_of_choice.sym_sizes(), " (tokens, top_k)");
  const auto type = topk_weights.scalar_type();
  const auto other = x.scalar_type() == at::kFloat ? std::string() : c10::str(" or ", x.scalar_type(), " as x is");
  TORCH_CHECK_TYPE(type == at::kFloat || type == x.scalar_type(), op, ": topk_weights is ", type, ", expected Float",
                   other);
  check_device(op, "topk_weights", topk_weights, "x", x);
}

}  // namespace turnout::ops
