// Dispatch and combine on the CPU, by the kernels. Sums in float64 and float16 go the way of ATen calls.
#include "../checks.h"
#include "../routing_backends.h"
#include "bridge.h"
#include "fresh.h"

#include "../../kernels/rows.h"

#include <ATen/ATen.h>
#include <torch/library.h>

namespace turnout::ops {
namespace {

// The kernels follow these numbers without looking.
at::Tensor checked(const char* op, const char* name, const at::Tensor& places, int64_t limit) {
  auto own = places.contiguous();
  const auto* place = own.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < own.numel(); ++i)
    TORCH_CHECK_VALUE(place[i] >= -1 && place[i] < limit, op, ": ", name, " holds ", place[i], ", expected -1 to ",
                      limit - 1);
  return own;
}

at::Tensor dispatch_cpu(const at::Tensor& x, const at::Tensor& token_of_row, const at::Tensor& row_of_choice) {
  check_dispatch(x, token_of_row, row_of_choice);
  const auto tokens = checked("turnout::dispatch", "token_of_row", token_of_row, x.size(0));
  const auto own = x.stride(1) == 1 ? x : x.contiguous();
  auto rows = fresh({tokens.size(0), x.size(1)}, x.options());
  const auto size = static_cast<int64_t>(x.element_size());
  kernels::gather_rows(static_cast<const char*>(own.const_data_ptr()), own.stride(0) * size, own.size(1) * size,
                       tokens.const_data_ptr<int64_t>(), tokens.size(0), static_cast<char*>(rows.data_ptr()),
                       torch_threads());
  return rows;
}

at::Tensor combine_cpu(const at::Tensor& rows, const at::Tensor& topk_weights, const at::Tensor& token_of_row,
                       const at::Tensor& row_of_choice) {
  const bool bf16 = rows.scalar_type() == at::kBFloat16;
  if (!bf16 && rows.scalar_type() != at::kFloat) return combine_aten(rows, topk_weights, token_of_row, row_of_choice);
  check_combine(rows, topk_weights, token_of_row, row_of_choice);
  const auto choices = checked("turnout::combine", "row_of_choice", row_of_choice, rows.size(0));
  const auto own = rows.contiguous();
  const auto weights = topk_weights.to(at::kFloat).contiguous();
  auto y = fresh({choices.size(0), rows.size(1)}, rows.options());
  kernels::sum_rows(static_cast<const char*>(own.const_data_ptr()), bf16, own.size(1), weights.const_data_ptr<float>(),
                    choices.const_data_ptr<int64_t>(), choices.size(0), choices.size(1),
                    static_cast<char*>(y.data_ptr()), torch_threads());
  return y;
}

TORCH_LIBRARY_IMPL(turnout, CPU, m) {
  m.impl("dispatch", dispatch_cpu);
  m.impl("combine", combine_cpu);
}

}  // namespace
}  // namespace turnout::ops
