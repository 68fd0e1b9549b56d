// What `inspect` has to tell, as JSON: the text, the page and --json all show these numbers.
#pragma once

#include "inspect_example.h"
#include "tensor_json.h"

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace turnout::cli {

/// Options of the example, as they were settled.
Json options_json(const Example& example);

/// Shapes of each stage by the names of the description and by the library's own.
Json stages_json(const Example& example);

/// Each token: probabilities, choices, weights, places, and what became of each choice.
Json tokens_json(const Example& example);

/// The same gates under each second-expert policy: rows of each expert, drops, loss.
Json policies_json(const Example& example);

/// The same choices with more and fewer places: drops, tokens left alone, idle places.
Json capacity_json(const Example& example, const std::vector<double>& factors);

/// Tokens that first take the experts in turn are sent to expert 0, one share after the other: load and losses.
Json collapse_json(const Example& example);

/// Two levels: outer experts, inner experts, slots, drops, losses.
Json hierarchy_json(const Example& example);

/// One token through gate, choice, slot, experts and combine, with the numbers of each.
/// @throws c10::ValueError when there is no such token
Json step_json(const Example& example, int64_t token);

/// A call of a layer, looked at from one of its tokens.
struct Passage {
  at::Tensor x;       ///< [tokens, hidden]
  at::Tensor logits;  ///< [tokens, experts]
  Routed routed;      ///< capacity 0: no limit; places undefined: not known, or no limit
  int64_t group = 0;  ///< tokens that queue together
  /// The experts on rows [tokens, hidden], weighed by [tokens, top_k].
  std::function<at::Tensor(const at::Tensor& x, const at::Tensor& topk_weights, const DispatchPlan& plan)> experts{};
};

/// Input, logits, choices with what became of each, and the routed experts' sum: of one token.
Json passage_json(const Passage& passage, int64_t token);
/// The first numbers of a vector, as the way of a token shows them.
Json first_numbers(const at::Tensor& vector);
/// How a router makes weights of scores, in words.
std::string weights_rule(const RouterOptions& options);
/// @throws c10::ValueError when `token` is none of 0 … tokens − 1
void check_step(int64_t token, int64_t tokens);

/// Sweep of places over choices that were made already, whatever made them.
/// @param group_size tokens that queue together
/// @param priority [tokens, top_k] or undefined: of drops by score or at random, see limit_capacity()
Json capacity_sweep(const Routing& chosen, int64_t num_experts, int64_t group_size, const CapacityOptions& rules,
                    const std::vector<double>& factors, const at::Tensor& priority = {});

}  // namespace turnout::cli
