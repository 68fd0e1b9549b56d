// Typed calls of ops through the dispatcher, for ops that other ops are composed of.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/string_view.h>

#include <optional>

namespace turnout::ops {

/// turnout::queue_positions. @param order a word of DropOrder
at::Tensor call_queue_positions(const at::Tensor& topk_ids, int64_t num_experts, c10::SymInt group_size,
                                c10::string_view order, const std::optional<at::Tensor>& priority);

}  // namespace turnout::ops
