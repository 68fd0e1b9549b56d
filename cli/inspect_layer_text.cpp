// A layer of a checkpoint in words and numbers.
#include "inspect_text.h"

#include <fmt/format.h>

namespace turnout::cli {
namespace {

std::string names_of(const Json& list) {
  std::string text;
  for (const Json& entry : list)
    text += fmt::format("{}{} {:.0f}%", text.empty() ? "" : "  ", entry["name"].get<std::string>(),
                        100 * entry["share"].get<double>());
  return text;
}

/// The first entries that fit into the line.
std::string fitting(const Json& list, size_t width) {
  Json kept = list;
  while (!kept.empty() && names_of(kept).size() > width) kept.erase(kept.size() - 1);
  return names_of(kept);
}

std::string takers_text(const Json& takers, const Style& style) {
  std::string text = style.strong("WHAT EACH EXPERT TAKES") + " (share of its rows)\n";
  for (const Json& taker : takers) {
    const std::string head =
        fmt::format("  expert {:<3} {:>4.1f} % ", taker["expert"].get<int64_t>(), 100 * taker["share"].get<double>());
    const std::string indent(head.size(), ' ');
    const Json& bytes = taker["bytes"];
    text += head + "bytes  " +
            (bytes.empty() ? "none more often than others" : fitting(bytes, kLineWidth - head.size() - 7)) + "\n";
    if (!taker["words"].empty())
      text += indent + "words  " + fitting(taker["words"], kLineWidth - head.size() - 7) + "\n";
    for (const Json& example : taker["examples"])
      text += indent + marked_text(example, style) + "\n";
  }
  return text;
}

}  // namespace

std::string marked_text(const Json& place, const Style& style) {
  return style.faint(place["before"].get<std::string>()) +
         style.strong(fmt::format("[{}]", place["at"].get<std::string>())) +
         style.faint(place["after"].get<std::string>());
}

std::string layer_text(const Json& json, const Style& style) {
  const Json& trace = json["trace"];
  const auto number = [&](const char* name) { return trace[name].get<double>(); };
  const auto count = [&](const char* name) { return trace[name].get<int64_t>(); };
  std::string text = style.strong(fmt::format("LAYER {}", json["layer"].get<int64_t>())) + "\n";
  text += fmt::format("  of {}\n  {} experts, top {}, router {}\n", json["checkpoint"].get<std::string>(),
                      count("experts"), count("top_k"), json["router"].get<std::string>());
  text += fmt::format("  input: {}\n", json["input"].get<std::string>());
  text += load_text("  rows of each expert: ", trace["rows"]);
  text += fmt::format("  largest over mean {:.2f}, {} experts without a row, {} of {} choices dropped\n",
                      number("max_over_mean"), count("dead_experts"), count("dropped"), count("choices"));
  text += fmt::format("  entropy {:.3f} of at most {:.3f} nats; logits {:.3f} (root mean square), to {:.2f}\n",
                      number("entropy"), number("entropy_max"), number("logit_rms"), number("logit_max"));
  text += fmt::format("  balance loss {:.4f} ({}), z-loss {:.4f}, before coefficients\n", number("balance_loss"),
                      trace["load_count"].get<std::string>(), number("z_loss"));
  if (json.contains("step")) return text.append("\n").append(step_text(json["step"], style));
  text.append("\n").append(capacity_text(trace["capacity"], style));
  text += fmt::format("  Places are counted over {} tokens, those of one call.\n", count("group"));
  if (json.contains("takers")) text.append("\n").append(takers_text(json["takers"], style));
  return text;
}

}  // namespace turnout::cli
