// `turnout generate`: lets a trained model continue a text.
#include "commands.h"

#include <turnout/transformer.h>

#include <ATen/Parallel.h>

#include <cstdio>
#include <memory>
#include <string>

namespace turnout::cli {
namespace {

struct GenerateArguments {
  std::string model;
  std::string prompt;
  GenerateOptions options;
};

void run_generate(const GenerateArguments& arguments) {
  ByteLanguageModel model = load_model(arguments.model);
  model->eval();
  const std::string added = generate(model, arguments.prompt, arguments.options);
  const std::string text = arguments.prompt + added + "\n";
  std::fwrite(text.data(), 1, text.size(), stdout);
}

}  // namespace

void add_generate(CLI::App& program) {
  CLI::App* app = program.add_subcommand("generate", "Continue a text with a trained model");
  auto arguments = std::make_shared<GenerateArguments>();
  app->add_option("model", arguments->model, "Folder with config.json and model.safetensors")->required();
  app->add_option("--prompt", arguments->prompt, "Text to continue")->required();
  app->add_option("--tokens", arguments->options.tokens, "Bytes to add")->capture_default_str();
  app->add_option("--temperature", arguments->options.temperature, "0 = the most probable byte each time")
      ->capture_default_str();
  app->add_option("--seed", arguments->options.seed, "Of the draws")->check(kSeeds)->capture_default_str();
  app->footer(
      "Examples:\n"
      "  turnout generate runs/compare/moe --prompt 'import os'\n"
      "  turnout generate runs/mine --prompt 'class ' --temperature 0.5 --seed 7");
  app->callback([arguments] { run_generate(*arguments); });
}

}  // namespace turnout::cli
