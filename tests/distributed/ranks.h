// Ranks as forked processes of the test program: each runs one body, the parent gathers how they ended.
#pragma once

#include <turnout/world.h>

#include <sys/types.h>

#include <chrono>
#include <functional>
#include <string>
#include <vector>

namespace turnout::testing {

/// How one process ended.
struct Ending {
  int status = -1;     ///< of exit(); -1 when a signal ended it
  int signal = 0;      ///< that ended it; SIGKILL by the parent when it was still there at the limit
  std::string text{};  ///< what its body returned
  double seconds = 0;  ///< after the start
};

/// Runs the body in one process a rank, with one thread each.
///
/// An exception's message becomes the text, its status 3. Test failures in a body give the status 1.
/// @param limit processes that live longer are killed
/// @param meddle called in the parent with the process ids, once all are started
std::vector<Ending> fork_ranks(int64_t ranks, const std::function<std::string(int64_t rank)>& body,
                               std::chrono::seconds limit, const std::function<void(const std::vector<pid_t>&)>& meddle = {});

/// Options of a world that meets at a free port of this machine; the same for every rank but for the rank.
WorldOptions local_world(int64_t ranks, std::chrono::milliseconds timeout = std::chrono::seconds(20));

/// Runs the body on ranks of a world; the test fails where one of them fails.
void on_ranks(int64_t ranks, const std::function<void(World&)>& body, const std::string& backend = "gloo");

}  // namespace turnout::testing
