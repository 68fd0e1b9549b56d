// Calls of _c10d_functional ops, and the words for what goes wrong in them.
#include "distributed/collectives.h"

#include "distributed/heartbeat.h"

#include "../ops/cpu/fresh.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>
#include <ATen/ops/tensor.h>

#include <utility>

namespace turnout::distributed {
namespace {

// Boxed: the type of a group's name in the schemas differs between versions of torch.
template <class... Arguments>
at::Tensor call(const char* name, Arguments&&... arguments) {
  const auto op = c10::Dispatcher::singleton().findSchemaOrThrow(name, "");
  torch::jit::Stack stack;
  (stack.emplace_back(std::forward<Arguments>(arguments)), ...);
  op.callBoxed(&stack);
  return std::move(stack.front()).toTensor();
}

std::string first_line(const std::string& text) { return text.substr(0, text.find('\n')); }

[[noreturn]] void explain(const char* operation, const std::string& error, const Group& group) {
  const auto heartbeat = heartbeat_of(group.name);
  std::string message = std::string("turnout: ") + operation + " failed: ";
  if (heartbeat) message += heartbeat->find_culprit() + "; ";
  throw DistributedError(message + "c10d says: " + first_line(error));
}

template <class Call>
auto guarded(const char* operation, const Group& group, Call&& call) {
  struct Doing {
    std::shared_ptr<Heartbeat> heartbeat;
    ~Doing() {
      if (heartbeat) heartbeat->doing(nullptr);
    }
  } doing{heartbeat_of(group.name)};
  if (doing.heartbeat) doing.heartbeat->doing(operation);
  try {
    return call();
  } catch (const c10::Error& error) {
    explain(operation, error.what_without_backtrace(), group);
  } catch (const std::exception& error) {
    explain(operation, error.what(), group);
  }
}

at::Tensor wait_for(const at::Tensor& started) { return call("_c10d_functional::wait_tensor", started); }

}  // namespace

at::Tensor start_all_to_all(const char* operation, const at::Tensor& x, at::IntArrayRef receive, at::IntArrayRef send,
                            const Group& group) {
  return guarded(operation, group, [&] {
    auto out = call("_c10d_functional::all_to_all_single", x, receive.vec(), send.vec(), group.name);
    ops::advise_huge_pages(out);
    return out;
  });
}

void wait(const char* operation, const at::Tensor& started, const Group& group) {
  guarded(operation, group, [&] { return wait_for(started); });
}

at::Tensor all_to_all(const char* operation, const at::Tensor& x, at::IntArrayRef receive, at::IntArrayRef send,
                      const Group& group) {
  const auto out = start_all_to_all(operation, x, receive, send, group);
  wait(operation, out, group);
  return out;
}

at::Tensor all_reduce(const char* operation, const at::Tensor& x, const Group& group) {
  return guarded(operation, group, [&] {
    return wait_for(call("_c10d_functional::all_reduce", x.contiguous(), std::string("sum"), group.name));
  });
}

at::Tensor all_gather(const char* operation, const at::Tensor& x, const Group& group) {
  return guarded(operation, group, [&] {
    return wait_for(call("_c10d_functional::all_gather_into_tensor", x.contiguous(), group.size, group.name));
  });
}

void check_alike(const char* operation, const std::vector<std::pair<const char*, int64_t>>& numbers,
                 const at::Device& device, const Group& group) {
  if (group.size == 1) return;
  std::vector<int64_t> own;
  for (const auto& number : numbers) own.push_back(number.second);
  const auto of_ranks = all_gather(operation, at::tensor(own, at::kLong).to(device), group).to(at::kCPU);
  const auto* next = of_ranks.const_data_ptr<int64_t>();
  const auto words = [&](size_t i, int64_t rank, int64_t value) {
    return "rank " + std::to_string(group.members[rank]) + " has " + numbers[i].first + " " + std::to_string(value);
  };
  for (int64_t rank = 0; rank < group.size; ++rank)
    for (size_t i = 0; i < own.size(); ++i, ++next)
      if (*next != own[i]) fail(operation, words(i, rank, *next) + ", " + words(i, group.rank, own[i]), group);
}

void fail(const char* operation, const std::string& finding, const Group& group) {
  if (const auto heartbeat = heartbeat_of(group.name)) heartbeat->report(finding);
  throw DistributedError(std::string("turnout: ") + operation + " failed: " + finding);
}

}  // namespace turnout::distributed
