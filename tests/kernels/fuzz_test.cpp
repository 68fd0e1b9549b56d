// Random banks, sizes and routings against the reference, on every implementation of this machine.
//
// Usage: kernels_fuzz [cases [first seed]]; a failure prints the seed that repeats it.
//
// Integer cases must agree to the bit. The others within c · k · ε · M, where M is Σ|a||b| over everything that flows
// into an element: the reference on absolute values. act(x) ≥ x/2 and act'(x) ≥ 1/2 for x ≥ 0, while |act'| ≤ 1.13
// everywhere, so M bounds what an error of u becomes within a factor of 2 · 1.13, twice that where gated.
// Every backward starts from the reference's u, so that an error of u near a kink of relu is no error of backward.
#include <cstdio>
#include <cstdlib>

#include "bank.h"

namespace turnout::kernels::test {
namespace {

constexpr double kFactor = 8;  // 2 · 2 · 1.13, and as much again for the errors of exp and erf themselves

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

/// Rounding of k sums in fp32.
double sums(const Config& c) {
  const int64_t u = is_gated(c.activation) ? 2 * c.ffn : c.ffn;
  return static_cast<double>(c.hidden + u + c.tokens * c.top_k) * 0x1p-24;
}

/// Largest |got - want| / M, and where; exact where M is not to be used.
struct Worst {
  double share = 0;
  std::string name = "none";
  bool exact = false;

  void add(const char* what, const Buffer& got, const Buffer& want, const Buffer& m, double relative) {
    if (!got.intact()) note(1e30, std::string(what) + " wrote behind the end");
    for (int64_t i = 0; i < want.size(); ++i) {
      const double g = got.get(i), w = want.get(i), bound = exact ? 0 : relative * m.get(i);
      const double over = g == w ? 0 : bound > 0 ? std::abs(g - w) / bound : 1e30;
      if (!(over <= share))
        note(over, std::string(what) + " element " + std::to_string(i) + " of " + std::to_string(want.size()) + ": " +
                       std::to_string(g) + ", want " + std::to_string(w) + ", bound " + std::to_string(bound));
    }
  }
  void note(double over, std::string where) { share = over == over ? over : 1e30, name = std::move(where); }
};

Worst differences(const Config& c, const Outputs& got, const Outputs& want, const Outputs& m) {
  const bool bf16 = c.dtype == DType::bf16;
  const double fp32 = kFactor * sums(c);
  // a number beside the border between two bf16 rounds to either, 2⁻⁷ apart; h, weight·h or du may, and the result
  const double stored = bf16 ? fp32 + 2 * 0x1p-7 : fp32;
  Worst worst{0, "none", c.integers};
  worst.add("y", got.y, want.y, m.y, stored);
  worst.add("saved_up", got.saved, want.saved, m.saved, stored);
  worst.add("grad_x", got.grad_x, want.grad_x, m.grad_x, stored);
  worst.add("grad_topk_weights", got.grad_weights, want.grad_weights, m.grad_weights, fp32);
  for (size_t e = 0; e < got.grad_up.size(); ++e) {
    worst.add("grad_up", got.grad_up[e], want.grad_up[e], m.grad_up[e], stored);
    worst.add("grad_down", got.grad_down[e], want.grad_down[e], m.grad_down[e], stored);
    worst.add("grad_up_bias", got.grad_up_bias[e], want.grad_up_bias[e], m.grad_up_bias[e], stored);
    worst.add("grad_down_bias", got.grad_down_bias[e], want.grad_down_bias[e], m.grad_down_bias[e], stored);
  }
  return worst;
}

/// "" where recomputing the pre-activations gave the bits that keeping them gave.
std::string compare_bits(const Outputs& a, const Outputs& b) {
  const auto same = [](const std::vector<Buffer>& l, const std::vector<Buffer>& r) {
    for (size_t e = 0; e < l.size(); ++e)
      if (!l[e].same_bits(r[e])) return false;
    return true;
  };
  const bool all = a.grad_x.same_bits(b.grad_x) && a.grad_weights.same_bits(b.grad_weights) &&
                   same(a.grad_up, b.grad_up) && same(a.grad_down, b.grad_down) &&
                   same(a.grad_up_bias, b.grad_up_bias) && same(a.grad_down_bias, b.grad_down_bias);
  return all ? "" : "recomputed pre-activations give other gradients";
}

/// M of every output: forward's from |x| on, backward's from |u|.
Outputs magnitudes(const Bank& bank, const Outputs& want) {
  const Bank absolute = bank.absolute();
  const Implementation& reference = find("reference");
  Outputs m = absolute.run_forward(reference, 1, false);
  Buffer u(DType::f64, want.saved.size());
  for (int64_t i = 0; i < u.size(); ++i) u.set(i, std::abs(want.saved.get(i)));
  absolute.run_backward(reference, 1, &u, m);
  return m;
}

int fuzz(uint32_t cases, uint32_t first) {
  const Implementation& reference = find("reference");
  Worst closest;
  for (uint32_t seed = first; seed - first < cases; ++seed) {
    const Config c = config_of(seed);
    const Bank bank(c);
    const Outputs want = bank.run(reference);
    const Outputs m = c.integers ? Outputs() : magnitudes(bank, want);
    for (const Implementation* impl : runnable()) {
      const int n = 1 + static_cast<int>(seed % 2);
      const bool packed = seed % 3 == 0;
      Outputs got = bank.run_forward(*impl, n, packed);
      std::string wrong;
      if (seed % 5 == 0 && !packed) {  // backward reads plain weights, few rows of which sum in another order
        Outputs recomputed;
        bank.run_backward(*impl, n, nullptr, recomputed);
        bank.run_backward(*impl, n, &got.saved, got);
        wrong = compare_bits(recomputed, got);
      }
      bank.run_backward(*impl, n, &want.saved, got);
      const Worst worst = differences(c, got, want, c.integers ? want : m);
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
