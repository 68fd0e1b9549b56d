// GShard top-2 gating, composed of differentiable calls, so that one text serves every device.
#include <turnout/router.h>

#include "checks.h"
#include "names.h"

#include <ATen/ATen.h>
#include <torch/library.h>

namespace turnout {
namespace {

constexpr ops::Names<SecondPolicy, 4> kSecondPolicies{{{SecondPolicy::all, "all"},
                                                       {SecondPolicy::none, "none"},
                                                       {SecondPolicy::threshold, "threshold"},
                                                       {SecondPolicy::random, "random"}}};

}  // namespace

SecondPolicy parse_second_policy(const std::string& name) {
  return ops::parse_name("second-expert policy", kSecondPolicies, name);
}
std::string to_string(SecondPolicy policy) { return ops::name_of(kSecondPolicies, policy); }

Top2Routing route_top2(const at::Tensor& logits, const Top2Options& options, const at::Tensor& importance,
                       const at::Tensor& uniform) {
  constexpr const char* kOp = "turnout::route_top2";
  TORCH_CHECK_VALUE(logits.defined() && logits.dim() >= 2, kOp, ": logits has shape ",
                    logits.defined() ? logits.sym_sizes() : c10::SymIntArrayRef{},
                    ", expected [..., tokens, experts]");
  ops::check_floating(kOp, "logits", logits);
  const auto num_experts = logits.sym_size(-1).guard_int(__FILE__, __LINE__);  // static
  TORCH_CHECK_VALUE(num_experts >= 2, kOp, ": logits has ", num_experts, " experts, expected at least 2");
  const auto slots = logits.sym_sizes().slice(0, logits.dim() - 1);
  TORCH_CHECK_VALUE(options.epsilon >= 0 && options.threshold >= 0, kOp, ": epsilon is ", options.epsilon,
                    " and threshold is ", options.threshold, ", expected numbers of at least 0");
  for (const auto& [name, tensor] : {std::pair{"importance", importance}, {"uniform", uniform}}) {
    if (!tensor.defined()) continue;
    ops::check_floating(kOp, name, tensor);
    ops::check_device(kOp, name, tensor, "logits", logits);
    TORCH_CHECK_VALUE(tensor.sym_sizes() == slots, kOp, ": ", name, " has shape ", tensor.sym_sizes(), ", expected ",
                      slots, " as logits have");
  }

  const auto gates = logits.to(ops::score_type(logits)).softmax(-1);
  const auto no = at::zeros({}, gates.options());
  const auto not_sent = at::full({}, -1, gates.options().dtype(at::kLong));
  const auto first_id = turnout::topk(gates, 1);  // [..., tokens, 1]
  auto first_gate = gates.gather(-1, first_id);
  auto density_proxy = gates;
  auto sends_first = at::ones_like(first_id, at::kBool);
  auto sends_second = sends_first;
  if (importance.defined()) {
    sends_first = importance.eq(1.0).unsqueeze(-1);
    sends_second = importance.gt(0.0).unsqueeze(-1);
    first_gate = at::where(sends_first, first_gate, no);
    density_proxy = at::where(sends_first, gates, no);
  }
  // Where there is no first choice the best expert is the second one.
  const auto without_first = gates.masked_fill(at::zeros_like(gates, at::kBool).scatter(-1, first_id, sends_first), 0);
  const auto second_id = turnout::topk(without_first, 1);
  auto second_gate = without_first.gather(-1, second_id);
  const auto denominator = first_gate + second_gate + options.epsilon;
  first_gate = first_gate / denominator;
  second_gate = second_gate / denominator;

  // mean over groups and experts of density · density_proxy, times experts²: first choices only
  const auto density = at::zeros_like(gates).scatter(-1, first_id, sends_first.to(gates.scalar_type())).mean(-2);
  auto loss = (density * density_proxy.mean(-2)).mean() * (num_experts * num_experts);
  if (logits.sym_numel() == 0) loss = gates.sum() * 0;  // the mean of nothing is NaN

  switch (options.policy) {
    case SecondPolicy::all:
      break;
    case SecondPolicy::none:
      sends_second = at::zeros_like(sends_second);
      break;
    case SecondPolicy::threshold:
      sends_second = sends_second.logical_and(second_gate.gt(options.threshold));
      break;
    case SecondPolicy::random: {
      const auto u = uniform.defined() ? uniform : at::zeros_like(second_gate.squeeze(-1).detach()).uniform_(0, 1);
      const auto chance = second_gate / std::max(options.threshold, options.epsilon);
      sends_second = sends_second.logical_and(u.unsqueeze(-1).lt(chance));
      break;
    }
  }
  const auto sends = at::cat({sends_first, sends_second}, -1);
  const auto ids = at::where(sends, at::cat({first_id, second_id}, -1), not_sent);
  const auto weights = at::where(sends, at::cat({first_gate, second_gate}, -1), no);
  return {{ids, weights, gates}, loss};
}

namespace {

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> route_top2_op(
    const at::Tensor& logits, c10::string_view policy, double threshold, double epsilon,
    const std::optional<at::Tensor>& importance, const std::optional<at::Tensor>& uniform) {
  const Top2Options options{parse_second_policy(std::string(policy)), threshold, epsilon};
  auto [routing, loss] =
      route_top2(logits, options, importance.value_or(at::Tensor()), uniform.value_or(at::Tensor()));
  return {routing.topk_ids, routing.topk_weights, routing.scores, loss};
}

TORCH_LIBRARY_IMPL(turnout, CompositeImplicitAutograd, m) { m.impl("route_top2", route_top2_op); }

}  // namespace
}  // namespace turnout
