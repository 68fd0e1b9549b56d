// A trained model as two files: weights and options.
#include <turnout/checkpoint.h>
#include <turnout/transformer.h>

#include <c10/util/Exception.h>

namespace turnout {
namespace {

constexpr int64_t kLongestConfig = 1 << 20;
constexpr const char* kConfigKey = "config";

}  // namespace

void save_model(ByteLanguageModel model, const std::string& folder) {
  auto tensors = module_tensors(*model);
  for (const auto& [name, part] : parts_of_banks(*model))
    tensors[name] = gather_over(tensors[name], model->layout.experts);
  if (model->layout.all.rank != 0) return;
  const std::string config = to_json(model->options) + "\n";
  write_file(folder + "/config.json", config);
  save_tensors(folder + "/model.safetensors", {std::move(tensors), {{kConfigKey, config}}});
}

ByteLanguageModel load_model(const std::string& folder) {
  const std::string config_path = folder + "/config.json";
  const std::string weights_path = folder + "/model.safetensors";
  const std::string config = read_file(config_path, kLongestConfig);
  LanguageModelOptions options;
  try {
    options = language_model_options_from_json(config);
  } catch (const c10::Error& error) {
    throw FileError(config_path + ": " + error.what_without_backtrace());
  }
  const TensorFile content = load_tensors(weights_path);
  const auto stored = content.metadata.find(kConfigKey);
  if (stored != content.metadata.end() && stored->second != config)
    throw FileError(weights_path + ": was saved with other options than " + config_path + " holds");
  ByteLanguageModel model(options);
  load_into_module(*model, content.tensors, weights_path);
  return model;
}

}  // namespace turnout
