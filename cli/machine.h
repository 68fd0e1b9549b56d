// What a measurement was made with: versions and hardware.
#pragma once

#include <nlohmann/json.hpp>

#include <string>

namespace turnout::cli {

/// Text of --version: turnout, torch, which kernels run, and why the others do not.
/// @throws c10::ValueError when TURNOUT_FORCE_ISA names kernels that do not run here
std::string version_text();

/// Versions, processor, threads, date (UTC).
nlohmann::ordered_json machine_json();

/// One line of machine_json(), for people.
std::string machine_line();

}  // namespace turnout::cli
