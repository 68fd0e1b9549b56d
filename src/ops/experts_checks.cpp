// Checks of the experts ops: types, devices and the sizes that all weights must agree on.
#include "experts_checks.h"

#include "checks.h"

namespace turnout::ops {
namespace {

constexpr const char* kOp = "turnout::experts";

// One list of weights: a bank, or one tensor an expert. @param shape [rows, columns] of one expert, -1 = any
void check_weights(const ExpertsArgs& args, const char* name, at::TensorList weights,
                   const std::vector<c10::SymInt>& shape, const char* words) {
  const auto experts = args.expert_offsets.sym_size(0) - 1;
  const auto dim = static_cast<int64_t>(shape.size());
  TORCH_CHECK_VALUE(!weights.empty(), kOp, ": ", name, " is empty, expected ", words);
  const bool bank = weights.size() == 1 && weights[0].dim() == dim + 1;
  TORCH_CHECK_VALUE(bank || static_cast<int64_t>(weights.size()) == experts, kOp, ": ", name, " has ",
                    weights.size(), " tensors, expected one bank or ", experts, " (one an expert)");
  if (bank) check_size(kOp, name, weights[0], 0, experts, "experts of the plan");
  for (const auto& weight : weights) {
    if (!bank) check_dim(kOp, name, weight, dim, words);
    for (int64_t axis = 0; axis < dim; ++axis)
      if (shape[axis] != -1) check_size(kOp, name, weight, axis + (bank ? 1 : 0), shape[axis], words);
    TORCH_CHECK_TYPE(weight.scalar_type() == args.x.scalar_type(), kOp, ": ", name, " is ", weight.scalar_type(),
                     ", expected ", args.x.scalar_type(), " as x is");
    check_device(kOp, name, weight, "x", args.x);
  }
}

}  // namespace

void check_routed(const ExpertsArgs& args) {
  check_dim(kOp, "x", args.x, 2, "[tokens, hidden]");
  check_floating(kOp, "x", args.x);
  check_plan_tensors(kOp, args.token_of_row, args.row_of_choice, args.x);
  // Fewer rows than choices: plans in which experts pick tokens.
  TORCH_CHECK_VALUE(args.token_of_row.sym_size(0) <= args.row_of_choice.sym_numel(), kOp, ": token_of_row has shape ",
                    args.token_of_row.sym_sizes(), ", expected at most ", args.row_of_choice.sym_numel(),
                    " rows (tokens · top_k)");
  check_dim(kOp, "expert_offsets", args.expert_offsets, 1, "[experts + 1]");
  TORCH_CHECK_TYPE(args.expert_offsets.scalar_type() == at::kLong, kOp, ": expert_offsets is ",
                   args.expert_offsets.scalar_type(), ", expected int64");
  check_device(kOp, "expert_offsets", args.expert_offsets, "x", args.x);
  TORCH_CHECK_VALUE(args.expert_offsets.sym_size(0) >= 2, kOp, ": expert_offsets has shape ",
                    args.expert_offsets.sym_sizes(), ", expected [experts + 1] of at least one expert");
  check_size(kOp, "x", args.x, 0, args.row_of_choice.sym_size(0), "tokens of the plan");
  check_topk_weights(kOp, args.topk_weights, args.row_of_choice, args.x);
}

void check_biases(const ExpertsArgs& args, const ExpertsSizes& sizes) {
  if (!args.up_bias.empty())
    check_weights(args, "up_bias", args.up_bias, {sizes.up_rows},
                  args.gated() ? "[experts, 2 · ffn]" : "[experts, ffn]");
  if (!args.down_bias.empty()) check_weights(args, "down_bias", args.down_bias, {sizes.hidden}, "[experts, hidden]");
}

ExpertsSizes check_experts(const ExpertsArgs& args) {
  check_routed(args);
  const auto hidden = args.x.sym_size(1);
  const char* up_words = args.gated() ? "[experts, 2 · ffn, hidden]" : "[experts, ffn, hidden]";
  check_weights(args, "up", args.up, {-1, hidden}, up_words);
  const auto up_rows = args.up[0].sym_size(-2);
  TORCH_CHECK_VALUE(!args.gated() || up_rows % 2 == 0, kOp, ": up has ", up_rows, " rows an expert, expected an even",
                    " number (gate rows, then up rows) for ", to_string(args.activation));
  const auto ffn = args.gated() ? up_rows / 2 : up_rows;
  check_weights(args, "up", args.up, {up_rows, hidden}, up_words);
  check_weights(args, "down", args.down, {hidden, ffn}, "[experts, hidden, ffn]");
  const ExpertsSizes sizes{hidden, ffn, up_rows};
  check_biases(args, sizes);
  return sizes;
}

void check_experts_backward(const at::Tensor& grad, const ExpertsArgs& args, const ExpertsSizes& sizes,
                            const at::Tensor& preactivations) {
  constexpr const char* kBackward = "turnout::experts_backward";
  check_dim(kBackward, "grad", grad, 2, "[tokens, hidden]");
  check_size(kBackward, "grad", grad, 0, args.x.sym_size(0), "tokens of x");
  check_size(kBackward, "grad", grad, 1, args.x.sym_size(1), "hidden of x");
  check_dim(kBackward, "preactivations", preactivations, 2, "[rows, rows of up]");
  check_size(kBackward, "preactivations", preactivations, 1, sizes.up_rows, "rows of up");
  TORCH_CHECK_VALUE(preactivations.sym_size(0) == 0 || preactivations.sym_size(0) == args.token_of_row.sym_size(0),
                    kBackward, ": preactivations has shape ", preactivations.sym_sizes(), ", expected 0 or ",
                    args.token_of_row.sym_size(0), " rows");
  for (const auto& [name, tensor] : {std::pair{"grad", grad}, {"preactivations", preactivations}}) {
    TORCH_CHECK_TYPE(tensor.scalar_type() == args.x.scalar_type(), kBackward, ": ", name, " is ",
                     tensor.scalar_type(), ", expected ", args.x.scalar_type(), " as x is");
    check_device(kBackward, name, tensor, "x", args.x);
  }
}

}  // namespace turnout::ops
