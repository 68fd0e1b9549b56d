// From torch to the kernels: errors become torch's, loops run on torch's threads.
#include "bridge.h"

#include <ATen/Parallel.h>
#include <c10/util/Exception.h>

#include <stdexcept>

namespace turnout::ops {

const kernels::Implementation& active_implementation() {
  try {
    return kernels::active();
  } catch (const std::invalid_argument& error) {
    TORCH_CHECK_VALUE(false, "turnout: ", error.what());
  }
}

kernels::ParallelFor torch_threads() {
  kernels::ParallelFor parallel;
  parallel.threads = at::get_num_threads();
  parallel.run = [](void*, int64_t n, void* body, kernels::ParallelFor::Body call) {
    at::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) { call(body, begin, end); });
  };
  return parallel;
}

}  // namespace turnout::ops
