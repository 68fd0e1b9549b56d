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
  at::Tensor topk_weights;  ///< [tokens, top_k] float32 (float64 for float64 logits; RouterOptions); 0 where not sent
  at::Tensor scores;        ///< [tokens, experts] router probabilities, rows sum to 1, for losses and statistics
};

/// What makes scores of logits.
enum class ScoreFunction {
  softmax,  ///< over the experts (most families)
  sigmoid,  ///< each expert by itself (DeepSeek-V3)
};

/// How the weights of the chosen experts follow from logits or scores.
enum class RouterWeights {
  normalized,       ///< scores of the chosen ones, divided by their sum (Mixtral, DeepSeek-V3; seed 001)
  probability,      ///< scores as they are (Switch, Qwen without norm_topk_prob, DeepSeek-V2; seed 003 by option)
  softmax_of_topk,  ///< softmax over the chosen logits alone (GPT-OSS, Shazeer; seeds 000 and 003)
};

/// What the experts of a group that is left out count as in the choice.
enum class GroupMask {
  minus_infinity,  ///< never chosen (DeepSeek-V3 in transformers, DeepSeek's inference code)
  zero,            ///< score 0: still ahead of an expert whose biased score is negative (DeepSeek-V2, -VL2)
};

/// The type that the router computes in.
enum class RouterPrecision {
  float32,  ///< whatever the logits' type (float64 logits: float64)
  logits,   ///< the logits' type, each step rounded to it (GPT-OSS, GShard, Shazeer)
};

/// @throws c10::ValueError naming the word when it is not one of the enumerators
ScoreFunction parse_score_function(const std::string& name);
std::string to_string(ScoreFunction function);
RouterWeights parse_router_weights(const std::string& name);
std::string to_string(RouterWeights weights);
GroupMask parse_group_mask(const std::string& name);
std::string to_string(GroupMask mask);
RouterPrecision parse_router_precision(const std::string& name);
std::string to_string(RouterPrecision precision);

/// How tokens choose experts and weigh them: one set of switches whose combinations are the families' routers.
struct RouterOptions {
  ScoreFunction score = ScoreFunction::softmax;
  RouterWeights weights = RouterWeights::normalized;
  double epsilon = 0.0;  ///< added to the sum that RouterWeights::normalized divides by
  double scale = 1.0;    ///< of the weights, at the end (routed_scaling_factor)
  /// Experts stand in this many groups of neighbours; a token chooses within the `kept_groups` best of them. 1: no
  /// limit.
  int64_t groups = 1;
  int64_t kept_groups = 1;
  int64_t group_top = 1;  ///< a group's score: the sum of its best group_top (1: their maximum, DeepSeek-V2; 2: V3)
  GroupMask group_mask = GroupMask::minus_infinity;
  RouterPrecision precision = RouterPrecision::float32;
  bool cast_weights = false;  ///< round the weights to the logits' type at the end (Qwen, OLMoE)
};

/// The router of a published family: "mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v2_lite"
/// (greedy), "deepseek_v3", "gpt_oss", "switch", "gshard", "noisy_topk" (docs/routers.md has the table and sources).
///
/// Numbers that a model's own config sets stand as in the family's best-known one; norm_topk_prob as its config class
/// has it by default.
/// @throws c10::ValueError naming the word when it is none of them
RouterOptions router_preset(const std::string& family);
std::vector<std::string> router_preset_names();

/// @throws c10::ValueError naming the option that is impossible for so many experts, what it is and what it may be
void check(const RouterOptions& options, int64_t top_k, int64_t num_experts);

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

/// Routes tokens: scores, choice of top_k, weights.
///
/// Chosen by score + selection_bias, within the best groups; without bias and groups by the logits themselves, since
/// scores can round different logits to one number. Weights never see the bias. A NaN or Inf token harms only its own
/// row: its ids stay in range.
/// @param logits [tokens, experts]
/// @param selection_bias [experts] float32, or undefined: steers the load without a loss (update_selection_bias in
///        balance.h); part of the choice alone
/// @param token_mask [tokens] bool, or undefined; false: padding, sent nowhere (ids -1, weights 0)
/// @return scores are the softmax, or the sigmoids divided by (their sum + 1e-20), whatever the weights and the mask
/// Gradient: to logits through topk_weights and scores; none to selection_bias. With top_k = 1, `normalized` and
/// `softmax_of_topk` give the constant weight 1, so the router learns from the losses alone; Switch uses `probability`
/// for that reason.
/// Source: arXiv:1701.06538 (softmax_of_topk), 2401.04088 (normalized), 2101.03961 (probability), 2405.04434 (groups),
/// 2408.15664 and 2412.19437 (sigmoid, selection bias).
Routing route(const at::Tensor& logits, int64_t top_k, const RouterOptions& options = {},
              const at::Tensor& selection_bias = {}, const at::Tensor& token_mask = {});

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
