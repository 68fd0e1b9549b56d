// A token's way in words and numbers.
#include "inspect_text.h"

#include <fmt/format.h>

namespace turnout::cli {
namespace {

constexpr size_t kLogitsShown = 8;

std::string vector_text(const Json& numbers, bool more) {
  std::string text;
  for (const Json& number : numbers) text += fmt::format("{}{:.4f}", text.empty() ? "[" : ", ", number.get<double>());
  return text + (more ? ", …]" : "]");
}

std::string scores_text(const Json& json) {
  std::string text = "  gate    logits       ";
  const auto row = [&](const char* name) {
    std::string line;
    for (size_t e = 0; e < std::min(json[name].size(), kLogitsShown); ++e)
      line += fmt::format(" {:>7.4f}", json[name][e].get<double>());
    return line + (json[name].size() > kLogitsShown ? " …" : "") + "\n";
  };
  text += row("logits");
  return text.append("          probabilities").append(row("scores"));
}

std::string weights_text(const Json& json) {
  std::string text;
  int k = 0;
  for (const Json& choice : json["choices"])
    text += fmt::format("  choice  {}: expert {}, probability {:.4f}, weight {:.4f}\n", ++k,
                        choice["expert"].get<int64_t>(), choice["probability"].get<double>(),
                        choice["weight"].get<double>());
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

std::string slots_text(const Json& json, const Style& style) {
  std::string text;
  for (const Json& choice : json["choices"]) {
    const auto expert = choice["expert"].get<int64_t>();
    const auto capacity = json["capacity"].get<int64_t>();
    if (choice["fate"] == "kept") {
      text += fmt::format("  slot    expert {}: place {} of {}, slot {}, row {} of the plan\n", expert,
                          choice["place"].get<int64_t>(), capacity, choice["slot"].get<int64_t>(),
                          choice["row"].get<int64_t>());
    } else if (choice["fate"] == "dropped") {
      text += fmt::format("  slot    {}\n", style.bad(fmt::format("expert {}: place {} of {}: dropped", expert,
                                                                  choice["place"].get<int64_t>(), capacity)));
    }
  }
  return text;
}

std::string combine_text(const Json& json, bool more) {
  std::string text, sum;
  for (const Json& choice : json["choices"]) {
    if (choice["fate"] != "kept") continue;
    const auto expert = choice["expert"].get<int64_t>();
    text += fmt::format("  expert  {}(x) = {}\n", expert, vector_text(choice["output"], more));
    sum += fmt::format("{}{:.4f} * {}(x)", sum.empty() ? "" : " + ", choice["weight"].get<double>(), expert);
  }
  return text + fmt::format("  combine {}\n        = {}\n",
                            sum.empty() ? "nothing: the token passes by the residual" : sum,
                            vector_text(json["output"], more));
}

}  // namespace

std::string step_text(const Json& json, const Style& style) {
  const bool more = json["more"].get<bool>();
  std::string text = style.strong(fmt::format("TOKEN {}: SEQUENCE {}, POSITION {}", json["token"].get<int64_t>(),
                                              json["sequence"].get<int64_t>(), json["position"].get<int64_t>())) +
                     "\n";
  text += fmt::format("  input   x = {}\n", vector_text(json["x"], more));
  text += scores_text(json) + weights_text(json);
  if (json.contains("policy")) text += policy_text(json);
  return text + slots_text(json, style) + combine_text(json, more);
}

}  // namespace turnout::cli
