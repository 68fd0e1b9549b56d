// A small byte-level language model whose feed-forward blocks are dense, MoE or a blend, chosen per layer.
#pragma once

#include <turnout/expert_parallel.h>
#include <turnout/moe.h>

#include <torch/nn/module.h>
#include <torch/nn/modules/embedding.h>
#include <torch/nn/modules/linear.h>
#include <torch/nn/modules/normalization.h>
#include <torch/nn/pimpl.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace turnout {

/// What stands in the sparse layers of a model.
enum class BlockKind {
  dense,   ///< one feed-forward network
  moe,     ///< MoE
  hybrid,  ///< alpha · dense + (1 − alpha) · MoE
};

/// Which layers are sparse; the others are dense.
enum class LayerPattern {
  every,        ///< all of them
  alternating,  ///< the second, fourth, … as in Switch and GShard
};

/// @throws c10::ValueError naming the word when it is not one of the enumerators
BlockKind parse_block_kind(const std::string& name);
std::string to_string(BlockKind kind);
LayerPattern parse_layer_pattern(const std::string& name);
std::string to_string(LayerPattern pattern);

struct LanguageModelOptions {
  int64_t vocabulary = 256;                       ///< one token a byte
  int64_t layers = 4;                             ///< blocks
  int64_t hidden = 128;                           ///< width of the residual stream; a multiple of 2 · heads
  int64_t heads = 4;                              ///< attention heads
  int64_t context = 128;                          ///< most tokens that forward() takes at once
  BlockKind kind = BlockKind::moe;                ///< feed-forward part of the sparse layers
  LayerPattern pattern = LayerPattern::every;     ///< which layers are sparse
  int64_t ffn = 512;                              ///< width of dense layers and of the dense half of a hybrid one
  double alpha = 0.5;                             ///< share of the dense half in a hybrid layer
  Activation activation = Activation::gelu;       ///< of dense networks and experts; replaces moe.activation
  bool bias = false;                              ///< of dense networks and experts; replaces moe.bias
  bool tied_head = false;                         ///< the head shares the weights of the token embedding
  MoEOptions moe{.ffn = 256, .num_experts = 16};  ///< hidden, activation and bias are set from the fields above

  bool is_sparse(int64_t layer) const {
    return kind != BlockKind::dense && (pattern == LayerPattern::every || layer % 2 == 1);
  }
};

/// @throws c10::ValueError naming the first option that is impossible, what it is and what it may be
void check(const LanguageModelOptions& options);

/// The options as JSON, and back.
/// @throws c10::ValueError naming the key that is missing, unknown or of the wrong type; then as check() does
std::string to_json(const LanguageModelOptions& options);
LanguageModelOptions language_model_options_from_json(const std::string& text);

/// Floating-point operations (2 a multiply-add) of the matrix products for one token of a full context, forward only.
/// A training step costs three times as much. Norms, activations, softmax and biases are not counted.
struct FlopCount {
  int64_t attention = 0;     ///< projections, scores and mixing; a token sees (context + 1) / 2 positions on average
  int64_t feed_forward = 0;  ///< dense networks and the experts that a token is sent to
  int64_t gate = 0;          ///< router logits
  int64_t head = 0;          ///< output logits
  int64_t total() const { return attention + feed_forward + gate + head; }
};
FlopCount flops_per_token(const LanguageModelOptions& options);
/// "attention 1 + feed-forward 2 + gate 3 + head 4 = 10"
std::string to_string(const FlopCount& count);

struct ParameterCount {
  int64_t total = 0;   ///< trained numbers
  int64_t active = 0;  ///< those that one token meets: of num_experts experts only top_k
};
ParameterCount count_parameters(const LanguageModelOptions& options);

/// The dense model that costs as much as this one: the same options, but dense layers of the width whose FLOPs equal
/// those of dense networks, active experts and gates together, rounded up (in the dense model's favour).
/// Without gated activations and with an even number of experts in every layer the counts are equal:
/// ffn = top_k · moe.ffn + num_experts / 2.
LanguageModelOptions dense_twin(const LanguageModelOptions& options);

struct LanguageModelOutput {
  at::Tensor logits;                             ///< [batch, sequence, vocabulary]
  at::Tensor aux_loss;                           ///< scalar: sum of the layers' aux_loss, to be added to the loss
  std::vector<std::optional<MoEOutput>> layers;  ///< one a layer; none where it is dense
};

/// Causal self-attention with rotary positions (arXiv:2104.09864) over at::scaled_dot_product_attention. No biases.
class CausalAttentionImpl : public torch::nn::Module {
 public:
  CausalAttentionImpl(int64_t hidden, int64_t heads, int64_t context);
  /// x [batch, sequence, hidden], sequence <= context → the same shape
  at::Tensor forward(const at::Tensor& x);

  torch::nn::Linear qkv{nullptr};  ///< hidden → 3 · hidden: queries, keys, values
  torch::nn::Linear out{nullptr};  ///< hidden → hidden

 private:
  int64_t heads_;
  at::Tensor rotation_;  // [context, 1, 1, hidden / heads / 2, 2]: cos and sin; a buffer, not saved
};
TORCH_MODULE(CausalAttention);

/// x + attention(norm(x)), then + feed-forward(norm(x)).
class TransformerBlockImpl : public torch::nn::Module {
 public:
  TransformerBlockImpl(const LanguageModelOptions& options, int64_t layer, const ParallelLayout& layout = {});
  /// x [batch, sequence, hidden] → the same shape
  /// @param report receives what the MoE layer did; none where the block is dense
  at::Tensor forward(const at::Tensor& x, std::optional<MoEOutput>* report = nullptr);

  torch::nn::LayerNorm attention_norm{nullptr};
  CausalAttention attention{nullptr};
  torch::nn::LayerNorm feed_forward_norm{nullptr};
  FeedForward dense{nullptr};  ///< one of these three holds a module
  MoE moe{nullptr};
  Hybrid hybrid{nullptr};
};
TORCH_MODULE(TransformerBlock);

/// Pre-norm transformer over bytes.
///
/// Weights are drawn from torch's default generator, normal with deviation 0.02 · √(768 / hidden) (GPT-2's, carried
/// to other widths); the two projections that write into the residual stream get 1/√(2 · layers) of it. float32.
/// Deterministic at a fixed thread count. Causal: logits at a position depend on bytes up to it, except through
/// capacity, which is shared by the tokens of a call.
class ByteLanguageModelImpl : public torch::nn::Module {
 public:
  /// @param layout ranks that share the model: experts lie on them, everything else stands on each, with the weights
  ///        that one process draws from the same random state. forward() then takes this rank's part of the batch.
  /// @throws c10::ValueError as check() does
  explicit ByteLanguageModelImpl(LanguageModelOptions options, ParallelLayout layout = {});

  /// @param tokens [batch, sequence] int64 in [0, vocabulary), sequence in 1 … context
  /// @throws c10::ValueError or c10::TypeError naming what it got and what it expected
  LanguageModelOutput forward(const at::Tensor& tokens);

  /// Where a NaN or Inf first appears for these tokens, of all ranks: "embedding", "layer 2", "head", or "" where
  /// nowhere.
  std::string first_non_finite(const at::Tensor& tokens);

  const LanguageModelOptions options;
  const ParallelLayout layout;
  torch::nn::Embedding embedding{nullptr};
  std::vector<TransformerBlock> blocks;
  torch::nn::LayerNorm norm{nullptr};
  torch::nn::Linear head{nullptr};  ///< empty when tied

 private:
  void check_tokens(const at::Tensor& tokens) const;
  at::Tensor logits(const at::Tensor& x);
};
TORCH_MODULE(ByteLanguageModel);

/// Writes FOLDER/config.json and FOLDER/model.safetensors, each atomically; the options stand in both, so that a pair
/// torn by a crash between the two is noticed. Of a model on several ranks, all of which call it, the first writes the
/// whole. @throws FileError
void save_model(ByteLanguageModel model, const std::string& folder);

/// @throws FileError naming the file that is missing, foreign or does not fit its config.json
ByteLanguageModel load_model(const std::string& folder);

struct GenerateOptions {
  int64_t tokens = 200;      ///< bytes to add
  double temperature = 0.8;  ///< 0 takes the most probable byte each time
  uint64_t seed = 0;         ///< of the draws
};

/// Continues a text byte by byte; what lies further back than the context is forgotten.
///
/// @param prompt at least one byte
/// @return the added bytes alone
/// @throws c10::ValueError for an empty prompt, a negative or non-finite temperature, tokens below 0
/// Cost: one forward over up to `context` tokens a byte. Deterministic for a seed and a thread count.
std::string generate(ByteLanguageModel model, const std::string& prompt, const GenerateOptions& options);

}  // namespace turnout
