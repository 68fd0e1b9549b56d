// Dispatch and combine as ATen calls, for any device. Index -1 is read as row 0 and then masked, never multiplied
// by 0: a NaN in row 0 must not spread.
//
// Legend: T tokens, K top_k, R = T·K rows, D hidden.
#include "../checks.h"
#include "../routing_backends.h"

#include <turnout/combine.h>

#include <ATen/ATen.h>
#include <torch/library.h>

namespace turnout::ops {

at::Tensor dispatch_aten(const at::Tensor& x_TD, const at::Tensor& token_of_row, const at::Tensor& row_of_choice) {
  check_dispatch(x_TD, token_of_row, row_of_choice);
  if (x_TD.size(0) == 0) return x_TD.new_zeros({0, x_TD.size(1)});
  return x_TD.index_select(0, token_of_row.clamp_min(0)).masked_fill_(token_of_row.lt(0).unsqueeze(1), 0);
}

at::Tensor combine_aten(const at::Tensor& rows_RD, const at::Tensor& topk_weights, const at::Tensor& token_of_row,
                        const at::Tensor& row_of_choice) {
  check_combine(rows_RD, topk_weights, token_of_row, row_of_choice);
  const auto wide = rows_RD.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  auto y_TD = at::zeros({row_of_choice.size(0), rows_RD.size(1)}, rows_RD.options().dtype(wide));
  if (rows_RD.size(0) == 0) return y_TD.to(rows_RD.scalar_type());
  for (int64_t k = 0; k < row_of_choice.size(1); ++k) {
    const auto row_T = row_of_choice.select(1, k);
    const auto weight_T1 = topk_weights.select(1, k).to(wide).unsqueeze(1);
    auto term_TD = rows_RD.index_select(0, row_T.clamp_min(0)).to(wide).mul(weight_T1);
    y_TD.add_(term_TD.masked_fill_(row_T.lt(0).unsqueeze(1), 0));
  }
  return y_TD.to(rows_RD.scalar_type());
}

namespace {

TORCH_LIBRARY_IMPL(turnout, CompositeExplicitAutograd, m) {
  m.impl("dispatch", dispatch_aten);
  m.impl("combine", combine_aten);
}

}  // namespace
}  // namespace turnout::ops
