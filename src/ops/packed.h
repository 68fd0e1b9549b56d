// Packed weights: what the registrations of their ops share.
#pragma once

#include "experts_checks.h"

#include <string>

namespace turnout::ops {

/// An experts call without tokens on the weights' own device and type, so that weights are checked as experts() does.
struct WeightsAlone {
  WeightsAlone(at::TensorList up, at::TensorList down, Activation activation);

  at::Tensor x, topk_weights, expert_offsets, token_of_row, row_of_choice;
  ExpertsArgs args;
  ExpertsSizes sizes;
};

/// What `layout` takes on this machine for weights of `weights`, in the words of kernels::PackedLayout; empty where the
/// kernels do not serve their type or device.
std::string packed_layout(const WeightsAlone& weights);
int64_t packed_bytes(const WeightsAlone& weights);

/// Everything that is known of an experts_packed call without reading `packed`.
void check_packed(const ExpertsArgs& args, const at::Tensor& packed, int64_t ffn);

}  // namespace turnout::ops
