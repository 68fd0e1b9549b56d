// Small models, texts and folders that the tests of models, checkpoints and training share.
#pragma once

#include <turnout/text.h>
#include <turnout/training.h>
#include <turnout/transformer.h>

#include <ATen/Context.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <memory>
#include <string>

namespace turnout::testing {

inline LanguageModelOptions tiny_options(BlockKind kind = BlockKind::moe) {
  LanguageModelOptions options;
  options.layers = 2;
  options.hidden = 16;
  options.heads = 2;
  options.context = 8;
  options.kind = kind;
  options.ffn = 24;
  options.moe.ffn = 12;
  options.moe.num_experts = 4;
  options.moe.top_k = 2;
  return options;
}

inline ByteLanguageModel tiny_model(const LanguageModelOptions& options, uint64_t seed = 1) {
  at::manual_seed(seed);
  return ByteLanguageModel(options);
}

inline TrainingOptions tiny_training(int64_t steps) {
  TrainingOptions options;
  options.steps = steps;
  options.batch = 4;
  options.warmup_steps = 2;
  options.learning_rate = 1e-2;
  options.eval_bytes = 64;
  return options;
}

/// `unit` repeated to `bytes` bytes, as both parts.
inline std::shared_ptr<const ByteText> repeated_text(const std::string& unit, size_t bytes = 400) {
  ByteText text;
  while (text.training.size() < bytes) text.training += unit;
  text.held_out = text.training;
  return std::make_shared<const ByteText>(std::move(text));
}

/// A folder of its own for each test, removed afterwards.
class FolderTest : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string name = (std::filesystem::temp_directory_path() / "turnout-test-XXXXXX").string();
    ASSERT_NE(mkdtemp(name.data()), nullptr);
    folder = name;
  }
  void TearDown() override { std::filesystem::remove_all(folder); }
  std::string path(const std::string& name) const { return folder + "/" + name; }

  std::string folder;
};

}  // namespace turnout::testing
