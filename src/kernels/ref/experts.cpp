// Forward and backward of the bank of experts, one row after the other, sums in double.
//
// Letters as in experts.h: T tokens, D hidden, F ffn, U up_rows, R rows.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <vector>

#include "reference.h"

namespace turnout::kernels::ref {
namespace {

/// bfloat16: the upper half of a float, rounded to nearest even.
struct bf16 {
  uint16_t bits;
  bf16() = default;
  explicit bf16(double d) {
    const float f = static_cast<float>(d);
    const uint32_t u = std::bit_cast<uint32_t>(f);
    const uint32_t rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16, quiet = (u >> 16) | 0x40;
    bits = static_cast<uint16_t>(f != f ? quiet : rounded);
  }
  operator double() const { return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16); }
};

constexpr double kSqrtHalf = 0.70710678118654752440, kInvSqrt2Pi = 0.39894228040143267794;
constexpr double kSqrt2OverPi = 0.79788456080286535588, kCubic = 0.044715;

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

/// act(x), and its derivative in d; of the gate where gated.
double act(Activation a, double x, double* d) {
  switch (a) {
    case Activation::relu:
      *d = x > 0 || x != x ? 1 : 0;
      return x < 0 ? 0 : x;
    case Activation::silu:
    case Activation::swiglu: {
      const double s = sigmoid(x);
      *d = s * (1 + x * (1 - s));
      return x * s;
    }
    case Activation::gelu_tanh: {
      const double t = std::tanh(kSqrt2OverPi * (x + kCubic * x * x * x));
      *d = 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * kSqrt2OverPi * (1 + 3 * kCubic * x * x);
      return 0.5 * x * (1 + t);
    }
    case Activation::swiglu_clamped: {
      const double g = x > kClamp ? kClamp : x, s = sigmoid(kClampedSlope * g);
      *d = x > kClamp ? 0 : s * (1 + kClampedSlope * g * (1 - s));
      return g * s;
    }
    case Activation::gelu:
    case Activation::geglu:
      break;
  }
  const double cdf = 0.5 * std::erfc(-x * kSqrtHalf);
  *d = cdf + x * kInvSqrt2Pi * std::exp(-0.5 * x * x);
  return x * cdf;
}

/// What a gated form multiplies act(gate) by, and its derivative in d.
double factor(Activation a, double u, double* d) {
  *d = 1;
  if (a != Activation::swiglu_clamped) return u;
  if (std::abs(u) > kClamp) *d = 0;
  return std::clamp(u, -kClamp, kClamp) + 1;
}

template <class T>
struct Bank {
  const ExpertsProblem& q;
  const PackedExperts* packed = nullptr;
  int64_t D = q.hidden, F = q.ffn, U = q.up_rows();
  bool gated = is_gated(q.activation);

  static const T* at(const void* const* list, int64_t e) { return list ? static_cast<const T*>(list[e]) : nullptr; }
  const T* up(int64_t e) const { return packed ? static_cast<const T*>(packed->up(e)) : at(q.up, e); }
  const T* down(int64_t e) const { return packed ? static_cast<const T*>(packed->down(e)) : at(q.down, e); }
  const T* x(int64_t r) const { return static_cast<const T*>(q.x) + q.token_of_row[r] * q.x_stride; }
  double weight(int64_t t, int64_t k) const {
    const int64_t i = t * q.top_k + k;
    return std::is_same_v<T, double> ? static_cast<const double*>(q.topk_weights)[i]
                                     : static_cast<const float*>(q.topk_weights)[i];
  }

  std::vector<double> weight_of_rows() const {
    std::vector<double> weight_R(static_cast<size_t>(q.rows));
    for (int64_t t = 0; t < q.tokens; ++t)
      for (int64_t k = 0; k < q.top_k; ++k)
        if (const int64_t r = q.row_of_choice[t * q.top_k + k]; r >= 0) weight_R[static_cast<size_t>(r)] = weight(t, k);
    return weight_R;
  }

  /// u = x · upᵀ + bias
  void pre_activation(int64_t e, const T* x_D, double* u_U) const {
    const T *w_UD = up(e), *bias = at(q.up_bias, e);
    for (int64_t i = 0; i < U; ++i) {
      double sum = 0;
      for (int64_t d = 0; d < D; ++d) sum += static_cast<double>(x_D[d]) * static_cast<double>(w_UD[i * D + d]);
      u_U[i] = sum + (bias ? static_cast<double>(bias[i]) : 0);
    }
  }

  double hidden(const double* u_U, int64_t f) const {
    double slope;
    const double h = act(q.activation, u_U[f], &slope);
    return gated ? h * factor(q.activation, u_U[F + f], &slope) : h;
  }
};

template <class T>
void forward_as(const ExpertsProblem& q, const PackedExperts* packed, T* y_TD, T* saved_RU) {
  const Bank<T> bank{q, packed};
  const int64_t D = bank.D, F = bank.F, U = bank.U;
  std::vector<double> a_RD(static_cast<size_t>(q.rows * D)), u_U(static_cast<size_t>(U));
  const std::vector<double> weight_R = bank.weight_of_rows();
  std::vector<T> h_F(static_cast<size_t>(F));
  for (int64_t e = 0; e < q.num_experts; ++e) {
    const T *w_DF = bank.down(e), *bias = bank.at(q.down_bias, e);
    for (int64_t r = q.expert_offsets[e]; r < q.expert_offsets[e + 1]; ++r) {
      bank.pre_activation(e, bank.x(r), u_U.data());
      if (saved_RU)
        for (int64_t i = 0; i < U; ++i) saved_RU[r * U + i] = T(u_U[static_cast<size_t>(i)]);
      const double w = q.weight_before_down ? weight_R[static_cast<size_t>(r)] : 1;
      for (int64_t f = 0; f < F; ++f) h_F[static_cast<size_t>(f)] = T(w * bank.hidden(u_U.data(), f));
      for (int64_t d = 0; d < D; ++d) {
        double sum = 0;
        for (int64_t f = 0; f < F; ++f)
          sum += static_cast<double>(h_F[static_cast<size_t>(f)]) * static_cast<double>(w_DF[d * F + f]);
        a_RD[static_cast<size_t>(r * D + d)] = sum + (bias ? w * static_cast<double>(bias[d]) : 0);
      }
    }
  }
  for (int64_t t = 0; t < q.tokens; ++t)
    for (int64_t d = 0; d < D; ++d) {
      double sum = 0;
      for (int64_t k = 0; k < q.top_k; ++k) {
        const int64_t r = q.row_of_choice[t * q.top_k + k];
        if (r >= 0) sum += (q.weight_before_down ? 1 : bank.weight(t, k)) * a_RD[static_cast<size_t>(r * D + d)];
      }
      y_TD[t * D + d] = T(sum);
    }
}

/// Adds the outer product a ⊗ b, the gradient of a weight from one row.
template <class A, class B>
void add_outer(std::vector<double>& w, const A& a, int64_t na, const B& b, int64_t nb) {
  for (int64_t i = 0; i < na; ++i)
    for (int64_t j = 0; j < nb; ++j)
      w[static_cast<size_t>(i * nb + j)] += static_cast<double>(a[i]) * static_cast<double>(b[j]);
}

template <class T>
void write(void* const* list, int64_t e, const std::vector<double>& sums) {
  if (list == nullptr) return;
  T* out = static_cast<T*>(list[e]);
  for (size_t i = 0; i < sums.size(); ++i) out[i] = T(sums[i]);
}

template <class T>
void backward_as(const ExpertsProblem& q, const T* saved_RU, const T* grad_y, int64_t stride,
                 const ExpertsGradients& grad) {
  using Weight = std::conditional_t<std::is_same_v<T, double>, double, float>;
  const Bank<T> bank{q};
  const int64_t D = bank.D, F = bank.F, U = bank.U;
  const auto n = [](int64_t i) { return static_cast<size_t>(i); };

  const std::vector<double> weight_R = bank.weight_of_rows();
  std::vector<double> dot_R(n(q.rows)), dx_RD(n(q.rows * D));
  std::vector<double> u_U(n(U)), p_F(n(F));
  std::vector<T> du_U(n(U)), wh_F(n(F));
  for (int64_t e = 0; e < q.num_experts; ++e) {
    const T *up_UD = bank.up(e), *down_DF = bank.down(e), *down_bias = bank.at(q.down_bias, e);
    std::vector<double> dup_UD(n(U * D)), ddown_DF(n(D * F)), dup_bias_U(n(U)), ddown_bias_D(n(D));
    for (int64_t r = q.expert_offsets[e]; r < q.expert_offsets[e + 1]; ++r) {
      const T *x_D = bank.x(r), *g_D = grad_y + q.token_of_row[r] * stride;
      const double w = weight_R[n(r)];
      // u, rounded as forward keeps it
      bank.pre_activation(e, x_D, u_U.data());
      for (int64_t i = 0; i < U; ++i) u_U[n(i)] = static_cast<double>(saved_RU ? saved_RU[r * U + i] : T(u_U[n(i)]));
      // p = grad_y · down; d topk_weight = ⟨grad_y, a⟩ = ⟨p, h⟩ + ⟨grad_y, bias⟩
      for (int64_t f = 0; f < F; ++f) {
        p_F[n(f)] = 0;
        for (int64_t d = 0; d < D; ++d)
          p_F[n(f)] += static_cast<double>(g_D[d]) * static_cast<double>(down_DF[d * F + f]);
        const double h = bank.hidden(u_U.data(), f);
        dot_R[n(r)] += p_F[n(f)] * h;
        wh_F[n(f)] = T(w * h);
      }
      if (down_bias)
        for (int64_t d = 0; d < D; ++d) dot_R[n(r)] += static_cast<double>(g_D[d]) * static_cast<double>(down_bias[d]);
      // du = w·p ⊙ act'(u)
      for (int64_t f = 0; f < F; ++f) {
        double slope, up_slope = 1;
        const double gate = act(q.activation, u_U[n(f)], &slope);
        const double up = bank.gated ? factor(q.activation, u_U[n(F + f)], &up_slope) : 1;
        du_U[n(f)] = T(w * p_F[n(f)] * up * slope);
        if (bank.gated) du_U[n(F + f)] = T(w * p_F[n(f)] * gate * up_slope);
      }
      // gradients of x, up, down, biases
      for (int64_t d = 0; d < D; ++d)
        for (int64_t i = 0; i < U; ++i)
          dx_RD[n(r * D + d)] += static_cast<double>(du_U[n(i)]) * static_cast<double>(up_UD[i * D + d]);
      add_outer(dup_UD, du_U, U, x_D, D);
      add_outer(ddown_DF, g_D, D, wh_F, F);
      for (int64_t i = 0; i < U; ++i) dup_bias_U[n(i)] += static_cast<double>(du_U[n(i)]);
      for (int64_t d = 0; d < D; ++d) ddown_bias_D[n(d)] += w * static_cast<double>(g_D[d]);
    }
    write<T>(grad.up, e, dup_UD);
    write<T>(grad.down, e, ddown_DF);
    write<T>(grad.up_bias, e, dup_bias_U);
    write<T>(grad.down_bias, e, ddown_bias_D);
  }
  for (int64_t t = 0; t < q.tokens; ++t) {
    const int64_t* row = q.row_of_choice + t * q.top_k;
    if (grad.x)
      for (int64_t d = 0; d < D; ++d) {
        double sum = 0;
        for (int64_t k = 0; k < q.top_k; ++k)
          if (row[k] >= 0) sum += dx_RD[n(row[k] * D + d)];
        static_cast<T*>(grad.x)[t * D + d] = T(sum);
      }
    if (grad.topk_weights)
      for (int64_t k = 0; k < q.top_k; ++k)
        static_cast<Weight*>(grad.topk_weights)[t * q.top_k + k] =
            row[k] >= 0 ? static_cast<Weight>(dot_R[n(row[k])]) : Weight{0};
  }
}

template <class F>
void by_type(DType t, F&& f) {
  if (t == DType::f32) return f(float{});
  if (t == DType::bf16) return f(bf16{});
  f(double{});
}

}  // namespace

void forward(const ExpertsProblem& q, const PackedExperts* packed, void* y, void* saved_up) {
  by_type(q.dtype, [&](auto t) {
    using T = decltype(t);
    forward_as<T>(q, packed, static_cast<T*>(y), static_cast<T*>(saved_up));
  });
}

void backward(const ExpertsProblem& q, const void* saved_up, const void* grad_y, int64_t grad_y_stride,
              const ExpertsGradients& grad) {
  by_type(q.dtype, [&](auto t) {
    using T = decltype(t);
    backward_as<T>(q, static_cast<const T*>(saved_up), static_cast<const T*>(grad_y), grad_y_stride, grad);
  });
}

}  // namespace turnout::kernels::ref
