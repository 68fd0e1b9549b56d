// The linear map of rows: exact with small integers, bounded elsewhere, the same bits at any number of threads.
#include <gtest/gtest.h>

#include "bank.h"
#include "linear.h"

namespace turnout::kernels::test {
namespace {

struct Sizes {
  int64_t rows, inputs, outputs;
};

/// Inputs of a map and everything that it makes of them.
struct Map {
  Map(DType t, Sizes given, bool integers, uint32_t seed, int64_t skew = 0) : type(t), n(given), random(seed) {
    x = filled(n.rows * (n.inputs + 3), integers, skew), grad = filled(n.rows * (n.outputs + 1), integers, skew);
    weight = filled(n.outputs * n.inputs, integers, skew), bias = filled(n.outputs, integers, skew);
    y = Buffer(t, n.rows * n.outputs, skew), grad_x = Buffer(t, n.rows * n.inputs, skew);
    grad_weight = Buffer(t, n.outputs * n.inputs, skew), grad_bias = Buffer(t, n.outputs, skew);
  }
  Buffer filled(int64_t count, bool integers, int64_t skew) {
    Buffer b(type, count, skew);
    std::uniform_real_distribution<double> uniform(-1, 1);
    for (int64_t i = 0; i < count; ++i)
      b.set(i, integers ? static_cast<double>(random() % 3) - 1 : uniform(random));
    return b;
  }
  void run(const Implementation& impl, int n_threads) {
    const LinearProblem p{n.rows, n.inputs, n.outputs, type, x.data(), n.inputs + 3, weight.data(), bias.data()};
    linear(impl, p, y.data(), threads(n_threads));
    linear_backward(impl, p, grad.data(), n.outputs + 1, {grad_x.data(), grad_weight.data(), grad_bias.data()},
                    threads(n_threads));
  }
  double x_at(int64_t r, int64_t i) const { return x.get(r * (n.inputs + 3) + i); }
  double grad_at(int64_t r, int64_t o) const { return grad.get(r * (n.outputs + 1) + o); }

  DType type;
  Sizes n;
  std::mt19937 random;
  Buffer x, grad, weight, bias, y, grad_x, grad_weight, grad_bias;
};

/// Adds terms and their sizes: the truth, and what rounding is relative to.
struct Sum {
  double value = 0, size = 0;
  void add(double a, double b) { value += a * b, size += std::abs(a * b); }
};

/// |error| ≤ terms · 2⁻²⁴ · Σ|a||b| for the sums, and a rounding to bf16 of the result.
void expect_near(const Map& m, const Buffer& got, int64_t at, const Sum& want, int64_t terms, const char* name) {
  const double bound = static_cast<double>(terms) * 0x1p-24 * want.size +
                       (m.type == DType::bf16 ? 0x1p-8 * std::abs(want.value) : 0);
  ASSERT_LE(std::abs(got.get(at) - want.value), bound) << name << " element " << at;
}

void expect_right(const Map& m) {
  ASSERT_TRUE(m.y.intact() && m.grad_x.intact() && m.grad_weight.intact() && m.grad_bias.intact());
  for (int64_t r = 0; r < m.n.rows; ++r) {
    for (int64_t o = 0; o < m.n.outputs; ++o) {
      Sum sum;
      for (int64_t i = 0; i < m.n.inputs; ++i) sum.add(m.x_at(r, i), m.weight.get(o * m.n.inputs + i));
      sum.add(m.bias.get(o), 1);
      expect_near(m, m.y, r * m.n.outputs + o, sum, m.n.inputs + 1, "y");
    }
    for (int64_t i = 0; i < m.n.inputs; ++i) {
      Sum sum;
      for (int64_t o = 0; o < m.n.outputs; ++o) sum.add(m.grad_at(r, o), m.weight.get(o * m.n.inputs + i));
      expect_near(m, m.grad_x, r * m.n.inputs + i, sum, m.n.outputs, "grad_x");
    }
  }
  for (int64_t o = 0; o < m.n.outputs; ++o) {
    Sum of_bias;
    for (int64_t r = 0; r < m.n.rows; ++r) of_bias.add(m.grad_at(r, o), 1);
    expect_near(m, m.grad_bias, o, of_bias, m.n.rows, "grad_bias");
    for (int64_t i = 0; i < m.n.inputs; ++i) {
      Sum sum;
      for (int64_t r = 0; r < m.n.rows; ++r) sum.add(m.grad_at(r, o), m.x_at(r, i));
      expect_near(m, m.grad_weight, o * m.n.inputs + i, sum, m.n.rows, "grad_weight");
    }
  }
}

class Linear : public testing::TestWithParam<std::tuple<const Implementation*, DType>> {
 protected:
  const Implementation& impl() const { return *std::get<0>(GetParam()); }
  DType type() const { return std::get<1>(GetParam()); }
};

TEST_P(Linear, TailsOfEverySizeAreRight) {
  uint32_t seed = 1;
  for (int64_t rows : {1, 2, 13, 16, 17, 127, 128, 129, 150})
    for (int64_t inputs : {1, 2, 7, 16, 33, 65})
      for (int64_t outputs : {1, 3, 16, 31, 32, 40}) {
        ++seed;
        Map m(type(), {rows, inputs, outputs}, false, seed, seed % 3);
        m.run(impl(), 1 + static_cast<int>(seed % 2));
        SCOPED_TRACE(testing::Message() << impl().name << " " << rows << "x" << inputs << "x" << outputs);
        expect_right(m);
        if (HasFatalFailure()) return;
      }
}

TEST_P(Linear, SmallIntegersAreExact) {
  Map m(type(), {70, 90, 20}, true, 5);  // sums below 256 in size: exact in bf16 too
  m.run(impl(), 2);
  for (int64_t r = 0; r < m.n.rows; ++r)
    for (int64_t o = 0; o < m.n.outputs; ++o) {
      double sum = m.bias.get(o);
      for (int64_t i = 0; i < m.n.inputs; ++i) sum += m.x_at(r, i) * m.weight.get(o * m.n.inputs + i);
      ASSERT_EQ(m.y.get(r * m.n.outputs + o), sum);
    }
}

TEST_P(Linear, SameBitsAtAnyThreadCount) {
  for (const Sizes& n : {Sizes{5, 70, 9}, Sizes{700, 130, 65}, Sizes{2500, 40, 8}}) {
    Map one(type(), n, false, 3);
    one.run(impl(), 1);
    for (int n_threads : {2, 3, 8}) {
      Map m(type(), n, false, 3);
      m.run(impl(), n_threads);
      EXPECT_TRUE(m.y.same_bits(one.y) && m.grad_x.same_bits(one.grad_x) && m.grad_weight.same_bits(one.grad_weight) &&
                  m.grad_bias.same_bits(one.grad_bias))
          << impl().name << " " << n_threads << " threads, " << n.rows << " rows";
    }
  }
}

TEST_P(Linear, WithoutRowsGradientsAreZero) {
  Map m(type(), {0, 5, 3}, false, 1);
  m.run(impl(), 2);
  for (int64_t i = 0; i < m.grad_weight.size(); ++i) EXPECT_EQ(m.grad_weight.get(i), 0);
  for (int64_t i = 0; i < m.grad_bias.size(); ++i) EXPECT_EQ(m.grad_bias.get(i), 0);
}

TEST(LinearErrors, DoubleAndTheReferenceAreRefused) {
  Map m(DType::f64, {1, 1, 1}, false, 1), single(DType::f32, {1, 1, 1}, false, 1);
  EXPECT_THROW(m.run(find("portable"), 1), std::invalid_argument);
  EXPECT_THROW(single.run(find("reference"), 1), std::invalid_argument);
}

INSTANTIATE_TEST_SUITE_P(Isa, Linear,
                         testing::Combine(testing::ValuesIn(runnable()), testing::Values(DType::f32, DType::bf16)),
                         [](const auto& info) {
                           return std::string(std::get<0>(info.param)->name) +
                                  (std::get<1>(info.param) == DType::f32 ? "_f32" : "_bf16");
                         });

}  // namespace
}  // namespace turnout::kernels::test
