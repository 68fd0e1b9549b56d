// Rows in the plan's order, cut into chunks of experts, out and back.
//
// Shapes: T tokens, D hidden, R rows of this rank's tokens, W ranks, C chunks.
#include "layers/run_on_ranks.h"

#include "layers/pieces.h"

#include <turnout/combine.h>

#include <ATen/ATen.h>

#include <algorithm>
#include <numeric>

namespace turnout {
namespace {

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

at::Tensor run_on_ranks(const at::Tensor& x, const at::Tensor& topk_weights, const DispatchPlan& plan,
                        const ExpertPlace& place, const LocalParts& local, const std::function<void()>& beside) {
  const auto& group = place.group;
  const auto held = place.bounds[group.rank + 1] - place.bounds[group.rank];
  auto chunks = place.chunks;  // an empty chunk would answer in the type of its rows, whatever the experts' is
  for (size_t r = 0; r + 1 < place.bounds.size(); ++r)
    chunks = std::min(chunks, std::max<int64_t>(place.bounds[r + 1] - place.bounds[r], 1));
  const auto received_WE = exchange_counts(plan.tokens_per_expert(), place.bounds, x, group);
  const auto send = plan_send(plan, numbers(plan.expert_offsets), place.bounds, chunks);
  Counts rows_of_chunk;
  for (const auto& counts : send.counts) rows_of_chunk.push_back(sum(counts));
  const auto rows_RD = cut(dispatch(x, send.plan), rows_of_chunk);
  Counts of_chunk;
  for (int64_t c = 0; c < chunks; ++c)
    of_chunk.push_back(chunk_begin(held, c + 1, chunks) - chunk_begin(held, c, chunks));
  const auto parts = local(of_chunk);

  std::vector<Counts> receive(chunks);
  std::vector<PendingRows> out, back;
  const auto start = [&](int64_t c) {
    receive[c] = numbers(received_WE.narrow(1, chunk_begin(held, c, chunks), of_chunk[c]).sum(1));
    out.emplace_back(rows_RD[c], send.counts[c], receive[c], group);
  };
  const auto run = [&](int64_t c, const at::Tensor& rows) {
    const auto count = of_chunk[c];
    const auto expert = at::arange(count, received_WE.options()).repeat({group.size});
    const auto received = received_WE.narrow(1, chunk_begin(held, c, chunks), count).flatten();
    const auto ids = at::repeat_interleave(expert, received).to(x.device());
    const auto wide = x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
    const auto ones = at::ones({ids.size(0), 1}, x.options().dtype(wide));
    return parts[c](rows, ones, turnout::plan(ids.unsqueeze(1), count));
  };

  start(0);
  for (int64_t c = 0; c < chunks; ++c) {
    if (c + 1 < chunks) start(c + 1);
    if (c == 0) beside();
    back.emplace_back(run(c, out[c].finish()), receive[c], send.counts[c], group);
  }
  std::vector<at::Tensor> made;
  for (auto& chunk : back) made.push_back(chunk.finish());
  return combine(join(made), topk_weights, send.plan);
}

}  // namespace turnout
