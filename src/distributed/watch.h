// Which heartbeat watches over a group: that of the group's World, or one of its own.
#pragma once

#include "distributed/heartbeat.h"

#include <turnout/world.h>

#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>

#include <memory>
#include <string>

namespace turnout::distributed {

/// What a group's default backend was made with; nullptr where it does not say.
c10::intrusive_ptr<c10d::Backend::Options> options_of(const c10d::ProcessGroup& group);

/// The heartbeat that watches over a group. A group that no World made gets one of its own here, at its first operation;
/// it ends with the group. nullptr where there is none: a group of one rank, or one whose store is no TCPStore (a file
/// would grow with every beat).
std::shared_ptr<Heartbeat> heartbeat_of(const Group& group);

/// A World's groups share its heartbeat, from their making to their end.
void set_heartbeat(const c10::intrusive_ptr<c10d::ProcessGroup>& group, const std::shared_ptr<Heartbeat>& heartbeat);
void forget_heartbeat(const std::string& group);

}  // namespace turnout::distributed
