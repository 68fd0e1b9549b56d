// Runs models and layers without gradients and gathers what their routers report.
#include "layer_trace.h"

#include "inspect_sections.h"

#include <turnout/balance.h>
#include <turnout/statistics.h>

#include <ATen/Functions.h>
#include <c10/util/Exception.h>

#include <algorithm>

namespace turnout::cli {
namespace {

const std::vector<double>& swept_factors() {
  static const std::vector<double> factors{0.5, 0.75, 1, 1.25, 1.5, 2, 3, 4};
  return factors;
}

LayerTrace trace_of(MoE moe, int64_t layer, const MoEOutput& out) {
  LayerTrace trace{.layer = layer, .options = moe->options};
  trace.group_size = out.logits.size(0);
  trace.chosen = route(out.logits, moe->options.top_k, moe->options.router, moe->selection_bias);
  trace.kept = out.routing;
  trace.logits = out.logits;
  trace.dropped = out.dropped.item<int64_t>();
  return trace;
}

void append(LayerTrace& to, const LayerTrace& more) {
  const auto joined = [](const Routing& a, const Routing& b) {
    return Routing{at::cat({a.topk_ids, b.topk_ids}), at::cat({a.topk_weights, b.topk_weights}),
                   at::cat({a.scores, b.scores})};
  };
  to.chosen = joined(to.chosen, more.chosen);
  to.kept = joined(to.kept, more.kept);
  to.logits = at::cat({to.logits, more.logits});
  to.dropped += more.dropped;
}

}  // namespace

at::Tensor TextWindows::tokens() const {
  const auto bytes = at::empty({static_cast<int64_t>(text.size())}, at::kByte);
  std::copy(text.begin(), text.end(), reinterpret_cast<char*>(bytes.mutable_data_ptr<uint8_t>()));
  return bytes.to(at::kLong).view({-1, length});
}

TextWindows windows_of(const std::string& text, int64_t length, int64_t batch, int64_t bytes) {
  TORCH_CHECK_VALUE(!text.empty(), "the text is empty, expected at least one byte");
  const auto size = static_cast<int64_t>(text.size());
  TextWindows windows{.text = {}, .length = std::min({length, size, bytes})};
  int64_t count = std::max<int64_t>(1, std::min(size, bytes) / windows.length);
  if (count > batch) count -= count % batch;
  const int64_t room = size - windows.length;
  for (int64_t w = 0; w < count; ++w) {
    const int64_t at = count > 1 ? static_cast<int64_t>(static_cast<__int128>(w) * room / (count - 1)) : 0;
    windows.text.append(text, static_cast<size_t>(at), static_cast<size_t>(windows.length));
  }
  return windows;
}

LayerTrace trace_layer(MoE moe, int64_t layer, const at::Tensor& x) {
  const at::NoGradGuard no_grad;
  return trace_of(moe, layer, moe->forward(x));
}

std::vector<LayerTrace> trace_model(ByteLanguageModel model, const TextWindows& windows, int64_t batch) {
  const at::NoGradGuard no_grad;
  const bool was_training = model->is_training();
  model->eval();
  std::vector<LayerTrace> traces;
  for (const at::Tensor& part : windows.tokens().split(batch)) {
    const LanguageModelOutput out = model(part);
    size_t sparse = 0;
    for (size_t layer = 0; layer < out.layers.size(); ++layer) {
      if (!out.layers[layer]) continue;
      const MoE moe = model->blocks[layer]->moe ? model->blocks[layer]->moe : model->blocks[layer]->hybrid->moe;
      LayerTrace trace = trace_of(moe, static_cast<int64_t>(layer), *out.layers[layer]);
      if (sparse == traces.size())
        traces.push_back(std::move(trace));
      else
        append(traces[sparse], trace);
      ++sparse;
    }
  }
  model->train(was_training);
  return traces;
}

Json trace_json(const LayerTrace& trace) {
  const MoEOptions& o = trace.options;
  const RoutingStatistics s = routing_statistics(trace.kept, plan(trace.kept.topk_ids, o.num_experts));
  const auto value = [](const at::Tensor& scalar) { return scalar.item<double>(); };
  const at::Tensor logits = trace.logits.to(at::kFloat);
  CapacityOptions rules = o.capacity;
  rules.fixed = 0;
  rules.per_sequence = false;
  return {{"layer", trace.layer},
          {"experts", o.num_experts},
          {"top_k", o.top_k},
          {"tokens", trace.logits.size(0)},
          {"group", trace.group_size},
          {"rows", to_json(s.tokens_per_expert)},
          {"max_over_mean", value(s.max_over_mean)},
          {"dead_experts", s.dead_experts.item<int64_t>()},
          {"choices", trace.kept.topk_ids.numel()},
          {"dropped", trace.dropped},
          {"entropy", value(s.entropy)},
          {"entropy_max", std::log(static_cast<double>(o.num_experts))},
          {"logit_rms", value(logits.square().mean().sqrt())},
          {"logit_max", value(logits.abs().max())},
          {"load_count", to_string(o.load_count)},
          {"balance_loss", value(balance_loss(trace.chosen.scores, trace.chosen.topk_ids, o.load_count))},
          {"z_loss", value(z_loss(trace.logits))},
          {"capacity", capacity_sweep(trace.chosen, o.num_experts, trace.group_size, rules, swept_factors())}};
}

}  // namespace turnout::cli
