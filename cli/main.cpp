// The program `turnout`: dispatches to subcommands and turns every failure into one line and a status.
//
// Status 0: done. 1: a run failed on its way (it diverged). 2: bad input or files. 130: stopped by Ctrl-C.
#include "commands.h"
#include "machine.h"
#include "ranks.h"
#include "terminal.h"

#include <turnout/checkpoint.h>
#include <turnout/training.h>

#include <c10/util/Exception.h>
#include <c10/util/Logging.h>

#include <fmt/format.h>

#include <fcntl.h>
#include <unistd.h>

#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <string>

namespace {

constexpr const char* kNoMemory = "not enough memory for these sizes";

int fail(int status, const std::string& message) {
  const auto rank = turnout::cli::rank_of_process();
  std::string line = message.starts_with("turnout: ") ? message : "turnout: " + message;
  if (rank > 0) line = "turnout: rank " + std::to_string(rank) + line.substr(std::string("turnout").size());
  turnout::cli::say(turnout::cli::one_line(line) + "\n");
  return status;
}

// What all ranks of a run agreed on, or computed alike, is said by the first. Everything else may be true of one alone.
int fail_alike(int status, const std::string& message) {
  return turnout::cli::rank_of_process() > 0 ? status : fail(status, message);
}

// The number of a closed standard stream would go to the next file that is opened, and messages into that file.
void occupy_standard_streams() {
  int file = 0;
  do file = open("/dev/null", O_RDONLY);  // a write fails as it does on a closed stream
  while (file >= 0 && file <= STDERR_FILENO);
  if (file >= 0) close(file);
}

// Parses and does the work; --help and --version are shown here too.
void work(CLI::App& program, int argc, char** argv) {
  try {
    program.parse(argc, argv);
  } catch (const CLI::Success& shown) {
    program.exit(shown);
  }
  if (std::fflush(stdout) != 0 || std::ferror(stdout) != 0) throw turnout::FileError("standard output: cannot write");
}

// Threads of GNU OpenMP wait for each other by spinning for milliseconds. Where other programs want the cores too, the
// spinning one holds the core that the awaited one needs: training was measured 5 to 9 times slower. libgomp reads its
// settings before main() starts, so the program sets a short spin and starts itself once more, unless the user chose.
void limit_spinning(char** argv) {
  if (std::getenv("OMP_WAIT_POLICY") != nullptr || std::getenv("GOMP_SPINCOUNT") != nullptr) return;
  setenv("GOMP_SPINCOUNT", "10000", /*overwrite=*/1);
  execv("/proc/self/exe", argv);  // returns only on failure; then the default will do
}

int run(int argc, char** argv) {
  CLI::App program{
      "Mixture-of-Experts language models on the CPU at hand.\n\n"
      "Examples:\n"
      "  turnout compare                     dense against MoE, equal FLOPs: 5 minutes\n"
      "  turnout train --output runs/mine    one model, with checkpoints\n"
      "  turnout generate runs/mine --prompt 'def '\n"
      "  turnout inspect                     what a router does with its tokens\n"
      "  turnout bench --shape few-rows      the experts against this machine's limits",
      "turnout"};
  program.set_version_flag("--version", [] { return turnout::cli::version_text(); });
  program.formatter(turnout::cli::help_format());
  program.require_subcommand(1);
  turnout::cli::add_compare(program);
  turnout::cli::add_train(program);
  turnout::cli::add_generate(program);
  turnout::cli::add_bench(program);
  turnout::cli::add_inspect(program);
  try {
    work(program, argc, argv);
    return 0;
  } catch (const CLI::ParseError& error) {
    if (argc > 1 && argv[1][0] != '-' && program.get_subcommands().empty())
      return fail(
          2, fmt::format("unknown subcommand '{}', expected compare, train, generate, bench or inspect (see --help)",
                         argv[1]));
    return fail(2, std::string(error.what()) + " (see --help)");
  } catch (const turnout::cli::Interrupted& stop) {
    return fail_alike(130, stop.what());
  } catch (const turnout::DivergenceError& error) {
    return fail_alike(1, error.what());
  } catch (const turnout::FileError& error) {
    return fail(2, error.what());
  } catch (const c10::Error& error) {
    const std::string message = error.what_without_backtrace();  // torch's allocator throws no std::bad_alloc
    return fail(2, message.find("can't allocate memory") == std::string::npos ? message : kNoMemory);
  } catch (const std::bad_alloc&) {
    return fail(2, kNoMemory);
  } catch (const std::exception& error) {
    return fail(1, error.what());
  }
}

}  // namespace

int main(int argc, char** argv) {
  limit_spinning(argv);
  occupy_standard_streams();
  setenv("TORCH_CPP_LOG_LEVEL", "FATAL", /*overwrite=*/0);  // what c10d traces, the program says in a line
  c10::initLogging();
  std::signal(SIGXFSZ, SIG_IGN);  // a file-size limit becomes an error of the write, not a signal
  return run(argc, argv);
}
