// Dispatch and combine: the public calls and their checks.
#include <turnout/combine.h>

#include "checks.h"

#include <ATen/core/dispatch/Dispatcher.h>

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
