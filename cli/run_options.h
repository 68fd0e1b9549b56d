// The options that `compare` and `train` share, and what follows from them.
#pragma once

#include <turnout/expert_parallel.h>
#include <turnout/text.h>
#include <turnout/training.h>
#include <turnout/transformer.h>

#include <CLI/CLI.hpp>

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace turnout::cli {

struct RunOptions {
  LanguageModelOptions model;
  TrainingOptions training;
  int64_t ffn = 0;                ///< width of dense networks; 0 = derived from the MoE
  int64_t tokens = 1'500'000;     ///< to train on
  double minutes = 0;             ///< > 0: as many tokens as fit, measured first
  int64_t threads = 0;            ///< 0 = torch's choice
  std::vector<std::string> text;  ///< empty = Python's standard library
};

/// Options of one subcommand, bound to a RunOptions. Each can show the value that any RunOptions holds, so that a
/// resumed run can tell which of the given ones differ from the checkpoint's.
class RunArguments {
 public:
  RunArguments(CLI::App& app, RunOptions& options);

  /// @throws c10::ValueError naming the first given option whose value differs from the stored one
  void refuse_differences(RunOptions& stored, const std::string& source);

 private:
  struct Setting {
    CLI::Option* option;
    std::function<std::string(RunOptions&)> show;
  };
  template <class Get>
  CLI::Option* value(const std::string& flag, Get get, const std::string& help);
  template <class Get, class Parse>
  void word(const std::string& flag, Get get, Parse parse, const std::string& help);
  void add_model_options();
  void add_training_options();

  CLI::App& app_;
  RunOptions& options_;
  std::string group_;
  std::vector<Setting> settings_;
};

/// Sets what follows from the options: the width of dense networks, steps from tokens, torch's threads.
/// @throws c10::ValueError
void settle(RunOptions& options);

/// Sets torch's threads, and `threads` to how many they are. @throws c10::ValueError
void use_threads(RunOptions& options);

class Ranks;

/// Sets tokens so that all of `trained` together take options.minutes, by timing a few steps of throwaway copies, on the
/// first rank.
void fit_minutes(RunOptions& options, const std::vector<LanguageModelOptions>& trained,
                 const std::shared_ptr<const ByteText>& text, const Ranks& ranks);

/// The text of the options; by default the sources of Python's standard library.
std::shared_ptr<const ByteText> load_text_of(RunOptions& options);

/// Makes the folder and proves that files can be written there. @throws FileError
void prepare_output(const std::string& folder);

/// A model with weights drawn from the seed.
ByteLanguageModel make_model(const LanguageModelOptions& options, uint64_t seed, const ParallelLayout& layout);

}  // namespace turnout::cli
