// Huge pages for large outputs, where the system has such a thing; elsewhere plain memory.
#include "fresh.h"

#include <ATen/ATen.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace turnout::ops {
namespace {

constexpr size_t kLarge = size_t{4} << 20;  // below, glibc reuses memory, which is then resident
#if defined(__linux__)
constexpr uintptr_t kPage = uintptr_t{2} << 20;
#endif

}  // namespace

at::Tensor fresh(at::IntArrayRef sizes, const at::TensorOptions& options) {
  auto tensor = at::empty(sizes, options);
  advise_huge_pages(tensor);
  return tensor;
}

void advise_huge_pages([[maybe_unused]] const at::Tensor& tensor) {
#if defined(__linux__)
  if (!tensor.device().is_cpu() || tensor.nbytes() < kLarge) return;
  // whole pages inside the tensor alone: the advice reaches nobody else's memory
  const auto begin = reinterpret_cast<uintptr_t>(tensor.data_ptr());
  const auto first = (begin + kPage - 1) / kPage * kPage, last = (begin + tensor.nbytes()) / kPage * kPage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // a hint: may be refused
#endif
}

}  // namespace turnout::ops
