// Runtime: the choice of kernels, in words.
#include <turnout/runtime.h>
#include <turnout/version.h>

#include "bridge.h"
#include "fresh.h"

#include <torch/library.h>

#include <tuple>

namespace turnout {

std::vector<KernelChoice> kernel_choices() {
  const auto& active = ops::active_implementation();
  std::vector<KernelChoice> choices;
  for (const auto& [implementation, refusal] : kernels::report())
    choices.push_back({implementation->name, implementation == &active, refusal});
  return choices;
}

namespace {

std::tuple<std::vector<std::string>, std::vector<std::string>> kernel_choices_op() {
  std::vector<std::string> names, reasons;
  for (const auto& choice : kernel_choices()) {
    names.push_back(choice.name);
    reasons.push_back(choice.reason);
  }
  return {names, reasons};
}

TORCH_LIBRARY_IMPL(turnout, CompositeImplicitAutograd, m) {
  m.impl("kernel_choices", kernel_choices_op);
  m.impl("release_scratch", release_scratch);
}

}  // namespace

void release_scratch() {
  kernels::release_scratch();
  ops::release_fresh();
}

std::string version() { return TURNOUT_VERSION; }
std::string built_for_torch() { return TURNOUT_TORCH_VERSION; }

}  // namespace turnout
