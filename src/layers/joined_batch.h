// The tokens of one rank as a part of the joined batch: what the split into ranks must not change.
#pragma once

#include <turnout/plan.h>
#include <turnout/world.h>

namespace turnout {

/// limit_capacity() of the joined tokens of all ranks; the part of this rank. Gathers ids and weights; every rank
/// calls.
Capped limit_joined(const Routing& own, const CapacityOptions& how, int64_t num_experts, const Group& ranks);

}  // namespace turnout
