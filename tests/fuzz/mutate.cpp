// Damage: small steps from valid files, because a reader refuses random bytes at the first one.
#include "mutate.h"

#include <array>
#include <cctype>
#include <cstdint>
#include <cstring>

namespace turnout::fuzz {
namespace {

// clang-format off
const std::array<std::string, 36> kWords{
    "0", "1", "2", "3", "4", "8", "32", "-1", "1.5", "1e9", "1e400", "255", "4294967296", "2147483647",
    "9223372036854775807", "9223372036854775808", "18446744073709551615", "99999999999999999999999", "null", "true",
    "false", "[]", "{}", "[0,0]", "[[]]", "\"\"", "\"F32\"", "\"F8_E4M3\"", "\"BOOL\"", "\"U8\"", "\"../x\"",
    "\"model.safetensors\"", "\"\\u0000\"", "\"__metadata__\"", "\"greedy\"", "\"gelu\""};
// clang-format on

bool is_word(char letter) { return std::isalnum(static_cast<unsigned char>(letter)) || strchr("_.-+\"", letter); }

// One word, number or text in quotes of a JSON text.
std::pair<size_t, size_t> find_word(const std::string& text, Random& random) {
  if (text.empty()) return {0, 0};
  size_t begin = below(random, text.size());
  while (begin > 0 && !is_word(text[begin])) --begin;
  size_t end = begin;
  while (begin > 0 && is_word(text[begin - 1])) --begin;
  while (end < text.size() && is_word(text[end])) ++end;
  return {begin, end - begin};
}

}  // namespace

size_t below(Random& random, size_t n) { return n == 0 ? 0 : random() % n; }

std::string mutate_bytes(std::string bytes, Random& random) {
  const size_t place = below(random, bytes.size());
  const size_t length = std::min(bytes.size() - place, 1 + below(random, below(random, 4) ? 4 : 200));
  switch (below(random, 6)) {
    case 0:
      if (!bytes.empty()) bytes[place] = static_cast<char>(bytes[place] ^ (1 << below(random, 8)));
      break;
    case 1:
      bytes.insert(place, std::string(length, static_cast<char>(random())));
      break;
    case 2:
      bytes.erase(place, length);
      break;
    case 3:
      bytes.insert(below(random, bytes.size()), bytes.substr(place, length));
      break;
    case 4:
      bytes.resize(place);
      break;
    default:
      if (!bytes.empty()) bytes[place] = static_cast<char>(random());
  }
  return bytes;
}

std::string mutate_json(std::string text, Random& random) {
  const size_t times = 1 + below(random, 3);
  for (size_t i = 0; i < times; ++i) {
    const auto [begin, length] = find_word(text, random);
    switch (below(random, 8)) {
      case 0:
        text = mutate_bytes(std::move(text), random);
        break;
      case 1: {
        const auto [other, other_length] = find_word(text, random);
        text.replace(begin, length, std::string(text, other, other_length));
        break;
      }
      case 2:
        text.insert(begin, std::string(1 + below(random, 200), "[{\""[below(random, 3)]));
        break;
      case 3:
        text.erase(begin, length);
        break;
      default:
        text.replace(begin, length, kWords[below(random, kWords.size())]);
    }
  }
  return text;
}

std::string mutate_safetensors(const std::string& file, Random& random) {
  uint64_t length = 0;
  if (file.size() < sizeof(length)) return mutate_bytes(file, random);
  std::memcpy(&length, file.data(), sizeof(length));
  if (length > file.size() - sizeof(length)) return mutate_bytes(file, random);
  std::string header = file.substr(8, length);
  std::string data = file.substr(8 + length);
  if (below(random, 4)) header = mutate_json(std::move(header), random);
  if (below(random, 4) == 0) data = mutate_bytes(std::move(data), random);
  if (below(random, 2)) length = header.size();
  std::string whole(reinterpret_cast<const char*>(&length), sizeof(length));
  whole.append(header).append(data);
  return below(random, 8) ? whole : mutate_bytes(std::move(whole), random);
}

}  // namespace turnout::fuzz
