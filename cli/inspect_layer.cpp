// Loads the layer, feeds it a text or random rows, and tells what its router does.
#include "inspect_layer.h"

#include "inspect_text.h"
#include "layer_trace.h"

#include <turnout/checkpoint.h>

#include <ATen/Context.h>
#include <ATen/Functions.h>
#include <c10/util/Exception.h>

#include <fmt/format.h>

namespace turnout::cli {
namespace {

constexpr int64_t kLongestText = int64_t{64} << 20;
constexpr int64_t kMostTokens = int64_t{1} << 22;
constexpr int64_t kWindowsACall = 8;

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

}  // namespace

Json layer_json(const LayerOptions& o) {
  TORCH_CHECK_VALUE(o.tokens >= 1 && o.tokens <= kMostTokens, "--tokens is ", o.tokens, ", expected 1 to ",
                    kMostTokens);
  ByteLanguageModel model = load_model(o.checkpoint);
  const MoE moe = layer_of(model, o);
  Json json = {{"checkpoint", o.checkpoint}, {"layer", o.layer}, {"router", router_of(moe->options.router)}};
  if (o.text.empty()) {
    at::manual_seed(o.seed);
    // The layer stands behind a norm: its input has mean 0 and deviation 1.
    const LayerTrace trace = trace_layer(moe, o.layer, at::randn({o.tokens, moe->options.hidden}));
    json["input"] = fmt::format("{} random rows, normal with deviation 1", o.tokens);
    json["trace"] = trace_json(trace);
    return json;
  }
  const TextWindows windows =
      windows_of(read_file(o.text, kLongestText), model->options.context, kWindowsACall, o.tokens);
  for (const LayerTrace& trace : trace_model(model, windows, kWindowsACall)) {
    if (trace.layer != o.layer) continue;
    json["input"] =
        fmt::format("{} bytes of {} through the model, in windows of {}", windows.text.size(), o.text, windows.length);
    json["trace"] = trace_json(trace);
    json["takers"] = takers_json(trace, windows);
  }
  return json;
}

}  // namespace turnout::cli
