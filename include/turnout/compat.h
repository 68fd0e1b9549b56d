// The names, arguments, attributes and defaults of five well-known descriptions of MoE layers, as thin adaptors over
// the layers of this library. Where a description is ambiguous or slips, the comment says what holds here.
#pragma once

#include <turnout/hierarchical_moe.h>
#include <turnout/moe.h>

#include <torch/nn/module.h>
#include <torch/nn/modules/container/any.h>
#include <torch/nn/modules/linear.h>
#include <torch/nn/pimpl.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

namespace turnout::compat {

/// A two-layer perceptron under the names that the descriptions use for an expert.
class ExpertImpl : public FeedForwardImpl {
 public:
  using FeedForwardImpl::FeedForwardImpl;
  const at::Tensor& weight() const { return up; }  ///< the first matrix, [ffn, hidden]
};
TORCH_MODULE(Expert);

/// Experts that stay separate modules, with a gradient each; run as one fused op over lists of their weights.
class ExpertListImpl : public ExpertsModule {
 public:
  ExpertListImpl(const FeedForwardOptions& options, int64_t num_experts);
  at::Tensor forward(const at::Tensor& x, const at::Tensor& topk_weights, const DispatchPlan& plan) override;
  int64_t num_experts() const override { return static_cast<int64_t>(experts_.size()); }
  const Expert& operator[](size_t i) const { return experts_.at(i); }
  auto begin() const { return experts_.begin(); }
  auto end() const { return experts_.end(); }

 private:
  std::vector<Expert> experts_;
};
TORCH_MODULE(ExpertList);

// ---- LLMBook-zh MoeLayer (seed 000) ----

/// Any experts, any gate: top-k of the gate's logits, softmax over the k in float32.
class MoeLayerImpl : public torch::nn::Module {
 public:
  /// @throws c10::ValueError when experts is empty or num_experts_per_tok is not 1 to their number
  MoeLayerImpl(std::vector<torch::nn::AnyModule> experts, torch::nn::AnyModule gate, int64_t num_experts_per_tok);
  /// inputs [batch · seq, hidden] → the same shape
  at::Tensor forward(const at::Tensor& inputs);

  const int64_t num_experts_per_tok;
  turnout::MoE layer{nullptr};
};
TORCH_MODULE(MoeLayer);

// ---- MoEConfig, TopKRouter, MixtureOfExperts (seed 001) ----

struct MoEConfig {
  int64_t num_experts = 8;
  int64_t top_k = 2;
  double capacity_factor = 1.25;           ///< places = ceil(factor · tokens · top_k / experts) over the call
  std::optional<int64_t> expert_capacity;  ///< a fixed number of places; wins over the factor

  /// @throws c10::ValueError naming the field, what it is and what was expected
  void validate() const;
};

/// Softmax, top-k, divided by their sum.
class TopKRouterImpl : public torch::nn::Module {
 public:
  /// @throws c10::ValueError when dim is below 1 or config is inconsistent
  TopKRouterImpl(int64_t dim, MoEConfig config);
  /// x [batch, seq, dim] → scores [batch, seq, top_k], summing to 1 (softmax, top-k, divided by their sum), and
  /// indices [batch, seq, top_k]
  std::tuple<at::Tensor, at::Tensor> forward(const at::Tensor& x);

  const int64_t dim;
  const MoEConfig config;
  torch::nn::Linear gate{nullptr};  ///< dim → num_experts, no bias
};
TORCH_MODULE(TopKRouter);

/// First choices queue for a place before second ones, by position; a token without a place gets zeros.
class MixtureOfExpertsImpl : public torch::nn::Module {
 public:
  MixtureOfExpertsImpl(int64_t dim, MoEConfig config);
  /// x [batch, seq, dim] → the same shape
  at::Tensor forward(const at::Tensor& x);

  const int64_t dim;
  const MoEConfig config;
  TopKRouter router{nullptr};
  ExpertList experts{nullptr};  ///< dim → 4 · dim → dim with GELU
};
TORCH_MODULE(MixtureOfExperts);

// ---- SimpleMoELayer (seed 002) ----

/// A linear gate with bias, and separate experts dim → 4 · dim → dim with GELU. Dropless.
class SimpleMoELayerImpl : public torch::nn::Module {
 public:
  /// @param hidden_dim width of an expert; 0: 4 · embedding_dim
  /// @param alpha scale of load_balancing_loss
  /// @param load_count per_assignment: f = assignments / (tokens · k), balanced value alpha
  SimpleMoELayerImpl(int64_t embedding_dim, int64_t num_experts, int64_t top_k, int64_t hidden_dim = 0,
                     double alpha = 1e-2, LoadCount load_count = LoadCount::per_assignment);
  /// x [batch, seq, embedding_dim] → the same shape; sets load_balancing_loss
  at::Tensor forward(const at::Tensor& x);

  torch::nn::Linear gating_network{nullptr};
  ExpertList experts{nullptr};
  at::Tensor load_balancing_loss;  ///< alpha · experts · Σ f · P of the last forward

 private:
  turnout::MoE layer_{nullptr};
};
TORCH_MODULE(SimpleMoELayer);

// ---- MoELayer (seed 003) ----

struct MoELayerOptions {
  int64_t hidden_dim = 0;
  int64_t num_experts = 0;
  int64_t top_k = 2;
  int64_t ffn_dim = 0;            ///< 0: 4 · hidden_dim
  Activation activation = Activation::gelu;
  bool raw_probabilities = false; ///< weights are the raw probabilities, not the softmax over the selected
  std::optional<double> alpha{};  ///< y = α · Dense(x) + (1 − α) · MoE(x)
};

/// Output and auxiliary loss in one call; dropless; stands in for a transformer's feed-forward block.
class MoELayerImpl : public torch::nn::Module {
 public:
  MoELayerImpl(int64_t hidden_dim, int64_t num_experts, int64_t top_k);
  explicit MoELayerImpl(MoELayerOptions options);
  /// x [..., hidden_dim] → output of the same shape, aux_loss = E · Σ importance · load (first choice, no coefficient)
  std::tuple<at::Tensor, at::Tensor> forward(const at::Tensor& x);

  const MoELayerOptions options;
  turnout::MoE moe{nullptr};
  turnout::Hybrid hybrid{nullptr};  ///< holds moe when alpha is set
};
TORCH_MODULE(MoELayer);

// ---- Top2Gating, Experts, MoE, HeirarchicalMoE (seed 004) ----

struct Top2GatingTensors {
  at::Tensor dispatch_tensor;  ///< [..., groups, tokens, experts, capacity]
  at::Tensor combine_tensor;   ///< the same shape
  at::Tensor loss;             ///< scalar
};

/// The gate as the description has it: dense dispatch and combine tensors.
class Top2GatingImpl : public turnout::Top2GatingImpl {
 public:
  using turnout::Top2GatingImpl::Top2GatingImpl;
  Top2GatingTensors forward(const at::Tensor& x, const at::Tensor& importance = {}, const at::Tensor& uniform = {});
};
TORCH_MODULE(Top2Gating);

/// A bank with the source's layout: w1 [..., dim, hidden], w2 [..., hidden, dim], no biases, uniform in
/// ±1/√(last axis).
class ExpertsImpl : public ExpertsModule {
 public:
  /// @param num_experts one size an outer axis, such as {16} or {4, 4}
  /// @param hidden_dim 0: 4 · dim
  explicit ExpertsImpl(int64_t dim, std::vector<int64_t> num_experts = {16}, int64_t hidden_dim = 0,
                       Activation activation = Activation::gelu);
  /// x [..., n, dim], the leading axes those of num_experts → the same shape
  at::Tensor forward(const at::Tensor& x);
  at::Tensor forward(const at::Tensor& x, const at::Tensor& topk_weights, const DispatchPlan& plan) override;
  int64_t num_experts() const override;

  const Activation activation;
  at::Tensor w1, w2;
};
TORCH_MODULE(Experts);

struct GShardOptions {
  int64_t dim = 0;
  int64_t hidden_dim = 0;  ///< 0: 4 · dim
  Activation activation = Activation::relu;
  double loss_coef = 1e-2;
  turnout::Top2GatingOptions gating{};  ///< policies, thresholds and factors; sizes are not read
};

/// Top-2 MoE. The default second policy is `random`, drawn from torch's default generator.
class MoEImpl : public torch::nn::Module {
 public:
  explicit MoEImpl(GShardOptions options, int64_t num_experts = 16);
  /// inputs [batch, tokens, dim] → output of the same shape, loss · loss_coef
  std::tuple<at::Tensor, at::Tensor> forward(const at::Tensor& inputs);

  const GShardOptions options;
  const int64_t num_experts;
  turnout::Top2Gating gate{nullptr};
  Experts experts{nullptr};
};
TORCH_MODULE(MoE);

/// Two levels of the same. The name is spelt as in the source.
class HeirarchicalMoEImpl : public torch::nn::Module {
 public:
  explicit HeirarchicalMoEImpl(GShardOptions options, std::array<int64_t, 2> num_experts = {4, 4});
  /// inputs [batch, tokens, dim] → output of the same shape, (outer loss + inner loss) · loss_coef
  std::tuple<at::Tensor, at::Tensor> forward(const at::Tensor& inputs);

  const GShardOptions options;
  Experts experts{nullptr};
  turnout::HierarchicalMoE layer{nullptr};
};
TORCH_MODULE(HeirarchicalMoE);
using HierarchicalMoE = HeirarchicalMoE;

}  // namespace turnout::compat
