// Gradients of the mean of all ranks' losses: one sum over ranks for each set of parameters that the same ranks hold.
#include <turnout/expert_parallel.h>

#include "../distributed/collectives.h"

#include <ATen/ATen.h>

#include <set>

namespace turnout {
namespace {

constexpr const char* kOperation = "averaging of gradients";
constexpr int64_t kBucketNumbers = 8 << 20;  // joined in one message: 32 MiB of float32

void average(const std::vector<at::Tensor>& gradients, const Group& group, int64_t ranks) {
  if (gradients.empty()) return;
  if (group.size > 1) {
    std::vector<at::Tensor> flat;
    for (const auto& gradient : gradients) flat.push_back(gradient.reshape(-1));
    auto summed = distributed::all_reduce(kOperation, at::cat(flat), group);
    int64_t begin = 0;
    for (const auto& gradient : gradients) {
      gradient.copy_(summed.narrow(0, begin, gradient.numel()).view(gradient.sizes()));
      begin += gradient.numel();
    }
  }
  for (const auto& gradient : gradients) gradient.div_(static_cast<double>(ranks));
}

// In buckets of one type, so that a few messages do and memory stays bounded.
void average_all(const std::vector<at::Tensor>& gradients, const Group& group, int64_t ranks) {
  int64_t all_numbers = 0, bytes = 0;
  for (const auto& gradient : gradients) all_numbers += gradient.numel(), bytes += static_cast<int64_t>(gradient.nbytes());
  distributed::check_alike(kOperation, {{"parameters", static_cast<int64_t>(gradients.size())},
                                        {"numbers in its parameters", all_numbers}, {"bytes", bytes}}, group);
  std::vector<at::Tensor> bucket;
  int64_t numbers = 0;
  for (const auto& gradient : gradients) {
    if (!bucket.empty() && (numbers + gradient.numel() > kBucketNumbers ||
                            bucket.front().scalar_type() != gradient.scalar_type())) {
      average(bucket, group, ranks);
      bucket.clear();
      numbers = 0;
    }
    bucket.push_back(gradient);
    numbers += gradient.numel();
  }
  average(bucket, group, ranks);
}

}  // namespace

void average_gradients(torch::nn::Module& module, const ParallelLayout& layout) {
  if (layout.all.size == 1) return;
  const at::NoGradGuard no_grad;
  std::set<const at::TensorImpl*> of_experts;
  for (const auto& part : module.modules())
    if (const auto* experts = dynamic_cast<const ExpertParallelImpl*>(part.get()))
      for (const auto& parameter : experts->parameters()) of_experts.insert(parameter.unsafeGetTensorImpl());
  std::vector<at::Tensor> replicated, sharded;
  for (auto& parameter : module.parameters()) {
    if (!parameter.requires_grad()) continue;
    if (!parameter.grad().defined()) parameter.mutable_grad() = at::zeros_like(parameter);
    (of_experts.count(parameter.unsafeGetTensorImpl()) ? sharded : replicated).push_back(parameter.grad());
  }
  average_all(replicated, layout.all, layout.all.size);
  average_all(sharded, layout.replicas, layout.all.size);
}

}  // namespace turnout
