// World: the processes of one run, how they meet, and how one that fails is named.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace turnout {

/// Ranks that exchange data: a c10d process group, by the name that it is registered under (GroupRegistry). A group of
/// one rank needs no name: nothing is sent.
struct Group {
  std::string name{};
  int64_t rank = 0;                 ///< of this process, in the group
  int64_t size = 1;
  std::vector<int64_t> members{0};  ///< ranks of the world, in order of their rank in the group
};

/// The group that torch.distributed, or any other user of c10d, registered. With the first operation in it a heartbeat
/// starts over the group's store, if that is a TCPStore, so that a lost rank is named; it ends with the group or the
/// process. @throws c10::ValueError when there is none of this name
Group find_group(const std::string& name);

/// An operation between ranks failed: the message names it and, where heartbeats tell, the rank that is to blame.
class DistributedError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

struct WorldOptions {
  int64_t rank = 0;
  int64_t size = 1;
  std::string host = "127.0.0.1";        ///< where the store is
  int64_t port = 29500;
  bool launcher_holds_store = false;     ///< torchrun's agent holds it; else rank 0 does
  std::string attempt = "0";             ///< restarts of a run do not see each other's keys
  std::string backend = "gloo";          ///< gloo: tensors on the CPU; nccl: those on CUDA devices as well
  std::chrono::milliseconds timeout{60'000};  ///< of each operation and of the meeting
};

/// What torchrun and launchers like it say: RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT, TORCHELASTIC_USE_AGENT_STORE,
/// TORCHELASTIC_RESTART_COUNT; TURNOUT_TIMEOUT in seconds. One rank where RANK and WORLD_SIZE are not set.
/// @throws c10::ValueError naming the variable that is missing or wrong
WorldOptions world_options_from_environment();

/// The ranks of a run, from their meeting to their leave. Owns the store's connection and the process groups.
///
/// A thread of each rank writes a heartbeat into the store a few times a second: c10d tells that a peer is lost, but
/// not which rank; the heartbeats do. c10d writes traces to stderr as TORCH_CPP_LOG_LEVEL says, once a C++ program
/// has called c10::initLogging().
class World {
 public:
  /// Waits until all ranks are there.
  /// @throws DistributedError naming the ranks that did not come in time; c10::ValueError for impossible options
  explicit World(WorldOptions options);
  /// Waits, for the time-out at most, until all ranks leave or one is lost: nobody's data is cut off.
  ~World();
  World(const World&) = delete;
  World& operator=(const World&) = delete;

  const Group& all() const;

  /// Makes a group of some ranks. Called by its members alone, all of them, with the same arguments.
  /// @param members ascending ranks of the world, this one among them
  Group group(const std::string& name, const std::vector<int64_t>& members);

  /// Compares a text of several lines, such as options in JSON, between all ranks.
  /// @throws DistributedError, on every rank, with the first line that differs and the ranks that hold it
  void check_same(const std::string& what, const std::string& text);

  const WorldOptions options;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace turnout
