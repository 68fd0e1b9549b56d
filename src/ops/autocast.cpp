// Under autocast the experts run in the chosen lower type, as linear layers do; routing weights stay as they are.
#include <turnout/experts.h>

#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

namespace turnout::ops {
namespace {

using Signature = at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                             const at::Tensor&, at::TensorList, at::TensorList, at::TensorList, at::TensorList,
                             c10::string_view, bool, bool);

template <c10::DeviceType device>
at::Tensor experts_autocast(const at::Tensor& x, const at::Tensor& topk_weights, const at::Tensor& expert_offsets,
                            const at::Tensor& token_of_row, const at::Tensor& row_of_choice, at::TensorList up,
                            at::TensorList down, at::TensorList up_bias, at::TensorList down_bias,
                            c10::string_view activation, bool recompute, bool weight_before_down) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(
      c10::DispatchKeySet(at::autocast::get_autocast_dispatch_key_from_device_type(device)));
  const auto type = at::autocast::get_autocast_dtype(device);
  const auto cast = [&](at::TensorList list) { return at::autocast::cached_cast(type, list, device); };
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("turnout::experts", "").typed<Signature>();
  return op.call(at::autocast::cached_cast(type, x, device), topk_weights.to(at::kFloat), expert_offsets,
                 token_of_row, row_of_choice, cast(up), cast(down), cast(up_bias), cast(down_bias), activation,
                 recompute, weight_before_down);
}

TORCH_LIBRARY_IMPL(turnout, AutocastCPU, m) { m.impl("experts", experts_autocast<c10::DeviceType::CPU>); }
TORCH_LIBRARY_IMPL(turnout, AutocastCUDA, m) { m.impl("experts", experts_autocast<c10::DeviceType::CUDA>); }

}  // namespace
}  // namespace turnout::ops
