// What the registrations of the decoding ops share.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace turnout::ops {

/// The type to decode to: bfloat16 where none is asked.
at::ScalarType check_decoded_type(const char* op, std::optional<at::ScalarType> dtype);
void check_mxfp4(const at::Tensor& blocks, const at::Tensor& scales);
void check_fp8_blocks(const at::Tensor& weight, const at::Tensor& scale_inv, at::IntArrayRef block);

/// [..., groups, 16] → [..., groups · 32]
std::vector<c10::SymInt> decoded_mxfp4_sizes(const at::Tensor& blocks);

inline constexpr const char* kDecodeMxfp4 = "turnout::decode_mxfp4";
inline constexpr const char* kDecodeFp8 = "turnout::decode_fp8_blocks";

/// Values of E2M1 by their four bits.
inline constexpr float kE2M1[16] = {0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0F, -0.5, -1, -1.5, -2, -3, -4, -6};

// Calls of ATen alone, for any device.
at::Tensor decode_mxfp4_aten(const at::Tensor& blocks, const at::Tensor& scales, std::optional<at::ScalarType> dtype);
at::Tensor decode_fp8_blocks_aten(const at::Tensor& weight, const at::Tensor& scale_inv, at::IntArrayRef block,
                                  std::optional<at::ScalarType> dtype);

}  // namespace turnout::ops
