// The subcommands: each adds itself to the program, options, help and work.
#pragma once

#include <CLI/CLI.hpp>

namespace turnout::cli {

/// What --seed may be: CLI11 alone takes -1 for the largest number.
inline const CLI::Range kSeeds(0.0, 18446744073709551615.0, "0 or more");

void add_compare(CLI::App& program);
void add_train(CLI::App& program);
void add_generate(CLI::App& program);
void add_bench(CLI::App& program);
void add_inspect(CLI::App& program);

}  // namespace turnout::cli
