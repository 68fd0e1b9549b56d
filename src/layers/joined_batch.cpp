// Capacity over ranks: the one algorithm, on the gathered choices.
#include "layers/joined_batch.h"

#include <turnout/exchange.h>

#include <ATen/ATen.h>

#include <numeric>

namespace turnout {
namespace {

// Numbers that every rank has from the first one.
at::Tensor shared_numbers(at::IntArrayRef shape, const at::TensorOptions& options, const Group& ranks) {
  const auto numbers = at::rand(shape, options);
  return sum_over(ranks.rank == 0 ? numbers : at::zeros_like(numbers), ranks);
}

}  // namespace

Capped limit_joined(const Routing& own, const CapacityOptions& how, int64_t num_experts, const Group& ranks) {
  std::vector<int64_t> tokens;
  const auto ids = gather_over(own.topk_ids, ranks, &tokens);
  const auto weights = gather_over(own.topk_weights, ranks);
  const auto before = std::accumulate(tokens.begin(), tokens.begin() + ranks.rank, int64_t{0});
  const auto count = own.topk_ids.size(0), all = ids.size(0);
  if (all == 0) return {own, at::zeros({}, own.topk_ids.options())};
  // The own weights keep their gradient.
  const auto joined_weights = at::cat({weights.narrow(0, 0, before), own.topk_weights,
                                       weights.narrow(0, before + count, all - before - count)});
  const auto places = expert_capacity(how, all, ids.size(1), num_experts);
  const auto numbers = how.order == DropOrder::random
                           ? shared_numbers(ids.sizes(), weights.options(), ranks)
                           : at::Tensor();
  const auto capped = limit_capacity({ids, joined_weights, {}}, num_experts, places, all, how.order, how.renormalize,
                                     numbers);
  const Routing kept{capped.routing.topk_ids.narrow(0, before, count),
                     capped.routing.topk_weights.narrow(0, before, count), own.scores};
  return {kept, own.topk_ids.ge(0).sum() - kept.topk_ids.ge(0).sum()};
}

}  // namespace turnout
