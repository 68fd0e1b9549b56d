// One table an enumeration: the words that C++, Python, the program and files use for it.
#pragma once

#include <c10/util/Exception.h>

#include <array>
#include <string>
#include <utility>

namespace turnout::ops {

template <class Enum, size_t N>
using Names = std::array<std::pair<Enum, const char*>, N>;

/// @throws c10::ValueError naming the word and all that were possible
template <class Enum, size_t N>
Enum parse_name(const char* what, const Names<Enum, N>& names, const std::string& word) {
  std::string known;
  for (const auto& [value, name] : names) {
    if (word == name) return value;
    known += known.empty() ? name : std::string(", ") + name;
  }
  TORCH_CHECK_VALUE(false, "turnout: ", what, " is '", word, "', expected one of ", known);
}

template <class Enum, size_t N>
std::string name_of(const Names<Enum, N>& names, Enum value) {
  for (const auto& [known, name] : names)
    if (known == value) return name;
  TORCH_INTERNAL_ASSERT(false, "an enumerator without a name");
}

}  // namespace turnout::ops
