// Versions and hardware.
#include "machine.h"

#include <turnout/runtime.h>
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

std::string active_kernels() {
  for (const KernelChoice& choice : kernel_choices())
    if (choice.active) return choice.name;
  return "none";
}

}  // namespace

std::string version_text() {
  std::string text = fmt::format("turnout {}\ntorch {} (its instructions: {})\n", TURNOUT_VERSION,
                                 TURNOUT_TORCH_VERSION, at::get_cpu_capability());
  text += fmt::format("kernels {}", active_kernels());
  for (const KernelChoice& choice : kernel_choices())
    if (!choice.active) text += fmt::format("\n  not {}: {}", choice.name, choice.reason);
  return text;
}

nlohmann::ordered_json machine_json() {
  return {{"turnout", TURNOUT_VERSION},       {"torch", TURNOUT_TORCH_VERSION},
          {"processor", processor()},         {"cores", sysconf(_SC_NPROCESSORS_ONLN)},
          {"threads", at::get_num_threads()}, {"torch_instructions", at::get_cpu_capability()},
          {"kernels", active_kernels()},      {"date", now()}};
}

std::string machine_line() {
  return fmt::format("turnout {}, torch {}, {}, {} threads, kernels {}", TURNOUT_VERSION, TURNOUT_TORCH_VERSION,
                     processor(), at::get_num_threads(), active_kernels());
}

}  // namespace turnout::cli
