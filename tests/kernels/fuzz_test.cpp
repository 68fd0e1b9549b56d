// Random banks, sizes and routings against the reference, on every implementation of this machine.
//
// Usage: kernels_fuzz [cases [first seed]]; a failure prints the seed that repeats it.
#include <cstdio>
#include <cstdlib>

#include "bank.h"

namespace turnout::kernels::test {
namespace {

Config config_of(uint32_t seed) {
  std::mt19937 random(seed);
  const auto below = [&](uint32_t n) { return static_cast<int64_t>(random() % n); };
  Config c;
  c.seed = seed;
  c.dtype = below(2) ? DType::bf16 : DType::f32;
  c.integers = below(2) != 0;
  c.activation = c.integers ? Activation::relu : static_cast<Activation>(below(6));
  c.bias = below(2) != 0;
  c.tokens = 1 + below(40), c.hidden = 1 + below(80), c.ffn = 1 + below(80);
  c.experts = 1 + below(6), c.top_k = 1 + below(static_cast<uint32_t>(c.experts));
  c.dropped = below(3) ? 0 : 0.4;
  c.one_expert = below(8) == 0;
  c.skew = below(4);
  return c;
}

/// The bounds of experts_test.cpp: 0 where sums are exact. At most 6 choices of exact bf16 values stay below 256 each.
double bound(const Config& c) { return c.integers ? 0 : c.dtype == DType::f32 ? 8e-6 : 1.0 / 128; }

int fuzz(uint32_t cases, uint32_t first) {
  for (uint32_t seed = first; seed < first + cases; ++seed) {
    const Config c = config_of(seed);
    const Bank bank(c);
    const Outputs want = bank.run(find("reference"));
    for (const Implementation* impl : runnable()) {
      const Outputs got = bank.run(*impl, 1 + static_cast<int>(seed % 2), seed % 3 == 0, seed % 5 == 0);
      const std::string wrong = compare(got, want, bound(c), c.bias);
      if (wrong.empty()) continue;
      std::printf("seed %u, %s: %s\n", seed, impl->name, wrong.c_str());
      return 1;
    }
  }
  std::printf("%u cases, %zu implementations: no difference\n", cases, runnable().size());
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
