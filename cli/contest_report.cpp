// Results of a contest as a table for people and JSON for programs.
#include "contest.h"
#include "terminal.h"

#include <fmt/format.h>

#include <algorithm>

namespace turnout::cli {
namespace {

double equal_seconds(const Contestant& dense, const Contestant& moe) { return std::min(dense.seconds, moe.seconds); }

nlohmann::ordered_json json_of(const Contestant& c, double at_seconds) {
  const LanguageModelOptions& options = c.trainer.model->options;
  const FlopCount flops = flops_per_token(options);
  const ParameterCount parameters = count_parameters(options);
  nlohmann::ordered_json json = {
      {"parameters", parameters.total},
      {"active_parameters", parameters.active},
      {"flops_per_token",
       {{"attention", flops.attention},
        {"feed_forward", flops.feed_forward},
        {"gate", flops.gate},
        {"head", flops.head},
        {"total", flops.total()}}},
      {"tokens", c.curve.back().tokens},
      {"training_seconds", c.seconds},
      {"tokens_per_second", c.tokens_per_second()},
      {"bits_per_byte_at_equal_tokens", c.curve.back().bits_per_byte},
      {"bits_per_byte_at_equal_time", bits_at(c.curve, at_seconds)},
      {"telemetry_share", c.telemetry.share()},
  };
  if (c.expert_load.defined()) {
    const at::Tensor load = c.expert_load.contiguous();
    std::vector<std::vector<int64_t>> rows;
    for (int64_t layer = 0; layer < load.size(0); ++layer) {
      const int64_t* row = load.const_data_ptr<int64_t>() + layer * load.size(1);
      rows.emplace_back(row, row + load.size(1));
    }
    json["expert_load_max_over_mean"] = c.load_spread();
    json["expert_load"] = rows;
    json["choices"] = c.choices;
    json["dropped"] = c.dropped;
  }
  return json;
}

}  // namespace

std::string table(const Contestant& dense, const Contestant& moe) {
  const double seconds = equal_seconds(dense, moe);
  std::string text;
  const auto row = [&](const std::string& label, const auto& show) {
    text += fmt::format("{:<32}{:>12}{:>12}\n", label, show(dense), show(moe));
  };
  const auto options = [](const Contestant& c) -> const LanguageModelOptions& { return c.trainer.model->options; };
  text += fmt::format("{:<32}{:>12}{:>12}\n", "", "dense", "MoE");
  row("parameters", [&](const Contestant& c) { return fmt::format("{}", count_parameters(options(c)).total); });
  row("active parameters", [&](const Contestant& c) { return fmt::format("{}", count_parameters(options(c)).active); });
  row("FLOPs a token, forward",
      [&](const Contestant& c) { return fmt::format("{}", flops_per_token(options(c)).total()); });
  row("training tokens/s", [](const Contestant& c) { return fmt::format("{:.0f}", c.tokens_per_second()); });
  row("training seconds", [](const Contestant& c) { return fmt::format("{:.1f}", c.seconds); });
  row("bits a byte, equal tokens",
      [](const Contestant& c) { return fmt::format("{:.4f}", c.curve.back().bits_per_byte); });
  row(fmt::format("bits a byte, equal time ({:.0f} s)", seconds),
      [&](const Contestant& c) { return fmt::format("{:.4f}", bits_at(c.curve, seconds)); });
  row("expert load, max / mean", [](const Contestant& c) {
    return c.load_ratios > 0 ? fmt::format("{:.2f}", c.load_spread()) : std::string("-");
  });
  row("choices dropped", [](const Contestant& c) {
    if (c.choices == 0) return std::string("-");
    return fmt::format("{:.2f} %", 100.0 * static_cast<double>(c.dropped) / static_cast<double>(c.choices));
  });
  row("telemetry, of the time", [](const Contestant& c) { return fmt::format("{:.2f} %", 100 * c.telemetry.share()); });
  text += fmt::format(
      "\nBits a byte are those of held-out files. Equal tokens are equal FLOPs: {} tokens each. Equal time is each\n"
      "model's own seconds in training steps. The schedule of the learning rate is set by tokens, so the slower\n"
      "model is read before its schedule has ended, which counts against it.\n",
      dense.curve.back().tokens);
  return text;
}

nlohmann::ordered_json results_json(const Contestant& dense, const Contestant& moe) {
  const double seconds = equal_seconds(dense, moe);
  return {{"equal_time_seconds", seconds}, {dense.name, json_of(dense, seconds)}, {moe.name, json_of(moe, seconds)}};
}

std::string curves_jsonl(const Contestant& dense, const Contestant& moe) {
  std::string text;
  for (const Contestant* c : {&dense, &moe}) {
    for (const CurvePoint& point : c->curve) {
      const nlohmann::ordered_json line = {{"model", c->name},
                                           {"step", point.step},
                                           {"tokens", point.tokens},
                                           {"seconds", point.seconds},
                                           {"bits_per_byte", point.bits_per_byte}};
      text += line.dump() + "\n";
    }
  }
  return text;
}

}  // namespace turnout::cli
