// Loads the layer, feeds it a text or random rows, and tells what its router does.
#include "inspect_layer.h"

#include "inspect_sections.h"
#include "layer_trace.h"

#include <turnout/checkpoint.h>
#include <turnout/pretrained.h>

#include <ATen/Context.h>
#include <ATen/Functions.h>
#include <c10/util/Exception.h>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>

namespace turnout::cli {
namespace {

constexpr int64_t kLongestText = int64_t{64} << 20;
constexpr int64_t kMostTokens = int64_t{1} << 22;
constexpr int64_t kWindowsACall = 8;
constexpr int64_t kLongestConfig = 1 << 20;

/// Whether the folder holds a model of transformers: those of this program have no model_type.
bool is_published(const std::string& folder) {
  const Json config =
      Json::parse(read_file(folder + "/config.json", kLongestConfig), nullptr, /*allow_exceptions=*/false);
  return config.is_object() && config.contains("model_type");
}

MoE published_layer(const LayerOptions& o) {
  const PretrainedMoE model = pretrained_moe(o.checkpoint);
  TORCH_CHECK_VALUE(std::find(model.layers.begin(), model.layers.end(), o.layer) != model.layers.end(), "--layer is ",
                    o.layer, ", expected one of those with experts in ", o.checkpoint, ": ",
                    fmt::format("{}", fmt::join(model.layers, ", ")));
  TORCH_CHECK_VALUE(o.text.empty(), "--text goes through models that turnout trained, but ", o.checkpoint, " holds a ",
                    model.family, " model: without it the layer gets random rows");
  return load_moe_layer(o.checkpoint, o.layer, at::kFloat);
}

MoE layer_of(const ByteLanguageModel& model, const LayerOptions& o) {
  const auto layers = static_cast<int64_t>(model->blocks.size());
  TORCH_CHECK_VALUE(o.layer >= 0 && o.layer < layers, "--layer is ", o.layer, ", expected 0 to ", layers - 1,
                    ", the layers of ", o.checkpoint);
  const TransformerBlock& block = model->blocks[static_cast<size_t>(o.layer)];
  TORCH_CHECK_VALUE(!block->dense, "--layer is ", o.layer, ", which is dense in ", o.checkpoint,
                    ", expected one with experts");
  return block->moe ? block->moe : block->hybrid->moe;
}

std::string router_of(const RouterOptions& options) {
  return fmt::format("{}, {}", to_string(options.score), to_string(options.weights));
}

/// What reaches the feed-forward part of a layer.
at::Tensor input_of(ByteLanguageModel model, int64_t layer, const at::Tensor& tokens) {
  const at::NoGradGuard no_grad;
  at::Tensor x = model->embedding->forward(tokens);
  for (int64_t before = 0; before < layer; ++before)
    x = model->blocks[static_cast<size_t>(before)]->forward(x);
  TransformerBlock block = model->blocks[static_cast<size_t>(layer)];
  x = x + block->attention->forward(block->attention_norm->forward(x));
  return block->feed_forward_norm->forward(x);
}

/// The way of a byte of the text, in the call that it came in.
Json step_of_text(ByteLanguageModel model, const MoE& moe, const LayerOptions& o, const TextWindows& windows) {
  const int64_t step = *o.step, call = kWindowsACall * windows.length;
  check_step(step, static_cast<int64_t>(windows.text.size()));
  const auto tokens = windows.tokens().split(kWindowsACall)[static_cast<size_t>(step / call)];
  Json json = {{"token", step},
               {"sequence", step / windows.length},
               {"position", step % windows.length},
               {"text", place_json(windows, step)}};
  json.update(layer_step_json(moe, input_of(model, o.layer, tokens), step % call));
  return json;
}

/// Choices among logits that are not numbers mean nothing.
void check_finite(const LayerTrace& trace, const LayerOptions& o) {
  TORCH_CHECK_VALUE(trace.logits.isfinite().all().item<bool>(), o.checkpoint, ": layer ", o.layer,
                    " has router logits that are NaN or infinite: its weights are damaged or the training diverged");
}

void add_random_rows(Json& json, const MoE& moe, const LayerOptions& o) {
  at::manual_seed(o.seed);
  // The layer stands behind a norm: its input has mean 0 and deviation 1.
  const at::Tensor x = at::randn({o.tokens, moe->options.hidden});
  json["input"] = fmt::format("{} random rows, normal with deviation 1", o.tokens);
  const LayerTrace trace = trace_layer(moe, o.layer, x);
  check_finite(trace, o);
  json["trace"] = trace_json(trace);
  if (!o.step) return;
  check_step(*o.step, o.tokens);
  json["step"] = {{"token", *o.step}};
  json["step"].update(layer_step_json(moe, x, *o.step));
}

void add_text(Json& json, ByteLanguageModel model, const MoE& moe, const LayerOptions& o) {
  const std::string text = read_file(o.text, kLongestText);
  TORCH_CHECK_VALUE(!text.empty(), "--text is ", o.text, ": the text is empty, expected at least one byte");
  const TextWindows windows = windows_of(text, model->options.context, kWindowsACall, o.tokens);
  for (const LayerTrace& trace : trace_model(model, windows, kWindowsACall)) {
    if (trace.layer != o.layer) continue;
    check_finite(trace, o);
    json["input"] =
        fmt::format("{} bytes of {} through the model, in windows of {}", windows.text.size(), o.text, windows.length);
    json["trace"] = trace_json(trace);
    json["takers"] = takers_json(trace, windows);
  }
  if (o.step) json["step"] = step_of_text(model, moe, o, windows);
}

}  // namespace

Json layer_json(const LayerOptions& o) {
  TORCH_CHECK_VALUE(o.tokens >= 1 && o.tokens <= kMostTokens, "--tokens is ", o.tokens, ", expected 1 to ",
                    kMostTokens);
  const bool published = is_published(o.checkpoint);
  ByteLanguageModel model = published ? ByteLanguageModel(nullptr) : load_model(o.checkpoint);
  if (model) model->eval();
  MoE moe = published ? published_layer(o) : layer_of(model, o);
  moe->eval();
  Json json = {{"checkpoint", o.checkpoint}, {"layer", o.layer}, {"router", router_of(moe->options.router)}};
  if (o.text.empty())
    add_random_rows(json, moe, o);
  else
    add_text(json, model, moe, o);
  return json;
}

}  // namespace turnout::cli
