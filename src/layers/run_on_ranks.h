// One pass of rows through experts that lie on several ranks; the module and the op share it.
#pragma once

#include <turnout/exchange.h>
#include <turnout/plan.h>

#include <functional>

namespace turnout {

/// Where experts lie: expert_bounds() of the ranks of a group.
struct ExpertPlace {
  const Group& group;
  const std::vector<int64_t>& bounds;
  int64_t chunks = 1;
};

/// Runs the experts of this rank on rows: weights [rows, 1] of 1, a plan over the rank's own experts.
using RunLocal = std::function<at::Tensor(const at::Tensor& rows, const at::Tensor& weights, const DispatchPlan& plan)>;

/// Counts, then rows out, experts, rows back, chunk by chunk; then weights and the sum over choices. Differentiable.
/// @param plan over all experts @param beside called once while the first rows travel
at::Tensor run_on_ranks(const at::Tensor& x, const at::Tensor& topk_weights, const DispatchPlan& plan,
                        const ExpertPlace& place, const RunLocal& local, const std::function<void()>& beside);

}  // namespace turnout
