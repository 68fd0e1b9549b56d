// Random banks, sizes and routings against the reference, on every implementation of this machine.
//
// Usage: kernels_fuzz [cases [first seed]]; a failure prints the seed that repeats it.
#include <cstdio>
#include <cstdlib>

#include "bounds.h"

namespace turnout::kernels::test {
namespace {

Config config_of(uint32_t seed) {
  std::mt19937 random(seed);
  const auto below = [&](uint32_t n) { return static_cast<int64_t>(random() % n); };
  Config c;
  c.seed = seed;
  c.dtype = below(2) ? DType::bf16 : DType::f32;
  c.integers = below(2) != 0;
  c.activation = c.integers ? Activation::relu : static_cast<Activation>(below(7));
  c.bias = below(2) != 0;
  c.tokens = 1 + below(40), c.hidden = 1 + below(80), c.ffn = 1 + below(80);
  c.experts = 1 + below(6), c.top_k = 1 + below(static_cast<uint32_t>(c.experts));
  c.dropped = below(3) ? 0 : 0.4;
  c.one_expert = below(8) == 0;
  c.skew = below(4);
  c.weight_before_down = below(3) == 0;
  if (c.activation == Activation::swiglu_clamped) c.scale = 1 << below(5);
  return c;
}

int fuzz(uint32_t cases, uint32_t first) {
  Worst closest;
  for (uint32_t seed = first; seed - first < cases; ++seed) {
    const Config c = config_of(seed);
    const Truth truth(c);
    for (const Implementation* impl : runnable()) {
      const int n = 1 + static_cast<int>(seed % 2);
      const bool packed = seed % 3 == 0;
      std::string wrong;
      if (seed % 5 == 0 && !packed)  // backward reads plain weights, few rows of which sum in another order
        wrong = compare_bits(truth.bank.run(*impl, n, false, true), truth.bank.run(*impl, n));
      const Worst worst = truth.check(*impl, n, packed);
      if (worst.share > closest.share) closest = worst, closest.name = std::to_string(seed) + " " + worst.name;
      if (worst.share > 1) wrong = worst.name;
      if (wrong.empty()) continue;
      std::printf("seed %u, %s: %s\n", seed, impl->name, wrong.c_str());
      return 1;
    }
    const uint32_t done = seed - first + 1;
    if (done % 5000 == 0) {
      std::printf("%u of %u cases; nearest to its bound (%.2f of it): seed %s\n", done, cases, closest.share,
                  closest.name.c_str());
      std::fflush(stdout);
    }
  }
  std::printf("%u cases, %zu implementations; nearest to its bound (%.2f of it): seed %s\n", cases, runnable().size(),
              closest.share, closest.name.c_str());
  return 0;
}

}  // namespace
}  // namespace turnout::kernels::test

int main(int argc, char** argv) {
  const auto number = [&](int i, uint32_t otherwise) {
    return argc > i ? static_cast<uint32_t>(std::atoll(argv[i])) : otherwise;
  };
  return turnout::kernels::test::fuzz(number(1, 300), number(2, 1));
}
