// A token's way in words and numbers.
#include "inspect_text.h"

#include <fmt/format.h>

namespace turnout::cli {
namespace {

constexpr size_t kLogitsShown = 21;  // three lines

std::string vector_text(const Json& numbers, bool more) {
  std::string text;
  for (const Json& number : numbers)
    text.append(text.empty() ? "[" : ", ")
        .append(number.is_null() ? "nan" : fmt::format("{:.4f}", number.get<double>()));
  return text + (more ? ", …]" : "]");
}

std::string scores_text(const Json& json) {
  const auto rows = [&](const char* head, const char* name) {
    std::vector<std::string> words;
    for (size_t e = 0; e < std::min(json[name].size(), kLogitsShown); ++e)
      words.push_back(fmt::format("{:>7.4f}", json[name][e].get<double>()));
    if (json[name].size() > kLogitsShown) words.emplace_back("…");
    return wrap(head, words);
  };
  return rows("  gate    logits        ", "logits") + rows("          probabilities ", "scores");
}

std::string weights_text(const Json& json) {
  std::string text;
  int k = 0;
  for (const Json& choice : json["choices"])
    text += fmt::format("  choice  {}: expert {}, probability {:.4f}, weight {:.4f}\n", ++k,
                        choice["expert"].get<int64_t>(), choice["probability"].get<double>(),
                        choice["weight"].get<double>());
  if (json.contains("weights")) text += fmt::format("          weights: {}\n", json["weights"].get<std::string>());
  if (json.contains("chosen_by")) text += fmt::format("          chosen by {}\n", json["chosen_by"].get<std::string>());
  if (json.contains("policy"))
    text += fmt::format("          weights: {:.4f} / {:.4f} and {:.4f} / {:.4f}, what both are together\n",
                        json["choices"][0]["probability"].get<double>(), json["probability_of_chosen"].get<double>(),
                        json["choices"][1]["probability"].get<double>(), json["probability_of_chosen"].get<double>());
  return text;
}

std::string policy_text(const Json& json) {
  const Json& policy = json["policy"];
  const auto name = policy["policy"].get<std::string>();
  const bool stays = json["choices"][1]["fate"] != "left out";
  const char* verdict = stays ? "stays" : "is left out";
  if (name == "threshold")
    return fmt::format("  policy  threshold: {:.4f} > {:g} is {}: the second expert {}\n",
                       policy["gate_2"].get<double>(), policy["threshold"].get<double>(), stays, verdict);
  if (name == "random")
    return fmt::format("  policy  random: {:.4f} < {:.4f} / {:g} is {}: the second expert {}\n",
                       policy["uniform"].get<double>(), policy["gate_2"].get<double>(),
                       policy["threshold"].get<double>(), stays, verdict);
  return fmt::format("  policy  {}: the second expert {}\n", name, verdict);
}

std::string slot_text(const Json& choice, int64_t capacity) {
  std::string text = fmt::format("expert {}", choice["expert"].get<int64_t>());
  if (choice.contains("place")) text += fmt::format(": place {} of {}", choice["place"].get<int64_t>(), capacity);
  if (choice["fate"] == "dropped") return text + ": dropped";
  text += choice.contains("slot") ? fmt::format(", slot {}, ", choice["slot"].get<int64_t>()) : ": ";
  return text + fmt::format("row {} of the plan", choice["row"].get<int64_t>());
}

std::string slots_text(const Json& json, const Style& style) {
  std::string text;
  for (const Json& choice : json["choices"]) {
    if (choice["fate"] == "left out") continue;
    const std::string line = slot_text(choice, json["capacity"].get<int64_t>());
    text += fmt::format("  slot    {}\n", choice["fate"] == "dropped" ? style.bad(line) : line);
  }
  return text;
}

std::string combine_text(const Json& json, bool more) {
  std::string text;
  std::vector<std::string> sum;
  const auto add = [&](double weight, const std::string& name, const Json& output) {
    text += fmt::format("  expert  {} = {}\n", name, vector_text(output, more));
    sum.push_back(fmt::format("{}{:.4f} * {}", sum.empty() ? "" : "+ ", weight, name));
  };
  for (const Json& choice : json["choices"])
    if (choice["fate"] == "kept")
      add(choice["weight"].get<double>(), fmt::format("{}(x)", choice["expert"].get<int64_t>()), choice["output"]);
  if (json.contains("shared")) add(json["shared"]["gate"].get<double>(), "shared(x)", json["shared"]["output"]);
  if (sum.empty()) sum.emplace_back("nothing: the token passes by the residual");
  return text + wrap("  combine ", sum) + fmt::format("        = {}\n", vector_text(json["output"], more));
}

}  // namespace

std::string step_text(const Json& json, const Style& style) {
  const bool more = json["more"].get<bool>();
  std::string title = fmt::format("TOKEN {}", json["token"].get<int64_t>());
  if (json.contains("sequence"))
    title += fmt::format(": SEQUENCE {}, POSITION {}", json["sequence"].get<int64_t>(), json["position"].get<int64_t>());
  std::string text = style.strong(title) + "\n";
  if (json.contains("text")) text += fmt::format("  text    {}\n", marked_text(json["text"], style));
  text += fmt::format("  input   x = {}\n", vector_text(json["x"], more));
  text += scores_text(json) + weights_text(json);
  if (json.contains("policy")) text += policy_text(json);
  return text + slots_text(json, style) + combine_text(json, more);
}

}  // namespace turnout::cli
