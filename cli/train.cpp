// `turnout train`: one model, with checkpoints that a killed run goes on from to the same bits.
#include "commands.h"
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

std::string checkpoint_path(const TrainOptions& options) { return options.output + "/checkpoint.safetensors"; }

std::string telemetry_path(const TrainOptions& options) { return options.output + "/telemetry.jsonl"; }

// The telemetry goes first: a run that is killed in between finds lines too many, never too few.
void save_checkpoint(const TrainOptions& options, const Trainer& trainer, const Telemetry& telemetry) {
  write_file(telemetry_path(options), telemetry.jsonl());
  TensorFile state = trainer.state();
  const nlohmann::ordered_json program = {{"ffn", options.run.ffn},
                                          {"tokens", options.run.tokens},
                                          {"minutes", options.run.minutes},
                                          {"threads", options.run.threads},
                                          {"text", encoded(options.run.text)}};
  state.metadata[kProgramKey] = program.dump();
  save_tensors(checkpoint_path(options), state);
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
  for (const char* name : {"checkpoint.safetensors", "model.safetensors"})
    if (std::error_code error; std::filesystem::exists(std::filesystem::path(folder) / name, error))
      throw FileError(folder + "/" + name + ": is there already: go on with --resume, or give another --output");
}

Telemetry telemetry_of(const TrainOptions& options, const Trainer& trainer) {
  Telemetry telemetry(to_string(trainer.model->options.kind), trainer);
  const std::string path = telemetry_path(options);
  if (std::error_code error; options.resume && std::filesystem::exists(path, error))
    telemetry.load(read_file(path, kLongestTelemetry), trainer.steps_done(), path);
  return telemetry;
}

void run_steps(const TrainOptions& options, Trainer& trainer, Telemetry& telemetry) {
  Progress progress(trainer.options.steps);
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
    const bool stop = interrupted();
    if (stop || trainer.done() || report.step % options.checkpoint_every == 0)
      save_checkpoint(options, trainer, telemetry);
    if (stop && !trainer.done())
      throw Interrupted(fmt::format("stopped at step {} of {}; go on with --resume --output {}", report.step,
                                    trainer.options.steps, options.output));
  }
}

void train(TrainOptions& options, RunArguments& arguments) {
  TORCH_CHECK_VALUE(options.checkpoint_every >= 1, "--checkpoint-every is ", options.checkpoint_every,
                    ", expected 1 or more");
  RunOptions& run = options.run;
  TensorFile state;
  if (options.resume) {
    state = load_tensors(checkpoint_path(options));
    RunOptions stored = stored_options(state, checkpoint_path(options));
    arguments.refuse_differences(stored, checkpoint_path(options));
    run = stored;
    use_threads(run);
  } else {
    refuse_overwriting(options.output);
    settle(run);
  }
  const std::shared_ptr<const ByteText> text = load_text_of(run);
  prepare_output(options.output);
  if (!options.resume) fit_minutes(run, {run.model}, text);
  Trainer trainer(make_model(run.model, run.training.seed), run.training, text);
  if (options.resume) trainer.load_state(state, checkpoint_path(options));
  state = {};
  Telemetry telemetry = telemetry_of(options, trainer);
  fmt::print("{} parameters, {} active; FLOPs a token: {}\n", count_parameters(run.model).total,
             count_parameters(run.model).active, to_string(flops_per_token(run.model)));
  fmt::print("steps {} to {} of {} x {} tokens\n", trainer.steps_done() + 1, run.training.steps, run.training.batch,
             run.model.context);
  std::fflush(stdout);
  catch_interrupts();
  run_steps(options, trainer, telemetry);
  const double bits = trainer.evaluate();
  save_model(trainer.model, options.output);
  fmt::print("held-out text: {:.4f} bits a byte\nWritten: {}/model.safetensors, config.json, telemetry.jsonl\n", bits,
             options.output);
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
  app->footer(
      "Examples:\n"
      "  turnout train --output runs/mine --tokens 5000000\n"
      "  turnout train --output runs/mine --resume\n"
      "  turnout train --kind dense --output runs/dense      the dense model of equal FLOPs");
  app->callback([options, arguments] { train(*options, *arguments); });
}

}  // namespace turnout::cli
