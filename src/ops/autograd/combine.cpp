// Gradients of dispatch and combine. Each backward is made of differentiable calls, so double backward works.
#include <turnout/combine.h>

#include "../defined.h"

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

namespace turnout::ops {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

// dispatch copies a token to each of its rows; its gradient is the sum over them: combine with weights of 1.
class Dispatch : public Function<Dispatch> {
 public:
  static at::Tensor forward(AutogradContext* context, const at::Tensor& x, const at::Tensor& token_of_row,
                            const at::Tensor& row_of_choice) {
    context->save_for_backward({token_of_row, row_of_choice});
    at::AutoDispatchBelowADInplaceOrView below;
    return dispatch(x, {{}, token_of_row, row_of_choice});
  }

  static variable_list backward(AutogradContext* context, variable_list grads) {
    const auto saved = context->get_saved_variables();
    const auto wide = grads[0].scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
    const auto ones = at::ones_symint(saved[1].sym_sizes(), grads[0].options().dtype(wide));
    return {combine(grads[0].contiguous(), ones, {{}, saved[0], saved[1]}), {}, {}};
  }
};

class Combine : public Function<Combine> {
 public:
  static at::Tensor forward(AutogradContext* context, const at::Tensor& rows, const at::Tensor& topk_weights,
                            const at::Tensor& token_of_row, const at::Tensor& row_of_choice) {
    context->save_for_backward({rows, topk_weights, token_of_row, row_of_choice});
    at::AutoDispatchBelowADInplaceOrView below;
    return combine(rows, topk_weights, {{}, token_of_row, row_of_choice});
  }

  static variable_list backward(AutogradContext* context, variable_list grads) {
    const auto saved = context->get_saved_variables();
    const auto &rows_RD = saved[0], &weights_TK = saved[1], &token_of_row = saved[2], &row_of_choice = saved[3];
    const DispatchPlan plan{{}, token_of_row, row_of_choice};
    const auto grad_RD = dispatch(grads[0], plan);
    at::Tensor grad_rows, grad_weights;
    if (context->needs_input_grad(0)) {
      // The weight of each row; choices that are not sent write to a row of their own behind the last, cut off.
      const auto rows = token_of_row.sym_size(0);
      const auto place_N = at::where(row_of_choice.lt(0), at::Scalar(rows), row_of_choice).flatten();
      const auto weight_R = at::zeros_symint({rows + 1}, weights_TK.options())
                                .scatter(0, place_N, weights_TK.flatten())
                                .narrow_symint(0, 0, rows);
      grad_rows = (grad_RD * weight_R.unsqueeze(1)).to(rows_RD.scalar_type());
    }
    if (context->needs_input_grad(1)) {
      const auto wide = rows_RD.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
      const auto dots_R = (grad_RD.to(wide) * rows_RD).sum(-1);
      const auto safe_N = row_of_choice.clamp_min(0).flatten();
      grad_weights = dots_R.index_select(0, safe_N)
                         .view_symint(row_of_choice.sym_sizes())
                         .masked_fill(row_of_choice.lt(0), 0)
                         .to(weights_TK.scalar_type());
    }
    return {grad_rows, grad_weights, {}, {}};
  }
};

at::Tensor dispatch_autograd(const at::Tensor& x, const at::Tensor& token_of_row, const at::Tensor& row_of_choice) {
  check_defined("turnout::dispatch", {{"x", x}, {"token_of_row", token_of_row}, {"row_of_choice", row_of_choice}});
  return Dispatch::apply(x, token_of_row, row_of_choice);
}

at::Tensor combine_autograd(const at::Tensor& rows, const at::Tensor& topk_weights, const at::Tensor& token_of_row,
                            const at::Tensor& row_of_choice) {
  check_defined("turnout::combine", {{"rows", rows},
                                     {"topk_weights", topk_weights},
                                     {"token_of_row", token_of_row},
                                     {"row_of_choice", row_of_choice}});
  return Combine::apply(rows, topk_weights, token_of_row, row_of_choice);
}

TORCH_LIBRARY_IMPL(turnout, Autograd, m) {
  m.impl("dispatch", dispatch_autograd);
  m.impl("combine", combine_autograd);
}

}  // namespace
}  // namespace turnout::ops
