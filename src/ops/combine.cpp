// Dispatch and combine: the public calls and their checks; and the sum with shared experts.
#include <turnout/combine.h>

#include "checks.h"

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

namespace turnout {

at::Tensor dispatch(const at::Tensor& x, const DispatchPlan& plan) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("turnout::dispatch", "")
                             .typed<at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&)>();
  return op.call(x, plan.token_of_row, plan.row_of_choice);
}

at::Tensor combine(const at::Tensor& rows, const at::Tensor& topk_weights, const DispatchPlan& plan) {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("turnout::combine", "")
          .typed<at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&)>();
  return op.call(rows, topk_weights, plan.token_of_row, plan.row_of_choice);
}

at::Tensor add_shared(const at::Tensor& y, const at::Tensor& shared, const at::Tensor& gate_logits) {
  constexpr const char* kOp = "turnout::add_shared";
  ops::check_dim(kOp, "y", y, 2, "[tokens, hidden]");
  ops::check_dim(kOp, "shared", shared, 2, "[tokens, hidden]");
  for (const int64_t axis : {0, 1}) ops::check_size(kOp, "shared", shared, axis, y.sym_size(axis), "y");
  if (!gate_logits.defined()) return y + shared;
  ops::check_dim(kOp, "gate_logits", gate_logits, 2, "[tokens, 1]");
  ops::check_size(kOp, "gate_logits", gate_logits, 0, y.sym_size(0), "tokens of y");
  ops::check_size(kOp, "gate_logits", gate_logits, 1, 1, "one gate a token");
  return y + gate_logits.sigmoid() * shared;
}

namespace {

at::Tensor add_shared_op(const at::Tensor& y, const at::Tensor& shared, const std::optional<at::Tensor>& gate_logits) {
  return add_shared(y, shared, gate_logits.value_or(at::Tensor()));
}

TORCH_LIBRARY_IMPL(turnout, CompositeImplicitAutograd, m) { m.impl("add_shared", add_shared_op); }

}  // namespace

namespace ops {

void check_dispatch(const at::Tensor& x, const at::Tensor& token_of_row, const at::Tensor& row_of_choice) {
  constexpr const char* kOp = "turnout::dispatch";
  check_dim(kOp, "x", x, 2, "[tokens, hidden]");
  check_floating(kOp, "x", x);
  check_plan_tensors(kOp, token_of_row, row_of_choice, x);
  check_size(kOp, "x", x, 0, row_of_choice.sym_size(0), "tokens of the plan");
}

void check_combine(const at::Tensor& rows, const at::Tensor& topk_weights, const at::Tensor& token_of_row,
                   const at::Tensor& row_of_choice) {
  constexpr const char* kOp = "turnout::combine";
  check_dim(kOp, "rows", rows, 2, "[rows, hidden]");
  check_floating(kOp, "rows", rows);
  check_plan_tensors(kOp, token_of_row, row_of_choice, rows);
  check_size(kOp, "rows", rows, 0, token_of_row.sym_size(0), "rows of the plan");
  check_topk_weights(kOp, topk_weights, row_of_choice, rows);
}

}  // namespace ops
}  // namespace turnout
