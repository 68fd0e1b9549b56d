// Trains an MoE layer for a step: the C++ example of the README.
#include <turnout/moe.h>
#include <turnout/runtime.h>

#include <ATen/ATen.h>

#include <iostream>

int main() {
  turnout::MoEOptions options;
  options.hidden = 64;
  options.ffn = 128;
  options.num_experts = 8;
  options.top_k = 2;
  options.activation = turnout::Activation::swiglu;
  turnout::MoE moe(options);

  const auto x = at::randn({4, 16, 64});  // [batch, sequence, hidden]
  const auto out = moe(x);
  (out.output.square().mean() + out.aux_loss).backward();

  std::cout << "output " << out.output.sizes() << "\n";
  std::cout << "rows of the 8 experts: " << out.plan.tokens_per_expert().sum().item<int64_t>() << "\n";
  std::cout << "turnout " << turnout::version() << " for torch " << turnout::built_for_torch() << "\n";
}
