// Fields of MoEOptions by name: one list, walked by the writer and the reader of JSON.
#pragma once

#include <turnout/moe.h>

#include "layers/json_fields.h"

namespace turnout {

template <class Fields>
void visit_capacity(Fields& f, CapacityOptions& o) {
  f.number("factor", o.factor);
  f.number("fixed", o.fixed);
  f.number("minimum", o.minimum);
  f.word(
      "rounding", o.rounding, [](CapacityRounding v) { return to_string(v); }, parse_capacity_rounding);
  f.number("count_choices", o.count_choices);
  f.number("per_sequence", o.per_sequence);
  f.word(
      "order", o.order, [](DropOrder v) { return to_string(v); }, parse_drop_order);
  f.number("renormalize", o.renormalize);
}

template <class Fields>
void visit_router(Fields& f, RouterOptions& o) {
  f.word(
      "score", o.score, [](ScoreFunction v) { return to_string(v); }, parse_score_function);
  f.word(
      "weights", o.weights, [](RouterWeights v) { return to_string(v); }, parse_router_weights);
  f.number("epsilon", o.epsilon);
  f.number("scale", o.scale);
  f.number("groups", o.groups);
  f.number("kept_groups", o.kept_groups);
  f.number("group_top", o.group_top);
  f.word(
      "group_mask", o.group_mask, [](GroupMask v) { return to_string(v); }, parse_group_mask);
  f.word(
      "precision", o.precision, [](RouterPrecision v) { return to_string(v); }, parse_router_precision);
  f.number("cast_weights", o.cast_weights);
}

template <class Fields>
void visit_moe(Fields& f, MoEOptions& o) {
  f.number("ffn", o.ffn);
  f.number("num_experts", o.num_experts);
  f.number("top_k", o.top_k);
  f.object("shared", [&](auto& inner) {
    inner.number("ffn", o.shared.ffn);
    inner.number("gated", o.shared.gated);
  });
  f.number("gate_bias", o.gate_bias);
  f.object("router", [&](auto& inner) { visit_router(inner, o.router); });
  f.number("selection_bias", o.selection_bias);
  f.number("jitter", o.jitter);
  f.number("jitter_experts", o.jitter_experts);
  f.number("noisy", o.noisy);
  f.word(
      "load_count", o.load_count, [](LoadCount v) { return to_string(v); }, parse_load_count);
  f.number("balance_coefficient", o.balance_coefficient);
  f.number("z_coefficient", o.z_coefficient);
  f.object("capacity", [&](auto& inner) { visit_capacity(inner, o.capacity); });
}

/// As visit_moe, with what a model has for all of its layers: hidden size, activation and biases.
template <class Fields>
void visit_layer(Fields& f, MoEOptions& o) {
  f.number("hidden", o.hidden);
  f.word(
      "activation", o.activation, [](Activation v) { return to_string(v); }, parse_activation);
  f.number("bias", o.bias);
  visit_moe(f, o);
}

}  // namespace turnout
