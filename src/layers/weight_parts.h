// Weights of experts cut into parts that run at different times.
#pragma once

#include <turnout/moe.h>

#include <vector>

namespace turnout {

/// Passes of experts() over the first counts[0] experts, the next counts[1], …: see ExpertsModule::parts().
std::vector<RunExperts> run_parts(const ExpertWeights& weights, Activation activation,
                                  const std::vector<int64_t>& counts);

}  // namespace turnout
