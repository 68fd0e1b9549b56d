// `turnout train`: one model, with checkpoints that a killed run goes on from to the same bits.
#include "commands.h"
#include "ranks.h"
#include "run_options.h"
#include "terminal.h"

#include <turnout/telemetry.h>

#include <c10/util/Exception.h>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <filesystem>

namespace turnout::cli {
namespace {

constexpr const char* kProgramKey = "program";
constexpr int64_t kLongestTelemetry = int64_t{1} << 30;

struct TrainOptions {
  RunOptions run;
  std::string output = "runs/train";
  int64_t checkpoint_every = 200;
  bool resume = false;
  RankOptions ranks;
};

// A path may hold any bytes, JSON only UTF-8: other bytes than ASCII are written %C3, as in an address.
std::vector<std::string> encoded(const std::vector<std::string>& paths) {
  std::vector<std::string> all;
  for (const std::string& path : paths) {
    std::string& text = all.emplace_back();
    for (const char c : path) {
      const auto byte = static_cast<unsigned char>(c);
      text += byte >= 0x80 || c == '%' ? fmt::format("%{:02X}", byte) : std::string(1, c);
    }
  }
  return all;
}

std::vector<std::string> decoded(const std::vector<std::string>& texts) {
  std::vector<std::string> all;
  for (const std::string& text : texts) {
    std::string& path = all.emplace_back();
    for (size_t i = 0; i < text.size(); ++i) {
      if (text[i] != '%') {
        path += text[i];
      } else {
        path += static_cast<char>(std::strtoul(text.substr(i + 1, 2).c_str(), nullptr, 16));
        i += 2;
      }
    }
  }
  return all;
}

std::string telemetry_path(const TrainOptions& options) { return options.output + "/telemetry.jsonl"; }

// The telemetry goes first: a run that is killed in between finds lines too many, never too few.
void save_run(const TrainOptions& options, const Trainer& trainer, const Telemetry& telemetry, const Ranks& ranks) {
  if (ranks.first()) write_file(telemetry_path(options), telemetry.jsonl());
  const nlohmann::ordered_json program = {{"ffn", options.run.ffn},
                                          {"tokens", options.run.tokens},
                                          {"minutes", options.run.minutes},
                                          {"threads", options.run.threads},
                                          {"text", encoded(options.run.text)}};
  save_checkpoint(options.output, trainer, {{kProgramKey, program.dump()}});
}

RunOptions stored_options(const TensorFile& state, const std::string& path) {
  const StateOptions of_state = state_options(state, path);
  RunOptions run;
  run.model = of_state.model;
  run.training = of_state.training;
  const auto found = state.metadata.find(kProgramKey);
  if (found == state.metadata.end()) throw FileError(path + ": was not written by turnout train");
  try {
    const auto program = nlohmann::ordered_json::parse(found->second);
    run.ffn = program.at("ffn").get<int64_t>();
    run.tokens = program.at("tokens").get<int64_t>();
    run.minutes = program.at("minutes").get<double>();
    run.threads = program.at("threads").get<int64_t>();
    run.text = decoded(program.at("text").get<std::vector<std::string>>());
  } catch (const nlohmann::json::exception&) {
    throw FileError(path + ": was not written by turnout train");
  }
  return run;
}

void refuse_overwriting(const std::string& folder) {
  std::vector<std::string> there = find_checkpoints(folder);
  const std::string model = folder + "/model.safetensors";
  if (std::error_code error; std::filesystem::exists(model, error)) there.push_back(model);
  if (!there.empty())
    throw FileError(there.front() + ": is there already: go on with --resume, or give another --output");
}

Telemetry telemetry_of(const TrainOptions& options, const Trainer& trainer, const Ranks& ranks) {
  Telemetry telemetry(to_string(trainer.model->options.kind), trainer);
  const std::string path = telemetry_path(options);
  if (std::error_code error; options.resume && ranks.first() && std::filesystem::exists(path, error))
    telemetry.load(read_file(path, kLongestTelemetry), trainer.steps_done(), path);
  return telemetry;
}

void run_steps(const TrainOptions& options, Trainer& trainer, Telemetry& telemetry, const Ranks& ranks) {
  Progress progress(trainer.options.steps, ranks.first());
  const auto start = std::chrono::steady_clock::now();
  const int64_t first = trainer.steps_done();
  while (!trainer.done()) {
    const auto before = std::chrono::steady_clock::now();
    const StepReport report = trainer.step(telemetry.due(trainer));
    telemetry.add(report, std::chrono::duration<double>(std::chrono::steady_clock::now() - before).count());
    if (progress.due(report.step)) {
      const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
      const auto tokens = static_cast<double>((report.step - first) * trainer.tokens_per_step());
      progress.update(report.step, fmt::format("{:.3f} bits/byte  {} tokens/s", report.bits_per_byte,
                                               short_number(tokens / seconds)));
    }
    const bool stop = ranks.interrupted_anywhere();
    if (stop || trainer.done() || report.step % options.checkpoint_every == 0)
      save_run(options, trainer, telemetry, ranks);
    if (stop && !trainer.done())
      throw Interrupted(fmt::format("stopped at step {} of {}; go on with --resume --output {}", report.step,
                                    trainer.options.steps, options.output));
  }
}

// What the trial of chunks found; empty where there was none, or too few steps.
std::string found_chunks(const ChunkTrial& trial) {
  std::string text;
  for (const auto& [chunks, seconds] : trial.medians())
    text += fmt::format("{}{:.1f} ms with {}", text.empty() ? "" : ", ", 1e3 * seconds, chunks);
  return text.empty() ? "" : fmt::format("chunks of an exchange: {} (a step took {})\n", trial.chunks(), text);
}

void describe(const RunOptions& run, const Trainer& trainer, const Ranks& ranks) {
  fmt::print("{} parameters, {} active; FLOPs a token: {}\n", count_parameters(run.model).total,
             count_parameters(run.model).active, to_string(flops_per_token(run.model)));
  if (ranks.size() > 1)
    fmt::print("{} ranks, experts on {} of them, {} times\n", ranks.size(), ranks.layout().experts.size,
               ranks.layout().replicas.size);
  if (trainer.done())
    fmt::print("all {} steps are done already\n", run.training.steps);
  else
    fmt::print("steps {} to {} of {} x {} tokens\n", trainer.steps_done() + 1, run.training.steps, run.training.batch,
               run.model.context);
  std::fflush(stdout);
}

// In words that differ where ranks would begin at different steps.
std::string start_of(const Checkpoint& checkpoint) {
  if (checkpoint.path.empty()) return "no --resume";
  const auto step = checkpoint.state.metadata.find("step");
  return "--resume from step " + (step == checkpoint.state.metadata.end() ? "" : step->second);
}

void train(TrainOptions& options, RunArguments& arguments) {
  TORCH_CHECK_VALUE(options.checkpoint_every >= 1, "--checkpoint-every is ", options.checkpoint_every,
                    ", expected 1 or more");
  RunOptions& run = options.run;
  Ranks ranks(options.ranks);
  Checkpoint checkpoint;
  if (options.resume) {
    checkpoint = open_checkpoint(options.output);
    RunOptions stored = stored_options(checkpoint.state, checkpoint.path);
    arguments.refuse_differences(stored, checkpoint.path);
    run = stored;
    use_threads(run);
  } else {
    if (ranks.first()) refuse_overwriting(options.output);
    settle(run);
  }
  const std::shared_ptr<const ByteText> text = load_text_of(run);
  if (ranks.first()) prepare_output(options.output);
  ranks.check_same(run, *text,
                   fmt::format("--checkpoint-every {}\n{}", options.checkpoint_every, start_of(checkpoint)));
  if (!options.resume) fit_minutes(run, {run.model}, text, ranks);
  Trainer trainer(make_model(run.model, run.training.seed, ranks.layout()), run.training, text);
  if (options.resume) trainer.load_state(checkpoint.state, checkpoint.path);
  checkpoint = {};
  Telemetry telemetry = telemetry_of(options, trainer, ranks);
  if (ranks.first()) describe(run, trainer, ranks);
  catch_interrupts();
  run_steps(options, trainer, telemetry, ranks);
  const double bits = trainer.evaluate();
  save_model(trainer.model, options.output);
  if (ranks.first())
    fmt::print(
        "{}held-out text: {:.4f} bits a byte\ntelemetry: {:.2f} % of the time of the steps\n"
        "Written: {}/model.safetensors, config.json, telemetry.jsonl\n",
        found_chunks(trainer.chunk_trial()), bits, 100 * telemetry.share(), options.output);
}

}  // namespace

void add_train(CLI::App& program) {
  CLI::App* app = program.add_subcommand("train", "Train one model, with checkpoints");
  auto options = std::make_shared<TrainOptions>();
  auto arguments = std::make_shared<RunArguments>(*app, options->run);
  app->add_option("--output", options->output, "Folder of checkpoint and model")->capture_default_str();
  app->add_option("--checkpoint-every", options->checkpoint_every, "Steps between checkpoints")->capture_default_str();
  app->add_flag("--resume", options->resume,
                "Go on from the checkpoint in the output folder, with its options; one given anew must equal its own");
  add_rank_options(*app, options->ranks);
  app->footer(
      "Examples:\n"
      "  turnout train --output runs/mine --tokens 5000000\n"
      "  turnout train --output runs/mine --resume\n"
      "  turnout train --kind dense --output runs/dense  the dense model of equal FLOPs\n"
      "  torchrun --no-python --nproc-per-node 2 turnout train --output runs/two");
  app->callback([options, arguments] { train(*options, *arguments); });
}

}  // namespace turnout::cli
