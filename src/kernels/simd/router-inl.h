// The router's stages: included once by the translation unit of an instruction set, after its registers.
//
// Rows are copied to buffers that are padded to whole vectors: by −∞, whose score is 0, or by zeros.
#pragma once

#include "activation-inl.h"
#include "topk-inl.h"

namespace turnout::kernels {
namespace {

constexpr float kInfinity = __builtin_inff();
constexpr float kSigmoidEpsilon = 1e-20f;  // Megatron-LM's, DeepSeek-V3's
constexpr float kLeastExponent = -87.f;    // below it exp() would stop falling; such scores are 0

template <class V>
struct Router {
  using Reg = typename V::Reg;
  static constexpr int L = V::L;

  struct alignas(64) Row {
    float v[kMostExperts + 16];
  };

  static int64_t padded(int64_t n) { return (n + L - 1) / L * L; }

  static void pad(Row& row, int64_t n, float value) {
    for (int64_t i = n; i < padded(n); ++i) row.v[i] = value;
  }

  static void read(Row& row, const float* from, int64_t n) {
    memcpy(row.v, from, static_cast<size_t>(n) * 4);
    pad(row, n, 0.f);
  }

  static void read_logits(Row& row, const RouterProblem& q, int64_t t) {
    const int64_t n = q.num_experts;
    if (q.dtype == DType::f32) {
      memcpy(row.v, static_cast<const float*>(q.logits) + t * q.stride, static_cast<size_t>(n) * 4);
    } else {
      const char* from = static_cast<const char*>(q.logits) + t * q.stride * 2;
      for (int64_t i = 0; i < n; i += L)
        V::store(row.v + i, n - i >= L ? V::load_bf16(from + i * 2) : V::load_bf16_n(from + i * 2, n - i));
    }
    pad(row, n, -kInfinity);
  }

  /// eˣ that is 0 from e⁻⁸⁷ down, −∞ included; NaN stays.
  static TURNOUT_INLINE Reg exp_or_zero(Reg x) {
    return V::keep_positive(V::sub(x, V::set1(kLeastExponent)), exp<V>(x));
  }
  static TURNOUT_INLINE Reg sigmoid_or_zero(Reg x) {
    return V::keep_positive(V::sub(x, V::set1(kLeastExponent)), sigmoid<V>(x));
  }

  static float largest(const Row& row, int64_t n) {
    float lanes[L];
    for (int l = 0; l < L; ++l) lanes[l] = -kInfinity;
    for (int64_t i = 0; i < padded(n); i += L)
      for (int l = 0; l < L; ++l) lanes[l] = row.v[i + l] > lanes[l] ? row.v[i + l] : lanes[l];
    float most = lanes[0];
    for (int l = 1; l < L; ++l) most = lanes[l] > most ? lanes[l] : most;
    return most;
  }

  /// s = softmax(x) over padded rows. x of −∞ alone, or with +∞ or NaN in it, gives NaN.
  static void softmax(const Row& x, Row& s, int64_t n) {
    const float most = largest(x, n);
    Reg sum = V::zero();
    for (int64_t i = 0; i < padded(n); i += L) {
      const Reg e = exp_or_zero(V::sub(V::load(x.v + i), V::set1(most)));
      V::store(s.v + i, e);
      sum = V::add(sum, e);
    }
    const Reg scale = V::set1(1.f / V::sum(sum));
    for (int64_t i = 0; i < padded(n); i += L) V::store(s.v + i, V::mul(V::load(s.v + i), scale));
  }

  /// @return Σ s + 1e-20
  static float sigmoids(const Row& x, Row& s, int64_t n) {
    Reg sum = V::zero();
    for (int64_t i = 0; i < padded(n); i += L) {
      const Reg v = sigmoid_or_zero(V::load(x.v + i));
      V::store(s.v + i, v);
      sum = V::add(sum, v);
    }
    return V::sum(sum) + kSigmoidEpsilon;
  }

  static float dot(const Row& a, const Row& b, int64_t n) {
    Reg sum = V::zero();
    for (int64_t i = 0; i < padded(n); i += L) sum = V::fma(V::load(a.v + i), V::load(b.v + i), sum);
    return V::sum(sum);
  }

  struct alignas(64) Keys {
    int64_t v[kMostExperts];
  };

  /// Replaces the keys of the groups that are left out.
  static void limit_groups(const RouterProblem& q, const Row& choice, Keys& keys) {
    const int64_t size = q.num_experts / q.groups;
    const float instead = q.mask_by_zero ? 0.f : -kInfinity;
    Row best;
    Keys of_groups;
    int64_t ids[kMostChoices];
    bool kept[kMostExperts] = {};
    for (int64_t g = 0; g < q.groups; ++g) {
      topk_of<4 * L>(keys.v + g * size, size, q.group_top, ids);
      float sum = choice.v[ids[0]];
      for (int64_t i = 1; i < q.group_top; ++i) sum += choice.v[ids[i]];
      best.v[g] = sum;
    }
    keys_of(best.v, q.groups, of_groups.v);
    topk_of<4 * L>(of_groups.v, q.groups, q.kept_groups, ids);
    for (int64_t i = 0; i < q.kept_groups; ++i) kept[ids[i]] = true;
    for (int64_t g = 0; g < q.groups; ++g)
      for (int64_t e = g * size; !kept[g] && e < (g + 1) * size; ++e) keys.v[e] = key_of(instead, e);
  }

  /// The softmax over the chosen logits, padded by zeros.
  static void softmax_of_chosen(const Row& x, const int64_t* ids, int64_t k, Row& w) {
    Row chosen;
    for (int64_t i = 0; i < k; ++i) chosen.v[i] = x.v[ids[i]];
    pad(chosen, k, -kInfinity);
    softmax(chosen, w, k);
  }

  static void weigh(const RouterProblem& q, const Row& x, const Row& s, const int64_t* ids, float* weights) {
    const int64_t k = q.top_k;
    if (q.weights == RouterWeight::softmax_of_topk) {
      Row w;
      softmax_of_chosen(x, ids, k, w);
      for (int64_t i = 0; i < k; ++i) weights[i] = w.v[i] * q.scale;
      return;
    }
    float divisor = 1.f;
    if (q.weights == RouterWeight::normalized) {
      divisor = 0.f;
      for (int64_t i = 0; i < k; ++i) divisor += s.v[ids[i]];
      divisor += q.epsilon;
    }
    for (int64_t i = 0; i < k; ++i) weights[i] = s.v[ids[i]] / divisor * q.scale;
  }

  static void forward(const RouterProblem& q, const RouterOutput& out, int64_t begin, int64_t end) {
    const int64_t n = q.num_experts, k = q.top_k;
    const bool by_score = q.selection_bias != nullptr || q.groups > 1;
    Row x, s, choice;
    Keys keys;
    for (int64_t t = begin; t < end; ++t) {
      int64_t* ids = out.ids + t * k;
      float* scores = out.scores + t * n;
      read_logits(x, q, t);
      float total = 1.f;
      if (q.score == RouterScore::softmax)
        softmax(x, s, n);
      else
        total = sigmoids(x, s, n);
      if (by_score) {
        for (int64_t i = 0; i < n; ++i) choice.v[i] = q.selection_bias ? s.v[i] + q.selection_bias[i] : s.v[i];
      }
      keys_of(by_score ? choice.v : x.v, n, keys.v);
      if (q.groups > 1) limit_groups(q, choice, keys);
      topk_of<4 * L>(keys.v, n, k, ids);
      weigh(q, x, s, ids, out.weights + t * k);
      if (q.score == RouterScore::softmax)
        memcpy(scores, s.v, static_cast<size_t>(n) * 4);
      else
        for (int64_t i = 0; i < n; ++i) scores[i] = s.v[i] / total;
    }
  }

  /// Adds to g, the gradient of s (of the logits for softmax_of_topk), what comes through the weights.
  static void weigh_backward(const RouterProblem& q, const Row& x, const Row& s, const int64_t* ids, const float* grad,
                             Row& g) {
    const int64_t k = q.top_k;
    if (q.weights == RouterWeight::probability) {
      for (int64_t i = 0; i < k; ++i) g.v[ids[i]] += q.scale * grad[i];
      return;
    }
    Row w;
    float divisor = 1.f, mean = 0.f;
    if (q.weights == RouterWeight::softmax_of_topk) {
      softmax_of_chosen(x, ids, k, w);
    } else {
      divisor = 0.f;
      for (int64_t i = 0; i < k; ++i) divisor += s.v[ids[i]];
      divisor += q.epsilon;
      for (int64_t i = 0; i < k; ++i) w.v[i] = s.v[ids[i]] / divisor;
    }
    for (int64_t i = 0; i < k; ++i) mean += grad[i] * w.v[i];
    for (int64_t i = 0; i < k; ++i) {
      const float centred = q.scale * (grad[i] - mean);
      g.v[ids[i]] += q.weights == RouterWeight::normalized ? centred / divisor : centred * w.v[i];
    }
  }

  /// g becomes the gradient of the logits. s: softmax, or sigmoids
  static void score_backward(const RouterProblem& q, const Row& s, Row& g) {
    const int64_t n = q.num_experts;
    const Reg mean = V::set1(q.score == RouterScore::softmax ? dot(s, g, n) : 0.f);
    for (int64_t i = 0; i < padded(n); i += L) {
      const Reg si = V::load(s.v + i), gi = V::load(g.v + i);
      const Reg outer = V::mul(si, V::sub(gi, mean));
      V::store(g.v + i, q.score == RouterScore::softmax ? outer : V::mul(outer, V::sub(V::set1(1.f), si)));
    }
  }

  static void write(const RouterProblem& q, const Row& g, void* to, int64_t t) {
    const int64_t n = q.num_experts;
    if (q.dtype == DType::f32) {
      memcpy(static_cast<float*>(to) + t * n, g.v, static_cast<size_t>(n) * 4);
      return;
    }
    char* row = static_cast<char*>(to) + t * n * 2;
    for (int64_t i = 0; i < n; i += L) {
      if (n - i >= L)
        V::store_bf16(row + i * 2, V::load(g.v + i));
      else
        V::store_bf16_n(row + i * 2, V::load(g.v + i), n - i);
    }
  }

  static void backward(const RouterProblem& q, const RouterGradients& io, int64_t begin, int64_t end) {
    const int64_t n = q.num_experts, k = q.top_k;
    const bool of_chosen = q.weights == RouterWeight::softmax_of_topk;
    Row x, s, g;
    for (int64_t t = begin; t < end; ++t) {
      const int64_t* ids = io.ids + t * k;
      const float* grad_weights = io.grad_weights ? io.grad_weights + t * k : nullptr;
      const bool sigmoid = q.score == RouterScore::sigmoid;
      if (sigmoid || of_chosen) read_logits(x, q, t);
      float total = 1.f;
      if (sigmoid)
        total = sigmoids(x, s, n);
      else
        read(s, io.scores + t * n, n);
      if (io.grad_scores) {
        read(g, io.grad_scores + t * n, n);
        if (sigmoid) {
          const float mean = dot(s, g, n) / total;
          for (int64_t i = 0; i < n; ++i) g.v[i] = (g.v[i] - mean) / total;
        }
      } else {
        for (int64_t i = 0; i < padded(n); ++i) g.v[i] = 0.f;
      }
      if (grad_weights && !of_chosen) weigh_backward(q, x, s, ids, grad_weights, g);
      score_backward(q, s, g);
      if (grad_weights && of_chosen) weigh_backward(q, x, s, ids, grad_weights, g);
      write(q, g, io.grad_logits, t);
    }
  }

  static constexpr RouterStages kStages{forward, backward};
};

}  // namespace
}  // namespace turnout::kernels
