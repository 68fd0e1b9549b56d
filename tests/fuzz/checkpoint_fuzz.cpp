// Damaged checkpoints: whatever stands in a safetensors file, an index or a config.json, reading ends in tensors or in
// an error that names the file, never in a crash, a hang, another exception or memory that the files cannot explain.
//
// Usage: checkpoint_fuzz [cases [first seed]]; a failure names the seed that repeats it.
#include "mutate.h"
#include "pretrained_folders.h"

#include <c10/util/Exception.h>

#include <sys/resource.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <filesystem>

namespace turnout::fuzz {
namespace {

constexpr long kMostGrowth = 256 << 10;  // KiB; the files have some 100 KB
constexpr unsigned kMostSeconds = 20;    // a case

using Files = std::map<std::string, std::string>;

// A model's folder in memory, with the layer to load.
struct Model {
  Files files;
  int64_t layer = 0;
};

std::string as_bytes(const std::string& folder, const std::map<std::string, at::Tensor>& tensors) {
  save_tensors(folder + "/bytes", {tensors, {{"format", "pt"}}});
  return read_file(folder + "/bytes", 1 << 24);
}

// In one file, or in two shards under an index.
Files as_files(const std::string& folder, const std::map<std::string, at::Tensor>& tensors, bool shards) {
  if (!shards) return {{"model.safetensors", as_bytes(folder, tensors)}};
  std::map<std::string, at::Tensor> halves[2];
  std::string index = "{\"metadata\":{\"total_size\":7},\"weight_map\":{";
  for (const auto& [name, tensor] : tensors) {
    const size_t half = halves[0].size() > halves[1].size() ? 1 : 0;
    halves[half][name] = tensor;
    index += (index.back() == '{' ? "\"" : ",\"") + name + "\":\"" + (half ? "b" : "a") + "\"";
  }
  return {{"a", as_bytes(folder, halves[0])},
          {"b", as_bytes(folder, halves[1])},
          {"model.safetensors.index.json", index + "}}"}};
}

// The layer's matrices in float8 with scales (per expert), or its banks in MXFP4 (GPT-OSS); random bytes.
std::map<std::string, at::Tensor> quantised(std::map<std::string, at::Tensor> tensors) {
  std::map<std::string, at::Tensor> out;
  for (const auto& [name, tensor] : tensors) {
    if (name.ends_with("_proj")) {
      const auto rows = tensor.transpose(1, 2);
      out[name + "_blocks"] = at::randint(256, {rows.size(0), rows.size(1), rows.size(2) / 32, 16}, at::kByte);
      out[name + "_scales"] = at::randint(256, {rows.size(0), rows.size(1), rows.size(2) / 32}, at::kByte);
    } else if (name.find("experts.") != std::string::npos && name.ends_with("_proj.weight")) {
      out[name] = tensor.to(at::kFloat8_e4m3fn);
      out[name + "_scale_inv"] = at::ones({1, 1});
    } else {
      out[name] = tensor;
    }
  }
  return out;
}

std::vector<Model> valid_models(const std::string& folder) {
  std::vector<Model> models;
  for (const auto& [family, config] : testing::published_configs())
    for (const KeyLayout layout : {KeyLayout::per_expert, KeyLayout::fused})
      for (const bool shards : {false, true}) {
        if (!testing::has_layout(family, layout)) continue;
        testing::write_config(folder, family);
        const int64_t layer = pretrained_moe(folder).layers.front();
        auto tensors = published_tensors(testing::random_layer(folder, at::kBFloat16), folder, layer, layout);
        const bool takes_float8 = layout == KeyLayout::per_expert && family.starts_with("deepseek");
        if (shards && (family == "gpt_oss" || takes_float8)) tensors = quantised(std::move(tensors));
        Model model{as_files(folder, tensors, shards), layer};
        model.files["config.json"] = "{" + config;
        models.push_back(std::move(model));
      }
  return models;
}

void write(const std::string& folder, const Files& files) {
  for (const auto& entry : std::filesystem::directory_iterator(folder)) std::filesystem::remove_all(entry.path());
  for (const auto& [name, bytes] : files) {
    std::FILE* file = std::fopen((folder + "/" + name).c_str(), "wb");
    std::fwrite(bytes.data(), 1, bytes.size(), file);
    std::fclose(file);
  }
}

void damage(Files& files, Random& random) {
  const size_t times = 1 + below(random, 2);
  for (size_t i = 0; i < times; ++i) {
    auto chosen = std::next(files.begin(), static_cast<long>(below(random, files.size())));
    const bool json = chosen->first.ends_with(".json");
    chosen->second = json ? mutate_json(chosen->second, random) : mutate_safetensors(chosen->second, random);
  }
}

// Touches every byte, so that a tensor outside of its file would be noticed.
void touch(const TensorFile& content) {
  for (const auto& item : content.tensors) {
    const auto* bytes = static_cast<const unsigned char*>(item.second.const_data_ptr());
    unsigned sum = 0;
    for (size_t i = 0; i < item.second.nbytes(); ++i) sum += bytes[i];
    [[maybe_unused]] static volatile unsigned sink;
    sink = sum;
  }
}

// What could be loaded can run.
void run_layer(MoE moe) {
  const auto x = at::ones({2, 1, moe->options.hidden}).to(moe->experts->parameters()[0].scalar_type());
  moe(x);
}

// "" when it ends as it may.
std::string outcome(const std::function<void()>& call) {
  try {
    call();
  } catch (const FileError&) {
  } catch (const c10::ValueError&) {  // such as a layer that holds no experts any more
  } catch (const std::exception& error) {
    return std::string("another exception: ") + error.what();
  }
  return "";
}

long peak_memory() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  return usage.ru_maxrss;
}

std::string run_case(const std::string& folder, const Model& model, Random& random) {
  Files files = model.files;
  damage(files, random);
  write(folder, files);
  const long before = peak_memory();
  alarm(kMostSeconds);
  std::string problem = outcome([&] { touch(load_tensors(folder)); });
  if (problem.empty()) problem = outcome([&] { touch(map_tensors(folder)); });
  if (problem.empty()) problem = outcome([&] { run_layer(load_moe_layer(folder, model.layer)); });
  if (problem.empty() && below(random, 16) == 0) {  // not often: it waits for the disk
    std::filesystem::remove_all(folder + "/to");
    problem = outcome([&] { convert_checkpoint(folder, folder + "/to", KeyLayout(below(random, 2))); });
  }
  alarm(0);
  if (problem.empty() && peak_memory() - before > kMostGrowth)
    problem = "took " + std::to_string((peak_memory() - before) >> 10) + " MiB";
  return problem;
}

int fuzz(uint64_t cases, uint64_t first) {
  std::string folder = (std::filesystem::temp_directory_path() / "turnout-fuzz-XXXXXX").string();
  if (mkdtemp(folder.data()) == nullptr) return std::perror(folder.c_str()), 1;
  at::manual_seed(1);
  const std::vector<Model> models = valid_models(folder);
  int status = 0;
  for (uint64_t seed = first; seed - first < cases && status == 0; ++seed) {
    Random random(seed);
    const std::string problem = run_case(folder, models[below(random, models.size())], random);
    if (!problem.empty()) {
      std::printf("case %llu: %s; its files lie in %s\n", static_cast<unsigned long long>(seed), problem.c_str(),
                  folder.c_str());
      status = 1;
    } else if ((seed - first + 1) % 1000 == 0) {
      std::printf("%llu cases\n", static_cast<unsigned long long>(seed - first + 1));
      std::fflush(stdout);
    }
  }
  if (status == 0) std::filesystem::remove_all(folder);
  return status;
}

}  // namespace
}  // namespace turnout::fuzz

int main(int count, char** words) {
  const auto number = [&](int i, unsigned long long otherwise) {
    return count > i ? std::strtoull(words[i], nullptr, 10) : otherwise;
  };
  return turnout::fuzz::fuzz(number(1, 2000), number(2, 1));
}
