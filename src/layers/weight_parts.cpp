// Parts of experts: views of banks whose gradients are joined once; any other kind runs whole, on a wider plan.
#include "weight_parts.h"

#include "layers/pieces.h"

#include <ATen/ATen.h>

#include <numeric>

namespace turnout {
namespace {

using Tensors = std::vector<at::Tensor>;

// One list of weights, [part][a bank, or one tensor an expert]. @param dim axes of one expert's weight
std::vector<Tensors> cut_list(const Tensors& weights, int64_t dim, const std::vector<int64_t>& counts) {
  if (counts.size() == 1) return {weights};
  std::vector<Tensors> parts;
  if (weights.size() == 1 && weights[0].dim() == dim + 1) {
    for (auto& part : cut(weights[0], counts)) parts.push_back({std::move(part)});
    return parts;
  }
  auto next = weights.begin();
  for (const auto count : counts) {
    const auto end = weights.empty() ? next : next + count;
    parts.emplace_back(next, end);
    next = end;
  }
  return parts;
}

}  // namespace

std::vector<RunExperts> run_parts(const ExpertWeights& weights, Activation activation,
                                  const std::vector<int64_t>& counts) {
  const auto up = cut_list(weights.up, 2, counts), down = cut_list(weights.down, 2, counts);
  const auto up_bias = cut_list(weights.up_bias, 1, counts), down_bias = cut_list(weights.down_bias, 1, counts);
  std::vector<RunExperts> parts;
  for (size_t i = 0; i < counts.size(); ++i)
    parts.emplace_back([part = ExpertWeights{up[i], down[i], up_bias[i], down_bias[i]}, activation](
                           const at::Tensor& x, const at::Tensor& topk_weights, const DispatchPlan& plan) {
      return experts(x, topk_weights, plan, part, activation);
    });
  return parts;
}

std::vector<RunExperts> ExpertsModule::parts(const std::vector<int64_t>& counts) {
  std::vector<RunExperts> all;
  int64_t first = 0;
  for (const auto count : counts) {
    const auto behind = num_experts() - first - count;
    all.emplace_back([this, first, behind](const at::Tensor& x, const at::Tensor& topk_weights,
                                           const DispatchPlan& plan) {
      const auto& offsets = plan.expert_offsets;
      const auto wide = at::cat({offsets.narrow(0, 0, 1).expand({first}), offsets,
                                 offsets.narrow(0, plan.num_experts(), 1).expand({behind})});
      return forward(x, topk_weights, {wide, plan.token_of_row, plan.row_of_choice});
    });
    first += count;
  }
  return all;
}

}  // namespace turnout
