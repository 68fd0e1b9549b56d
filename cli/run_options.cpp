// Arguments of a run: one line an option.
#include "run_options.h"

#include "commands.h"
#include "ranks.h"

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <c10/util/Exception.h>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <chrono>
#include <filesystem>

namespace turnout::cli {
namespace {

constexpr int64_t kMostTokens = 1'000'000'000'000'000;
constexpr int64_t kMostThreads = 1024;

std::string shown(const std::vector<std::string>& value) { return fmt::format("{}", fmt::join(value, " ")); }
template <class T>
std::string shown(const T& value) {
  return fmt::format("{}", value);
}

}  // namespace

template <class Get>
CLI::Option* RunArguments::value(const std::string& flag, Get get, const std::string& help) {
  CLI::Option* option = app_.add_option(flag, get(options_), help)->group(group_)->capture_default_str();
  settings_.push_back({option, [get](RunOptions& o) { return shown(get(o)); }});
  return option;
}

template <class Get, class Parse>
void RunArguments::word(const std::string& flag, Get get, Parse parse, const std::string& help) {
  CLI::Option* option = app_.add_option_function<std::string>(
      flag, [this, get, parse](const std::string& text) { get(options_) = parse(text); }, help);
  option->group(group_)->default_str(to_string(get(options_)));
  settings_.push_back({option, [get](RunOptions& o) { return to_string(get(o)); }});
}

RunArguments::RunArguments(CLI::App& app, RunOptions& options) : app_(app), options_(options) {
  add_model_options();
  add_training_options();
}

void RunArguments::add_model_options() {
  group_ = "Model";
  value(
      "--layers", [](RunOptions & o) -> auto& { return o.model.layers; }, "Transformer blocks");
  value(
      "--hidden", [](RunOptions & o) -> auto& { return o.model.hidden; }, "Width of the residual stream");
  value(
      "--heads", [](RunOptions & o) -> auto& { return o.model.heads; }, "Attention heads");
  value(
      "--context", [](RunOptions & o) -> auto& { return o.model.context; }, "Bytes that attention reaches back");
  word(
      "--activation", [](RunOptions & o) -> auto& { return o.model.activation; }, parse_activation,
      "relu, gelu, gelu_tanh, silu, swiglu, geglu, swiglu_clamped");
  value(
      "--ffn", [](RunOptions & o) -> auto& { return o.ffn; },
      "Width of dense networks; 0 = as many FLOPs as the active experts and the gate");
  value(
      "--bias", [](RunOptions & o) -> auto& { return o.model.bias; }, "Biases in the feed-forward networks");
  value(
      "--tied-head", [](RunOptions & o) -> auto& { return o.model.tied_head; }, "Head shares the embedding's weights");
  group_ = "Mixture of experts";
  word(
      "--kind", [](RunOptions & o) -> auto& { return o.model.kind; }, parse_block_kind,
      "Feed-forward part of the sparse layers: moe, hybrid (alpha * dense + (1 - alpha) * MoE), dense");
  word(
      "--pattern", [](RunOptions & o) -> auto& { return o.model.pattern; }, parse_layer_pattern,
      "Which layers are sparse: every, alternating");
  value(
      "--alpha", [](RunOptions & o) -> auto& { return o.model.alpha; }, "Share of the dense half in hybrid layers");
  value(
      "--experts", [](RunOptions & o) -> auto& { return o.model.moe.num_experts; }, "Experts a layer");
  value(
      "--top-k", [](RunOptions & o) -> auto& { return o.model.moe.top_k; }, "Experts that each token is sent to");
  value(
      "--expert-ffn", [](RunOptions & o) -> auto& { return o.model.moe.ffn; }, "Width of one expert");
  word(
      "--router", [](RunOptions & o) -> auto& { return o.model.moe.router.weights; }, parse_router_weights,
      "Weights of the chosen: normalized, probability, softmax_of_topk");
  value(
      "--capacity", [](RunOptions & o) -> auto& { return o.model.moe.capacity.factor; },
      "Capacity factor of an expert; 0 = no token is dropped");
  word(
      "--drop-order", [](RunOptions & o) -> auto& { return o.model.moe.capacity.order; }, parse_drop_order,
      "Who is dropped last: choice, position, score, random");
  value(
      "--balance", [](RunOptions & o) -> auto& { return o.model.moe.balance_coefficient; },
      "Coefficient of the balancing loss");
  value(
      "--z-loss", [](RunOptions & o) -> auto& { return o.model.moe.z_coefficient; }, "Coefficient of the z-loss");
}

void RunArguments::add_training_options() {
  group_ = "Training";
  value(
      "--text", [](RunOptions & o) -> auto& { return o.text; },
      "Files and folders to learn from (default: the sources of Python's standard library)");
  value(
      "--tokens", [](RunOptions & o) -> auto& { return o.tokens; }, "Bytes to train on");
  value(
      "--minutes", [](RunOptions & o) -> auto& { return o.minutes; },
      "Train for about this long instead: the tokens that fit are measured first");
  value(
      "--batch", [](RunOptions & o) -> auto& { return o.training.batch; }, "Sequences a step");
  value(
      "--lr", [](RunOptions & o) -> auto& { return o.training.learning_rate; }, "Peak learning rate of AdamW");
  value(
      "--warmup", [](RunOptions & o) -> auto& { return o.training.warmup_steps; }, "Steps of linear warm-up");
  value(
      "--weight-decay", [](RunOptions & o) -> auto& { return o.training.weight_decay; }, "Of matrices");
  value(
      "--clip", [](RunOptions & o) -> auto& { return o.training.clip; }, "Largest norm of the gradient");
  value(
      "--eval-bytes", [](RunOptions & o) -> auto& { return o.training.eval_bytes; },
      "Held-out bytes of one evaluation");
  value(
      "--seed", [](RunOptions & o) -> auto& { return o.training.seed; }, "Of weights and batches")
      ->check(kSeeds);
  value(
      "--threads", [](RunOptions & o) -> auto& { return o.threads; }, "0 = one a core");
}

void RunArguments::refuse_differences(RunOptions& stored, const std::string& source) {
  for (const Setting& setting : settings_) {
    if (setting.option->count() == 0) continue;
    const std::string given = setting.show(options_), kept = setting.show(stored);
    TORCH_CHECK_VALUE(given == kept, setting.option->get_name(), " is ", given, ", but ", source, " was made with ",
                      kept.empty() ? "none" : kept);
  }
}

void settle(RunOptions& o) {
  TORCH_CHECK_VALUE(o.minutes >= 0 && o.minutes < 1e6, "--minutes is ", o.minutes, ", expected 0 or more");
  TORCH_CHECK_VALUE(o.ffn >= 0, "--ffn is ", o.ffn, ", expected 0 or more");
  TORCH_CHECK_VALUE(o.tokens >= 1 && o.tokens <= kMostTokens, "--tokens is ", o.tokens, ", expected 1 to ",
                    kMostTokens);
  o.model.ffn = std::max<int64_t>(1, o.ffn);
  check(o.model);
  if (o.ffn == 0) {
    LanguageModelOptions sparse = o.model;
    sparse.kind = BlockKind::moe;
    sparse.pattern = LayerPattern::every;
    check(sparse);
    o.model.ffn = o.model.kind == BlockKind::hybrid ? o.model.moe.ffn : dense_twin(sparse).ffn;
  }
  check(o.model);
  check(o.training);
  const int64_t a_step = o.training.batch * o.model.context;
  o.training.steps = (o.tokens + a_step - 1) / a_step;
  use_threads(o);
}

void use_threads(RunOptions& o) {
  TORCH_CHECK_VALUE(o.threads >= 0 && o.threads <= kMostThreads, "--threads is ", o.threads, ", expected 0 to ",
                    kMostThreads);
  if (o.threads > 0) at::set_num_threads(static_cast<int>(o.threads));
  o.threads = at::get_num_threads();
}

void fit_minutes(RunOptions& o, const std::vector<LanguageModelOptions>& trained,
                 const std::shared_ptr<const ByteText>& text, const Ranks& ranks) {
  if (o.minutes <= 0) return;
  constexpr int64_t kWarm = 3, kTimed = 8;
  constexpr double kForEvaluation = 0.92;  // of the time is left for steps
  TrainingOptions probe = o.training;
  probe.steps = kWarm + kTimed;
  double seconds = 0;
  for (const LanguageModelOptions& model : trained) {
    Trainer trainer(make_model(model, o.training.seed, ranks.layout()), probe, text);
    for (int64_t i = 0; i < kWarm; ++i) trainer.step();
    const auto start = std::chrono::steady_clock::now();
    for (int64_t i = 0; i < kTimed; ++i) trainer.step();
    seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() / kTimed;
  }
  seconds = ranks.of_first(seconds);
  o.training.steps = std::max<int64_t>(1, static_cast<int64_t>(o.minutes * 60 * kForEvaluation / seconds));
  o.tokens = o.training.steps * o.training.batch * o.model.context;
}

ByteLanguageModel make_model(const LanguageModelOptions& options, uint64_t seed, const ParallelLayout& layout) {
  at::manual_seed(seed);
  return ByteLanguageModel(options, layout);
}

}  // namespace turnout::cli
