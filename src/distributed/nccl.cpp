// NCCL's process group. Its headers, and CUDA's, come with the packages that torch's CUDA build depends on.
#include "distributed/nccl.h"

#include <c10/util/Exception.h>

#ifdef USE_C10D_NCCL
#include <torch/csrc/distributed/c10d/ProcessGroupNCCL.hpp>
#endif

namespace turnout::distributed {

c10::intrusive_ptr<c10d::Backend> make_nccl([[maybe_unused]] const c10::intrusive_ptr<c10d::Store>& store,
                                            [[maybe_unused]] int64_t rank, [[maybe_unused]] int64_t size,
                                            [[maybe_unused]] std::chrono::milliseconds timeout) {
#ifdef USE_C10D_NCCL
  auto options = c10d::ProcessGroupNCCL::Options::create();
  options->timeout = timeout;
  return c10::make_intrusive<c10d::ProcessGroupNCCL>(store, static_cast<int>(rank), static_cast<int>(size), options);
#else
  TORCH_CHECK_NOT_IMPLEMENTED(false,
                              "turnout: the backend nccl needs a build with TURNOUT_CUDA that finds the headers of NCCL "
                              "and CUDA");
#endif
}

}  // namespace turnout::distributed
