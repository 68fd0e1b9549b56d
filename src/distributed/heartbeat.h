// Heartbeats: each rank tells the store that it lives and what it does; who falls silent is named.
#pragma once

#include <torch/csrc/distributed/c10d/Store.hpp>

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

namespace turnout::distributed {

/// One rank's heartbeat and its view of the others'. Its thread alone talks to the store, so a store that hangs never
/// hangs a caller.
class Heartbeat {
 public:
  /// @param store where the beats are written, over a connection that the thread makes for itself
  /// @param ranks that have a heartbeat there, this one among them, as messages call them
  /// @param holder of the store, in words that "is lost" follows
  /// @param over tells that the ranks need it no more; where it is given, the thread then ends without a last beat, and
  ///        so it does when the process ends: the store may be gone already
  Heartbeat(c10::intrusive_ptr<c10d::Store> store, int64_t rank, const std::vector<int64_t>& ranks,
            std::chrono::milliseconds timeout, std::string holder, std::function<bool()> over = {});
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

  /// The holder of the store, which no rank of a run may outlive, where it is known to be lost. A launcher that was killed
  /// may be started anew, so its ranks must end. Always empty where the constructor was given `over`.
  std::string holder_lost() const;

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

}  // namespace turnout::distributed
