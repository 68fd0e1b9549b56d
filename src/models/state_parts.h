// States of training on several ranks: who writes what, and what a rank reads of the experts that others wrote.
#pragma once

#include <turnout/expert_parallel.h>

#include <map>
#include <string>

namespace turnout {

using Tensors = std::map<std::string, at::Tensor>;
using Parts = std::map<std::string, ExpertRange>;

/// What this rank writes: its experts one by one, as NAME#NUMBER, where it is the first replica; the rest on rank 0.
/// Everything under its own name where one rank is all there are.
Tensors part_to_write(const Tensors& tensors, const Parts& parts, const ParallelLayout& layout);

/// The tensors of a state as this rank holds them: experts that stand one by one are put together, of whole banks the
/// rank's part is taken. @throws FileError when an expert is missing
Tensors parts_to_read(const Tensors& stored, const Parts& parts, const std::string& source);

}  // namespace turnout
