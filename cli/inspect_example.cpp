// Drawing an example and routing it by the library's own calls.
#include "inspect_example.h"

#include <turnout/balance.h>

#include <ATen/Context.h>
#include <ATen/Functions.h>
#include <c10/util/Exception.h>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>

namespace turnout::cli {
namespace {

constexpr int64_t kLargest = 1 << 16;
constexpr int64_t kMostNumbers = int64_t{1} << 28;  // of any one tensor
constexpr int64_t kMostShown = int64_t{1} << 22;    // of scores

void check_size(const char* option, int64_t value, int64_t least = 1) {
  TORCH_CHECK_VALUE(value >= least && value <= kLargest, option, " is ", value, ", expected ", least, " to ", kLargest);
}

void check_router(const ExampleOptions& o) {
  const std::vector<std::string> names = router_preset_names();
  TORCH_CHECK_VALUE(std::find(names.begin(), names.end(), o.router) != names.end(), "--router is '", o.router,
                    "', expected one of ", fmt::format("{}", fmt::join(names, ", ")));
  const RouterOptions router = router_preset(o.router);
  try {
    turnout::check(router, o.top_k, o.experts);
  } catch (const c10::ValueError& error) {
    TORCH_CHECK_VALUE(false, "--router ", o.router, " does not fit --experts ", o.experts, " --top-k ", o.top_k, ": ",
                      error.what_without_backtrace());
  }
}

/// The experts' buffers, places by places.
void check_places(const ExampleOptions& o, int64_t ffn) {
  check_size("--minimum-capacity", o.minimum, 0);
  const int64_t places = expert_capacity(capacity_of(o), o.group(), o.top_k, o.experts);
  const int64_t widest = std::max({o.hidden, ffn, o.inner});
  TORCH_CHECK_VALUE(o.experts * (o.tokens() / o.group()) <= kMostNumbers / places / widest, "capacity is ", places,
                    " places an expert, too many to look at: lower --minimum-capacity or --capacity-factor");
}

Routing rows_of(const Routing& routing) {
  const auto rows = [](const at::Tensor& t) { return t.reshape({-1, t.size(-1)}); };
  return {rows(routing.topk_ids), rows(routing.topk_weights), rows(routing.scores)};
}

}  // namespace

void check(const ExampleOptions& o) {
  check_size("--batch", o.batch);
  check_size("--sequence", o.sequence);
  check_size("--hidden", o.hidden);
  check_size("--experts", o.experts, 2);
  check_size("--inner", o.inner, 2);
  if (o.ffn != 0) check_size("--ffn", o.ffn);
  const int64_t ffn = o.ffn > 0 ? o.ffn : 4 * o.hidden;
  TORCH_CHECK_VALUE(o.tokens() * std::max(o.experts, o.hidden) <= kMostNumbers && o.tokens() * o.experts <= kMostShown,
                    "--batch times --sequence is ", o.tokens(), ", too many tokens to look at");
  TORCH_CHECK_VALUE(o.experts * o.inner <= kLargest && o.experts * o.inner * o.hidden <= kMostNumbers / ffn,
                    "--experts times --inner is ", o.experts * o.inner, ", too many experts of this size to look at");
  TORCH_CHECK_VALUE(!o.gshard() || o.top_k == 2, "--top-k is ", o.top_k, ", expected 2 with --router gshard");
  TORCH_CHECK_VALUE(o.top_k >= 1 && o.top_k <= o.experts, "--top-k is ", o.top_k,
                    ", expected 1 to the number of experts, ", o.experts);
  if (!o.gshard()) check_router(o);
  TORCH_CHECK_VALUE(std::isfinite(o.threshold) && o.threshold >= 0, "--threshold is ", o.threshold,
                    ", expected 0 or more");
  TORCH_CHECK_VALUE(std::isfinite(o.factor) && o.factor > 0 && o.factor <= 1e6, "--capacity-factor is ", o.factor,
                    ", expected more than 0");
  check_places(o, ffn);
}

CapacityOptions capacity_of(const ExampleOptions& o) {
  CapacityOptions capacity;
  capacity.factor = o.factor;
  capacity.minimum = o.minimum;
  capacity.rounding = o.gshard() ? CapacityRounding::floor : CapacityRounding::ceil;
  capacity.count_choices = !o.gshard();
  capacity.order = o.order;
  return capacity;
}

at::Tensor Example::logits() const { return x_rows().matmul(gate); }

Example make_example(const ExampleOptions& o) {
  at::manual_seed(o.seed);
  Example example{.options = o};
  example.x = at::randn({o.batch, o.sequence, o.hidden});
  example.gate = at::randn({o.hidden, o.experts});
  example.uniform = at::rand({o.batch, o.sequence});
  example.experts = compat::Experts(o.hidden, std::vector<int64_t>{o.experts}, o.ffn, Activation::relu);
  return example;
}

Routed route_example(const Example& example, SecondPolicy policy) {
  const ExampleOptions& o = example.options;
  const at::NoGradGuard no_grad;
  const auto logits_TE = example.logits();
  Routed routed;
  if (o.gshard()) {
    const auto logits_BNE = logits_TE.view({o.batch, o.sequence, o.experts});
    const auto route_by = [&](SecondPolicy by) {
      return route_top2(logits_BNE, {.policy = by, .threshold = o.threshold}, {}, example.uniform);
    };
    const Top2Routing top2 = route_by(policy);
    routed.loss = top2.balance_loss.item<double>();
    routed.chosen = rows_of(top2.routing);
    routed.wanted = rows_of(route_by(SecondPolicy::all).routing);
  } else {
    routed.chosen = routed.wanted = route(logits_TE, o.top_k, router_preset(o.router));
    routed.loss = balance_loss(routed.chosen.scores, routed.chosen.topk_ids).item<double>();
  }
  routed.capacity = expert_capacity(capacity_of(o), o.group(), o.top_k, o.experts);
  if (o.order == DropOrder::score) routed.priority = routed.chosen.topk_weights;
  if (o.order == DropOrder::random) {
    at::manual_seed(o.seed + 1);  // each pass draws the same order
    routed.priority = at::rand_like(routed.chosen.topk_weights);
  }
  const Capped capped = limit_capacity(routed.chosen, o.experts, routed.capacity, o.group(), o.order,
                                       /*renormalize=*/false, routed.priority);
  routed.kept = capped.routing;
  routed.dropped = capped.dropped.item<int64_t>();
  routed.places = queue_positions(routed.chosen.topk_ids, o.experts, o.group(), o.order, routed.priority);
  return routed;
}

}  // namespace turnout::cli
