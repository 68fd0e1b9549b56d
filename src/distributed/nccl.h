// NCCL's process group: the one place that needs the headers of NCCL and CUDA.
#pragma once

#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/csrc/distributed/c10d/Store.hpp>

#include <chrono>

namespace turnout::distributed {

/// @throws c10::NotImplementedError when the build does not link CUDA (TURNOUT_CUDA) or found no headers of NCCL
c10::intrusive_ptr<c10d::Backend> make_nccl(const c10::intrusive_ptr<c10d::Store>& store, int64_t rank, int64_t size,
                                            std::chrono::milliseconds timeout);

}  // namespace turnout::distributed
