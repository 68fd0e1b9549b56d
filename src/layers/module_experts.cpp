// Experts that are any modules, driven by the plan that a bank is driven by.
#include <turnout/moe.h>

#include "../ops/checks.h"

#include <ATen/ATen.h>

namespace turnout {

ModuleExpertsImpl::ModuleExpertsImpl(std::vector<torch::nn::AnyModule> experts) : experts_(std::move(experts)) {
  TORCH_CHECK_VALUE(!experts_.empty(), "turnout::ModuleExperts: experts is empty, expected at least one module");
  for (size_t i = 0; i < experts_.size(); ++i) register_module(std::to_string(i), experts_[i].ptr());
}

at::Tensor ModuleExpertsImpl::forward(const at::Tensor& x, const at::Tensor& topk_weights, const DispatchPlan& plan) {
  constexpr const char* kName = "turnout::ModuleExperts";
  TORCH_CHECK_VALUE(plan.num_experts() == num_experts(), kName, ": plan has ", plan.num_experts(),
                    " experts, expected ", num_experts(), " (the modules given)");
  return run(0, x, topk_weights, plan);
}

std::vector<RunExperts> ModuleExpertsImpl::parts(const std::vector<int64_t>& counts) {
  std::vector<RunExperts> all;
  int64_t first = 0;
  for (const auto count : counts) {
    all.emplace_back([this, first](const at::Tensor& x, const at::Tensor& topk_weights, const DispatchPlan& plan) {
      return run(first, x, topk_weights, plan);
    });
    first += count;
  }
  return all;
}

// Experts `first` and those behind it, as many as the plan has.
at::Tensor ModuleExpertsImpl::run(int64_t first, const at::Tensor& x, const at::Tensor& topk_weights,
                                  const DispatchPlan& plan) {
  constexpr const char* kName = "turnout::ModuleExperts";
  const auto rows = dispatch(x, plan);
  const auto offsets = plan.expert_offsets.cpu();
  const auto* offset = offsets.const_data_ptr<int64_t>();
  std::vector<at::Tensor> made;
  for (int64_t e = 0; e < plan.num_experts(); ++e) {
    const auto count = offset[e + 1] - offset[e];
    made.push_back(experts_[first + e].forward<at::Tensor>(rows.narrow(0, offset[e], count)));
    TORCH_CHECK_VALUE(made.back().dim() == 2 && made.back().size(0) == count, kName, ": expert ", first + e, " made ",
                      made.back().sizes(), " of ", count, " rows, expected [", count, ", hidden]");
  }
  const auto live = at::cat(made);
  const auto padded = at::constant_pad_nd(live, {0, 0, 0, rows.size(0) - live.size(0)});
  return combine(padded, topk_weights, plan);
}

}  // namespace turnout
