// Experts on several ranks: the module, and layers made with it.
#include <turnout/expert_parallel.h>

#include "../distributed/collectives.h"
#include "../ops/checks.h"
#include "run_on_ranks.h"

#include <algorithm>
#include <numeric>

namespace turnout {
namespace {

constexpr const char* kName = "turnout::ExpertParallel";

}  // namespace

ParallelLayout make_layout(World& world, int64_t expert_ranks, int64_t chunks) {
  const auto size = world.options.size, rank = world.options.rank;
  const auto together = expert_ranks == 0 ? size : expert_ranks;
  TORCH_CHECK_VALUE(together >= 1 && size % together == 0, "turnout::make_layout: expert_ranks is ", expert_ranks,
                    ", expected a divisor of ", size, " (the ranks of the world)");
  ops::check_at_least("turnout::make_layout", "chunks", chunks, 0);
  world.check_same("the parallel layout",
                   "expert_ranks " + std::to_string(together) + "\nchunks " + std::to_string(chunks));
  std::vector<int64_t> experts(together), replicas;
  std::iota(experts.begin(), experts.end(), rank / together * together);
  for (int64_t r = rank % together; r < size; r += together) replicas.push_back(r);
  ParallelLayout layout{world.all(), world.all(), {}, chunks};
  if (together != size) layout.experts = world.group("experts", experts);
  layout.replicas = together == 1 ? world.all() : world.group("replicas", replicas);
  return layout;
}

ExpertParallelImpl::ExpertParallelImpl(std::shared_ptr<ExpertsModule> given, Group given_group,
                                       std::vector<int64_t> given_bounds, int64_t given_chunks)
    : group(std::move(given_group)), bounds(std::move(given_bounds)), chunks(given_chunks), local(std::move(given)) {
  TORCH_CHECK_VALUE(static_cast<int64_t>(bounds.size()) == group.size + 1, kName, ": bounds has ", bounds.size(),
                    " entries, expected ", group.size + 1, " (ranks + 1)");
  ops::check_at_least(kName, "chunks", chunks, 1);
  TORCH_CHECK_VALUE(local->num_experts() == range().count, kName, ": local holds ", local->num_experts(),
                    " experts, expected ", range().count, " (bounds of rank ", group.rank, ")");
  // The whole's names: the local experts are no submodule, their parts are.
  for (const auto& item : local->named_parameters(/*recurse=*/false)) register_parameter(item.key(), item.value());
  int64_t number = range().first;
  for (const auto& child : local->children()) register_module(std::to_string(number++), child);
}

ExpertRange ExpertParallelImpl::range() const {
  return {bounds[group.rank], bounds[group.rank + 1] - bounds[group.rank], bounds.back()};
}

at::Tensor ExpertParallelImpl::forward(const at::Tensor& x, const at::Tensor& topk_weights, const DispatchPlan& plan) {
  return forward_beside(x, topk_weights, plan, [] {});
}

at::Tensor ExpertParallelImpl::forward_beside(const at::Tensor& x, const at::Tensor& topk_weights,
                                              const DispatchPlan& plan, const std::function<void()>& beside) {
  TORCH_CHECK_VALUE(plan.num_experts() == num_experts(), kName, ": plan has ", plan.num_experts(),
                    " experts, expected ", num_experts(), " (the experts of all ranks)");
  const auto parts = [this](const std::vector<int64_t>& counts) { return local->parts(counts); };
  return run_on_ranks(x, topk_weights, plan, {group, bounds, chunks}, parts, beside);
}

namespace {

// Ranks that were given other sizes would send messages that do not fit.
void check_sizes(const ParallelLayout& layout, const FeedForwardOptions& expert, int64_t num_experts, int64_t unit,
                 int64_t top_k) {
  distributed::check_alike("making of experts",
                           {{"num_experts", num_experts}, {"experts of a group", unit}, {"top_k", top_k},
                            {"hidden", expert.hidden}, {"ffn", expert.ffn}, {"chunks", layout.chunks}},
                           layout.all);
}

// The experts of this rank, drawn as in the whole bank; the bank itself where one rank holds all.
std::shared_ptr<ExpertsModule> bank_on(const ParallelLayout& layout, const FeedForwardOptions& expert,
                                       int64_t num_experts, int64_t unit) {
  const auto& group = layout.experts;
  if (group.size == 1) return FeedForwardBank(expert, num_experts).ptr();
  const auto bounds = expert_bounds(num_experts, group.size, unit);
  const auto first = bounds[group.rank];
  const FeedForwardBank local(expert, ExpertRange{first, bounds[group.rank + 1] - first, num_experts});
  return ExpertParallel(local.ptr(), group, bounds, std::max<int64_t>(layout.chunks, 1)).ptr();
}

}  // namespace

MoE expert_parallel_moe(const MoEOptions& options, const ParallelLayout& layout) {
  const auto linear = torch::nn::LinearOptions(options.hidden, options.num_experts).bias(options.gate_bias);
  torch::nn::Linear gate(linear);
  const FeedForwardOptions expert{options.hidden, options.ffn, options.activation, options.bias};
  check_sizes(layout, expert, options.num_experts, 1, options.top_k);
  MoE moe(options, torch::nn::AnyModule(gate), bank_on(layout, expert, options.num_experts, 1));
  if (layout.joined_batch) moe->join(layout.all);
  return moe;
}

HierarchicalMoE expert_parallel_moe(const HierarchicalMoEOptions& options, const ParallelLayout& layout) {
  const FeedForwardOptions expert{options.hidden, options.ffn > 0 ? options.ffn : 4 * options.hidden,
                                  options.activation, options.bias};
  const auto [outer, inner] = options.num_experts;
  check_sizes(layout, expert, outer * inner, inner, 2);
  return HierarchicalMoE(options, bank_on(layout, expert, outer * inner, inner));
}

namespace {

// Not named_modules(): that asks for the shared pointer of a module, which its own constructor does not have yet.
void collect_parts(const torch::nn::Module& module, const std::string& prefix,
                   std::map<std::string, ExpertRange>& parts) {
  if (const auto* experts = dynamic_cast<const ExpertParallelImpl*>(&module))
    for (const auto& parameter : experts->named_parameters(/*recurse=*/false))
      parts.emplace(prefix + parameter.key(), experts->range());
  for (const auto& child : module.named_children()) collect_parts(*child.value(), prefix + child.key() + ".", parts);
}

}  // namespace

std::map<std::string, ExpertRange> parts_of_banks(const torch::nn::Module& module) {
  std::map<std::string, ExpertRange> parts;
  collect_parts(module, "", parts);
  return parts;
}

}  // namespace turnout
