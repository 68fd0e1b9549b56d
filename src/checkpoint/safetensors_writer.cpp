// safetensors: 8 bytes of header length, a JSON header, then the tensors' bytes.
#include <turnout/checkpoint.h>

#include "checkpoint/safetensors_types.h"

#include <c10/util/Exception.h>

#include <nlohmann/json.hpp>

#include <algorithm>

namespace turnout {
namespace {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the format is little-endian");

const char* type_name(const std::string& tensor_name, at::ScalarType type) {
  for (const auto& [name, known] : kSafetensorsTypes)
    if (known == type) return name;
  TORCH_CHECK_TYPE(false, "turnout: save_tensors: tensor '", tensor_name, "' is ", type,
                   ", which safetensors files of this library do not hold");
}

struct Entry {
  std::string name;
  at::Tensor tensor;
};

std::vector<Entry> in_file_order(const std::map<std::string, at::Tensor>& tensors) {
  std::vector<Entry> entries;
  for (const auto& [name, tensor] : tensors) {
    TORCH_CHECK_VALUE(name != "__metadata__",
                      "turnout: save_tensors: a tensor is called '__metadata__', expected "
                      "any other name");
    TORCH_CHECK_VALUE(tensor.defined() && tensor.layout() == at::kStrided, "turnout: save_tensors: tensor '", name,
                      "' is ", tensor.defined() ? "sparse" : "undefined", ", expected a dense one");
    entries.push_back({name, tensor.detach().to(at::kCPU).contiguous()});
  }
  std::stable_sort(entries.begin(), entries.end(), [](const Entry& a, const Entry& b) {
    return a.tensor.element_size() > b.tensor.element_size();  // so that every tensor is aligned
  });
  return entries;
}

}  // namespace

void save_tensors(const std::string& path, const TensorFile& content) {
  const std::vector<Entry> entries = in_file_order(content.tensors);
  nlohmann::ordered_json header = nlohmann::ordered_json::object();
  if (!content.metadata.empty()) header["__metadata__"] = content.metadata;
  uint64_t offset = 0;
  for (const Entry& entry : entries) {
    const uint64_t end = offset + entry.tensor.nbytes();
    header[entry.name] = {{"dtype", type_name(entry.name, entry.tensor.scalar_type())},
                          {"shape", entry.tensor.sizes().vec()},
                          {"data_offsets", {offset, end}}};
    offset = end;
  }
  std::string text = header.dump(-1, ' ', false, nlohmann::ordered_json::error_handler_t::replace);
  text.append((8 - text.size() % 8) % 8, ' ');
  const uint64_t length = text.size();
  TORCH_CHECK_VALUE(length <= static_cast<uint64_t>(kLongestHeader), "turnout: save_tensors: the header needs ", length,
                    " bytes, expected at most ", kLongestHeader);

  AtomicFile file(path);
  file.write(&length, sizeof(length));
  file.write(text.data(), text.size());
  for (const Entry& entry : entries) file.write(entry.tensor.const_data_ptr(), entry.tensor.nbytes());
  file.commit();
}

}  // namespace turnout
