// Versions and hardware.
#include "machine.h"

#include <turnout/version.h>

#include <ATen/Parallel.h>
#include <ATen/Version.h>

#include <fmt/format.h>

#include <unistd.h>

#include <ctime>
#include <fstream>

namespace turnout::cli {
namespace {

std::string processor() {
  std::ifstream info("/proc/cpuinfo");
  for (std::string line; std::getline(info, line);) {
    const size_t colon = line.find(": ");
    if (line.starts_with("model name") && colon != std::string::npos) return line.substr(colon + 2);
  }
  return "unknown";
}

std::string now() {
  const std::time_t time = std::time(nullptr);
  std::tm utc{};
  gmtime_r(&time, &utc);
  char text[32];
  std::strftime(text, sizeof(text), "%Y-%m-%dT%H:%M:%SZ", &utc);
  return text;
}

}  // namespace

std::string version_text() {
  return fmt::format("turnout {}\ntorch {}\ninstructions {}", TURNOUT_VERSION, TURNOUT_TORCH_VERSION,
                     at::get_cpu_capability());
}

nlohmann::ordered_json machine_json() {
  return {{"turnout", TURNOUT_VERSION},
          {"torch", TURNOUT_TORCH_VERSION},
          {"processor", processor()},
          {"cores", sysconf(_SC_NPROCESSORS_ONLN)},
          {"threads", at::get_num_threads()},
          {"instructions", at::get_cpu_capability()},
          {"date", now()}};
}

std::string machine_line() {
  return fmt::format("turnout {}, torch {}, {}, {} threads, {}", TURNOUT_VERSION, TURNOUT_TORCH_VERSION, processor(),
                     at::get_num_threads(), at::get_cpu_capability());
}

}  // namespace turnout::cli
