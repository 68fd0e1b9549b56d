// The address by which this machine reaches another.
#pragma once

#include <string>

namespace turnout::distributed {

/// The local address that packets to `host` leave from: the network interface that ranks should use.
/// @throws c10::ValueError when the name is unknown or there is no way to it
std::string local_address_towards(const std::string& host, int64_t port);

}  // namespace turnout::distributed
