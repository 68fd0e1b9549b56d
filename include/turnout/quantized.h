// Quantised weights as published checkpoints store them, decoded to bfloat16 or float32.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <cstdint>

namespace turnout {

/// Decodes MXFP4 (GPT-OSS): numbers of 4 bits, of which 32 share one power of two.
///
/// value = E2M1 · 2^(scale − 127); E2M1 is one of ±{0, 0.5, 1, 1.5, 2, 3, 4, 6}, the low nibble of a byte before its
/// high one. A scale of 255 is NaN, as the format has it. Every other value is exact in both types, beyond their range
/// Inf.
/// @param blocks [..., groups, 16] uint8, at least two axes
/// @param scales [..., groups] uint8 or float8_e8m0fnu
/// @param type bfloat16 or float32
/// @return [..., groups · 32]; for GPT-OSS rows × columns of the matrix, which transformers holds transposed
/// @throws c10::ValueError or c10::TypeError naming the argument, what it got and what it expected
/// Cost: each byte read once, each value written once. Gradient: none. Deterministic.
/// Source: OCP Microscaling Formats 1.0; transformers, integrations/mxfp4.py.
at::Tensor decode_mxfp4(const at::Tensor& blocks, const at::Tensor& scales, at::ScalarType type = at::kBFloat16);

/// Decodes float8 weights with one scale a block (DeepSeek-V3, `weight_scale_inv`).
///
/// value = weight · scale_inv[row / block[0], column / block[1]], a float32 product rounded once to `type`.
/// @param weight [..., rows, columns] float8_e4m3fn or float8_e5m2
/// @param scale_inv [..., ⌈rows / block[0]⌉, ⌈columns / block[1]⌉] float32, bfloat16 or float8_e8m0fnu; blocks at the
///        edges may be smaller
/// @param type bfloat16 or float32
/// @return [..., rows, columns]
/// @throws c10::ValueError or c10::TypeError naming the argument, what it got and what it expected
/// Cost: each byte read once, each value written once. Gradient: none. Deterministic.
/// Source: DeepSeek-V3, arXiv:2412.19437, section 3.3.
at::Tensor decode_fp8_blocks(const at::Tensor& weight, const at::Tensor& scale_inv,
                             std::array<int64_t, 2> block = {128, 128}, at::ScalarType type = at::kBFloat16);

}  // namespace turnout
