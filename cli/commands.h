// The subcommands: each adds itself to the program, options, help and work.
#pragma once

#include <CLI/CLI.hpp>

namespace turnout::cli {

void add_compare(CLI::App& program);
void add_train(CLI::App& program);
void add_generate(CLI::App& program);
void add_bench(CLI::App& program);

}  // namespace turnout::cli
