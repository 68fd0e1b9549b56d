// Training on ranks: the steps, evaluations and checkpoints of one process.
#include "ranks.h"

#include "../cpp/tiny_models.h"

#include <turnout/exchange.h>
#include <turnout/training.h>

#include <csignal>
#include <fstream>
#include <thread>

namespace turnout::testing {
namespace {

constexpr int64_t kSteps = 10;

TrainingOptions training() {
  auto options = tiny_training(kSteps);
  options.batch = 12;
  return options;
}

LanguageModelOptions model_options() {
  auto options = tiny_options();
  options.moe.capacity.factor = 1.0;
  options.moe.z_coefficient = 1e-2;
  return options;
}

Trainer trainer_on(const ParallelLayout& layout) {
  at::manual_seed(1);
  return Trainer(ByteLanguageModel(model_options(), layout), training(), repeated_text("a line of text, and more. "));
}

/// What one process reaches after all steps.
struct Truth {
  std::vector<StepReport> reports;
  std::map<std::string, at::Tensor> parameters;
  double held_out = 0;
};

Truth train_alone() {
  Trainer trainer = trainer_on({});
  Truth truth;
  while (!trainer.done()) truth.reports.push_back(trainer.step());
  truth.parameters = module_tensors(*trainer.model);
  truth.held_out = trainer.evaluate();
  return truth;
}

// AdamW divides by the root of averaged squares: small differences of a gradient near 0 grow to the learning rate.
constexpr double kClose = 2e-3;

void expect_as_alone(Trainer& trainer, const Truth& truth) {
  const auto parts = parts_of_banks(*trainer.model);
  for (const auto& [name, parameter] : module_tensors(*trainer.model)) {
    auto expected = truth.parameters.at(name);
    if (const auto part = parts.find(name); part != parts.end())
      expected = expected.narrow(0, part->second.first, part->second.count);
    EXPECT_LE((parameter - expected).abs().max().item<double>(), kClose) << name;
  }
  EXPECT_NEAR(trainer.evaluate(), truth.held_out, kClose);
}

class TrainingOnRanks : public ::testing::TestWithParam<std::pair<int64_t, int64_t>> {};

TEST_P(TrainingOnRanks, TenStepsAreThoseOfOneProcess) {
  const auto [ranks, expert_ranks] = GetParam();
  on_ranks(ranks, [&, together = expert_ranks](World& world) {
    const auto truth = train_alone();
    Trainer trainer = trainer_on(make_layout(world, together, /*chunks=*/0));  // each number has its turn
    for (const auto& expected : truth.reports) {
      const auto report = trainer.step();
      EXPECT_NEAR(report.bits_per_byte, expected.bits_per_byte, kClose);
      EXPECT_NEAR(report.aux_loss, expected.aux_loss, 1e-4);
      EXPECT_NEAR(report.gradient_norm, expected.gradient_norm, 0.02 * expected.gradient_norm);
      EXPECT_EQ(report.choices, expected.choices);
      if (expected.step == 1) {
        EXPECT_EQ(report.dropped, expected.dropped);
        EXPECT_TRUE(at::equal(report.expert_load, expected.expert_load));
      }
    }
    expect_as_alone(trainer, truth);
  });
}

INSTANTIATE_TEST_SUITE_P(Training, TrainingOnRanks, ::testing::Values(std::pair{2, 0}, std::pair{3, 0}, std::pair{4, 2}),
                         [](const auto& info) {
                           return std::to_string(info.param.first) + "_ranks_" + std::to_string(info.param.second);
                         });

class ParallelCheckpoint : public FolderTest {
 protected:
  // Some steps on some ranks, from the folder's checkpoint where there is one.
  void go_on(int64_t ranks, int64_t until, const std::function<void(Trainer&)>& then = {}) {
    on_ranks(ranks, [&](World& world) {
      Trainer trainer = trainer_on(make_layout(world));
      if (!find_checkpoints(folder).empty()) {
        const auto checkpoint = open_checkpoint(folder);
        trainer.load_state(checkpoint.state, checkpoint.path);
      }
      while (trainer.steps_done() < until) trainer.step();
      save_checkpoint(folder, trainer);
      if (then) then(trainer);
    });
  }
};

TEST_F(ParallelCheckpoint, MovesFromFourRanksToOneToThree) {
  go_on(4, 3);
  EXPECT_EQ(find_checkpoints(folder), (std::vector<std::string>{path("checkpoint-3")}));
  EXPECT_TRUE(std::filesystem::exists(path("checkpoint-3/model-00004-of-00004.safetensors")));
  go_on(1, 6);
  EXPECT_EQ(find_checkpoints(folder), (std::vector<std::string>{path("checkpoint.safetensors")}));
  EXPECT_FALSE(std::filesystem::exists(path("checkpoint-3")));
  go_on(3, kSteps, [](Trainer& trainer) { expect_as_alone(trainer, train_alone()); });
  EXPECT_EQ(find_checkpoints(folder), (std::vector<std::string>{path("checkpoint-10")}));
}

TEST_F(ParallelCheckpoint, HoldsTheBitsOfTheStateWhateverTheRanks) {
  go_on(2, 2);
  const auto before = open_checkpoint(folder);
  go_on(3, 2);  // nothing trained: the same step is whole already, and stays
  go_on(1, 2);
  const auto after = open_checkpoint(folder);
  EXPECT_EQ(after.path, path("checkpoint.safetensors"));
  for (const auto& [name, tensor] : before.state.tensors) {
    const auto mark = name.rfind('#');
    const auto same = mark == std::string::npos
                          ? after.state.tensors.at(name)
                          : after.state.tensors.at(name.substr(0, mark))[std::stoll(name.substr(mark + 1))];
    EXPECT_TRUE(at::equal(tensor, same)) << name;
  }
}

TEST_F(ParallelCheckpoint, SurvivesAKillAtAnyMoment) {
  go_on(2, 1);
  for (const int milliseconds : {5, 40, 90}) {
    const auto common = local_world(2, std::chrono::seconds(6));
    fork_ranks(
        2,
        [&](int64_t rank) {
          auto options = common;
          options.rank = rank;
          World world(options);
          Trainer trainer = trainer_on(make_layout(world));
          const auto checkpoint = open_checkpoint(folder);
          trainer.load_state(checkpoint.state, checkpoint.path);
          if (rank == 0) std::ofstream(path("saving-" + std::to_string(milliseconds)));
          while (!trainer.done()) {
            trainer.step();
            save_checkpoint(folder, trainer);
          }
          return std::string();
        },
        std::chrono::seconds(30),
        [&](const std::vector<pid_t>& processes) {
          while (!std::filesystem::exists(path("saving-" + std::to_string(milliseconds))))
            std::this_thread::sleep_for(std::chrono::milliseconds(1));
          std::this_thread::sleep_for(std::chrono::milliseconds(milliseconds));
          for (const pid_t process : processes) kill(process, SIGKILL);
        });
    const auto checkpoint = open_checkpoint(folder);
    on_ranks(1, [&](World&) {
      Trainer trainer = trainer_on({});
      trainer.load_state(checkpoint.state, checkpoint.path);
      EXPECT_GE(trainer.steps_done(), 1);
    });
  }
}

TEST_F(ParallelCheckpoint, WithoutIndexIsNone) {
  go_on(1, 1);
  std::filesystem::create_directories(path("checkpoint-7"));
  std::ofstream(path("checkpoint-7/model-00001-of-00002.safetensors")) << "torn";
  EXPECT_EQ(open_checkpoint(folder).path, path("checkpoint.safetensors"));
}

TEST_F(ParallelCheckpoint, ThatOneRankCannotWriteFailsOnAll) {
  on_ranks(2, [&](World& world) {
    Trainer trainer = trainer_on(make_layout(world));
    std::string message;
    try {
      save_checkpoint("/proc/nothing", trainer);
    } catch (const FileError& error) {
      message = error.what();
    }
    EXPECT_NE(message, "");
  });
}

TEST_F(ParallelCheckpoint, OfAWholeModelIsWrittenByTheFirstRank) {
  on_ranks(2, [&](World& world) {
    const auto layout = make_layout(world);
    at::manual_seed(1);
    const ByteLanguageModel model(model_options(), layout);
    save_model(model, folder);
    sum_over(at::ones({1}), world.all());  // written by now
    const auto loaded = load_model(folder);
    for (const auto& [name, tensor] : module_tensors(*tiny_model(model_options())))
      EXPECT_TRUE(at::equal(module_tensors(*loaded).at(name), tensor)) << name;
  });
}

TEST(ParallelTraining, EvaluatesFewerWindowsThanRanks) {
  on_ranks(3, [](World& world) {
    auto options = training();
    options.eval_bytes = 16;  // two windows
    const auto evaluate = [&](const ParallelLayout& layout) {
      at::manual_seed(1);
      return Trainer(ByteLanguageModel(model_options(), layout), options, repeated_text("abcdefg")).evaluate();
    };
    EXPECT_NEAR(evaluate(make_layout(world)), evaluate({}), 1e-5);
  });
}

TEST(ParallelTraining, BatchIsAMultipleOfTheRanks) {
  on_ranks(2, [](World& world) {
    const auto layout = make_layout(world);
    auto options = training();
    options.batch = 3;
    std::string message;
    try {
      Trainer(ByteLanguageModel(model_options(), layout), options, repeated_text("abc"));
    } catch (const c10::Error& error) {
      message = error.what_without_backtrace();
    }
    EXPECT_EQ(message, "turnout: batch is 3, expected a multiple of 2 (the ranks)");
  });
}

}  // namespace
}  // namespace turnout::testing
