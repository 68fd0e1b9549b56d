// What goes wrong between ranks ends in time, in words, and names the rank.
#include "ranks.h"

#include "../cpp/helpers.h"

#include <turnout/exchange.h>
#include <turnout/expert_parallel.h>

#include <torch/csrc/distributed/c10d/GroupRegistry.hpp>
#include <torch/nn/modules/linear.h>

#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <thread>

namespace turnout::testing {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;

constexpr seconds kTimeout{6};
constexpr double kLatest = 12;  // seconds: time-out, and what naming the rank takes on a busy machine

// Rows to the next rank and back, again and again, until something happens.
void exchange_for(const Group& group, seconds time) {
  const auto size = group.size;
  const auto end = std::chrono::steady_clock::now() + time;
  const std::vector<int64_t> each(size, 4);
  while (std::chrono::steady_clock::now() < end) {
    exchange_rows(at::ones({4 * size, 8}), each, each, group);
    std::this_thread::sleep_for(milliseconds(20));
  }
}

std::vector<Ending> run_with(int64_t ranks, const std::function<void(World&)>& body,
                             const std::function<void(const std::vector<pid_t>&)>& meddle = {}) {
  const auto common = local_world(ranks, kTimeout);
  return fork_ranks(
      ranks,
      [&](int64_t rank) {
        auto options = common;
        options.rank = rank;
        World world(options);
        body(world);
        return std::string("went on");
      },
      seconds(30), meddle);
}

void expect_told(const std::vector<Ending>& endings, int64_t culprit, const std::string& words) {
  for (size_t rank = 0; rank < endings.size(); ++rank) {
    if (static_cast<int64_t>(rank) == culprit) continue;
    const auto& ending = endings[rank];
    EXPECT_EQ(ending.status, 3) << "rank " << rank << ", signal " << ending.signal << ": " << ending.text;
    EXPECT_NE(ending.text.find("turnout: exchange of rows failed"), std::string::npos) << ending.text;
    EXPECT_NE(ending.text.find(words), std::string::npos) << ending.text;
    EXPECT_LE(ending.seconds, kLatest + 2) << ending.text;  // the meddling comes after 2 s
  }
}

void after_two_seconds(pid_t process, int signal) {
  std::this_thread::sleep_for(seconds(2));
  kill(process, signal);
}

TEST(Faults, DeadRankIsNamed) {
  const auto endings = run_with(3, [](World& world) { exchange_for(world.all(), seconds(25)); },
                                [](const auto& processes) { after_two_seconds(processes[1], SIGKILL); });
  expect_told(endings, 1, "rank 1");
}

TEST(Faults, StoppedRankIsNamed) {
  pid_t stopped = 0;
  const auto endings = run_with(3, [](World& world) { exchange_for(world.all(), seconds(25)); },
                                [&](const auto& processes) {
                                  stopped = processes[2];
                                  after_two_seconds(stopped, SIGSTOP);
                                });
  expect_told(endings, 2, "rank 2");
}

TEST(Faults, HolderOfTheStoreIsNamed) {
  for (const int signal : {SIGKILL, SIGSTOP}) {
    const auto endings = run_with(2, [](World& world) { exchange_for(world.all(), seconds(25)); },
                                  [&](const auto& processes) { after_two_seconds(processes[0], signal); });
    expect_told(endings, 0, "rank 0");
  }
}

TEST(Faults, RankThatGivesUpIsNamed) {
  const auto endings = run_with(3, [](World& world) {
    if (world.options.rank == 1) throw std::runtime_error("a reason of its own");
    exchange_for(world.all(), seconds(25));
  });
  EXPECT_EQ(endings[1].text, "a reason of its own");
  expect_told(endings, 1, "rank 1 left the run");
}

TEST(Faults, RowsThatDoNotFitAreRefused) {
  const auto endings = run_with(3, [](World& world) {
    const auto x = at::ones({2, world.options.rank == 2 ? 5 : 4});
    exchange_counts(at::ones({3}, at::kLong), expert_bounds(3, 3), x, world.all());
  });
  for (const auto& ending : endings) {
    EXPECT_EQ(ending.status, 3) << ending.text;
    EXPECT_EQ(ending.text, "turnout: exchange of rows failed: ranks 0, 1 have x Float [rows, 4], rank 2 has x Float "
                           "[rows, 5]");
  }
}

TEST(Faults, TensorsThatDoNotFitAreRefused) {
  const auto endings = run_with(2, [](World& world) {
    const auto layout = make_layout(world);
    const auto& all = world.all();
    const bool odd = world.options.rank == 1;
    const auto expect = [](const std::string& words, const std::function<void()>& call) {
      try {
        call();
        ADD_FAILURE() << "no " << words;
      } catch (const DistributedError& error) {
        EXPECT_EQ(error.what(), "turnout: " + words);
      }
    };
    expect("sum over ranks failed: rank 1 has x Float [2, 3], rank 0 has x Float [2, 4]",
           [&] { sum_over(at::ones({2, odd ? 3 : 4}), all); });
    expect("sum over ranks failed: rank 1 has x Double [2], rank 0 has x Float [2]",
           [&] { sum_over(at::ones({2}, odd ? at::kDouble : at::kFloat), all); });
    expect("sum over ranks failed: rank 1 has x Float [1], rank 0 has x Float []",
           [&] { sum_over(odd ? at::ones({1}) : at::ones({}), all); });
    expect("gathering of ranks failed: rank 0 has x Float [rows, 4], rank 1 has x Float [rows, 5]",
           [&] { gather_over(at::ones({odd ? 3 : 0, odd ? 5 : 4}), all); });
    expect("gathering of ranks failed: rank 1 has x Float [rows, 2, 3], rank 0 has x Float [rows, 3, 2]",
           [&] { gather_over(odd ? at::ones({1, 2, 3}) : at::ones({1, 3, 2}), all); });
    expect("gathering of ranks failed: rank 1 has x Byte [rows], rank 0 has x Float [rows]",
           [&] { gather_over(at::ones({2}, odd ? at::kByte : at::kFloat), all); });
    torch::nn::Linear linear(2, odd ? 3 : 2);
    expect("averaging of gradients failed: rank 0 has numbers in its parameters 6, rank 1 has numbers in its parameters 9",
           [&] { average_gradients(*linear, layout); });
  });
  for (const auto& ending : endings) EXPECT_EQ(ending.status, 0) << ending.text;
}

TEST(Faults, LayersOfOtherSizesAreRefused) {
  for (const bool by_others : {false, true}) {
    const auto endings = run_with(2, [&](World& world) {
      auto layout = make_layout(world);
      const auto made = c10d::resolve_process_group(world.all().name);
      if (by_others) {  // a group that a World does not know
        c10d::register_process_group("others", made);
        layout.all = layout.experts = find_group("others");
      }
      const MoEOptions options{.hidden = 4, .ffn = 4, .num_experts = world.options.rank == 1 ? 3 : 4};
      expert_parallel_moe(options, layout);
    });
    for (const auto& ending : endings)
      EXPECT_EQ(ending.text, "turnout: making of experts failed: rank 1 has num_experts 3, rank 0 has num_experts 4");
  }
}

TEST(Faults, LostRankOfAGroupThatOthersMadeIsNamed) {
  for (const int signal : {SIGKILL, SIGSTOP}) {
    const auto endings = run_with(3, [](World& world) {
      c10d::register_process_group("others", c10d::resolve_process_group(world.all().name));
      exchange_for(find_group("others"), seconds(25));
    }, [&](const auto& processes) { after_two_seconds(processes[2], signal); });
    expect_told(endings, 2, "rank 2 (last sign");
  }
}

// Its store then writes to connections whose other end is gone.
TEST(Faults, HolderOfTheStoreThatGoesOnTooLateSaysWhy) {
  const auto common = local_world(3, seconds(2));
  const auto endings = fork_ranks(
      3,
      [&](int64_t rank) {
        std::signal(SIGPIPE, SIG_DFL);
        auto options = common;
        options.rank = rank;
        World world(options);
        exchange_for(world.all(), seconds(20));
        return std::string();
      },
      seconds(30),
      [](const auto& processes) {
        after_two_seconds(processes[0], SIGSTOP);
        std::this_thread::sleep_for(seconds(6));
        kill(processes[0], SIGCONT);
      });
  EXPECT_EQ(endings[0].status, 3) << "signal " << endings[0].signal;
  EXPECT_NE(endings[0].text.find("no longer answers"), std::string::npos) << endings[0].text;
}

TEST(Faults, MissingRankIsNamedAtTheMeeting) {
  const auto common = local_world(3, seconds(2));
  const auto endings = fork_ranks(
      3,
      [&](int64_t rank) {
        if (rank == 2) return std::string();
        auto options = common;
        options.rank = rank;
        World world(options);
        return std::string();
      },
      seconds(20));
  EXPECT_NE(endings[0].text.find("rank 2 of 3 did not come within 2 s"), std::string::npos) << endings[0].text;
  EXPECT_NE(endings[1].text.find("turnout: the meeting of the ranks failed"), std::string::npos) << endings[1].text;
}

TEST(Faults, DifferentOptionsAreNamedAtTheStart) {
  const auto endings = run_with(3, [](World& world) {
    const std::string hidden = world.options.rank == 2 ? "64" : "128";
    world.check_same("model options", "{\n  \"layers\": 4,\n  \"hidden\": " + hidden + ",\n  \"heads\": 2\n}");
  });
  for (const auto& ending : endings)
    EXPECT_EQ(ending.text, "turnout: the ranks differ in model options: ranks 0, 1 have \"hidden\": 128, "
                           "rank 2 has \"hidden\": 64");
}

TEST(Faults, OperationThatOneRankLeavesOutEndsInTime) {
  const auto endings = run_with(2, [](World& world) {
    if (world.options.rank == 1) {
      std::this_thread::sleep_for(kTimeout + seconds(5));
      return;
    }
    exchange_for(world.all(), seconds(20));
  });
  EXPECT_EQ(endings[0].status, 3) << endings[0].text;
  EXPECT_NE(endings[0].text.find("every rank still answers"), std::string::npos) << endings[0].text;
  EXPECT_LE(endings[0].seconds, kLatest) << endings[0].text;
}

TEST(WorldOptions, ComeFromTheLaunchersVariables) {
  const auto endings = fork_ranks(1, [](int64_t) {
    EXPECT_EQ(world_options_from_environment().size, 1);
    setenv("RANK", "2", 1);
    EXPECT_SAYS(world_options_from_environment(), "the second is missing");
    setenv("WORLD_SIZE", "four", 1);
    EXPECT_SAYS(world_options_from_environment(), "WORLD_SIZE is 'four', expected a number");
    setenv("WORLD_SIZE", "4", 1);
    EXPECT_SAYS(world_options_from_environment(), "MASTER_ADDR is missing");
    setenv("MASTER_ADDR", "10.0.0.7", 1);
    setenv("MASTER_PORT", "1234", 1);
    setenv("TORCHELASTIC_USE_AGENT_STORE", "True", 1);
    setenv("TURNOUT_TIMEOUT", "9", 1);
    const auto options = world_options_from_environment();
    EXPECT_EQ(options.rank, 2);
    EXPECT_EQ(options.size, 4);
    EXPECT_EQ(options.host, "10.0.0.7");
    EXPECT_EQ(options.port, 1234);
    EXPECT_TRUE(options.launcher_holds_store);
    EXPECT_EQ(options.timeout, seconds(9));
    return std::string();
  }, seconds(20));
  EXPECT_EQ(endings[0].status, 0) << endings[0].text;
}

}  // namespace
}  // namespace turnout::testing
