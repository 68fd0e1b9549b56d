// Balancing losses, and the bias that balances without one: what keeps the load of the experts even.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <string>

namespace turnout {

/// How f_i, the load of expert i, is counted. T tokens, k choices.
enum class LoadCount {
  per_assignment,  ///< assignments / (T·k): Megatron, MegaBlocks, DeepSeek, seed 002 by default; balanced value 1
  per_token,       ///< assignments / T: Hugging Face, seed 002 by option; balanced value k
  first_choice,    ///< first choices / T: Switch, GShard, Tutel, seeds 003 and 004; balanced value 1
};

/// @throws c10::ValueError naming the word when it is not one of the three enumerators
LoadCount parse_load_count(const std::string& name);
std::string to_string(LoadCount count);

/// Sums a tensor over the ranks of a job (an all-reduce). Called outside of the gradient.
using SumOverRanks = std::function<at::Tensor(const at::Tensor&)>;

/// experts · Σ_i f_i · P_i, where P_i is the mean router probability of expert i.
///
/// @param scores [tokens, experts] probabilities (Routing::scores)
/// @param topk_ids [tokens, top_k] before capacity drops anything; -1 counts nowhere
/// @param group_size tokens over which f and P take their means; the loss is the mean over groups (GShard, DeepSeek's
///        sequence-wise loss: one sequence). 0 = all tokens in one group. Must divide the number of tokens.
/// @param token_mask [tokens] bool, or undefined; false: padding, which counts nowhere; groups of nothing else neither
/// @param sum where given, f and P are those of all ranks together; group_size must then be 0. The gradient is that of
///        data-parallel training, whose mean over ranks is the gradient of the loss of the whole batch.
/// @return scalar, float32 (float64 for float64 scores); 0 without tokens
/// Gradient: to scores through P; f is a count and has none. Deterministic.
at::Tensor balance_loss(const at::Tensor& scores, const at::Tensor& topk_ids,
                        LoadCount count = LoadCount::per_assignment, int64_t group_size = 0,
                        const at::Tensor& token_mask = {}, const SumOverRanks& sum = {});

/// What balance_loss is made of: sums that add up over layers (Hugging Face pools layers before the product),
/// micro-batches and ranks.
///
/// @return [groups, 2 · experts + 2]: assignments by expert (divided by k for per_assignment), probabilities by expert,
///         tokens, and 1
/// Gradient: to scores.
at::Tensor balance_sums(const at::Tensor& scores, const at::Tensor& topk_ids,
                        LoadCount count = LoadCount::per_assignment, int64_t group_size = 0,
                        const at::Tensor& token_mask = {});

/// The loss of sums: experts · Σ_i f_i · P_i of each group, then the mean over groups that have tokens.
///
/// @param sums of balance_sums, or their sum over layers
/// @param total the sum of `sums` over ranks, or undefined; see balance_loss
/// Gradient: to sums.
at::Tensor balance_loss_of_sums(const at::Tensor& sums, const at::Tensor& total = {});

/// mean(logsumexp(logits)²): keeps gate logits small. 0 without tokens.
///
/// @param logits [tokens, experts]
/// @param token_mask [tokens] bool, or undefined; false: padding, out of the mean
/// @param sum where given, the mean is over the tokens of all ranks together; the gradient as in balance_loss
/// @return scalar, float32 (float64 for float64 logits)
/// Gradient: to logits. Source: ST-MoE, arXiv:2202.08906.
at::Tensor z_loss(const at::Tensor& logits, const at::Tensor& token_mask = {}, const SumOverRanks& sum = {});

/// What z_loss is made of, [3]: the sum of the squares, tokens, and 1. They add up over micro-batches and ranks.
///
/// Gradient: to logits.
at::Tensor z_sums(const at::Tensor& logits, const at::Tensor& token_mask = {});

/// The loss of sums. @param total the sum of `sums` over ranks, or undefined; see balance_loss
/// Gradient: to sums.
at::Tensor z_loss_of_sums(const at::Tensor& sums, const at::Tensor& total = {});

/// [experts] Σ_t weight of the expert for token t (Shazeer's importance).
///
/// @param topk_ids [tokens, top_k]; -1 counts nowhere
/// Gradient: to topk_weights.
at::Tensor expert_importance(const at::Tensor& topk_ids, const at::Tensor& topk_weights, int64_t num_experts);

/// Squared coefficient of variation, (deviation / mean)², of a vector; 0 where its mean is 0.
///
/// Shazeer's losses are w · cv_squared(expert_importance(…)) and w · cv_squared(noisy_load(…)) (router_variants.h), 0
/// when balanced. The variance is the population's, as in the paper and tensor2tensor.
/// Gradient: to values. Source: arXiv:1701.06538.
at::Tensor cv_squared(const at::Tensor& values);

/// [experts] int64: choices that name each expert. Sum it over ranks and micro-batches for update_selection_bias.
at::Tensor expert_counts(const at::Tensor& topk_ids, int64_t num_experts);

/// bias + rate · sign(mean count − count): a step of balancing without a loss, to be taken after each training step.
///
/// @param bias [experts] floating point
/// @param counts [experts] choices of the step, over all ranks and before capacity (expert_counts)
/// @param center subtract the mean of the step, so that the bias does not drift (torchtitan)
/// Gradient: none. Source: arXiv:2408.15664.
at::Tensor update_selection_bias(const at::Tensor& bias, const at::Tensor& counts, double rate, bool center = false);

}  // namespace turnout
