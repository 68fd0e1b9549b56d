// Choice and plan on the CPU, by the kernels. Scores in float64 go the way of ATen calls.
#include "../checks.h"
#include "../routing_backends.h"
#include "bridge.h"

#include "../../kernels/routing.h"

#include <ATen/ATen.h>
#include <torch/library.h>

namespace turnout::ops {
namespace {

at::Tensor topk_cpu(const at::Tensor& scores, int64_t top_k) {
  check_topk(scores, top_k);
  // Insertion into a list of k costs k² a row: experts that pick hundreds of tokens sort.
  constexpr int64_t kLongestList = 64;
  if (scores.scalar_type() == at::kDouble || top_k > kLongestList) return topk_aten(scores, top_k);
  const auto rows = scores.reshape({-1, scores.size(-1)}).to(at::kFloat).contiguous();
  auto shape = scores.sizes().vec();
  shape.back() = top_k;
  auto ids = at::empty(shape, scores.options().dtype(at::kLong));
  kernels::topk(rows.const_data_ptr<float>(), rows.size(1), rows.size(0), rows.size(1), top_k,
                ids.mutable_data_ptr<int64_t>(), torch_threads());
  return ids;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> plan_cpu(const at::Tensor& topk_ids, int64_t num_experts) {
  check_plan(topk_ids, num_experts);
  const auto ids = topk_ids.to(at::kLong).contiguous();
  auto expert_offsets = at::empty({num_experts + 1}, ids.options());
  auto token_of_row = at::empty({ids.numel()}, ids.options());
  auto row_of_choice = at::empty(ids.sizes(), ids.options());
  const auto bad =
      kernels::plan(ids.const_data_ptr<int64_t>(), ids.size(0), ids.size(1), num_experts,
                    expert_offsets.mutable_data_ptr<int64_t>(), token_of_row.mutable_data_ptr<int64_t>(),
                    row_of_choice.mutable_data_ptr<int64_t>(), torch_threads());
  TORCH_CHECK_VALUE(bad < 0, "turnout::plan: topk_ids[", bad / ids.size(1), ", ", bad % ids.size(1), "] is ",
                    ids.const_data_ptr<int64_t>()[std::max<int64_t>(bad, 0)], ", expected -1 or 0 to ",
                    num_experts - 1);
  return {expert_offsets, token_of_row, row_of_choice};
}

TORCH_LIBRARY_IMPL(turnout, CPU, m) {
  m.impl("topk", topk_cpu);
  m.impl("plan", plan_cpu);
}

}  // namespace
}  // namespace turnout::ops
