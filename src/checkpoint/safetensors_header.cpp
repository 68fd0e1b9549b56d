// Reads a safetensors header event by event: the first thing that is out of place ends it, however long the rest is.
#include "checkpoint/safetensors_header.h"

#include "checkpoint/safetensors_types.h"
#include "checkpoint/shown.h"

#include <nlohmann/json.hpp>

#include <algorithm>
#include <optional>
#include <unordered_set>

namespace turnout {
namespace {

constexpr size_t kMostSizes = 64;

std::string say(const char* before, const std::string& name, const std::string& after) {
  return std::string(before).append(shown(name)).append(after);
}

// An entry as its fields come in, in any order.
struct RawEntry {
  std::string name;
  std::optional<std::string> dtype;
  std::optional<std::vector<int64_t>> shape;
  std::optional<std::vector<int64_t>> offsets;
};

class HeaderEvents : public nlohmann::json_sax<nlohmann::json> {
 public:
  std::vector<RawEntry> entries;
  std::map<std::string, std::string> metadata;
  std::string problem;

  bool null() override { return scalar("null"); }
  bool boolean(bool value) override { return scalar(value ? "true" : "false"); }
  bool number_integer(int64_t value) override { return scalar(std::to_string(value)); }
  bool number_float(double, const std::string& text) override { return scalar(text); }
  bool binary(binary_t&) override { return no_object(); }

  bool number_unsigned(uint64_t value) override {
    if (numbers_ == nullptr || value > static_cast<uint64_t>(INT64_MAX)) return scalar(std::to_string(value));
    if (numbers_->size() == kMostSizes) return no_list();
    numbers_->push_back(static_cast<int64_t>(value));
    return true;
  }

  bool string(std::string& value) override {
    if (place_ == Place::metadata) {
      metadata[field_] = value;
      return true;
    }
    if (place_ != Place::entry || field_ != "dtype" || numbers_ != nullptr) return scalar(say("", value, ""));
    entries.back().dtype = value;
    return true;
  }

  bool start_object(size_t) override {
    if (place_ == Place::outside) {
      place_ = Place::root;
      return true;
    }
    if (place_ != Place::root) return scalar("an object");
    place_ = field_ == "__metadata__" ? Place::metadata : Place::entry;
    if (place_ == Place::entry) entries.push_back({field_, {}, {}, {}});
    return true;
  }

  bool key(std::string& name) override {
    field_ = name;
    if (place_ == Place::root)
      return names_.insert(name).second || refuse(say("tensor ", name, " stands in the header twice"));
    if (place_ == Place::metadata)
      return !metadata.count(name) || refuse(say("its __metadata__ ", name, " stands there twice"));
    const RawEntry& entry = entries.back();
    const bool known = name == "dtype" || name == "shape" || name == "data_offsets";
    if (!known) return bad(say("has the unknown field ", name, ""));
    const bool twice =
        name == "dtype" ? entry.dtype.has_value() : (name == "shape" ? entry.shape : entry.offsets).has_value();
    return !twice || bad("has the field '" + name + "' twice");
  }

  bool end_object() override {
    if (place_ == Place::entry) {
      const RawEntry& entry = entries.back();
      if (!entry.dtype || !entry.shape || !entry.offsets) return bad("lacks dtype, shape or data_offsets");
    }
    place_ = place_ == Place::root ? Place::outside : Place::root;
    return true;
  }

  bool start_array(size_t) override {
    if (place_ != Place::entry || numbers_ != nullptr || field_ == "dtype") return scalar("a list");
    auto& numbers = field_ == "shape" ? entries.back().shape : entries.back().offsets;
    numbers_ = &numbers.emplace();
    return true;
  }

  bool end_array() override {
    numbers_ = nullptr;
    return true;
  }

  bool parse_error(size_t, const std::string&, const nlohmann::detail::exception&) override { return no_object(); }

 private:
  enum class Place { outside, root, metadata, entry };

  bool refuse(const std::string& words) {
    if (problem.empty()) problem = words;
    return false;
  }
  bool bad(const std::string& words) { return refuse(say("tensor ", entries.back().name, " " + words)); }
  bool no_object() { return refuse("not a safetensors file: its header is no JSON object of tensors"); }
  bool no_list() {
    return field_ == "shape" ? bad("has a shape that is no list of at most 64 sizes")
                             : bad("has data_offsets that are no pair of whole numbers");
  }
  // A value where none of its kind is expected.
  bool scalar(const std::string& text) {
    if (place_ == Place::metadata) return refuse(say("its __metadata__ ", field_, " is no text"));
    if (place_ == Place::root && field_ == "__metadata__") return refuse("its __metadata__ is no JSON object");
    if (place_ == Place::root) return refuse(say("tensor ", field_, " lacks dtype, shape or data_offsets"));
    if (place_ != Place::entry) return no_object();
    if (field_ == "dtype") return bad("has the unknown dtype " + text);
    if (field_ == "shape" && numbers_ != nullptr) return bad("has the size " + text + " in its shape");
    return no_list();
  }

  Place place_ = Place::outside;
  std::string field_;
  std::vector<int64_t>* numbers_ = nullptr;  // the list that is being read
  std::unordered_set<std::string> names_;
};

TensorEntry checked(const InputFile& file, RawEntry& raw, int64_t data_start) {
  const auto bad = [&](const std::string& problem) { file.fail(say("tensor ", raw.name, " " + problem)); };
  TensorEntry entry{std::move(raw.name), at::kByte, std::move(*raw.shape), 0, 0};
  raw.name = entry.name;
  const auto* type = std::find_if(kSafetensorsTypes.begin(), kSafetensorsTypes.end(),
                                  [&](const auto& known) { return *raw.dtype == known.first; });
  if (type == kSafetensorsTypes.end()) bad(say("has the unknown dtype ", *raw.dtype, ""));
  entry.type = type->second;

  // Multiplied only while the product fits; a size of 0 makes it 0 wherever it stands.
  auto bytes = static_cast<int64_t>(c10::elementSize(entry.type));
  bool overflow = false;
  bool empty = false;
  for (const int64_t size : entry.shape) {
    empty = empty || size == 0;
    overflow = overflow || __builtin_mul_overflow(bytes, std::max<int64_t>(size, 1), &bytes);
  }
  if (overflow) bad("has a shape too large for any file");
  if (empty) bytes = 0;

  if (raw.offsets->size() != 2) bad("has data_offsets that are no pair of whole numbers");
  const int64_t begin = raw.offsets->at(0);
  const int64_t end = raw.offsets->at(1);
  const int64_t data_bytes = file.size() - data_start;
  if (begin > end || end > data_bytes)
    bad("has the data_offsets [" + std::to_string(begin) + "," + std::to_string(end) + "], but the file holds " +
        std::to_string(data_bytes) + " bytes of data");
  if (end - begin != bytes)
    bad("has " + std::to_string(end - begin) + " bytes of data, its dtype and shape need " + std::to_string(bytes));
  entry.begin = data_start + begin;
  entry.end = data_start + end;
  return entry;
}

void check_tiling(const InputFile& file, std::vector<TensorEntry>& entries, int64_t data_start) {
  std::sort(entries.begin(), entries.end(), [](const TensorEntry& a, const TensorEntry& b) {
    return std::tie(a.begin, a.end, a.name) < std::tie(b.begin, b.end, b.name);
  });
  int64_t reached = data_start;
  for (const TensorEntry& entry : entries) {
    if (entry.begin != reached)
      file.fail(say("tensor ", entry.name,
                    entry.begin < reached ? " overlaps the one before it" : " leaves a gap to the one before it"));
    reached = entry.end;
  }
  if (reached != file.size())
    file.fail("holds " + std::to_string(file.size() - data_start) + " bytes of data, its tensors need " +
              std::to_string(reached - data_start));
}

std::string header_text(const InputFile& file) {
  uint64_t length = 0;
  if (file.size() < 8) file.fail("not a safetensors file: it has " + std::to_string(file.size()) + " bytes");
  file.read_at(0, &length, sizeof(length));
  if (length > static_cast<uint64_t>(kLongestHeader))
    file.fail("not a safetensors file: its header claims " + std::to_string(length) + " bytes");
  if (static_cast<int64_t>(length) > file.size() - 8)
    file.fail("is truncated: its header claims " + std::to_string(length) + " bytes, " +
              std::to_string(file.size() - 8) + " are there");
  std::string text(length, '\0');
  file.read_at(8, text.data(), static_cast<int64_t>(length));
  return text;
}

}  // namespace

SafetensorsHeader read_header(const InputFile& file) {
  HeaderEvents events;
  int64_t data_start = 8;
  {
    const std::string text = header_text(file);
    data_start += static_cast<int64_t>(text.size());
    if (!nlohmann::json::sax_parse(text, &events)) file.fail(events.problem);
  }
  SafetensorsHeader header;
  header.metadata = std::move(events.metadata);
  header.entries.reserve(events.entries.size());
  for (RawEntry& raw : events.entries) header.entries.push_back(checked(file, raw, data_start));
  check_tiling(file, header.entries, data_start);
  return header;
}

}  // namespace turnout
