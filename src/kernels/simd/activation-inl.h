// Activations and their derivatives, a register at a time.
#pragma once

namespace turnout::kernels {
namespace {

/// eˣ, relative error 2⁻²³, x clamped to ±87: x = n·ln 2 + r, a polynomial in r (Cephes expf), 2ⁿ by exponent.
template <class V>
TURNOUT_INLINE typename V::Reg exp(typename V::Reg x) {
  x = V::clamp(x, -87.f, 87.f);
  const auto n = V::round(V::mul(x, V::set1(1.44269504f)));
  auto r = V::fma(n, V::set1(-0.693359375f), x);
  r = V::fma(n, V::set1(2.12194440e-4f), r);
  auto p = V::fma(V::set1(1.9875691500E-4f), r, V::set1(1.3981999507E-3f));
  p = V::fma(p, r, V::set1(8.3334519073E-3f));
  p = V::fma(p, r, V::set1(4.1665795894E-2f));
  p = V::fma(p, r, V::set1(1.6666665459E-1f));
  p = V::fma(p, r, V::set1(5.0000001201E-1f));
  p = V::fma(p, V::mul(r, r), V::add(r, V::set1(1.f)));
  return V::scale2(p, n);
}

template <class V>
TURNOUT_INLINE typename V::Reg sigmoid(typename V::Reg x) {
  return V::reciprocal(V::add(V::set1(1.f), exp<V>(V::sub(V::zero(), x))));
}

/// `v` where x is at most `limit`, else 0.
template <class V>
TURNOUT_INLINE typename V::Reg keep_within(typename V::Reg x, float limit, typename V::Reg v) {
  return V::sub(v, V::keep_positive(V::sub(x, V::set1(limit)), v));
}

/// What a gated form multiplies act(gate) by, and its derivative where `d` is not null.
template <class V, Activation A>
TURNOUT_INLINE typename V::Reg factor(typename V::Reg u, typename V::Reg* d = nullptr) {
  const auto one = V::set1(1.f);
  if constexpr (A == Activation::swiglu_clamped) {
    constexpr float limit = static_cast<float>(kClamp);
    if (d) *d = keep_within<V>(V::abs(u), limit, one);
    return V::add(V::clamp(u, -limit, limit), one);
  } else {
    if (d) *d = one;
    return u;
  }
}

/// act(x), and its derivative where `d` is not null. For a gated form: of the gate.
template <class V, Activation A>
TURNOUT_INLINE typename V::Reg act(typename V::Reg x, typename V::Reg* d = nullptr) {
  using Reg = typename V::Reg;
  const Reg one = V::set1(1.f);
  if constexpr (A == Activation::relu) {
    if (d) *d = V::keep_positive(x, one);
    return V::relu(x);
  } else if constexpr (A == Activation::silu || A == Activation::swiglu) {
    const Reg s = sigmoid<V>(x);
    if (d) *d = V::mul(s, V::fma(x, V::sub(one, s), one));
    return V::mul(x, s);
  } else if constexpr (A == Activation::swiglu_clamped) {
    // below −60 the product is under 1e-36, as far as exp's own clamp lets it fall
    constexpr float limit = static_cast<float>(kClamp);
    const Reg g = V::clamp(x, -60.f, limit), v = V::mul(g, V::set1(static_cast<float>(kClampedSlope)));
    const Reg s = sigmoid<V>(v);
    if (d) *d = keep_within<V>(x, limit, V::mul(s, V::fma(v, V::sub(one, s), one)));
    return V::mul(g, s);
  } else if constexpr (A == Activation::gelu_tanh) {
    // ½x(1 + tanh v) = x·σ(2v), v = √(2/π)·(x + 0.044715 x³)
    const Reg xx = V::mul(x, x);
    const Reg v2 = V::mul(x, V::fma(xx, V::set1(2 * 0.79788456f * 0.044715f), V::set1(2 * 0.79788456f)));
    const Reg s = sigmoid<V>(v2);
    if (d) {
      const Reg slope = V::fma(xx, V::set1(6 * 0.79788456f * 0.044715f), V::set1(2 * 0.79788456f));
      *d = V::mul(s, V::fma(V::mul(x, V::sub(one, s)), slope, one));
    }
    return V::mul(x, s);
  } else {
    // exact GELU = x·Φ(x); erf(|z|) = 1 − P(t)·e^{−z²}, t = 1/(1 + 0.3275911|z|)
    // (Abramowitz and Stegun 7.1.26, absolute error 1.5e-7), z = x/√2
    const Reg z = V::clamp(V::abs(V::mul(x, V::set1(0.70710678f))), 0.f, 100.f);
    const Reg t = V::reciprocal(V::fma(z, V::set1(0.3275911f), one));
    Reg p = V::fma(V::set1(1.061405429f), t, V::set1(-1.453152027f));
    p = V::fma(p, t, V::set1(1.421413741f));
    p = V::fma(p, t, V::set1(-0.284496736f));
    p = V::fma(p, t, V::set1(0.254829592f));
    const Reg e = exp<V>(V::sub(V::zero(), V::mul(z, z)));
    const Reg erf = V::sub(one, V::mul(V::mul(p, t), e));
    const Reg y = V::mul(V::set1(0.5f), V::fma(V::abs(x), erf, x));  // ½(x + |x|·erf|z|)
    if (d) {
      // Φ(x) + x·φ(x); Φ = ½ ± ½·erf|z|
      const Reg half = V::mul(V::set1(0.5f), erf);
      const Reg phi = V::mul(V::set1(0.39894228f), e);
      const Reg cdf = V::add(V::set1(0.5f), V::sub(V::keep_positive(x, V::mul(V::set1(2.f), half)), half));
      *d = V::fma(x, phi, cdf);
    }
    return y;
  }
}

}  // namespace
}  // namespace turnout::kernels
