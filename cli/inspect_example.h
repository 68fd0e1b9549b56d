// The layer and the input that `inspect` draws from a seed, and one pass of them through router and capacity.
#pragma once

#include <turnout/compat.h>
#include <turnout/plan.h>
#include <turnout/router.h>

#include <cstdint>
#include <string>
#include <vector>

namespace turnout::cli {

/// Sizes and rules; the defaults are those of the GShard description.
struct ExampleOptions {
  int64_t batch = 2, sequence = 8, hidden = 16;
  int64_t ffn = 0;  ///< 0: 4 · hidden
  int64_t experts = 4;
  int64_t inner = 4;  ///< experts of each outer one, in the hierarchical view
  int64_t top_k = 2;
  std::string router = "gshard";  ///< top-2 with a policy for the second expert; or another of router_preset()
  SecondPolicy policy = SecondPolicy::random;
  double threshold = 0.2;
  double factor = 1.25;
  int64_t minimum = 4;  ///< places of an expert, at least
  DropOrder order = DropOrder::choice;
  uint64_t seed = 0;

  bool gshard() const { return router == "gshard"; }
  int64_t tokens() const { return batch * sequence; }
  /// Tokens that queue together: a sequence with gshard, else all.
  int64_t group() const { return gshard() ? sequence : tokens(); }
};

/// @throws c10::ValueError naming the first option that is impossible
void check(const ExampleOptions& options);

/// Places of an expert: as the description counts them with gshard, else ceil(factor · tokens · top_k / experts).
CapacityOptions capacity_of(const ExampleOptions& options);

/// Weights and input, all drawn from the seed, in this order.
struct Example {
  ExampleOptions options;
  at::Tensor x;        ///< [batch, sequence, hidden] standard normal
  at::Tensor gate;     ///< [hidden, experts] standard normal
  at::Tensor uniform;  ///< [batch, sequence] in [0, 1): what the random policy compares with
  compat::Experts experts{nullptr};

  at::Tensor x_rows() const { return x.reshape({-1, options.hidden}); }
  at::Tensor logits() const;  ///< [tokens, experts]
};
Example make_example(const ExampleOptions& options);

/// What the router decided and what capacity left of it.
struct Routed {
  Routing wanted;       ///< every choice, before a policy leaves the second one out
  Routing chosen;       ///< [tokens, top_k] before capacity
  Routing kept;         ///< after it
  at::Tensor priority;  ///< [tokens, top_k] of the drop orders score and random; else undefined
  at::Tensor places;    ///< [tokens, top_k] place in the queue of its expert, before capacity; -1 = not sent
  int64_t capacity = 0;
  int64_t dropped = 0;
  double loss = 0;  ///< balance loss without coefficient
};

/// @param policy of the second expert; not read unless the router is gshard
Routed route_example(const Example& example, SecondPolicy policy);

}  // namespace turnout::cli
