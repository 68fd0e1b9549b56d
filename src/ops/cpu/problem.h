// The experts' problem as the kernels take it: pointers into tensors, and what keeps those alive.
#pragma once

#include "../experts_checks.h"
#include "bridge.h"

#include <optional>
#include <vector>

namespace turnout::ops {

/// The kernels' word for a type; none where `implementation` does not serve it.
std::optional<kernels::DType> kernel_type(at::ScalarType type, const kernels::Implementation& implementation);

kernels::Activation kernel_activation(Activation activation);

/// One pointer an expert, into contiguous tensors that are kept alive with it; null for an empty list.
class Pointers {
 public:
  Pointers(at::TensorList weights, int64_t num_experts, int64_t dim);
  const void* const* read() const { return pointers_.empty() ? nullptr : pointers_.data(); }
  void* const* write() const { return pointers_.empty() ? nullptr : const_cast<void* const*>(pointers_.data()); }

 private:
  std::vector<at::Tensor> kept_;
  std::vector<void*> pointers_;
};

/// The problem of a call, and what its pointers point into. With empty up and down: for packed weights.
/// @throws c10::ValueError when the three tensors of the plan do not belong together. Cost O(tokens · top_k).
struct Prepared {
  Prepared(const ExpertsArgs& args, int64_t ffn, kernels::DType type);
  Prepared(const Prepared&) = delete;

  at::Tensor x, topk_weights, expert_offsets, token_of_row, row_of_choice;
  Pointers up, down, up_bias, down_bias;
  kernels::ExpertsProblem problem;
};

}  // namespace turnout::ops
