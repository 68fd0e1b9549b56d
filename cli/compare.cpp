// `turnout compare`: what do experts buy over a dense model of the same FLOPs a token?
#include "commands.h"
#include "contest.h"
#include "layer_trace.h"
#include "machine.h"
#include "ranks.h"
#include "report.h"
#include "run_options.h"
#include "terminal.h"

#include <c10/util/Exception.h>

#include <fmt/format.h>

#include <algorithm>
#include <filesystem>
#include <sstream>

namespace turnout::cli {
namespace {

struct CompareOptions {
  RunOptions run;
  std::string output = "runs/compare";
  int64_t evaluations = 10;
  RankOptions ranks;
};

void describe(const LanguageModelOptions& dense, const LanguageModelOptions& moe, const RunOptions& run,
              const ByteText& text, int64_t ranks) {
  fmt::print("{}{}\n", machine_line(), ranks > 1 ? fmt::format(", {} ranks", ranks) : "");
  fmt::print("text: {} training bytes in {} files, {} held-out bytes in {} others\n", text.training.size(),
             text.training_files.size(), text.held_out.size(), text.held_out_files.size());
  fmt::print("MoE, FLOPs a token:   {}\n", to_string(flops_per_token(moe)));
  fmt::print("dense, FLOPs a token: {} (width {})\n", to_string(flops_per_token(dense)), dense.ffn);
  fmt::print("{} steps of {} x {} tokens, each model\n\n", run.training.steps, run.training.batch, run.model.context);
  std::fflush(stdout);
}

Contestant contestant(const std::string& name, const LanguageModelOptions& model, const TrainingOptions& training,
                      const std::shared_ptr<const ByteText>& text, const ParallelLayout& layout) {
  Trainer trainer(make_model(model, training.seed, layout), training, text);
  Telemetry telemetry(name, trainer);
  return {.name = name, .trainer = std::move(trainer), .telemetry = std::move(telemetry)};
}

Json settings_json(const CompareOptions& options, const ByteText& text, int64_t ranks, const Contestant& dense,
                   const Contestant& moe) {
  Json json;
  json["results"] = results_json(dense, moe);
  json["models"] = {{dense.name, Json::parse(to_json(dense.trainer.model->options))},
                    {moe.name, Json::parse(to_json(moe.trainer.model->options))}};
  json["training"] = Json::parse(to_json(options.run.training));
  json["text"] = {{"paths", options.run.text},
                  {"digest", fmt::format("{:016x}", text.digest())},
                  {"training_bytes", text.training.size()},
                  {"training_files", text.training_files.size()},
                  {"held_out_bytes", text.held_out.size()},
                  {"held_out_files", text.held_out_files}};
  json["machine"] = machine_json();
  json["ranks"] = ranks;
  return json;
}

Json lines_json(const std::string& jsonl) {
  Json list = Json::array();
  std::istringstream stream(jsonl);
  for (std::string line; std::getline(stream, line);) list.push_back(Json::parse(line));
  return list;
}

// What the trained routers do with held-out text. Experts on other ranks take part: all ranks call this.
Json layers_json(const CompareOptions& options, const ByteText& text, const Contestant& moe) {
  const TrainingOptions& training = options.run.training;
  const TextWindows windows = windows_of(text.held_out, options.run.model.context, training.batch, training.eval_bytes);
  Json layers = Json::array();
  for (const LayerTrace& trace : trace_model(moe.trainer.model, windows, training.batch))
    layers.push_back({{"trace", trace_json(trace)}, {"takers", takers_json(trace, windows)}});
  return layers;
}

// The page shows all that the other files hold, and the layers.
std::string report(Json data, Json layers, const Contestant& dense, const Contestant& moe) {
  data["subtitle"] = machine_line();
  data["curves"] = lines_json(curves_jsonl(dense, moe));
  data["telemetry"] = lines_json(dense.telemetry.jsonl() + moe.telemetry.jsonl());
  data["layers"] = std::move(layers);
  return report_page("Dense against mixture of experts", data);
}

void write_results(const CompareOptions& options, const Json& json, Json layers, const Contestant& dense,
                   const Contestant& moe) {
  write_file(options.output + "/curves.jsonl", curves_jsonl(dense, moe));
  write_file(options.output + "/telemetry.jsonl", dense.telemetry.jsonl() + moe.telemetry.jsonl());
  write_file(options.output + "/report.html", report(json, std::move(layers), dense, moe));
  // Last: whoever finds compare.json finds the rest as well.
  write_file(options.output + "/compare.json", json.dump(2, ' ', false, Json::error_handler_t::replace) + "\n");
}

// Of models on several ranks each rank has a part to give.
void save_models(const CompareOptions& options, const Contestant& dense, const Contestant& moe) {
  for (const Contestant* c : {&dense, &moe}) {
    const std::string folder = options.output + "/" + c->name;
    std::filesystem::create_directories(folder);
    save_model(c->trainer.model, folder);
  }
}

void compare(CompareOptions& options) {
  RunOptions& run = options.run;
  Ranks ranks(options.ranks);
  settle(run);
  TORCH_CHECK_VALUE(run.model.kind != BlockKind::dense,
                    "--kind is dense, expected moe or hybrid: the dense model is "
                    "made from it");
  TORCH_CHECK_VALUE(options.evaluations >= 1, "--evaluations is ", options.evaluations, ", expected 1 or more");
  const std::shared_ptr<const ByteText> text = load_text_of(run);
  const LanguageModelOptions twin = dense_twin(run.model);
  if (ranks.first()) prepare_output(options.output);
  check_report_files();  // before a long run, not after it
  ranks.check_same(run, *text, fmt::format("--evaluations {}", options.evaluations));
  fit_minutes(run, {twin, run.model}, text, ranks);
  Contestant dense = contestant("dense", twin, run.training, text, ranks.layout()),
             moe = contestant("moe", run.model, run.training, text, ranks.layout());
  if (ranks.first()) describe(twin, run.model, run, *text, ranks.size());
  catch_interrupts();
  run_contest(dense, moe, std::min(options.evaluations, run.training.steps), ranks);
  save_models(options, dense, moe);
  Json layers = layers_json(options, *text, moe);
  if (!ranks.first()) return;
  write_results(options, settings_json(options, *text, ranks.size(), dense, moe), std::move(layers), dense, moe);
  fmt::print("{}\nWritten: {}/compare.json, curves.jsonl, telemetry.jsonl, dense/, moe/\nThe report: {}/report.html\n",
             table(dense, moe), options.output, options.output);
}

}  // namespace

void add_compare(CLI::App& program) {
  CLI::App* app =
      program.add_subcommand("compare", "Train a dense model and an MoE of equal FLOPs a token, side by side");
  auto options = std::make_shared<CompareOptions>();
  auto arguments = std::make_shared<RunArguments>(*app, options->run);
  app->add_option("--output", options->output, "Folder of the results; replaces those of an earlier run there")
      ->capture_default_str();
  app->add_option("--evaluations", options->evaluations, "Points of the curves")->capture_default_str();
  add_rank_options(*app, options->ranks);
  app->footer(
      "Examples:\n"
      "  turnout compare\n"
      "  turnout compare --experts 32 --top-k 1 --router probability --minutes 10\n"
      "  turnout compare --text book.txt notes/ --layers 2 --hidden 64 --tokens 500000\n"
      "  torchrun --no-python --nproc-per-node 2 turnout compare");
  app->callback([options, arguments] { compare(*options); });
}

}  // namespace turnout::cli
