// Router: gate logits to the experts of each token and their weights.
#pragma once

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace turnout {

/// What a router decided, one row a token. Immutable; a router knows nothing of how experts run.
struct Routing {
  at::Tensor topk_ids;      ///< [tokens, top_k] int64, best choice first; -1 = not sent
  at::Tensor topk_weights;  ///< [tokens, top_k] float32 (float64 for float64 logits); 0 where not sent
  at::Tensor scores;        ///< [tokens, experts] router probabilities, for losses and statistics
};

/// How the weights of the chosen experts follow from the logits.
enum class RouterWeights {
  normalized,       ///< softmax over all experts, chosen ones divided by their sum (Mixtral; seed 001)
  probability,      ///< softmax over all experts, as it is (Switch, Qwen without norm_topk_prob; seed 003 by option)
  softmax_of_topk,  ///< softmax over the chosen logits alone (GPT-OSS, Shazeer; seeds 000 and 003)
};

/// @throws c10::ValueError naming the word when it is not one of the three enumerators
RouterWeights parse_router_weights(const std::string& name);
std::string to_string(RouterWeights weights);

/// Ids of the k largest scores of each row, largest first.
///
/// Ties go to the lower id on every device and at any thread count (at::topk promises no order). NaN ranks above
/// every number, so a row of NaN still gives k distinct ids in range.
/// @param scores [..., experts] floating point
/// @param top_k 1 to experts
/// @return [..., top_k] int64
/// @throws c10::ValueError when top_k is out of range
/// Cost O(rows * experts * top_k) on CPU. Gradient: none (gather the scores with the ids). Deterministic.
at::Tensor topk(const at::Tensor& scores, int64_t top_k);

/// Routes tokens by softmax and top-k.
///
/// The softmax runs in float32 whatever the logits' type (float64 stays float64). A NaN or Inf token harms only
/// its own row: its ids stay in range.
/// @param logits [tokens, experts]
/// @param epsilon added to the sum that RouterWeights::normalized divides by
/// @return scores are the softmax over all experts in each of the three forms
/// Gradient: to logits through topk_weights and scores. With top_k = 1, `normalized` and `softmax_of_topk` give the
/// constant weight 1, so the router learns from the losses alone; Switch uses `probability` for that reason.
/// Source: arXiv:1701.06538 (softmax_of_topk), arXiv:2401.04088 (normalized), arXiv:2101.03961 (probability).
Routing route(const at::Tensor& logits, int64_t top_k, RouterWeights weights = RouterWeights::normalized,
              double epsilon = 0.0);

/// What becomes of a token's second expert in GShard top-2 gating.
enum class SecondPolicy {
  all,        ///< always kept
  none,       ///< never kept
  threshold,  ///< kept where its normalised gate exceeds the threshold
  random,     ///< kept with probability gate_2 / max(threshold, epsilon)
};

/// @throws c10::ValueError naming the word when it is not one of the four enumerators
SecondPolicy parse_second_policy(const std::string& name);
std::string to_string(SecondPolicy policy);

struct Top2Options {
  SecondPolicy policy = SecondPolicy::random;
  double threshold = 0.2;
  double epsilon = 1e-9;  ///< added to gate_1 + gate_2, the sum that both are divided by
};

struct Top2Routing {
  Routing routing;         ///< shapes as in Routing with a leading [..., groups, tokens]; before capacity
  at::Tensor balance_loss; ///< scalar: mean over groups and experts of density · density_proxy · experts²
};

/// GShard top-2 gating of tokens that come in groups (one sequence a group).
///
/// @param logits [..., tokens, experts]; the axis before last is the group over which the loss takes its means
/// @param importance [..., tokens], or undefined. 1: both choices; above 0: second choice alone, which is then the
///        best expert; 0: not sent (second level of a hierarchy). Empty slots count in the means, as in the source.
/// @param uniform [..., tokens] numbers in [0, 1) for SecondPolicy::random, or undefined to draw them from torch's
///        default generator
/// Weights are g / (g1 + g2 + epsilon), not renormalised when the second expert is left out. The loss takes first
/// choices before policy and capacity. The document's `threshold` branch lacks a dimension; here, as its text says,
/// the second expert stays where gate_2 > threshold. As in the source, where all probabilities but the first round to
/// 0, both choices name one expert, the second with weight 0.
/// Gradient: to logits. Source: tensor2tensor moe.py, PyPI mixture-of-experts 0.2.3, arXiv:2006.16668.
Top2Routing route_top2(const at::Tensor& logits, const Top2Options& options, const at::Tensor& importance = {},
                       const at::Tensor& uniform = {});

}  // namespace turnout
