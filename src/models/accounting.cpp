// What a language model costs: floating-point operations, parameters, and the dense model of equal cost.
#include <turnout/transformer.h>

#include <sstream>

namespace turnout {
namespace {

int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Numbers in one feed-forward network.
int64_t network_parameters(int64_t hidden, int64_t ffn, Activation activation, bool bias) {
  const int64_t up = is_gated(activation) ? 2 * ffn : ffn;
  return hidden * up + hidden * ffn + (bias ? up + hidden : 0);
}

}  // namespace

FlopCount flops_per_token(const LanguageModelOptions& o) {
  FlopCount count;
  // qkv and out are 4 · hidden² multiply-adds; scores and mixing 2 · hidden a position seen.
  count.attention = o.layers * (8 * o.hidden * o.hidden + 2 * o.hidden * (o.context + 1));
  count.head = 2 * o.hidden * o.vocabulary;
  for (int64_t layer = 0; layer < o.layers; ++layer) {
    const bool sparse = o.is_sparse(layer);
    if (!sparse || o.kind == BlockKind::hybrid) count.feed_forward += feed_forward_flops(o.hidden, o.ffn, o.activation);
    if (sparse) {
      count.feed_forward += feed_forward_flops(o.hidden, o.moe.ffn, o.activation, o.moe.top_k);
      count.feed_forward += feed_forward_flops(o.hidden, o.moe.shared.ffn, o.activation);
      count.gate += 2 * o.hidden * (o.moe.num_experts + (o.moe.shared.gated ? 1 : 0));
    }
  }
  return count;
}

std::string to_string(const FlopCount& count) {
  std::ostringstream text;
  text << "attention " << count.attention << " + feed-forward " << count.feed_forward << " + gate " << count.gate
       << " + head " << count.head << " = " << count.total();
  return text.str();
}

ParameterCount count_parameters(const LanguageModelOptions& o) {
  // Embedding, final norm (weight and bias), head; then two norms and attention a layer.
  int64_t shared = o.vocabulary * o.hidden + 2 * o.hidden + (o.tied_head ? 0 : o.vocabulary * o.hidden);
  shared += o.layers * (4 * o.hidden + 4 * o.hidden * o.hidden);
  ParameterCount count{shared, shared};
  for (int64_t layer = 0; layer < o.layers; ++layer) {
    const bool sparse = o.is_sparse(layer);
    int64_t everyone = 0;
    if (!sparse || o.kind == BlockKind::hybrid) everyone += network_parameters(o.hidden, o.ffn, o.activation, o.bias);
    int64_t expert = 0;
    if (sparse) {
      everyone += o.moe.num_experts * (o.hidden + (o.moe.gate_bias ? 1 : 0));
      if (o.moe.shared.ffn > 0)
        everyone += network_parameters(o.hidden, o.moe.shared.ffn, o.activation, o.bias);
      if (o.moe.shared.gated) everyone += o.hidden;
      expert = network_parameters(o.hidden, o.moe.ffn, o.activation, o.bias);
    }
    count.total += everyone + o.moe.num_experts * expert;
    count.active += everyone + o.moe.top_k * expert;
  }
  return count;
}

LanguageModelOptions dense_twin(const LanguageModelOptions& options) {
  LanguageModelOptions twin = options;
  twin.kind = BlockKind::dense;
  const FlopCount count = flops_per_token(options);
  const int64_t of_one_unit = feed_forward_flops(options.hidden, 1, options.activation);
  twin.ffn = ceil_divide(count.feed_forward + count.gate, options.layers * of_one_unit);
  return twin;
}

}  // namespace turnout
