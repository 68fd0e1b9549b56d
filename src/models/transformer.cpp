// The byte-level language model: embedding, pre-norm blocks, head.
//
// Shapes: B batch, L sequence, D hidden, H heads, P pairs of a head (D / H / 2), V vocabulary.
#include <turnout/transformer.h>

#include <ATen/ops/arange.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/outer.h>
#include <ATen/ops/pow.h>
#include <ATen/ops/scaled_dot_product_attention.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/view_as_complex.h>
#include <ATen/ops/view_as_real.h>
#include <ATen/ops/zeros.h>
#include <torch/nn/init.h>

#include <cmath>

namespace turnout {
namespace {

constexpr double kRotaryBase = 10000.0;

// cos and sin of position · base^(−pair / pairs): [context, 1, 1, P, 2]
at::Tensor rotary_table(int64_t context, int64_t pairs) {
  const at::Tensor frequency_P = at::pow(kRotaryBase, at::arange(pairs, at::kDouble) / -static_cast<double>(pairs));
  const at::Tensor angle_LP = at::outer(at::arange(context, at::kDouble), frequency_P);
  return at::stack({angle_LP.cos(), angle_LP.sin()}, -1).to(at::kFloat).view({context, 1, 1, pairs, 2});
}

torch::nn::LayerNorm make_norm(int64_t hidden) { return torch::nn::LayerNorm(torch::nn::LayerNormOptions({hidden})); }

torch::nn::Linear make_linear(int64_t in, int64_t out) {
  return torch::nn::Linear(torch::nn::LinearOptions(in, out).bias(false));
}

MoEOptions moe_options(const LanguageModelOptions& options) {
  MoEOptions moe = options.moe;
  moe.hidden = options.hidden;
  moe.activation = options.activation;
  moe.bias = options.bias;
  return moe;
}

bool ends_with(const std::string& name, const std::string& end) {
  return name.size() >= end.size() && name.compare(name.size() - end.size(), end.size(), end) == 0;
}

// Of a bank that lies on several ranks the whole is drawn, and this rank's part kept.
void draw_normal(at::Tensor& parameter, double deviation, const ExpertRange* part) {
  if (part == nullptr) {
    torch::nn::init::normal_(parameter, 0.0, deviation);
    return;
  }
  auto shape = parameter.sizes().vec();
  shape[0] = part->all;
  const at::NoGradGuard no_grad;
  const auto whole = torch::nn::init::normal_(at::empty(shape, parameter.options()), 0.0, deviation);
  parameter.copy_(whole.narrow(0, part->first, part->count));
}

MoE make_moe(const LanguageModelOptions& options, const ParallelLayout& layout) {
  return layout.all.size == 1 ? MoE(moe_options(options)) : expert_parallel_moe(moe_options(options), layout);
}

void draw_weights(torch::nn::Module& model, const LanguageModelOptions& options) {
  const auto parts = parts_of_banks(model);
  const double deviation = 0.02 * std::sqrt(768.0 / static_cast<double>(options.hidden));
  const double into_residual = deviation / std::sqrt(2.0 * static_cast<double>(options.layers));
  for (auto& item : model.named_parameters()) {
    const std::string& name = item.key();
    if (ends_with(name, "bias")) {
      torch::nn::init::zeros_(item.value());
    } else if (item.value().dim() >= 2) {
      const bool residual = ends_with(name, "down") || ends_with(name, "attention.out.weight");
      const auto part = parts.find(name);
      draw_normal(item.value(), residual ? into_residual : deviation, part == parts.end() ? nullptr : &part->second);
    }
  }
}

// On every rank, so that all of them go on or stop.
bool finite(const at::Tensor& tensor, const Group& ranks) {
  return sum_over(tensor.isfinite().all().logical_not().to(at::kFloat), ranks).item<float>() == 0;
}

}  // namespace

CausalAttentionImpl::CausalAttentionImpl(int64_t hidden, int64_t heads, int64_t context)
    : qkv(register_module("qkv", make_linear(hidden, 3 * hidden))),
      out(register_module("out", make_linear(hidden, hidden))),
      heads_(heads),
      rotation_(register_buffer("rotation", rotary_table(context, hidden / heads / 2))) {}

at::Tensor CausalAttentionImpl::forward(const at::Tensor& x_BLD) {
  const int64_t B = x_BLD.size(0), L = x_BLD.size(1), D = x_BLD.size(2), P = D / heads_ / 2;
  const at::Tensor qkv_BL3HP2 = qkv(x_BLD).view({B, L, 3, heads_, P, 2});
  // A pair of neighbours is a complex number; multiplying by e^(i · angle) rotates it.
  const at::Tensor qk_BL2HP = at::view_as_complex(qkv_BL3HP2.narrow(2, 0, 2));
  const at::Tensor rotated = at::view_as_real(qk_BL2HP * at::view_as_complex(rotation_.narrow(0, 0, L)));
  const auto heads_first = [&](const at::Tensor& t) { return t.reshape({B, L, heads_, 2 * P}).transpose(1, 2); };
  const at::Tensor mixed_BHLd = at::scaled_dot_product_attention(
      heads_first(rotated.select(2, 0)), heads_first(rotated.select(2, 1)), heads_first(qkv_BL3HP2.select(2, 2)),
      /*attn_mask=*/{}, /*dropout_p=*/0.0, /*is_causal=*/true);
  return out(mixed_BHLd.transpose(1, 2).reshape({B, L, D}));
}

TransformerBlockImpl::TransformerBlockImpl(const LanguageModelOptions& options, int64_t layer,
                                           const ParallelLayout& layout)
    : attention_norm(register_module("attention_norm", make_norm(options.hidden))),
      attention(register_module("attention", CausalAttention(options.hidden, options.heads, options.context))),
      feed_forward_norm(register_module("feed_forward_norm", make_norm(options.hidden))) {
  const auto dense_network = [&] {
    return FeedForward(FeedForwardOptions{options.hidden, options.ffn, options.activation, options.bias});
  };
  if (!options.is_sparse(layer)) {
    dense = register_module("dense", dense_network());
  } else if (options.kind == BlockKind::moe) {
    moe = register_module("moe", make_moe(options, layout));
  } else {
    hybrid = register_module("hybrid", Hybrid(dense_network(), make_moe(options, layout), options.alpha));
  }
}

at::Tensor TransformerBlockImpl::forward(const at::Tensor& x_BLD, std::optional<MoEOutput>* report) {
  const at::Tensor attended_BLD = x_BLD + attention(attention_norm(x_BLD));
  const at::Tensor normed_BLD = feed_forward_norm(attended_BLD);
  if (dense) return attended_BLD + dense(normed_BLD);
  MoEOutput sparse = moe ? moe(normed_BLD) : hybrid(normed_BLD);
  const at::Tensor y_BLD = attended_BLD + sparse.output;
  if (report != nullptr) *report = std::move(sparse);
  return y_BLD;
}

ByteLanguageModelImpl::ByteLanguageModelImpl(LanguageModelOptions options_in, ParallelLayout layout_in)
    : options(std::move(options_in)), layout(std::move(layout_in)) {
  check(options);
  embedding = register_module("embedding", torch::nn::Embedding(options.vocabulary, options.hidden));
  for (int64_t layer = 0; layer < options.layers; ++layer)
    blocks.push_back(register_module("layer_" + std::to_string(layer), TransformerBlock(options, layer, layout)));
  norm = register_module("norm", make_norm(options.hidden));
  if (!options.tied_head) head = register_module("head", make_linear(options.hidden, options.vocabulary));
  draw_weights(*this, options);
}

void ByteLanguageModelImpl::check_tokens(const at::Tensor& tokens) const {
  TORCH_CHECK_VALUE(tokens.defined() && tokens.dim() == 2, "turnout: ByteLanguageModel: tokens are ",
                    tokens.defined() ? std::to_string(tokens.dim()) + "-dimensional" : std::string("undefined"),
                    ", expected [batch, sequence]");
  TORCH_CHECK_TYPE(tokens.scalar_type() == at::kLong, "turnout: ByteLanguageModel: tokens are ", tokens.scalar_type(),
                   ", expected int64");
  TORCH_CHECK_VALUE(tokens.size(1) >= 1 && tokens.size(1) <= options.context,
                    "turnout: ByteLanguageModel: tokens have a sequence of ", tokens.size(1),
                    ", expected 1 to the context, ", options.context);
  if (tokens.numel() == 0) return;
  const auto [least, most] = tokens.aminmax();
  TORCH_CHECK_VALUE(least.item<int64_t>() >= 0 && most.item<int64_t>() < options.vocabulary,
                    "turnout: ByteLanguageModel: tokens reach from ", least.item<int64_t>(), " to ",
                    most.item<int64_t>(), ", expected 0 to ", options.vocabulary - 1);
}

at::Tensor ByteLanguageModelImpl::logits(const at::Tensor& x_BLD) {
  return at::linear(norm(x_BLD), options.tied_head ? embedding->weight : head->weight);
}

LanguageModelOutput ByteLanguageModelImpl::forward(const at::Tensor& tokens_BL) {
  check_tokens(tokens_BL);
  LanguageModelOutput out;
  out.layers.resize(blocks.size());
  at::Tensor x_BLD = embedding(tokens_BL);
  out.aux_loss = at::zeros({}, x_BLD.options());
  for (size_t layer = 0; layer < blocks.size(); ++layer) {
    x_BLD = blocks[layer](x_BLD, &out.layers[layer]);
    if (out.layers[layer]) out.aux_loss = out.aux_loss + out.layers[layer]->aux_loss;
  }
  out.logits = logits(x_BLD);
  return out;
}

std::string ByteLanguageModelImpl::first_non_finite(const at::Tensor& tokens_BL) {
  check_tokens(tokens_BL);
  const at::NoGradGuard no_grad;
  at::Tensor x_BLD = embedding(tokens_BL);
  if (!finite(x_BLD, layout.all)) return "embedding";
  for (size_t layer = 0; layer < blocks.size(); ++layer) {
    std::optional<MoEOutput> report;
    x_BLD = blocks[layer](x_BLD, &report);
    if (!finite(x_BLD, layout.all) || (report && !finite(report->aux_loss, layout.all)))
      return "layer " + std::to_string(layer);
  }
  return finite(logits(x_BLD), layout.all) ? "" : "head";
}

}  // namespace turnout
