// Text from a language model, one byte at a time, drawn by this file's own numbers: the same on every machine.
#include <turnout/transformer.h>

#include "models/hash.h"

#include <ATen/ops/softmax.h>
#include <ATen/ops/tensor.h>

#include <algorithm>
#include <cmath>
#include <limits>

namespace turnout {
namespace {

// The first index whose cumulated probability exceeds u. probabilities [V] float64.
int64_t draw(const at::Tensor& probabilities_V, double u) {
  const double* p = probabilities_V.const_data_ptr<double>();
  const int64_t V = probabilities_V.numel();
  double sum = 0.0;
  int64_t last_possible = 0;
  for (int64_t v = 0; v < V; ++v) {
    if (p[v] <= 0.0) continue;
    last_possible = v;
    sum += p[v];
    if (u < sum) return v;
  }
  return last_possible;  // rounding left the sum below u
}

}  // namespace

std::string generate(ByteLanguageModel model, const std::string& prompt, const GenerateOptions& options) {
  TORCH_CHECK_VALUE(!prompt.empty(), "turnout: generate: prompt is empty, expected at least one byte");
  TORCH_CHECK_VALUE(options.temperature >= 0.0 && std::isfinite(options.temperature),
                    "turnout: generate: temperature is ", options.temperature, ", expected 0 or more");
  TORCH_CHECK_VALUE(options.tokens >= 0, "turnout: generate: tokens is ", options.tokens, ", expected 0 or more");
  TORCH_CHECK_VALUE(model->options.vocabulary == 256, "turnout: generate: vocabulary is ", model->options.vocabulary,
                    ", expected 256, one token a byte");
  const at::NoGradGuard no_grad;
  const auto device = model->embedding->weight.device();
  std::string text = prompt;
  for (int64_t n = 0; n < options.tokens; ++n) {
    const size_t length = std::min(text.size(), static_cast<size_t>(model->options.context));
    const std::vector<uint8_t> window(text.end() - static_cast<std::ptrdiff_t>(length), text.end());
    const at::Tensor tokens_1L = at::tensor(window, at::kByte).to(device, at::kLong).unsqueeze(0);
    const at::Tensor logits_V = model(tokens_1L).logits[0][-1].to(at::kCPU, at::kDouble);
    TORCH_CHECK_VALUE(logits_V.isfinite().all().item<bool>(), "turnout: generate: the model gives NaN or Inf");
    const int64_t byte = options.temperature == 0.0
                             ? logits_V.argmax().item<int64_t>()
                             : draw(at::softmax((logits_V - logits_V.max()) / options.temperature, 0),
                                    hash_to_unit(hash_numbers(options.seed, static_cast<uint64_t>(n))));
    text.push_back(static_cast<char>(static_cast<uint8_t>(byte)));
  }
  return text.substr(prompt.size());
}

}  // namespace turnout
