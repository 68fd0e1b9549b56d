// Statistics of a routing: how even the load is, what was dropped, how sure the router is.
#pragma once

#include <turnout/plan.h>
#include <turnout/router.h>

#include <ATen/core/Tensor.h>

namespace turnout {

/// Scalars of one call, on the routing's device: reading a value waits for it, computing does not.
struct RoutingStatistics {
  at::Tensor tokens_per_expert;  ///< [experts] int64, after capacity: rows of the plan
  at::Tensor dropped_share;      ///< dropped choices / (sent + dropped); 0 where there are none
  at::Tensor max_over_mean;      ///< load of the fullest expert over the mean load: 1 when even; 0 without rows
  at::Tensor entropy;            ///< mean over tokens of −Σ p ln p, in nats: 0 certain, ln(experts) undecided
  at::Tensor dead_experts;       ///< int64: experts without a row
};

/// Loads come from the plan's offsets, so only the entropy passes over anything.
///
/// @param routing scores are read
/// @param dropped scalar (Capped::dropped, MoEOutput::dropped), or undefined: 0
/// @param token_mask [tokens] bool, or undefined; false: padding, out of the entropy
/// @return float32 scalars (float64 for float64 scores) where not said otherwise. Gradient: none.
RoutingStatistics routing_statistics(const Routing& routing, const DispatchPlan& plan, const at::Tensor& dropped = {},
                                     const at::Tensor& token_mask = {});

}  // namespace turnout
