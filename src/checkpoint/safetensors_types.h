// The element types that safetensors and ATen share.
#pragma once

#include <c10/core/ScalarType.h>

#include <array>
#include <utility>

namespace turnout {

inline constexpr std::array<std::pair<const char*, at::ScalarType>, 16> kSafetensorsTypes{{
    {"F64", at::kDouble},
    {"I64", at::kLong},
    {"U64", at::kUInt64},
    {"F32", at::kFloat},
    {"I32", at::kInt},
    {"U32", at::kUInt32},
    {"F16", at::kHalf},
    {"BF16", at::kBFloat16},
    {"I16", at::kShort},
    {"U16", at::kUInt16},
    {"I8", at::kChar},
    {"U8", at::kByte},
    {"F8_E4M3", at::kFloat8_e4m3fn},
    {"F8_E5M2", at::kFloat8_e5m2},
    {"F8_E8M0", at::kFloat8_e8m0fnu},
    {"BOOL", at::kBool},
}};

/// The header is never longer: the reference implementation refuses more as well.
inline constexpr int64_t kLongestHeader = 100'000'000;

}  // namespace turnout
