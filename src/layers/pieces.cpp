// Custom functions, since split and cat of torch take new memory from the system.
#include "layers/pieces.h"

#include "../ops/cpu/fresh.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/variable.h>

namespace turnout {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using Tensors = std::vector<at::Tensor>;

class Cut : public Function<Cut> {
 public:
  static Tensors forward(AutogradContext*, const at::Tensor& whole, const std::vector<int64_t>& counts) {
    at::AutoDispatchBelowADInplaceOrView below;
    auto pieces = whole.split_with_sizes(counts);
    for (const auto& piece : pieces) {
      if (piece.is_inference()) continue;
      using namespace torch::autograd::impl;
      set_version_counter(piece, version_counter(whole));
    }
    return pieces;
  }
  static Tensors backward(AutogradContext*, Tensors grads) { return {join(grads), {}}; }
};

class Join : public Function<Join> {
 public:
  static at::Tensor forward(AutogradContext* context, at::TensorList pieces) {
    at::AutoDispatchBelowADInplaceOrView below;
    auto shape = pieces.front().sizes().vec();
    shape[0] = 0;
    std::vector<int64_t> counts;
    for (const auto& piece : pieces) {
      counts.push_back(piece.size(0));
      shape[0] += counts.back();
    }
    auto whole = ops::fresh(shape, pieces.front().options());
    int64_t first = 0;
    for (const auto& piece : pieces) {
      whole.narrow(0, first, piece.size(0)).copy_(piece);
      first += piece.size(0);
    }
    context->saved_data["counts"] = std::move(counts);
    return whole;
  }
  static Tensors backward(AutogradContext* context, Tensors grads) {
    return cut(grads[0], context->saved_data["counts"].toIntVector());
  }
};

}  // namespace

std::vector<at::Tensor> cut(const at::Tensor& whole, const std::vector<int64_t>& counts) {
  return counts.size() == 1 ? Tensors{whole} : Cut::apply(whole, counts);
}

at::Tensor join(const std::vector<at::Tensor>& pieces) {
  return pieces.size() == 1 ? pieces.front() : Join::apply(at::TensorList(pieces));
}

}  // namespace turnout
