// Expert parallelism: the experts of a layer lie on several ranks, rows travel to them and back.
#pragma once

#include <turnout/exchange.h>
#include <turnout/hierarchical_moe.h>
#include <turnout/moe.h>

#include <torch/nn/module.h>
#include <torch/nn/pimpl.h>

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace turnout {

/// How the ranks of a world share a model. A group of ranks holds each expert once; the world consists of replicas of
/// such groups. What is no expert stands on every rank, and every rank has a batch of its own (data parallel).
struct ParallelLayout {
  Group all{};       ///< every rank: what is no expert, and the joined batch
  Group experts{};   ///< ranks that hold one set of experts together; neighbours, so mostly of one machine
  Group replicas{};  ///< ranks that hold the same experts
  /// Pieces that an exchange is cut into, so that it overlaps with the experts; 0: as many as make a Trainer's steps
  /// fastest (chunk_trial.h).
  int64_t chunks = 1;
  bool joined_batch = true;  ///< capacity and losses are those of the batch of all ranks; false: of each rank's own
};

/// @param expert_ranks ranks that hold one set of experts, a divisor of the world's size; 0 = all
/// @throws c10::ValueError when it is no divisor
ParallelLayout make_layout(World& world, int64_t expert_ranks = 0, int64_t chunks = 1);

/// Experts on the ranks of a group. A rank sends the rows of its tokens in the plan's order, runs its own experts on
/// what it receives, and gets its rows back; weights are applied, and choices summed, where the token is.
///
/// Every rank of the group calls it, also without tokens. The rows of an expert come in the order of the joined batch
/// (tokens of rank 0, then 1, …): sums over them run as on one process. Counts are exchanged once a call; a backward
/// needs none.
/// Parameters: those of the rank's own experts, under the names of the whole (module experts: under their number).
class ExpertParallelImpl : public ExpertsModule {
 public:
  /// @param local the experts of this rank: bounds[rank + 1] - bounds[rank] of them
  /// @param bounds of the ranks, see expert_bounds()
  /// @param chunks pieces of an exchange, by experts: while one runs through them the next is on its way. More than 1
  ///        pays where the network takes as long as the experts; more than a rank has experts count as these
  /// @throws c10::ValueError when these do not fit together
  ExpertParallelImpl(std::shared_ptr<ExpertsModule> local, Group group, std::vector<int64_t> bounds,
                     int64_t chunks = 1);

  /// @throws DistributedError naming the operation and the rank when one is lost or sends other rows
  at::Tensor forward(const at::Tensor& x, const at::Tensor& topk_weights, const DispatchPlan& plan) override;
  at::Tensor forward_beside(const at::Tensor& x, const at::Tensor& topk_weights, const DispatchPlan& plan,
                            const std::function<void()>& beside) override;
  int64_t num_experts() const override { return bounds.back(); }
  /// The experts of this rank among all.
  ExpertRange range() const;

  const Group group;
  const std::vector<int64_t> bounds;
  int64_t chunks;  ///< may change between steps, on all ranks alike: what is computed does not
  const std::shared_ptr<ExpertsModule> local;
};
TORCH_MODULE(ExpertParallel);

/// An MoE layer whose experts lie on the ranks of the layout: the same gate and experts that MoE(options) draws from
/// the same random state on one process. Every rank of the layout's world calls it.
/// @throws DistributedError naming the rank that was given other sizes
MoE expert_parallel_moe(const MoEOptions& options, const ParallelLayout& layout);

/// The same for two levels: the outer groups of experts lie on the ranks, whole. Capacity and losses are those of each
/// sequence, so the ranks' batches need no joining.
HierarchicalMoE expert_parallel_moe(const HierarchicalMoEOptions& options, const ParallelLayout& layout);

/// Parameters that are a part of a bank, by name, with the part that this rank holds.
std::map<std::string, ExpertRange> parts_of_banks(const torch::nn::Module& module);

/// Makes gradients those of the mean of all ranks' losses: sums them over the ranks that hold a parameter (experts:
/// over their replicas, the rows of other ranks are in them already), and divides by the number of ranks.
///
/// Call it on every rank after backward(). A parameter without a gradient counts as zeros.
/// @throws DistributedError naming the ranks whose parameters are others in number or size
void average_gradients(torch::nn::Module& module, const ParallelLayout& layout);

}  // namespace turnout
