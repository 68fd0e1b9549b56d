// Names from files as messages show them.
#pragma once

#include <string>

namespace turnout {

/// 'text': at most 200 bytes of it, each control character a question mark.
inline std::string shown(const std::string& text) {
  constexpr size_t kMost = 200;
  std::string words(1, '\'');
  words.append(text, 0, kMost);
  for (char& letter : words)
    if (static_cast<unsigned char>(letter) < 32) letter = '?';
  words.append(text.size() > kMost ? "…'" : "'");
  return words;
}

}  // namespace turnout
