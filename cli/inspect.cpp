// `turnout inspect`: what a router does with its tokens, from gate to combine, in numbers.
#include "commands.h"
#include "inspect_layer.h"
#include "inspect_sections.h"
#include "inspect_text.h"
#include "machine.h"
#include "report.h"

#include <turnout/checkpoint.h>

#include <c10/util/Exception.h>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <memory>

namespace turnout::cli {
namespace {

const std::vector<std::string> kViews = {"stages", "tokens", "policies", "capacity", "collapse", "hierarchy"};

struct InspectOptions {
  ExampleOptions example;
  LayerOptions layer;
  std::vector<std::string> views;  // empty: all but the hierarchy
  std::vector<double> factors{0.25, 0.5, 0.75, 1, 1.25, 1.5, 2, 4};
  int64_t step = -1;  // < 0: no token is walked through
  bool hierarchical = false;
  bool json = false;
  std::string html;  // file; empty: none
};

void check(InspectOptions& o) {
  for (const std::string& view : o.views)
    TORCH_CHECK_VALUE(std::find(kViews.begin(), kViews.end(), view) != kViews.end(), "--view is '", view,
                      "', expected one of ", fmt::format("{}", fmt::join(kViews, ", ")));
  for (const double factor : o.factors)
    TORCH_CHECK_VALUE(std::isfinite(factor) && factor > 0 && factor <= 1e6, "--factors holds ", factor,
                      ", expected numbers above 0");
  check(o.example);
}

bool shows(const InspectOptions& o, const std::string& view) {
  if (!o.views.empty()) return std::find(o.views.begin(), o.views.end(), view) != o.views.end();
  if (o.step >= 0) return false;
  return view != "hierarchy";
}

/// Every part, or those that the text shows.
Json inspect_example(const InspectOptions& o, bool every) {
  const Example example = make_example(o.example);
  const auto wanted = [&](const char* view) { return every || shows(o, view); };
  Json json = {{"options", options_json(example)}};
  if (wanted("stages")) json["stages"] = stages_json(example);
  if (wanted("tokens")) json["tokens"] = tokens_json(example);
  if (o.step >= 0) json["step"] = step_json(example, o.step);
  if (wanted("policies") && o.example.gshard()) json["policies"] = policies_json(example);
  if (wanted("capacity")) json["capacity"] = capacity_json(example, o.factors);
  if (wanted("collapse")) json["collapse"] = collapse_json(example);
  if (o.hierarchical || wanted("hierarchy")) json["hierarchy"] = hierarchy_json(example);
  return json;
}

void write_page(const InspectOptions& o, Json json, const std::string& subtitle) {
  json["subtitle"] = subtitle;
  json["machine"] = machine_json();
  write_file(o.html, report_page("Inside a mixture of experts", json));
}

std::string headline(const ExampleOptions& o) {
  std::string text = fmt::format("{} x {} tokens, hidden {}, {} experts, router {}, top {}, seed {}\n", o.batch,
                                 o.sequence, o.hidden, o.experts, o.router, o.top_k, o.seed);
  if (o.gshard()) text += fmt::format("second expert {} (threshold {:g}), ", to_string(o.policy), o.threshold);
  return text + fmt::format("capacity factor {:g}, minimum capacity {}\n\n", o.factor, o.minimum);
}

void inspect(InspectOptions& o) {
  check(o);
  if (!o.html.empty()) check_report_files();
  const bool of_layer = !o.layer.checkpoint.empty();
  o.layer.seed = o.example.seed;
  const Json json = of_layer ? Json{{"layer", layer_json(o.layer)}} : inspect_example(o, o.json);
  const std::string head = of_layer ? "" : headline(o.example);
  if (!o.html.empty())
    write_page(o, of_layer ? json : inspect_example(o, true),
               of_layer ? json["layer"]["input"].get<std::string>() : head);
  std::string text = o.json ? json.dump(2, ' ', false, Json::error_handler_t::replace) + "\n"
                            : head + inspection_text(json, Style::of_standard_output());
  if (!o.html.empty() && !o.json) text += "\nWritten: " + o.html + "\n";
  std::fwrite(text.data(), 1, text.size(), stdout);
}

template <class T>
void add_word(CLI::App* app, const char* flag, T& value, T (*parse)(const std::string&), const char* help) {
  app->add_option_function<std::string>(
         flag, [&value, parse](const std::string& word) { value = parse(word); }, help)
      ->default_str(to_string(value));
}

void add_example_options(CLI::App* app, ExampleOptions& o, CLI::Option*& minimum) {
  app->add_option("--batch", o.batch, "Sequences")->capture_default_str();
  app->add_option("--sequence", o.sequence, "Tokens of a sequence")->capture_default_str();
  app->add_option("--hidden", o.hidden, "Width of a token")->capture_default_str();
  app->add_option("--ffn", o.ffn, "Width of an expert; 0: 4 times hidden")->capture_default_str();
  app->add_option("--experts", o.experts, "Experts; of the outer level in the hierarchical view")
      ->capture_default_str();
  app->add_option("--inner", o.inner, "Experts within each outer one")->capture_default_str();
  app->add_option("--router", o.router,
                  fmt::format("gshard: top 2, with a policy for the second; or that of another family: {}",
                              fmt::join(router_preset_names(), ", ")))
      ->capture_default_str();
  app->add_option("--top-k", o.top_k, "Experts of a token")->capture_default_str();
  add_word(app, "--policy", o.policy, parse_second_policy, "Of the second expert: all, none, threshold, random");
  app->add_option("--threshold", o.threshold, "Of the policies threshold and random")->capture_default_str();
  app->add_option("--capacity-factor", o.factor, "Places over the mean load")->capture_default_str();
  minimum = app->add_option("--minimum-capacity", o.minimum,
                            "Places of an expert, at least (default: 4 with gshard, else 0)");
  add_word(app, "--drop-order", o.order, parse_drop_order, "Who is dropped last: choice, position, score, random");
  app->add_option("--seed", o.seed, "Of weights and input")->check(kSeeds)->capture_default_str();
}

}  // namespace

void add_inspect(CLI::App& program) {
  CLI::App* app = program.add_subcommand("inspect", "See the routing: shapes, tokens, policies, capacity, losses");
  auto o = std::make_shared<InspectOptions>();
  CLI::Option* minimum = nullptr;
  add_example_options(app, o->example, minimum);
  CLI::Option* checkpoint = app->add_option("--checkpoint", o->layer.checkpoint,
                                            "Folder of a trained model: look at one of its layers instead");
  app->add_option("--layer", o->layer.layer, "Of the checkpoint, from 0")->capture_default_str()->needs(checkpoint);
  app->add_option("--text", o->layer.text, "File that is sent through the model (default: random rows)")
      ->needs(checkpoint);
  app->add_option("--tokens", o->layer.tokens, "Tokens to send through the layer, at most")
      ->capture_default_str()
      ->needs(checkpoint);
  app->add_option("--view", o->views, "Parts to show: stages, tokens, policies, capacity, collapse, hierarchy")
      ->delimiter(',')
      ->excludes(checkpoint);
  app->add_option("--factors", o->factors, "Capacity factors of the sweep")
      ->delimiter(',')
      ->capture_default_str()
      ->excludes(checkpoint);
  app->add_option("--step", o->step, "Walk this token from gate to output, numbers shown")
      ->check(CLI::Range(int64_t{0}, int64_t{1} << 32))
      ->excludes(checkpoint);
  app->add_flag("--hierarchical", o->hierarchical, "Show a hierarchy of two levels as well")->excludes(checkpoint);
  app->add_option("--html", o->html, "File for a page with charts, which needs no network");
  app->add_flag("--json", o->json, "All numbers as JSON on standard output");
  app->footer(
      "Examples:\n"
      "  turnout inspect\n"
      "  turnout inspect --step 3 --policy threshold\n"
      "  turnout inspect --view capacity --sequence 64 --experts 8 --factors 0.5,1,2\n"
      "  turnout inspect --checkpoint runs/compare/moe --layer 1 --text README.md");
  app->callback([o, minimum] {
    if (minimum->count() == 0 && !o->example.gshard()) o->example.minimum = 0;
    inspect(*o);
  });
}

}  // namespace turnout::cli
