// The reference's gradients against central differences of its forward, in double.
#include <gtest/gtest.h>

#include "bank.h"

namespace turnout::kernels::test {
namespace {

/// L = ⟨grad_y, y⟩, whose gradient is what backward returns.
double loss(Bank& bank) {
  const ExpertsProblem q = bank.problem();
  Buffer y(DType::f64, q.tokens * q.hidden);
  forward(find("reference"), q, nullptr, y.data(), nullptr, ParallelFor{});
  double sum = 0;
  for (int64_t i = 0; i < y.size(); ++i) sum += y.get(i) * bank.grad_y().get(i);
  return sum;
}

void expect_gradient(Bank& bank, Buffer& input, int64_t i, double got, const char* name) {
  constexpr double kStep = 1e-5;  // error of a central difference: step² + 1e-16 / step, 1e-10 both
  const double v = input.get(i);
  input.set(i, v + kStep);
  const double above = loss(bank);
  input.set(i, v - kStep);
  const double below = loss(bank);
  input.set(i, v);
  EXPECT_NEAR(got, (above - below) / (2 * kStep), 1e-7) << name << " element " << i;
}

TEST(Reference, GradientsMatchFiniteDifferences) {
  for (Activation a : {Activation::gelu, Activation::gelu_tanh, Activation::silu, Activation::swiglu,
                       Activation::geglu, Activation::swiglu_clamped}) {
    Config c;
    c.dtype = DType::f64, c.activation = a, c.bias = true, c.weight_before_down = a >= Activation::swiglu;
    c.tokens = 5, c.hidden = 4, c.ffn = 3, c.experts = 3, c.top_k = 2, c.dropped = 0.2;
    Bank bank(c);
    const Outputs o = bank.run(find("reference"));
    for (int64_t t = 0; t < c.tokens; ++t)
      for (int64_t d = 0; d < c.hidden; ++d)
        expect_gradient(bank, bank.x(), t * (c.hidden + 3) + d, o.grad_x.get(t * c.hidden + d), "x");
    for (int64_t i = 0; i < bank.weights().size(); ++i)
      expect_gradient(bank, bank.weights(), i, o.grad_weights.get(i), "topk_weights");
    for (size_t e = 0; e < 3; ++e) {
      const auto all = [&](Buffer& input, const Buffer& got, const char* name) {
        for (int64_t i = 0; i < got.size(); ++i) expect_gradient(bank, input, i, got.get(i), name);
      };
      all(bank.up()[e], o.grad_up[e], "up");
      all(bank.down()[e], o.grad_down[e], "down");
      all(bank.up_bias()[e], o.grad_up_bias[e], "up_bias");
      all(bank.down_bias()[e], o.grad_down_bias[e], "down_bias");
    }
  }
}

TEST(Reference, OneTokenByHand) {
  // x = 2, up = 3, down = 5, relu: u = 6, a = 30; weight 0.5: y = 15.
  // grad_y = 1: d weight = 30, d down = 0.5·6, d u = 0.5·5, d up = 2.5·2, d x = 2.5·3
  Config c;
  c.dtype = DType::f64, c.activation = Activation::relu;
  c.tokens = c.hidden = c.ffn = c.experts = c.top_k = 1;
  Bank bank(c);
  bank.x().set(0, 2), bank.up()[0].set(0, 3), bank.down()[0].set(0, 5);
  bank.weights().set(0, 0.5), bank.grad_y().set(0, 1);
  const Outputs o = bank.run(find("reference"));
  EXPECT_EQ(o.y.get(0), 15);
  EXPECT_EQ(o.saved.get(0), 6);
  EXPECT_EQ(o.grad_weights.get(0), 30);
  EXPECT_EQ(o.grad_down[0].get(0), 3);
  EXPECT_EQ(o.grad_up[0].get(0), 5);
  EXPECT_EQ(o.grad_x.get(0), 7.5);
}

}  // namespace
}  // namespace turnout::kernels::test
