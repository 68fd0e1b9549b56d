// Reads config.json by the table of families.
#include "pretrained/config.h"

#include <turnout/checkpoint.h>

#include <c10/util/Exception.h>

#include <nlohmann/json.hpp>

#include <algorithm>
#include <set>

namespace turnout::pretrained {
namespace {

using Json = nlohmann::json;  // sorted, as transformers writes the file; the ordered one takes n² steps

constexpr int64_t kLongestConfig = 1 << 20;
constexpr int kDeepest = 32;
constexpr int64_t kMostWide = 1 << 24;     // rows or columns of a matrix
constexpr int64_t kMostCounted = 1 << 16;  // experts or layers

// Fields of config.json, each asked for by its kind; null counts as absent.
class Fields {
 public:
  explicit Fields(std::string path) : path_(std::move(path)) {
    bool deep = false;
    const auto watch = [&](int depth, Json::parse_event_t, Json&) {
      deep = deep || depth > kDeepest;
      return !deep;
    };
    json_ = Json::parse(read_file(path_, kLongestConfig), watch, /*allow_exceptions=*/false);
    if (deep || !json_.is_object()) fail("is no JSON object of at most " + std::to_string(kDeepest) + " levels");
  }

  [[noreturn]] void fail(const std::string& problem) const { throw FileError(path_ + ": " + problem); }

  [[noreturn]] void refuse(const std::string& name, const std::string& expected) const {
    const Json* value = find(name);
    std::string text = value ? value->dump(-1, ' ', false, Json::error_handler_t::replace) : "missing";
    if (text.size() > 200) text.resize(200);
    fail(name + " is " + text + ", expected " + expected);
  }

  bool has(const std::string& name) const { return find(name) != nullptr; }

  int64_t whole(const std::string& name, int64_t most, int64_t least = 1) const {
    const Json* value = find(name);
    const bool fits = value && value->is_number_unsigned() && value->get<uint64_t>() <= static_cast<uint64_t>(most);
    if (!fits || value->get<int64_t>() < least)
      refuse(name, "a whole number from " + std::to_string(least) + " to " + std::to_string(most));
    return value->get<int64_t>();
  }
  int64_t whole_or(const std::string& name, int64_t otherwise, int64_t most, int64_t least = 1) const {
    return has(name) ? whole(name, most, least) : otherwise;
  }
  int64_t first_whole(const std::vector<std::string>& names, int64_t most) const {
    for (const std::string& name : names)
      if (has(name)) return whole(name, most);
    return whole(names.front(), most);  // says that it is missing
  }
  double number_or(const std::string& name, double otherwise) const {
    const Json* value = find(name);
    if (!value) return otherwise;
    if (!value->is_number()) refuse(name, "a number");
    return value->get<double>();
  }
  bool truth_or(const std::string& name, bool otherwise) const {
    const Json* value = find(name);
    if (!value) return otherwise;
    if (!value->is_boolean()) refuse(name, "true or false");
    return value->get<bool>();
  }
  std::string word_or(const std::string& name, const std::string& otherwise) const {
    const Json* value = find(name);
    if (!value) return otherwise;
    if (!value->is_string()) refuse(name, "a word");
    return value->get<std::string>();
  }
  std::vector<int64_t> numbers_or_none(const Json& parent, const std::string& name) const {
    std::vector<int64_t> numbers;
    const auto found = parent.find(name);
    if (found == parent.end() || found->is_null()) return numbers;
    if (!found->is_array()) fail(name + " is no list of whole numbers");
    for (const Json& value : *found) {
      if (!value.is_number_unsigned() || value.get<uint64_t>() > static_cast<uint64_t>(kMostWide))
        fail(name + " is no list of whole numbers");
      numbers.push_back(value.get<int64_t>());
    }
    return numbers;
  }
  const Json& json() const { return json_; }
  Json take_json() { return std::move(json_); }

 private:
  const Json* find(const std::string& name) const {
    const auto found = json_.find(name);
    return found == json_.end() || found->is_null() ? nullptr : &*found;
  }

  std::string path_;
  Json json_;
};

Activation activation_of(const Fields& fields, const Family& family) {
  const std::string word = fields.word_or(family.activation, "");
  if (family.name == "gpt_oss") {  // its gate is part of the family; hidden_act is not read
    for (const auto& [name, value] : {std::pair{"swiglu_alpha", 1.702}, {"swiglu_limit", 7.0}})
      if (fields.number_or(name, value) != value) fields.refuse(name, std::to_string(value));
    return parse_activation("swiglu_clamped");
  }
  const bool gated = !family.per_expert.gate.empty();
  if (gated && (word == "silu" || word == "swish")) return Activation::swiglu;
  if (gated && word == "gelu") return Activation::geglu;
  if (!gated && word == "relu") return Activation::relu;
  if (!gated && word == "gelu") return Activation::gelu;
  if (!gated && (word == "gelu_new" || word == "gelu_pytorch_tanh")) return Activation::gelu_tanh;
  if (!gated && word == "silu") return Activation::silu;
  fields.refuse(family.activation, gated ? "silu or gelu" : "relu, gelu, gelu_new or silu");
}

RouterOptions router_of(const Fields& fields, const Family& family) {
  RouterOptions router = router_preset(family.router);
  const RouterFields& known = family.router_fields;
  const bool divides = fields.truth_or("norm_topk_prob", false);
  if (known.norm_topk_prob) router.weights = divides ? RouterWeights::normalized : RouterWeights::probability;
  if (!known.norm_topk_prob && known.greedy && divides)  // DeepSeek's own code divides, transformers does not
    fields.refuse("norm_topk_prob", "false: its sources disagree on what true means");
  if (known.scale) router.scale = fields.number_or("routed_scaling_factor", 1.0);
  if (known.groups) {
    const std::string method = fields.word_or("topk_method", known.greedy ? "greedy" : "noaux_tc");
    const std::string expected = known.greedy ? "greedy or group_limited_greedy" : "noaux_tc";
    if (method != "noaux_tc" && (!known.greedy || (method != "greedy" && method != "group_limited_greedy")))
      fields.refuse("topk_method", expected);
    const bool greedy = method == "greedy";
    router.groups = greedy ? 1 : fields.whole_or("n_group", 1, kMostCounted);
    router.kept_groups = greedy ? 1 : fields.whole_or("topk_group", 1, kMostCounted);
  }
  const std::string scoring = router.score == ScoreFunction::sigmoid ? "sigmoid" : "softmax";
  if (fields.word_or("scoring_func", scoring) != scoring) fields.refuse("scoring_func", scoring);
  return router;
}

void set_sizes(const Fields& fields, const Family& family, MoEOptions& options) {
  options.hidden = fields.first_whole(family.hidden, kMostWide);
  options.ffn = fields.first_whole(family.ffn, kMostWide);
  options.num_experts = fields.first_whole(family.experts, kMostCounted);
  options.top_k = family.sequence_capacity ? 1 : fields.whole("num_experts_per_tok", kMostCounted);
  options.bias = family.bias;
  const std::string& biased = family.gate_bias;
  options.gate_bias = biased == "true" || (!biased.empty() && fields.truth_or(biased, false));
  options.selection_bias = !family.selection_bias.empty();
  if (!family.shared_ffn.empty()) options.shared.ffn = fields.whole_or(family.shared_ffn, 0, kMostWide, 0);
  if (!family.shared_count.empty())
    options.shared.ffn = options.ffn * fields.whole_or(family.shared_count, 0, kMostCounted, 0);
  options.shared.gated = options.shared.ffn > 0 && !family.shared_gate.empty();
}

std::vector<int64_t> t5_layers(const Fields& fields, int64_t encoder_layers) {
  std::vector<int64_t> layers;
  const int64_t decoder_layers = fields.whole_or("num_decoder_layers", encoder_layers, kMostCounted, 0);
  const auto add = [&](int64_t first, int64_t count, const char* sparse_field) {
    const int64_t sparse = fields.whole_or(sparse_field, 3, kMostCounted, 0);
    const int64_t step = sparse > 0 ? count / sparse : count;
    for (int64_t i = 0; i < count; ++i)
      if (step == 1 || (step > 0 && i % step == 1)) layers.push_back(first + i);
  };
  add(0, encoder_layers, "num_sparse_encoder_layers");
  add(encoder_layers, decoder_layers, "num_sparse_decoder_layers");
  return layers;
}

std::vector<int64_t> moe_layers(const Fields& fields, SparseRule rule, int64_t count) {
  if (rule == SparseRule::t5) return t5_layers(fields, count);
  const int64_t dense =
      rule == SparseRule::after_dense ? fields.whole_or("first_k_dense_replace", 0, kMostCounted, 0) : 0;
  const int64_t step = rule == SparseRule::steps ? fields.whole_or("decoder_sparse_step", 1, kMostCounted) : 1;
  std::set<int64_t> without;
  if (rule == SparseRule::steps)
    for (const int64_t layer : fields.numbers_or_none(fields.json(), "mlp_only_layers")) without.insert(layer);
  std::vector<int64_t> layers;
  for (int64_t layer = dense; layer < count; ++layer)
    if ((layer + 1) % step == 0 && !without.count(layer)) layers.push_back(layer);
  return layers;
}

void read_quantization(const Fields& fields, Config& config) {
  const auto found = fields.json().find("quantization_config");
  if (found == fields.json().end() || !found->is_object()) return;
  const auto block = fields.numbers_or_none(*found, "weight_block_size");
  if (block.empty()) return;
  if (block.size() != 2 || block[0] < 1 || block[1] < 1) fields.fail("weight_block_size is no pair of sizes");
  config.fp8_block = {block[0], block[1]};
}

}  // namespace

std::string config_without_quantization(const std::string& folder) {
  Json json = Fields(folder + "/config.json").take_json();
  json.erase("quantization_config");
  return json.dump(2, ' ', false, Json::error_handler_t::replace) + "\n";
}

Config read_config(const std::string& folder) {
  const Fields fields(folder + "/config.json");
  Config config;
  config.moe.family = fields.word_or("model_type", "");
  for (const Family& family : families())
    if (family.name == config.moe.family) config.family = &family;
  if (config.family == nullptr) {
    std::string known;
    for (const Family& family : families()) known.append(known.empty() ? "" : ", ").append(family.name);
    fields.refuse("model_type", "one of " + known);
  }
  MoEOptions& options = config.moe.options;
  set_sizes(fields, *config.family, options);
  options.activation = activation_of(fields, *config.family);
  options.router = router_of(fields, *config.family);
  options.balance_coefficient = 0;
  if (config.family->sequence_capacity) {
    options.capacity.fixed = fields.whole_or("expert_capacity", 64, kMostWide);
    options.capacity.per_sequence = true;
    options.capacity.order = DropOrder::position;
  }
  try {
    check(options.router, options.top_k, options.num_experts);
  } catch (const c10::Error& error) {
    fields.fail(error.what_without_backtrace());
  }
  const int64_t count =
      fields.whole(config.family->sparse == SparseRule::t5 ? "num_layers" : "num_hidden_layers", kMostCounted);
  config.encoder_layers = count;
  config.moe.layers = moe_layers(fields, config.family->sparse, count);
  read_quantization(fields, config);
  return config;
}

std::vector<std::string> layer_roots(const Config& config, int64_t layer, KeyLayout layout) {
  const auto& layers = config.moe.layers;
  if (std::find(layers.begin(), layers.end(), layer) == layers.end()) {
    std::string known;
    for (const int64_t one : layers) known.append(known.empty() ? "" : ", ").append(std::to_string(one));
    TORCH_CHECK_VALUE(false, "turnout: layer ", layer, " of this ", config.family->name,
                      " holds no experts, expected one of ", known.empty() ? "none" : known);
  }
  if (config.family->sparse == SparseRule::t5) {
    const bool encoder = layer < config.encoder_layers;
    return {encoder ? with_number("encoder.block.{l}.layer.1.mlp.", layer)
                    : with_number("decoder.block.{l}.layer.2.mlp.", layer - config.encoder_layers)};
  }
  std::vector<std::string> roots;
  for (const std::string& root : config.family->roots) roots.push_back(with_number(root, layer));
  if (layout == KeyLayout::fused) std::reverse(roots.begin(), roots.end());
  return roots;
}

}  // namespace turnout::pretrained

namespace turnout {

PretrainedMoE pretrained_moe(const std::string& folder) { return pretrained::read_config(folder).moe; }

}  // namespace turnout
