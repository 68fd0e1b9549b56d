// One pass of rows through experts that lie on several ranks; the module and the op share it.
#pragma once

#include <turnout/exchange.h>
#include <turnout/moe.h>

#include <functional>

namespace turnout {

/// Where experts lie: expert_bounds() of the ranks of a group.
struct ExpertPlace {
  const Group& group;
  const std::vector<int64_t>& bounds;
  int64_t chunks = 1;
};

/// The experts of this rank in parts, as ExpertsModule::parts() gives them.
using LocalParts = std::function<std::vector<RunExperts>(const std::vector<int64_t>& counts)>;

/// Counts, then rows out, experts, rows back, chunk by chunk; then weights and the sum over choices. Differentiable.
/// @param plan over all experts @param beside called once while the first rows travel
at::Tensor run_on_ranks(const at::Tensor& x, const at::Tensor& topk_weights, const DispatchPlan& plan,
                        const ExpertPlace& place, const LocalParts& local, const std::function<void()>& beside);

}  // namespace turnout
