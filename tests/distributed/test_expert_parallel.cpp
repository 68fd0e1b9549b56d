// Expert parallelism against one process on the joined batch: outputs and all gradients.
#include "ranks.h"

#include "../cpp/helpers.h"

#include <turnout/chunk_trial.h>
#include <turnout/compat.h>

#include <ATen/autocast_mode.h>
#include <torch/csrc/autograd/autograd.h>

namespace turnout::testing {
namespace {

constexpr int64_t kHidden = 12;

/// One case: how many tokens each rank has, and where they go.
struct Case {
  std::string name;
  std::vector<int64_t> tokens;  // of each rank
  int64_t experts = 4;
  int64_t top_k = 2;
  int64_t chunks = 1;
  Activation activation = Activation::gelu;
  bool bias = true;
  bool all_to_one = false;
  at::ScalarType type = at::kFloat;
};

void PrintTo(const Case& c, std::ostream* out) { *out << c.name; }

MoEOptions options_of(const Case& c) {
  MoEOptions options{.hidden = kHidden, .ffn = 10, .num_experts = c.experts, .top_k = c.top_k};
  options.activation = c.activation;
  options.bias = c.bias;
  options.gate_bias = true;
  options.balance_coefficient = 0;
  options.shared = {6, true};
  return options;
}

template <class Layer>
void steer(Layer& moe, const Case& c) {
  moe->to(c.type);
  if (!c.all_to_one) return;
  const at::NoGradGuard no_grad;
  auto* gate = moe->gate.ptr()->template as<torch::nn::Linear>();
  gate->weight.mul_(1e-3);
  gate->bias[c.experts - 1] = 9;
  gate->bias[0] = 8;
}

/// bound() of helpers.h, also for a tensor without numbers.
double close_to(const at::Tensor& truth) {
  return truth.numel() == 0 ? 0 : bound(truth, 64, truth.scalar_type());
}

double difference(const at::Tensor& a, const at::Tensor& b) {
  return a.numel() == 0 ? 0 : (a - b).abs().max().item<double>();
}

class OnRanks : public ::testing::TestWithParam<Case> {};

void compare_with_one_process(World& world, const Case& c) {
  int64_t before = 0, all = 0;
  for (size_t r = 0; r < c.tokens.size(); ++r) {
    if (static_cast<int64_t>(r) < world.options.rank) before += c.tokens[r];
    all += c.tokens[r];
  }
  const int64_t own = c.tokens[world.options.rank];
  at::manual_seed(7);
  const auto x = at::randn({all, kHidden}, c.type), grad = at::randn({all, kHidden}, c.type);

  at::manual_seed(11);
  MoE whole(options_of(c));
  steer(whole, c);
  auto whole_x = x.clone().requires_grad_();
  const auto truth = whole->forward(whole_x).output;
  truth.backward(grad);

  at::manual_seed(11);
  const auto layout = make_layout(world, 0, c.chunks);
  auto moe = expert_parallel_moe(options_of(c), layout);
  steer(moe, c);
  auto own_x = x.narrow(0, before, own).clone().requires_grad_();
  const auto y = moe->forward(own_x).output;
  y.backward(grad.narrow(0, before, own));
  average_gradients(*moe, layout);

  const auto truth_own = truth.narrow(0, before, own), x_truth = whole_x.grad().narrow(0, before, own);
  EXPECT_LE(difference(y, truth_own), close_to(truth_own));
  EXPECT_LE(difference(own_x.grad(), x_truth), 4 * close_to(x_truth)) << "x";
  const auto parts = parts_of_banks(*moe);
  for (const auto& item : whole->named_parameters()) {
    auto expected = item.value().grad();
    if (const auto part = parts.find(item.key()); part != parts.end())
      expected = expected.narrow(0, part->second.first, part->second.count);
    const auto got = moe->named_parameters()[item.key()].grad() * static_cast<double>(world.options.size);
    ASSERT_EQ(got.sizes(), expected.sizes()) << item.key();
    EXPECT_LE(difference(got, expected), 4 * close_to(expected)) << item.key();
  }
}

TEST_P(OnRanks, GiveWhatOneProcessGivesOnTheJoinedBatch) {
  const Case& c = GetParam();
  on_ranks(static_cast<int64_t>(c.tokens.size()), [&](World& world) { compare_with_one_process(world, c); });
}

INSTANTIATE_TEST_SUITE_P(
    Exchange, OnRanks,
    ::testing::Values(Case{"one_rank", {9}}, Case{"two_ranks", {9, 7}},
                      Case{"three_ranks_uneven_experts", {5, 8, 6}, 7, 3, 1, Activation::swiglu, false},
                      Case{"four_ranks_two_empty", {0, 11, 0, 6}, 6}, Case{"no_tokens", {0, 0}},
                      Case{"all_to_one", {12, 5, 7}, 3, 2, 1, Activation::relu, true, true},
                      Case{"chunks", {20, 1, 9}, 8, 2, 2}, Case{"more_chunks_than_experts", {6, 9}, 3, 1, 4},
                      Case{"chunks_without_tokens", {0, 0}, 4, 2, 2},
                      Case{"float64", {6, 9}, 5, 2, 2, Activation::geglu, true, false, at::kDouble},
                      Case{"bfloat16", {6, 9}, 5, 2, 1, Activation::swiglu, true, false, at::kBFloat16}),
    [](const auto& info) { return info.param.name; });

TEST(ExpertBounds, AreEvenAndKeepUnitsWhole) {
  EXPECT_EQ(expert_bounds(7, 3), (std::vector<int64_t>{0, 3, 5, 7}));
  EXPECT_EQ(expert_bounds(12, 2, 4), (std::vector<int64_t>{0, 8, 12}));
  EXPECT_SAYS(expert_bounds(3, 4), "there are 3 experts for 4 ranks");
  EXPECT_SAYS(expert_bounds(7, 2, 4), "num_experts is 7, expected a multiple of 4");
}

TEST(ExchangeRows, IsDifferentiableTwice) {
  on_ranks(2, [](World& world) {
    const auto rank = world.options.rank;
    const std::vector<int64_t> send = rank == 0 ? std::vector<int64_t>{1, 2} : std::vector<int64_t>{0, 1};
    const std::vector<int64_t> receive = rank == 0 ? std::vector<int64_t>{1, 0} : std::vector<int64_t>{2, 1};
    auto rows = (at::arange(rank == 0 ? 3 : 1, at::kDouble) + 10.0 * rank).unsqueeze(1).requires_grad_();
    const auto got = exchange_rows(rows, send, receive, world.all());
    const std::vector<double> expected = rank == 0 ? std::vector<double>{0} : std::vector<double>{1, 2, 10};
    EXPECT_TRUE(at::equal(got.flatten(), at::tensor(expected, at::kDouble)));
    const auto first = torch::autograd::grad({got.pow(3).sum()}, {rows}, {}, true, true)[0];
    EXPECT_TRUE(at::allclose(first, 3 * rows.square()));
    const auto second = torch::autograd::grad({first.sum()}, {rows})[0];
    EXPECT_TRUE(at::allclose(second, 6 * rows));
  });
}

TEST(Gather, TakesUnevenLengthsInOrder) {
  on_ranks(3, [](World& world) {
    std::vector<int64_t> lengths;
    const auto all = gather_over(at::full({world.options.rank, 2}, world.options.rank, at::kLong), world.all(), &lengths);
    EXPECT_EQ(lengths, (std::vector<int64_t>{0, 1, 2}));
    EXPECT_EQ(numbers(all), (std::vector<int64_t>{1, 1, 2, 2, 2, 2}));
  });
}

TEST(ModuleExperts, LieOnRanksUnderTheirNumbers) {
  on_ranks(2, [](World& world) {
    const auto bounds = expert_bounds(3, 2);
    std::vector<torch::nn::AnyModule> local;
    for (auto e = bounds[world.options.rank]; e < bounds[world.options.rank + 1]; ++e) {
      torch::nn::Linear linear(torch::nn::LinearOptions(2, 2).bias(false));
      linear->weight.set_data(at::full({2, 2}, static_cast<double>(e + 1), at::kFloat));
      local.emplace_back(linear);
    }
    ExpertParallel experts(ModuleExperts(local).ptr(), world.all(), bounds);
    const auto ids_of = ids({{0, 2}, {1, -1}});
    const auto weights = at::ones({2, 2});
    const auto y = experts->forward(at::ones({2, 2}), weights, plan(ids_of, 3));
    EXPECT_TRUE(at::equal(y, at::tensor({8.f, 8.f, 4.f, 4.f}).view({2, 2}))) << y;
    const auto names = experts->named_parameters().keys();
    EXPECT_EQ(names, world.options.rank == 0 ? (std::vector<std::string>{"0.weight", "1.weight"})
                                             : (std::vector<std::string>{"2.weight"}));
  });
}

// Output, gradient of x, gradients of parameters.
std::vector<at::Tensor> run_in_chunks(const std::shared_ptr<ExpertsModule>& local, int64_t chunks, World& world) {
  ExpertParallel experts(local, world.all(), expert_bounds(7, 2), chunks);
  at::manual_seed(3 + world.options.rank);
  auto x = at::randn({20, kHidden}).requires_grad_();
  const auto weights = at::rand({20, 2});
  const auto choices = at::rand({20, 7}).argsort(int64_t{-1}).narrow(1, 0, 2);
  for (auto& parameter : local->parameters()) parameter.mutable_grad() = at::Tensor();
  const auto y = experts->forward(x, weights, plan(choices, 7));
  y.square().sum().backward();
  std::vector<at::Tensor> made{y, x.grad()};
  for (const auto& parameter : local->parameters()) made.push_back(parameter.grad());
  return made;
}

TEST(Chunks, ChangeNoBitOfAnyKindOfExperts) {
  on_ranks(2, [](World& world) {
    const FeedForwardOptions expert{kHidden, 10, Activation::swiglu};
    const int64_t held = world.options.rank == 0 ? 4 : 3;
    std::vector<torch::nn::AnyModule> modules;
    for (int64_t e = 0; e < held; ++e) modules.emplace_back(FeedForward(expert));
    for (const auto& local : std::vector<std::shared_ptr<ExpertsModule>>{
             FeedForwardBank(expert, held).ptr(), ModuleExperts(modules).ptr(), compat::ExpertList(expert, held).ptr()}) {
      const auto truth = run_in_chunks(local, 1, world);
      for (const int64_t chunks : {2, 4, 9}) {
        const auto made = run_in_chunks(local, chunks, world);
        for (size_t i = 0; i < truth.size(); ++i)
          EXPECT_TRUE(at::equal(made[i], truth[i])) << local->name() << ", " << chunks << " chunks, tensor " << i;
      }
    }
  });
}

TEST(Chunks, AreOfOneTypeOnRanksWithFewerExperts) {
  on_ranks(2, [](World& world) {
    const int64_t held = world.options.rank == 0 ? 2 : 1;
    FeedForwardBank bank(FeedForwardOptions{kHidden, 10, Activation::swiglu}, held);
    ExpertParallel experts(bank.ptr(), world.all(), expert_bounds(3, 2), 2);
    const auto x = at::ones({3, kHidden}).requires_grad_();
    at::autocast::set_autocast_enabled(at::kCPU, true);  // experts answer in bfloat16, the rows are float32
    const auto y = experts->forward(x, at::ones({3, 1}), plan(ids({{0}, {1}, {2}}), 3));
    at::autocast::set_autocast_enabled(at::kCPU, false);
    y.sum().backward();
    EXPECT_EQ(y.scalar_type(), at::kBFloat16);
    EXPECT_TRUE(y.isfinite().all().item<bool>() && x.grad().isfinite().all().item<bool>());
  });
}

TEST(Chunks, NoticeABankThatChangedBeforeTheBackward) {
  on_ranks(1, [](World& world) {
    FeedForwardBank bank(FeedForwardOptions{kHidden, 10, Activation::relu}, 4);
    ExpertParallel experts(bank.ptr(), world.all(), expert_bounds(4, 1), 2);
    const auto x = at::ones({3, kHidden}).requires_grad_();
    const auto y = experts->forward(x, at::ones({3, 1}), plan(ids({{0}, {1}, {3}}), 4));
    {
      const at::NoGradGuard no_grad;
      bank->up.mul_(2);
    }
    EXPECT_SAYS(y.sum().backward(), "modified by an inplace operation");
  });
}

TEST(ChunkTrial, KeepsWhatTheSlowestRankIsFastestWith) {
  on_ranks(2, [](World& world) {
    const MoEOptions options{.hidden = kHidden, .ffn = 10, .num_experts = 4};
    const auto chosen = [&](const ParallelLayout& layout, std::map<int64_t, double> first, std::map<int64_t, double> second) {
      auto moe = expert_parallel_moe(options, layout);
      ChunkTrial trial(*moe, layout);
      for (int64_t step = 0; step < 11; ++step)
        trial.add_step((world.options.rank == 0 ? first : second)[trial.chunks()] + (step < 2 ? 9 : 0));
      EXPECT_TRUE(trial.done());
      EXPECT_EQ(moe->experts->as<ExpertParallelImpl>()->chunks, trial.chunks());
      return trial.chunks();
    };
    const auto open = make_layout(world, 0, 0);
    EXPECT_EQ(chosen(open, {{1, 3.0}, {2, 2.0}, {4, 2.5}}, {{1, 1.0}, {2, 4.0}, {4, 1.0}}), 4);
    EXPECT_EQ(chosen(open, {{1, 1.0}, {2, 0.98}, {4, 0.99}}, {}), 1);  // no more than noise
    EXPECT_EQ(chosen(make_layout(world, 0, 2), {}, {}), 2);
    EXPECT_EQ(ChunkTrial(*MoE(options), {}).chunks(), 1);
  });
}

}  // namespace
}  // namespace turnout::testing
