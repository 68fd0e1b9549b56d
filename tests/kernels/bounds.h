// How far an implementation may be from the reference: derived for every element from what flows into it.
//
// Integer cases must agree to the bit. The others within c · k · ε · M, where M is Σ|a||b| over everything that flows
// into an element: the reference on absolute values. act(x) ≥ x/2 and act'(x) ≥ 1/2 for x ≥ 0, while |act'| ≤ 1.13
// everywhere, so M bounds what an error of u becomes within a factor of 2 · 1.13, twice that where gated.
// Every backward starts from the reference's u, so that an error of u near a kink of relu is no error of backward.
#pragma once

#include "bank.h"

namespace turnout::kernels::test {

constexpr double kFactor = 8;  // 2 · 2 · 1.13, and as much again for the errors of exp and erf themselves

/// Rounding of k sums in fp32.
inline double sums(const Config& c) {
  const int64_t u = is_gated(c.activation) ? 2 * c.ffn : c.ffn;
  return static_cast<double>(c.hidden + u + c.tokens * c.top_k) * 0x1p-24;
}

/// Largest |got - want| / bound, and where; exact where M is not to be used.
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

/// M of every output: forward's from |x| on, backward's from |u|. Nothing for integers, which need none.
inline Outputs magnitudes(const Config& c, const Bank& bank, const Outputs& want) {
  if (c.integers) return {};
  const Bank absolute = bank.absolute();
  const Implementation& reference = find("reference");
  Outputs m = absolute.run_forward(reference, 1, false);
  const Buffer u = absolute.magnitudes_of(want.saved);
  absolute.run_backward(reference, 1, &u, m);
  return m;
}

/// `got` against `want` of the same bank; a share above 1 is wrong.
inline Worst differences(const Config& c, const Outputs& got, const Outputs& want, const Outputs& m) {
  const bool bf16 = c.dtype == DType::bf16;
  const double fp32 = kFactor * sums(c);
  // a number beside the border between two bf16 rounds to either, 2⁻⁷ apart; h, weight·h or du may, and the result
  const double stored = bf16 ? fp32 + 2 * 0x1p-7 : fp32;
  const Outputs& scale = c.integers ? want : m;
  Worst worst{0, "none", c.integers};
  worst.add("y", got.y, want.y, scale.y, stored);
  worst.add("saved_up", got.saved, want.saved, scale.saved, stored);
  worst.add("grad_x", got.grad_x, want.grad_x, scale.grad_x, stored);
  worst.add("grad_topk_weights", got.grad_weights, want.grad_weights, scale.grad_weights, fp32);
  for (size_t e = 0; e < got.grad_up.size(); ++e) {
    worst.add("grad_up", got.grad_up[e], want.grad_up[e], scale.grad_up[e], stored);
    worst.add("grad_down", got.grad_down[e], want.grad_down[e], scale.grad_down[e], stored);
    worst.add("grad_up_bias", got.grad_up_bias[e], want.grad_up_bias[e], scale.grad_up_bias[e], stored);
    worst.add("grad_down_bias", got.grad_down_bias[e], want.grad_down_bias[e], scale.grad_down_bias[e], stored);
  }
  return worst;
}

/// A bank's reference and its bound, computed once for several implementations.
struct Truth {
  explicit Truth(const Config& config)
      : c(config), bank(c), want(bank.run(find("reference"))), m(magnitudes(c, bank, want)) {}

  /// Forward, backward from the reference's u, and how far they are from it.
  Worst check(const Implementation& impl, int n_threads = 1, bool packed = false) const {
    Outputs got = bank.run_forward(impl, n_threads, packed);
    bank.run_backward(impl, n_threads, &want.saved, got);
    return differences(c, got, want, m);
  }
  /// The same in words: "" where it is within its bound.
  std::string wrong(const Implementation& impl, int n_threads = 1, bool packed = false) const {
    const Worst worst = check(impl, n_threads, packed);
    return worst.share > 1 ? worst.name : "";
  }

  const Config c;
  const Bank bank;
  const Outputs want, m;
};

/// "" where every output has the same bits.
inline std::string compare_bits(const Outputs& a, const Outputs& b) {
  const auto same = [](const std::vector<Buffer>& l, const std::vector<Buffer>& r) {
    for (size_t e = 0; e < l.size(); ++e)
      if (!l[e].same_bits(r[e]) || !l[e].intact()) return false;
    return true;
  };
  if (!a.y.same_bits(b.y) || !a.saved.same_bits(b.saved)) return "the output differs";
  const bool all = a.grad_x.same_bits(b.grad_x) && a.grad_weights.same_bits(b.grad_weights) &&
                   same(a.grad_up, b.grad_up) && same(a.grad_down, b.grad_down) &&
                   same(a.grad_up_bias, b.grad_up_bias) && same(a.grad_down_bias, b.grad_down_bias);
  return all ? "" : "the gradients differ";
}

}  // namespace turnout::kernels::test
