// Decoding of quantised weights as ATen calls: the path for any device.
#include "../quantized.h"

#include <ATen/ATen.h>
#include <torch/library.h>

namespace turnout::ops {
namespace {

// 2^(scale − 127) by its bits: 0 is the subnormal 2^−127, 255 is NaN.
at::Tensor powers_of_two(const at::Tensor& scales) {
  const auto exponent = scales.contiguous().view(at::kByte).to(at::kInt);
  const auto bits = at::where(exponent.eq(0), 0x00400000, exponent.bitwise_left_shift(23));
  return at::where(exponent.eq(255), 0x7fc00000, bits).to(at::kInt).view(at::kFloat);
}

}  // namespace

at::Tensor decode_mxfp4_aten(const at::Tensor& blocks, const at::Tensor& scales, std::optional<at::ScalarType> dtype) {
  check_mxfp4(blocks, scales);
  const auto type = check_decoded_type(kDecodeMxfp4, dtype);
  const auto values = at::tensor(at::ArrayRef<float>(kE2M1), blocks.options().dtype(at::kFloat));
  const auto nibbles = at::stack({blocks.bitwise_and(15), blocks.bitwise_right_shift(4)}, -1).to(at::kInt);
  const auto numbers = values.index_select(0, nibbles.flatten()).view(nibbles.sizes()).flatten(-2);
  const auto scaled = numbers.mul_(powers_of_two(scales).unsqueeze(-1)).to(type);
  return scaled.reshape_symint(decoded_mxfp4_sizes(blocks));
}

at::Tensor decode_fp8_blocks_aten(const at::Tensor& weight, const at::Tensor& scale_inv, at::IntArrayRef block,
                                  std::optional<at::ScalarType> dtype) {
  check_fp8_blocks(weight, scale_inv, block);
  const auto type = check_decoded_type(kDecodeFp8, dtype);
  auto scale = scale_inv.to(at::kFloat);
  for (const int axis : {0, 1})
    scale = scale.repeat_interleave(std::min(block[axis], std::max<int64_t>(weight.size(axis - 2), 1)), axis - 2)
                .narrow(axis - 2, 0, weight.size(axis - 2));
  return weight.to(at::kFloat).mul_(scale).to(type);
}

namespace {

TORCH_LIBRARY_IMPL(turnout, CompositeExplicitAutograd, m) {
  m.impl("decode_mxfp4", decode_mxfp4_aten);
  m.impl("decode_fp8_blocks", decode_fp8_blocks_aten);
}

}  // namespace
}  // namespace turnout::ops
