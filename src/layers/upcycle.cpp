// Upcycling: slices of a dense block become experts; one formula scales them for every form of router weights.
#include <turnout/upcycle.h>

#include "../ops/checks.h"

#include <ATen/ATen.h>

namespace turnout {
namespace {

constexpr const char* kName = "turnout::upcycle";

void check_multiple(const char* name, int64_t value, int64_t slices) {
  TORCH_CHECK_VALUE(value % slices == 0, kName, ": ", name, " is ", value, ", expected a multiple of ", slices,
                    " (slices)");
}

// [U, …] → [slices, U / slices, …]; a gated block keeps gate rows before up rows in each slice.
at::Tensor cut_rows(const at::Tensor& rows, int64_t slices, bool gated) {
  auto shape = rows.sizes().vec();
  const int64_t halves = gated ? 2 : 1;
  const int64_t width = shape[0] / halves / slices;
  shape.insert(shape.begin(), {halves, slices});
  shape[2] = width;
  auto cut = rows.view(shape).transpose(0, 1);
  shape.erase(shape.begin());
  shape[0] = slices;
  shape[1] = halves * width;
  return cut.reshape(shape);
}

// The sum of a token's weights where all logits are equal; that of any logits where weights are normalised.
double sum_of_weights(const MoE& moe) {
  const auto logits = at::zeros({1, moe->options.num_experts}, at::kDouble);
  return route(logits, moe->options.top_k, moe->options.router).topk_weights.sum().item<double>();
}

}  // namespace

MoE upcycle(const FeedForward& dense, MoEOptions options, int64_t slices) {
  ops::check_at_least(kName, "slices", slices, 1);
  check_multiple("num_experts", options.num_experts, slices);
  check_multiple("top_k", options.top_k, slices);
  check_multiple("ffn of the dense block", dense->options.ffn, slices);
  TORCH_CHECK_VALUE(options.selection == Selection::topk, kName, ": selection is ", to_string(options.selection),
                    ", expected topk, whose weights add up to a constant");
  TORCH_CHECK_VALUE(options.capacity.dropless(), kName, ": capacity is limited, expected experts that drop nothing");
  TORCH_CHECK_VALUE(options.shared.ffn == 0, kName, ": shared.ffn is ", options.shared.ffn,
                    ", expected 0: a shared expert would add to what the dense block computes");
  options.hidden = dense->options.hidden;
  options.ffn = dense->options.ffn / slices;
  options.activation = dense->options.activation;
  options.bias = dense->options.bias;
  MoE moe(options);
  moe->to(dense->up.device(), dense->up.scalar_type());

  const at::NoGradGuard no_grad;
  const int64_t copies = options.num_experts / slices;
  const double sum = sum_of_weights(moe);
  const bool gated = is_gated(options.activation);
  const auto fill = [&](at::Tensor& bank, const at::Tensor& of_slices) {  // [slices, …] into [copies · slices, …]
    auto shape = of_slices.sizes().vec();
    shape.insert(shape.begin(), copies);
    bank.view(shape).copy_(of_slices.unsqueeze(0).expand(shape));
  };
  auto& bank = *std::dynamic_pointer_cast<FeedForwardBankImpl>(moe->experts);
  fill(bank.up, cut_rows(dense->up, slices, gated));
  // Each slice gets 1 / slices of the weights' sum; the bias of down stands in every slice and gets all of it.
  fill(bank.down, cut_rows(dense->down.t(), slices, false).transpose(1, 2) * (static_cast<double>(slices) / sum));
  if (options.bias) {
    fill(bank.up_bias, cut_rows(dense->up_bias, slices, gated));
    fill(bank.down_bias, (dense->down_bias / sum).expand({slices, options.hidden}));
  }
  for (auto& parameter : moe->gate.ptr()->parameters()) {
    auto shape = parameter.sizes().vec();
    shape.insert(shape.begin(), copies);
    shape[1] = slices;
    auto by_copy = parameter.view(shape);
    by_copy.copy_(by_copy.narrow(1, 0, 1).clone().expand(shape));
  }
  return moe;
}

}  // namespace turnout
