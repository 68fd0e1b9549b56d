// Plan: which row of which expert each choice of each token becomes, and what capacity drops.
#pragma once

#include <turnout/router.h>

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>

namespace turnout {

/// Rows grouped by expert. Shapes are static, so that compiled graphs keep them: tokens · top_k rows, or as many as
/// experts pick (route_expert_choice); the live rows come first. Immutable.
struct DispatchPlan {
  /// [experts + 1] int64: rows of expert e are [offsets[e], offsets[e + 1]); the last is the number of live rows
  at::Tensor expert_offsets;
  at::Tensor token_of_row;    ///< [rows] int64; -1 behind the live rows
  at::Tensor row_of_choice;   ///< [tokens, top_k] int64; -1 = not sent

  int64_t num_experts() const { return expert_offsets.size(0) - 1; }
  /// [experts] int64
  at::Tensor tokens_per_expert() const;
};

/// Groups routed rows by expert, stable in token order.
///
/// @param topk_ids [tokens, top_k] int32 or int64, each in [0, num_experts); -1 = not sent
/// @throws c10::ValueError naming the first bad token and id (on other devices than the CPU: an asynchronous assert)
/// Cost O(tokens · top_k + num_experts). Gradient: none. Deterministic at any thread count.
/// Source: MegaBlocks, arXiv:2211.15841.
DispatchPlan plan(const at::Tensor& topk_ids, int64_t num_experts);

/// Who stays when an expert has more takers than places.
enum class DropOrder {
  choice,    ///< all first choices before any second one, each by position (GShard, tensor2tensor; seeds 001, 004)
  position,  ///< by token position, whatever the rank of the choice (Megatron, DeepSpeed)
  score,     ///< larger routing weight first, ties by position (batch-prioritised, arXiv:2106.05974)
  random,    ///< a random order: torch's default generator, or numbers given (limit_capacity's priority)
};

/// @throws c10::ValueError naming the word when it is not one of the four enumerators
DropOrder parse_drop_order(const std::string& name);
std::string to_string(DropOrder order);

/// How the places that a factor gives become a whole number.
enum class CapacityRounding {
  ceil,   ///< Megatron, DeepSpeed, seed 001
  floor,  ///< MegaBlocks, tensor2tensor, seed 004
  share,  ///< top_k · ⌊factor · ⌈tokens / experts⌉⌋: an expert's even share is made whole first (Tutel)
};

/// @throws c10::ValueError naming the word when it is not one of the three enumerators
CapacityRounding parse_capacity_rounding(const std::string& name);
std::string to_string(CapacityRounding rounding);

/// Places an expert has. Dropless by default.
struct CapacityOptions {
  double factor = 0.0;       ///< > 0: factor · group tokens · top_k / experts places, rounded
  int64_t fixed = 0;         ///< > 0: this many places, whatever the factor
  int64_t minimum = 0;       ///< lower bound of what the factor gives (tensor2tensor: 4)
  CapacityRounding rounding = CapacityRounding::ceil;
  bool count_choices = true; ///< multiply by top_k (tensor2tensor and seed 004: no)
  bool per_sequence = false; ///< places are counted in each sequence (last axis but one of x), not over the batch
  DropOrder order = DropOrder::choice;
  bool renormalize = false;  ///< divide the kept weights of a token by their sum (DeepSpeed: yes; GShard: no)

  bool dropless() const { return factor <= 0.0 && fixed <= 0; }
};

/// Places of each expert for a group of tokens: max(minimum, min(group_tokens, rounded)), or `fixed`; at least 1.
/// group_tokens without a limit, when options are dropless.
/// @throws c10::ValueError when options are negative or not finite
int64_t expert_capacity(const CapacityOptions& options, int64_t group_tokens, int64_t top_k, int64_t num_experts);

/// Place of each choice in the queue of its expert within its group, from 0; -1 = not sent.
///
/// @param topk_ids [tokens, top_k] int64
/// @param group_size tokens of a group; must divide tokens
/// @param priority [tokens, top_k], used by DropOrder::score and ::random: larger first, ties by position
/// Cost O(tokens · top_k · log). Gradient: none. Deterministic at any thread count.
at::Tensor queue_positions(const at::Tensor& topk_ids, int64_t num_experts, int64_t group_size, DropOrder order,
                           const at::Tensor& priority = {});

struct Capped {
  Routing routing;     ///< ids -1 and weights 0 where dropped
  at::Tensor dropped;  ///< scalar int64: choices that found no place
};

/// Drops the choices that find no place among `capacity` in their expert and group.
///
/// @param renormalize divide the kept weights of a token by their sum; without it weights stay as they were before
///        drops, which is what normalising first gives
/// @param priority [tokens, top_k], or undefined: what DropOrder::score and ::random rank by, larger first, in place of
///        the weights or of new random numbers (drawn from a generator of one's own, drops repeat)
/// Gradient: to topk_weights of what is kept. Deterministic (for DropOrder::random: given the generator's state).
Capped limit_capacity(const Routing& routing, int64_t num_experts, int64_t capacity, int64_t group_size,
                      DropOrder order = DropOrder::choice, bool renormalize = false, const at::Tensor& priority = {});

/// expert_capacity() and limit_capacity() in one call. @param group_size tokens of a group: those of a sequence where
///   options.per_sequence is set, else all tokens of the routing. Dropless options, and no tokens: nothing is dropped.
Capped apply_capacity(const Routing& routing, int64_t num_experts, int64_t group_size, const CapacityOptions& options);

}  // namespace turnout
