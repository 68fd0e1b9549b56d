// The element types that safetensors and ATen share.
#pragma once

#include <c10/core/ScalarType.h>

#include <array>
#include <utility>

namespace turnout {

inline constexpr std::array<std::pair<const char*, at::ScalarType>, 10> kSafetensorsTypes{{
    {"F64", at::kDouble},
    {"I64", at::kLong},
    {"F32", at::kFloat},
    {"I32", at::kInt},
    {"F16", at::kHalf},
    {"BF16", at::kBFloat16},
    {"I16", at::kShort},
    {"I8", at::kChar},
    {"U8", at::kByte},
    {"BOOL", at::kBool},
}};

/// The header is never longer: the reference implementation refuses more as well.
inline constexpr int64_t kLongestHeader = 100'000'000;

}  // namespace turnout
