// Schemas of every op, in one place. C++, Python and the program call these; the folders beside this file hold the
// registrations: cpu/ the kernels, aten/ the path for any device, meta/ shapes, autograd/ gradients.
//
// A bank of weights is a list of one tensor with a leading experts axis; separate experts are a list of one tensor
// each. Words (weights, order, activation, …) are the names of the enumerators in include/turnout/.
#include <torch/library.h>

TORCH_LIBRARY(turnout, m) {
  // runtime
  m.def("kernel_choices() -> (str[] names, str[] reasons)");
  m.def("release_scratch() -> ()");
  // router
  m.def("gate_logits(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor");
  m.def(
      "gate_logits_backward(Tensor grad, Tensor x, Tensor weight, bool[3] needs)"
      " -> (Tensor x, Tensor weight, Tensor bias)");
  m.def("topk(Tensor scores, int top_k) -> Tensor");
  m.def(
      "route(Tensor logits, int top_k, str weights='normalized', float epsilon=0.0, *, str score='softmax',"
      " float scale=1.0, int groups=1, int kept_groups=1, int group_top=1, str group_mask='minus_infinity',"
      " str precision='float32', bool cast_weights=False, Tensor? selection_bias=None, Tensor? token_mask=None)"
      " -> (Tensor topk_ids, Tensor topk_weights, Tensor scores)");
  m.def(
      "router_preset(str family) -> (str score, str weights, float epsilon, float scale, int groups, int kept_groups,"
      " int group_top, str group_mask, str precision, bool cast_weights)");
  m.def("router_preset_names() -> str[]");
  m.def(
      "route_top2(Tensor logits, str policy='random', float threshold=0.2, float epsilon=1e-9,"
      " Tensor? importance=None, Tensor? uniform=None)"
      " -> (Tensor topk_ids, Tensor topk_weights, Tensor scores, Tensor balance_loss)");
  m.def(
      "route_forward(Tensor logits, int top_k, str score, str weights, float epsilon, float scale, int groups,"
      " int kept_groups, int group_top, str group_mask, Tensor? selection_bias)"
      " -> (Tensor topk_ids, Tensor topk_weights, Tensor scores)");
  m.def(
      "route_backward(Tensor? grad_weights, Tensor? grad_scores, Tensor logits, Tensor topk_ids, Tensor scores,"
      " str score, str weights, float epsilon, float scale) -> Tensor");
  m.def(
      "route_chosen(Tensor logits, Tensor topk_ids, str weights='normalized', float epsilon=0.0, *,"
      " str score='softmax', float scale=1.0, str precision='float32', bool cast_weights=False,"
      " Tensor? token_mask=None) -> (Tensor topk_ids, Tensor topk_weights, Tensor scores)");
  m.def("jitter(Tensor x, float amount, Tensor? uniform=None) -> Tensor");
  m.def(
      "noisy_logits(Tensor logits, Tensor noise_logits, float minimum=0.0, Tensor? noise=None)"
      " -> (Tensor logits, Tensor deviation)");
  m.def("noisy_load(Tensor clean, Tensor noisy, Tensor deviation, int top_k) -> Tensor");
  m.def(
      "route_expert_choice(Tensor logits, int capacity, int group_size=0, Tensor? token_mask=None)"
      " -> (Tensor topk_ids, Tensor topk_weights, Tensor scores, Tensor expert_offsets, Tensor token_of_row,"
      " Tensor row_of_choice)");
  m.def("sinkhorn(Tensor logits, float tolerance=1e-4) -> Tensor");
  m.def(
      "route_sinkhorn(Tensor logits, int top_k, bool balanced=True, Tensor? token_mask=None)"
      " -> (Tensor topk_ids, Tensor topk_weights, Tensor scores)");
  m.def("hash_ids(Tensor token_ids, int num_experts, int top_k=1, int seed=0) -> Tensor");
  // balance
  m.def(
      "balance_loss(Tensor scores, Tensor topk_ids, str count='per_assignment', SymInt group_size=0,"
      " Tensor? token_mask=None) -> Tensor");
  m.def(
      "balance_sums(Tensor scores, Tensor topk_ids, str count='per_assignment', SymInt group_size=0,"
      " Tensor? token_mask=None) -> Tensor");
  m.def("balance_loss_of_sums(Tensor sums, Tensor? total=None) -> Tensor");
  m.def("z_loss(Tensor logits, Tensor? token_mask=None) -> Tensor");
  m.def("z_sums(Tensor logits, Tensor? token_mask=None) -> Tensor");
  m.def("z_loss_of_sums(Tensor sums, Tensor? total=None) -> Tensor");
  m.def("expert_importance(Tensor topk_ids, Tensor topk_weights, int num_experts) -> Tensor");
  m.def("cv_squared(Tensor values) -> Tensor");
  m.def("expert_counts(Tensor topk_ids, int num_experts) -> Tensor");
  m.def("update_selection_bias(Tensor bias, Tensor counts, float rate, bool center=False) -> Tensor");
  m.def(
      "routing_statistics(Tensor scores, Tensor expert_offsets, Tensor? dropped=None, Tensor? token_mask=None)"
      " -> (Tensor tokens_per_expert, Tensor dropped_share, Tensor max_over_mean, Tensor entropy,"
      " Tensor dead_experts)");
  // plan
  m.def(
      "plan(Tensor topk_ids, int num_experts)"
      " -> (Tensor expert_offsets, Tensor token_of_row, Tensor row_of_choice)");
  m.def(
      "queue_positions(Tensor topk_ids, int num_experts, SymInt group_size, str order='choice',"
      " Tensor? priority=None) -> Tensor");
  m.def(
      "limit_capacity(Tensor topk_ids, Tensor topk_weights, int num_experts, SymInt capacity, SymInt group_size,"
      " str order='choice', bool renormalize=False, Tensor? priority=None)"
      " -> (Tensor topk_ids, Tensor topk_weights, Tensor dropped)");
  m.def(
      "apply_capacity(Tensor topk_ids, Tensor topk_weights, int num_experts, SymInt group_size, *, float factor=0.0,"
      " int fixed=0, int minimum=0, str rounding='ceil', bool count_choices=True, str order='choice',"
      " bool renormalize=False) -> (Tensor topk_ids, Tensor topk_weights, Tensor dropped)");
  m.def(
      "expert_capacity(float factor, int fixed, int minimum, str rounding, bool count_choices, int group_tokens,"
      " int top_k, int num_experts) -> int");
  // slots
  m.def(
      "slot_plan(Tensor topk_ids, int num_experts, SymInt capacity, SymInt group_size)"
      " -> (Tensor expert_offsets, Tensor token_of_row, Tensor row_of_choice)");
  m.def("slot_importance(Tensor topk_weights, Tensor token_of_row, Tensor row_of_choice) -> Tensor");
  m.def("nested_ids(Tensor topk_ids, int num_outer, int num_inner) -> Tensor");
  m.def(
      "dispatch_tensors(Tensor topk_ids, Tensor topk_weights, int num_experts, SymInt capacity, SymInt group_size)"
      " -> (Tensor dispatch, Tensor combine)");
  // dispatch and combine
  m.def("dispatch(Tensor x, Tensor token_of_row, Tensor row_of_choice) -> Tensor");
  m.def("combine(Tensor rows, Tensor topk_weights, Tensor token_of_row, Tensor row_of_choice) -> Tensor");
  m.def("add_shared(Tensor y, Tensor shared, Tensor? gate_logits=None) -> Tensor");
  // experts
  m.def(
      "experts(Tensor x, Tensor topk_weights, Tensor expert_offsets, Tensor token_of_row, Tensor row_of_choice,"
      " Tensor[] up, Tensor[] down, Tensor[] up_bias, Tensor[] down_bias, str activation, bool recompute=False,"
      " bool weight_before_down=False) -> Tensor");
  m.def(
      "experts_forward(Tensor x, Tensor topk_weights, Tensor expert_offsets, Tensor token_of_row,"
      " Tensor row_of_choice, Tensor[] up, Tensor[] down, Tensor[] up_bias, Tensor[] down_bias, str activation,"
      " bool keep, bool weight_before_down=False) -> (Tensor y, Tensor preactivations)");
  m.def(
      "experts_backward(Tensor grad, Tensor x, Tensor topk_weights, Tensor expert_offsets, Tensor token_of_row,"
      " Tensor row_of_choice, Tensor[] up, Tensor[] down, Tensor[] up_bias, Tensor[] down_bias, str activation,"
      " Tensor preactivations, bool[6] needs)"
      " -> (Tensor x, Tensor topk_weights, Tensor[] up, Tensor[] down, Tensor[] up_bias, Tensor[] down_bias)");
  m.def(
      "fused_experts(Tensor x, Tensor topk_ids, Tensor topk_weights, Tensor[] up, Tensor[] down, Tensor[] up_bias,"
      " Tensor[] down_bias, str activation, bool recompute=False, bool weight_before_down=False) -> Tensor");
  m.def(
      "packed_layout(Tensor[] up, Tensor[] down, str activation) -> (str layout, int num_experts, int ffn)");
  m.def("prepack(Tensor[] up, Tensor[] down, str activation) -> Tensor");
  m.def(
      "experts_packed(Tensor x, Tensor topk_weights, Tensor expert_offsets, Tensor token_of_row,"
      " Tensor row_of_choice, Tensor packed, str layout, int ffn, Tensor[] up_bias, Tensor[] down_bias,"
      " str activation, bool weight_before_down=False) -> Tensor");
  m.def(
      "feed_forward(Tensor x, Tensor up, Tensor down, Tensor? up_bias, Tensor? down_bias, str activation)"
      " -> Tensor");
  // experts on several ranks; registered in src/layers
  m.def("expert_bounds(int num_experts, int ranks, int unit=1) -> int[]");
  m.def(
      "expert_parallel(Tensor x, Tensor topk_ids, Tensor topk_weights, Tensor[] up, Tensor[] down, Tensor[] up_bias,"
      " Tensor[] down_bias, str activation, int num_experts, str group, int chunks=1) -> Tensor");
  m.def(
      "expert_parallel_backward(Tensor grad, Tensor x, Tensor topk_ids, Tensor topk_weights, Tensor[] up, Tensor[] down,"
      " Tensor[] up_bias, Tensor[] down_bias, str activation, int num_experts, str group, int chunks, bool[6] needs)"
      " -> (Tensor x, Tensor topk_weights, Tensor[] up, Tensor[] down, Tensor[] up_bias, Tensor[] down_bias)");
  // quantised weights
  m.def("decode_mxfp4(Tensor blocks, Tensor scales, *, ScalarType? dtype=None) -> Tensor");
  m.def(
      "decode_fp8_blocks(Tensor weight, Tensor scale_inv, int[2] block=[128, 128], *, ScalarType? dtype=None)"
      " -> Tensor");
  // published checkpoints
  m.def("pretrained_moe(str folder) -> str");
  m.def("load_moe_layer(str folder, int layer, ScalarType? dtype=None) -> (str[] names, Tensor[] tensors)");
  m.def(
      "published_tensors(str folder, int layer, str layout, str[] names, Tensor[] tensors)"
      " -> (str[] names, Tensor[] tensors)");
  m.def("convert_checkpoint(str source, str target, str layout) -> ()");
}
