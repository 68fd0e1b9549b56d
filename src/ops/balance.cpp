// Balancing losses: loads are counts without gradient, probabilities carry it.
//
// Legend: T tokens, K top_k, E experts, G groups.
#include <turnout/balance.h>

#include "checks.h"
#include "names.h"

#include <ATen/ATen.h>
#include <torch/library.h>

#include <cmath>

namespace turnout {
namespace {

constexpr ops::Names<LoadCount, 3> kLoadCounts{{{LoadCount::per_assignment, "per_assignment"},
                                                {LoadCount::per_token, "per_token"},
                                                {LoadCount::first_choice, "first_choice"}}};

void check_ids(const char* op, const at::Tensor& topk_ids) {
  ops::check_dim(op, "topk_ids", topk_ids, 2, "[tokens, top_k]");
  ops::check_integer(op, "topk_ids", topk_ids);
  TORCH_CHECK_VALUE(topk_ids.sym_size(1) >= 1, op, ": topk_ids has shape ", topk_ids.sym_sizes(),
                    ", expected top_k of at least 1");
}

// Values of choices summed by group and expert. What is not sent goes to a column of its own, which is cut off.
at::Tensor sum_by_expert(const at::Tensor& ids_GN, const at::Tensor& values_GN, int64_t num_experts,
                         const char* assertion) {
  at::_assert_async(ids_GN.lt(num_experts).all(), assertion);
  const auto column_GN = at::where(ids_GN.lt(0), num_experts, ids_GN.to(at::kLong));
  return at::zeros_symint({ids_GN.sym_size(0), num_experts + 1}, values_GN.options())
      .scatter_add(1, column_GN, values_GN)
      .narrow(1, 0, num_experts);
}

at::Tensor balance_sums_symint(const char* op, const at::Tensor& scores, const at::Tensor& topk_ids, LoadCount count,
                               c10::SymInt group_size, const at::Tensor& token_mask) {
  ops::check_dim(op, "scores", scores, 2, "[tokens, experts]");
  ops::check_floating(op, "scores", scores);
  check_ids(op, topk_ids);
  const auto tokens = scores.sym_size(0);
  const auto num_experts = scores.sym_size(1).guard_int(__FILE__, __LINE__);  // a property of the layer: static
  ops::check_size(op, "topk_ids", topk_ids, 0, tokens, "tokens of scores");
  ops::check_device(op, "topk_ids", topk_ids, "scores", scores);
  ops::check_token_mask(op, token_mask, scores, "scores");
  TORCH_CHECK_VALUE(group_size >= 0, op, ": group_size is ", group_size, ", expected 0 or more");
  if (group_size == 0 || tokens == 0) group_size = tokens;
  TORCH_CHECK_VALUE(tokens == 0 || tokens % group_size == 0, op, ": group_size is ", group_size,
                    ", expected a divisor of ", tokens, " tokens");
  const auto groups = tokens == 0 ? c10::SymInt(1) : tokens / group_size;

  auto scores_TE = scores.to(ops::score_type(scores));
  auto counted_TK = count == LoadCount::first_choice ? topk_ids.narrow(1, 0, 1) : topk_ids;
  auto present_T = at::ones_symint({tokens}, scores_TE.options());
  if (token_mask.defined()) {
    const auto padding_T1 = token_mask.logical_not().unsqueeze(1);
    scores_TE = scores_TE.masked_fill(padding_T1, 0);  // also where padding is NaN
    counted_TK = counted_TK.masked_fill(padding_T1, -1);
    present_T = token_mask.to(scores_TE.scalar_type());
  }
  const auto ids_GN = counted_TK.reshape_symint({groups, group_size * counted_TK.sym_size(1)});
  auto counts_GE = sum_by_expert(ids_GN, at::ones_like(ids_GN, scores_TE.options()), num_experts,
                                 "turnout::balance_loss: topk_ids holds an id that is neither -1 nor one of the "
                                 "experts of scores");
  if (count == LoadCount::per_assignment) counts_GE = counts_GE / topk_ids.sym_size(1).guard_int(__FILE__, __LINE__);
  const auto probabilities_GE = scores_TE.reshape_symint({groups, group_size, num_experts}).sum(1);
  const auto tokens_G1 = present_T.reshape_symint({groups, group_size}).sum(1, /*keepdim=*/true);
  return at::cat({counts_GE, probabilities_GE, tokens_G1, at::ones_like(tokens_G1)}, 1);
}

// The value of the total; the gradient of the own part, times the ranks, over which training takes the mean. The last
// column counts ranks.
at::Tensor of_all_ranks(const char* op, const at::Tensor& sums, const at::Tensor& total) {
  if (!total.defined()) return sums;
  TORCH_CHECK_VALUE(total.sym_sizes() == sums.sym_sizes(), op, ": total has shape ", total.sym_sizes(), ", expected ",
                    sums.sym_sizes(), " as sums has");
  const auto own = sums.detach(), of_ranks = total.detach();
  const auto ranks = of_ranks.narrow(-1, -1, 1) / own.narrow(-1, -1, 1);
  return of_ranks + (sums - own) * ranks;
}

}  // namespace

LoadCount parse_load_count(const std::string& name) { return ops::parse_name("load count", kLoadCounts, name); }
std::string to_string(LoadCount count) { return ops::name_of(kLoadCounts, count); }

at::Tensor balance_sums(const at::Tensor& scores, const at::Tensor& topk_ids, LoadCount count, int64_t group_size,
                        const at::Tensor& token_mask) {
  return balance_sums_symint("turnout::balance_sums", scores, topk_ids, count, group_size, token_mask);
}

at::Tensor balance_loss_of_sums(const at::Tensor& sums, const at::Tensor& total) {
  constexpr const char* kOp = "turnout::balance_loss_of_sums";
  ops::check_dim(kOp, "sums", sums, 2, "[groups, 2 · experts + 2]");
  ops::check_floating(kOp, "sums", sums);
  const auto columns = sums.sym_size(1).guard_int(__FILE__, __LINE__);
  TORCH_CHECK_VALUE(columns >= 4 && columns % 2 == 0, kOp, ": sums has shape ", sums.sym_sizes(),
                    ", expected [groups, 2 · experts + 2]");
  const auto all = of_all_ranks(kOp, sums, total);
  const auto num_experts = columns / 2 - 1;
  const auto tokens_G1 = all.narrow(1, 2 * num_experts, 1).detach();
  const auto divisor_G1 = tokens_G1.clamp_min(1);
  const auto load_GE = all.narrow(1, 0, num_experts).detach() / divisor_G1;
  const auto mean_GE = all.narrow(1, num_experts, num_experts) / divisor_G1;
  const auto of_groups = (load_GE * mean_GE).sum(1) * num_experts;
  return of_groups.sum() / tokens_G1.gt(0).sum().clamp_min(1);
}

at::Tensor balance_loss(const at::Tensor& scores, const at::Tensor& topk_ids, LoadCount count, int64_t group_size,
                        const at::Tensor& token_mask, const SumOverRanks& sum) {
  constexpr const char* kOp = "turnout::balance_loss";
  const auto sums = balance_sums_symint(kOp, scores, topk_ids, count, group_size, token_mask);
  if (!sum) return balance_loss_of_sums(sums);
  TORCH_CHECK_VALUE(group_size == 0, kOp, ": group_size is ", group_size,
                    ", expected 0 with a sum over ranks: their groups are not the same tokens");
  return balance_loss_of_sums(sums, sum(sums.detach().clone()));
}

namespace {

at::Tensor z_sums_for(const char* op, const at::Tensor& logits, const at::Tensor& token_mask) {
  ops::check_dim(op, "logits", logits, 2, "[tokens, experts]");
  ops::check_floating(op, "logits", logits);
  TORCH_CHECK_VALUE(logits.sym_size(1) >= 1, op, ": logits has shape ", logits.sym_sizes(),
                    ", expected at least one expert");
  ops::check_token_mask(op, token_mask, logits, "logits");
  auto wide_TE = logits.to(ops::score_type(logits));
  auto present_T = at::ones_symint({logits.sym_size(0)}, wide_TE.options());
  if (token_mask.defined()) {
    wide_TE = wide_TE.masked_fill(token_mask.logical_not().unsqueeze(1), 0);  // also where padding is NaN
    present_T = token_mask.to(wide_TE.scalar_type());
  }
  const auto squares_T = wide_TE.logsumexp(-1).square() * present_T;
  const auto tokens = present_T.sum();
  return at::stack({squares_T.sum(), tokens, at::ones_like(tokens)});
}

}  // namespace

at::Tensor z_sums(const at::Tensor& logits, const at::Tensor& token_mask) {
  return z_sums_for("turnout::z_sums", logits, token_mask);
}

at::Tensor z_loss_of_sums(const at::Tensor& sums, const at::Tensor& total) {
  constexpr const char* kOp = "turnout::z_loss_of_sums";
  ops::check_dim(kOp, "sums", sums, 1, "[3]");
  ops::check_floating(kOp, "sums", sums);
  ops::check_size(kOp, "sums", sums, 0, 3, "squares, tokens, ranks");
  const auto all = of_all_ranks(kOp, sums, total);
  return all.select(0, 0) / all.select(0, 1).detach().clamp_min(1);
}

at::Tensor z_loss(const at::Tensor& logits, const at::Tensor& token_mask, const SumOverRanks& sum) {
  const auto sums = z_sums_for("turnout::z_loss", logits, token_mask);
  return z_loss_of_sums(sums, sum ? sum(sums.detach().clone()) : at::Tensor());
}

at::Tensor expert_importance(const at::Tensor& topk_ids, const at::Tensor& topk_weights, int64_t num_experts) {
  constexpr const char* kOp = "turnout::expert_importance";
  check_ids(kOp, topk_ids);
  ops::check_floating(kOp, "topk_weights", topk_weights);
  ops::check_at_least(kOp, "num_experts", num_experts, 1);
  TORCH_CHECK_VALUE(topk_weights.sym_sizes() == topk_ids.sym_sizes(), kOp, ": topk_weights has shape ",
                    topk_weights.sym_sizes(), ", expected ", topk_ids.sym_sizes(), " as topk_ids has");
  ops::check_device(kOp, "topk_weights", topk_weights, "topk_ids", topk_ids);
  return sum_by_expert(topk_ids.reshape({1, -1}), topk_weights.reshape({1, -1}), num_experts,
                       "turnout::expert_importance: topk_ids holds an id that is neither -1 nor one of the experts")
      .squeeze(0);
}

at::Tensor cv_squared(const at::Tensor& values) {
  constexpr const char* kOp = "turnout::cv_squared";
  ops::check_dim(kOp, "values", values, 1, "[experts]");
  ops::check_floating(kOp, "values", values);
  if (values.sym_size(0) == 0) return values.sum();
  const auto wide = values.to(ops::score_type(values));
  const auto mean = wide.mean();
  const auto squares = (wide - mean).square().mean();
  const auto nothing = mean.eq(0);
  return (squares / mean.masked_fill(nothing, 1).square()).masked_fill(nothing, 0);
}

at::Tensor expert_counts(const at::Tensor& topk_ids, int64_t num_experts) {
  constexpr const char* kOp = "turnout::expert_counts";
  check_ids(kOp, topk_ids);
  ops::check_at_least(kOp, "num_experts", num_experts, 1);
  const auto ids = topk_ids.reshape({1, -1}).to(at::kLong);
  return sum_by_expert(ids, at::ones_like(ids), num_experts,
                       "turnout::expert_counts: topk_ids holds an id that is neither -1 nor one of the experts")
      .squeeze(0);
}

at::Tensor update_selection_bias(const at::Tensor& bias, const at::Tensor& counts, double rate, bool center) {
  constexpr const char* kOp = "turnout::update_selection_bias";
  ops::check_dim(kOp, "bias", bias, 1, "[experts]");
  ops::check_floating(kOp, "bias", bias);
  ops::check_dim(kOp, "counts", counts, 1, "[experts]");
  ops::check_size(kOp, "counts", counts, 0, bias.sym_size(0), "experts of bias");
  ops::check_device(kOp, "counts", counts, "bias", bias);
  TORCH_CHECK_TYPE(!counts.is_complex() && counts.scalar_type() != at::kBool, kOp, ": counts is ",
                   counts.scalar_type(), ", expected whole numbers");
  TORCH_CHECK_VALUE(std::isfinite(rate) && rate >= 0, kOp, ": rate is ", rate,
                    ", expected a finite number of at least 0");
  const auto exact = counts.detach().to(at::kDouble);
  auto step = (exact.mean() - exact).sign().to(bias.scalar_type()) * rate;
  if (center) step = step - step.mean();
  return bias.detach() + step;
}

namespace {

at::Tensor balance_sums_op(const at::Tensor& scores, const at::Tensor& topk_ids, c10::string_view count,
                           c10::SymInt group_size, const std::optional<at::Tensor>& token_mask) {
  return balance_sums_symint("turnout::balance_sums", scores, topk_ids, parse_load_count(std::string(count)),
                             std::move(group_size), token_mask.value_or(at::Tensor()));
}

at::Tensor balance_loss_op(const at::Tensor& scores, const at::Tensor& topk_ids, c10::string_view count,
                           c10::SymInt group_size, const std::optional<at::Tensor>& token_mask) {
  return balance_loss_of_sums(balance_sums_symint("turnout::balance_loss", scores, topk_ids,
                                                  parse_load_count(std::string(count)), std::move(group_size),
                                                  token_mask.value_or(at::Tensor())));
}

at::Tensor balance_loss_of_sums_op(const at::Tensor& sums, const std::optional<at::Tensor>& total) {
  return balance_loss_of_sums(sums, total.value_or(at::Tensor()));
}

at::Tensor z_loss_op(const at::Tensor& logits, const std::optional<at::Tensor>& token_mask) {
  return z_loss(logits, token_mask.value_or(at::Tensor()));
}

at::Tensor z_sums_op(const at::Tensor& logits, const std::optional<at::Tensor>& token_mask) {
  return z_sums(logits, token_mask.value_or(at::Tensor()));
}

at::Tensor z_loss_of_sums_op(const at::Tensor& sums, const std::optional<at::Tensor>& total) {
  return z_loss_of_sums(sums, total.value_or(at::Tensor()));
}

TORCH_LIBRARY_IMPL(turnout, CompositeImplicitAutograd, m) {
  m.impl("balance_sums", balance_sums_op);
  m.impl("balance_loss", balance_loss_op);
  m.impl("balance_loss_of_sums", balance_loss_of_sums_op);
  m.impl("z_loss", z_loss_op);
  m.impl("z_sums", z_sums_op);
  m.impl("z_loss_of_sums", z_loss_of_sums_op);
  m.impl("expert_importance", expert_importance);
  m.impl("cv_squared", cv_squared);
  m.impl("expert_counts", expert_counts);
  m.impl("update_selection_bias", update_selection_bias);
}

}  // namespace
}  // namespace turnout
