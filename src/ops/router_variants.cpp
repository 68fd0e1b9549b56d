// Choices that do not follow a token's own logits alone: by experts, by Sinkhorn's scaling, by hash.
//
// Legend: T tokens, E experts, K top_k, G groups, n tokens of a group, C capacity.
#include <turnout/router_variants.h>

#include "checks.h"
#include "names.h"

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <cmath>

namespace turnout {
namespace {

constexpr ops::Names<Selection, 4> kSelections{{{Selection::topk, "topk"},
                                                {Selection::expert_choice, "expert_choice"},
                                                {Selection::sinkhorn, "sinkhorn"},
                                                {Selection::hash, "hash"}}};

void check_logits(const char* op, const at::Tensor& logits) {
  ops::check_dim(op, "logits", logits, 2, "[tokens, experts]");
  ops::check_floating(op, "logits", logits);
  TORCH_CHECK_VALUE(logits.sym_size(1) >= 1, op, ": logits has shape ", logits.sym_sizes(),
                    ", expected at least one expert");
}

}  // namespace

Selection parse_selection(const std::string& name) { return ops::parse_name("selection", kSelections, name); }
std::string to_string(Selection selection) { return ops::name_of(kSelections, selection); }

ExpertChoice route_expert_choice(const at::Tensor& logits, int64_t capacity, int64_t group_size,
                                 const at::Tensor& token_mask) {
  constexpr const char* kOp = "turnout::route_expert_choice";
  check_logits(kOp, logits);
  ops::check_token_mask(kOp, token_mask, logits, "logits");
  const auto tokens = logits.sym_size(0);
  const auto num_experts = logits.sym_size(1).guard_int(__FILE__, __LINE__);
  ops::check_at_least(kOp, "group_size", group_size, 0);
  const auto n = group_size == 0 ? tokens : c10::SymInt(group_size);
  TORCH_CHECK_VALUE(tokens == 0 || tokens % n == 0, kOp, ": group_size is ", group_size, ", expected a divisor of ",
                    tokens, " tokens");
  ops::check_at_least(kOp, "capacity", capacity, 1);
  const auto picks = n < capacity ? n.guard_int(__FILE__, __LINE__) : capacity;
  const auto scores_TE = logits.to(ops::score_type(logits)).softmax(-1);
  const auto all = at::arange(num_experts, logits.options().dtype(at::kLong));
  auto picked_TE = at::zeros_like(scores_TE, at::kBool);
  if (tokens != 0) {
    // NaN would rank first and cost a healthy token its place with every expert.
    auto choice_TE = scores_TE.detach().masked_fill(scores_TE.detach().isnan(), -1);
    if (token_mask.defined()) choice_TE = choice_TE.masked_fill(token_mask.logical_not().unsqueeze(-1), -2);
    const auto choice_GEn =
        choice_TE.reshape_symint({tokens / n, n, num_experts}).transpose(1, 2).contiguous();
    const auto best_GEC = turnout::topk(choice_GEn, picks);
    const auto picked_GEn = at::zeros_like(choice_GEn, at::kBool).scatter(-1, best_GEC, true);
    picked_TE = picked_GEn.transpose(1, 2).reshape_symint(logits.sym_sizes());
    if (token_mask.defined()) picked_TE = picked_TE.logical_and(token_mask.unsqueeze(-1));
  }
  const auto ids_TE = at::where(picked_TE, all, -1);
  auto plan = turnout::plan(ids_TE, num_experts);
  if (tokens != 0)
    plan.token_of_row = plan.token_of_row.narrow_symint(0, 0, tokens / n * (picks * num_experts)).clone();
  return {{ids_TE, scores_TE.masked_fill(picked_TE.logical_not(), 0), scores_TE}, plan};
}

at::Tensor sinkhorn(const at::Tensor& logits, double tolerance) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("turnout::sinkhorn", "")
                             .typed<at::Tensor(const at::Tensor&, double)>();
  ops::check_floating("turnout::sinkhorn", "logits", logits);
  return op.call(logits.detach(), tolerance);
}

Routing route_sinkhorn(const at::Tensor& logits, int64_t top_k, bool balanced, const at::Tensor& token_mask) {
  constexpr const char* kOp = "turnout::route_sinkhorn";
  check_logits(kOp, logits);
  ops::check_token_mask(kOp, token_mask, logits, "logits");
  const RouterOptions options{.score = top_k == 1 ? ScoreFunction::sigmoid : ScoreFunction::softmax,
                              .weights = RouterWeights::probability};
  if (!balanced) return route(logits, top_k, options, {}, token_mask);
  auto counted_TE = logits.detach();
  if (token_mask.defined())  // rows of NaN take no part
    counted_TE = counted_TE.masked_fill(token_mask.logical_not().unsqueeze(-1), std::nan(""));
  return route_chosen(logits, turnout::topk(sinkhorn(counted_TE), top_k), options, token_mask);
}

at::Tensor hash_ids(const at::Tensor& token_ids, int64_t num_experts, int64_t top_k, int64_t seed) {
  constexpr const char* kOp = "turnout::hash_ids";
  TORCH_CHECK_VALUE(token_ids.defined(), kOp, ": token_ids is not defined, expected [...]");
  ops::check_integer(kOp, "token_ids", token_ids);
  ops::check_at_least(kOp, "num_experts", num_experts, 1);
  TORCH_CHECK_VALUE(top_k >= 1 && top_k <= num_experts, kOp, ": top_k is ", top_k, ", expected 1 to ", num_experts,
                    " (experts)");
  // 31 bits a word: a product of two stays below 2⁶³ on every device.
  constexpr int64_t kMask = 0x7fffffff;
  const auto mix = [](at::Tensor v) {
    v = v.bitwise_xor(v.bitwise_right_shift(16));
    v = (v * 0x45d9f3b).bitwise_and(kMask);
    v = v.bitwise_xor(v.bitwise_right_shift(15));
    v = (v * 0x2c1b3c6d).bitwise_and(kMask);
    return v.bitwise_xor(v.bitwise_right_shift(16));
  };
  const auto of_seed = (static_cast<uint64_t>(seed) * 0x9e3779b97f4a7c15u) >> 33;
  const auto word_T1 = token_ids.to(at::kLong).reshape({-1, 1}).bitwise_and(kMask);
  const auto expert_E = at::arange(1, num_experts + 1, word_T1.options()) * 0x1e3779b1;
  const auto token_T1 = mix(word_T1.bitwise_xor(static_cast<int64_t>(of_seed)));
  const auto rank_TE = mix((token_T1 + expert_E).bitwise_and(kMask));
  return turnout::topk(rank_TE.bitwise_right_shift(7).to(at::kFloat), top_k);  // 24 bits: exact in float32
}

namespace {

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> route_expert_choice_op(
    const at::Tensor& logits, int64_t capacity, int64_t group_size, const std::optional<at::Tensor>& token_mask) {
  auto [routing, plan] = route_expert_choice(logits, capacity, group_size, token_mask.value_or(at::Tensor()));
  return {routing.topk_ids,    routing.topk_weights, routing.scores,
          plan.expert_offsets, plan.token_of_row,    plan.row_of_choice};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> route_sinkhorn_op(const at::Tensor& logits, int64_t top_k,
                                                                 bool balanced,
                                                                 const std::optional<at::Tensor>& token_mask) {
  auto routing = route_sinkhorn(logits, top_k, balanced, token_mask.value_or(at::Tensor()));
  return {routing.topk_ids, routing.topk_weights, routing.scores};
}

void check_sinkhorn(const at::Tensor& logits, double tolerance) {
  check_logits("turnout::sinkhorn", logits);
  TORCH_CHECK_VALUE(tolerance > 0, "turnout::sinkhorn: tolerance is ", tolerance, ", expected a number above 0");
}

at::Tensor sinkhorn_aten(const at::Tensor& logits, double tolerance) {
  check_sinkhorn(logits, tolerance);
  constexpr int kMostIterations = 1000;
  constexpr double kEpsilon = 1e-8;  // the source's
  // A row's largest logit is brought within these bounds, which no healthy router leaves: e⁸⁸ overflows float32, and
  // e⁻¹⁰ is well above epsilon. A factor of a whole row changes nothing, of_rows takes it up.
  constexpr double kLargest = 80, kSmallest = -10;
  const auto wide = logits.to(ops::score_type(logits));
  const auto broken_T1 = wide.isfinite().logical_not().any(-1, /*keepdim=*/true);
  // Rows that take no part must not count either: the sums of rows and of columns would never agree.
  const auto tokens = static_cast<double>(wide.size(0) - broken_T1.sum().item<int64_t>());
  if (tokens == 0) return at::zeros_like(wide);
  const auto finite = wide.masked_fill(broken_T1, 0);
  const auto best_T1 = finite.amax(-1, /*keepdim=*/true);
  const auto cost = (finite - (best_T1 - best_T1.clamp(kSmallest, kLargest))).exp().masked_fill(broken_T1, 0);
  const auto num_experts = static_cast<double>(cost.size(1));
  auto of_rows = at::ones({cost.size(0)}, cost.options());
  auto of_columns = at::ones({cost.size(1)}, cost.options());
  for (int i = 0; i < kMostIterations; ++i) {
    of_rows = (1 / tokens) / ((of_columns * cost).sum(1) + kEpsilon);
    const auto next = (1 / num_experts) / ((of_rows.unsqueeze(1) * cost).sum(0) + kEpsilon);
    const auto change = (of_columns - next).abs().mean().item<double>();
    of_columns = next;
    if (!(change > tolerance)) break;
  }
  return of_columns * cost * of_rows.unsqueeze(1);
}

at::Tensor sinkhorn_meta(const at::Tensor& logits, double tolerance) {
  check_sinkhorn(logits, tolerance);
  return at::empty_symint(logits.sym_sizes(), logits.options().dtype(ops::score_type(logits)));
}

TORCH_LIBRARY_IMPL(turnout, CompositeImplicitAutograd, m) {
  m.impl("route_expert_choice", route_expert_choice_op);
  m.impl("route_sinkhorn", route_sinkhorn_op);
  m.impl("hash_ids", hash_ids);
}
TORCH_LIBRARY_IMPL(turnout, CompositeExplicitAutograd, m) { m.impl("sinkhorn", sinkhorn_aten); }
TORCH_LIBRARY_IMPL(turnout, Meta, m) { m.impl("sinkhorn", sinkhorn_meta); }

}  // namespace
}  // namespace turnout
