// MoE layer: gate, router, plan, experts and losses in one module that stands in for a feed-forward block.
#pragma once

#include <turnout/balance.h>
#include <turnout/combine.h>
#include <turnout/experts.h>
#include <turnout/plan.h>
#include <turnout/router.h>
#include <turnout/router_variants.h>
#include <turnout/world.h>

#include <torch/nn/module.h>
#include <torch/nn/modules/container/any.h>
#include <torch/nn/modules/linear.h>
#include <torch/nn/pimpl.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

namespace turnout {

/// Sizes and activation of one feed-forward network, dense or expert.
struct FeedForwardOptions {
  int64_t hidden = 0;
  int64_t ffn = 0;
  Activation activation = Activation::gelu;
  bool bias = true;
};

/// A dense feed-forward block: the twin of an MoE layer, and its shared expert. Runs by the experts' kernels.
class FeedForwardImpl : public torch::nn::Module {
 public:
  /// Weights uniform in ±1/√fan_in, as torch::nn::Linear draws them.
  /// @throws c10::ValueError for sizes below 1
  explicit FeedForwardImpl(FeedForwardOptions options);
  /// x [..., hidden] → the same shape
  at::Tensor forward(const at::Tensor& x);

  const FeedForwardOptions options;
  at::Tensor up;         ///< [U, hidden]
  at::Tensor down;       ///< [hidden, ffn]
  at::Tensor up_bias;    ///< [U], or undefined
  at::Tensor down_bias;  ///< [hidden], or undefined
};
TORCH_MODULE(FeedForward);

/// Runs some experts: x [tokens, hidden], topk_weights [tokens, top_k] and a plan over those experts
/// → [tokens, hidden].
using RunExperts =
    std::function<at::Tensor(const at::Tensor& x, const at::Tensor& topk_weights, const DispatchPlan& plan)>;

/// What experts of any kind do: make tokens of tokens, following a plan.
class ExpertsModule : public torch::nn::Module {
 public:
  /// x [tokens, hidden], topk_weights [tokens, top_k] → [tokens, hidden]
  virtual at::Tensor forward(const at::Tensor& x, const at::Tensor& topk_weights, const DispatchPlan& plan) = 0;
  /// The same, and calls `beside` once: where experts wait for other ranks, meanwhile.
  virtual at::Tensor forward_beside(const at::Tensor& x, const at::Tensor& topk_weights, const DispatchPlan& plan,
                                    const std::function<void()>& beside) {
    beside();
    return forward(x, topk_weights, plan);
  }
  /// One forward in parts, each with experts of its own: the first counts[0], the next counts[1], …, in any order of
  /// calls. Together they cost one forward and one backward; parts of experts of an unknown kind each run all of them.
  /// @param counts adding up to num_experts()
  virtual std::vector<RunExperts> parts(const std::vector<int64_t>& counts);
  virtual int64_t num_experts() const = 0;
};

/// A part of a bank: experts [first, first + count) of `all`.
struct ExpertRange {
  int64_t first = 0;
  int64_t count = 0;
  int64_t all = 0;
};

/// Feed-forward experts whose weights stand in one bank a matrix; runs as one fused op.
class FeedForwardBankImpl : public ExpertsModule {
 public:
  /// @throws c10::ValueError for sizes below 1
  FeedForwardBankImpl(FeedForwardOptions options, int64_t num_experts);
  /// The experts of a range alone, with the weights that they have in the whole bank drawn from the same random
  /// state.
  FeedForwardBankImpl(FeedForwardOptions options, ExpertRange range);
  /// Takes banks that are there: they become the parameters, without a copy.
  /// @throws c10::ValueError for sizes below 1, separate experts, or shapes and biases that are not those of the
  ///   options
  FeedForwardBankImpl(FeedForwardOptions options, const ExpertWeights& banks);
  at::Tensor forward(const at::Tensor& x, const at::Tensor& topk_weights, const DispatchPlan& plan) override;
  std::vector<RunExperts> parts(const std::vector<int64_t>& counts) override;
  int64_t num_experts() const override { return up.size(0); }
  ExpertWeights weights() const;

  const FeedForwardOptions options;
  at::Tensor up;         ///< [experts, U, hidden]
  at::Tensor down;       ///< [experts, hidden, ffn]
  at::Tensor up_bias;    ///< [experts, U], or undefined
  at::Tensor down_bias;  ///< [experts, hidden], or undefined
};
TORCH_MODULE(FeedForwardBank);

/// Experts that are any modules with Tensor forward(Tensor), each called once on its rows, also on none, so that
/// every parameter gets a gradient.
class ModuleExpertsImpl : public ExpertsModule {
 public:
  explicit ModuleExpertsImpl(std::vector<torch::nn::AnyModule> experts);
  at::Tensor forward(const at::Tensor& x, const at::Tensor& topk_weights, const DispatchPlan& plan) override;
  std::vector<RunExperts> parts(const std::vector<int64_t>& counts) override;
  int64_t num_experts() const override { return static_cast<int64_t>(experts_.size()); }

 private:
  at::Tensor run(int64_t first, const at::Tensor& x, const at::Tensor& topk_weights, const DispatchPlan& plan);
  std::vector<torch::nn::AnyModule> experts_;
};
TORCH_MODULE(ModuleExperts);

/// A feed-forward block that every token passes beside its experts; activation and bias are those of the experts.
struct SharedExpertOptions {
  int64_t ffn = 0;     ///< its width, of all shared experts together; 0: there is none
  bool gated = false;  ///< multiplied by σ(shared_gate(x)) (Qwen2-MoE), or added as it is (DeepSeek)
};

struct MoEOptions {
  int64_t hidden = 0;
  int64_t ffn = 0;  ///< width of one expert
  int64_t num_experts = 0;
  int64_t top_k = 2;
  Activation activation = Activation::gelu;
  bool bias = true;        ///< of the experts
  SharedExpertOptions shared{};
  bool gate_bias = false;
  /// Who is paired with whom. For expert_choice top_k is the mean number of experts of a token: capacity says how many
  /// tokens an expert takes, factor 1 where it says nothing; it drops nothing afterwards. expert_choice and sinkhorn
  /// have weights of their own, `router` is not read.
  Selection selection = Selection::topk;
  int64_t hash_seed = 0;        ///< of Selection::hash; another one a layer
  RouterOptions router{};
  bool selection_bias = false;  ///< choose by score + a bias that no gradient moves (update_selection_bias); topk alone
  double jitter = 0.0;          ///< in training the router's input is x · uniform(1 ± jitter)
  bool jitter_experts = false;  ///< the experts see that input too (Mixtral in transformers)
  bool noisy = false;           ///< in training logits + noise · softplus(noise_gate(x)) (Shazeer)
  CapacityOptions capacity{};
  LoadCount load_count = LoadCount::per_assignment;
  double balance_coefficient = 1e-2;  ///< 0, and selections other than topk: the loss is not computed
  double z_coefficient = 0.0;         ///< 0: the loss is not computed
};

/// @throws c10::ValueError naming the option that is impossible, what it is and what it may be. ffn is not read, hidden
///   only where `noisy`: a layer may get its gate and its experts from outside
void check(const MoEOptions& options);

/// One forward of an MoE layer: the output, the loss to add, and everything that led there.
struct MoEOutput {
  at::Tensor output;    ///< x's shape and type
  at::Tensor aux_loss;  ///< scalar: coefficient · balance_loss + coefficient · z_loss
  Routing routing;      ///< after capacity
  DispatchPlan plan;
  at::Tensor dropped;   ///< scalar int64: choices that found no place; their tokens get zero from that expert
  at::Tensor logits;    ///< [tokens, experts]: what the gate gave, noise included
  at::Tensor balance_loss;  ///< scalar before its coefficient; undefined where it is not computed
  at::Tensor z_loss;        ///< scalar before its coefficient; undefined where that is 0
};

/// gate → selection → losses → capacity → plan → experts, + shared experts.
///
/// The gate computes in the type of its own weights, under autocast too: gate->to(at::kFloat) keeps the router of a
/// bfloat16 layer in float32 (DeepSeek, Switch). Parameters: gate.*, experts.*, shared.*, shared_gate.weight
/// [1, hidden], noise_gate.weight [experts, hidden]. Buffer: selection_bias [experts], zeros at first, float32 whatever
/// type the layer is moved to, since its steps are smaller than what lower types tell apart.
class MoEImpl : public torch::nn::Module {
 public:
  /// A gate without bias (options.gate_bias) and a bank of feed-forward experts.
  /// @throws c10::ValueError naming the option, for sizes below 1, top_k > num_experts, negative coefficients
  explicit MoEImpl(MoEOptions options);
  /// Any gate with Tensor forward(Tensor) to [tokens, experts], any experts; ffn of the options is not read, hidden,
  /// activation and bias only for a shared expert.
  MoEImpl(MoEOptions options, torch::nn::AnyModule gate, std::shared_ptr<ExpertsModule> experts);

  /// x [..., hidden]; for capacity per sequence [..., sequence, hidden]. No tokens: an empty output, losses of 0.
  /// @param token_mask x's shape without hidden, bool, or undefined; false: padding, which takes no place, counts in no
  ///        loss and gets zero from the routed experts
  /// @param token_ids x's shape without hidden, int32 or int64: the words, which Selection::hash needs
  MoEOutput forward(const at::Tensor& x, const at::Tensor& token_mask = {}, const at::Tensor& token_ids = {});

  /// From now on capacity and losses are those of the joined batch of these ranks, whose tokens stand in order of rank;
  /// places by sequence stay as they are. Every rank calls forward() then, also without tokens. The mean of the ranks'
  /// aux_loss is that of the joined batch, and so is the mean of their gradients (average_gradients()). To drop at
  /// random the ranks follow the random numbers of the first. Limiting capacity gathers the ids and weights of all
  /// ranks.
  /// @throws c10::ValueError for several ranks and a selection whose tokens compete over the whole batch: sinkhorn, and
  ///   expert_choice but for capacity per sequence
  void join(const Group& ranks);

  using torch::nn::Module::to;
  /// As Module's; selection_bias keeps its type.
  void to(at::Device device, at::ScalarType type, bool non_blocking = false) override;
  void to(at::ScalarType type, bool non_blocking = false) override;

  const MoEOptions options;
  torch::nn::AnyModule gate;
  std::shared_ptr<ExpertsModule> experts;
  FeedForward shared{nullptr};             ///< none where options.shared.ffn is 0
  torch::nn::Linear shared_gate{nullptr};  ///< hidden → 1 without bias; none where it is not gated
  torch::nn::Linear noise_gate{nullptr};   ///< hidden → experts without bias, zeros at first; none where not noisy
  at::Tensor selection_bias;               ///< undefined where options.selection_bias is false

 private:
  void register_modules();
  at::Tensor logits_of(const at::Tensor& x_TD);
  ExpertChoice choose(const at::Tensor& logits, const at::Tensor& x, const at::Tensor& mask, const at::Tensor& words);
  void add_losses(const Routing& chosen, const at::Tensor& mask, MoEOutput& out) const;
  Capped limit(const Routing& routing, const at::Tensor& x) const;

  Group joined_{};
};
TORCH_MODULE(MoE);

/// y = α · dense(x) + (1 − α) · moe(x): a dense block blended with an MoE layer (seed 003).
class HybridImpl : public torch::nn::Module {
 public:
  /// @throws c10::ValueError when alpha is outside of [0, 1]
  HybridImpl(FeedForward dense, MoE moe, double alpha);
  MoEOutput forward(const at::Tensor& x);

  const double alpha;
  FeedForward dense;
  MoE moe;
};
TORCH_MODULE(Hybrid);

}  // namespace turnout
