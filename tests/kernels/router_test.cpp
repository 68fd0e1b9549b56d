// The router's kernel on every instruction set of the machine: against its formulas in double, ties, NaN, threads.
#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>

#include "bank.h"
#include "router.h"

namespace turnout::kernels::test {
namespace {

struct Case {
  int64_t tokens, experts, top_k;
  RouterScore score = RouterScore::softmax;
  RouterWeight weights = RouterWeight::normalized;
  int64_t groups = 1, kept_groups = 1, group_top = 1;
  bool biased = false, bf16 = false, by_zero = false;
};

struct Routed {
  std::vector<int64_t> ids;
  std::vector<float> weights, scores;
};

uint16_t bf16_of(float v) {
  uint32_t u;
  std::memcpy(&u, &v, 4);
  return static_cast<uint16_t>(u >> 16);
}

/// Logits in both types, equal in value, and random gradients.
struct Inputs {
  explicit Inputs(const Case& c, uint32_t seed = 1) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < c.tokens * c.experts; ++i) {
      const uint16_t half = bf16_of(2 * normal(random));
      const uint32_t bits = static_cast<uint32_t>(half) << 16;
      float v;
      std::memcpy(&v, &bits, 4);
      logits.push_back(c.bf16 ? v : v + 1e-3f * normal(random));
      halves.push_back(half);
      grad_scores.push_back(normal(random));
    }
    for (int64_t i = 0; i < c.experts; ++i) bias.push_back(normal(random));
    for (int64_t i = 0; i < c.tokens * c.top_k; ++i) grad_weights.push_back(normal(random));
  }
  std::vector<float> logits, bias, grad_weights, grad_scores;
  std::vector<uint16_t> halves;
};

RouterProblem problem(const Case& c, const Inputs& in) {
  RouterProblem q;
  q.tokens = c.tokens;
  q.num_experts = q.stride = c.experts;
  q.top_k = c.top_k;
  q.dtype = c.bf16 ? DType::bf16 : DType::f32;
  q.logits = c.bf16 ? static_cast<const void*>(in.halves.data()) : in.logits.data();
  q.score = c.score;
  q.weights = c.weights;
  q.epsilon = 0.125f;
  q.scale = 1.5f;
  q.selection_bias = c.biased ? in.bias.data() : nullptr;
  q.groups = c.groups;
  q.kept_groups = c.kept_groups;
  q.group_top = c.group_top;
  q.mask_by_zero = c.by_zero;
  return q;
}

Routed run(const RouterStages& stages, const RouterProblem& q, int n_threads = 1) {
  Routed r{std::vector<int64_t>(static_cast<size_t>(q.tokens * q.top_k)),
           std::vector<float>(static_cast<size_t>(q.tokens * q.top_k)),
           std::vector<float>(static_cast<size_t>(q.tokens * q.num_experts))};
  route(stages, q, {r.ids.data(), r.weights.data(), r.scores.data()}, threads(n_threads));
  return r;
}

/// One token in double: what the comment of router.h says.
struct Truth {
  std::vector<double> raw, scores, choice;

  Truth(const RouterProblem& q, const float* x) {
    const auto n = static_cast<size_t>(q.num_experts);
    const double most = *std::max_element(x, x + n);
    double total = 0;
    for (size_t i = 0; i < n; ++i) {
      raw.push_back(q.score == RouterScore::softmax ? std::exp(x[i] - most) : 1 / (1 + std::exp(-double(x[i]))));
      total += raw.back();
    }
    for (double& s : raw) {
      scores.push_back(s / total);
      if (q.score == RouterScore::softmax) s /= total;
    }
    const bool by_score = q.selection_bias || q.groups > 1;
    for (size_t i = 0; i < n; ++i)
      choice.push_back(by_score ? raw[i] + (q.selection_bias ? q.selection_bias[i] : 0) : x[i]);
    if (q.groups > 1) limit(q);
  }

  void limit(const RouterProblem& q) {
    const size_t size = choice.size() / static_cast<size_t>(q.groups);
    std::vector<std::pair<double, size_t>> best;
    for (size_t g = 0; g < static_cast<size_t>(q.groups); ++g) {
      std::vector<double> of_group(choice.begin() + g * size, choice.begin() + (g + 1) * size);
      std::sort(of_group.rbegin(), of_group.rend());
      best.emplace_back(-std::accumulate(of_group.begin(), of_group.begin() + q.group_top, 0.0), g);
    }
    std::sort(best.begin(), best.end());
    for (size_t i = static_cast<size_t>(q.kept_groups); i < best.size(); ++i)
      for (size_t e = 0; e < size; ++e) choice[best[i].second * size + e] = q.mask_by_zero ? 0.0 : -INFINITY;
  }

  std::vector<double> weights(const RouterProblem& q, const float* x, const int64_t* ids) const {
    std::vector<double> w;
    double total = q.weights == RouterWeight::normalized ? q.epsilon : 0;
    for (int64_t i = 0; i < q.top_k; ++i) {
      w.push_back(q.weights == RouterWeight::softmax_of_topk ? std::exp(double(x[ids[i]])) : raw[ids[i]]);
      total += w.back();
    }
    for (double& v : w) v *= q.scale / (q.weights == RouterWeight::probability ? 1 : total);
    return w;
  }

  /// Σ grad_weights · weights + Σ grad_scores · scores, whose slope is what backward gives.
  double loss(const RouterProblem& q, const float* x, const int64_t* ids, const float* gw, const float* gs) const {
    double sum = 0;
    const auto w = weights(q, x, ids);
    for (int64_t i = 0; i < q.top_k; ++i) sum += gw[i] * w[i];
    for (int64_t i = 0; i < q.num_experts; ++i) sum += gs[i] * scores[i];
    return sum;
  }
};

std::vector<Case> cases() {
  std::vector<Case> all;
  for (int64_t e = 1; e <= 70; ++e) all.push_back({3, e, std::min<int64_t>(e, 1 + e % 9)});
  for (const auto score : {RouterScore::softmax, RouterScore::sigmoid})
    for (const auto weights : {RouterWeight::normalized, RouterWeight::probability, RouterWeight::softmax_of_topk})
      for (const bool biased : {false, true})
        for (const bool bf16 : {false, true}) {
          all.push_back({9, 48, 6, score, weights, 1, 1, 1, biased, bf16});
          all.push_back({9, 48, 6, score, weights, 8, 3, 2, biased, bf16});
          all.push_back({9, 36, 4, score, weights, 4, 2, 1, biased, bf16, true});
        }
  all.push_back({2, 256, 8, RouterScore::sigmoid, RouterWeight::normalized, 8, 4, 2, true});
  all.push_back({2, kMostExperts, kMostChoices});
  return all;
}

class EveryIsa : public testing::TestWithParam<std::string> {
 protected:
  const RouterStages& stages() const { return *router_stages(find(GetParam())); }
};

TEST_P(EveryIsa, FollowsTheFormulas) {
  for (const Case& c : cases()) {
    const Inputs in(c);
    const RouterProblem q = problem(c, in);
    const Routed r = run(stages(), q);
    for (int64_t t = 0; t < c.tokens; ++t) {
      const float* x = in.logits.data() + t * c.experts;
      const int64_t* ids = r.ids.data() + t * c.top_k;
      const Truth truth(q, x);
      for (int64_t i = 0; i < c.top_k; ++i) {
        const auto better = std::count_if(truth.choice.begin(), truth.choice.end(),
                                          [&](double v) { return v > truth.choice[ids[i]] + 1e-6; });
        EXPECT_LE(better, i) << c.experts << " experts, choice " << i;
        EXPECT_NEAR(r.weights[t * c.top_k + i], truth.weights(q, x, ids)[i], 1e-6 * q.scale);
      }
      for (int64_t i = 0; i < c.experts; ++i) EXPECT_NEAR(r.scores[t * c.experts + i], truth.scores[i], 3e-7);
    }
  }
}

TEST_P(EveryIsa, GradientIsTheSlope) {
  for (const Case& c : cases()) {
    if (c.experts > 256) continue;
    const Inputs in(c);
    const RouterProblem q = problem(c, in);
    const Routed r = run(stages(), q);
    std::vector<float> grad(in.logits.size());
    std::vector<uint16_t> halves(in.logits.size());
    void* to = c.bf16 ? static_cast<void*>(halves.data()) : grad.data();
    route_backward(stages(), q, {r.ids.data(), r.scores.data(), in.grad_weights.data(), in.grad_scores.data(), to},
                   threads(1));
    for (size_t i = 0; c.bf16 && i < grad.size(); ++i) {
      const uint32_t bits = static_cast<uint32_t>(halves[i]) << 16;
      std::memcpy(&grad[i], &bits, 4);
    }
    for (int64_t t = 0; t < c.tokens; ++t)
      for (int64_t i = 0; i < c.experts; i += 5) {
        std::vector<float> x(in.logits.begin() + t * c.experts, in.logits.begin() + (t + 1) * c.experts);
        const auto at = [&](float v) {
          x[i] = v;
          return Truth(q, x.data()).loss(q, x.data(), r.ids.data() + t * c.top_k, in.grad_weights.data() + t * c.top_k,
                                         in.grad_scores.data() + t * c.experts);
        };
        const float v = x[i], up = v + 1e-2f, down = v - 1e-2f;
        const double slope = (at(up) - at(down)) / (double(up) - double(down));
        // differences over 0.02 leave 1e-4 / 6 of the third derivative; bf16 rounds to 2⁻⁹
        EXPECT_NEAR(grad[t * c.experts + i], slope, 4e-4 + (c.bf16 ? std::abs(slope) / 256 : 0))
            << c.experts << " experts, token " << t << ", logit " << i;
      }
  }
}

TEST_P(EveryIsa, MissingGradientsAreZeros) {
  const Case c{4, 19, 3};
  const Inputs in(c);
  const RouterProblem q = problem(c, in);
  const Routed r = run(stages(), q);
  const std::vector<float> no_weights(in.grad_weights.size()), no_scores(in.grad_scores.size());
  std::vector<float> a(in.logits.size()), b(a), d(a);
  const auto backward = [&](const float* gw, const float* gs, std::vector<float>& to) {
    route_backward(stages(), q, {r.ids.data(), r.scores.data(), gw, gs, to.data()}, threads(1));
  };
  backward(in.grad_weights.data(), nullptr, a);
  backward(in.grad_weights.data(), no_scores.data(), b);
  EXPECT_EQ(a, b);
  backward(nullptr, in.grad_scores.data(), a);
  backward(no_weights.data(), in.grad_scores.data(), b);
  EXPECT_EQ(a, b);
  backward(nullptr, nullptr, d);
  EXPECT_EQ(d, std::vector<float>(d.size()));
}

TEST_P(EveryIsa, TiesGoToTheLowerIdAndBrokenRowsStayInRange) {
  const Case c{5, 37, 4};
  Inputs in(c);
  std::fill(in.logits.begin(), in.logits.end(), 0.5f);
  in.logits[1 * 37 + 20] = NAN;
  std::fill(in.logits.begin() + 2 * 37, in.logits.begin() + 3 * 37, NAN);
  for (int e = 0; e < 37; ++e) in.logits[3 * 37 + e] = e < 30 ? -INFINITY : float(e);
  in.logits[4 * 37 + 36] = INFINITY;
  const Routed r = run(stages(), problem(c, in));
  const std::vector<int64_t> wanted{0, 1, 2, 3, 20, 0, 1, 2, 0, 1, 2, 3, 36, 35, 34, 33, 36, 0, 1, 2};
  EXPECT_EQ(r.ids, wanted);
  EXPECT_EQ(r.scores[3 * 37], 0.f);  // e to the −∞
  EXPECT_NEAR(r.scores[0], 1.f / 37, 1e-8);
}

TEST_P(EveryIsa, SameBitsAtAnyThreadCount) {
  const Case c{700, 40, 5, RouterScore::sigmoid, RouterWeight::normalized, 4, 2, 2, true};
  const Inputs in(c);
  const RouterProblem q = problem(c, in);
  const Routed one = run(stages(), q);
  for (const int n : {2, 3, 8}) {
    const Routed r = run(stages(), q, n);
    EXPECT_EQ(r.ids, one.ids);
    EXPECT_EQ(r.weights, one.weights);
    EXPECT_EQ(r.scores, one.scores);
  }
}

std::vector<std::string> with_a_router() {
  std::vector<std::string> names;
  for (const auto& candidate : report())
    if (router_stages(*candidate.implementation) && candidate.refusal.find("lacks") == std::string::npos)
      names.emplace_back(candidate.implementation->name);
  return names;
}

INSTANTIATE_TEST_SUITE_P(Isa, EveryIsa, testing::ValuesIn(with_a_router()),
                         [](const auto& info) { return info.param; });

}  // namespace
}  // namespace turnout::kernels::test
