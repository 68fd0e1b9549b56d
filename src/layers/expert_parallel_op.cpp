// expert_parallel as an op by group name: for Python, eager and compiled.
//
// Eager it is a composition, whose graph keeps what the backward needs. A compiled graph sees two opaque ops, because
// the number of rows that arrive is known only when it runs: there the backward computes the forward anew.
#include <turnout/experts.h>

#include "../distributed/collectives.h"
#include "../ops/checks.h"
#include "run_on_ranks.h"
#include "weight_parts.h"

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <array>
#include <optional>
#include <string>

namespace turnout {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;
using Lists = std::array<at::TensorList, 4>;  // up, down, up_bias, down_bias
using Gradients = std::tuple<at::Tensor, at::Tensor, std::vector<at::Tensor>, std::vector<at::Tensor>,
                             std::vector<at::Tensor>, std::vector<at::Tensor>>;

constexpr const char* kOp = "turnout::expert_parallel";

struct Arguments {
  const at::Tensor &x, &topk_ids, &topk_weights;
  Lists lists;
  c10::string_view activation;
  int64_t num_experts;
  c10::string_view group;
  int64_t chunks;
};

void check(const Arguments& a) {
  ops::check_dim(kOp, "x", a.x, 2, "[tokens, hidden]");
  ops::check_dim(kOp, "topk_ids", a.topk_ids, 2, "[tokens, top_k]");
  ops::check_size(kOp, "topk_ids", a.topk_ids, 0, a.x.sym_size(0), "tokens of x");
  ops::check_at_least(kOp, "num_experts", a.num_experts, 1);
  ops::check_at_least(kOp, "chunks", a.chunks, 1);
  TORCH_CHECK_VALUE(!a.lists[0].empty(), kOp, ": up is empty, expected a bank or one tensor an expert");
}

at::Tensor run(const Arguments& a) {
  check(a);
  const auto group = find_group(std::string(a.group));
  const auto bounds = expert_bounds(a.num_experts, group.size);
  const auto held = bounds[group.rank + 1] - bounds[group.rank];
  const auto& up = a.lists[0];
  const auto given = up.size() == 1 && up[0].dim() == 3 ? up[0].size(0) : static_cast<int64_t>(up.size());
  TORCH_CHECK_VALUE(given == held, kOp, ": up holds ", given, " experts, expected ", held, " of ", a.num_experts,
                    " (expert_bounds for rank ", group.rank, " of ", group.size, ")");
  const ExpertWeights weights{a.lists[0].vec(), a.lists[1].vec(), a.lists[2].vec(), a.lists[3].vec()};
  const auto activation = parse_activation(std::string(a.activation));
  const auto local = [&](const std::vector<int64_t>& counts) { return run_parts(weights, activation, counts); };
  distributed::check_alike("exchange of counts", {{"num_experts", a.num_experts}, {"chunks", a.chunks}}, group);
  return run_on_ranks(a.x, a.topk_weights, plan(a.topk_ids, a.num_experts), {group, bounds, a.chunks}, local, [] {});
}

at::Tensor forward_op(const at::Tensor& x, const at::Tensor& topk_ids, const at::Tensor& topk_weights,
                      at::TensorList up, at::TensorList down, at::TensorList up_bias, at::TensorList down_bias,
                      c10::string_view activation, int64_t num_experts, c10::string_view group, int64_t chunks) {
  return run({x, topk_ids, topk_weights, {up, down, up_bias, down_bias}, activation, num_experts, group, chunks});
}

at::Tensor forward_meta(const at::Tensor& x, const at::Tensor& topk_ids, const at::Tensor& topk_weights,
                        at::TensorList up, at::TensorList down, at::TensorList up_bias, at::TensorList down_bias,
                        c10::string_view activation, int64_t num_experts, c10::string_view group, int64_t chunks) {
  check({x, topk_ids, topk_weights, {up, down, up_bias, down_bias}, activation, num_experts, group, chunks});
  return at::empty_symint(x.sym_sizes(), x.options());
}

// The forward once more, with a graph, then its gradients.
Gradients backward_op(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& topk_ids,
                      const at::Tensor& topk_weights, at::TensorList up, at::TensorList down, at::TensorList up_bias,
                      at::TensorList down_bias, c10::string_view activation, int64_t num_experts,
                      c10::string_view group, int64_t chunks, std::array<bool, 6> needs) {
  const auto local = c10::impl::tls_local_dispatch_key_set();
  const c10::impl::ForceDispatchKeyGuard with_autograd(
      local.included_, local.excluded_ - c10::autograd_dispatch_keyset_with_ADInplaceOrView);
  const at::AutoGradMode enabled(true);
  variable_list inputs;
  const auto leaf = [&](const at::Tensor& tensor, bool needed) {
    auto own = tensor.detach().requires_grad_(needed);
    if (needed) inputs.push_back(own);
    return own;
  };
  const auto own_x = leaf(x, needs[0]), own_weights = leaf(topk_weights, needs[1]);
  std::array<variable_list, 4> lists;
  const Lists given{up, down, up_bias, down_bias};
  for (size_t i = 0; i < given.size(); ++i)
    for (const auto& tensor : given[i]) lists[i].push_back(leaf(tensor, needs[2 + i]));
  const auto y = run({own_x, topk_ids, own_weights, {lists[0], lists[1], lists[2], lists[3]}, activation, num_experts,
                      group, chunks});
  auto grads = torch::autograd::grad({y}, inputs, {grad});

  size_t next = 0;
  Gradients made{at::empty({0}, x.options()), at::empty({0}, topk_weights.options()), {}, {}, {}, {}};
  if (needs[0]) std::get<0>(made) = grads[next++];
  if (needs[1]) std::get<1>(made) = grads[next++];
  const std::array<variable_list*, 4> out{&std::get<2>(made), &std::get<3>(made), &std::get<4>(made),
                                          &std::get<5>(made)};
  for (size_t i = 0; i < out.size(); ++i)
    for (size_t n = 0; needs[2 + i] && n < given[i].size(); ++n) out[i]->push_back(grads[next++]);
  return made;
}

Gradients backward_meta(const at::Tensor&, const at::Tensor& x, const at::Tensor&, const at::Tensor& topk_weights,
                        at::TensorList up, at::TensorList down, at::TensorList up_bias, at::TensorList down_bias,
                        c10::string_view, int64_t, c10::string_view, int64_t, std::array<bool, 6> needs) {
  const auto like = [](const at::Tensor& tensor, bool needed) {
    return needed ? at::empty_symint(tensor.sym_sizes(), tensor.options()) : at::empty({0}, tensor.options());
  };
  const auto all_like = [&](at::TensorList tensors, bool needed) {
    std::vector<at::Tensor> grads;
    for (size_t n = 0; needed && n < tensors.size(); ++n) grads.push_back(like(tensors[n], true));
    return grads;
  };
  return {like(x, needs[0]), like(topk_weights, needs[1]), all_like(up, needs[2]), all_like(down, needs[3]),
          all_like(up_bias, needs[4]), all_like(down_bias, needs[5])};
}

using ForwardSignature = at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, at::TensorList,
                                    at::TensorList, at::TensorList, at::TensorList, c10::string_view, int64_t,
                                    c10::string_view, int64_t);
using BackwardSignature = Gradients(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                    at::TensorList, at::TensorList, at::TensorList, at::TensorList, c10::string_view,
                                    int64_t, c10::string_view, int64_t, std::array<bool, 6>);

template <class Signature>
c10::TypedOperatorHandle<Signature> find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

// For tensors without numbers, as a compiler traces them.
class Traced : public Function<Traced> {
 public:
  static at::Tensor forward(AutogradContext* context, const at::Tensor& x, const at::Tensor& topk_ids,
                            const at::Tensor& topk_weights, at::TensorList up, at::TensorList down,
                            at::TensorList up_bias, at::TensorList down_bias, const std::string& activation,
                            int64_t num_experts, const std::string& group, int64_t chunks) {
    variable_list saved{x, topk_ids, topk_weights};
    std::vector<int64_t> sizes;
    for (const auto list : {up, down, up_bias, down_bias}) {
      saved.insert(saved.end(), list.begin(), list.end());
      sizes.push_back(static_cast<int64_t>(list.size()));
    }
    context->save_for_backward(saved);
    context->saved_data["sizes"] = sizes;
    context->saved_data["activation"] = activation;
    context->saved_data["num_experts"] = num_experts;
    context->saved_data["group"] = group;
    context->saved_data["chunks"] = chunks;
    at::AutoDispatchBelowADInplaceOrView below;
    static const auto op = find<ForwardSignature>("turnout::expert_parallel");
    return op.call(x, topk_ids, topk_weights, up, down, up_bias, down_bias, activation, num_experts, group, chunks);
  }

  static variable_list backward(AutogradContext* context, variable_list grads) {
    const auto saved = context->get_saved_variables();
    const auto sizes = context->saved_data["sizes"].toIntVector();
    Lists lists;
    std::array<bool, 6> needs{context->needs_input_grad(0), context->needs_input_grad(2)};
    size_t at = 3;  // both among what was saved and among the inputs
    for (size_t i = 0; i < lists.size(); ++i) {
      lists[i] = at::TensorList(saved).slice(at, sizes[i]);
      for (int64_t n = 0; n < sizes[i]; ++n) needs[2 + i] = needs[2 + i] || context->needs_input_grad(at + n);
      at += sizes[i];
    }
    static const auto op = find<BackwardSignature>("turnout::expert_parallel_backward");
    const auto [x, weights, up, down, up_bias, down_bias] =
        op.call(grads[0].contiguous(), saved[0], saved[1], saved[2], lists[0], lists[1], lists[2], lists[3],
                context->saved_data["activation"].toStringRef(), context->saved_data["num_experts"].toInt(),
                context->saved_data["group"].toStringRef(), context->saved_data["chunks"].toInt(), needs);
    variable_list result{needs[0] ? x : at::Tensor(), {}, needs[1] ? weights : at::Tensor()};
    const std::array<const variable_list*, 4> made{&up, &down, &up_bias, &down_bias};
    for (size_t i = 0; i < made.size(); ++i) {
      auto of_list = *made[i];
      of_list.resize(sizes[i]);
      result.insert(result.end(), of_list.begin(), of_list.end());
    }
    result.insert(result.end(), 4, at::Tensor());  // activation, num_experts, group, chunks
    return result;
  }
};

at::Tensor forward_autograd(const at::Tensor& x, const at::Tensor& topk_ids, const at::Tensor& topk_weights,
                            at::TensorList up, at::TensorList down, at::TensorList up_bias, at::TensorList down_bias,
                            c10::string_view activation, int64_t num_experts, c10::string_view group, int64_t chunks) {
  if (!x.unsafeGetTensorImpl()->is_python_dispatch() && !x.is_meta())
    return forward_op(x, topk_ids, topk_weights, up, down, up_bias, down_bias, activation, num_experts, group, chunks);
  return Traced::apply(x, topk_ids, topk_weights, up, down, up_bias, down_bias, std::string(activation), num_experts,
                       std::string(group), chunks);
}

TORCH_LIBRARY_IMPL(turnout, CompositeExplicitAutograd, m) {
  m.impl("expert_parallel", forward_op);
  m.impl("expert_parallel_backward", backward_op);
}
TORCH_LIBRARY_IMPL(turnout, Meta, m) {
  m.impl("expert_parallel", forward_meta);
  m.impl("expert_parallel_backward", backward_meta);
}
TORCH_LIBRARY_IMPL(turnout, Autograd, m) { m.impl("expert_parallel", forward_autograd); }
TORCH_LIBRARY_IMPL(turnout, CompositeImplicitAutograd, m) { m.impl("expert_bounds", expert_bounds); }

}  // namespace
}  // namespace turnout
