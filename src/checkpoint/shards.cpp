// Reads `model.safetensors.index.json`: which shard holds which tensor. Shards lie beside the index, never elsewhere.
#include "checkpoint/shards.h"

#include "checkpoint/safetensors_types.h"
#include "checkpoint/shown.h"

#include <turnout/checkpoint.h>

#include <nlohmann/json.hpp>

#include <filesystem>
#include <system_error>

namespace turnout {
namespace {

// {"metadata": {…}, "weight_map": {"tensor": "shard", …}}: everything outside of weight_map is passed over.
class IndexEvents : public nlohmann::json_sax<nlohmann::json> {
 public:
  std::map<std::string, std::string> weight_map;
  bool has_map = false;
  std::string problem;

  bool null() override { return value(); }
  bool boolean(bool) override { return value(); }
  bool number_integer(int64_t) override { return value(); }
  bool number_unsigned(uint64_t) override { return value(); }
  bool number_float(double, const std::string&) override { return value(); }
  bool binary(binary_t&) override { return value(); }
  bool string(std::string& text) override {
    if (!in_map_) return value();
    const bool plain = !text.empty() && text != "." && text != ".." && text.find('/') == std::string::npos &&
                       text.find('\0') == std::string::npos;
    if (!plain) return refuse("puts", " into " + shown(text) + ", expected the name of a file beside the index");
    return weight_map.emplace(key_, text).second || refuse("names", " twice");
  }
  bool key(std::string& name) override {
    key_ = name;
    return true;
  }
  bool start_object(size_t) override {
    if (in_map_) return value();
    if (depth_ == 1 && key_ == "weight_map") {
      if (has_map) return refuse("holds", " twice");
      has_map = in_map_ = true;
    }
    return deeper();
  }
  bool end_object() override {
    in_map_ = false;
    --depth_;
    return true;
  }
  bool start_array(size_t) override { return value() && deeper(); }
  bool end_array() override {
    --depth_;
    return true;
  }
  bool parse_error(size_t, const std::string&, const nlohmann::detail::exception&) override { return no_object(); }

 private:
  // BEFORE 'key' after
  bool refuse(const char* before, const std::string& after) {
    problem = std::string(before).append(" ").append(shown(key_)).append(after);
    return false;
  }
  bool no_object() {
    problem = "is no JSON object that holds a weight_map";
    return false;
  }
  bool deeper() { return ++depth_ <= 16 || no_object(); }
  bool value() {
    if (depth_ == 0) return no_object();
    return !in_map_ || refuse("holds for", " something else than the name of a file");
  }

  int depth_ = 0;
  bool in_map_ = false;
  std::string key_;
};

std::map<std::string, std::string> read_index(const std::string& path) {
  IndexEvents events;
  if (!nlohmann::json::sax_parse(read_file(path, kLongestHeader), &events))
    throw FileError(path + ": " + events.problem);
  if (!events.has_map) throw FileError(path + ": holds no weight_map");
  return std::move(events.weight_map);
}

}  // namespace

Shards find_shards(const std::string& path, const std::string& prefix) {
  std::error_code ignored;
  if (!std::filesystem::is_directory(path, ignored)) return {{path, {}}};
  const std::string whole = path + "/" + kWeightsName;
  if (std::filesystem::exists(whole, ignored)) return {{whole, {}}};
  const std::string index = path + "/" + kIndexName;
  if (!std::filesystem::exists(index, ignored))
    throw FileError(path + ": holds neither " + kWeightsName + " nor " + kIndexName);
  Shards shards;
  for (const auto& [name, shard] : read_index(index))
    if (name.starts_with(prefix)) shards[path + "/" + shard].insert(name);
  return shards;
}

}  // namespace turnout
