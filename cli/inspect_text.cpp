// Sections of an example: shapes, tokens, and the tables of what changes them.
#include "inspect_text.h"

#include <fmt/format.h>

#include <algorithm>

namespace turnout::cli {
namespace {

constexpr size_t kTokensShown = 16;
constexpr size_t kScoresShown = 6;  // a wider row of them would leave no room for the choices

std::string title(const Style& style, const std::string& text) { return style.strong(text) + "\n"; }

std::string percent(double share) { return fmt::format("{:.1f} %", 100 * share); }

std::string fate_text(const Json& choice) {
  const auto fate = choice["fate"].get<std::string>();
  if (fate == "kept") return fmt::format("place {}", choice["place"].get<int64_t>());
  return fate;
}

std::string choice_cell(const Json& choice, const Style& style) {
  const auto fate = choice["fate"].get<std::string>();
  if (fate == "none") return fmt::format("{:<21}", "-");
  const std::string cell = fmt::format("{:<21}", fmt::format("e{} {:.3f} {}", choice["expert"].get<int64_t>(),
                                                             choice["weight"].get<double>(), fate_text(choice)));
  return fate == "kept" ? style.good(cell) : fate == "dropped" ? style.bad(cell) : style.faint(cell);
}

std::string choices_line(const Json& token, const Style& style) {
  std::string line =
      fmt::format("  {:<6}", fmt::format("{}:{}", token["sequence"].get<int64_t>(), token["position"].get<int64_t>()));
  const Json& scores = token["scores"];
  if (scores.size() <= kScoresShown)
    for (const Json& score : scores) line += fmt::format(" {:.2f}", score.get<double>());
  line += "  ";
  size_t shown = 0;
  const size_t room = scores.size() <= kScoresShown ? 2 : 3;
  for (const Json& choice : token["choices"]) {
    if (shown++ == room) {
      line += style.faint("…");
      break;
    }
    line += choice_cell(choice, style);
  }
  return line.substr(0, line.find_last_not_of(' ') + 1) + "\n";
}

}  // namespace

std::string shape_text(const Json& shape) {
  if (shape.is_null()) return "";
  if (!shape.is_array()) return shape.dump();
  if (shape.empty()) return "scalar";
  std::string text;
  for (const Json& size : shape) text.append(text.empty() ? "[" : ", ").append(size.dump());
  return text + "]";
}

std::string load_text(const std::string& head, const Json& load) {
  std::vector<std::string> words;
  for (const Json& rows : load) words.push_back(fmt::format("{:>3}", rows.get<int64_t>()));
  return wrap(head, words);
}

std::string stages_text(const Json& json, const Style& style) {
  std::string text = title(style, "STAGES");
  text += style.faint(fmt::format("  {:<17}{:<17}{:<29}{}", "described as", "shape", "here", "shape")) + "\n";
  for (const Json& stage : json["stages"]) {
    const std::string line =
        fmt::format("  {:<17}{:<17}{:<29}{}", stage["described"].get<std::string>(),
                    shape_text(stage["described_shape"]), stage["here"].get<std::string>(), shape_text(stage["shape"]));
    text += line.substr(0, line.find_last_not_of(' ') + 1) + "\n";
  }
  text += fmt::format("  Of {} numbers of the dispatch tensor {} are not 0; the plan has {}.\n",
                      json["dispatch_tensor_numbers"].get<int64_t>(), json["dispatch_tensor_ones"].get<int64_t>(),
                      json["plan_numbers"].get<int64_t>());
  text += fmt::format("  {} rows in {} slots. Balance loss {:.4f}, before its coefficient.\n",
                      json["rows"].get<int64_t>(), json["slots"].get<int64_t>(), json["loss"].get<double>());
  return text;
}

std::string tokens_text(const Json& json, const Style& style) {
  std::string text = title(style, "TOKENS");
  std::string head = "  token ";
  const size_t experts = json.empty() ? 0 : json[0]["scores"].size();
  if (experts <= kScoresShown)
    for (size_t e = 0; e < experts; ++e) head += fmt::format(" {:<4}", fmt::format("e{}", e));
  head +=
      fmt::format("  {:<21}{}", "first choice", json.empty() || json[0]["choices"].size() < 2 ? "" : "second choice");
  text += style.faint(head.substr(0, head.find_last_not_of(' ') + 1)) + "\n";
  for (size_t t = 0; t < std::min(json.size(), kTokensShown); ++t) text += choices_line(json[t], style);
  if (json.size() > kTokensShown) text += fmt::format("  and {} more tokens (--json)\n", json.size() - kTokensShown);
  return text;
}

std::string policies_text(const Json& json, const Style& style) {
  std::string text = title(style, "SECOND-EXPERT POLICIES");
  text += style.faint("  policy     second   dropped   loss     rows of each expert") + "\n";
  for (const Json& entry : json)
    text += load_text(fmt::format("  {:<10} {:>6} {:>9}   {:.4f}  ", entry["policy"].get<std::string>(),
                                  entry["second_experts"].get<int64_t>(), entry["dropped"].get<int64_t>(),
                                  entry["loss"].get<double>()),
                      entry["rows"]);
  return text + "  The loss looks at first choices, before policy and capacity: it stays.\n";
}

std::string capacity_text(const Json& json, const Style& style) {
  std::string text = title(style, "CAPACITY");
  text += style.faint("  factor   places   dropped choices   tokens left alone       idle slots") + "\n";
  const Json* raised = nullptr;  // the last whose places are more than its factor gives
  for (const Json& entry : json) {
    const auto dropped = entry["dropped"].get<int64_t>();
    const std::string cell =
        fmt::format("{:>17}", fmt::format("{} ({})", dropped, percent(entry["dropped_share"].get<double>())));
    text +=
        fmt::format("  {:>6} {:>8} {} {:>19} {:>16}\n", fmt::format("{:g}", entry["factor"].get<double>()),
                    entry["places"].get<int64_t>(), dropped > 0 ? style.bad(cell) : cell,
                    entry["tokens_without_expert"].get<int64_t>(),
                    fmt::format("{} ({})", entry["idle"].get<int64_t>(), percent(entry["idle_share"].get<double>())));
    if (entry["places_of_factor"] < entry["places"]) raised = &entry;
  }
  if (raised != nullptr)
    text += fmt::format("  Up to a factor of {:g} the minimum of {} places counts (--minimum-capacity).\n",
                        (*raised)["factor"].get<double>(), (*raised)["places"].get<int64_t>());
  return text;
}

std::string collapse_text(const Json& json, const Style& style) {
  std::string text = title(style, "FROM BALANCED TO COLLAPSED");
  text += style.faint("  share moved   loss     max/mean  dropped   first choices of each expert") + "\n";
  for (const Json& entry : json)
    text += load_text(
        fmt::format("  {:>9}     {:.4f} {:>10.2f} {:>8}   ", percent(entry["share"].get<double>()),
                    entry["loss"].get<double>(), entry["max_over_mean"].get<double>(), entry["dropped"].get<int64_t>()),
        entry["wanted"]);
  return text + "  The loss is 1 when balanced and nears the number of experts when collapsed.\n";
}

std::string hierarchy_text(const Json& json, const Style& style) {
  std::string text = title(style, "TWO LEVELS");
  for (const Json& stage : json["stages"])
    text += fmt::format("  {:<24}{}\n", stage["name"].get<std::string>(), shape_text(stage["shape"]));
  const Json &outer = json["outer"], &inner = json["inner"];
  text += load_text("  rows of each outer expert: ", outer["rows"]);
  text += fmt::format("  outer: {} places a sequence, {} dropped, loss {:.4f}\n", outer["capacity"].get<int64_t>(),
                      outer["dropped"].get<int64_t>(), outer["loss"].get<double>());
  text += fmt::format("  slots: {} of first choices, {} of second choices, {} empty\n",
                      json["first_choice_slots"].get<int64_t>(), json["second_choice_slots"].get<int64_t>(),
                      json["empty_slots"].get<int64_t>());
  for (size_t o = 0; o < inner["rows"].size(); ++o)
    text += load_text(fmt::format("  rows within outer expert {}: ", o), inner["rows"][o]);
  text += fmt::format("  inner: {} places of {} slots, {} dropped, loss {:.4f}\n", inner["capacity"].get<int64_t>(),
                      inner["group"].get<int64_t>(), inner["dropped"].get<int64_t>(), inner["loss"].get<double>());
  return text + fmt::format("  auxiliary loss: {:g} x (outer + inner) = {:.6f}\n",
                            json["loss_coefficient"].get<double>(), json["aux_loss"].get<double>());
}

std::string inspection_text(const Json& json, const Style& style) {
  using Section = std::string (*)(const Json&, const Style&);
  constexpr std::pair<const char*, Section> kSections[] = {{"layer", layer_text},       {"stages", stages_text},
                                                           {"tokens", tokens_text},     {"step", step_text},
                                                           {"policies", policies_text}, {"capacity", capacity_text},
                                                           {"collapse", collapse_text}, {"hierarchy", hierarchy_text}};
  std::string text;
  for (const auto& [name, section] : kSections)
    if (json.contains(name)) text.append(text.empty() ? "" : "\n").append(section(json[name], style));
  return text;
}

}  // namespace turnout::cli
