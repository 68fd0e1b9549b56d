// Reads safetensors: the header is checked against the size of the file before anything is allocated for it.
#include <turnout/checkpoint.h>

#include "checkpoint/safetensors_types.h"

#include <ATen/ops/empty.h>

#include <nlohmann/json.hpp>

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <optional>
#include <set>

namespace turnout {
namespace {

class InputFile {
 public:
  explicit InputFile(const std::string& path) : path_(path) {
    file_ = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (file_ < 0) fail(std::string("cannot read: ") + std::strerror(errno));
    struct stat status {};
    const bool regular = fstat(file_, &status) == 0 && S_ISREG(status.st_mode);
    size_ = status.st_size;
    if (!regular) {
      close(file_);
      fail("not a regular file");
    }
  }
  ~InputFile() { close(file_); }
  InputFile(const InputFile&) = delete;
  InputFile& operator=(const InputFile&) = delete;

  [[noreturn]] void fail(const std::string& problem) const { throw FileError(path_ + ": " + problem); }

  void read_at(int64_t offset, void* data, int64_t bytes) const {
    char* next = static_cast<char*>(data);
    while (bytes > 0) {
      const ssize_t got = pread(file_, next, static_cast<size_t>(std::min<int64_t>(bytes, 1 << 30)), offset);
      if (got < 0 && errno == EINTR) continue;
      if (got < 0) fail(std::string("cannot read: ") + std::strerror(errno));
      if (got == 0) fail("ends early: it shrank while it was read");
      next += got;
      offset += got;
      bytes -= got;
    }
  }
  int64_t size() const { return size_; }

 private:
  std::string path_;
  int file_ = -1;
  int64_t size_ = 0;
};

struct Entry {
  std::string name;
  at::ScalarType type;
  std::vector<int64_t> shape;
  int64_t begin = 0;
  int64_t end = 0;
};

std::optional<int64_t> whole_number(const nlohmann::json& json) {
  if (!json.is_number_unsigned()) return std::nullopt;  // negative and fractional numbers are other kinds
  const auto value = json.get<uint64_t>();
  if (value > static_cast<uint64_t>(INT64_MAX)) return std::nullopt;
  return static_cast<int64_t>(value);
}

nlohmann::json parse_header(const InputFile& file, const std::string& text) {
  std::set<std::string> names;
  std::string twice;
  bool deep = false;
  const auto watch = [&](int depth, nlohmann::json::parse_event_t event, nlohmann::json& value) {
    if (depth > 4) deep = true;
    if (event == nlohmann::json::parse_event_t::key && depth == 1 && !names.insert(value.get<std::string>()).second)
      twice = value.get<std::string>();
    return depth <= 4;
  };
  nlohmann::json header = nlohmann::json::parse(text, watch, /*allow_exceptions=*/false);
  if (header.is_discarded() || !header.is_object() || deep)
    file.fail("not a safetensors file: its header is no JSON object");
  if (!twice.empty()) file.fail("tensor '" + twice + "' stands in the header twice");
  return header;
}

Entry parse_entry(const InputFile& file, const std::string& name, const nlohmann::json& json, int64_t data_bytes) {
  const auto bad = [&](const std::string& problem) { file.fail("tensor '" + name + "' " + problem); };
  if (!json.is_object() || !json.contains("dtype") || !json.contains("shape") || !json.contains("data_offsets"))
    bad("lacks dtype, shape or data_offsets");
  Entry entry;
  entry.name = name;
  const auto* type = std::find_if(kSafetensorsTypes.begin(), kSafetensorsTypes.end(), [&](const auto& known) {
    return json["dtype"].is_string() && json["dtype"].template get_ref<const std::string&>() == known.first;
  });
  if (type == kSafetensorsTypes.end()) bad("has the unknown dtype " + json["dtype"].dump());
  entry.type = type->second;

  if (!json["shape"].is_array() || json["shape"].size() > 64) bad("has a shape that is no list of at most 64 sizes");
  // Multiplied only while the product fits; a size of 0 makes it 0 wherever it stands.
  int64_t bytes = static_cast<int64_t>(c10::elementSize(entry.type));
  bool overflow = false;
  bool empty = false;
  for (const auto& size : json["shape"]) {
    const auto value = whole_number(size);
    if (!value) bad("has the size " + size.dump() + " in its shape");
    entry.shape.push_back(*value);
    empty = empty || *value == 0;
    overflow = overflow || __builtin_mul_overflow(bytes, std::max<int64_t>(*value, 1), &bytes);
  }
  if (overflow) bad("has a shape too large for any file");
  if (empty) bytes = 0;

  const auto& offsets = json["data_offsets"];
  const bool pair = offsets.is_array() && offsets.size() == 2 && whole_number(offsets[0]) && whole_number(offsets[1]);
  if (!pair) bad("has data_offsets that are no pair of whole numbers");
  entry.begin = *whole_number(offsets[0]);
  entry.end = *whole_number(offsets[1]);
  if (entry.begin > entry.end || entry.end > data_bytes)
    bad("has the data_offsets " + offsets.dump() + ", but the file holds " + std::to_string(data_bytes) +
        " bytes of data");
  if (entry.end - entry.begin != bytes)
    bad("has " + std::to_string(entry.end - entry.begin) + " bytes of data, its dtype and shape need " +
        std::to_string(bytes));
  return entry;
}

std::map<std::string, std::string> parse_metadata(const InputFile& file, const nlohmann::json& json) {
  std::map<std::string, std::string> metadata;
  if (!json.is_object()) file.fail("its __metadata__ is no JSON object");
  for (const auto& [key, value] : json.items()) {
    if (!value.is_string()) file.fail("its __metadata__ '" + key + "' is no text");
    metadata[key] = value.get<std::string>();
  }
  return metadata;
}

void check_tiling(const InputFile& file, std::vector<Entry>& entries, int64_t data_bytes) {
  std::sort(entries.begin(), entries.end(),
            [](const Entry& a, const Entry& b) { return std::pair(a.begin, a.end) < std::pair(b.begin, b.end); });
  int64_t reached = 0;
  for (const Entry& entry : entries) {
    if (entry.begin != reached)
      file.fail("tensor '" + entry.name + "' " +
                (entry.begin < reached ? "overlaps the one" : "leaves a gap to the one") + " before it");
    reached = entry.end;
  }
  if (reached != data_bytes)
    file.fail("holds " + std::to_string(data_bytes) + " bytes of data, its tensors need " + std::to_string(reached));
}

}  // namespace

TensorFile load_tensors(const std::string& path) {
  const InputFile file(path);
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

  const nlohmann::json header = parse_header(file, text);
  const int64_t data_start = 8 + static_cast<int64_t>(length);
  const int64_t data_bytes = file.size() - data_start;
  TensorFile content;
  std::vector<Entry> entries;
  for (const auto& [name, json] : header.items()) {
    if (name == "__metadata__")
      content.metadata = parse_metadata(file, json);
    else
      entries.push_back(parse_entry(file, name, json, data_bytes));
  }
  check_tiling(file, entries, data_bytes);
  for (const Entry& entry : entries) {
    at::Tensor tensor = at::empty(entry.shape, at::TensorOptions(entry.type));
    file.read_at(data_start + entry.begin, tensor.mutable_data_ptr(), entry.end - entry.begin);
    content.tensors.emplace(entry.name, std::move(tensor));
  }
  return content;
}

}  // namespace turnout
