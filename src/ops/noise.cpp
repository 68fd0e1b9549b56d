// Noise in routers: jitter of the input, trainable noise of the logits, and the smooth load that it gives.
#include <turnout/router_variants.h>

#include "checks.h"

#include <ATen/ATen.h>
#include <torch/library.h>

namespace turnout {
namespace {

void check_same(const char* op, const char* name, const at::Tensor& tensor, const char* other_name,
                const at::Tensor& other) {
  ops::check_dim(op, name, tensor, 2, "[tokens, experts]");
  ops::check_floating(op, name, tensor);
  TORCH_CHECK_VALUE(tensor.sym_sizes() == other.sym_sizes(), op, ": ", name, " has shape ", tensor.sym_sizes(),
                    ", expected ", other.sym_sizes(), " as ", other_name, " has");
  ops::check_device(op, name, tensor, other_name, other);
}

}  // namespace

at::Tensor jitter(const at::Tensor& x, double amount, const at::Tensor& uniform) {
  constexpr const char* kOp = "turnout::jitter";
  ops::check_floating(kOp, "x", x);
  TORCH_CHECK_VALUE(amount >= 0 && amount < 1, kOp, ": amount is ", amount, ", expected 0 to below 1");
  if (!uniform.defined()) return x * at::empty_like(x.detach()).uniform_(1 - amount, 1 + amount);
  ops::check_floating(kOp, "uniform", uniform);
  TORCH_CHECK_VALUE(uniform.sym_sizes() == x.sym_sizes(), kOp, ": uniform has shape ", uniform.sym_sizes(),
                    ", expected ", x.sym_sizes(), " as x has");
  ops::check_device(kOp, "uniform", uniform, "x", x);
  return x * (uniform * (2 * amount) + (1 - amount)).to(x.scalar_type());
}

NoisyLogits noisy_logits(const at::Tensor& logits, const at::Tensor& noise_logits, double minimum,
                         const at::Tensor& noise) {
  constexpr const char* kOp = "turnout::noisy_logits";
  ops::check_dim(kOp, "logits", logits, 2, "[tokens, experts]");
  ops::check_floating(kOp, "logits", logits);
  check_same(kOp, "noise_logits", noise_logits, "logits", logits);
  TORCH_CHECK_VALUE(minimum >= 0, kOp, ": minimum is ", minimum, ", expected a number of at least 0");
  if (noise.defined()) check_same(kOp, "noise", noise, "logits", logits);
  auto deviation = at::softplus(noise_logits);
  if (minimum > 0) deviation = deviation + minimum;
  const auto drawn = noise.defined() ? noise : at::randn_like(logits.detach());
  return {logits + drawn * deviation, deviation};
}

at::Tensor noisy_load(const at::Tensor& clean, const NoisyLogits& noisy, int64_t top_k) {
  constexpr const char* kOp = "turnout::noisy_load";
  ops::check_dim(kOp, "clean", clean, 2, "[tokens, experts]");
  ops::check_floating(kOp, "clean", clean);
  check_same(kOp, "noisy", noisy.logits, "clean", clean);
  check_same(kOp, "deviation", noisy.deviation, "clean", clean);
  const auto num_experts = clean.sym_size(1).guard_int(__FILE__, __LINE__);
  TORCH_CHECK_VALUE(top_k >= 1 && top_k <= num_experts, kOp, ": top_k is ", top_k, ", expected 1 to ", num_experts,
                    " (experts)");
  if (top_k == num_experts) return at::ones_like(noisy.logits).sum(0);
  const auto best = noisy.logits.gather(-1, turnout::topk(noisy.logits.detach(), top_k + 1));
  const auto runner_up = best.narrow(-1, top_k, 1), last_chosen = best.narrow(-1, top_k - 1, 1);
  // What an expert must exceed to be chosen: for a chosen one the best of those left out, else the last of the chosen.
  const auto threshold = at::where(noisy.logits.gt(runner_up), runner_up, last_chosen);
  return at::special_ndtr((clean - threshold) / noisy.deviation).sum(0);
}

namespace {

at::Tensor jitter_op(const at::Tensor& x, double amount, const std::optional<at::Tensor>& uniform) {
  return jitter(x, amount, uniform.value_or(at::Tensor()));
}

std::tuple<at::Tensor, at::Tensor> noisy_logits_op(const at::Tensor& logits, const at::Tensor& noise_logits,
                                                   double minimum, const std::optional<at::Tensor>& noise) {
  auto noisy = noisy_logits(logits, noise_logits, minimum, noise.value_or(at::Tensor()));
  return {noisy.logits, noisy.deviation};
}

at::Tensor noisy_load_op(const at::Tensor& clean, const at::Tensor& noisy, const at::Tensor& deviation,
                         int64_t top_k) {
  return noisy_load(clean, {noisy, deviation}, top_k);
}

TORCH_LIBRARY_IMPL(turnout, CompositeImplicitAutograd, m) {
  m.impl("jitter", jitter_op);
  m.impl("noisy_logits", noisy_logits_op);
  m.impl("noisy_load", noisy_load_op);
}

}  // namespace
}  // namespace turnout
