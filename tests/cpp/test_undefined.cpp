// Tensors that are not defined, in every public call that takes one: an error that names the argument, never a crash.
#include "helpers.h"

#include <turnout/balance.h>
#include <turnout/combine.h>
#include <turnout/gate.h>
#include <turnout/hierarchical_moe.h>
#include <turnout/quantized.h>
#include <turnout/router_variants.h>
#include <turnout/slots.h>
#include <turnout/statistics.h>

namespace turnout {
namespace {

struct Call {
  const char* name;
  const char* argument;
  std::function<void()> run;
};

const at::Tensor kNone;

at::Tensor x() { return at::ones({4, 3}); }
at::Tensor ids() { return at::zeros({4, 2}, at::kLong); }
at::Tensor weights() { return at::ones({4, 2}); }
ExpertWeights bank() { return {{at::ones({2, 5, 3})}, {at::ones({2, 3, 5})}}; }

std::vector<Call> calls() {
  const auto gelu = Activation::gelu;
  const auto grouped = plan(ids(), 2);
  const Routing none{};
  return {
      {"topk", "scores", [] { turnout::topk(kNone, 1); }},
      {"route", "logits", [] { route(kNone, 1); }},
      {"route_top2", "logits", [] { route_top2(kNone, {}); }},
      {"route_chosen", "logits", [] { route_chosen(kNone, ids()); }},
      {"route_chosen", "topk_ids", [] { route_chosen(x(), kNone); }},
      {"jitter", "x", [] { jitter(kNone, 0.1); }},
      {"noisy_logits", "logits", [] { noisy_logits(kNone, x()); }},
      {"noisy_logits", "noise_logits", [] { noisy_logits(x(), kNone); }},
      {"noisy_load", "clean", [] { noisy_load(kNone, {x(), x()}, 1); }},
      {"noisy_load", "noisy", [] { noisy_load(x(), {}, 1); }},
      {"route_expert_choice", "logits", [] { route_expert_choice(kNone, 1); }},
      {"sinkhorn", "logits", [] { sinkhorn(kNone); }},
      {"route_sinkhorn", "logits", [] { route_sinkhorn(kNone, 1); }},
      {"hash_ids", "token_ids", [] { hash_ids(kNone, 2); }},
      {"balance_loss", "scores", [] { balance_loss(kNone, ids()); }},
      {"balance_loss", "topk_ids", [] { balance_loss(x(), kNone); }},
      {"balance_loss_of_sums", "sums", [] { balance_loss_of_sums(kNone); }},
      {"z_loss", "logits", [] { z_loss(kNone); }},
      {"z_loss_of_sums", "sums", [] { z_loss_of_sums(kNone); }},
      {"expert_importance", "topk_ids", [] { expert_importance(kNone, weights(), 2); }},
      {"expert_importance", "topk_weights", [] { expert_importance(ids(), kNone, 2); }},
      {"cv_squared", "values", [] { cv_squared(kNone); }},
      {"expert_counts", "topk_ids", [] { expert_counts(kNone, 2); }},
      {"update_selection_bias", "bias", [] { update_selection_bias(kNone, at::ones({3}), 0.1); }},
      {"update_selection_bias", "counts", [] { update_selection_bias(at::ones({3}), kNone, 0.1); }},
      {"routing_statistics", "scores", [=] { routing_statistics(none, grouped); }},
      {"routing_statistics", "expert_offsets", [=] { routing_statistics(route(x(), 2), {}); }},
      {"plan", "topk_ids", [] { plan(kNone, 2); }},
      {"queue_positions", "topk_ids", [] { queue_positions(kNone, 2, 4, DropOrder::choice); }},
      {"limit_capacity", "topk_ids", [=] { limit_capacity(none, 2, 1, 4); }},
      {"apply_capacity", "topk_ids", [=] { apply_capacity(none, 2, 4, {.factor = 1.0}); }},
      {"apply_capacity", "topk_ids", [=] { apply_capacity(none, 2, 4, {}); }},
      {"slot_plan", "topk_ids", [] { slot_plan(kNone, 2, 1, 4); }},
      {"slot_importance", "topk_weights", [=] { slot_importance(kNone, grouped); }},
      {"slot_importance", "token_of_row", [] { slot_importance(weights(), {}); }},
      {"nested_ids", "topk_ids", [] { nested_ids(kNone, 2, 2); }},
      {"dispatch_tensors", "topk_ids", [] { dispatch_tensors(kNone, weights(), 2, 1, 4); }},
      {"dispatch_tensors", "topk_weights", [] { dispatch_tensors(ids(), kNone, 2, 1, 4); }},
      {"dispatch", "x", [=] { dispatch(kNone, grouped); }},
      {"dispatch", "token_of_row", [] { dispatch(x(), {}); }},
      {"combine", "rows", [=] { combine(kNone, weights(), grouped); }},
      {"combine", "topk_weights", [=] { combine(at::ones({8, 3}), kNone, grouped); }},
      {"add_shared", "y", [] { add_shared(kNone, x()); }},
      {"add_shared", "shared", [] { add_shared(x(), kNone); }},
      {"gate_logits", "x", [] { gate_logits(kNone, at::ones({2, 3})); }},
      {"gate_logits", "weight", [] { gate_logits(x(), kNone); }},
      {"experts", "x", [=] { experts(kNone, weights(), grouped, bank(), gelu); }},
      {"experts", "topk_weights", [=] { experts(x(), kNone, grouped, bank(), gelu); }},
      {"experts", "expert_offsets", [=] { experts(x(), weights(), {}, bank(), gelu); }},
      {"experts", "up", [=] { experts(x(), weights(), grouped, {{kNone}, {at::ones({2, 3, 5})}}, gelu); }},
      {"experts", "up", [=] { experts(x(), weights(), grouped, {}, gelu); }},
      {"fused_experts", "topk_ids", [=] { fused_experts(x(), kNone, weights(), bank(), gelu); }},
      {"feed_forward", "x", [=] { feed_forward(kNone, at::ones({5, 3}), at::ones({3, 5}), gelu); }},
      {"feed_forward", "up", [=] { feed_forward(x(), kNone, at::ones({3, 5}), gelu); }},
      {"experts", "down", [=] { prepack({{at::ones({2, 5, 3})}, {kNone}}, gelu); }},
      {"decode_mxfp4", "blocks", [] { decode_mxfp4(kNone, kNone); }},
      {"decode_fp8_blocks", "weight", [] { decode_fp8_blocks(kNone, kNone); }},
      {"MoE", "x", [] { MoE(MoEOptions{.hidden = 3, .ffn = 5, .num_experts = 2})->forward(kNone); }},
      {"HierarchicalMoE", "x", [] { HierarchicalMoE(HierarchicalMoEOptions{.hidden = 3})->forward(kNone); }},
      {"Top2Gating", "x", [] { Top2Gating(Top2GatingOptions{.hidden = 3})->forward(kNone); }},
  };
}

TEST(Undefined, TensorsAreNamed) {
  for (const auto& call : calls()) {
    const auto message = testing::message_of(call.run);
    const auto words = std::string("turnout::").append(call.name).append(": ").append(call.argument);
    EXPECT_EQ(message.rfind(words, 0), 0u) << words << " …, but it says: " << message.substr(0, 300);
  }
}

}  // namespace
}  // namespace turnout
