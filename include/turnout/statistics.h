// Statistics: what a router did with a batch, in numbers to watch while it trains.
#pragma once

#include <turnout/plan.h>
#include <turnout/router.h>

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace turnout {

/// One batch through one router.
struct RoutingStatistics {
  at::Tensor tokens_per_expert;  ///< [experts] int64, on the CPU: rows that each expert got
  int64_t choices = 0;           ///< tokens · top_k
  int64_t dropped = 0;           ///< choices that found no place
  int64_t dead_experts = 0;      ///< experts without a row
  double max_over_mean = 0;      ///< rows of the fullest expert / mean rows: 1 = balanced, at most experts; 0 without rows
  double entropy = 0;            ///< mean over tokens, in nats: 0 = certain, log(experts) = undecided; 0 without tokens
  double logit_rms = 0;          ///< root of the mean square of the logits; 0 where they are not given
  double logit_max = 0;          ///< largest absolute logit; 0 where they are not given
};

/// Counts and means over what the router decided; nothing is routed again.
///
/// @param routing after capacity. The entropy is that of scores divided by their sum over the experts
/// @param plan of the same choices
/// @param dropped scalar, as limit_capacity() counts it; undefined: none
/// @param logits [tokens, experts] or undefined
/// @throws c10::ValueError when the shapes do not belong together
/// Cost: a few passes over scores and logits; waits for the device. Gradient: none.
RoutingStatistics routing_statistics(const Routing& routing, const DispatchPlan& plan, const at::Tensor& dropped = {},
                                     const at::Tensor& logits = {});

}  // namespace turnout
