// Forks, waits with a limit, reads what the processes have to say.
#include "ranks.h"

#include <ATen/Parallel.h>
#include <gtest/gtest.h>

#include <arpa/inet.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <cstdio>
#include <thread>

namespace turnout::testing {
namespace {

using Clock = std::chrono::steady_clock;

[[noreturn]] void be_rank(int64_t rank, const std::function<std::string(int64_t)>& body, int pipe) {
  at::set_num_threads(1);
  std::string text;
  int status = 0;
  try {
    text = body(rank);
  } catch (const c10::Error& error) {
    text = error.what_without_backtrace();
    status = 3;
  } catch (const std::exception& error) {
    text = error.what();
    status = 3;
  }
  if (status == 0 && ::testing::Test::HasFailure()) status = 1;
  const auto written = ::write(pipe, text.data(), text.size());
  std::fflush(stdout);
  _exit(written == static_cast<ssize_t>(text.size()) ? status : 4);
}

std::string read_all(int pipe) {
  std::string text;
  char buffer[4096];
  for (ssize_t got; (got = read(pipe, buffer, sizeof(buffer))) > 0;) text.append(buffer, got);
  close(pipe);
  return text;
}

int free_port() {
  const int end = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t length = sizeof(address);
  const bool bound = bind(end, reinterpret_cast<sockaddr*>(&address), length) == 0 &&
                     getsockname(end, reinterpret_cast<sockaddr*>(&address), &length) == 0;
  close(end);
  return bound ? ntohs(address.sin_port) : 0;
}

}  // namespace

std::vector<Ending> fork_ranks(int64_t ranks, const std::function<std::string(int64_t)>& body,
                               std::chrono::seconds limit,
                               const std::function<void(const std::vector<pid_t>&)>& meddle) {
  std::fflush(stdout);
  std::vector<pid_t> processes;
  std::vector<int> pipes;
  const auto start = Clock::now();
  for (int64_t rank = 0; rank < ranks; ++rank) {
    int ends[2];
    if (pipe(ends) != 0) throw std::runtime_error("no pipe");
    const pid_t process = fork();
    if (process == 0) be_rank(rank, body, ends[1]);
    close(ends[1]);
    processes.push_back(process);
    pipes.push_back(ends[0]);
  }
  if (meddle) meddle(processes);

  std::vector<Ending> endings(ranks);
  std::vector<bool> ended(ranks, false);
  std::vector<bool> stopped(ranks, false);  // by a test: killed when nobody else is left
  for (int64_t left = ranks; left > 0;) {
    const bool late = Clock::now() - start > limit || left == std::count(stopped.begin(), stopped.end(), true);
    for (int64_t rank = 0; rank < ranks; ++rank) {
      if (ended[rank]) continue;
      if (late) kill(processes[rank], SIGKILL);
      int status = 0;
      if (waitpid(processes[rank], &status, late ? 0 : WNOHANG | WUNTRACED) != processes[rank]) continue;
      stopped[rank] = WIFSTOPPED(status);
      if (stopped[rank]) continue;
      ended[rank] = true;
      --left;
      endings[rank].status = WIFEXITED(status) ? WEXITSTATUS(status) : -1;
      endings[rank].signal = WIFSIGNALED(status) ? WTERMSIG(status) : 0;
      endings[rank].seconds = std::chrono::duration<double>(Clock::now() - start).count();
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
  for (int64_t rank = 0; rank < ranks; ++rank) endings[rank].text = read_all(pipes[rank]);
  return endings;
}

WorldOptions local_world(int64_t ranks, std::chrono::milliseconds timeout) {
  WorldOptions options;
  options.size = ranks;
  options.port = free_port();
  options.timeout = timeout;
  return options;
}

void on_ranks(int64_t ranks, const std::function<void(World&)>& body, const std::string& backend) {
  auto common = local_world(ranks);
  common.backend = backend;
  const auto endings = fork_ranks(
      ranks,
      [&](int64_t rank) {
        auto options = common;
        options.rank = rank;
        World world(options);
        body(world);
        return std::string();
      },
      std::chrono::seconds(60));
  for (int64_t rank = 0; rank < ranks; ++rank)
    EXPECT_EQ(endings[rank].status, 0) << "rank " << rank << " of " << ranks << ", signal " << endings[rank].signal
                                       << ": " << endings[rank].text;
}

}  // namespace turnout::testing
