// The same layer with NCCL and device tensors, where there are two GPUs.
#include "ranks.h"

#include "../cpp/helpers.h"

#include <turnout/expert_parallel.h>

#include <c10/core/DeviceGuard.h>

#include <filesystem>

namespace turnout::testing {
namespace {

TEST(Cuda, ExpertsOnTwoGpusGiveWhatOneProcessGives) {
  if (!std::filesystem::exists("/dev/nvidia1")) GTEST_SKIP() << "this machine has no two GPUs";
  const MoEOptions options{.hidden = 12, .ffn = 10, .num_experts = 5};
  on_ranks(
      2,
      [&](World& world) {
        const auto rank = world.options.rank;
        const at::Device device(at::kCUDA, static_cast<c10::DeviceIndex>(rank));
        const c10::DeviceGuard guard(device);
        at::manual_seed(7);
        const auto x = at::randn({10, 12}), grad = at::randn({10, 12});
        at::manual_seed(11);
        MoE whole(options);
        const auto truth = whole->forward(x).output;
        truth.backward(grad);
        at::manual_seed(11);
        const auto layout = make_layout(world, 0, 2);
        auto moe = expert_parallel_moe(options, layout);
        moe->to(device);
        const auto y = moe->forward(x.narrow(0, 5 * rank, 5).to(device)).output;
        y.backward(grad.narrow(0, 5 * rank, 5).to(device));
        average_gradients(*moe, layout);
        EXPECT_TRUE(at::allclose(y.cpu(), truth.narrow(0, 5 * rank, 5), 1e-3, 1e-4));
        const auto range = moe->experts->as<ExpertParallelImpl>()->range();
        const auto up = dynamic_cast<FeedForwardBankImpl&>(*whole->experts).up.grad().narrow(0, range.first, range.count);
        EXPECT_TRUE(at::allclose(moe->experts->named_parameters()["up"].grad().cpu() * 2, up, 1e-3, 1e-4));
      },
      "nccl");
}

TEST(Backend, IsOneOfTwo) {
  auto options = local_world(2, std::chrono::seconds(5));
  options.backend = "carrier pigeon";
  EXPECT_SAYS(World world(options), "backend is 'carrier pigeon', expected gloo or nccl");
}

}  // namespace
}  // namespace turnout::testing
