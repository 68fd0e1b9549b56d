// Rows between ranks: counts first, then rows; the halves of an exchange are each other's backward.
#include <turnout/exchange.h>

#include "distributed/collectives.h"

#include "../ops/checks.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <numeric>
#include <utility>

namespace turnout {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

constexpr const char* kCounts = "exchange of counts";
constexpr const char* kRows = "exchange of rows";
constexpr const char* kSum = "sum over ranks";
constexpr const char* kGather = "gathering of ranks";

// What the two halves of an exchange share.
struct Exchange : torch::CustomClassHolder {
  Exchange(std::vector<int64_t> send_in, std::vector<int64_t> receive_in, Group group_in)
      : send(std::move(send_in)), receive(std::move(receive_in)), group(std::move(group_in)) {}
  const std::vector<int64_t> send, receive;
  const Group group;
  at::Tensor gradient{};  // on its way, from Finish::backward to Start::backward
  c10::intrusive_ptr<Exchange> back{};
};
using ExchangePtr = c10::intrusive_ptr<Exchange>;

void keep(AutogradContext* context, const ExchangePtr& exchange) {
  context->saved_data["exchange"] = c10::IValue::make_capsule(exchange);
}

ExchangePtr kept(AutogradContext* context) {
  return c10::static_intrusive_pointer_cast<Exchange>(context->saved_data["exchange"].toCapsule());
}

class Start : public Function<Start> {
 public:
  static at::Tensor forward(AutogradContext* context, const at::Tensor& rows, const ExchangePtr& exchange) {
    keep(context, exchange);
    at::AutoDispatchBelowADInplaceOrView below;
    return distributed::start_all_to_all(kRows, rows.contiguous(), exchange->receive, exchange->send, exchange->group);
  }
  static variable_list backward(AutogradContext* context, variable_list grads);
};

class Finish : public Function<Finish> {
 public:
  static at::Tensor forward(AutogradContext* context, const at::Tensor& started, const ExchangePtr& exchange) {
    keep(context, exchange);
    at::AutoDispatchBelowADInplaceOrView below;
    distributed::wait(kRows, started, exchange->group);
    return started.alias();
  }
  static variable_list backward(AutogradContext* context, variable_list grads);
};

// What was sent comes back: the counts change their parts. The gradient on its way has the shape of what was sent, so
// it does not pass through the engine, which expects that of what was received; a stand-in without memory does.
variable_list Finish::backward(AutogradContext* context, variable_list grads) {
  const auto exchange = kept(context);
  exchange->back = c10::make_intrusive<Exchange>(exchange->receive, exchange->send, exchange->group);
  exchange->gradient = Start::apply(grads[0], exchange->back);
  return {at::zeros({1}, grads[0].options()).expand(grads[0].sizes()), {}};
}

variable_list Start::backward(AutogradContext* context, variable_list) {
  const auto exchange = kept(context);
  const auto gradient = std::exchange(exchange->gradient, {});
  return {Finish::apply(gradient, std::exchange(exchange->back, {})), {}};
}

class SumOver : public Function<SumOver> {
 public:
  static at::Tensor forward(AutogradContext* context, const at::Tensor& x, const Group& group) {
    keep(context, c10::make_intrusive<Exchange>(std::vector<int64_t>{}, std::vector<int64_t>{}, group));
    at::AutoDispatchBelowADInplaceOrView below;
    return distributed::all_reduce(kSum, x, group);
  }
  static variable_list backward(AutogradContext* context, variable_list grads) {
    return {SumOver::apply(grads[0], kept(context)->group), {}};
  }
};

int64_t total(const std::vector<int64_t>& counts) { return std::accumulate(counts.begin(), counts.end(), int64_t{0}); }

void check_counts(const char* name, const std::vector<int64_t>& counts, const Group& group) {
  TORCH_CHECK_VALUE(static_cast<int64_t>(counts.size()) == group.size, "turnout::exchange_rows: ", name, " has ",
                    counts.size(), " counts, expected ", group.size, " (the ranks of the group)");
  for (const auto count : counts) ops::check_at_least("turnout::exchange_rows", name, count, 0);
}

void check_rows(const at::Tensor& rows, const std::vector<int64_t>& send, const std::vector<int64_t>& receive,
                const Group& group) {
  check_counts("send", send, group);
  check_counts("receive", receive, group);
  TORCH_CHECK_VALUE(rows.dim() >= 1 && rows.size(0) == total(send), "turnout::exchange_rows: rows has shape ",
                    rows.sizes(), ", expected ", total(send), " rows (the sum of send)");
  TORCH_CHECK_VALUE(group.size > 1 || send == receive, "turnout::exchange_rows: receive is ", receive, ", expected ",
                    send, " as send is, in a group of one rank");
}

// What must be equal on every rank before rows may travel.
std::vector<int64_t> fingerprint(const at::Tensor& x) {
  return {x.size(-1), static_cast<int64_t>(x.scalar_type())};
}

std::string describe(const int64_t* of_rank) {
  return std::string("x ") + c10::toString(static_cast<at::ScalarType>(of_rank[1])) + " [rows, " +
         std::to_string(of_rank[0]) + "]";
}

// The same for tensors of any shape: type, axes, their sizes.
constexpr size_t kAxes = 8;  // more are told as one
constexpr size_t kShapeNumbers = 2 + kAxes;

// @return the numbers of all ranks. @param lengths_differ: along axis 0 they may
std::vector<int64_t> check_shapes(const char* operation, const at::Tensor& x, bool lengths_differ, const Group& group) {
  std::vector<int64_t> own{static_cast<int64_t>(x.scalar_type()), x.dim()};
  own.resize(kShapeNumbers, 1);
  for (int64_t axis = 0; axis < x.dim(); ++axis) own[2 + std::min<size_t>(axis, kAxes - 1)] *= x.size(axis);
  auto all = distributed::gather_numbers(operation, own, group);
  std::vector<std::string> texts;
  for (const int64_t* next = all.data(); texts.size() < static_cast<size_t>(group.size); next += kShapeNumbers) {
    std::string text = std::string("x ") + c10::toString(static_cast<at::ScalarType>(next[0])) + " [";
    for (int64_t axis = 0; axis < std::min<int64_t>(next[1], kAxes); ++axis)
      text.append(axis > 0 ? ", " : "").append(axis == 0 && lengths_differ ? "rows" : std::to_string(next[2 + axis]));
    texts.push_back(text + "]");
  }
  distributed::check_texts(operation, texts, group);
  return all;
}

}  // namespace

std::vector<int64_t> expert_bounds(int64_t num_experts, int64_t ranks, int64_t unit) {
  constexpr const char* kOp = "turnout::expert_bounds";
  ops::check_at_least(kOp, "ranks", ranks, 1);
  ops::check_at_least(kOp, "unit", unit, 1);
  TORCH_CHECK_VALUE(num_experts % unit == 0, kOp, ": num_experts is ", num_experts, ", expected a multiple of ", unit,
                    " (unit)");
  const int64_t units = num_experts / unit;
  TORCH_CHECK_VALUE(units >= ranks, kOp, ": there are ", units, unit == 1 ? " experts" : " groups of experts", " for ",
                    ranks, " ranks, expected at least one for each; fewer expert ranks leave replicas");
  std::vector<int64_t> bounds{0};
  for (int64_t rank = 0; rank < ranks; ++rank)
    bounds.push_back(bounds.back() + unit * (units / ranks + (rank < units % ranks ? 1 : 0)));
  return bounds;
}

at::Tensor exchange_counts(const at::Tensor& tokens_per_expert, const std::vector<int64_t>& bounds, const at::Tensor& x,
                           const Group& group) {
  constexpr const char* kOp = "turnout::exchange_counts";
  ops::check_dim(kOp, "tokens_per_expert", tokens_per_expert, 1, "[experts]");
  ops::check_integer(kOp, "tokens_per_expert", tokens_per_expert);
  TORCH_CHECK_VALUE(static_cast<int64_t>(bounds.size()) == group.size + 1, kOp, ": bounds has ", bounds.size(),
                    " entries, expected ", group.size + 1, " (ranks + 1)");
  ops::check_size(kOp, "tokens_per_expert", tokens_per_expert, 0, bounds.back(), "the last of bounds");
  TORCH_CHECK_VALUE(x.dim() >= 1, kOp, ": x has no axes, expected [rows, hidden]");
  const auto counts = tokens_per_expert.to(at::kCPU, at::kLong).contiguous();
  const int64_t held = bounds[group.rank + 1] - bounds[group.rank];
  if (group.size == 1) return counts.view({1, held});

  // To each rank: the fingerprint, then the counts of its experts.
  const auto mine = fingerprint(x);
  const auto words = static_cast<int64_t>(mine.size());
  std::vector<int64_t> message, send, receive(group.size, words + held);
  const auto* count = counts.const_data_ptr<int64_t>();
  for (int64_t r = 0; r < group.size; ++r) {
    message.insert(message.end(), mine.begin(), mine.end());
    message.insert(message.end(), count + bounds[r], count + bounds[r + 1]);
    send.push_back(words + bounds[r + 1] - bounds[r]);
  }
  const auto sent = at::tensor(message, at::kLong).to(x.device());
  const auto received =
      distributed::all_to_all(kCounts, sent, receive, send, group).to(at::kCPU).view({group.size, words + held});
  std::vector<std::string> rows_of_ranks;
  for (int64_t r = 0; r < group.size; ++r)
    rows_of_ranks.push_back(describe(received.const_data_ptr<int64_t>() + r * (words + held)));
  distributed::check_texts(kRows, rows_of_ranks, group);
  return received.narrow(1, words, held).contiguous();
}

PendingRows::PendingRows(const at::Tensor& rows, const std::vector<int64_t>& send, const std::vector<int64_t>& receive,
                         const Group& group)
    : rows_(rows) {
  check_rows(rows, send, receive, group);
  if (group.size == 1) return;
  const auto exchange = c10::make_intrusive<Exchange>(send, receive, group);
  rows_ = Start::apply(rows, exchange);
  exchange_ = exchange;
}

at::Tensor PendingRows::finish() {
  if (!exchange_) return rows_;
  return Finish::apply(rows_, c10::static_intrusive_pointer_cast<Exchange>(exchange_));
}

at::Tensor exchange_rows(const at::Tensor& rows, const std::vector<int64_t>& send, const std::vector<int64_t>& receive,
                         const Group& group) {
  return PendingRows(rows, send, receive, group).finish();
}

at::Tensor sum_over(const at::Tensor& x, const Group& group) {
  if (group.size == 1) return x;
  check_shapes(kSum, x, /*lengths_differ=*/false, group);
  return SumOver::apply(x, group);
}

at::Tensor gather_over(const at::Tensor& x, const Group& group, std::vector<int64_t>* lengths) {
  TORCH_CHECK_VALUE(x.dim() >= 1, "turnout::gather_over: x has no axes, expected at least one");
  const at::NoGradGuard no_grad;
  std::vector<int64_t> counts{x.size(0)};
  at::Tensor all = x.detach();
  if (group.size > 1) {
    const auto shapes = check_shapes(kGather, x, /*lengths_differ=*/true, group);
    counts.clear();
    for (int64_t r = 0; r < group.size; ++r) counts.push_back(shapes[r * kShapeNumbers + 2]);
    // Each rank sends all of its rows to every rank.
    std::vector<at::Tensor> copies(group.size, all);
    all = distributed::all_to_all(kGather, at::cat(copies), counts, std::vector<int64_t>(group.size, x.size(0)), group);
  }
  if (lengths != nullptr) *lengths = std::move(counts);
  return all;
}

}  // namespace turnout
