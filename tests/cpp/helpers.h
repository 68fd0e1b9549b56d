// What the C++ tests share: naive loops that are the truth of a layer, and bounds for comparing with them.
#pragma once

#include <turnout/experts.h>

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <functional>
#include <string>

namespace turnout::testing {

/// Message of the exception that `call` throws; the test fails when it throws none.
inline std::string message_of(const std::function<void()>& call) {
  try {
    call();
  } catch (const std::exception& error) {
    return error.what();
  }
  ADD_FAILURE() << "expected an exception";
  return "";
}

#define EXPECT_SAYS(call, words) EXPECT_NE(::turnout::testing::message_of([&] { call; }).find(words), std::string::npos) \
    << ::turnout::testing::message_of([&] { call; })

inline at::Tensor ids(std::vector<std::vector<int64_t>> rows) {
  auto tensor = at::empty({static_cast<int64_t>(rows.size()), static_cast<int64_t>(rows.at(0).size())}, at::kLong);
  for (size_t t = 0; t < rows.size(); ++t)
    for (size_t k = 0; k < rows[t].size(); ++k) tensor[t][k] = rows[t][k];
  return tensor;
}

inline std::vector<int64_t> numbers(const at::Tensor& tensor) {
  const auto flat = tensor.flatten().to(at::kLong).contiguous();
  return {flat.const_data_ptr<int64_t>(), flat.const_data_ptr<int64_t>() + flat.numel()};
}

/// One expert on one token, written without any op of the library. x [hidden]
inline at::Tensor naive_expert(const at::Tensor& x, const at::Tensor& up, const at::Tensor& down,
                               const at::Tensor& up_bias, const at::Tensor& down_bias, Activation activation) {
  auto pre = up.mv(x);
  if (up_bias.defined()) pre = pre + up_bias;
  const auto gate = is_gated(activation) ? pre.narrow(0, 0, pre.size(0) / 2) : pre;
  at::Tensor h;
  switch (activation) {
    case Activation::relu: h = gate.clamp_min(0); break;
    case Activation::silu: case Activation::swiglu: h = gate / (1 + (-gate).exp()); break;
    case Activation::gelu: case Activation::geglu: h = gate * 0.5 * (1 + (gate / std::sqrt(2.0)).erf()); break;
    case Activation::swiglu_clamped:
      h = gate.clamp_max(7) / (1 + (-1.702 * gate.clamp_max(7)).exp());
      break;
    case Activation::gelu_tanh:
      h = 0.5 * gate * (1 + (std::sqrt(2.0 / M_PI) * (gate + 0.044715 * gate.pow(3))).tanh());
      break;
  }
  if (is_gated(activation)) {
    const auto up = pre.narrow(0, pre.size(0) / 2, pre.size(0) / 2);
    h = h * (activation == Activation::swiglu_clamped ? up.clamp(-7, 7) + 1 : up);
  }
  const auto y = down.mv(h);
  return down_bias.defined() ? y + down_bias : y;
}

/// Largest error that one product of length k may make in type `type`, times a factor for the chain of two products.
inline double bound(const at::Tensor& truth, int64_t k, at::ScalarType type) {
  const double eps = type == at::kDouble ? 2.2e-16 : type == at::kFloat ? 1.2e-7 : 7.8e-3;
  const double sums = type == at::kBFloat16 ? 8 : 4 * std::sqrt(static_cast<double>(k));
  return sums * eps * std::max(1.0, truth.abs().max().item<double>());
}

}  // namespace turnout::testing
