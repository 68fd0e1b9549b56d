// Tensors that must be there: autograd asks for the devices of all inputs before an op sees them.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <initializer_list>
#include <utility>

namespace turnout::ops {

/// @throws c10::ValueError naming the op and the first tensor that is not defined
inline void check_defined(const char* op, std::initializer_list<std::pair<const char*, at::Tensor>> tensors) {
  for (const auto& [name, tensor] : tensors)
    TORCH_CHECK_VALUE(tensor.defined(), op, ": ", name, " is not defined, expected a tensor");
}

}  // namespace turnout::ops
