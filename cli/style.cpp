// Colours and line breaks.
#include "style.h"

#include <unistd.h>

#include <cstdlib>

namespace turnout::cli {

Style Style::of_standard_output() {
  const char* no_color = std::getenv("NO_COLOR");
  return Style(isatty(STDOUT_FILENO) != 0 && (no_color == nullptr || *no_color == '\0'));
}

std::string wrap(const std::string& head, const std::vector<std::string>& words, size_t width) {
  std::string text, line = head;
  bool bare = true;  // nothing but the head or the indent stands on the line
  for (const std::string& word : words) {
    if (!bare && line.size() + 1 + word.size() > width) {
      text += line + "\n";
      line.assign(head.size(), ' ');
      bare = true;
    }
    line.append(bare ? "" : " ").append(word);
    bare = false;
  }
  return text + line + "\n";
}

}  // namespace turnout::cli
