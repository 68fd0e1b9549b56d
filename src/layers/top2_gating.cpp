// GShard top-2 gating with capacity: gates as one product, then route_top2 and limit_capacity.
#include <turnout/hierarchical_moe.h>

#include "../ops/checks.h"

#include <ATen/ATen.h>

#include <cmath>

namespace turnout {
namespace {

constexpr const char* kName = "turnout::Top2Gating";
constexpr int64_t kMinimumCapacity = 4;

}  // namespace

Top2GatingImpl::Top2GatingImpl(Top2GatingOptions given) : options(given) {
  ops::check_at_least(kName, "hidden", options.hidden, 1);
  ops::check_at_least(kName, "num_experts", options.num_experts, 2);
  ops::check_at_least(kName, "outer", options.outer, 1);
  for (const auto& [name, factor] : {std::pair{"capacity_factor_train", options.capacity_factor_train},
                                     {"capacity_factor_eval", options.capacity_factor_eval}})
    TORCH_CHECK_VALUE(std::isfinite(factor) && factor > 0, kName, ": ", name, " is ", factor,
                      ", expected a finite number above 0");
  std::vector<int64_t> shape{options.hidden, options.num_experts};
  if (options.outer > 1) shape.insert(shape.begin(), options.outer);
  w_gating = register_parameter("w_gating", torch::randn(shape));
}

Top2GatingOutput Top2GatingImpl::forward(const at::Tensor& x, const at::Tensor& importance,
                                         const at::Tensor& uniform) {
  const int64_t axes = options.outer > 1 ? 4 : 3;
  ops::check_dim(kName, "x", x, axes,
                 axes == 4 ? "[outer, groups, tokens, hidden]" : "[groups, tokens, hidden]");
  ops::check_size(kName, "x", x, -1, options.hidden, "hidden");
  if (axes == 4) ops::check_size(kName, "x", x, 0, options.outer, "outer");

  const Top2Options how{is_training() ? options.policy_train : options.policy_eval,
                        is_training() ? options.threshold_train : options.threshold_eval, options.epsilon};
  const auto w = axes == 4 ? w_gating.unsqueeze(1) : w_gating;  // the same gate for each group
  auto top2 = route_top2(x.matmul(w), how, importance, uniform);

  CapacityOptions places;
  places.factor = is_training() ? options.capacity_factor_train : options.capacity_factor_eval;
  places.minimum = kMinimumCapacity;
  places.rounding = CapacityRounding::floor;
  places.count_choices = false;
  Top2GatingOutput out;
  out.loss = top2.balance_loss;
  out.group_size = x.size(-2);
  out.capacity = expert_capacity(places, out.group_size, 2, options.num_experts);
  const Routing flat{top2.routing.topk_ids.reshape({-1, 2}), top2.routing.topk_weights.reshape({-1, 2}),
                     top2.routing.scores.reshape({-1, options.num_experts})};
  if (flat.topk_ids.size(0) == 0) {
    out.routing = flat;
    out.dropped = at::zeros({}, flat.topk_ids.options());
    return out;
  }
  auto capped = limit_capacity(flat, options.num_experts, out.capacity, out.group_size, DropOrder::choice);
  out.routing = std::move(capped.routing);
  out.dropped = std::move(capped.dropped);
  return out;
}

}  // namespace turnout
