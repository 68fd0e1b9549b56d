// The meeting of ranks at the store, their process groups, and their leave.
#include <turnout/world.h>

#include "distributed/address.h"
#include "distributed/difference.h"
#include "distributed/gloo.h"
#include "distributed/nccl.h"
#include "distributed/watch.h"

#include "../ops/checks.h"

#include <torch/csrc/distributed/c10d/GroupRegistry.hpp>
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <csignal>
#include <cstdlib>
#include <exception>
#include <numeric>
#include <sstream>
#include <thread>

namespace turnout {
namespace {

using std::chrono::milliseconds;

constexpr const char* kName = "turnout::World";

std::string seconds_text(milliseconds time) {
  std::ostringstream text;
  text << std::chrono::duration<double>(time).count() << " s";
  return text.str();
}

std::string join(const std::vector<int64_t>& numbers) {
  std::string text;
  for (const auto number : numbers) text.append(text.empty() ? "" : ", ").append(std::to_string(number));
  return text;
}

const char* variable(const char* name) {
  const char* value = std::getenv(name);
  return value != nullptr && *value != '\0' ? value : nullptr;
}

int64_t number_of(const char* name, const char* text) {
  char* end = nullptr;
  const auto number = std::strtoll(text, &end, 10);
  TORCH_CHECK_VALUE(*end == '\0', "turnout: the environment variable ", name, " is '", text, "', expected a number");
  return number;
}

void check(const WorldOptions& options) {
  ops::check_at_least(kName, "size", options.size, 1);
  TORCH_CHECK_VALUE(options.rank >= 0 && options.rank < options.size, kName, ": rank is ", options.rank,
                    ", expected 0 to ", options.size - 1);
  TORCH_CHECK_VALUE(options.port >= 1 && options.port <= 65535, kName, ": port is ", options.port,
                    ", expected 1 to 65535");
  TORCH_CHECK_VALUE(options.timeout.count() >= 100, kName, ": timeout is ", options.timeout.count(),
                    " ms, expected at least 100");
  TORCH_CHECK_VALUE(options.backend == "gloo" || options.backend == "nccl", kName, ": backend is '", options.backend,
                    "', expected gloo or nccl");
}

std::string store_address(const WorldOptions& options) { return options.host + ":" + std::to_string(options.port); }

std::string holder_text(const WorldOptions& options) {
  return options.launcher_holds_store ? "the launcher at " + store_address(options) : "rank 0";
}

// Threads of c10d and gloo write to connections whose other end is gone; the signal for that would end the process.
// Threads inherit what is blocked where they are made; a signal that came to this one meanwhile is dropped.
class WithoutPipeSignal {
 public:
  WithoutPipeSignal() {
    sigemptyset(&pipe_);
    sigaddset(&pipe_, SIGPIPE);
    pthread_sigmask(SIG_BLOCK, &pipe_, &before_);
  }
  ~WithoutPipeSignal() {
    const timespec at_once{};
    while (!sigismember(&before_, SIGPIPE) && sigtimedwait(&pipe_, nullptr, &at_once) == SIGPIPE) {
    }
    pthread_sigmask(SIG_SETMASK, &before_, nullptr);
  }
  WithoutPipeSignal(const WithoutPipeSignal&) = delete;
  WithoutPipeSignal& operator=(const WithoutPipeSignal&) = delete;

 private:
  sigset_t pipe_{}, before_{};
};

c10::intrusive_ptr<c10d::Store> connect(const WorldOptions& options, bool hold) {
  c10d::TCPStoreOptions how;
  how.port = static_cast<uint16_t>(options.port);
  how.isServer = hold;
  how.waitWorkers = false;
  how.timeout = options.timeout;
  try {
    return c10::make_intrusive<c10d::PrefixStore>("turnout/" + options.attempt,
                                                  c10::make_intrusive<c10d::TCPStore>(options.host, how));
  } catch (const std::exception&) {
    throw DistributedError(
        hold ? "turnout: rank 0 cannot hold the store at " + store_address(options) + ": is the port in use?"
             : "turnout: rank " + std::to_string(options.rank) + " does not reach the store of " +
                   holder_text(options) + " at " + store_address(options) + " within " +
                   seconds_text(options.timeout));
  }
}

std::vector<int64_t> missing_of(c10d::Store& store, const std::vector<std::string>& keys) {
  std::vector<int64_t> missing;
  for (size_t rank = 0; rank < keys.size(); ++rank)
    if (!store.check({keys[rank]})) missing.push_back(static_cast<int64_t>(rank));
  return missing;
}

// Every rank writes its key and waits for all. @return the values, one a rank
std::vector<std::string> meet(c10d::Store& store, const WorldOptions& options, const std::string& prefix,
                              const std::string& value, const std::string& doing,
                              const distributed::Heartbeat* heartbeat) {
  const auto fail = [&](const std::string& cause) {
    throw DistributedError("turnout: " + doing + " failed: " + cause);
  };
  std::vector<std::string> keys, values;
  for (int64_t rank = 0; rank < options.size; ++rank) keys.push_back(prefix + std::to_string(rank));
  const auto deadline = std::chrono::steady_clock::now() + options.timeout;
  try {
    store.set(keys[options.rank], value);
    while (true) {
      // In this order: who has met may leave.
      const std::string lost = heartbeat != nullptr ? heartbeat->lost() : "";
      if (store.check(keys)) break;
      if (!lost.empty()) fail(lost);
      if (std::chrono::steady_clock::now() > deadline)
        fail(distributed::ranks_text(missing_of(store, keys)) + " of " + std::to_string(options.size) + " did not come within " +
             seconds_text(options.timeout));
      std::this_thread::sleep_for(milliseconds(10));
    }
    for (const auto& text : store.multiGet(keys)) values.emplace_back(text.begin(), text.end());
  } catch (const DistributedError&) {
    throw;
  } catch (const std::exception&) {
    fail(holder_text(options) + ", which holds the store, is lost");
  }
  return values;
}

}  // namespace

WorldOptions world_options_from_environment() {
  WorldOptions options;
  const char *rank = variable("RANK"), *size = variable("WORLD_SIZE");
  TORCH_CHECK_VALUE((rank == nullptr) == (size == nullptr), "turnout: of the environment variables RANK and WORLD_SIZE ",
                    rank ? "the second" : "the first", " is missing");
  if (const char* seconds = variable("TURNOUT_TIMEOUT"))
    options.timeout = std::chrono::seconds(number_of("TURNOUT_TIMEOUT", seconds));
  if (rank == nullptr) return options;
  options.rank = number_of("RANK", rank);
  options.size = number_of("WORLD_SIZE", size);
  if (options.size <= 1) return options;
  const char *host = variable("MASTER_ADDR"), *port = variable("MASTER_PORT");
  TORCH_CHECK_VALUE(host != nullptr && port != nullptr, "turnout: WORLD_SIZE is ", size,
                    ", but the environment variable ", host ? "MASTER_PORT" : "MASTER_ADDR", " is missing");
  options.host = host;
  options.port = number_of("MASTER_PORT", port);
  const char* agent = variable("TORCHELASTIC_USE_AGENT_STORE");
  options.launcher_holds_store = agent != nullptr && std::string(agent) == "True";
  if (const char* attempt = variable("TORCHELASTIC_RESTART_COUNT")) options.attempt = attempt;
  return options;
}

Group find_group(const std::string& name) {
  c10::intrusive_ptr<c10d::ProcessGroup> found;
  try {
    found = c10d::resolve_process_group(name);
  } catch (const c10::Error&) {
    TORCH_CHECK_VALUE(false, "turnout: group is '", name, "', expected the name of a process group that was made here");
  }
  Group group{name, found->getRank(), found->getSize(), {}};
  const auto made_with = distributed::options_of(*found);
  if (made_with) group.members.assign(made_with->global_ranks_in_group.begin(), made_with->global_ranks_in_group.end());
  if (static_cast<int64_t>(group.members.size()) != group.size) {  // not told: torch does so for all ranks
    group.members.resize(group.size);
    std::iota(group.members.begin(), group.members.end(), 0);
  }
  return group;
}

struct World::State {
  c10::intrusive_ptr<c10d::Store> store;
  std::string address;
  std::string prefix;  // of the names of groups: a process may make several worlds
  std::shared_ptr<distributed::Heartbeat> heartbeat;
  std::vector<std::pair<std::string, c10::intrusive_ptr<c10d::ProcessGroup>>> groups;  // the registry holds them weakly
  Group all;
  int64_t comparisons = 0;
  int exceptions = std::uncaught_exceptions();
};

World::World(WorldOptions given) : options(std::move(given)), state_(std::make_unique<State>()) {
  check(options);
  if (options.size == 1) return;
  const WithoutPipeSignal in_threads_made_here;
  static std::atomic<int64_t> worlds{0};
  state_->prefix = "turnout/" + std::to_string(worlds++) + "/";
  state_->address = distributed::local_address_towards(options.host, options.port);
  const bool hold = options.rank == 0 && !options.launcher_holds_store;
  state_->store = connect(options, hold);
  meet(*state_->store, options, "beat/", "", "the meeting of the ranks", nullptr);
  std::vector<int64_t> everyone(options.size);
  std::iota(everyone.begin(), everyone.end(), 0);
  state_->heartbeat = std::make_shared<distributed::Heartbeat>(
      state_->store, options.rank, everyone, options.timeout, holder_text(options) + ", which holds the store,");
  state_->all = group("all", everyone);
}

World::~World() {
  State& s = *state_;
  if (!s.heartbeat) return;
  s.heartbeat->leave(options.rank == 0 && !options.launcher_holds_store, std::uncaught_exceptions() > s.exceptions);
  for (auto& [name, group] : s.groups) {
    distributed::forget_heartbeat(name);
    c10d::unregister_process_group(name);
  }
}

const Group& World::all() const { return state_->all; }

Group World::group(const std::string& name, const std::vector<int64_t>& members) {
  const auto self = std::find(members.begin(), members.end(), options.rank);
  const bool ascending = std::adjacent_find(members.begin(), members.end(), std::greater_equal<>()) == members.end();
  TORCH_CHECK_VALUE(self != members.end() && ascending && members.front() >= 0 && members.back() < options.size, kName,
                    ": members are ", members, ", expected ascending ranks of 0 to ", options.size - 1,
                    ", among them this one, ", options.rank);
  Group group{state_->prefix + name + "/" + join(members), self - members.begin(),
              static_cast<int64_t>(members.size()), members};
  if (group.size == 1) return {"", 0, 1, members};
  for (const auto& made : state_->groups)
    if (made.first == group.name) return group;
  const auto store = c10::make_intrusive<c10d::PrefixStore>(group.name, state_->store);
  c10::intrusive_ptr<c10d::Backend> gloo, nccl;
  const WithoutPipeSignal in_threads_made_here;
  try {
    gloo = distributed::make_gloo(store, group.rank, group.size, options.timeout, state_->address);
    if (options.backend == "nccl") nccl = distributed::make_nccl(store, group.rank, group.size, options.timeout);
  } catch (const c10::NotImplementedError&) {
    throw;
  } catch (const std::exception& error) {
    throw DistributedError(std::string("turnout: connecting the ranks failed: ") + state_->heartbeat->find_culprit() +
                           "; c10d says: " + error.what());
  }
  auto process_group = c10::make_intrusive<c10d::ProcessGroup>(store, static_cast<int>(group.rank),
                                                               static_cast<int>(group.size));
  process_group->setBackend(c10::DeviceType::CPU, c10d::ProcessGroup::BackendType::GLOO, gloo);
  if (nccl) process_group->setBackend(c10::DeviceType::CUDA, c10d::ProcessGroup::BackendType::NCCL, nccl);
  process_group->setDefaultBackend(c10d::ProcessGroup::BackendType::GLOO);
  process_group->setGroupName(group.name);
  c10d::register_process_group(group.name, process_group);
  distributed::set_heartbeat(process_group, state_->heartbeat);
  state_->groups.emplace_back(group.name, std::move(process_group));
  return group;
}

void World::check_same(const std::string& what, const std::string& text) {
  if (options.size == 1) return;
  const auto texts = meet(*state_->store, options, "same/" + std::to_string(state_->comparisons++) + "/",
                          what + "\n" + text, "comparison of " + what, state_->heartbeat.get());
  const std::string found = distributed::difference(texts, state_->all.members);
  if (found.empty()) return;
  const std::string finding = "the ranks differ in " + what + ": " + found;
  state_->heartbeat->report(finding);
  throw DistributedError("turnout: " + finding);
}

}  // namespace turnout
