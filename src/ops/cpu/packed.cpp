// Packed weights on the CPU: the kernels' panels in a byte tensor.
#include "../packed.h"
#include "fresh.h"
#include "problem.h"

#include <ATen/ATen.h>
#include <torch/library.h>

namespace turnout::ops {
namespace {

constexpr const char* kPrepack = "turnout::prepack";
constexpr const char* kPacked = "turnout::experts_packed";

// Sizes, type and form: all that a layout depends on, also of weights without storage (meta).
std::optional<kernels::PackedLayout> layout_of(const WeightsAlone& weights) {
  const auto& implementation = active_implementation();
  const auto type = kernel_type(weights.x.scalar_type(), implementation);
  if (!type || !(weights.x.device().is_cpu() || weights.x.is_meta())) return std::nullopt;
  kernels::ExpertsProblem problem;
  problem.hidden = weights.sizes.hidden.guard_int(__FILE__, __LINE__);
  problem.ffn = weights.sizes.ffn.guard_int(__FILE__, __LINE__);
  problem.num_experts = weights.args.num_experts();
  problem.dtype = *type;
  problem.activation = kernel_activation(weights.args.activation);
  return kernels::PackedLayout(implementation, problem);
}

at::Tensor prepack_cpu(at::TensorList up, at::TensorList down, c10::string_view activation) {
  const WeightsAlone weights(up, down, parse_activation(std::string(activation)));
  const auto bytes = packed_bytes(weights);
  auto packed = fresh({bytes}, weights.x.options().dtype(at::kByte));
  const auto& implementation = active_implementation();
  const Prepared prepared(weights.args, weights.sizes.ffn.expect_int(),
                          *kernel_type(weights.x.scalar_type(), implementation));
  kernels::pack(implementation, prepared.problem, packed.data_ptr(), torch_threads());
  return packed;
}

at::Tensor experts_packed_cpu(const at::Tensor& x, const at::Tensor& topk_weights, const at::Tensor& expert_offsets,
                              const at::Tensor& token_of_row, const at::Tensor& row_of_choice, const at::Tensor& packed,
                              c10::string_view layout, int64_t ffn, at::TensorList up_bias, at::TensorList down_bias,
                              c10::string_view activation, bool weight_before_down) {
  const ExpertsArgs args{x, topk_weights, expert_offsets, token_of_row, row_of_choice, {}, {}, up_bias, down_bias,
                         parse_activation(std::string(activation)), weight_before_down};
  check_packed(args, packed, ffn);
  const auto& implementation = active_implementation();
  const auto type = kernel_type(x.scalar_type(), implementation);
  TORCH_CHECK_TYPE(type, kPacked, ": x is ", x.scalar_type(), ", expected float32 or bfloat16: the kernel '",
                   implementation.name, "' serves no other type");
  const Prepared prepared(args, ffn, *type);
  const kernels::PackedLayout expected(implementation, prepared.problem);
  TORCH_CHECK_VALUE(layout == expected.words(), kPacked, ": packed has the layout '", layout, "', expected '",
                    expected.words(), "'; pack the weights on this machine, for the type of x and these sizes");
  TORCH_CHECK_VALUE(packed.numel() == static_cast<int64_t>(expected.bytes()), kPacked, ": packed has ", packed.numel(),
                    " bytes, expected ", expected.bytes(), " for '", layout, "'");
  TORCH_CHECK_VALUE(reinterpret_cast<uintptr_t>(packed.data_ptr()) % kernels::kPackedAlignment == 0, kPacked,
                    ": packed is not aligned to ", kernels::kPackedAlignment, " bytes; clone() it");
  auto y = fresh(x.sizes(), x.options());
  const kernels::PackedExperts weights(expected, packed.data_ptr(), expected.bytes());
  kernels::forward(implementation, prepared.problem, &weights, y.data_ptr(), nullptr, torch_threads());
  return y;
}

TORCH_LIBRARY_IMPL(turnout, CPU, m) {
  m.impl("prepack", prepack_cpu);
  m.impl("experts_packed", experts_packed_cpu);
}

}  // namespace

std::string packed_layout(const WeightsAlone& weights) {
  const auto layout = layout_of(weights);
  return layout ? layout->words() : "";
}

int64_t packed_bytes(const WeightsAlone& weights) {
  const auto layout = layout_of(weights);
  TORCH_CHECK_TYPE(layout, kPrepack, ": up is ", weights.x.scalar_type(), " on ", weights.x.device(),
                   ", expected float32 or bfloat16 on the CPU");
  return static_cast<int64_t>(layout->bytes());
}

}  // namespace turnout::ops
