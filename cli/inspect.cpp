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
#include <optional>

namespace turnout::cli {
namespace {

const std::vector<std::string> kViews = {"stages", "tokens", "policies", "capacity", "collapse", "hierarchy"};

struct InspectOptions {
  ExampleOptions example;
  LayerOptions layer;
  std::vector<std::string> views;  // empty: all but the hierarchy
  std::vector<double> factors{0.25, 0.5, 0.75, 1, 1.25, 1.5, 2, 4};
  std::optional<int64_t> step;  // the token that is walked through
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
  if (o.step) return false;
  return view != "hierarchy";
}

/// Every part, or those that the text shows.
Json inspect_example(const InspectOptions& o, bool every) {
  const Example example = make_example(o.example);
  const auto wanted = [&](const char* view) { return every || shows(o, view); };
  Json json = {{"options", options_json(example)}};
  if (wanted("stages")) json["stages"] = stages_json(example);
  if (wanted("tokens")) json["tokens"] = tokens_json(example);
  if (o.step) json["step"] = step_json(example, *o.step);
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
  o.layer.step = o.step;
  const Json json = of_layer ? Json{{"layer", layer_json(o.layer)}} : inspect_example(o, o.json && o.views.empty());
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

// Groups of the help. Options of the example say nothing of a checkpoint, and are refused beside one.
constexpr const char* kOfExample = "Drawn example";
constexpr const char* kOfCheckpoint = "Trained layer";

void add_example_options(CLI::App* app, InspectOptions& all) {
  ExampleOptions& o = all.example;
  const auto group = app->option_defaults()->get_group();
  app->option_defaults()->group(kOfExample);
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
  app->add_option("--minimum-capacity", o.minimum, "Places of an expert, at least (default: 4 with gshard, else 0)");
  add_word(app, "--drop-order", o.order, parse_drop_order, "Who is dropped last: choice, position, score, random");
  app->add_option("--view", all.views, fmt::format("Parts to show: {}", fmt::join(kViews, ", ")))->delimiter(',');
  app->add_option("--factors", all.factors, "Capacity factors of the sweep")->delimiter(',')->capture_default_str();
  app->add_flag("--hierarchical", all.hierarchical, "Show a hierarchy of two levels as well");
  app->option_defaults()->group(group);
}

void add_layer_options(CLI::App* app, LayerOptions& o) {
  const auto group = app->option_defaults()->get_group();
  app->option_defaults()->group(kOfCheckpoint);
  CLI::Option* checkpoint = app->add_option("--checkpoint", o.checkpoint,
                                            "Folder of a trained model: look at one of its layers instead");
  app->add_option("--layer", o.layer, "Of the checkpoint, from 0")->capture_default_str()->needs(checkpoint);
  app->add_option("--text", o.text, "File that is sent through the model (default: random rows)")->needs(checkpoint);
  app->add_option("--tokens", o.tokens, "Tokens to send through the layer, at most")
      ->capture_default_str()
      ->needs(checkpoint);
  app->option_defaults()->group(group);
}

/// Options that would be passed over in silence.
void refuse_idle(const CLI::App& app, const InspectOptions& o) {
  const auto given = [&](const char* flag) { return app.get_option(flag)->count() > 0; };
  const bool of_layer = given("--checkpoint");
  for (const CLI::Option* option : app.get_options())
    TORCH_CHECK_VALUE(!of_layer || option->count() == 0 || option->get_group() != kOfExample, option->get_name(),
                      " is an option of the drawn example: it says nothing of --checkpoint");
  for (const char* flag : {"--checkpoint", "--text", "--html"})
    TORCH_CHECK_VALUE(!given(flag) || !app.get_option(flag)->as<std::string>().empty(), flag,
                      " is empty, expected a path");
  const auto views = [&](const char* view) { return std::find(o.views.begin(), o.views.end(), view) != o.views.end(); };
  for (const char* flag : {"--minimum-capacity", "--drop-order"})
    TORCH_CHECK_VALUE(!given(flag) || !(o.hierarchical || views("hierarchy")), flag,
                      " does not reach the hierarchical view, whose levels keep 4 places and drop by choice");
  for (const char* flag : {"--policy", "--threshold", "--hierarchical", "--inner"})
    TORCH_CHECK_VALUE(o.example.gshard() || !given(flag), flag, " belongs to --router gshard, but --router is '",
                      o.example.router, "'");
  for (const char* view : {"policies", "hierarchy"})
    TORCH_CHECK_VALUE(o.example.gshard() || !views(view), "--view ", view,
                      " belongs to --router gshard, but --router is '", o.example.router, "'");
}

}  // namespace

void add_inspect(CLI::App& program) {
  CLI::App* app = program.add_subcommand("inspect", "See the routing: shapes, tokens, policies, capacity, losses");
  auto o = std::make_shared<InspectOptions>();
  add_example_options(app, *o);
  add_layer_options(app, o->layer);
  app->add_option("--step", o->step, "Walk this token from gate to output, numbers shown");
  app->add_option("--seed", o->example.seed, "Of weights and input")->check(kSeeds)->capture_default_str();
  app->add_option("--html", o->html, "File for a page with charts, which needs no network");
  app->add_flag("--json", o->json, "All numbers as JSON on standard output; with --view those of its parts");
  app->footer(
      "Examples:\n"
      "  turnout inspect\n"
      "  turnout inspect --step 3 --policy threshold\n"
      "  turnout inspect --view capacity --sequence 64 --experts 8 --factors 0.5,1,2\n"
      "  turnout inspect --checkpoint runs/compare/moe --layer 1 --text README.md\n"
      "  turnout inspect --checkpoint runs/compare/moe --text README.md --step 100");
  app->callback([app, o] {
    refuse_idle(*app, *o);
    if (app->get_option("--minimum-capacity")->count() == 0 && !o->example.gshard()) o->example.minimum = 0;
    inspect(*o);
  });
}

}  // namespace turnout::cli
