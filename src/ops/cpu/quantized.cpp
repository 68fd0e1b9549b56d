// Decoding of quantised weights on the CPU: one pass, each byte by a table.
#include "../quantized.h"
#include "fresh.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <array>
#include <bit>
#include <limits>

namespace turnout::ops {
namespace {

constexpr int64_t kGrain = 1 << 15;  // values a thread takes at least

float power_of_two(uint8_t scale) {
  if (scale == 255) return std::numeric_limits<float>::quiet_NaN();
  return std::bit_cast<float>(scale == 0 ? 0x00400000U : static_cast<uint32_t>(scale) << 23);
}

template <class Out>
void decode_groups(const uint8_t* blocks, const uint8_t* scales, int64_t begin, int64_t end, Out* out) {
  for (int64_t group = begin; group < end; ++group) {
    const float scale = power_of_two(scales[group]);
    for (int64_t byte = 16 * group; byte < 16 * (group + 1); ++byte) {
      out[2 * byte] = static_cast<Out>(kE2M1[blocks[byte] & 15] * scale);
      out[2 * byte + 1] = static_cast<Out>(kE2M1[blocks[byte] >> 4] * scale);
    }
  }
}

at::Tensor decode_mxfp4_cpu(const at::Tensor& given_blocks, const at::Tensor& given_scales,
                            std::optional<at::ScalarType> dtype) {
  check_mxfp4(given_blocks, given_scales);
  const auto type = check_decoded_type(kDecodeMxfp4, dtype);
  const auto blocks = given_blocks.contiguous();
  const auto scales = given_scales.contiguous();
  auto sizes = scales.sizes().vec();
  sizes.back() *= 32;
  auto out = fresh(sizes, blocks.options().dtype(type));
  const auto* from = blocks.const_data_ptr<uint8_t>();
  const auto* powers = static_cast<const uint8_t*>(scales.const_data_ptr());
  at::parallel_for(0, scales.numel(), kGrain / 32, [&](int64_t begin, int64_t end) {
    if (type == at::kFloat)
      decode_groups(from, powers, begin, end, out.mutable_data_ptr<float>());
    else
      decode_groups(from, powers, begin, end, out.mutable_data_ptr<at::BFloat16>());
  });
  return out;
}

// Values of a float8 type by their bits.
template <class Float8>
std::array<float, 256> table_of() {
  std::array<float, 256> table{};
  for (int byte = 0; byte < 256; ++byte)
    table[byte] = static_cast<float>(Float8(static_cast<uint8_t>(byte), Float8::from_bits()));
  return table;
}

// rows × columns matrices in a row, their scales beside them.
struct Blocked {
  int64_t rows, columns, block_rows, block_columns;
  int64_t scale_columns() const { return (columns - 1) / block_columns + 1; }
  int64_t scale_rows() const { return (rows - 1) / block_rows + 1; }
};

template <class Out>
void decode_rows(const Blocked& sizes, const std::array<float, 256>& table, const uint8_t* weight, const float* scales,
                 int64_t begin, int64_t end, Out* out) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t matrix = row / sizes.rows;
    const int64_t scale_row = matrix * sizes.scale_rows() + row % sizes.rows / sizes.block_rows;
    for (int64_t block = 0; block < sizes.scale_columns(); ++block) {
      const float scale = scales[scale_row * sizes.scale_columns() + block];
      const int64_t first = block * sizes.block_columns;
      const int64_t count = std::min(sizes.block_columns, sizes.columns - first);
      const uint8_t* from = weight + row * sizes.columns + first;
      Out* to = out + row * sizes.columns + first;
      for (int64_t i = 0; i < count; ++i) to[i] = static_cast<Out>(table[from[i]] * scale);
    }
  }
}

at::Tensor decode_fp8_blocks_cpu(const at::Tensor& given_weight, const at::Tensor& given_scale, at::IntArrayRef block,
                                 std::optional<at::ScalarType> dtype) {
  check_fp8_blocks(given_weight, given_scale, block);
  const auto type = check_decoded_type(kDecodeFp8, dtype);
  const auto weight = given_weight.contiguous();
  const auto scale = given_scale.to(at::kFloat).contiguous();
  auto out = fresh(weight.sizes(), weight.options().dtype(type));
  if (weight.numel() == 0) return out;
  const Blocked sizes{weight.size(-2), weight.size(-1), block[0], block[1]};
  const bool e4m3 = weight.scalar_type() == at::kFloat8_e4m3fn;
  const auto table = e4m3 ? table_of<c10::Float8_e4m3fn>() : table_of<c10::Float8_e5m2>();
  const auto* from = static_cast<const uint8_t*>(weight.const_data_ptr());
  const auto* scales = scale.const_data_ptr<float>();
  const int64_t grain = std::max<int64_t>(1, kGrain / sizes.columns);
  at::parallel_for(0, weight.numel() / sizes.columns, grain, [&](int64_t begin, int64_t end) {
    if (type == at::kFloat)
      decode_rows(sizes, table, from, scales, begin, end, out.mutable_data_ptr<float>());
    else
      decode_rows(sizes, table, from, scales, begin, end, out.mutable_data_ptr<at::BFloat16>());
  });
  return out;
}

TORCH_LIBRARY_IMPL(turnout, CPU, m) {
  m.impl("decode_mxfp4", decode_mxfp4_cpu);
  m.impl("decode_fp8_blocks", decode_fp8_blocks_cpu);
}

}  // namespace
}  // namespace turnout::ops
