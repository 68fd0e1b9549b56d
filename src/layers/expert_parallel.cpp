// Experts on several ranks: rows in the plan's order, cut into chunks of experts, out and back.
//
// Shapes: T tokens, D hidden, R rows of this rank's tokens, W ranks, C chunks.
#include <turnout/expert_parallel.h>

#include "../ops/checks.h"

#include <ATen/ATen.h>

#include <numeric>

namespace turnout {
namespace {

constexpr const char* kName = "turnout::ExpertParallel";

using Counts = std::vector<int64_t>;

// Experts of one rank are cut into chunks: chunk c of `held` experts begins here.
int64_t chunk_begin(int64_t held, int64_t c, int64_t chunks) { return held * c / chunks; }

// Rows in the order (chunk, rank, expert), so that each chunk is one piece of memory.
struct Send {
  DispatchPlan plan;           // of the live rows
  std::vector<Counts> counts;  // [C][W]
};

Send plan_send(const DispatchPlan& plan, const Counts& offset, const Counts& bounds, int64_t chunks) {
  Send send;
  const auto live = offset.back();
  const auto ranks = static_cast<int64_t>(bounds.size()) - 1;
  const auto old_tokens = plan.token_of_row.narrow(0, 0, live);
  std::vector<at::Tensor> tokens;
  const auto new_of_old = at::empty({live}, plan.token_of_row.options());
  int64_t row = 0;
  for (int64_t c = 0; c < chunks; ++c) {
    auto& counts = send.counts.emplace_back();
    for (int64_t r = 0; r < ranks; ++r) {
      const auto held = bounds[r + 1] - bounds[r];
      const auto begin = offset[bounds[r] + chunk_begin(held, c, chunks)];
      const auto count = offset[bounds[r] + chunk_begin(held, c + 1, chunks)] - begin;
      counts.push_back(count);
      if (chunks == 1) continue;
      tokens.push_back(old_tokens.narrow(0, begin, count));
      new_of_old.narrow(0, begin, count).copy_(at::arange(row, row + count, new_of_old.options()));
      row += count;
    }
  }
  if (chunks == 1 || live == 0) {
    send.plan = {plan.expert_offsets, old_tokens, plan.row_of_choice};
    return send;
  }
  const auto moved = new_of_old.index_select(0, plan.row_of_choice.clamp_min(0).flatten());
  send.plan = {plan.expert_offsets, at::cat(tokens),
               moved.view(plan.row_of_choice.sizes()).masked_fill(plan.row_of_choice.lt(0), -1)};
  return send;
}

int64_t sum(const Counts& counts) { return std::accumulate(counts.begin(), counts.end(), int64_t{0}); }

Counts numbers(const at::Tensor& tensor) {
  const auto flat = tensor.to(at::kCPU, at::kLong).contiguous();
  return {flat.const_data_ptr<int64_t>(), flat.const_data_ptr<int64_t>() + flat.numel()};
}

}  // namespace

ParallelLayout make_layout(World& world, int64_t expert_ranks, int64_t chunks) {
  const auto size = world.options.size, rank = world.options.rank;
  const auto together = expert_ranks == 0 ? size : expert_ranks;
  TORCH_CHECK_VALUE(together >= 1 && size % together == 0, "turnout::make_layout: expert_ranks is ", expert_ranks,
                    ", expected a divisor of ", size, " (the ranks of the world)");
  ops::check_at_least("turnout::make_layout", "chunks", chunks, 1);
  world.check_same("the parallel layout", "expert_ranks " + std::to_string(together) + "\nchunks " + std::to_string(chunks));
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
                                              const DispatchPlan& given, const std::function<void()>& beside) {
  TORCH_CHECK_VALUE(given.num_experts() == num_experts(), kName, ": plan has ", given.num_experts(),
                    " experts, expected ", num_experts(), " (the experts of all ranks)");
  const auto received_WE = exchange_counts(given.tokens_per_expert(), bounds, x, group);
  const auto send = plan_send(given, numbers(given.expert_offsets), bounds, chunks);
  const auto rows_RD = dispatch(x, send.plan);

  const auto held = range().count;
  std::vector<Counts> receive(chunks);
  std::vector<PendingRows> out, back;
  int64_t next_row = 0;
  const auto start = [&](int64_t c) {
    const auto begin = chunk_begin(held, c, chunks);
    receive[c] = numbers(received_WE.narrow(1, begin, chunk_begin(held, c + 1, chunks) - begin).sum(1));
    out.emplace_back(rows_RD.narrow(0, next_row, sum(send.counts[c])), send.counts[c], receive[c], group);
    next_row += sum(send.counts[c]);
  };
  const auto run = [&](int64_t c, const at::Tensor& rows) {
    const auto begin = chunk_begin(held, c, chunks), end = chunk_begin(held, c + 1, chunks);
    const auto expert = at::arange(begin, end, received_WE.options()).repeat({group.size});
    const auto ids = at::repeat_interleave(expert, received_WE.narrow(1, begin, end - begin).flatten()).to(x.device());
    const auto wide = x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
    const auto ones = at::ones({ids.size(0), 1}, x.options().dtype(wide));
    return local->forward(rows, ones, turnout::plan(ids.unsqueeze(1), held));
  };

  start(0);
  for (int64_t c = 0; c < chunks; ++c) {
    if (c + 1 < chunks) start(c + 1);
    if (c == 0) beside();
    back.emplace_back(run(c, out[c].finish()), receive[c], send.counts[c], group);
  }
  std::vector<at::Tensor> made;
  for (auto& chunk : back) made.push_back(chunk.finish());
  return combine(chunks == 1 ? made[0] : at::cat(made), topk_weights, send.plan);
}

MoE expert_parallel_moe(const MoEOptions& options, const ParallelLayout& layout) {
  const auto bounds = expert_bounds(options.num_experts, layout.experts.size);
  const auto first = bounds[layout.experts.rank];
  const auto linear = torch::nn::LinearOptions(options.hidden, options.num_experts).bias(options.gate_bias);
  torch::nn::Linear gate(linear);
  const FeedForwardBank local(FeedForwardOptions{options.hidden, options.ffn, options.activation, options.bias},
                              ExpertRange{first, bounds[layout.experts.rank + 1] - first, options.num_experts});
  return MoE(options, torch::nn::AnyModule(gate), ExpertParallel(local.ptr(), layout.experts, bounds, layout.chunks).ptr());
}

}  // namespace turnout
