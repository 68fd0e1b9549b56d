// Runtime: the choice of kernels, in words.
#include <turnout/runtime.h>
#include <turnout/version.h>

#include "bridge.h"

namespace turnout {

std::vector<KernelChoice> kernel_choices() {
  const auto& active = ops::active_implementation();
  std::vector<KernelChoice> choices;
  for (const auto& [implementation, refusal] : kernels::report())
    choices.push_back({implementation->name, implementation == &active, refusal});
  return choices;
}

void release_scratch() { kernels::release_scratch(); }

std::string version() { return TURNOUT_VERSION; }
std::string built_for_torch() { return TURNOUT_TORCH_VERSION; }

}  // namespace turnout
