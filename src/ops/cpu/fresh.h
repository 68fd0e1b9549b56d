// Memory of the kernels' large outputs: huge pages, taken again when they are freed.
#pragma once

#include <ATen/core/Tensor.h>

namespace turnout::ops {

/// An uninitialised contiguous tensor for a kernel to fill.
///
/// On the CPU, from 4 MB on, its memory consists of huge pages that stay mapped when the tensor dies and serve the next
/// tensor of about that size: gradients that a step frees and the next makes anew are not faulted in again (a step of 32 experts
/// with 200 MB of gradients spent more than a third of its time on that). What waits in the pool is marked as free to
/// the system, which takes it where memory is short; at most an eighth of the machine's memory waits, a process.
/// Thread-safe. @throws c10::Error where memory is out, as at::empty does
at::Tensor fresh(at::IntArrayRef sizes, const at::TensorOptions& options);

/// Unmaps what waits in the pool.
void release_fresh();

/// Advises huge pages for a tensor on the CPU that something else allocated and nobody has written to, or only begun to.
void advise_huge_pages(const at::Tensor& tensor);

}  // namespace turnout::ops
