// A whole checkpoint in the other layout: a shard a layer, so that memory holds one layer at a time.
#include <turnout/checkpoint.h>
#include <turnout/pretrained.h>
#include <turnout/quantized.h>

#include "pretrained/layer_tensors.h"

#include <c10/util/Exception.h>

#include <nlohmann/json.hpp>

#include <filesystem>

namespace turnout {
namespace {

namespace fs = std::filesystem;
using pretrained::Tensors;

constexpr const char* kScale = "_scale_inv";

std::string shard_name(size_t number, size_t count) {
  std::string digits = std::to_string(number), of = std::to_string(count);
  digits.insert(0, digits.size() < 5 ? 5 - digits.size() : 0, '0');
  of.insert(0, of.size() < 5 ? 5 - of.size() : 0, '0');
  return std::string("model-").append(digits).append("-of-").append(of).append(".safetensors");
}

class Conversion {
 public:
  Conversion(std::string from, std::string to, KeyLayout layout)
      : from_(std::move(from)), to_(std::move(to)), layout_(layout), config_(pretrained::read_config(from_)) {
    std::error_code ignored;
    TORCH_CHECK_VALUE(!fs::equivalent(from_, to_, ignored), "turnout: convert_checkpoint: to is ", to_,
                      ", expected another folder than from");
    std::error_code failed;
    fs::create_directories(to_, failed);
    if (failed) throw FileError(to_ + ": cannot make the folder: " + failed.message());
    if (fs::exists(to_ + "/model.safetensors", ignored))
      throw FileError(to_ + ": holds a model.safetensors, which would be read in place of the shards");
    if (fs::exists(to_ + "/model.safetensors.index.json", ignored))
      throw FileError(to_ + ": holds a checkpoint already, whose shards a conversion that fails would leave mixed");
  }

  void run() {
    count_ = config_.moe.layers.size() + 1;
    for (const int64_t layer : config_.moe.layers) write_layer(layer);
    write_rest();
    write_file(to_ + "/config.json", pretrained::config_without_quantization(from_));
    const nlohmann::ordered_json index = {{"metadata", {{"total_size", bytes_}}}, {"weight_map", shard_of_}};
    write_file(to_ + "/model.safetensors.index.json", index.dump(2) + "\n");
  }

 private:
  void write_layer(int64_t layer) {
    const pretrained::FoundLayer found = pretrained::find_layer(config_, from_, layer);
    const Tensors module = pretrained::to_module(config_, found.tensors, std::nullopt, from_ + ": " + found.root);
    std::string root = pretrained::layer_roots(config_, layer, layout_).front();
    if (root.starts_with("model.") && !found.root.starts_with("model.")) root.erase(0, 6);
    Tensors shard;
    for (auto& [name, tensor] : pretrained::to_published(config_, module, layout_)) shard[root + name] = tensor;
    done_.push_back(found.root);
    write_shard(shard);
  }

  bool is_done(const std::string& name) const {
    for (const std::string& root : done_)
      if (name.starts_with(root)) return true;
    return false;
  }

  // Everything outside of the MoE layers; what float8 scales stand beside is decoded.
  void write_rest() {
    Tensors all = map_tensors(from_).tensors;
    std::erase_if(all, [&](const auto& item) { return is_done(item.first); });
    Tensors rest;
    for (const auto& [name, tensor] : all) {
      if (name.ends_with(kScale) && all.count(name.substr(0, name.size() - std::string(kScale).size()))) continue;
      const auto scale = all.find(name + kScale);
      rest[name] = scale == all.end() ? tensor : decode(name, tensor, scale->second);
    }
    write_shard(rest);
  }

  at::Tensor decode(const std::string& name, const at::Tensor& tensor, const at::Tensor& scale) const {
    try {
      return decode_fp8_blocks(tensor, scale, config_.fp8_block);
    } catch (const c10::Error& error) {
      throw FileError(from_ + ": tensor '" + name + "': " + error.what_without_backtrace());
    }
  }

  void write_shard(const Tensors& tensors) {
    const std::string name = shard_name(++number_, count_);
    save_tensors(to_ + "/" + name, {tensors, {{"format", "pt"}}});
    for (const auto& [key, tensor] : tensors) {
      shard_of_[key] = name;
      bytes_ += tensor.nbytes();
    }
  }

  std::string from_, to_;
  KeyLayout layout_;
  pretrained::Config config_;
  size_t count_ = 0;
  size_t number_ = 0;
  uint64_t bytes_ = 0;
  std::vector<std::string> done_;
  std::map<std::string, std::string> shard_of_;
};

}  // namespace

void convert_checkpoint(const std::string& from, const std::string& to, KeyLayout layout) {
  Conversion(from, to, layout).run();
}

}  // namespace turnout
