// Gloo's process group over one network interface. Torch's package lacks the headers of gloo; Debian's libgloo-dev
// has them (its library is not used).
#include "distributed/gloo.h"

#include <c10/util/Exception.h>

#ifdef USE_C10D_GLOO
#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>
#endif

namespace turnout::distributed {

c10::intrusive_ptr<c10d::Backend> make_gloo([[maybe_unused]] const c10::intrusive_ptr<c10d::Store>& store,
                                            [[maybe_unused]] int64_t rank, [[maybe_unused]] int64_t size,
                                            [[maybe_unused]] std::chrono::milliseconds timeout,
                                            [[maybe_unused]] const std::string& address) {
#ifdef USE_C10D_GLOO
  auto options = c10d::ProcessGroupGloo::Options::create(timeout);
  options->devices.push_back(c10d::ProcessGroupGloo::createDeviceForHostname(address));
  return c10::make_intrusive<c10d::ProcessGroupGloo>(store, static_cast<int>(rank), static_cast<int>(size), options);
#else
  TORCH_CHECK_NOT_IMPLEMENTED(false,
                              "turnout: ranks on the CPU need gloo, whose headers this build did not find: install "
                              "libgloo-dev and build again");
#endif
}

}  // namespace turnout::distributed
