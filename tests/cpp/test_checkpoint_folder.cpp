// Checkpoints as folders: one file or shards under an index, read or mapped.
#include <turnout/checkpoint.h>

#include "helpers.h"
#include "safetensors_bytes.h"
#include "tiny_models.h"

#include <fstream>

namespace turnout {
namespace {

class CheckpointFolder : public testing::FolderTest {
 protected:
  /// Two shards, three tensors: "layer.0.w", "layer.1.w" in the first, "layer.1.b" in the second.
  void write_shards() {
    save_tensors(path("one.safetensors"), {{{"layer.0.w", at::arange(4.0)}, {"layer.1.w", at::ones({2, 2})}},
                                           {{"format", "pt"}, {"who", "one"}}});
    save_tensors(path("two.safetensors"), {{{"layer.1.b", at::full(3, 2.0)}}, {{"who", "two"}}});
    write_index(R"("layer.0.w":"one.safetensors","layer.1.w":"one.safetensors","layer.1.b":"two.safetensors")");
  }
  void write_index(const std::string& weight_map) {
    write_file(path("model.safetensors.index.json"),
               R"({"metadata":{"total_size":[1,{"a":2}],"weight_map":{}},"weight_map":{)" + weight_map + "}}");
  }
};

TEST_F(CheckpointFolder, OpensShardsAsOne) {
  write_shards();
  for (const auto& open : {load_tensors, map_tensors}) {
    const TensorFile content = open(folder, "");
    ASSERT_EQ(content.tensors.size(), 3u);
    EXPECT_TRUE(at::equal(content.tensors.at("layer.0.w"), at::arange(4.0)));
    EXPECT_TRUE(at::equal(content.tensors.at("layer.1.b"), at::full(3, 2.0)));
    EXPECT_EQ(content.metadata, (std::map<std::string, std::string>{{"format", "pt"}, {"who", "one"}}));
  }
}

TEST_F(CheckpointFolder, APrefixOpensOnlyTheShardsItNeeds) {
  write_shards();
  std::filesystem::remove(path("two.safetensors"));
  const TensorFile content = map_tensors(folder, "layer.0.");
  ASSERT_EQ(content.tensors.size(), 1u);
  EXPECT_TRUE(at::equal(content.tensors.at("layer.0.w"), at::arange(4.0)));
  EXPECT_SAYS(map_tensors(folder, "layer.1."), (path("two.safetensors") + ": cannot read").c_str());
  EXPECT_TRUE(map_tensors(folder, "none").tensors.empty());
  EXPECT_EQ(load_tensors(path("one.safetensors"), "layer.1.").tensors.size(), 1u);
}

TEST_F(CheckpointFolder, OneFileGoesBeforeAnIndex) {
  write_shards();
  save_tensors(path("model.safetensors"), {{{"whole", at::zeros(1)}}, {}});
  EXPECT_EQ(load_tensors(folder).tensors.count("whole"), 1u);
}

TEST_F(CheckpointFolder, AnIndexThatDoesNotFitItsShardsListsEverything) {
  write_shards();
  write_index(R"("layer.0.w":"two.safetensors","layer.1.b":"two.safetensors","gone":"one.safetensors")");
  const std::string message = testing::message_of([&] { map_tensors(folder); });
  for (const std::string& words :
       {folder + ": shards do not fit their index: ", "'gone' is missing from " + path("one.safetensors"),
        "'layer.0.w' is missing from " + path("two.safetensors"),
        std::string("'layer.0.w' stands, unknown to the index, in "),
        std::string("'layer.1.w' stands, unknown to the index, in ")})
    EXPECT_NE(message.find(words), std::string::npos) << words << "\n" << message;
}

TEST_F(CheckpointFolder, HostileIndexesAreRefused) {
  save_tensors(path("one.safetensors"), {{{"w", at::zeros(1)}}, {}});
  const auto says = [&](const std::string& text, const char* words) {
    write_file(path("model.safetensors.index.json"), text);
    const std::string message = testing::message_of([&] { load_tensors(folder); });
    EXPECT_EQ(message.find(path("model.safetensors.index.json")), 0u) << message;
    EXPECT_NE(message.find(words), std::string::npos) << text << "\n" << message;
  };
  says("", "no JSON object");
  says("7", "no JSON object");
  says("[]", "no JSON object");
  says("{", "no JSON object");
  says("{}", "holds no weight_map");
  says(R"({"weight_map":[]})", "holds no weight_map");
  says(R"({"a":)" + std::string(100000, '['), "no JSON object");
  says(R"({"weight_map":{"w":7}})", "holds for 'w' something else");
  says(R"({"weight_map":{"w":{}}})", "holds for 'w' something else");
  says(R"({"weight_map":{"w":"a","w":"b"}})", "names 'w' twice");
  says(R"({"weight_map":{},"weight_map":{}})", "holds 'weight_map' twice");
  for (const char* name : {"", ".", "..", "../one.safetensors", "/etc/passwd", "a/b", "a\\u0000b"})
    says(std::string(R"({"weight_map":{"w":")") + name + "\"}}", "expected the name of a file beside the index");
}

TEST_F(CheckpointFolder, MappedTensorsOutliveTheFileAndNeverChangeIt) {
  save_tensors(path("x"), {{{"a", at::arange(5000.0)}, {"empty", at::empty({0, 3})}, {"scalar", at::full({}, 2)}}, {}});
  TensorFile content = map_tensors(path("x"));
  at::Tensor a = content.tensors.at("a");
  EXPECT_EQ(content.tensors.at("empty").sizes(), (std::vector<int64_t>{0, 3}));
  EXPECT_EQ(content.tensors.at("scalar").item<int64_t>(), 2);
  content.tensors.clear();
  a.mul_(2);
  EXPECT_TRUE(at::equal(map_tensors(path("x")).tensors.at("a"), at::arange(5000.0)));
  save_tensors(path("x"), {{{"a", at::zeros(5000)}}, {}});
  EXPECT_TRUE(at::equal(a, 2 * at::arange(5000.0)));
  std::filesystem::remove(path("x"));
  EXPECT_TRUE(at::equal(a, 2 * at::arange(5000.0)));
}

TEST_F(CheckpointFolder, TensorsAtOddPlacesAreAligned) {
  // 3 bytes of data before the floats, and a header of odd length
  const std::string header = R"({"u":{"dtype":"U8","shape":[3],"data_offsets":[0,3]},)"
                             R"("f":{"dtype":"F32","shape":[2],"data_offsets":[3,11]}})";
  for (size_t pad = 0; pad < 4; ++pad) {
    std::string bytes = testing::file_of(header + std::string(pad, ' '), 3);
    const float numbers[2] = {1.5f, -2};
    bytes.append(reinterpret_cast<const char*>(numbers), sizeof(numbers));
    write_file(path("odd"), bytes);
    const at::Tensor f = map_tensors(path("odd")).tensors.at("f");
    EXPECT_EQ(reinterpret_cast<uintptr_t>(f.const_data_ptr()) % 4, 0u);
    EXPECT_EQ(f[0].item<float>(), 1.5f);
    EXPECT_EQ(f[1].item<float>(), -2.0f);
  }
}

}  // namespace
}  // namespace turnout
