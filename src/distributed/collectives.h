// Collectives of c10d by group name, through the functional ops, so that Python's groups and ours are one thing.
#pragma once

#include <turnout/world.h>

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <utility>
#include <vector>

namespace turnout::distributed {

/// Starts to send rows; the result must not be read before wait(). @param x contiguous
at::Tensor start_all_to_all(const char* operation, const at::Tensor& x, at::IntArrayRef receive, at::IntArrayRef send,
                            const Group& group);
/// @throws DistributedError naming the operation and the rank that made it fail
void wait(const char* operation, const at::Tensor& started, const Group& group);

/// [sum of receive, ...] @throws DistributedError
at::Tensor all_to_all(const char* operation, const at::Tensor& x, at::IntArrayRef receive, at::IntArrayRef send,
                      const Group& group);
/// Sum over the group, in a new tensor. @throws DistributedError
at::Tensor all_reduce(const char* operation, const at::Tensor& x, const Group& group);
/// [size · x.size(0), ...] @throws DistributedError
at::Tensor all_gather(const char* operation, const at::Tensor& x, const Group& group);

/// Compares numbers that all ranks must have alike: messages made by them would not fit, which ends the process in gloo.
/// @param numbers with their names, the same names on every rank
/// @param device of a backend that the group has
/// @throws DistributedError, on every rank, naming the first number that differs and a rank that has another
void check_alike(const char* operation, const std::vector<std::pair<const char*, int64_t>>& numbers,
                 const at::Device& device, const Group& group);

/// Throws a DistributedError about something that this rank saw itself, and tells the others.
[[noreturn]] void fail(const char* operation, const std::string& finding, const Group& group);

}  // namespace turnout::distributed
