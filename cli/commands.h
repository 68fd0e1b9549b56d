// The subcommands: each adds itself to the program, options, help and work.
#pragma once

#include <CLI/CLI.hpp>

#include <charconv>
#include <cstdint>
#include <memory>
#include <string>
#include <system_error>

namespace turnout::cli {

/// What --seed may be: CLI11 alone takes -1 for the largest number, and so what is larger.
inline const CLI::Validator kSeeds(
    [](const std::string& text) {
      uint64_t seed = 0;
      const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), seed);
      const bool whole = error == std::errc() && end == text.data() + text.size();
      return whole ? std::string() : "is " + text + ", expected 0 to 18446744073709551615";
    },
    "");

/// How options are shown; for the program before its subcommands are added, which take it over.
std::shared_ptr<CLI::FormatterBase> help_format();

void add_compare(CLI::App& program);
void add_train(CLI::App& program);
void add_generate(CLI::App& program);
void add_bench(CLI::App& program);
void add_inspect(CLI::App& program);

}  // namespace turnout::cli
