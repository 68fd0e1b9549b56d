// From torch to the kernels: which implementation runs, and torch's threads for it.
#pragma once

#include "../../kernels/table.h"

namespace turnout::ops {

/// @throws c10::ValueError when TURNOUT_FORCE_ISA names an implementation that is unknown or that this machine lacks
const kernels::Implementation& active_implementation();

/// at::parallel_for as the kernels take it.
kernels::ParallelFor torch_threads();

}  // namespace turnout::ops
