// Outputs of the kernels in memory that was never touched.
#pragma once

#include <ATen/core/Tensor.h>

namespace turnout::ops {

/// An uninitialised contiguous tensor for a kernel to fill.
///
/// Above 4 MB its memory is advised to huge pages before the first touch: glibc maps such a tensor anew each time, and
/// faulting 200 MB in page by page takes 39 ms, by huge pages 7 to 11 (Zen 5; 5 ms where it is resident).
at::Tensor fresh(at::IntArrayRef sizes, const at::TensorOptions& options);

/// The same advice for a tensor on the CPU that something else allocated and nobody has written to, or only begun to.
void advise_huge_pages(const at::Tensor& tensor);

}  // namespace turnout::ops
