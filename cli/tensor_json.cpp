// Walks a tensor from the outermost axis in.
#include "tensor_json.h"

#include <cmath>

namespace turnout::cli {

Json to_json(const at::Tensor& tensor) {
  if (tensor.dim() == 0) {
    if (!tensor.is_floating_point()) return tensor.item<int64_t>();
    const double value = tensor.item<double>();
    return std::isfinite(value) ? Json(value) : Json(nullptr);
  }
  Json list = Json::array();
  const at::Tensor host = tensor.to(at::kCPU);
  for (int64_t i = 0; i < host.size(0); ++i) list.push_back(to_json(host[i]));
  return list;
}

Json shape_of(const at::Tensor& tensor) { return tensor.sizes().vec(); }

}  // namespace turnout::cli
