// Collectives of c10d by group name, through the functional ops, so that Python's groups and ours are one thing.
#pragma once

#include <turnout/world.h>

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>
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

/// [size · own.size()], in order of rank: as many on every rank. @throws DistributedError
std::vector<int64_t> gather_numbers(const char* operation, const std::vector<int64_t>& own, const Group& group);

/// What all ranks must have alike: messages made by it would not fit, which ends the process in gloo.
/// @param texts of the ranks, as gathered, one line a thing
/// @throws DistributedError, on every rank, naming the first thing that differs, and the ranks
void check_texts(const char* operation, const std::vector<std::string>& texts, const Group& group);
/// Numbers of this rank with their names, the same names on every rank: gathers, then compares.
void check_alike(const char* operation, const std::vector<std::pair<const char*, int64_t>>& numbers,
                 const Group& group);

}  // namespace turnout::distributed
