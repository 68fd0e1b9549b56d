// Telemetry: sums of each interval, what a hundred lines cover, going on after an interruption.
#include <turnout/telemetry.h>

#include "helpers.h"
#include "tiny_models.h"

#include <nlohmann/json.hpp>

#include <sstream>

namespace turnout {
namespace {

using testing::repeated_text;
using testing::tiny_model;
using testing::tiny_options;
using testing::tiny_training;
using Json = nlohmann::json;

std::vector<Json> lines_of(const std::string& jsonl, const std::string& kind) {
  std::vector<Json> lines;
  std::istringstream stream(jsonl);
  for (std::string text; std::getline(stream, text);)
    if (Json line = Json::parse(text); line.at("kind") == kind) lines.push_back(std::move(line));
  return lines;
}

LanguageModelOptions dropping_options() {
  LanguageModelOptions options = tiny_options();
  options.moe.capacity.factor = 0.8;
  options.moe.z_coefficient = 1e-3;
  return options;
}

// Trains to the end; every step is accounted for with the same second.
std::vector<StepReport> train(Trainer& trainer, Telemetry& telemetry, int64_t until) {
  std::vector<StepReport> reports;
  while (trainer.steps_done() < until) {
    reports.push_back(trainer.step(telemetry.due(trainer)));
    telemetry.add(reports.back(), 1.0);
  }
  return reports;
}

TEST(Telemetry, SumsAnIntervalAndLooksAtItsLastStep) {
  Trainer trainer(tiny_model(dropping_options()), tiny_training(250), repeated_text("telemetry. "));
  Telemetry telemetry("tiny", trainer);
  const std::vector<StepReport> reports = train(trainer, telemetry, 5);  // 250 steps: intervals of 3
  const auto intervals = lines_of(telemetry.jsonl(), "interval"), layers = lines_of(telemetry.jsonl(), "layer");
  ASSERT_EQ(intervals.size(), 1u);
  ASSERT_EQ(layers.size(), 2u);
  EXPECT_EQ(intervals[0]["first_step"], 1);
  EXPECT_EQ(intervals[0]["step"], 3);
  EXPECT_EQ(intervals[0]["tokens"], 3 * trainer.tokens_per_step());
  EXPECT_EQ(intervals[0]["seconds"], 3.0);
  const double bits = reports[0].bits_per_byte + reports[1].bits_per_byte + reports[2].bits_per_byte;
  EXPECT_DOUBLE_EQ(intervals[0]["bits_per_byte"], bits / 3);
  EXPECT_EQ(intervals[0]["model"], "tiny");
  EXPECT_DOUBLE_EQ(intervals[0]["learning_rate"], learning_rate(trainer.options, 2));
  for (int64_t layer = 0; layer < 2; ++layer) {
    const Json& line = layers[static_cast<size_t>(layer)];
    std::vector<int64_t> load(4);
    int64_t dropped = 0;
    for (int64_t step = 0; step < 3; ++step) {
      const StepReport& report = reports[static_cast<size_t>(step)];
      dropped += report.layer_dropped[layer].item<int64_t>();
      for (int64_t e = 0; e < 4; ++e) load[static_cast<size_t>(e)] += report.expert_load[layer][e].item<int64_t>();
    }
    EXPECT_EQ(line["load"], load);
    EXPECT_EQ(line["dropped"], dropped);
    EXPECT_GT(dropped, 0) << "the case must drop";
    EXPECT_EQ(line["choices"], load[0] + load[1] + load[2] + load[3] + dropped);
    const LayerReport& observed = reports[2].layers[static_cast<size_t>(layer)];
    EXPECT_EQ(line["layer"], observed.layer);
    EXPECT_DOUBLE_EQ(line["entropy"], observed.statistics.entropy.item<double>());
    EXPECT_DOUBLE_EQ(line["z_loss"], *observed.z_loss);
    EXPECT_DOUBLE_EQ(line["balance_loss"], *observed.balance_loss);
    EXPECT_GT(line["logit_rms"], 0.0);
    EXPECT_LE(line["logit_rms"], line["logit_max"]);
  }
  EXPECT_TRUE(reports[0].layers.empty() && reports[4].layers.empty()) << "only the last step of an interval is observed";
}

TEST(Telemetry, LossesOfALayerAddUpToTheAuxiliaryLoss) {
  const LanguageModelOptions options = dropping_options();
  Trainer trainer(tiny_model(options), tiny_training(2), repeated_text("losses"));
  const StepReport report = trainer.step(/*observe=*/true);
  double sum = 0;
  for (const LayerReport& layer : report.layers)
    sum += options.moe.balance_coefficient * *layer.balance_loss + options.moe.z_coefficient * *layer.z_loss;
  EXPECT_NEAR(sum, report.aux_loss, 1e-6);
}

TEST(Telemetry, ALongRunHasAHundredIntervalsAndAShortOneAllItsSteps) {
  for (const int64_t steps : {3, 40, 120, 260}) {
    Trainer trainer(tiny_model(tiny_options(BlockKind::dense)), tiny_training(steps), repeated_text("abc"));
    Telemetry telemetry("dense", trainer);
    train(trainer, telemetry, steps);
    const auto lines = lines_of(telemetry.jsonl(), "interval");
    EXPECT_EQ(lines.back()["step"], steps);
    EXPECT_GE(lines.size(), std::min<size_t>(static_cast<size_t>(steps), 67));
    EXPECT_LE(lines.size(), 150u);
    for (size_t i = 1; i < lines.size(); ++i)
      EXPECT_EQ(lines[i]["first_step"].get<int64_t>(), lines[i - 1]["step"].get<int64_t>() + 1);
    EXPECT_TRUE(lines_of(telemetry.jsonl(), "layer").empty());
  }
}

TEST(Telemetry, ItsShareIsWhatReportsAndWritingTook) {
  Trainer trainer(tiny_model(tiny_options()), tiny_training(9), repeated_text("abc"));
  Telemetry telemetry("tiny", trainer);
  EXPECT_EQ(telemetry.share(), 0.0);
  StepReport report = trainer.step(true);
  EXPECT_GT(report.report_seconds, 0.0);
  report.report_seconds = 250.0;
  telemetry.add(report, 1000.0);
  EXPECT_GT(telemetry.share(), 0.25);  // writing its lines adds to it
  EXPECT_NEAR(telemetry.share(), 0.25, 0.01);
}

TEST(Telemetry, GoesOnAfterAnInterruption) {
  const auto text = repeated_text("points and rails");
  Trainer unbroken(tiny_model(dropping_options()), tiny_training(9), text);
  Telemetry whole("tiny", unbroken);
  train(unbroken, whole, 9);
  Trainer first(tiny_model(dropping_options()), tiny_training(9), text);
  Telemetry before("tiny", first);
  train(first, before, 6);
  Trainer second(tiny_model(dropping_options()), tiny_training(9), text);
  Telemetry after("tiny", second);
  train(second, after, 4);  // a checkpoint of step 4 beside telemetry that reaches further
  after.load(before.jsonl(), 4, "file");
  train(second, after, 9);
  EXPECT_EQ(after.jsonl(), whole.jsonl());
}

TEST(Telemetry, AForeignFileIsRefusedByItsLine) {
  Trainer trainer(tiny_model(tiny_options()), tiny_training(9), repeated_text("abc"));
  Telemetry telemetry("tiny", trainer);
  const std::string own = telemetry.jsonl();
  EXPECT_SAYS(telemetry.load("{}\n", 1, "file"), "file: line 1 is no telemetry of this run");
  EXPECT_SAYS(telemetry.load(own + "not JSON\n", 1, "file"), "file: line 2");
  EXPECT_SAYS(telemetry.load(own + "[1]\n", 1, "file"), "file: line 2");
  EXPECT_SAYS(telemetry.load(own + "{\"step\": \"1\"}\n", 1, "file"), "file: line 2");
  EXPECT_EQ(telemetry.jsonl(), own);
}

}  // namespace
}  // namespace turnout
