// Decoding of quantised weights: the public calls, their checks, and the shapes of what they return.
#include <turnout/quantized.h>

#include "quantized.h"

#include "checks.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

namespace turnout {
namespace ops {
namespace {

// Sizes without the last `drop` axes.
c10::SymIntArrayRef leading(const at::Tensor& tensor, int64_t drop) {
  return tensor.sym_sizes().slice(0, static_cast<size_t>(tensor.dim() - drop));
}

at::Tensor decode_mxfp4_meta(const at::Tensor& blocks, const at::Tensor& scales, std::optional<at::ScalarType> dtype) {
  check_mxfp4(blocks, scales);
  return at::empty_symint(decoded_mxfp4_sizes(blocks), blocks.options().dtype(check_decoded_type(kDecodeMxfp4, dtype)));
}

at::Tensor decode_fp8_blocks_meta(const at::Tensor& weight, const at::Tensor& scale_inv, at::IntArrayRef block,
                                  std::optional<at::ScalarType> dtype) {
  check_fp8_blocks(weight, scale_inv, block);
  return at::empty_symint(weight.sym_sizes(), weight.options().dtype(check_decoded_type(kDecodeFp8, dtype)));
}

TORCH_LIBRARY_IMPL(turnout, Meta, m) {
  m.impl("decode_mxfp4", decode_mxfp4_meta);
  m.impl("decode_fp8_blocks", decode_fp8_blocks_meta);
}

}  // namespace

at::ScalarType check_decoded_type(const char* op, std::optional<at::ScalarType> dtype) {
  const auto type = dtype.value_or(at::kBFloat16);
  TORCH_CHECK_TYPE(type == at::kBFloat16 || type == at::kFloat, op, ": the type to decode to is ", type,
                   ", expected bfloat16 or float32");
  return type;
}

void check_mxfp4(const at::Tensor& blocks, const at::Tensor& scales) {
  TORCH_CHECK_TYPE(blocks.scalar_type() == at::kByte, kDecodeMxfp4, ": blocks is ", blocks.scalar_type(),
                   ", expected uint8");
  TORCH_CHECK_TYPE(scales.scalar_type() == at::kByte || scales.scalar_type() == at::kFloat8_e8m0fnu, kDecodeMxfp4,
                   ": scales is ", scales.scalar_type(), ", expected uint8 or float8_e8m0fnu");
  TORCH_CHECK_VALUE(blocks.dim() >= 2 && blocks.sym_size(-1) == 16, kDecodeMxfp4, ": blocks has shape ",
                    blocks.sym_sizes(), ", expected [..., groups, 16]");
  TORCH_CHECK_VALUE(scales.sym_sizes() == leading(blocks, 1), kDecodeMxfp4, ": scales has shape ", scales.sym_sizes(),
                    ", expected ", leading(blocks, 1), ", that of blocks without the last axis");
  check_device(kDecodeMxfp4, "scales", scales, "blocks", blocks);
}

std::vector<c10::SymInt> decoded_mxfp4_sizes(const at::Tensor& blocks) {
  auto sizes = leading(blocks, 1).vec();
  sizes.back() = sizes.back() * 32;
  return sizes;
}

void check_fp8_blocks(const at::Tensor& weight, const at::Tensor& scale_inv, at::IntArrayRef block) {
  const auto type = weight.scalar_type();
  TORCH_CHECK_TYPE(type == at::kFloat8_e4m3fn || type == at::kFloat8_e5m2, kDecodeFp8, ": weight is ", type,
                   ", expected float8_e4m3fn or float8_e5m2");
  const auto scale = scale_inv.scalar_type();
  TORCH_CHECK_TYPE(scale == at::kFloat || scale == at::kBFloat16 || scale == at::kFloat8_e8m0fnu, kDecodeFp8,
                   ": scale_inv is ", scale, ", expected float32, bfloat16 or float8_e8m0fnu");
  TORCH_CHECK_VALUE(block.size() == 2 && block[0] >= 1 && block[1] >= 1, kDecodeFp8, ": block is ", block,
                    ", expected two sizes of at least 1");
  TORCH_CHECK_VALUE(weight.dim() >= 2, kDecodeFp8, ": weight has shape ", weight.sym_sizes(),
                    ", expected [..., rows, columns]");
  auto expected = leading(weight, 2).vec();
  for (const int axis : {0, 1})  // written so that no size overflows
    expected.push_back(weight.sym_size(axis - 2) / block[axis] +
                       (weight.sym_size(axis - 2) % block[axis] != 0 ? 1 : 0));
  TORCH_CHECK_VALUE(scale_inv.sym_sizes() == c10::SymIntArrayRef(expected), kDecodeFp8, ": scale_inv has shape ",
                    scale_inv.sym_sizes(), ", expected ", c10::SymIntArrayRef(expected), " for weight ",
                    weight.sym_sizes(), " in blocks of ", block);
  check_device(kDecodeFp8, "scale_inv", scale_inv, "weight", weight);
}

}  // namespace ops

at::Tensor decode_mxfp4(const at::Tensor& blocks, const at::Tensor& scales, at::ScalarType type) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow(ops::kDecodeMxfp4, "")
                             .typed<at::Tensor(const at::Tensor&, const at::Tensor&, std::optional<at::ScalarType>)>();
  return op.call(blocks, scales, type);
}

at::Tensor decode_fp8_blocks(const at::Tensor& weight, const at::Tensor& scale_inv, std::array<int64_t, 2> block,
                             at::ScalarType type) {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow(ops::kDecodeFp8, "")
          .typed<at::Tensor(const at::Tensor&, const at::Tensor&, at::IntArrayRef, std::optional<at::ScalarType>)>();
  return op.call(weight, scale_inv, block, type);
}

}  // namespace turnout
