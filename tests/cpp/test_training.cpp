// Training: schedule, optimizer, held-out text, resume to the same bits, divergence.
#include <turnout/training.h>

#include "helpers.h"
#include "tiny_models.h"

#include <torch/nn/utils/clip_grad.h>
#include <torch/optim/adamw.h>

#include <fstream>
#include <set>

namespace turnout {
namespace {

using testing::repeated_text;
using testing::tiny_model;
using testing::tiny_options;
using testing::tiny_training;

class Training : public testing::FolderTest {};

TEST_F(Training, ScheduleRisesThenFallsAlongACosine) {
  TrainingOptions o;
  o.learning_rate = 1.0;
  o.final_fraction = 0.1;
  o.warmup_steps = 10;
  o.steps = 110;
  EXPECT_DOUBLE_EQ(learning_rate(o, 0), 0.1);
  EXPECT_DOUBLE_EQ(learning_rate(o, 9), 1.0);
  EXPECT_DOUBLE_EQ(learning_rate(o, 10), 1.0);
  EXPECT_NEAR(learning_rate(o, 60), 0.1 + 0.9 / 2, 1e-12);
  EXPECT_NEAR(learning_rate(o, 110), 0.1, 1e-12);
}

TEST_F(Training, OnlyMatricesDecay) {
  LanguageModelOptions options = tiny_options(BlockKind::hybrid);
  options.bias = true;
  options.moe.gate_bias = true;
  std::set<std::string> decayed;
  ByteLanguageModel model = tiny_model(options);
  for (const auto& item : model->named_parameters())
    if (decays(item.key(), item.value())) decayed.insert(item.key());
  std::set<std::string> expected = {"head.weight"};
  for (const std::string layer : {"layer_0.", "layer_1."})
    for (const char* name : {"attention.qkv.weight", "attention.out.weight", "hybrid.dense.up", "hybrid.dense.down",
                             "hybrid.moe.gate.weight", "hybrid.moe.experts.up", "hybrid.moe.experts.down"})
      expected.insert(layer + name);
  EXPECT_EQ(decayed, expected);
}

TEST_F(Training, StepsLikeTheAdamWOfTorch) {
  // One byte repeated: every batch is the same, whatever is drawn.
  TrainingOptions training = tiny_training(2);
  training.warmup_steps = 0;
  training.clip = 0.05;
  training.epsilon = 1e-5;  // above the rounding noise of gradients that are 0 in exact arithmetic
  ByteLanguageModel ours = tiny_model(tiny_options()), theirs = tiny_model(tiny_options());
  Trainer trainer(ours, training, repeated_text("a"));
  std::vector<at::Tensor> decayed, others;
  for (const auto& item : theirs->named_parameters())
    (decays(item.key(), item.value()) ? decayed : others).push_back(item.value());
  using torch::optim::AdamWOptions;
  const auto group = [&](const std::vector<at::Tensor>& parameters, double decay) {
    return torch::optim::OptimizerParamGroup(
        parameters,
        std::make_unique<AdamWOptions>(
            AdamWOptions(1).betas({training.beta1, training.beta2}).eps(training.epsilon).weight_decay(decay)));
  };
  std::vector<torch::optim::OptimizerParamGroup> groups;
  groups.push_back(group(decayed, training.weight_decay));
  groups.push_back(group(others, 0.0));
  torch::optim::AdamW optimizer(groups);
  const at::Tensor tokens = at::full({4, 8}, 'a', at::kLong);
  for (int64_t step = 0; step < 2; ++step) {
    const double norm = trainer.step().gradient_norm;
    for (auto& g : optimizer.param_groups()) g.options().set_lr(learning_rate(training, step));
    optimizer.zero_grad();
    const LanguageModelOutput out = theirs(tokens);
    (at::cross_entropy_loss(out.logits.flatten(0, 1), tokens.flatten()) + out.aux_loss).backward();
    const double their_norm = torch::nn::utils::clip_grad_norm_(theirs->parameters(), training.clip);
    EXPECT_NEAR(norm, their_norm, 1e-5 * their_norm);
    EXPECT_GT(norm, training.clip) << "the case must clip";
    optimizer.step();
  }
  // A step moves a number by up to the rate; the two differ by the 1e-6 that torch adds to the norm before it divides
  // (a share of 1e-6 / norm < 2e-5) and by noise of 1e-9 over an epsilon of 1e-5.
  const auto reference = module_tensors(*theirs);
  for (const auto& [name, parameter] : module_tensors(*ours))
    EXPECT_LT((parameter - reference.at(name)).abs().max().item<double>(), 1e-3 * training.learning_rate) << name;
}

TEST_F(Training, LearnsATinyTextAndContinuesIt) {
  for (const BlockKind kind : {BlockKind::dense, BlockKind::moe, BlockKind::hybrid}) {
    Trainer trainer(tiny_model(tiny_options(kind)), tiny_training(80), repeated_text("turn out! "));
    const double before = trainer.evaluate();
    while (!trainer.done()) trainer.step();
    EXPECT_GT(before, 7.0);
    EXPECT_LT(trainer.evaluate(), 1.0);
    EXPECT_EQ(generate(trainer.model, "turn out! turn", {.tokens = 10, .temperature = 0}), " out! turn");
    EXPECT_SAYS(trainer.step(), "all 80 steps are done");
  }
}

TEST_F(Training, AUniformModelNeedsEightBitsAByte) {
  Trainer trainer(tiny_model(tiny_options()), tiny_training(5), repeated_text("abcdefg"));
  const at::NoGradGuard no_grad;
  trainer.model->head->weight.zero_();
  EXPECT_NEAR(trainer.evaluate(), 8.0, 1e-6);
}

TEST_F(Training, EvaluationChangesNothing) {
  LanguageModelOptions model = tiny_options();
  model.moe.capacity.factor = 0.8;
  model.moe.capacity.order = DropOrder::random;
  std::vector<float> drawn;
  const auto run = [&](bool evaluate) {
    Trainer trainer(tiny_model(model), tiny_training(4), repeated_text("some text."));
    while (!trainer.done()) {
      at::manual_seed(7);
      if (evaluate) trainer.evaluate();
      drawn.push_back(at::rand({1}).item<float>());
      trainer.step();
    }
    save_tensors(path("state"), trainer.state());
    return read_file(path("state"), 1 << 24);
  };
  EXPECT_EQ(run(false), run(true));
  for (const float number : drawn) EXPECT_EQ(number, drawn.front()) << "the random state moved";
}

TEST_F(Training, AResumedRunReachesTheSameBits) {
  LanguageModelOptions model = tiny_options();
  model.moe.capacity.factor = 0.8;
  model.moe.capacity.order = DropOrder::random;
  const auto text = repeated_text("the quick brown fox");
  const auto finish = [&](Trainer& trainer, const std::string& name) {
    int64_t dropped = 0;
    while (!trainer.done()) dropped += trainer.step().dropped;
    EXPECT_GT(dropped, 0) << "the case must draw";
    save_tensors(path(name), trainer.state());
    return read_file(path(name), 1 << 24);
  };
  Trainer unbroken(tiny_model(model), tiny_training(6), text);
  Trainer first(tiny_model(model), tiny_training(6), text);
  for (int i = 0; i < 3; ++i) first.step();
  save_tensors(path("half"), first.state());
  at::rand({7});  // the state of torch's generator must not matter
  Trainer second(tiny_model(model, /*seed=*/99), tiny_training(6), text);
  second.load_state(load_tensors(path("half")), path("half"));
  EXPECT_EQ(second.steps_done(), 3);
  const std::string resumed = finish(second, "resumed");
  EXPECT_EQ(finish(unbroken, "unbroken"), resumed);
}

TEST_F(Training, AStateThatDoesNotBelongIsRefused) {
  const auto text = repeated_text("abc");
  Trainer trainer(tiny_model(tiny_options()), tiny_training(6), text);
  const TensorFile state = trainer.state();
  EXPECT_SAYS(trainer.load_state({}, "f"), "f: is no training state");
  Trainer other_text(tiny_model(tiny_options()), tiny_training(6), repeated_text("abd"));
  EXPECT_SAYS(other_text.load_state(state, "f"), "f: was trained on another text");
  Trainer other_steps(tiny_model(tiny_options()), tiny_training(7), text);
  EXPECT_SAYS(other_steps.load_state(state, "f"), "f: was trained with other options");
  Trainer other_model(tiny_model(tiny_options(BlockKind::dense)), tiny_training(6), text);
  EXPECT_SAYS(other_model.load_state(state, "f"), "f: holds another model");
  TensorFile damaged = state;
  damaged.metadata["step"] = "-1";
  EXPECT_SAYS(trainer.load_state(damaged, "f"), "step is '-1'");
  damaged = state;
  damaged.tensors.erase("optimizer.average.norm.bias");
  damaged.tensors["optimizer.average.norm.weight"] = at::zeros(1);
  EXPECT_SAYS(trainer.load_state(damaged, "f"), "'optimizer.average.norm.bias' is missing");
  EXPECT_SAYS(trainer.load_state(damaged, "f"), "'optimizer.average.norm.weight' has another shape");
  for (const char* name : {"model.norm.bias", "optimizer.average.norm.bias"}) {
    damaged = state;
    damaged.tensors[name] = at::full_like(state.tensors.at(name), NAN);
    EXPECT_SAYS(trainer.load_state(damaged, "f"), (std::string("'") + name + "' holds numbers that are not").c_str());
  }
}

TEST_F(Training, DivergenceNamesStepAndLayerAndKeepsTheWeights) {
  Trainer trainer(tiny_model(tiny_options()), tiny_training(6), repeated_text("abc"));
  trainer.step();
  {
    const at::NoGradGuard no_grad;
    trainer.model->blocks[1]->attention->qkv->weight[0][0] = NAN;
  }
  const at::Tensor before = trainer.model->head->weight.detach().clone();
  try {
    trainer.step();
    ADD_FAILURE() << "went on";
  } catch (const DivergenceError& error) {
    EXPECT_EQ(error.step, 2);
    EXPECT_EQ(error.where, "layer 1");
    EXPECT_NE(std::string(error.what()).find("diverged at step 2, layer 1"), std::string::npos) << error.what();
  }
  EXPECT_TRUE(at::equal(trainer.model->head->weight, before));
  EXPECT_EQ(trainer.steps_done(), 1);
}

TEST_F(Training, ImpossibleOptionsAndTextsAreNamed) {
  TrainingOptions options = tiny_training(0);
  EXPECT_SAYS(check(options), "steps is 0");
  options = tiny_training(1);
  options.learning_rate = NAN;
  EXPECT_SAYS(check(options), "learning_rate is nan");
  options = tiny_training(1);
  options.clip = 0;
  EXPECT_SAYS(check(options), "clip is 0");
  EXPECT_SAYS(Trainer(tiny_model(tiny_options()), tiny_training(1), repeated_text("a", 8)),
              "training text has 8 bytes");
}

TEST_F(Training, HeldOutFilesAreWholeStableAndNeverTrainedOn) {
  for (int i = 0; i < 200; ++i)
    std::ofstream(path("file" + std::to_string(i) + ".txt")) << "<" << i << ">" << std::string(50, 'x');
  const ByteText text = load_text({folder});
  EXPECT_EQ(text.training_files.size() + text.held_out_files.size(), 200u);
  // One in twenty of 200: 10 ± 3 · sqrt(200 · 0.05 · 0.95) ≈ 9.2
  EXPECT_GE(text.held_out_files.size(), 1u);
  EXPECT_LE(text.held_out_files.size(), 20u);
  std::set<std::string> training(text.training_files.begin(), text.training_files.end());
  for (const std::string& name : text.held_out_files) {
    EXPECT_FALSE(training.count(name)) << name;
    const std::string mark = "<" + name.substr(4, name.find('.') - 4) + ">";
    EXPECT_NE(text.held_out.find(mark), std::string::npos) << name;
    EXPECT_EQ(text.training.find(mark), std::string::npos) << name;
  }
  // Other files leave the choice as it is.
  std::ofstream(path("another.txt")) << "another";
  const ByteText more = load_text({folder});
  for (const std::string& name : text.held_out_files)
    EXPECT_EQ(std::count(more.held_out_files.begin(), more.held_out_files.end(), name), 1) << name;
  EXPECT_NE(more.digest(), text.digest());
  EXPECT_EQ(load_text({folder}).digest(), more.digest());
}

TEST_F(Training, AFileFoundTwiceIsReadOnce) {
  std::filesystem::create_directory(path("below"));
  for (int i = 0; i < 40; ++i) std::ofstream(path("below/file" + std::to_string(i))) << "<" << i << ">";
  const ByteText text = load_text({folder});
  EXPECT_EQ(load_text({folder, path("below"), path("below/../below/file3")}).digest(), text.digest());
}

TEST_F(Training, FoldersAreFilteredAndSingleFilesAreCut) {
  for (const char* name : {"src", "tests", ".hidden", "src/__pycache__"}) std::filesystem::create_directory(path(name));
  for (const char* name : {"src/a.py", "src/b.py", "src/c.txt", "tests/d.py", ".hidden/e.py", "src/__pycache__/f.py"})
    std::ofstream(path(name)) << name << std::string(100, ' ');
  std::ofstream(path("src/binary.py")) << std::string(10, '\0');
  std::ofstream(path("src/empty.py")) << "";
  const ByteText text = load_text({folder}, {.limit = 1 << 20, .extension = ".py"});
  EXPECT_EQ(text.training_files.size(), 1u);
  EXPECT_EQ(text.held_out_files.size(), 1u);
  const ByteText limited = load_text({folder}, {.limit = 150, .extension = ""});
  EXPECT_EQ(limited.training_files, std::vector<std::string>{"src/a.py"});

  std::ofstream(path("one")) << std::string(90, 'a') << std::string(10, 'b');
  const ByteText one = load_text({path("one")});
  EXPECT_EQ(one.training, std::string(90, 'a'));
  EXPECT_EQ(one.held_out, std::string(10, 'b'));
  EXPECT_SAYS(load_text({path("missing")}), (path("missing") + ": cannot read").c_str());
  EXPECT_SAYS(load_text({path("tests/none"), folder}), "tests/none");
  EXPECT_SAYS(load_text({path("src/empty.py")}), "no text found");
  EXPECT_SAYS(load_text({}), "no text found in no path at all");
}

}  // namespace
}  // namespace turnout
