// Trains an MoE layer for one step and prints what a test can check.
#include <turnout/moe.h>
#include <turnout/version.h>

#include <ATen/ATen.h>

#include <iostream>

int main() {
  turnout::MoEOptions options;
  options.hidden = 8;
  options.ffn = 16;
  options.num_experts = 4;
  turnout::MoE moe(options);
  const auto out = moe(at::randn({2, 5, 8}));
  (out.output.pow(2).sum() + out.aux_loss).backward();
  for (const auto& parameter : moe->parameters()) {
    if (!parameter.grad().defined()) return 1;
  }
  std::cout << "turnout " << TURNOUT_VERSION << " torch " << TURNOUT_TORCH_VERSION << " output " << out.output.sizes()
            << "\n";
}
