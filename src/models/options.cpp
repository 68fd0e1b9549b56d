// Options of the language model: their words, their checks, and their JSON.
#include <turnout/transformer.h>

#include "layers/moe_fields.h"
#include "ops/names.h"

namespace turnout {
namespace {

constexpr ops::Names<BlockKind, 3> kKinds{
    {{BlockKind::dense, "dense"}, {BlockKind::moe, "moe"}, {BlockKind::hybrid, "hybrid"}}};
constexpr ops::Names<LayerPattern, 2> kPatterns{
    {{LayerPattern::every, "every"}, {LayerPattern::alternating, "alternating"}}};

// Far above what anyone trains with this model, far below where products of sizes overflow.
constexpr int64_t kLargest = 1 << 20;

void check_size(const char* name, int64_t value) {
  TORCH_CHECK_VALUE(value >= 1 && value <= kLargest, "turnout: ", name, " is ", value, ", expected 1 to ", kLargest);
}

// One list of fields, walked by both the writer and the reader.
template <class Fields>
void visit_model(Fields& f, LanguageModelOptions& o) {
  f.number("vocabulary", o.vocabulary);
  f.number("layers", o.layers);
  f.number("hidden", o.hidden);
  f.number("heads", o.heads);
  f.number("context", o.context);
  f.word(
      "kind", o.kind, [](BlockKind v) { return to_string(v); }, parse_block_kind);
  f.word(
      "pattern", o.pattern, [](LayerPattern v) { return to_string(v); }, parse_layer_pattern);
  f.number("ffn", o.ffn);
  f.number("alpha", o.alpha);
  f.word(
      "activation", o.activation, [](Activation v) { return to_string(v); }, parse_activation);
  f.number("bias", o.bias);
  f.number("tied_head", o.tied_head);
  f.object("moe", [&](auto& inner) { visit_moe(inner, o.moe); });
}

}  // namespace

BlockKind parse_block_kind(const std::string& name) { return ops::parse_name("kind", kKinds, name); }
std::string to_string(BlockKind kind) { return ops::name_of(kKinds, kind); }
LayerPattern parse_layer_pattern(const std::string& name) { return ops::parse_name("pattern", kPatterns, name); }
std::string to_string(LayerPattern pattern) { return ops::name_of(kPatterns, pattern); }

void check(const LanguageModelOptions& o) {
  check_size("vocabulary", o.vocabulary);
  check_size("layers", o.layers);
  check_size("hidden", o.hidden);
  check_size("heads", o.heads);
  check_size("context", o.context);
  TORCH_CHECK_VALUE(o.hidden % (2 * o.heads) == 0, "turnout: hidden is ", o.hidden,
                    ", expected a multiple of 2 · heads = ", 2 * o.heads, ", so that rotary positions pair up");
  check_size("ffn", o.ffn);
  TORCH_CHECK_VALUE(o.alpha >= 0.0 && o.alpha <= 1.0, "turnout: alpha is ", o.alpha, ", expected 0 to 1");
  TORCH_CHECK_VALUE(o.kind == BlockKind::dense || o.pattern == LayerPattern::every || o.layers >= 2,
                    "turnout: layers is ", o.layers, ", expected at least 2 where layers alternate");
  if (o.kind == BlockKind::dense) return;
  check_size("experts", o.moe.num_experts);
  check_size("ffn of an expert", o.moe.ffn);
  if (o.moe.shared.ffn != 0) check_size("ffn of the shared expert", o.moe.shared.ffn);
  auto layer = o.moe;
  layer.hidden = o.hidden;  // a model has one size for all
  check(layer);
  TORCH_CHECK_VALUE(o.moe.selection == Selection::topk, "turnout: selection is ", to_string(o.moe.selection),
                    ", expected topk: a language model chooses experts by what came before");
}

std::string to_json(const LanguageModelOptions& options) {
  LanguageModelOptions copy = options;
  JsonWriter writer;
  visit_model(writer, copy);
  return writer.json.dump(2);
}

LanguageModelOptions language_model_options_from_json(const std::string& text) {
  LanguageModelOptions options;
  const nlohmann::ordered_json json = parse_json("model options", text);
  JsonReader reader(json, "model");
  visit_model(reader, options);
  reader.finish();
  check(options);
  return options;
}

}  // namespace turnout
