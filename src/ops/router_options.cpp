// Words, presets and checks of RouterOptions.
#include <turnout/router.h>

#include "checks.h"
#include "names.h"
#include "router_composed.h"

#include <torch/library.h>

#include <cmath>

namespace turnout {
namespace {

constexpr ops::Names<ScoreFunction, 2> kScoreFunctions{
    {{ScoreFunction::softmax, "softmax"}, {ScoreFunction::sigmoid, "sigmoid"}}};
constexpr ops::Names<RouterWeights, 3> kRouterWeights{{{RouterWeights::normalized, "normalized"},
                                                       {RouterWeights::probability, "probability"},
                                                       {RouterWeights::softmax_of_topk, "softmax_of_topk"}}};
constexpr ops::Names<GroupMask, 2> kGroupMasks{
    {{GroupMask::minus_infinity, "minus_infinity"}, {GroupMask::zero, "zero"}}};
constexpr ops::Names<RouterPrecision, 2> kPrecisions{
    {{RouterPrecision::float32, "float32"}, {RouterPrecision::logits, "logits"}}};

struct Preset {
  const char* family;
  RouterOptions options;
};

// docs/routers.md names the source of each.
const std::vector<Preset>& presets() {
  using Weights = RouterWeights;
  static const RouterOptions of_qwen{.weights = Weights::probability, .cast_weights = true};
  static const std::vector<Preset> list{
      {"mixtral", {}},
      {"qwen2_moe", of_qwen},
      {"qwen3_moe", of_qwen},
      {"olmoe", of_qwen},
      {"deepseek_v2",
       {.weights = Weights::probability, .scale = 16.0, .groups = 8, .kept_groups = 3, .group_mask = GroupMask::zero}},
      {"deepseek_v2_lite", {.weights = Weights::probability}},
      {"deepseek_v3",
       {.score = ScoreFunction::sigmoid,
        .epsilon = 1e-20,
        .scale = 2.5,
        .groups = 8,
        .kept_groups = 4,
        .group_top = 2}},
      {"gpt_oss", {.weights = Weights::softmax_of_topk, .precision = RouterPrecision::logits}},
      {"switch", {.weights = Weights::probability}},
      {"gshard", {.epsilon = 1e-9, .precision = RouterPrecision::logits}},
      {"noisy_topk", {.weights = Weights::softmax_of_topk, .precision = RouterPrecision::logits}},
  };
  return list;
}

}  // namespace

ScoreFunction parse_score_function(const std::string& name) {
  return ops::parse_name("score function", kScoreFunctions, name);
}
std::string to_string(ScoreFunction function) { return ops::name_of(kScoreFunctions, function); }
RouterWeights parse_router_weights(const std::string& name) {
  return ops::parse_name("router weights", kRouterWeights, name);
}
std::string to_string(RouterWeights weights) { return ops::name_of(kRouterWeights, weights); }
GroupMask parse_group_mask(const std::string& name) { return ops::parse_name("group mask", kGroupMasks, name); }
std::string to_string(GroupMask mask) { return ops::name_of(kGroupMasks, mask); }
RouterPrecision parse_router_precision(const std::string& name) {
  return ops::parse_name("router precision", kPrecisions, name);
}
std::string to_string(RouterPrecision precision) { return ops::name_of(kPrecisions, precision); }

RouterOptions router_preset(const std::string& family) {
  std::string known;
  for (const auto& preset : presets()) {
    if (family == preset.family) return preset.options;
    known.append(known.empty() ? "" : ", ").append(preset.family);
  }
  TORCH_CHECK_VALUE(false, "turnout: router preset is '", family, "', expected one of ", known);
}

std::vector<std::string> router_preset_names() {
  std::vector<std::string> names;
  for (const auto& preset : presets()) names.emplace_back(preset.family);
  return names;
}

void ops::check_weight_options(const char* op, const RouterOptions& options) {
  TORCH_CHECK_VALUE(std::isfinite(options.epsilon) && options.epsilon >= 0, op, ": epsilon is ", options.epsilon,
                    ", expected a finite number of at least 0");
  TORCH_CHECK_VALUE(std::isfinite(options.scale), op, ": scale is ", options.scale, ", expected a finite number");
}

void check(const RouterOptions& options, int64_t top_k, int64_t num_experts) {
  constexpr const char* kOp = "turnout::route";
  TORCH_CHECK_VALUE(top_k >= 1 && top_k <= num_experts, kOp, ": top_k is ", top_k, ", expected 1 to ", num_experts,
                    " (experts)");
  ops::check_weight_options(kOp, options);
  TORCH_CHECK_VALUE(options.groups >= 1 && num_experts % options.groups == 0, kOp, ": groups is ", options.groups,
                    ", expected a divisor of ", num_experts, " experts");
  const auto size = num_experts / options.groups;
  TORCH_CHECK_VALUE(options.kept_groups >= 1 && options.kept_groups <= options.groups, kOp, ": kept_groups is ",
                    options.kept_groups, ", expected 1 to ", options.groups, " (groups)");
  TORCH_CHECK_VALUE(options.kept_groups * size >= top_k, kOp, ": kept_groups is ", options.kept_groups, " of ", size,
                    " experts each, expected at least ", top_k, " experts (top_k) in them");
  TORCH_CHECK_VALUE(options.group_top >= 1 && options.group_top <= size, kOp, ": group_top is ", options.group_top,
                    ", expected 1 to ", size, " (experts of a group)");
}

namespace {

using PresetTuple = std::tuple<std::string, std::string, double, double, int64_t, int64_t, int64_t, std::string,
                               std::string, bool>;

PresetTuple router_preset_op(c10::string_view family) {
  const auto o = router_preset(std::string(family));
  return {to_string(o.score), to_string(o.weights), o.epsilon, o.scale, o.groups, o.kept_groups, o.group_top,
          to_string(o.group_mask), to_string(o.precision), o.cast_weights};
}

// Without tensor arguments these have no device to be dispatched by.
TORCH_LIBRARY_IMPL(turnout, CompositeImplicitAutograd, m) {
  m.impl("router_preset", router_preset_op);
  m.impl("router_preset_names", router_preset_names);
}

}  // namespace
}  // namespace turnout
