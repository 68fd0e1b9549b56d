// Choice, plan and queues as ATen calls: the path for any device.
//
// Legend: T tokens, K top_k, E experts, G groups, N = T·K choices.
#include "../checks.h"
#include "../routing_backends.h"

#include <ATen/ATen.h>
#include <torch/library.h>

#include <limits>

namespace turnout::ops {

at::Tensor topk_aten(const at::Tensor& scores, int64_t top_k) {
  check_topk(scores, top_k);
  // A stable sort keeps the lower id first among equals; NaN sorts above every number.
  const auto ids = std::get<1>(scores.sort(/*stable=*/true, /*dim=*/-1, /*descending=*/true));
  return ids.narrow(-1, 0, top_k).contiguous();
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> plan_aten(const at::Tensor& topk_ids, int64_t num_experts) {
  check_plan(topk_ids, num_experts);
  const auto top_k = topk_ids.size(1);
  const auto ids_N = topk_ids.to(at::kLong).flatten();
  // An asynchronous assert: looking for the bad id would make the host wait for the device.
  at::_assert_async(ids_N.ge(-1).logical_and(ids_N.lt(num_experts)).all(),
                    "turnout::plan: topk_ids holds an id that is neither -1 nor one of the experts");
  const auto key_N = at::where(ids_N.lt(0), num_experts, ids_N);  // what is not sent sorts last
  const auto [sorted_N, choice_of_row] = key_N.sort(/*stable=*/true, /*dim=*/0, /*descending=*/false);
  const auto counts = at::zeros({num_experts + 1}, ids_N.options()).scatter_add(0, key_N, at::ones_like(key_N));
  const auto offsets = at::constant_pad_nd(counts.narrow(0, 0, num_experts).cumsum(0), {1, 0});
  const auto token_of_row =
      at::where(sorted_N.eq(num_experts), -1, choice_of_row.div(top_k, /*rounding_mode=*/"floor"));
  const auto row_N = at::empty_like(ids_N).scatter(0, choice_of_row, at::arange(ids_N.numel(), ids_N.options()));
  return {offsets, token_of_row, at::where(ids_N.lt(0), -1, row_N).view(topk_ids.sizes())};
}

namespace {

at::Tensor queue_positions_aten(const at::Tensor& topk_ids, int64_t num_experts, c10::SymInt group_size_symint,
                                c10::string_view order, const std::optional<at::Tensor>& priority) {
  check_queue(topk_ids, num_experts, group_size_symint, order, priority);
  const auto group_size = group_size_symint.expect_int();
  const auto tokens = topk_ids.size(0), top_k = topk_ids.size(1);
  const auto options = topk_ids.options().dtype(at::kLong);
  at::_assert_async(topk_ids.ge(-1).logical_and(topk_ids.lt(num_experts)).all(),
                    "turnout::queue_positions: topk_ids holds an id that is neither -1 nor one of the experts");
  if (topk_ids.numel() == 0) return at::empty(topk_ids.sizes(), options);
  const auto ids = topk_ids.to(at::kLong).view({-1, group_size, top_k});
  const auto groups = ids.size(0), queues = num_experts + 1;
  const auto group = at::arange(groups, options).view({-1, 1, 1});
  const auto queue_N = (at::where(ids.lt(0), num_experts, ids) + group * queues).flatten();

  // The order in which choices step up, as indices into [tokens · top_k].
  at::Tensor order_N;
  if (order == "choice") {
    order_N = at::arange(tokens * top_k, options).view({-1, group_size, top_k}).transpose(1, 2).flatten();
  } else if (order == "position") {
    order_N = at::arange(tokens * top_k, options);
  } else {
    // NaN would sort before every number and push healthy tokens out.
    const auto comparable = priority->masked_fill(priority->isnan(), -std::numeric_limits<double>::infinity());
    order_N = std::get<1>(comparable.flatten().sort(/*stable=*/true, /*dim=*/0, /*descending=*/true));
  }
  const auto [sorted_N, within] = queue_N.gather(0, order_N).sort(/*stable=*/true, /*dim=*/0, /*descending=*/false);
  const auto counts = at::zeros({groups * queues}, options).scatter_add(0, queue_N, at::ones_like(queue_N));
  const auto starts = counts.cumsum(0) - counts;
  const auto place_N = at::arange(tokens * top_k, options) - starts.gather(0, sorted_N);
  const auto positions = at::empty_like(queue_N).scatter(0, order_N.gather(0, within), place_N);
  return at::where(topk_ids.lt(0), -1, positions.view(topk_ids.sizes()));
}

TORCH_LIBRARY_IMPL(turnout, CompositeExplicitAutograd, m) {
  m.impl("topk", topk_aten);
  m.impl("plan", plan_aten);
  m.impl("queue_positions", queue_positions_aten);
}

}  // namespace
}  // namespace turnout::ops
