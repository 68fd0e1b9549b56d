// The ordered list of implementations: which this machine can run, why not the others, and which one is active.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "experts.h"

namespace turnout::kernels {

struct Stages;  // stages.h

/// One implementation of the experts. `stages` is null for the reference, which has no tasks.
struct Implementation {
  const char* name;
  const char* needs;  ///< the CPU features it is compiled for, in words
  const Stages* stages;
  bool by_force_only;  ///< never chosen by itself
};

/// One line of the report on the choice.
struct Candidate {
  const Implementation* implementation;
  std::string refusal;  ///< why it is not taken, in words; empty for the active one
};

/// Every implementation of this build, fastest first: avx512_bf16, avx512, avx2, portable, reference.
const std::vector<Implementation>& implementations();

/// The implementation called `name`, whether or not it is active.
/// @throws std::invalid_argument naming the known ones, or the CPU feature that this machine lacks
const Implementation& find(std::string_view name);

/// The one that runs: TURNOUT_FORCE_ISA where set, else the first that the machine can run. Chosen once, at first use.
/// @throws std::invalid_argument as find(), naming the variable, at each use until the process ends
const Implementation& active();

/// What was chosen and why each other one was not, in the order of implementations().
std::vector<Candidate> report();

}  // namespace turnout::kernels
