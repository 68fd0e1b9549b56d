// Experts: the feed-forward networks, run on rows that a plan grouped by expert.
#pragma once

#include <turnout/plan.h>

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>
#include <vector>

namespace turnout {

/// Non-linearity between the two products. The gated ones compute act(gate) · up.
enum class Activation { relu, gelu, gelu_tanh, silu, swiglu, geglu };

/// @throws c10::ValueError naming the word when it is not one of the six enumerators
Activation parse_activation(const std::string& name);
std::string to_string(Activation activation);
/// swiglu and geglu: `up` holds 2 · ffn rows an expert, gate rows first (the Hugging Face layout)
bool is_gated(Activation activation);

/// Weights of all experts: each field one bank tensor, or one tensor an expert (each with its own gradient).
/// U = 2 · ffn for gated activations, else ffn. Biases: both, either or none.
struct ExpertWeights {
  std::vector<at::Tensor> up;         ///< [experts, U, hidden], or experts × [U, hidden]
  std::vector<at::Tensor> down;       ///< [experts, hidden, ffn], or experts × [hidden, ffn]
  std::vector<at::Tensor> up_bias{};  ///< [experts, U], or experts × [U], or empty
  std::vector<at::Tensor> down_bias{};///< [experts, hidden], or experts × [hidden], or empty
};

/// y[t] = Σ_k topk_weights[t, k] · (down_e · act(up_e · x[t] + up_bias_e) + down_bias_e), e = topk_ids[t, k].
///
/// The weight is applied after down (Hugging Face). Sums over k run in order of choice.
/// @param x [tokens, hidden] float32, float64, bfloat16 or float16; weights and biases of the same type
/// @param topk_weights [tokens, top_k] float32, or x's type
/// @param plan of the same tokens; choices that are not sent add nothing
/// @return [tokens, hidden] of x's type
/// @throws c10::ValueError or c10::TypeError naming the argument, what it got and what it expected
/// Cost 2 · rows · hidden · (U + ffn) multiply-adds, plus the pre-activations kept for the backward.
/// Gradient: to x, topk_weights, every weight and bias; an expert without rows gets zeros. Double backward is refused.
/// Deterministic: the same bits from run to run. A NaN or Inf token harms only itself.
at::Tensor experts(const at::Tensor& x, const at::Tensor& topk_weights, const DispatchPlan& plan,
                   const ExpertWeights& weights, Activation activation);

/// plan() and experts() in one call. @param topk_ids [tokens, top_k] int32 or int64; -1 = not sent
at::Tensor fused_experts(const at::Tensor& x, const at::Tensor& topk_ids, const at::Tensor& topk_weights,
                         const ExpertWeights& weights, Activation activation);

/// The same feed-forward network for every row (one expert, weight 1): the dense twin and shared experts.
///
/// @param x [..., hidden]; up [U, hidden]; down [hidden, ffn]; biases may be undefined
at::Tensor feed_forward(const at::Tensor& x, const at::Tensor& up, const at::Tensor& down, Activation activation,
                        const at::Tensor& up_bias = {}, const at::Tensor& down_bias = {});

/// Multiply-adds · 2 of one token in `active` experts of this size (gate not counted).
int64_t feed_forward_flops(int64_t hidden, int64_t ffn, Activation activation, int64_t active = 1);

}  // namespace turnout
