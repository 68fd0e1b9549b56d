// Gloo's process group: the one place that needs the headers of gloo.
#pragma once

#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/csrc/distributed/c10d/Store.hpp>

#include <chrono>
#include <string>

namespace turnout::distributed {

/// @param address of the network interface to use, such as 127.0.0.1
/// @throws c10::NotImplementedError when the build found no headers of gloo
c10::intrusive_ptr<c10d::Backend> make_gloo(const c10::intrusive_ptr<c10d::Store>& store, int64_t rank, int64_t size,
                                            std::chrono::milliseconds timeout, const std::string& address);

}  // namespace turnout::distributed
