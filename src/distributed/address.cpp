// Asks the kernel which way leads to a host: a connected datagram socket knows its own end, and sends nothing.
#include "distributed/address.h"

#include <c10/util/Exception.h>

#include <netdb.h>
#include <sys/socket.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstring>

namespace turnout::distributed {

std::string local_address_towards(const std::string& host, int64_t port) {
  addrinfo hints{};
  hints.ai_socktype = SOCK_DGRAM;
  addrinfo* found = nullptr;
  const int status = getaddrinfo(host.c_str(), std::to_string(port).c_str(), &hints, &found);
  TORCH_CHECK_VALUE(status == 0, "turnout: the host of the store is '", host, "', which is unknown: ",
                    gai_strerror(status));
  std::string address;
  int problem = 0;
  for (const addrinfo* way = found; way != nullptr && address.empty(); way = way->ai_next) {
    const int end = socket(way->ai_family, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    sockaddr_storage own{};
    socklen_t length = sizeof(own);
    std::array<char, NI_MAXHOST> text{};
    if (end >= 0 && connect(end, way->ai_addr, way->ai_addrlen) == 0 &&
        getsockname(end, reinterpret_cast<sockaddr*>(&own), &length) == 0 &&
        getnameinfo(reinterpret_cast<const sockaddr*>(&own), length, text.data(), text.size(), nullptr, 0,
                    NI_NUMERICHOST) == 0)
      address = text.data();
    else
      problem = errno;
    if (end >= 0) close(end);
  }
  freeaddrinfo(found);
  TORCH_CHECK_VALUE(!address.empty(), "turnout: no way leads to the host of the store, '", host, "': ",
                    std::strerror(problem));
  return address;
}

}  // namespace turnout::distributed
