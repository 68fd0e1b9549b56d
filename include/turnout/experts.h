// Experts: the feed-forward networks, run on rows that a plan grouped by expert.
#pragma once

#include <turnout/plan.h>

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>
#include <vector>

namespace turnout {

/// Non-linearity between the two products. The gated ones, the last three, compute act(gate) · up.
///
/// gelu and geglu are exact (erf). swiglu_clamped, of GPT-OSS: g · σ(1.702 · g) · (v + 1) with g = min(gate, 7) and
/// v = up within [−7, 7]; without gradient beyond the clamps.
enum class Activation { relu, gelu, gelu_tanh, silu, swiglu, geglu, swiglu_clamped };

/// @throws c10::ValueError naming the word when it is not one of the enumerators
Activation parse_activation(const std::string& name);
std::string to_string(Activation activation);
/// swiglu, geglu and swiglu_clamped: `up` holds 2 · ffn rows an expert, gate rows first (the Hugging Face layout)
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
/// Sums over k run in order of choice.
/// @param x [tokens, hidden] float32, float64, bfloat16 or float16; weights and biases of the same type
/// @param topk_weights [tokens, top_k] float32, or x's type
/// @param plan of the same tokens; choices that are not sent add nothing
/// @param weight_before_down apply the weight to act(…) and to the bias of down (Megatron), not to the expert's output
///   (Hugging Face): the same but for rounding, as in bfloat16, where act(…) is rounded with its weight. Gradients are
///   those of the same function, to the same bits.
/// @return [tokens, hidden] of x's type
/// @throws c10::ValueError or c10::TypeError naming the argument, what it got and what it expected
/// Cost 2 · rows · hidden · (U + ffn) multiply-adds, plus the pre-activations kept for the backward.
/// Gradient: to x, topk_weights, every weight and bias; an expert without rows gets zeros. Double backward is refused.
/// Deterministic: the same bits from run to run, and in float32 and bfloat16 on the CPU at any number of threads. A NaN
/// or Inf token harms only itself.
at::Tensor experts(const at::Tensor& x, const at::Tensor& topk_weights, const DispatchPlan& plan,
                   const ExpertWeights& weights, Activation activation, bool weight_before_down = false);

/// plan() and experts() in one call. @param topk_ids [tokens, top_k] int32 or int64; -1 = not sent
at::Tensor fused_experts(const at::Tensor& x, const at::Tensor& topk_ids, const at::Tensor& topk_weights,
                         const ExpertWeights& weights, Activation activation, bool weight_before_down = false);

/// A snapshot of the weights of all experts, owned, for inference. Later changes of the weights do not reach it.
struct PackedExperts {
  at::Tensor data;         ///< uint8 [bytes]: up and down in the panels of one kernel; undefined: `plain` holds them
  std::string layout;      ///< which kernel, type and sizes `data` is for; empty where that is undefined
  int64_t num_experts = 0;
  int64_t ffn = 0;
  Activation activation = Activation::swiglu;
  ExpertWeights plain{};   ///< copies of the biases; of up and down too where no kernel serves their type or device
};

/// Packs float32 and bfloat16 weights on the CPU for the active kernel, and copies what other types and devices have.
///
/// Time: the weights are read once and written once, at the speed of memory. Memory: that of the weights, with each
/// expert's outputs padded to a panel (64, on AVX-512; 32 gate and 32 up rows where gated) and its odd bfloat16 columns
/// to a pair; what it was made from is no longer needed.
/// A forward from it packs nothing: worth it from the first call that a set of weights serves twice.
/// @throws c10::ValueError or c10::TypeError for weights that do not fit together
PackedExperts prepack(const ExpertWeights& weights, Activation activation);

/// plan() and experts() in one call from packed weights, to the bits of what plain weights give on the same kernel, or
/// near them where that reads few rows in place.
///
/// @throws c10::ValueError when `packed` was made for another kernel (as on another machine), type or size, or is not
///   aligned to 64 bytes; c10::Error when a gradient is asked
at::Tensor fused_experts(const at::Tensor& x, const at::Tensor& topk_ids, const at::Tensor& topk_weights,
                         const PackedExperts& packed, bool weight_before_down = false);

/// The same feed-forward network for every row (one expert, weight 1): the dense twin and shared experts.
///
/// @param x [..., hidden]; up [U, hidden]; down [hidden, ffn]; biases may be undefined
at::Tensor feed_forward(const at::Tensor& x, const at::Tensor& up, const at::Tensor& down, Activation activation,
                        const at::Tensor& up_bias = {}, const at::Tensor& down_bias = {});

/// Multiply-adds · 2 of one token in `active` experts of this size (gate not counted).
int64_t feed_forward_flops(int64_t hidden, int64_t ffn, Activation activation, int64_t active = 1);

}  // namespace turnout
