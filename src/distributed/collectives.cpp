// Calls of _c10d_functional ops, and the words for what goes wrong in them.
#include "distributed/collectives.h"

#include "distributed/difference.h"
#include "distributed/watch.h"

#include "../ops/cpu/fresh.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>
#include <ATen/ops/tensor.h>
#include <torch/csrc/distributed/c10d/GroupRegistry.hpp>

#include <algorithm>
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

// Of c10d's first line the first sentence, without the place in gloo's source.
std::string words_of(const std::string& error) {
  const auto line = error.substr(0, error.find('\n'));
  const auto place = line.find(".cc:"), behind = line.find("] ", place);
  const auto begin = place == std::string::npos || behind == std::string::npos ? 0 : behind + 2;
  return line.substr(begin, line.find(". ", begin) - begin);
}

[[noreturn]] void explain(const char* operation, const std::string& error, const Group& group) {
  const auto heartbeat = heartbeat_of(group);
  std::string message = std::string("turnout: ") + operation + " failed: ";
  if (heartbeat) message += heartbeat->find_culprit() + "; ";
  throw DistributedError(message + "c10d says: " + words_of(error));
}

template <class Call>
auto guarded(const char* operation, const Group& group, Call&& call) {
  struct Doing {
    std::shared_ptr<Heartbeat> heartbeat;
    ~Doing() {
      if (heartbeat) heartbeat->doing(nullptr);
    }
  } doing{heartbeat_of(group)};
  if (doing.heartbeat) {
    const auto gone = doing.heartbeat->holder_lost();
    if (!gone.empty()) throw DistributedError(std::string("turnout: ") + operation + " failed: " + gone);
    doing.heartbeat->doing(operation);
  }
  try {
    return call();
  } catch (const c10::Error& error) {
    explain(operation, error.what_without_backtrace(), group);
  } catch (const std::exception& error) {
    explain(operation, error.what(), group);
  }
}

// Of a small message: that of the host, where the group has a backend for it.
at::Device device_of(const Group& group) {
  const auto devices = c10d::resolve_process_group(group.name)->getDeviceTypes();
  return std::count(devices.begin(), devices.end(), at::kCPU) > 0 ? at::kCPU : devices.at(0);
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

std::vector<int64_t> gather_numbers(const char* operation, const std::vector<int64_t>& own, const Group& group) {
  const auto all = all_gather(operation, at::tensor(own, at::kLong).to(device_of(group)), group).to(at::kCPU);
  return {all.const_data_ptr<int64_t>(), all.const_data_ptr<int64_t>() + all.numel()};
}

void check_texts(const char* operation, const std::vector<std::string>& texts, const Group& group) {
  const auto found = difference(texts, group.members);
  if (found.empty()) return;
  if (const auto heartbeat = heartbeat_of(group)) heartbeat->report(found);
  throw DistributedError(std::string("turnout: ") + operation + " failed: " + found);
}

void check_alike(const char* operation, const std::vector<std::pair<const char*, int64_t>>& numbers,
                 const Group& group) {
  if (group.size == 1) return;
  std::vector<int64_t> own;
  for (const auto& number : numbers) own.push_back(number.second);
  const auto all = gather_numbers(operation, own, group);
  std::vector<std::string> texts(group.size);
  for (size_t i = 0; i < all.size(); ++i)
    texts[i / own.size()].append(numbers[i % own.size()].first).append(" ").append(std::to_string(all[i])).append("\n");
  check_texts(operation, texts, group);
}

}  // namespace turnout::distributed
