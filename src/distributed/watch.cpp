// Heartbeats by the name of their group.
#include "distributed/watch.h"

#include <torch/csrc/distributed/c10d/GroupRegistry.hpp>
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>

#include <map>
#include <mutex>

namespace turnout::distributed {
namespace {

using WeakGroup = c10::weak_intrusive_ptr<c10d::ProcessGroup>;

struct Watched {
  WeakGroup group;
  std::shared_ptr<Heartbeat> heartbeat;
};

std::mutex registry_mutex;

std::map<std::string, Watched>& registry() {
  static std::map<std::string, Watched> watched;
  return watched;
}

c10::intrusive_ptr<c10d::ProcessGroup> registered(const std::string& name) {
  try {
    return c10d::resolve_process_group(name);
  } catch (const c10::Error&) {
    return {};
  }
}

const c10d::TCPStore* tcp_store_under(c10d::Store* store) {
  if (auto* prefixed = dynamic_cast<c10d::PrefixStore*>(store)) store = prefixed->getUnderlyingNonPrefixStore().get();
  return dynamic_cast<const c10d::TCPStore*>(store);
}

std::shared_ptr<Heartbeat> make_heartbeat(const c10::intrusive_ptr<c10d::ProcessGroup>& made, const Group& group) {
  const auto store = made->getStore();
  const auto* tcp = tcp_store_under(store.get());
  if (tcp == nullptr) return nullptr;
  const auto options = options_of(*made);
  return std::make_shared<Heartbeat>(
      c10::make_intrusive<c10d::PrefixStore>("turnout", store), group.members[group.rank], group.members,
      options ? options->timeout : kBackendDefaultTimeout,
      "the store at " + tcp->getHost() + ":" + std::to_string(tcp->getPort()) + ", held by rank 0 or the launcher,",
      [over = WeakGroup(made)] { return over.expired(); });
}

}  // namespace

c10::intrusive_ptr<c10d::Backend::Options> options_of(const c10d::ProcessGroup& group) {
  try {
    return group.getDefaultBackend()->getBackendOptions();
  } catch (const c10::Error&) {
    return {};
  }
}

std::shared_ptr<Heartbeat> heartbeat_of(const Group& group) {
  if (group.size == 1) return nullptr;
  const auto made = registered(group.name);
  if (!made) return nullptr;
  const std::lock_guard lock(registry_mutex);
  const auto found = registry().find(group.name);
  if (found != registry().end() && found->second.group.lock() == made) return found->second.heartbeat;
  std::erase_if(registry(), [](const auto& watched) { return watched.second.group.expired(); });
  const auto heartbeat = make_heartbeat(made, group);
  registry().insert_or_assign(group.name, Watched{WeakGroup(made), heartbeat});
  return heartbeat;
}

void set_heartbeat(const c10::intrusive_ptr<c10d::ProcessGroup>& group, const std::shared_ptr<Heartbeat>& heartbeat) {
  const std::lock_guard lock(registry_mutex);
  registry().insert_or_assign(group->getGroupName(), Watched{WeakGroup(group), heartbeat});
}

void forget_heartbeat(const std::string& group) {
  const std::lock_guard lock(registry_mutex);
  registry().erase(group);
}

}  // namespace turnout::distributed
