// Balancing losses: what keeps the load of the experts even.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>

namespace turnout {

/// How f_i, the load of expert i, is counted. T tokens, k choices.
enum class LoadCount {
  per_assignment,  ///< assignments / (T·k): Megatron, MegaBlocks, seed 002 by default; balanced value 1
  per_token,       ///< assignments / T: Hugging Face, seed 002 by option; balanced value k
  first_choice,    ///< first choices / T: Switch, GShard, seeds 003 and 004; balanced value 1
};

/// @throws c10::ValueError naming the word when it is not one of the three enumerators
LoadCount parse_load_count(const std::string& name);
std::string to_string(LoadCount count);

/// experts · Σ_i f_i · P_i, where P_i is the mean router probability of expert i.
///
/// @param scores [tokens, experts] probabilities (Routing::scores)
/// @param topk_ids [tokens, top_k] before capacity drops anything; -1 counts nowhere
/// @param group_size tokens over which f and P take their means; the loss is the mean over groups (GShard: one
///        sequence). 0 = all tokens in one group. Must divide the number of tokens.
/// @return scalar of scores' type; 0 without tokens
/// Gradient: to scores through P; f is a count and has none. Deterministic.
at::Tensor balance_loss(const at::Tensor& scores, const at::Tensor& topk_ids,
                        LoadCount count = LoadCount::per_assignment, int64_t group_size = 0);

/// mean(logsumexp(logits)²): keeps gate logits small. 0 without tokens.
///
/// @param logits [tokens, experts]
/// Gradient: to logits. Source: ST-MoE, arXiv:2202.08906.
at::Tensor z_loss(const at::Tensor& logits);

}  // namespace turnout
