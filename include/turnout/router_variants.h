// Routers beside route(): noise and jitter, experts that pick tokens, Sinkhorn, hashing, ids chosen elsewhere.
#pragma once

#include <turnout/plan.h>
#include <turnout/router.h>

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>

namespace turnout {

/// Who is paired with whom: MoEOptions::selection. All but topk balance the load by themselves.
enum class Selection {
  topk,           ///< a token takes its best experts: route()
  expert_choice,  ///< an expert takes its best tokens: route_expert_choice(). Not causal
  sinkhorn,       ///< in training route_sinkhorn(), not causal; in evaluation the largest logits
  hash,           ///< the word of a token alone decides: hash_ids()
};

/// @throws c10::ValueError naming the word when it is not one of the four enumerators
Selection parse_selection(const std::string& name);
std::string to_string(Selection selection);

/// Routes tokens to experts that were chosen elsewhere: the scores and weights of route(), the ids as given.
///
/// @param logits [tokens, experts]
/// @param topk_ids [tokens, top_k] int32 or int64; -1 = not sent: no share in a sum, weight 0
/// @param token_mask [tokens] bool, or undefined; false: padding, sent nowhere (ids -1, weights 0)
/// Groups of the options are not read: they are part of a choice. Gradient: to logits.
Routing route_chosen(const at::Tensor& logits, const at::Tensor& topk_ids, const RouterOptions& options = {},
                     const at::Tensor& token_mask = {});

/// x · uniform(1 − amount, 1 + amount): jitter of the router's input.
///
/// In Switch and GShard the gate alone sees the result; Hugging Face's Mixtral hands it to the experts too.
/// @param uniform x's shape, numbers in [0, 1), or undefined to draw from torch's default generator
/// @throws c10::ValueError for an amount outside of [0, 1)
/// Gradient: to x. Source: arXiv:2101.03961; drawn by the same call as in transformers.
at::Tensor jitter(const at::Tensor& x, double amount, const at::Tensor& uniform = {});

struct NoisyLogits {
  at::Tensor logits;     ///< [tokens, experts] logits + noise · deviation
  at::Tensor deviation;  ///< [tokens, experts] softplus(noise_logits) + minimum
};

/// Trainable noise: route the result with router_preset("noisy_topk").
///
/// @param noise_logits [tokens, experts] x · W_noise
/// @param minimum of the deviation (the paper: 0; tensor2tensor: 1e-2)
/// @param noise standard normal numbers, or undefined to draw them from torch's default generator
/// Gradient: to logits and noise_logits. Source: arXiv:1701.06538, equation 4.
NoisyLogits noisy_logits(const at::Tensor& logits, const at::Tensor& noise_logits, double minimum = 0.0,
                         const at::Tensor& noise = {});

/// [experts] Σ_t P(expert is among the top_k, were its noise drawn anew): a load that is smooth in the logits.
///
/// Where top_k is all experts: the number of tokens. @param clean the logits before noise
/// Gradient: to clean, noisy and deviation. Use: cv_squared of balance.h. Source: arXiv:1701.06538, equations 8 and 9
/// (the threshold is the noisy logit that the expert must exceed, compared before softmax).
at::Tensor noisy_load(const at::Tensor& clean, const NoisyLogits& noisy, int64_t top_k);

struct ExpertChoice {
  Routing routing;    ///< topk_ids [tokens, experts]: e in column e where e picked the token, else -1; weights likewise
  DispatchPlan plan;  ///< rows = experts · groups · capacity; token_of_row is -1 behind the live ones
};

/// Experts pick their `capacity` best tokens of each group; a token may get any number of experts, also none.
///
/// **Not causal**: whether a token is picked depends on later tokens of its group. A language model trained so sees
/// the future and does not generate as it was trained; use it in encoders, or with groups across sequences at one
/// position.
/// @param logits [tokens, experts]
/// @param capacity at least 1 (the paper: tokens · factor / experts); all tokens where a group has fewer
/// @param group_size tokens that compete; must divide tokens; 0 = all
/// @param token_mask [tokens] bool, or undefined; false: padding, picked by none
/// Weights are the softmax over experts in float32, not renormalised. NaN scores are picked last. Ties: the lower
/// token.
/// Gradient: to logits. Source: arXiv:2202.09368.
ExpertChoice route_expert_choice(const at::Tensor& logits, int64_t capacity, int64_t group_size = 0,
                                 const at::Tensor& token_mask = {});

/// exp(logits) scaled so that rows sum to 1/tokens and columns to 1/experts, up to `tolerance`.
///
/// Iterates until the mean change of the column factors is at most `tolerance` (at most 1000 times), in float32;
/// starts and stops as Megatron-LM does. Rows with NaN or Inf take no part (0).
/// @param logits [tokens, experts]
/// @return [tokens, experts] float32 (float64 for float64). Gradient: none. On a GPU each iteration waits for the
///   device.
at::Tensor sinkhorn(const at::Tensor& logits, double tolerance = 1e-4);

/// Chosen by sinkhorn(logits), so that the batch loads experts evenly; weights are the sigmoid (top_k = 1) or the
/// softmax of the logits themselves, not normalised. Not causal, like route_expert_choice; in evaluation Megatron-LM
/// chooses by the logits (balanced = false).
/// @param token_mask [tokens] bool, or undefined; false: padding, sent nowhere, no part of the balance
/// Gradient: to logits. Source: Megatron-LM, arXiv:2103.16716.
Routing route_sinkhorn(const at::Tensor& logits, int64_t top_k, bool balanced = true,
                       const at::Tensor& token_mask = {});

/// Experts by token id alone: top_k distinct ones from a fixed pseudo-random table that is computed, not stored.
///
/// @param token_ids [...] int32 or int64 words of a vocabulary
/// @return [tokens, top_k] int64; the same for a token id, seed and number of experts on every device and version
/// Pair it with weights of 1, or with route_chosen. Source: arXiv:2106.04426 (random hash).
at::Tensor hash_ids(const at::Tensor& token_ids, int64_t num_experts, int64_t top_k = 1, int64_t seed = 0);

}  // namespace turnout
