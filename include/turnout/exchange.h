// Exchange: rows travel between the ranks of a group, uneven counts and empty ranks included.
#pragma once

#include <turnout/world.h>

#include <ATen/core/Tensor.h>
#include <c10/util/intrusive_ptr.h>

#include <cstdint>
#include <vector>

namespace turnout {

/// Experts of rank r are [bounds[r], bounds[r + 1]): contiguous, as even as whole units allow, earlier ranks first.
///
/// @param unit experts that stay together, such as the inner experts of one outer group
/// @return [ranks + 1]
/// @throws c10::ValueError when there are fewer units than ranks, or `unit` does not divide the experts
std::vector<int64_t> expert_bounds(int64_t num_experts, int64_t ranks, int64_t unit = 1);

/// How many rows each rank has for the experts of this one. Once a layer; everything that rows need is known then.
///
/// @param tokens_per_expert [experts] int64: rows that this rank has for each expert
/// @param x the rows, or what they are made of: every rank must have the same type and hidden size
/// @return [ranks, experts of this rank] int64 on the CPU
/// @throws DistributedError naming the rank whose rows have another type or size
at::Tensor exchange_counts(const at::Tensor& tokens_per_expert, const std::vector<int64_t>& bounds,
                           const at::Tensor& x, const Group& group);

/// Sends rows to the ranks of a group, in order of rank, and receives theirs, in order of rank.
///
/// Called by every rank of the group, with counts that fit: receive[r] here = send[of here] on rank r
/// (exchange_counts() tells). Rows that do not fit would end the process inside of gloo.
/// @param rows [sum of send, ...]
/// @return [sum of receive, ...]
/// Gradient: to rows, sent back the same way; double backward works. Deterministic.
/// @throws c10::ValueError when send does not add up to the rows; DistributedError when a rank is lost
at::Tensor exchange_rows(const at::Tensor& rows, const std::vector<int64_t>& send, const std::vector<int64_t>& receive,
                         const Group& group);

/// Rows on their way, so that work fits between their start and their arrival. In the backward the two change their
/// parts. Each started exchange is finished, once, in the same order on every rank.
class PendingRows {
 public:
  /// Starts what exchange_rows() does; arguments, errors and gradient are its own.
  PendingRows(const at::Tensor& rows, const std::vector<int64_t>& send, const std::vector<int64_t>& receive,
              const Group& group);
  /// Waits. @return [sum of receive, ...]
  at::Tensor finish();

 private:
  at::Tensor rows_;
  c10::intrusive_ptr<c10::intrusive_ptr_target> exchange_;
};

/// Sum over the ranks of a group, the same bits on each. Gradient: the sum of the ranks' gradients, which is that of
/// the sum of their objectives. Double backward works. Type and shape are compared first, in a message of their own.
/// @throws DistributedError naming the ranks whose x has another type or shape
at::Tensor sum_over(const at::Tensor& x, const Group& group);

/// Tensors of all ranks along axis 0, in order of rank; lengths may differ. No gradient.
/// @param lengths receives the length of each rank
/// @throws DistributedError naming the ranks whose x has another type, or another shape behind axis 0
at::Tensor gather_over(const at::Tensor& x, const Group& group, std::vector<int64_t>* lengths = nullptr);

}  // namespace turnout
