// Every implementation of this machine against the scalar reference: exact where sums are, bounded elsewhere.
#include <gtest/gtest.h>

#include <map>

#include "bounds.h"

namespace turnout::kernels::test {
namespace {

constexpr Activation kActivations[] = {Activation::relu, Activation::gelu,   Activation::gelu_tanh,
                                       Activation::silu, Activation::swiglu, Activation::geglu,
                                       Activation::swiglu_clamped};

class Experts : public testing::TestWithParam<std::tuple<const Implementation*, DType>> {
 protected:
  const Implementation& impl() const { return *std::get<0>(GetParam()); }
  Config config() const {
    Config c;
    c.dtype = std::get<1>(GetParam());
    return c;
  }
};

// every size below two panels (64) or around a border of tiles, lanes, pairs
TEST_P(Experts, TailsExactWithSmallIntegers) {
  const int64_t sizes[] = {1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 18, 31, 32, 33, 47, 48, 63, 64, 65, 70};
  uint32_t seed = 1;
  for (int64_t hidden : sizes)
    for (int64_t ffn : sizes) {
      Config c = config();
      c.activation = Activation::relu;
      c.integers = true;
      c.hidden = hidden, c.ffn = ffn, c.experts = 3, c.top_k = 2;
      c.tokens = 1 + (seed * 7) % 40, c.bias = seed % 2 != 0, c.skew = seed % 3, c.seed = seed++;
      c.dropped = seed % 5 == 0 ? 0.3 : 0;
      ASSERT_EQ(Truth(c).wrong(impl(), 1, seed % 2 != 0), "")
          << impl().name << " hidden " << hidden << " ffn " << ffn << " tokens " << c.tokens << " bias " << c.bias;
    }
}

TEST_P(Experts, EveryActivationBiasAndRowCount) {
  uint32_t seed = 1;
  for (Activation a : kActivations)
    for (int64_t tokens : {1, 2, 5, 11, 12, 13, 23, 24, 25, 50, 97})
      for (bool bias : {false, true}) {
        Config c = config();
        c.activation = a;
        c.bias = bias;
        c.tokens = tokens, c.hidden = 37 + seed % 5, c.ffn = 45 + seed % 7, c.experts = 2, c.top_k = 1;
        c.one_expert = seed % 2 != 0, c.seed = seed++;
        c.weight_before_down = seed % 3 == 0;
        if (a == Activation::swiglu_clamped) c.scale = 16;
        const Truth truth(c);
        for (const bool packed : {false, true})
          ASSERT_EQ(truth.wrong(impl(), 1, packed), "") << impl().name << " activation " << static_cast<int>(a)
                                                        << " tokens " << tokens << " bias " << bias << " packed "
                                                        << packed;
      }
}

// reductions that take several passes, several segments of rows, several passes of a weight gradient
TEST_P(Experts, BigSizes) {
  for (const auto& [tokens, hidden, ffn] :
       {std::tuple<int64_t, int64_t, int64_t>{40, 33, 4500}, {30, 4300, 40}, {2300, 40, 36}, {1100, 33, 4500}}) {
    if (impl().name == std::string("portable") && tokens * ffn > 1000000) continue;
    Config c = config();
    c.activation = Activation::swiglu;
    c.tokens = tokens, c.hidden = hidden, c.ffn = ffn, c.experts = 2, c.top_k = 1, c.one_expert = true;
    static std::map<std::tuple<DType, int64_t, int64_t>, Truth> truths;  // slow to compute, the same for all
    const Truth& truth = truths.try_emplace({c.dtype, tokens, hidden}, c).first->second;
    ASSERT_EQ(truth.wrong(impl(), 2), "")
        << impl().name << " tokens " << tokens << " hidden " << hidden << " ffn " << ffn;
  }
}

TEST_P(Experts, RecomputedActivationsGiveTheSameBits) {
  for (Activation a : kActivations) {
    Config c = config();
    c.activation = a;
    c.tokens = 61, c.hidden = 50, c.ffn = 66, c.bias = true;
    const Bank bank(c);
    ASSERT_EQ(compare_bits(bank.run(impl(), 1, false, true), bank.run(impl())), "");
  }
}

TEST_P(Experts, SameBitsAtAnyThreadCount) {
  for (int64_t tokens : {3, 70, 700}) {
    Config c = config();
    c.activation = Activation::geglu;
    c.tokens = tokens, c.hidden = 130, c.ffn = 99, c.experts = 7, c.top_k = 3, c.bias = true, c.dropped = 0.1;
    const Bank bank(c);
    for (bool packed : {false, true}) {
      const Outputs one = bank.run(impl(), 1, packed);
      for (int n : {2, 3, 8})
        ASSERT_EQ(compare_bits(bank.run(impl(), n, packed), one), "") << n << " threads, " << tokens << " tokens";
    }
  }
}

TEST_P(Experts, ExpertsWithoutRowsGetZerosAndTokensNotSentToo) {
  Config c = config();
  c.experts = 5, c.top_k = 2, c.tokens = 6, c.dropped = 1.1, c.bias = true;
  const Bank nothing(c);
  const Outputs o = nothing.run(impl(), 2);
  const auto all_zero = [](const Buffer& b) {
    for (int64_t i = 0; i < b.size(); ++i)
      if (b.get(i) != 0) return false;
    return b.intact();
  };
  EXPECT_TRUE(all_zero(o.y) && all_zero(o.grad_x) && all_zero(o.grad_weights));
  for (size_t e = 0; e < 5; ++e)
    EXPECT_TRUE(all_zero(o.grad_up[e]) && all_zero(o.grad_down[e]) && all_zero(o.grad_up_bias[e]) &&
                all_zero(o.grad_down_bias[e]));
}

TEST_P(Experts, ATokenWithNaNHarmsOnlyItself) {
  Config c = config();
  c.tokens = 30, c.hidden = 41, c.ffn = 39, c.activation = Activation::swiglu;
  Bank bank(c);
  const Outputs before = bank.run(impl());
  for (int64_t d = 0; d < c.hidden; ++d) bank.x().set(4 * (c.hidden + 3) + d, d % 2 ? NAN : INFINITY);
  const Outputs after = bank.run(impl());
  for (int64_t i = 0; i < before.y.size(); ++i) {
    const int64_t token = i / c.hidden;
    if (token == 4) {
      EXPECT_TRUE(std::isnan(after.y.get(i)));
      continue;
    }
    ASSERT_EQ(before.y.get(i), after.y.get(i)) << "token " << token;
    ASSERT_EQ(before.grad_x.get(i), after.grad_x.get(i)) << "token " << token;
  }
}

INSTANTIATE_TEST_SUITE_P(Isa, Experts,
                         testing::Combine(testing::ValuesIn(runnable()), testing::Values(DType::f32, DType::bf16)),
                         [](const auto& info) {
                           return std::string(std::get<0>(info.param)->name) +
                                  (std::get<1>(info.param) == DType::f32 ? "_f32" : "_bf16");
                         });

}  // namespace
}  // namespace turnout::kernels::test
