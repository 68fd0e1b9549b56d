// Balancing losses: loads are counts without gradient, probabilities carry it.
#include <turnout/balance.h>

#include "checks.h"
#include "names.h"

#include <ATen/ATen.h>
#include <torch/library.h>

namespace turnout {
namespace {

constexpr ops::Names<LoadCount, 3> kLoadCounts{{{LoadCount::per_assignment, "per_assignment"},
                                                {LoadCount::per_token, "per_token"},
                                                {LoadCount::first_choice, "first_choice"}}};

at::Tensor balance_loss_symint(const at::Tensor& scores, const at::Tensor& topk_ids, LoadCount count,
                               c10::SymInt group_size) {
  constexpr const char* kOp = "turnout::balance_loss";
  ops::check_dim(kOp, "scores", scores, 2, "[tokens, experts]");
  ops::check_floating(kOp, "scores", scores);
  ops::check_dim(kOp, "topk_ids", topk_ids, 2, "[tokens, top_k]");
  ops::check_integer(kOp, "topk_ids", topk_ids);
  const auto tokens = scores.sym_size(0);
  const auto num_experts = scores.sym_size(1).guard_int(__FILE__, __LINE__);  // a property of the layer: static
  ops::check_size(kOp, "topk_ids", topk_ids, 0, tokens, "tokens of scores");
  ops::check_device(kOp, "topk_ids", topk_ids, "scores", scores);
  TORCH_CHECK_VALUE(topk_ids.sym_size(1) >= 1, kOp, ": topk_ids has shape ", topk_ids.sym_sizes(),
                    ", expected top_k of at least 1");
  TORCH_CHECK_VALUE(group_size >= 0, kOp, ": group_size is ", group_size, ", expected 0 or more");
  if (tokens == 0) return scores.sum() * 0;  // the mean of nothing is NaN
  if (group_size == 0) group_size = tokens;
  TORCH_CHECK_VALUE(tokens % group_size == 0, kOp, ": group_size is ", group_size, ", expected a divisor of ", tokens,
                    " tokens");
  const auto groups = tokens / group_size;
  at::_assert_async(topk_ids.lt(num_experts).all(),
                    "turnout::balance_loss: topk_ids holds an id that is neither -1 nor one of the experts of scores");

  const auto counted = count == LoadCount::first_choice ? topk_ids.narrow(1, 0, 1) : topk_ids;
  // Choices that are not sent count in a column of their own, which is cut off.
  const auto ids = at::where(counted.lt(0), num_experts, counted.to(at::kLong)).reshape_symint({groups, -1});
  const auto ones = at::ones_like(ids, scores.options());
  const auto counts_GE = at::zeros_symint({groups, num_experts + 1}, scores.options())
                             .scatter_add(1, ids, ones)
                             .narrow(1, 0, num_experts);
  // A sum of ones instead of a number: the count of choices stays symbolic in compiled graphs.
  auto choices_G1 = ones.sum(1, /*keepdim=*/true);
  if (count == LoadCount::per_token) choices_G1 = choices_G1 / topk_ids.sym_size(1).guard_int(__FILE__, __LINE__);
  const auto load_GE = counts_GE / choices_G1;
  const auto probability_GE = scores.reshape_symint({groups, group_size, num_experts}).mean(1);
  return (load_GE * probability_GE).sum(1).mean() * num_experts;
}

at::Tensor balance_loss_op(const at::Tensor& scores, const at::Tensor& topk_ids, c10::string_view count,
                           c10::SymInt group_size) {
  return balance_loss_symint(scores, topk_ids, parse_load_count(std::string(count)), std::move(group_size));
}

}  // namespace

LoadCount parse_load_count(const std::string& name) { return ops::parse_name("load count", kLoadCounts, name); }
std::string to_string(LoadCount count) { return ops::name_of(kLoadCounts, count); }

at::Tensor balance_loss(const at::Tensor& scores, const at::Tensor& topk_ids, LoadCount count, int64_t group_size) {
  return balance_loss_symint(scores, topk_ids, count, group_size);
}

at::Tensor z_loss(const at::Tensor& logits) {
  ops::check_dim("turnout::z_loss", "logits", logits, 2, "[tokens, experts]");
  ops::check_floating("turnout::z_loss", "logits", logits);
  const auto squares = logits.to(logits.scalar_type() == at::kDouble ? at::kDouble : at::kFloat).logsumexp(-1).square();
  return logits.sym_size(0) == 0 ? squares.sum() : squares.mean();
}

namespace {
TORCH_LIBRARY_IMPL(turnout, CompositeImplicitAutograd, m) {
  m.impl("balance_loss", balance_loss_op);
  m.impl("z_loss", z_loss);
}
}  // namespace
}  // namespace turnout
