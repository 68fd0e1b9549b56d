// Which bytes and words an expert takes: counts of its rows against counts of the text.
#include "layer_trace.h"

#include <ATen/Functions.h>

#include <fmt/format.h>

#include <algorithm>
#include <cctype>
#include <numeric>
#include <unordered_map>

namespace turnout::cli {
namespace {

constexpr int64_t kBytes = 256;
constexpr size_t kListed = 8;
constexpr size_t kExamples = 3;
constexpr int64_t kAround = 24;     // bytes shown on each side of an example
constexpr int64_t kFewestUses = 4;  // of a byte or word in the rows of an expert, to be listed

/// Bytes as readable text: what is not ASCII, or moves the cursor, by a sign.
std::string readable(std::string_view bytes) {
  std::string text;
  for (const char c : bytes) {
    const auto byte = static_cast<unsigned char>(c);
    if (c == '\n')
      text += "\u23ce";  // ⏎
    else if (c == '\t')
      text += "\u21e5";  // ⇥
    else if (byte < 0x20 || byte >= 0x7f)
      text += "\u00b7";  // ·
    else
      text += c;
  }
  return text;
}

std::string name_of_byte(int64_t byte) {
  if (byte == ' ') return "space";
  if (byte >= 0x7f || (byte < 0x20 && byte != '\n' && byte != '\t')) return fmt::format("0x{:02x}", byte);
  return readable(std::string(1, static_cast<char>(byte)));
}

/// What a token belongs to, as ids with names.
struct Classes {
  std::vector<std::string> names;
  std::vector<int64_t> of_token;  // -1 = none
};

Classes bytes_of(const std::string& text) {
  Classes classes;
  for (int64_t byte = 0; byte < kBytes; ++byte) classes.names.push_back(name_of_byte(byte));
  for (const char c : text) classes.of_token.push_back(static_cast<unsigned char>(c));
  return classes;
}

/// Runs of letters, digits and underscores within a window; a token belongs to the word that its byte stands in.
Classes words_of(const TextWindows& windows) {
  Classes classes;
  std::unordered_map<std::string, int64_t> ids;
  const std::string& text = windows.text;
  const auto in_word = [&](size_t i) {
    return std::isalnum(static_cast<unsigned char>(text[i])) != 0 || text[i] == '_';
  };
  classes.of_token.assign(text.size(), -1);
  for (size_t begin = 0; begin < text.size();) {
    if (!in_word(begin)) {
      ++begin;
      continue;
    }
    const size_t window_end = (begin / static_cast<size_t>(windows.length) + 1) * static_cast<size_t>(windows.length);
    size_t end = begin;
    while (end < window_end && in_word(end)) ++end;
    const auto [found, fresh] = ids.emplace(text.substr(begin, end - begin), static_cast<int64_t>(ids.size()));
    if (fresh) classes.names.push_back(found->first);
    std::fill(classes.of_token.begin() + static_cast<std::ptrdiff_t>(begin),
              classes.of_token.begin() + static_cast<std::ptrdiff_t>(end), found->second);
    begin = end;
  }
  return classes;
}

/// Classes that fill more of an expert's rows than of the text, by what they add to the difference (share · ln(lift)).
Json favourites(const Classes& classes, const at::Tensor& expert_rows, const at::Tensor& all_rows) {
  const auto share_C = expert_rows / expert_rows.sum().clamp_min(1);
  const auto text_C = all_rows / all_rows.sum().clamp_min(1);
  const auto lift_C = share_C / text_C.clamp_min(1e-12);
  const auto gain_C = at::where(expert_rows.ge(kFewestUses).logical_and(lift_C.gt(1)), share_C * lift_C.log(), 0.0);
  const auto [gains, ids] = gain_C.topk(std::min<int64_t>(static_cast<int64_t>(kListed), gain_C.numel()));
  Json list = Json::array();
  for (int64_t i = 0; i < ids.numel(); ++i) {
    const auto id = ids[i].item<int64_t>();
    if (gains[i].item<double>() <= 0) break;
    list.push_back({{"id", id},
                    {"name", classes.names[static_cast<size_t>(id)]},
                    {"share", share_C[id].item<double>()},
                    {"text_share", text_C[id].item<double>()},
                    {"lift", lift_C[id].item<double>()}});
  }
  return list;
}

/// Rows of each expert and class: [experts, classes] float64. Tokens without a class count nowhere.
at::Tensor count_rows(const at::Tensor& topk_ids, const Classes& classes, int64_t num_experts) {
  const auto width = static_cast<int64_t>(classes.names.size());
  const auto class_T1 = at::tensor(classes.of_token, at::kLong).unsqueeze(1);
  const auto live = topk_ids.ge(0).logical_and(class_T1.ge(0));
  const auto cell = (topk_ids * width + class_T1).masked_select(live);
  return at::bincount(cell, {}, num_experts * width).view({num_experts, width}).to(at::kDouble);
}

/// For the first bytes that the expert favours: the place where it weighs most.
Json examples(const LayerTrace& trace, const TextWindows& windows, const Json& bytes, int64_t expert) {
  const auto weight_T = at::where(trace.kept.topk_ids.eq(expert), trace.kept.topk_weights, 0.0).sum(1);
  const auto token_bytes = windows.tokens().flatten();
  Json list = Json::array();
  for (const Json& byte : bytes) {
    if (list.size() == kExamples) break;
    const auto of_byte = at::where(token_bytes.eq(byte["id"].get<int64_t>()), weight_T, -1.0);
    const auto token = of_byte.argmax().item<int64_t>();
    list.push_back(place_json(windows, token));
    list.back()["weight"] = of_byte[token].item<double>();
  }
  return list;
}

}  // namespace

Json place_json(const TextWindows& windows, int64_t token) {
  const int64_t begin = token / windows.length * windows.length, end = begin + windows.length;
  const int64_t from = std::max(begin, token - kAround), to = std::min(end, token + 1 + kAround);
  const auto part = [&](int64_t a, int64_t b) {
    return readable(std::string_view(windows.text).substr(static_cast<size_t>(a), static_cast<size_t>(b - a)));
  };
  return {{"before", part(from, token)},
          {"at", part(token, token + 1)},
          {"after", part(token + 1, to)}};
}

Json takers_json(const LayerTrace& trace, const TextWindows& windows) {
  const int64_t num_experts = trace.options.num_experts;
  const Classes bytes = bytes_of(windows.text), words = words_of(windows);
  const auto byte_rows = count_rows(trace.kept.topk_ids, bytes, num_experts);
  const bool any_words = !words.names.empty();
  const auto word_rows = any_words ? count_rows(trace.kept.topk_ids, words, num_experts) : at::Tensor();
  const double all = byte_rows.sum().item<double>();
  Json list = Json::array();
  for (int64_t e = 0; e < num_experts; ++e) {
    const double rows = byte_rows[e].sum().item<double>();
    const Json of_bytes = favourites(bytes, byte_rows[e], byte_rows.sum(0));
    list.push_back({{"expert", e},
                    {"rows", static_cast<int64_t>(rows)},
                    {"share", all > 0 ? rows / all : 0.0},
                    {"bytes", of_bytes},
                    {"words", any_words ? favourites(words, word_rows[e], word_rows.sum(0)) : Json::array()},
                    {"examples", examples(trace, windows, of_bytes, e)}});
  }
  return list;
}

}  // namespace turnout::cli
