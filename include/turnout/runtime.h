// Runtime: which kernels run on this machine and why, which versions this library is and was built for.
#pragma once

#include <string>
#include <vector>

namespace turnout {

/// One implementation of the CPU kernels. The list is in order of preference; the first that this machine can run is
/// active, unless the environment variable TURNOUT_FORCE_ISA names another.
struct KernelChoice {
  std::string name;
  bool active = false;
  std::string reason;  ///< why it was not taken; empty for the active one
};

/// @throws c10::ValueError when TURNOUT_FORCE_ISA names an implementation that is unknown or that this machine lacks
std::vector<KernelChoice> kernel_choices();

/// Frees the scratch and the freed outputs that kernels keep between calls. Safe at any time that no op runs.
void release_scratch();

/// This library's version, such as "0.1.0".
std::string version();

/// Version of the torch package that this library was built for.
std::string built_for_torch();

}  // namespace turnout
