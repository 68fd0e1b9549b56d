// Heartbeats: each rank tells the store that it lives and what it does; who falls silent is named.
#pragma once

#include <torch/csrc/distributed/c10d/Store.hpp>

#include <chrono>
#include <cstdint>
#include <memory>
#include <string>
#include <thread>

namespace turnout::distributed {

/// One rank's heartbeat and its view of the others'. Its thread alone talks to the store, so a store that hangs never
/// hangs a caller.
class Heartbeat {
 public:
  /// @param store a connection of its own
  /// @param holder who holds the store, in words
  Heartbeat(c10::intrusive_ptr<c10d::Store> store, int64_t rank, int64_t size, std::chrono::milliseconds timeout,
            std::string holder);
  ~Heartbeat();
  Heartbeat(const Heartbeat&) = delete;
  Heartbeat& operator=(const Heartbeat&) = delete;

  /// What this rank does between ranks, from now on; nullptr: nothing. @param operation a literal
  void doing(const char* operation);

  /// Who made an operation fail: waits until a silence, a leave or another rank's finding shows it, a few beats at most.
  /// The finding is told to the others.
  std::string find_culprit();

  /// Who is known to be lost, or to have left, now; empty where nobody is.
  std::string lost() const;

  /// This rank found the cause itself: told to the others.
  void report(const std::string& finding);

  /// Tells that this rank goes, and waits until the others go too; after a failure the holder of the store alone waits,
  /// so that the others can read why.
  /// @param unwinding: an exception that nobody was told of ends this rank
  void leave(bool holds_store, bool unwinding);

 private:
  struct Shared;
  std::shared_ptr<Shared> shared_;
  std::thread thread_;
};

/// The heartbeat that watches over a group, by the group's name; nullptr where there is none.
std::shared_ptr<Heartbeat> heartbeat_of(const std::string& group);
void set_heartbeat(const std::string& group, const std::shared_ptr<Heartbeat>& heartbeat);

}  // namespace turnout::distributed
