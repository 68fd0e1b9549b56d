// Two levels of GShard top-2 gating: tokens to groups of experts, then to an expert within each group.
#pragma once

#include <turnout/moe.h>
#include <turnout/router.h>

#include <torch/nn/module.h>
#include <torch/nn/pimpl.h>

#include <array>
#include <cstdint>
#include <memory>

namespace turnout {

/// Top-2 gating with capacity. The defaults are those of tensor2tensor and seed 004.
struct Top2GatingOptions {
  int64_t hidden = 0;
  int64_t num_experts = 16;
  double epsilon = 1e-9;
  SecondPolicy policy_train = SecondPolicy::random;
  SecondPolicy policy_eval = SecondPolicy::random;
  double threshold_train = 0.2;
  double threshold_eval = 0.2;
  double capacity_factor_train = 1.25;  ///< of floor(factor · group / experts) places a sequence, at least 4
  double capacity_factor_eval = 2.0;
  int64_t outer = 1;  ///< gates that run side by side, one an outer expert; 1: a single level
};

struct Top2GatingOutput {
  Routing routing;        ///< [outer · groups · tokens, 2] after capacity
  at::Tensor loss;        ///< scalar, before policy and capacity
  at::Tensor dropped;     ///< scalar int64: choices that found no place
  int64_t capacity = 0;   ///< places of each expert in each group
  int64_t group_size = 0;
};

/// Gate, route_top2() and limit_capacity() in one module. Source: tensor2tensor moe.py, seed 004.
class Top2GatingImpl : public torch::nn::Module {
 public:
  /// w_gating is drawn from a standard normal, as in the source.
  /// @throws c10::ValueError naming the option, for sizes below 1, fewer than 2 experts, factors that are not positive
  explicit Top2GatingImpl(Top2GatingOptions options);
  /// @param x [groups, tokens, hidden], or [outer, groups, tokens, hidden] when options.outer > 1
  /// @param importance [outer, groups, tokens] or undefined, see route_top2()
  /// @param uniform numbers for SecondPolicy::random or undefined, see route_top2()
  /// Gradient: to x and w_gating through the weights and the loss.
  Top2GatingOutput forward(const at::Tensor& x, const at::Tensor& importance = {}, const at::Tensor& uniform = {});

  const Top2GatingOptions options;
  at::Tensor w_gating;  ///< [hidden, experts], or [outer, hidden, experts]
};
TORCH_MODULE(Top2Gating);

struct HierarchicalMoEOptions {
  int64_t hidden = 0;
  int64_t ffn = 0;                          ///< 0: 4 · hidden
  std::array<int64_t, 2> num_experts{4, 4}; ///< outer, inner
  Activation activation = Activation::relu;
  bool bias = false;                        ///< of the experts
  double loss_coefficient = 1e-2;
  Top2GatingOptions gating{};               ///< policies, thresholds and factors of both levels; sizes are not read
};

struct HierarchicalMoEOutput {
  at::Tensor output;    ///< [groups, tokens, hidden]
  at::Tensor aux_loss;  ///< coefficient · (outer loss + inner loss)
  at::Tensor dropped;   ///< scalar int64: choices without a place, at both levels
  at::Tensor tokens_per_expert;  ///< [outer · inner] int64
};

/// Outer gating gives each group of experts a fixed number of slots a sequence; inner gating routes the slots,
/// empty ones included in its means, knowing of each whether it is a token's first or second choice.
///
/// Source: tensor2tensor moe.py, PyPI mixture-of-experts 0.2.3 (HeirarchicalMoE), seed 004.
class HierarchicalMoEImpl : public torch::nn::Module {
 public:
  explicit HierarchicalMoEImpl(HierarchicalMoEOptions options);
  /// @param experts any experts, outer · inner of them, index outer · inner_count + inner
  HierarchicalMoEImpl(HierarchicalMoEOptions options, std::shared_ptr<ExpertsModule> experts);
  /// @param x [groups, tokens, hidden]: capacity is counted in each group (sequence)
  HierarchicalMoEOutput forward(const at::Tensor& x);

  const HierarchicalMoEOptions options;
  Top2Gating gate_outer{nullptr}, gate_inner{nullptr};
  std::shared_ptr<ExpertsModule> experts;
};
TORCH_MODULE(HierarchicalMoE);

}  // namespace turnout
