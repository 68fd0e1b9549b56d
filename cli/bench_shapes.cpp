// Reads shapes and says which field of which shape is wrong.
#include "bench_shapes.h"

#include <turnout/checkpoint.h>

#include <c10/util/Exception.h>

#include <fmt/format.h>

#include <filesystem>
#include <set>
#include <string_view>

namespace turnout::cli {
namespace {

using Json = nlohmann::ordered_json;

constexpr int64_t kLargestFile = int64_t{1} << 20;
constexpr int64_t kLargestSize = int64_t{1} << 20;
constexpr std::string_view kPrefix = "turnout: ";  // of the library's own messages

/// One shape of a file, read field by field.
class Fields {
 public:
  Fields(const Json& json, std::string where) : json_(json), where_(std::move(where)) {
    if (!json.is_object()) fail("is " + json.dump() + ", expected an object");
  }

  int64_t size(const char* name) { return size_of(get(name), name); }
  std::string word(const char* name) {
    const Json& value = get(name);
    if (!value.is_string() || value.get<std::string>().empty()) fail(name, value, "a word");
    return value.get<std::string>();
  }
  std::vector<int64_t> sizes(const char* name) {
    std::vector<int64_t> sizes;
    for (const Json& value : list(name)) sizes.push_back(size_of(value, name));
    return sizes;
  }
  std::vector<std::string> words(const char* name) {
    std::vector<std::string> words;
    for (const Json& value : list(name)) {
      if (!value.is_string()) fail(name, value, "words");
      words.push_back(value.get<std::string>());
    }
    return words;
  }
  bool has(const char* name) const { return json_.contains(name); }
  void rename(const std::string& where) { where_ = where; }
  void refuse_others() const {
    for (const auto& [name, value] : json_.items())
      if (!read_.contains(name)) fail("has the unknown field " + Json(name).dump());
  }
  [[noreturn]] void fail(const std::string& message) const { throw FileError(where_ + " " + message); }

 private:
  const Json& get(const char* name) {
    if (!json_.contains(name)) fail(fmt::format("has no {}", name));
    read_.insert(name);
    return json_.at(name);
  }
  const Json& list(const char* name) {
    const Json& value = get(name);
    if (!value.is_array() || value.empty()) fail(name, value, "a list of one or more");
    return value;
  }
  int64_t size_of(const Json& value, const char* name) const {
    if (!value.is_number_integer() || value < 1 || value > kLargestSize)
      fail(name, value, fmt::format("a whole number of 1 to {}", kLargestSize));
    return value.get<int64_t>();
  }
  [[noreturn]] void fail(const char* name, const Json& value, const std::string& expected) const {
    fail(fmt::format("has {} {}, expected {}", name, value.dump(), expected));
  }

  const Json& json_;
  std::string where_;
  std::set<std::string> read_{};
};

BenchShape read_shape(const Json& json, const std::string& path, size_t number) {
  Fields fields(json, fmt::format("{}: shape {}", path, number));
  BenchShape shape;
  shape.name = fields.word("name");
  fields.rename(fmt::format("{}: shape {}", path, shape.name));
  if (fields.has("about")) shape.about = fields.word("about");
  shape.experts = fields.size("experts");
  shape.top_k = fields.size("top_k");
  shape.hidden = fields.size("hidden");
  shape.ffn = fields.size("ffn");
  shape.types = fields.words("types");
  shape.tokens = fields.sizes("tokens");
  if (fields.has("decode_tokens")) shape.decode_tokens = fields.sizes("decode_tokens");
  if (shape.top_k > shape.experts)
    fields.fail(fmt::format("has top_k {}, expected 1 to the number of experts, {}", shape.top_k, shape.experts));
  try {
    shape.activation = parse_activation(fields.word("activation"));
    for (const std::string& type : shape.types) parse_type(type);
  } catch (const c10::Error& error) {
    const std::string message = error.what_without_backtrace();
    fields.fail("is wrong: " + message.substr(message.starts_with(kPrefix) ? kPrefix.size() : 0));
  }
  fields.refuse_others();
  return shape;
}

}  // namespace

c10::ScalarType parse_type(const std::string& name) {
  if (name == "bf16") return c10::ScalarType::BFloat16;
  TORCH_CHECK_VALUE(name == "fp32", "type is '", name, "', expected bf16 or fp32");
  return c10::ScalarType::Float;
}

std::vector<BenchShape> load_shapes(const std::string& path) {
  const Json json = Json::parse(read_file(path, kLargestFile), nullptr, /*allow_exceptions=*/false);
  if (json.is_discarded()) throw FileError(path + ": is not JSON");
  if (!json.is_object() || !json.contains("shapes") || !json["shapes"].is_array() || json["shapes"].empty())
    throw FileError(path + ": expected an object with a list \"shapes\" of one or more");
  std::vector<BenchShape> shapes;
  std::set<std::string> names;
  for (const Json& entry : json["shapes"]) {
    shapes.push_back(read_shape(entry, path, shapes.size() + 1));
    if (!names.insert(shapes.back().name).second)
      throw FileError(fmt::format("{}: two shapes are called {}", path, shapes.back().name));
  }
  return shapes;
}

Json to_json(const BenchShape& shape) {
  return {{"name", shape.name},     {"experts", shape.experts}, {"top_k", shape.top_k},
          {"hidden", shape.hidden}, {"ffn", shape.ffn},         {"activation", to_string(shape.activation)}};
}

std::string list_of(const std::vector<BenchShape>& shapes) {
  std::string text;
  for (const BenchShape& s : shapes)
    text += fmt::format("{:<17} {:>4} experts, top {}, hidden {}, ffn {}, {}: {:.2f} G weights\n{:<17} {}\n", s.name,
                        s.experts, s.top_k, s.hidden, s.ffn, to_string(s.activation),
                        static_cast<double>(s.weights()) / 1e9, "", s.about);
  return text;
}

std::string default_shapes_file() {
  std::error_code error;
  const std::filesystem::path root = std::filesystem::read_symlink("/proc/self/exe", error).parent_path().parent_path();
  for (const std::filesystem::path& path :
       {root / "share/turnout/shapes/default.json", root.parent_path() / "benchmarks/shapes/default.json"})
    if (std::filesystem::exists(path, error)) return path.string();
  throw FileError("no shapes lie beside the program: name a file by --shapes");
}

}  // namespace turnout::cli
