// What the routers of a model do with a text, and which of its bytes each expert takes.
#pragma once

#include "tensor_json.h"

#include <turnout/moe.h>
#include <turnout/transformer.h>

#include <cstdint>
#include <string>
#include <vector>

namespace turnout::cli {

/// One MoE layer over all tokens that it was shown.
struct LayerTrace {
  int64_t layer = 0;
  MoEOptions options;
  int64_t group_size = 0;  ///< tokens of one call, which queue together; divides the tokens
  Routing chosen;          ///< before capacity
  Routing kept;            ///< after it
  at::Tensor logits;       ///< [tokens, experts]
  int64_t dropped = 0;
};

/// Windows of a text, end to end: byte i of `text` is token i of a trace.
struct TextWindows {
  std::string text;
  int64_t length = 0;  ///< of a window; the last one is whole as well

  at::Tensor tokens() const;  ///< [windows, length] int64
};

/// Up to `bytes` of a text as windows of at most `length`, evenly spaced; whole calls of `batch` windows where there
/// are so many.
/// @throws c10::ValueError when there is no text
TextWindows windows_of(const std::string& text, int64_t length, int64_t batch, int64_t bytes);

/// The layer by itself on rows that it gets as they are.
LayerTrace trace_layer(MoE moe, int64_t layer, const at::Tensor& x);

/// Every MoE layer of a model over the windows, `batch` of them a call.
std::vector<LayerTrace> trace_model(ByteLanguageModel model, const TextWindows& windows, int64_t batch);

/// Load, drops, entropy, logits and losses of a trace, and its sweep of capacities.
Json trace_json(const LayerTrace& trace);

/// A byte of the text amid its neighbours, as readable text: before, at, after.
Json place_json(const TextWindows& windows, int64_t token);

/// For each expert: its share of the rows, the bytes and words that it takes more often than others do, and examples.
Json takers_json(const LayerTrace& trace, const TextWindows& windows);

}  // namespace turnout::cli
